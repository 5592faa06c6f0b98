//! Guest memory: anonymous, reserved nowhere until touched. Private, except for a VM of which another
//! process serves a device: that one gets it as a file.

pub mod release;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::GuestMemory;
use crate::arch::layout;

/// Size of the guest's pages.
pub const PAGE_SIZE: u64 = 4096;

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("cannot map {len} bytes of guest memory")]
    Map {
        /// Length in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: MmapRegionError,
    },
    /// The host has no file for memory that is shared.
    #[error("cannot make a file of {len} bytes for guest memory")]
    File {
        /// Length in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The host refused the mapping of the devices' windows.
    #[error("cannot map the windows of the devices")]
    Windows(#[source] MmapRegionError),
    /// The size is not one that this host can address.
    #[error("{mib} MiB of guest memory cannot be laid out")]
    Layout {
        /// The size.
        mib: u32,
    },
    /// KVM refused a memory slot.
    #[error("cannot register guest memory at {address:#x} with KVM")]
    Register {
        /// Its guest-physical address.
        address: u64,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A file could not be read into guest memory.
    #[error("cannot place {len} bytes at guest address {address:#x}")]
    Place {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The range is not in guest memory.
    #[error("{len} bytes at guest address {address:#x} do not fit into guest memory")]
    NoSuchRange {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The ranges of so much memory: up to the hole below 4 GiB, the rest above it.
fn ranges(mib: u32) -> Vec<(GuestAddress, u64)> {
    let len = u64::from(mib) << 20;
    let low = len.min(layout::HOLE_START.0);
    let mut ranges = vec![(GuestAddress(0), low)];
    let high = len.saturating_sub(low);
    if high > 0 {
        ranges.push((layout::ABOVE_HOLE, high));
    }
    ranges
}

/// Who sees guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// This process and KVM.
    Private,
    /// Also processes that get its file, [`GuestMemoryRegion::file_offset`].
    Shared,
}

/// Maps guest memory. Nothing of it is resident yet.
///
/// # Errors
/// The host has no address space for it, or no file.
pub fn map(mib: u32, sharing: Sharing) -> Result<GuestMemory, MemoryError> {
    let file = match sharing {
        Sharing::Private => None,
        Sharing::Shared => Some(Arc::new(memory_file(u64::from(mib) << 20)?)),
    };
    let mut regions = Vec::new();
    let mut offset = 0_u64;
    for (start, len) in ranges(mib) {
        let size = usize::try_from(len).map_err(|_| MemoryError::Layout { mib })?;
        let builder =
            MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match &file {
            None => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            Some(file) => builder
                .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
        };
        let mapping: MmapRegion<()> =
            builder.build().map_err(|source| MemoryError::Map { len, source })?;
        ask_for_huge_pages(&mapping);
        regions.push(GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Layout { mib })?);
        offset = offset.saturating_add(len);
    }
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::Layout { mib })
}

/// A file without a name that holds guest memory. Sealed: whoever gets it cannot cut it off under
/// this process, which would be a SIGBUS here.
fn memory_file(len: u64) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::File { len, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let file = match memfd_create("guest-memory", flags) {
        // Before Linux 6.3 there is no such flag.
        Err(Errno::INVAL) => {
            memfd_create("guest-memory", flags.difference(MemfdFlags::NOEXEC_SEAL))
        }
        made => made,
    };
    let file = file.map_err(failed)?;
    ftruncate(&file, len).map_err(failed)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(failed)?;
    Ok(file.into())
}

/// Asks for huge pages: each saves the guest 511 faults on its way up, each of which leaves the
/// guest and comes back. A host that has them switched off refuses; it is slower there, not wrong.
fn ask_for_huge_pages(mapping: &MmapRegion<()>) {
    // SAFETY: the range is the mapping's own, which is alive; the advice changes no content.
    let advised =
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
    if advised != 0 {
        tracing::debug!("this host gives no huge pages to guest memory");
    }
}

/// Makes guest memory known to KVM, a slot per region.
///
/// Called before the interrupt controller and the ioeventfds exist: from then on every new slot waits
/// for a grace period.
///
/// # Errors
/// KVM refuses a slot.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0_u32..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping that `memory` owns; the machine keeps `memory` until
        // the process ends, longer than the VM.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|source| MemoryError::Register { address, source })?;
    }
    Ok(())
}

/// Copies `len` bytes of `file`, from `offset`, to guest address `address`.
///
/// Copied, not mapped: guest memory is made of huge pages where the host has them, and a page of a
/// mapped file would be a fault of its own, twice if it is written (docs/adr/0002).
///
/// # Errors
/// The range is not in guest memory, or the file cannot be read that far.
pub fn place_file(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    address: GuestAddress,
    len: u64,
) -> Result<(), MemoryError> {
    let size = usize::try_from(len).ok().filter(|size| memory.check_range(address, *size));
    let size = size.ok_or(MemoryError::NoSuchRange { address: address.0, len })?;
    let failed = |source| MemoryError::Place { address: address.0, len, source };
    let mut reader = file;
    reader.seek(SeekFrom::Start(offset)).map_err(failed)?;
    memory
        .read_exact_volatile_from(address, &mut reader, size)
        .map_err(|error| failed(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn memory_continues_above_the_hole() {
        let total = |mib| ranges(mib).iter().map(|(_, len)| len).sum::<u64>();
        assert_eq!(ranges(512), [(GuestAddress(0), 512 << 20)]);
        assert_eq!(ranges(3072).len(), 1);
        assert_eq!(ranges(3073)[1], (GuestAddress(1 << 32), 1 << 20));
        for mib in [48, 3071, 3072, 4096, 1024 * 1024] {
            assert_eq!(total(mib), u64::from(mib) << 20);
        }
    }

    #[test]
    fn shared_memory_is_one_file_that_cannot_be_cut_off() {
        let memory = map(4096, Sharing::Shared).unwrap();
        let files: Vec<_> = memory.iter().map(|region| region.file_offset().unwrap()).collect();
        assert_eq!(files.iter().map(|file| file.start()).collect::<Vec<_>>(), [0, 3072 << 20]);
        // What one side writes the other sees, in both ranges.
        let above = 1 << 32;
        for address in [0x1000, above] {
            memory.write_slice(b"seen", GuestAddress(address)).unwrap();
        }
        let mut seen = [0; 4];
        for offset in [0x1000, 3072 << 20] {
            files[0].file().read_exact_at(&mut seen, offset).unwrap();
            assert_eq!(&seen, b"seen");
        }
        assert!(files[0].file().set_len(0).is_err());
        assert!(files[0].file().set_len(1 << 40).is_err());
        let private = map(48, Sharing::Private).unwrap();
        assert!(private.iter().all(|region| region.file_offset().is_none()));
    }

    #[test]
    fn a_part_of_a_file_is_placed_and_nothing_beside_it() {
        let memory = map(48, Sharing::Private).unwrap();
        memory.write_slice(&[0xff; 0x4000], GuestAddress(0x10_0000)).unwrap();
        let bytes: Vec<u8> = (0..9000_u32).map(|i| (i * 7) as u8).collect();
        place_file(&memory, &file(&bytes), 100, GuestAddress(0x10_0010), 8000).unwrap();
        assert_eq!(read(&memory, 0x10_0010, 8000), bytes[100..8100]);
        assert_eq!(read(&memory, 0x10_0000, 16), [0xff; 16]);
        assert_eq!(read(&memory, 0x10_0010 + 8000, 16), [0xff; 16]);
    }

    #[test]
    fn a_file_that_ends_too_early_is_refused() {
        let memory = map(48, Sharing::Private).unwrap();
        assert!(matches!(
            place_file(&memory, &file(&[1; 4096]), 4000, GuestAddress(0x10_0000), 4096),
            Err(MemoryError::Place { len: 4096, .. })
        ));
    }

    #[test]
    fn a_range_outside_of_memory_is_refused() {
        let memory = map(48, Sharing::Private).unwrap();
        let file = file(&[0; 8192]);
        for (address, len) in [(48 << 20, 4096), ((48 << 20) - 4096, 8192), (u64::MAX - 4095, 4096)]
        {
            assert!(matches!(
                place_file(&memory, &file, 0, GuestAddress(address), len),
                Err(MemoryError::NoSuchRange { .. })
            ));
        }
    }
}

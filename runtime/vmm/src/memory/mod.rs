//! Guest memory: anonymous, private, reserved nowhere until touched.

use std::fs::File;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::GuestMemory;
use crate::arch::layout;

/// Granule of mappings.
pub const PAGE_SIZE: u64 = 4096;

/// Name of guest memory in `/proc/PID/maps`, so that it can be told from the VMM's own.
pub const MAPPING_NAME: &std::ffi::CStr = c"husk-guest";

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
    /// A file could not be mapped or read into guest memory.
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

/// Maps guest memory. Nothing of it is resident yet.
///
/// # Errors
/// The host has no address space for it.
pub fn map(mib: u32) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::new();
    for (start, len) in ranges(mib) {
        let size = usize::try_from(len).map_err(|_| MemoryError::Layout { mib })?;
        let mapping: MmapRegion<()> = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { len, source })?;
        name(&mapping);
        regions.push(GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Layout { mib })?);
    }
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::Layout { mib })
}

/// Names a mapping for whoever reads `/proc/PID/smaps`. A kernel without `ANON_VMA_NAME` refuses;
/// nothing depends on it.
fn name(mapping: &MmapRegion<()>) {
    // SAFETY: the range is the mapping's own, which is alive, and the name a NUL-terminated string
    // that the kernel copies.
    let named = unsafe {
        libc::prctl(
            libc::PR_SET_VMA,
            libc::PR_SET_VMA_ANON_NAME,
            mapping.as_ptr(),
            mapping.size(),
            MAPPING_NAME.as_ptr(),
        )
    };
    if named != 0 {
        tracing::debug!("this kernel does not name anonymous memory");
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

/// Places `len` bytes of `file`, from `offset`, at guest address `address`.
///
/// Where the page offsets of both agree the file is mapped over guest memory, private and
/// copy-on-write: nothing is read until the guest touches it, and all VMs of a host share the pages
/// that they do not write. Otherwise it is copied. Bytes of the last page behind the file's part are
/// zeroed.
///
/// The file must not shrink while the VM runs: the guest's access to what is gone would end the VM.
///
/// # Errors
/// The range is not in guest memory, or the file cannot be mapped or read.
pub fn place_file(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    address: GuestAddress,
    len: u64,
) -> Result<(), MemoryError> {
    if len == 0 {
        return Ok(());
    }
    let no_range = || MemoryError::NoSuchRange { address: address.0, len };
    let failed = |source| MemoryError::Place { address: address.0, len, source };
    let delta = offset.checked_rem(PAGE_SIZE).unwrap_or_default();
    if delta != address.0.checked_rem(PAGE_SIZE).unwrap_or_default() {
        return copy_file(memory, file, offset, address, len);
    }
    // The mapping covers whole pages. What it drags in before `address` belongs to the file's
    // preceding bytes; boot images have nothing else on that page.
    let start = GuestAddress(address.0.checked_sub(delta).ok_or_else(no_range)?);
    let file_start = offset.checked_sub(delta).ok_or_else(no_range)?;
    let used = len.checked_add(delta).ok_or_else(no_range)?;
    let mapped = used.checked_next_multiple_of(PAGE_SIZE).ok_or_else(no_range)?;
    let (region, inside) = memory.to_region_addr(start).ok_or_else(no_range)?;
    let room = region.len().checked_sub(inside.0).ok_or_else(no_range)?;
    if mapped > room {
        return Err(no_range());
    }
    let (Ok(size), Ok(inside), Ok(file_start)) =
        (usize::try_from(mapped), usize::try_from(inside.0), i64::try_from(file_start))
    else {
        return Err(no_range());
    };
    // SAFETY: the range [inside, inside + size) lies in the region's mapping (checked above), which
    // is ours alone: MAP_FIXED replaces pages of it and nothing else. The region unmaps its whole
    // range when it is dropped, these pages included. `VolatileSlice`s into it stay valid.
    let placed = unsafe {
        libc::mmap(
            region.as_ptr().add(inside).cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            file_start,
        )
    };
    if placed == libc::MAP_FAILED {
        return Err(failed(std::io::Error::last_os_error()));
    }
    let tail = usize::try_from(mapped.saturating_sub(used)).map_err(|_| no_range())?;
    if tail > 0 {
        let end = GuestAddress(start.0.checked_add(used).ok_or_else(no_range)?);
        memory
            .write_slice(&vec![0; tail], end)
            .map_err(|error| failed(std::io::Error::other(error)))?;
    }
    Ok(())
}

fn copy_file(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    address: GuestAddress,
    len: u64,
) -> Result<(), MemoryError> {
    use std::io::{Seek, SeekFrom};
    let failed = |source| MemoryError::Place { address: address.0, len, source };
    let size =
        usize::try_from(len).map_err(|_| MemoryError::NoSuchRange { address: address.0, len })?;
    let mut reader = file;
    reader.seek(SeekFrom::Start(offset)).map_err(failed)?;
    memory
        .read_exact_volatile_from(address, &mut &*reader, size)
        .map_err(|error| failed(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
    fn a_file_is_mapped_and_the_rest_of_its_last_page_is_zero() {
        let memory = map(48).unwrap();
        memory.write_slice(&[0xff; 3 * 4096], GuestAddress(0x10_0000)).unwrap();
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| i as u8).collect();
        place_file(&memory, &file(&bytes), 4096, GuestAddress(0x10_0000), 5000).unwrap();
        assert_eq!(read(&memory, 0x10_0000, 5000), bytes[4096..9096]);
        assert_eq!(read(&memory, 0x10_0000 + 5000, 3192), vec![0; 3192]);
        assert_eq!(read(&memory, 0x10_0000 + 8192, 4096), vec![0xff; 4096]);
    }

    #[test]
    fn the_guest_never_writes_into_the_file() {
        let memory = map(48).unwrap();
        let file = file(&[7; 4096]);
        place_file(&memory, &file, 0, GuestAddress(0x20_0000), 4096).unwrap();
        memory.write_slice(&[1; 4096], GuestAddress(0x20_0000)).unwrap();
        let mut back = [0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        assert_eq!(back, [7; 4096]);
    }

    #[test]
    fn an_unaligned_part_is_copied() {
        let memory = map(48).unwrap();
        let bytes: Vec<u8> = (0..9000_u32).map(|i| (i * 7) as u8).collect();
        place_file(&memory, &file(&bytes), 100, GuestAddress(0x10_0000), 8000).unwrap();
        assert_eq!(read(&memory, 0x10_0000, 8000), bytes[100..8100]);
    }

    #[test]
    fn a_range_outside_of_memory_is_refused() {
        let memory = map(48).unwrap();
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

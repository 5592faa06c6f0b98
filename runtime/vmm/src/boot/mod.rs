//! Loading what the guest starts with: kernel and initramfs.

mod elf;

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestMemory;
use crate::arch::boot_params::Initramfs;
use crate::arch::layout;
use crate::memory::{self, MemoryError, PAGE_SIZE};

pub use elf::{ElfError, Segment};

/// The kernel or the initramfs cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel is not an ELF executable for this architecture.
    #[error("the kernel image is not usable")]
    Elf(#[from] ElfError),
    /// The kernel lies where guest memory is not.
    #[error("the kernel does not fit into guest memory; give the pod more")]
    KernelMemory(#[source] MemoryError),
    /// The initramfs does not fit beside the kernel.
    #[error("the initramfs of {len} bytes does not fit into guest memory behind the kernel")]
    InitramfsMemory {
        /// Its length.
        len: u64,
    },
    /// The initramfs cannot be placed.
    #[error("cannot load the initramfs")]
    Initramfs(#[source] MemoryError),
    /// The initramfs is empty or cannot be examined.
    #[error("the initramfs is {len} bytes long")]
    InitramfsLength {
        /// Its length.
        len: u64,
    },
    /// A file's size cannot be had.
    #[error("cannot examine {what}")]
    Stat {
        /// Which file.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Guest-physical address of its first instruction.
    pub entry: u64,
    /// First address behind it (its `.bss` included).
    pub end: u64,
}

/// Loads an uncompressed ELF kernel: each segment to its physical address; `.bss` is what guest memory
/// is anyway: zero.
///
/// # Errors
/// It is not such a file, is truncated, or does not fit.
pub fn load_kernel(memory: &GuestMemory, file: &File) -> Result<LoadedKernel, LoadError> {
    let image = elf::read(file)?;
    let mut end = layout::HIGH_MEMORY.0;
    for segment in &image.segments {
        if segment.address < layout::HIGH_MEMORY.0 {
            return Err(ElfError::LowSegment { address: segment.address }.into());
        }
        let (offset, address) = (segment.offset, GuestAddress(segment.address));
        memory::place_file(memory, file, offset, address, segment.file_len)
            .map_err(LoadError::KernelMemory)?;
        // The elf module has checked that this does not overflow.
        end = end.max(segment.address.saturating_add(segment.memory_len));
    }
    let last = GuestAddress(end.saturating_sub(1));
    if !memory.address_in_range(last) {
        let len = end.saturating_sub(layout::HIGH_MEMORY.0);
        let source = MemoryError::NoSuchRange { address: layout::HIGH_MEMORY.0, len };
        return Err(LoadError::KernelMemory(source));
    }
    Ok(LoadedKernel { entry: image.entry, end })
}

/// Places the initramfs at the top of low memory, behind the kernel.
///
/// # Errors
/// It is empty, or does not fit between the kernel's end and the top.
pub fn load_initramfs(
    memory: &GuestMemory,
    file: &File,
    kernel_end: u64,
) -> Result<Initramfs, LoadError> {
    let metadata =
        file.metadata().map_err(|source| LoadError::Stat { what: "the initramfs", source })?;
    let len = metadata.len();
    if len == 0 {
        return Err(LoadError::InitramfsLength { len });
    }
    let too_large = || LoadError::InitramfsMemory { len };
    let top = memory
        .iter()
        .map(|region| region.start_addr().0.saturating_add(region.len()))
        .filter(|end| *end <= layout::HOLE_START.0)
        .max()
        .unwrap_or_default();
    let pages = len.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_large)?;
    let address = top.checked_sub(pages).filter(|a| *a >= kernel_end).ok_or_else(too_large)?;
    let placed = Initramfs {
        address: u32::try_from(address).map_err(|_| too_large())?,
        len: u32::try_from(len).map_err(|_| too_large())?,
    };
    memory::place_file(memory, file, 0, GuestAddress(address), len)
        .map_err(LoadError::Initramfs)?;
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::elf::tests::{Builder, file};
    use super::*;
    use crate::memory::Sharing;

    #[test]
    fn segments_land_at_their_physical_addresses() {
        let memory = memory::map(48, Sharing::Private).unwrap();
        let kernel = Builder::default()
            .entry(0x100_0010)
            .segment(0x100_0000, 0x1000, b"text", 0x3000)
            .segment(0x120_0000, 0x3000, b"data", 8)
            .file();
        let loaded = load_kernel(&memory, &kernel).unwrap();
        assert_eq!(loaded, LoadedKernel { entry: 0x100_0010, end: 0x120_0008 });
        let mut text = [0xff; 8];
        memory.read_slice(&mut text, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&text, b"text\0\0\0\0");
        memory.read_slice(&mut text, GuestAddress(0x120_0000)).unwrap();
        assert_eq!(&text, b"data\0\0\0\0");
    }

    #[test]
    fn a_kernel_larger_than_memory_is_refused() {
        let memory = memory::map(48, Sharing::Private).unwrap();
        let kernel = Builder::default().segment(0x100_0000, 0x1000, b"x", 64 << 20).file();
        assert!(matches!(load_kernel(&memory, &kernel), Err(LoadError::KernelMemory(_))));
        let low = Builder::default().segment(0x7000, 0x1000, b"x", 8).file();
        assert!(matches!(
            load_kernel(&memory, &low),
            Err(LoadError::Elf(ElfError::LowSegment { address: 0x7000 }))
        ));
    }

    #[test]
    fn the_initramfs_lies_at_the_top_and_never_over_the_kernel() {
        let memory = memory::map(48, Sharing::Private).unwrap();
        let mut cpio = tempfile::tempfile().unwrap();
        cpio.write_all(&[b'c'; 5000]).unwrap();
        let placed = load_initramfs(&memory, &cpio, 0x200_0000).unwrap();
        assert_eq!(placed, Initramfs { address: (48 << 20) - 8192, len: 5000 });
        let end = (48 << 20) - 8191;
        assert!(matches!(
            load_initramfs(&memory, &cpio, end),
            Err(LoadError::InitramfsMemory { len: 5000 })
        ));
        assert!(matches!(
            load_initramfs(&memory, &file(&[]), 0),
            Err(LoadError::InitramfsLength { len: 0 })
        ));
    }
}

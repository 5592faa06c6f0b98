//! Guest memory that goes back to the host.

use std::io;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::PAGE_SIZE;
use crate::GuestMemory;

/// Why memory did not go back.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The range is not in guest memory.
    #[error("{len} bytes at guest address {address:#x} are not in guest memory")]
    NoSuchRange {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The host does not take it.
    #[error("the host does not take back {len} bytes of guest memory")]
    Refused {
        /// Length in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Gives the whole pages of a range of guest memory back to the host; they read as zeros from then
/// on. Returns how many bytes they have. Bytes of the range that share a page with others stay.
///
/// # Errors
/// [`ReleaseError`]. A part of the range may have gone back.
pub fn release(memory: &GuestMemory, start: GuestAddress, len: u64) -> Result<u64, ReleaseError> {
    let none = || ReleaseError::NoSuchRange { address: start.raw_value(), len };
    let size = usize::try_from(len).map_err(|_| none())?;
    if !memory.check_range(start, size) {
        return Err(none());
    }
    let end = start.raw_value().checked_add(len).ok_or_else(none)?;
    let first = start.raw_value().checked_next_multiple_of(PAGE_SIZE).ok_or_else(none)?;
    let end = end.saturating_sub(end.checked_rem(PAGE_SIZE).unwrap_or(0));
    let mut released = 0_u64;
    for region in memory.iter() {
        let region_start = region.start_addr().raw_value();
        let from = first.max(region_start);
        let to = end.min(region_start.saturating_add(region.len()));
        let (Some(offset), Some(count)) = (from.checked_sub(region_start), to.checked_sub(from))
        else {
            continue;
        };
        if count > 0 {
            release_in(region, offset, count)?;
            released = released.saturating_add(count);
        }
    }
    Ok(released)
}

/// Gives back `len` bytes at `offset` of a region: whole pages, and in the region.
fn release_in(region: &GuestRegionMmap, offset: u64, len: u64) -> Result<(), ReleaseError> {
    let none = || ReleaseError::NoSuchRange { address: offset, len };
    let count = usize::try_from(len).map_err(|_| none())?;
    let slice = region.get_slice(MemoryRegionAddress(offset), count).map_err(|_| none())?;
    // Of a file, pages are given back by a hole in it: the mapping alone would let go of them, and
    // the file keep them.
    let advice = match region.file_offset() {
        Some(_) => libc::MADV_REMOVE,
        None => libc::MADV_DONTNEED,
    };
    // SAFETY: the range is a part of guest memory, whose mapping `region` keeps alive. Nobody has a
    // reference to it: the guest itself may change it at any time, and so may this.
    let result = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), count, advice) };
    if result == 0 {
        return Ok(());
    }
    Err(ReleaseError::Refused { len, source: io::Error::last_os_error() })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, FileOffset};

    use super::*;

    const LEN: u64 = 64 * PAGE_SIZE;

    fn filled(memory: &GuestMemory) {
        memory.write_slice(&vec![0xee; LEN as usize], GuestAddress(0)).unwrap();
    }

    /// Two regions that touch, so that a range can lie in both.
    fn private() -> GuestMemory {
        let half = LEN as usize / 2;
        let ranges = [(GuestAddress(0), half), (GuestAddress(LEN / 2), half)];
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    fn shared() -> (GuestMemory, File) {
        let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(LEN).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), LEN as usize, Some(offset))];
        (GuestMemory::from_ranges_with_files(ranges).unwrap(), file)
    }

    fn bytes(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn private_memory_reads_as_zeros_afterwards() {
        let memory = private();
        filled(&memory);
        let middle = LEN / 2 - PAGE_SIZE;
        assert_eq!(release(&memory, GuestAddress(middle), 2 * PAGE_SIZE).unwrap(), 2 * PAGE_SIZE);
        let bytes = bytes(&memory);
        let (at, end) = (middle as usize, (middle + 2 * PAGE_SIZE) as usize);
        assert!(bytes[at..end].iter().all(|byte| *byte == 0));
        assert!(bytes[..at].iter().chain(&bytes[end..]).all(|byte| *byte == 0xee));
    }

    #[test]
    fn shared_memory_leaves_its_file() {
        let (memory, file) = shared();
        filled(&memory);
        let blocks = || file.metadata().unwrap().blocks() * 512;
        let before = blocks();
        assert_eq!(release(&memory, GuestAddress(0), LEN / 2).unwrap(), LEN / 2);
        assert_eq!(before - blocks(), LEN / 2);
        assert_eq!(file.metadata().unwrap().len(), LEN);
        assert!(bytes(&memory)[..LEN as usize / 2].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn parts_of_pages_stay() {
        let memory = private();
        filled(&memory);
        let page = PAGE_SIZE;
        for (start, len, released) in
            [(1, page, 0), (1, 2 * page, page), (page - 1, page + 1, page), (5, 7, 0), (0, 0, 0)]
        {
            assert_eq!(release(&memory, GuestAddress(start), len).unwrap(), released);
        }
        assert_eq!(bytes(&memory)[0], 0xee);
        assert_eq!(bytes(&memory)[2 * page as usize], 0xee);
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let memory = private();
        for (start, len) in [(LEN, PAGE_SIZE), (0, LEN + 1), (u64::MAX - 1, 8), (0, u64::MAX)] {
            assert!(matches!(
                release(&memory, GuestAddress(start), len),
                Err(ReleaseError::NoSuchRange { .. })
            ));
        }
    }

    proptest! {
        /// Exactly the whole pages of the range become zeros.
        #[test]
        fn nothing_beside_the_range_changes(start in 0..LEN, len in 0..LEN) {
            let memory = private();
            filled(&memory);
            let result = release(&memory, GuestAddress(start), len);
            prop_assert_eq!(result.is_ok(), start + len <= LEN);
            let first = start.next_multiple_of(PAGE_SIZE);
            let whole = first..((start + len) / PAGE_SIZE * PAGE_SIZE).max(first);
            for (at, byte) in (0..).zip(bytes(&memory)) {
                let gone = result.is_ok() && whole.contains(&at);
                prop_assert_eq!(byte, if gone { 0 } else { 0xee });
            }
        }
    }
}

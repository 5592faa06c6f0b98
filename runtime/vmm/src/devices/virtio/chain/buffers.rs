//! Access to the bytes of a chain, bounded by its length, however it is cut into buffers.

use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestFault;
use crate::GuestMemory;

/// One buffer of a chain, in guest memory and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) len: u32,
}

/// A part of a chain. Every segment lies in guest memory and their lengths add up to `len`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) segments: &'a [Segment],
    pub(super) len: u32,
    /// For errors.
    pub(super) what: &'static str,
}

impl<'a> Buffers<'a> {
    fn too_short(&self, offset: u32, len: usize) -> GuestFault {
        GuestFault::TooShort { what: self.what, offset, len, have: self.len }
    }

    /// Calls `each` with the pieces of `len` bytes at `offset`, in order.
    fn for_each(
        &self,
        offset: u32,
        len: usize,
        mut each: impl FnMut(VolatileSlice<'a>),
    ) -> Result<(), GuestFault> {
        let short = || self.too_short(offset, len);
        let mut left = u32::try_from(len).map_err(|_| short())?;
        if offset.checked_add(left).is_none_or(|end| end > self.len) {
            return Err(short());
        }
        let mut skip = offset;
        for segment in self.segments {
            if left == 0 {
                break;
            }
            // Skipped entirely: `skip` shrinks by the segment's length.
            let Some(rest) = segment.len.checked_sub(skip).filter(|rest| *rest > 0) else {
                skip = skip.saturating_sub(segment.len);
                continue;
            };
            let take = rest.min(left);
            let fault = GuestFault::Buffer { address: segment.address.raw_value(), len: take };
            let (Some(address), Ok(count)) =
                (segment.address.checked_add(u64::from(skip)), usize::try_from(take))
            else {
                return Err(fault);
            };
            for slice in GuestMemoryBackend::get_slices(self.memory, address, count) {
                each(slice.map_err(GuestFault::Memory)?);
            }
            skip = 0;
            left = left.saturating_sub(take);
        }
        Ok(())
    }
}

/// The device-readable part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Readable<'a>(Buffers<'a>);

impl<'a> Readable<'a> {
    pub(super) fn new(buffers: Buffers<'a>) -> Self {
        Readable(buffers)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.len
    }

    /// Whether there is nothing to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Fills `into` with the bytes at `offset`. What is read is a copy: the guest can change its
    /// memory at any time, so read each value once.
    ///
    /// # Errors
    /// [`GuestFault::TooShort`].
    pub fn read_at(&self, offset: u32, into: &mut [u8]) -> Result<(), GuestFault> {
        let mut rest: &mut [u8] = into;
        let len = rest.len();
        self.0.for_each(offset, len, |slice| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        })
    }

    /// The value at `offset`.
    ///
    /// # Errors
    /// [`GuestFault::TooShort`].
    pub fn read_obj<T: ByteValued>(&self, offset: u32) -> Result<T, GuestFault> {
        let mut value = T::zeroed();
        self.read_at(offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// The pieces of guest memory that make up `len` bytes at `offset`, for system calls that read
    /// from them. Appended to `slices`.
    ///
    /// # Errors
    /// [`GuestFault::TooShort`].
    pub fn slices(
        &self,
        offset: u32,
        len: u32,
        slices: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), GuestFault> {
        let count = usize::try_from(len).map_err(|_| self.0.too_short(offset, usize::MAX))?;
        self.0.for_each(offset, count, |slice| slices.push(slice))
    }
}

/// The device-writable part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Writable<'a>(Buffers<'a>);

impl<'a> Writable<'a> {
    pub(super) fn new(buffers: Buffers<'a>) -> Self {
        Writable(buffers)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.len
    }

    /// Whether nothing can be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// [`GuestFault::TooShort`].
    pub fn write_at(&self, offset: u32, bytes: &[u8]) -> Result<(), GuestFault> {
        let mut rest = bytes;
        self.0.for_each(offset, bytes.len(), |slice| {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        })
    }

    /// The pieces of guest memory that make up `len` bytes at `offset`, for system calls that write
    /// to them. Appended to `slices`.
    ///
    /// # Errors
    /// [`GuestFault::TooShort`].
    pub fn slices(
        &self,
        offset: u32,
        len: u32,
        slices: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), GuestFault> {
        let count = usize::try_from(len).map_err(|_| self.0.too_short(offset, usize::MAX))?;
        self.0.for_each(offset, count, |slice| slices.push(slice))
    }
}

//! Access to the bytes of a chain, bounded by its length, however it is cut into buffers.

use std::marker::PhantomData;

use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestFault;
use crate::GuestMemory;

/// One buffer of a chain, in guest memory and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) len: u32,
}

/// A piece of guest memory in the form that vectored system calls take: `struct iovec` and nothing
/// else. The memory stays mapped for `'m`; the guest may change it at any time. Or memory of our own,
/// borrowed mutably for `'m`.
#[derive(Debug)]
#[repr(transparent)]
pub struct IoVec<'m> {
    raw: libc::iovec,
    memory: PhantomData<&'m GuestMemory>,
}

// SAFETY: an address in guest memory, which every thread may access: nobody has a reference to it.
unsafe impl Send for IoVec<'_> {}

impl<'m> IoVec<'m> {
    fn new(slice: &VolatileSlice<'m>) -> Self {
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        IoVec { raw: libc::iovec { iov_base, iov_len: slice.len() }, memory: PhantomData }
    }

    /// Memory of our own, for what has no place in the guest's.
    #[must_use]
    pub fn of(bytes: &'m mut [u8]) -> Self {
        let raw = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        IoVec { raw, memory: PhantomData }
    }

    /// The same piece, for a shorter time.
    #[must_use]
    pub fn again(&self) -> IoVec<'_> {
        IoVec { raw: self.raw, memory: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.iov_len == 0
    }

    /// The memory, for access by the VMM itself.
    #[must_use]
    pub fn as_volatile_slice(&self) -> VolatileSlice<'_> {
        // SAFETY: by construction this is memory that stays mapped for 'm, which outlives the borrow,
        // and that nobody has a reference to.
        unsafe { VolatileSlice::new(self.raw.iov_base.cast(), self.raw.iov_len) }
    }

    /// The same piece, without the lifetime.
    ///
    /// # Safety
    /// It must not be used after the memory is unmapped: the caller keeps the [`GuestMemory`] as long.
    pub(super) unsafe fn detach(self) -> IoVec<'static> {
        IoVec { raw: self.raw, memory: PhantomData }
    }
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

    /// Calls `each` with all pieces, in order.
    fn all(&self, each: impl FnMut(VolatileSlice<'a>)) -> Result<(), GuestFault> {
        let len = usize::try_from(self.len).map_err(|_| self.too_short(0, usize::MAX))?;
        self.for_each(0, len, each)
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

    /// All of it, for a vectored system call that reads from it. Appended to `iovecs`.
    ///
    /// # Errors
    /// [`GuestFault::Memory`].
    pub fn iovecs(&self, iovecs: &mut Vec<IoVec<'a>>) -> Result<(), GuestFault> {
        self.0.all(|slice| iovecs.push(IoVec::new(&slice)))
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

    /// The buffers themselves, for a device to which they say more than where bytes go: guest-physical
    /// address and length of each.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u32)> + use<'a> {
        self.0.segments.iter().map(|segment| (segment.address, segment.len))
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

    /// All of it, for a vectored system call that writes to it. Appended to `iovecs`.
    ///
    /// # Safety
    /// As of [`IoVec::detach`].
    pub(super) unsafe fn detached_iovecs(
        &self,
        iovecs: &mut Vec<IoVec<'static>>,
    ) -> Result<(), GuestFault> {
        // SAFETY: the caller promises it.
        self.0.all(|slice| iovecs.push(unsafe { IoVec::new(&slice).detach() }))
    }
}

//! The walk over a chain's descriptors (virtio 1.2, 2.7.5): reads each once, and checks everything
//! before a device sees anything.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::buffers::Segment;
use super::{GuestFault, MAX_CHAIN_DESCRIPTORS};
use crate::GuestMemory;

/// Size of a descriptor in bytes (virtio 1.2, 2.7.5).
const DESCRIPTOR_LEN: u32 = 16;

/// Reads the chain that begins at `head` of `table` into `segments`.
pub(super) fn walk(
    memory: &GuestMemory,
    mut table: Table,
    head: u16,
    segments: &mut Vec<Segment>,
) -> Result<Layout, GuestFault> {
    let mut layout = Layout::default();
    let mut index = head;
    segments.clear();
    // One more for the descriptor that refers to an indirect table. A loop ends here too.
    for _ in 0..=MAX_CHAIN_DESCRIPTORS {
        let descriptor = table.read(memory, index)?;
        if descriptor.refers_to_indirect_table() {
            table = table.enter(&descriptor)?;
            index = 0;
            continue;
        }
        layout.add(memory, segments, &descriptor)?;
        if !descriptor.has_next() {
            return Ok(layout);
        }
        index = descriptor.next();
    }
    Err(GuestFault::TooManyDescriptors { limit: MAX_CHAIN_DESCRIPTORS })
}

/// The descriptor table that is being walked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    address: GuestAddress,
    /// Number of descriptors.
    size: u32,
    /// Whether a descriptor in it may refer to an indirect table.
    may_enter: bool,
}

impl Table {
    /// The queue's own descriptor table. `indirect`: whether `VIRTIO_F_INDIRECT_DESC` is negotiated.
    pub(super) fn ring(address: GuestAddress, size: u16, indirect: bool) -> Self {
        Table { address, size: size.into(), may_enter: indirect }
    }

    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, GuestFault> {
        if u32::from(index) >= self.size {
            return Err(GuestFault::Next { next: index, size: self.size });
        }
        let fault = || GuestFault::Table { address: self.address.raw_value() };
        let offset = u64::from(index).checked_mul(DESCRIPTOR_LEN.into()).ok_or_else(fault)?;
        let address = self.address.checked_add(offset).ok_or_else(fault)?;
        memory.read_obj(address).map_err(|_| GuestFault::Table { address: address.raw_value() })
    }

    /// The table to which `descriptor` refers (virtio 1.2, 2.7.5.3): not from within another one, not
    /// with a `next`, of whole descriptors, and only if negotiated. The write flag is to be ignored.
    fn enter(&self, descriptor: &Descriptor) -> Result<Table, GuestFault> {
        let len = descriptor.len();
        let size = len / DESCRIPTOR_LEN;
        if !self.may_enter
            || descriptor.has_next()
            || size == 0
            || !len.is_multiple_of(DESCRIPTOR_LEN)
        {
            return Err(GuestFault::Indirect { len, flags: descriptor.flags() });
        }
        Ok(Table { address: descriptor.addr(), size, may_enter: false })
    }
}

/// Where a chain's readable part ends, and its lengths in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    /// Number of readable segments; the writable ones follow.
    pub(super) readable_segments: usize,
    pub(super) readable_len: u32,
    pub(super) writable_len: u32,
    seen_writable: bool,
}

impl Layout {
    fn add(
        &mut self,
        memory: &GuestMemory,
        segments: &mut Vec<Segment>,
        descriptor: &Descriptor,
    ) -> Result<(), GuestFault> {
        let (address, len) = (descriptor.addr(), descriptor.len());
        let writable = descriptor.is_write_only();
        if self.seen_writable && !writable {
            return Err(GuestFault::ReadableAfterWritable { address: address.raw_value() });
        }
        self.seen_writable |= writable;
        if len == 0 {
            return Ok(());
        }
        if segments.len() >= MAX_CHAIN_DESCRIPTORS {
            return Err(GuestFault::TooManyDescriptors { limit: MAX_CHAIN_DESCRIPTORS });
        }
        let fault = GuestFault::Buffer { address: address.raw_value(), len };
        let Ok(count) = usize::try_from(len) else { return Err(fault) };
        if !GuestMemoryBackend::check_range(memory, address, count) {
            return Err(fault);
        }
        let total = if writable { &mut self.writable_len } else { &mut self.readable_len };
        *total = total.checked_add(len).ok_or(GuestFault::TooLong)?;
        if self.readable_len.checked_add(self.writable_len).is_none() {
            return Err(GuestFault::TooLong);
        }
        segments.push(Segment { address, len });
        if !writable {
            self.readable_segments = segments.len();
        }
        Ok(())
    }
}

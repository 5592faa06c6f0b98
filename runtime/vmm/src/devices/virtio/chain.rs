//! Descriptor chains, and the queue that hands them out.
//!
//! [`Virtqueue`] wraps `virtio_queue::Queue` (the rings' arithmetic) and adds what a device must not
//! have to think of: a chain is walked and checked as a whole before the device sees it, it is
//! completed exactly once ([`Chain`]), and notifications are suppressed while the device is busy
//! ([`Virtqueue::serve`]).
//!
//! The walk is ours because `virtio_queue::DescriptorChain` ends silently at a malformed
//! descriptor: a device would take half a chain for a whole one. Here it is a [`GuestFault`].

mod buffers;
mod held;
mod walk;

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::buffers::{Buffers, Segment};
pub use self::buffers::{IoVec, Readable, Writable};
pub use self::held::BufferQueue;
use self::walk::{Layout, Table, walk};
use super::{F_INDIRECT_DESC, Interrupt};
use crate::GuestMemory;

/// Most descriptors in one chain, whether in the ring or in an indirect table. The specification
/// allows the queue's size (virtio 1.2, 2.7.5.3.1), Linux goes over it in indirect tables; also
/// `IOV_MAX`, so that a chain fits one vectored system call.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;

/// Most chains that [`Virtqueue::serve`] handles before it returns, so that a guest that never stops
/// adding chains cannot keep a worker from its other events, its stop among them.
pub const SERVE_BUDGET: usize = 64;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Where a ring's index is, after the flags (virtio 1.2, 2.7.6, 2.7.8).
const RING_INDEX: u64 = 2;
/// Where the rings' elements begin, after flags and index (virtio 1.2, 2.7.6, 2.7.8).
const RING_HEADER_LEN: u64 = 4;
/// Size of an element of the available ring: the head of a chain.
const AVAIL_ELEMENT_LEN: u64 = 2;
/// Size of an element of the used ring: the head of a chain and the length written.
const USED_ELEMENT_LEN: u64 = 8;

/// The guest broke the protocol of a queue. The device then needs a reset; the host is well.
#[derive(Debug, thiserror::Error)]
pub enum GuestFault {
    /// The available ring cannot be used: its index jumped by more than the queue's size, or the
    /// rings are not where they were when the queue was enabled.
    #[error("the rings are unusable")]
    Rings(#[source] virtio_queue::Error),
    /// The head of a chain is no descriptor.
    #[error("chain head {head} is not below the queue size {size}")]
    Head {
        /// The head's index.
        head: u16,
        /// The queue's size.
        size: u16,
    },
    /// A descriptor's `next` is no descriptor.
    #[error("next descriptor {next} is not below the table's size {size}")]
    Next {
        /// The index.
        next: u16,
        /// Number of descriptors in the table.
        size: u32,
    },
    /// A chain has a loop, or more than [`MAX_CHAIN_DESCRIPTORS`] descriptors.
    #[error("chain of more than {limit} descriptors")]
    TooManyDescriptors {
        /// How many there may be.
        limit: usize,
    },
    /// A descriptor table is not in guest memory.
    #[error("descriptor at {address:#x} is not in guest memory")]
    Table {
        /// Guest-physical address of the descriptor.
        address: u64,
    },
    /// A buffer is not in guest memory.
    #[error("buffer at {address:#x} of {len} bytes is not in guest memory")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// An indirect table inside an indirect table, together with `next`, of a bad length, or without
    /// the feature.
    #[error("indirect descriptor of {len} bytes with flags {flags:#x} is not allowed here")]
    Indirect {
        /// The table's length in bytes.
        len: u32,
        /// The descriptor's flags.
        flags: u16,
    },
    /// A device-readable buffer follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("readable buffer at {address:#x} follows a writable one")]
    ReadableAfterWritable {
        /// Guest-physical address of the readable buffer.
        address: u64,
    },
    /// The buffers are longer than 2^32 - 1 bytes together (virtio 1.2, 2.7.4.2).
    #[error("chain of more than 2^32 - 1 bytes")]
    TooLong,
    /// A request needs more bytes than its buffers have.
    #[error("{what} needs bytes {offset} to {offset}+{len} of {have}")]
    TooShort {
        /// The part of the chain.
        what: &'static str,
        /// Where the access begins.
        offset: u32,
        /// How long it is.
        len: usize,
        /// How many bytes there are.
        have: u32,
    },
    /// A chain is not of the form that the device's section of the specification demands.
    #[error("malformed request: {0}")]
    Request(&'static str),
    /// Guest memory that was checked could not be accessed.
    #[error("guest memory cannot be accessed")]
    Memory(#[source] GuestMemoryError),
}

/// Whether a queue has been emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The queue is empty and the driver will notify when it adds to it.
    Done,
    /// The budget is used up: call again without waiting for a notification.
    More,
}

/// When [`Virtqueue::serve`] interrupts the driver, if the driver wants to be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// After each chain: for requests that take long, whose submitter waits.
    EachChain,
    /// Once there is nothing more to do: for streams.
    AtEnd,
}

/// A queue of an active device: rings, memory, and the way to interrupt the driver.
#[derive(Debug)]
pub struct Virtqueue {
    memory: GuestMemory,
    queue: Queue,
    interrupt: Interrupt,
    indirect: bool,
    /// The used index as of when it was last decided whether to interrupt the driver.
    decided: u16,
    /// Of the chain that is out; kept so that popping does not allocate.
    segments: Vec<Segment>,
}

impl Virtqueue {
    /// Takes over a queue that the transport has validated. `features` are the negotiated ones.
    #[must_use]
    pub fn new(memory: GuestMemory, queue: Queue, interrupt: Interrupt, features: u64) -> Self {
        let indirect = features & F_INDIRECT_DESC != 0;
        let decided = queue.next_used();
        Virtqueue { memory, queue, interrupt, indirect, decided, segments: Vec::new() }
    }

    /// Handles the available chains with `handle` until there are none, or [`SERVE_BUDGET`] of them.
    /// The driver is asked not to notify meanwhile, and is interrupted as `notify` says.
    ///
    /// # Errors
    /// The guest's fault, found here or by `handle`; stop using the queue then.
    pub fn serve<E: From<GuestFault>>(
        &mut self,
        notify: Notify,
        mut handle: impl FnMut(Chain<'_>) -> Result<(), E>,
    ) -> Result<Progress, E> {
        self.disable_notification()?;
        let mut progress = Progress::More;
        for _ in 0..SERVE_BUDGET {
            let Some(chain) = self.pop_or_arm()? else {
                progress = Progress::Done;
                break;
            };
            handle(chain)?;
            if notify == Notify::EachChain {
                self.notify()?;
            }
        }
        self.notify()?;
        Ok(progress)
    }

    /// The next available chain. When there is none the driver is asked to notify: `None` means that
    /// a kick will come with the next chain.
    ///
    /// # Errors
    /// The guest's fault; stop using the queue then.
    pub fn pop_or_arm(&mut self) -> Result<Option<Chain<'_>>, GuestFault> {
        // Twice: the driver may add a chain just before it sees that it should notify. Should the
        // second look find nothing either, the index moved back, and only the guest suffers.
        for _ in 0..2 {
            if let Some(head) = self.next_head()? {
                return self.walk(head).map(Some);
            }
            if !self.queue.enable_notification(&self.memory).map_err(GuestFault::Rings)? {
                break;
            }
        }
        Ok(None)
    }

    /// Asks the driver not to notify; a hint, and undone by [`Virtqueue::pop_or_arm`].
    ///
    /// # Errors
    /// [`GuestFault::Rings`].
    pub fn disable_notification(&mut self) -> Result<(), GuestFault> {
        self.queue.disable_notification(&self.memory).map_err(GuestFault::Rings)
    }

    /// How many chains were completed since it was last decided whether to interrupt the driver.
    #[must_use]
    pub fn untold(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.decided)
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to know.
    ///
    /// # Errors
    /// [`GuestFault::Memory`].
    pub fn notify(&mut self) -> Result<(), GuestFault> {
        if self.is_interrupt_wanted()? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// As [`Virtqueue::notify`] for this queue and another of the same device, with one interrupt.
    ///
    /// # Errors
    /// [`GuestFault::Memory`].
    pub fn notify_with(&mut self, other: &mut Virtqueue) -> Result<(), GuestFault> {
        let other = other.is_interrupt_wanted()?;
        if self.is_interrupt_wanted()? || other {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Decides whether to interrupt the driver, for the chains completed since it was last decided.
    fn is_interrupt_wanted(&mut self) -> Result<bool, GuestFault> {
        let (before, now) = (self.decided, self.queue.next_used());
        if before == now {
            return Ok(false);
        }
        self.decided = now;
        // Our writes to the used ring come before our reading of what the driver wants, or both sides
        // could miss each other (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            // Whether the index passed `used_event` (2.7.10.1). The crate's answer counts only what
            // went through its `add_used`.
            let elements = u64::from(self.queue.size()).saturating_mul(AVAIL_ELEMENT_LEN);
            let event = self.driver_area(RING_HEADER_LEN.saturating_add(elements))?;
            Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
        } else {
            Ok(self.driver_area(0)? & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// The 16 bits at `offset` of the driver area.
    fn driver_area(&self, offset: u64) -> Result<u16, GuestFault> {
        let address = GuestAddress(self.queue.avail_ring().saturating_add(offset));
        let value: u16 =
            self.memory.load(address, Ordering::Relaxed).map_err(GuestFault::Memory)?;
        Ok(u16::from_le(value))
    }

    fn next_head(&mut self) -> Result<Option<u16>, GuestFault> {
        let size = self.queue.size();
        let mut available = self.queue.iter(&self.memory).map_err(GuestFault::Rings)?;
        let Some(head) = available.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        if head >= size {
            return Err(GuestFault::Head { head, size });
        }
        Ok(Some(head))
    }

    /// Reads the whole chain into `segments` and checks it.
    fn walk(&mut self, head: u16) -> Result<Chain<'_>, GuestFault> {
        let address = GuestAddress(self.queue.desc_table());
        let ring = Table::ring(address, self.queue.size(), self.indirect);
        let layout = walk(&self.memory, ring, head, &mut self.segments)?;
        Ok(Chain { head, layout, completed: false, queue: self })
    }

    /// Puts a chain into the used ring.
    fn give_back(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        self.queue.add_used(&self.memory, head, len).map_err(GuestFault::Rings)
    }

    /// Puts a chain into the used ring without telling; [`Virtqueue::publish_used`] tells of all. So
    /// that the driver sees several chains at once or none of them.
    fn stage_used(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        let slot = self.queue.next_used();
        let index = u64::from(slot.checked_rem(self.queue.size()).unwrap_or(0));
        let offset = index.saturating_mul(USED_ELEMENT_LEN).saturating_add(RING_HEADER_LEN);
        let address = GuestAddress(self.queue.used_ring().saturating_add(offset));
        let element = u64::from(head) | (u64::from(len) << 32);
        self.memory.write_obj(element.to_le(), address).map_err(GuestFault::Memory)?;
        self.queue.set_next_used(slot.wrapping_add(1));
        Ok(())
    }

    /// Moves the used ring's index over what was staged.
    fn publish_used(&mut self) -> Result<(), GuestFault> {
        let address = GuestAddress(self.queue.used_ring().saturating_add(RING_INDEX));
        let index = self.queue.next_used().to_le();
        self.memory.store(index, address, Ordering::Release).map_err(GuestFault::Memory)
    }
}

/// A descriptor chain that was popped from its queue: checked as a whole, and given back to the
/// driver exactly once, by [`Chain::complete`] or by being dropped. (Or not popped after all, by
/// [`Chain::put_back`].)
///
/// A dropped chain is given back with length 0. That is always true (the length promises how many
/// bytes at the front of the writable part hold an answer; none is a valid promise), and leaves the
/// driver its buffers: a chain that is never given back would hang it, and use up its queue.
#[derive(Debug)]
pub struct Chain<'q> {
    queue: &'q mut Virtqueue,
    head: u16,
    layout: Layout,
    completed: bool,
}

impl Chain<'_> {
    /// The buffers that the device reads.
    #[must_use]
    pub fn readable(&self) -> Readable<'_> {
        let segments = self.queue.segments.get(..self.layout.readable_segments).unwrap_or_default();
        let memory = &self.queue.memory;
        let len = self.layout.readable_len;
        Readable::new(Buffers { memory, segments, len, what: "readable part" })
    }

    /// The buffers that the device writes.
    #[must_use]
    pub fn writable(&self) -> Writable<'_> {
        let segments = self.queue.segments.get(self.layout.readable_segments..).unwrap_or_default();
        let memory = &self.queue.memory;
        let len = self.layout.writable_len;
        Writable::new(Buffers { memory, segments, len, what: "writable part" })
    }

    /// Gives the chain back to the driver, of whose writable part the first `written` bytes were
    /// written (virtio 1.2, 2.7.8). The driver learns of it by [`Virtqueue::notify`].
    ///
    /// # Errors
    /// [`GuestFault::Rings`].
    pub fn complete(mut self, written: u32) -> Result<(), GuestFault> {
        self.give_back(written.min(self.layout.writable_len))
    }

    /// Puts the chain back as if it had not been popped: it is the next one again.
    pub fn put_back(mut self) {
        self.completed = true;
        self.queue.queue.go_to_previous_position();
    }

    fn give_back(&mut self, written: u32) -> Result<(), GuestFault> {
        self.completed = true;
        let counters = self.queue.interrupt.counters();
        counters.count_to_guest(u64::from(written));
        counters.count_from_guest(u64::from(self.layout.readable_len));
        self.queue.give_back(self.head, written)
    }
}

impl Drop for Chain<'_> {
    fn drop(&mut self) {
        if !self.completed
            && let Err(error) = self.give_back(0)
        {
            // The rings were checked when the queue was enabled and memory does not shrink.
            tracing::warn!(%error, head = self.head, "cannot give a descriptor chain back");
        }
    }
}

#[cfg(test)]
mod tests;

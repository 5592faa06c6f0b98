//! A queue of empty buffers, for a device that learns only by filling them how many it needs.

use std::collections::VecDeque;

use virtio_queue::QueueT;

use super::{Chain, GuestFault, IoVec, MAX_CHAIN_DESCRIPTORS, Virtqueue};

/// Buffers of the driver that were popped, and are given back once something was written to them.
///
/// Every chain that is held is given back exactly once, by [`BufferQueue::complete`], or stays with
/// the device until its reset, as chains in the available ring do.
#[derive(Debug)]
pub struct BufferQueue {
    // Declared before the queue, whose memory they point to.
    /// The pieces of all held chains, in order, from `first` on.
    iovecs: Vec<IoVec<'static>>,
    first: usize,
    chains: VecDeque<Held>,
    /// Bytes of all held chains together.
    len: u64,
    queue: Virtqueue,
}

/// One chain.
#[derive(Debug, Clone, Copy)]
struct Held {
    head: u16,
    len: u32,
    iovecs: usize,
}

impl BufferQueue {
    /// Takes over a queue.
    #[must_use]
    pub fn new(queue: Virtqueue) -> Self {
        BufferQueue { iovecs: Vec::new(), first: 0, chains: VecDeque::new(), len: 0, queue }
    }

    /// Pops chains until there are `bytes`, or nothing more can be held: as many chains as the queue
    /// has entries, or as many pieces as one system call takes. `false` if neither is so and the
    /// driver has to add buffers: it was asked to notify then.
    ///
    /// # Errors
    /// A malformed chain, or one that is no empty buffer.
    pub fn hold(&mut self, bytes: u64) -> Result<bool, GuestFault> {
        if self.len >= bytes || self.is_full() {
            return Ok(true);
        }
        self.queue.disable_notification()?;
        while self.len < bytes && !self.is_full() {
            let Some(chain) = self.queue.pop_or_arm()? else { return Ok(false) };
            let held = take(chain, &mut self.iovecs)?;
            self.len = self.len.saturating_add(u64::from(held.len));
            self.chains.push_back(held);
        }
        Ok(true)
    }

    /// Whether no more chains are taken before some are given back. A driver that makes chains
    /// available more than once, or of thousands of pieces, gains nothing.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.chains.len() >= usize::from(self.queue.queue.size())
            || self.iovecs().len() >= MAX_CHAIN_DESCRIPTORS
    }

    /// Bytes that are held.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether none are.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of all held chains, in order.
    #[must_use]
    pub fn iovecs(&self) -> &[IoVec<'_>] {
        self.iovecs.get(self.first..).unwrap_or_default()
    }

    /// The pieces of the first chain.
    #[must_use]
    pub fn first_chain(&self) -> &[IoVec<'_>] {
        let count = self.chains.front().map_or(0, |held| held.iovecs);
        self.iovecs().get(..count).unwrap_or_default()
    }

    /// Writes `bytes` at `offset` of the held buffers. What does not fit is left out.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) {
        let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut rest = bytes;
        for iovec in self.iovecs() {
            if rest.is_empty() {
                break;
            }
            let slice = iovec.as_volatile_slice();
            let Ok(slice) = slice.offset(skip) else {
                skip = skip.saturating_sub(iovec.len());
                continue;
            };
            skip = 0;
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
    }

    /// How many chains the first `written` bytes take; `None` if there are not as many bytes.
    #[must_use]
    pub fn chains_for(&self, written: u64) -> Option<u16> {
        let mut left = written;
        for (count, held) in (1..).zip(&self.chains) {
            left = left.saturating_sub(u64::from(held.len));
            if left == 0 {
                return Some(count);
            }
        }
        None
    }

    /// Gives the chains that hold the first `written` bytes back to the driver, which sees all of them
    /// at once, and learns of it by [`BufferQueue::notify`].
    ///
    /// # Errors
    /// [`GuestFault`]; [`GuestFault::Request`] if fewer bytes are held.
    pub fn complete(&mut self, written: u64) -> Result<(), GuestFault> {
        let count = self
            .chains_for(written)
            .map(usize::from)
            .ok_or(GuestFault::Request("more was written than there are buffers"))?;
        self.queue.interrupt.counters().count_to_guest(written);
        let mut left = written;
        let mut pieces = 0_usize;
        for held in self.chains.drain(..count) {
            let len = held.len.min(u32::try_from(left).unwrap_or(u32::MAX));
            left = left.saturating_sub(u64::from(len));
            self.len = self.len.saturating_sub(u64::from(held.len));
            pieces = pieces.saturating_add(held.iovecs);
            self.queue.stage_used(held.head, len)?;
        }
        self.forget(pieces);
        self.queue.publish_used()
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to know.
    ///
    /// # Errors
    /// [`GuestFault::Memory`].
    pub fn notify(&mut self) -> Result<(), GuestFault> {
        self.queue.notify()
    }

    /// Drops the first `count` pieces.
    fn forget(&mut self, count: usize) {
        self.first = self.first.saturating_add(count);
        // Not each time: the rest would be moved for each packet.
        if self.first >= MAX_CHAIN_DESCRIPTORS || self.first >= self.iovecs.len() {
            self.iovecs.drain(..self.first.min(self.iovecs.len()));
            self.first = 0;
        }
    }
}

/// Takes a chain out of the queue's hands.
fn take(mut chain: Chain<'_>, iovecs: &mut Vec<IoVec<'static>>) -> Result<Held, GuestFault> {
    if !chain.readable().is_empty() {
        return Err(GuestFault::Request("an empty buffer is readable"));
    }
    let writable = chain.writable();
    let len = writable.len();
    if len == 0 {
        return Err(GuestFault::Request("an empty buffer has no room for a byte"));
    }
    let before = iovecs.len();
    // SAFETY: the pieces lie in the queue's memory, which the `BufferQueue` that owns `iovecs` keeps
    // mapped by owning the queue, and it lends them only for as long as it is borrowed itself.
    unsafe { writable.detached_iovecs(iovecs)? };
    let count = iovecs.len().saturating_sub(before);
    // From here on it is the holder's to give back.
    chain.completed = true;
    Ok(Held { head: chain.head, len, iovecs: count })
}

#[cfg(test)]
mod tests;

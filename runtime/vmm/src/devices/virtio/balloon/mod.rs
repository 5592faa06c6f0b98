//! The memory balloon (virtio 1.2, section 5.5): free memory of the guest goes back to the host.
//!
//! What does the work is free page reporting (5.5.6.7): from a second or two after memory was freed,
//! the driver tells of it in large pieces, and the host takes them. The guest may use them again
//! without a word; they are then zeros, which is what the host has.
//!
//! The balloon itself is here because each device has it, and no size is ever asked of it: a pod's
//! limits say how large it is, and what it does not use it reports (docs/adr/0023).

use super::chain::{Chain, GuestFault, Notify, Progress, Virtqueue};
use super::worker::{Handler, Poller, Worker, WorkerError, chain_of};
use super::{ActivateError, Activation, Interrupt, RING_FEATURES, VirtioDevice};
use crate::GuestMemory;
use crate::memory::release::{self, ReleaseError};
use vm_memory::GuestAddress;

/// Virtio device ID of a memory balloon.
pub const DEVICE_ID: u32 = 5;

/// `VIRTIO_BALLOON_F_PAGE_REPORTING` (5.5.3).
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, reporting. The queues for statistics and hints come before the last one where
/// they are negotiated (5.5.2); Linux leaves no numbers out for those that are not.
const QUEUE_SIZES: &[u16] = &[64, 64, 64];

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

/// Size of the pages of which the balloon is made, whatever the guest's pages are (5.5.6).
const BALLOON_PAGE: u64 = 4096;

/// Length of a page's number.
const PFN_LEN: u32 = 4;

/// Most pages that one request may be for; Linux's are for 256.
const MAX_PFNS: u32 = 1024;

/// Page numbers that are read at once.
const BLOCK_LEN: usize = 256 * PFN_LEN as usize;

/// `num_pages` and `actual` (5.5.4): no page is wanted, and none said to be there.
const CONFIG: &[u8] = &[0; 8];

/// The balloon of a VM.
#[derive(Debug, Default)]
pub struct Balloon {
    worker: Option<Worker>,
}

impl Balloon {
    /// A balloon that is not active yet.
    #[must_use]
    pub fn new() -> Self {
        Balloon::default()
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn queues_in_use(&self, features: u64) -> usize {
        if features & F_PAGE_REPORTING != 0 { QUEUE_SIZES.len() } else { REPORTING }
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_PAGE_REPORTING
    }

    fn config(&self) -> &[u8] {
        CONFIG
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
        let (queues, wiring) = activation.split_all();
        let handler = BalloonHandler { queues, releaser: Releaser::new(memory, interrupt) };
        self.worker = Some(Worker::spawn("balloon", wiring, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct BalloonHandler {
    queues: Vec<Virtqueue>,
    releaser: Releaser,
}

impl Handler for BalloonHandler {
    fn kicked(&mut self, index: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        let releaser = &mut self.releaser;
        let Some(queue) = self.queues.get_mut(index) else { return Ok(Progress::Done) };
        Ok(queue.serve(Notify::AtEnd, |chain| match index {
            INFLATE => releaser.inflate(chain),
            DEFLATE => deflate(chain),
            _ => releaser.report(chain),
        })?)
    }
}

/// What takes memory back.
pub struct Releaser {
    memory: GuestMemory,
    interrupt: Interrupt,
    /// Whether it was said that the host does not take memory.
    refused: bool,
}

impl Releaser {
    /// One for this guest's memory, which counts with the device's other counts.
    #[must_use]
    pub fn new(memory: GuestMemory, interrupt: Interrupt) -> Self {
        Releaser { memory, interrupt, refused: false }
    }

    /// A report of free pages: each buffer is a piece of free memory. Without
    /// `VIRTIO_BALLOON_F_PAGE_POISON`, they keep their content or become zeros (5.5.6.7.2).
    ///
    /// # Errors
    /// The chain is not of that form.
    pub fn report(&mut self, chain: Chain<'_>) -> Result<(), GuestFault> {
        if !chain.readable().is_empty() {
            return Err(GuestFault::Request("a report of free pages has a readable buffer"));
        }
        for (address, len) in chain.writable().ranges() {
            self.release(address, len.into())?;
        }
        chain.complete(0)
    }

    /// Pages that the driver puts into the balloon (5.5.6): it uses none before it takes them out.
    ///
    /// # Errors
    /// The chain is not of that form, or a page is not in guest memory.
    pub fn inflate(&mut self, chain: Chain<'_>) -> Result<(), GuestFault> {
        let len = pfns_len(&chain)?;
        let mut run = Run::default();
        let mut block = [0; BLOCK_LEN];
        let mut offset = 0;
        while offset < len {
            let left = usize::try_from(len.saturating_sub(offset)).unwrap_or(BLOCK_LEN);
            let bytes = block.get_mut(..left.min(BLOCK_LEN)).unwrap_or_default();
            chain.readable().read_at(offset, bytes)?;
            for pfn in bytes.as_chunks().0.iter().map(|pfn| u32::from_le_bytes(*pfn)) {
                if let Some(run) = run.push(pfn) {
                    self.release_run(run)?;
                }
            }
            offset = offset.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        }
        self.release_run(run)?;
        chain.complete(0)
    }

    fn release_run(&mut self, run: Run) -> Result<(), GuestFault> {
        let at = |pages: u64| pages.saturating_mul(BALLOON_PAGE);
        self.release(GuestAddress(at(run.first)), at(run.pages))
    }

    fn release(&mut self, address: GuestAddress, len: u64) -> Result<(), GuestFault> {
        match release::release(&self.memory, address, len) {
            Ok(released) => self.interrupt.counters().count_released(released),
            Err(ReleaseError::NoSuchRange { address, len }) => {
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                return Err(GuestFault::Buffer { address, len });
            }
            // It stays where it is, which the driver does not notice.
            Err(error @ ReleaseError::Refused { .. }) if !self.refused => {
                self.refused = true;
                tracing::warn!(error = chain_of(&error), "free memory of the guest stays in use");
            }
            Err(ReleaseError::Refused { .. }) => {}
        }
        Ok(())
    }
}

/// Pages that the driver takes out of the balloon: without `VIRTIO_BALLOON_F_MUST_TELL_HOST` it may
/// have used them before it says so. They are memory as any other.
fn deflate(chain: Chain<'_>) -> Result<(), GuestFault> {
    pfns_len(&chain)?;
    chain.complete(0)
}

/// The length of a request's array of page numbers.
fn pfns_len(chain: &Chain<'_>) -> Result<u32, GuestFault> {
    if !chain.writable().is_empty() {
        return Err(GuestFault::Request("a balloon request has a writable buffer"));
    }
    let len = chain.readable().len();
    if len > MAX_PFNS.saturating_mul(PFN_LEN) {
        return Err(GuestFault::Request("a balloon request has too many page numbers"));
    }
    if !len.is_multiple_of(PFN_LEN) {
        return Err(GuestFault::Request("a balloon request has a part of a page number"));
    }
    Ok(len)
}

/// Pages in a row.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    pages: u64,
}

impl Run {
    /// Adds a page. If it does not follow, it begins a new run, and the old one is returned.
    fn push(&mut self, pfn: u32) -> Option<Run> {
        let pfn = u64::from(pfn);
        if self.pages > 0 && pfn == self.first.saturating_add(self.pages) {
            self.pages = self.pages.saturating_add(1);
            return None;
        }
        let before = std::mem::replace(self, Run { first: pfn, pages: 1 });
        (before.pages > 0).then_some(before)
    }
}

#[cfg(test)]
mod tests;

//! What the queue pairs of a NIC share: the queues of the tap, and how many are in use.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::worker::as_fd;
use super::tap::Backend;

/// All queue pairs of a NIC.
///
/// [`Pairs::set_in_use`] is called by one thread at a time: by the transport before there is a worker,
/// then by the worker that has the control queue.
#[derive(Debug)]
pub(super) struct Pairs {
    backends: Vec<Box<dyn Backend>>,
    /// By pair: wakes its worker, so that it looks what has changed.
    doorbells: Vec<EventFd>,
    in_use: AtomicUsize,
}

impl Pairs {
    pub(super) fn new(backends: Vec<Box<dyn Backend>>) -> io::Result<Self> {
        let doorbells = backends
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        Ok(Pairs { backends, doorbells, in_use: AtomicUsize::new(1) })
    }

    pub(super) fn len(&self) -> usize {
        self.backends.len()
    }

    /// The host's end of a pair.
    pub(super) fn backend(&self, pair: usize) -> Option<&dyn Backend> {
        self.backends.get(pair).map(AsRef::as_ref)
    }

    /// What makes a pair's worker look.
    pub(super) fn doorbell(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.doorbells.get(pair).map(as_fd)
    }

    /// Whether the driver uses this pair: only then frames for the guest are taken from its queue.
    pub(super) fn is_in_use(&self, pair: usize) -> bool {
        pair < self.in_use.load(Ordering::SeqCst)
    }

    /// The first pair only, as the driver's default is (5.1.6.5.6), but without telling the host: the
    /// driver is about to say how many it uses, and until then what the host has for the others can
    /// wait where it is. Attaching and detaching costs the host far more than waiting.
    pub(super) fn start_with_one(&self) {
        self.in_use.store(1, Ordering::SeqCst);
    }

    /// The first `count` pairs from now on, for driver and host.
    pub(super) fn set_in_use(&self, count: usize) -> io::Result<()> {
        let Some((used @ [_, ..], unused)) = self.backends.split_at_checked(count) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // Those that are new come first: a failure then leaves the driver what it had.
        for backend in used {
            backend.set_attached(true)?;
        }
        self.in_use.store(count, Ordering::SeqCst);
        for pair in 0..self.len() {
            self.ring(pair);
        }
        unused.iter().try_for_each(|backend| backend.set_attached(false))
    }

    /// Wakes a pair's worker.
    pub(super) fn ring(&self, pair: usize) {
        if let Some(doorbell) = self.doorbells.get(pair)
            && let Err(error) = doorbell.write(1)
        {
            // Only a full counter: then it is awake already.
            tracing::warn!(%error, pair, "cannot ring a worker's doorbell");
        }
    }

    /// Makes a pair's doorbell silent.
    pub(super) fn silence(&self, pair: usize) -> io::Result<()> {
        match self.doorbells.get(pair).map(EventFd::read) {
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}

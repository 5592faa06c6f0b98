//! The thread that serves an active device.
//!
//! [`Worker`] owns the thread: it is told to stop by an eventfd and joined in `Drop`, so that a
//! device's reset is `self.worker = None`. The loop waits for the queues' kicks and for the device's
//! own descriptors ([`Poller`]), and hands them to the device's [`Handler`]; it owns the rules of
//! what happens when a handler fails:
//!
//! - the guest's fault ([`GuestFault`]): the device says `DEVICE_NEEDS_RESET` and the thread ends. It
//!   touches no queue any more; the driver's reset joins it.
//! - the host's fault, a panic included: reported to the [`Reporter`], which ends the VM. (The release
//!   profile aborts the process on a panic, which ends the VM too; the report is for other profiles.)

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::{GuestFault, Progress};
use super::{ActivateError, Interrupt, Wiring};
use crate::machine::report::Reporter;

/// Longest name of a thread (`TASK_COMM_LEN` less the terminating zero).
const MAX_THREAD_NAME: usize = 15;

/// Most events taken from epoll at once.
const MAX_EVENTS: usize = 32;

/// Epoll data of the stop eventfd. Tokens of devices are `u32`, so they cannot collide.
const STOP: u64 = 1 << 32;

/// Epoll data of queue 0's kick; the other queues' follow.
const FIRST_KICK: u64 = STOP + 1;

/// What a device does with its events. Lives on the worker's thread.
pub trait Handler: Send + 'static {
    /// Adds the device's own descriptors, if it has any. Called before the thread starts.
    ///
    /// # Errors
    /// The host refused; the device is then not activated.
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        let _ = poller;
        Ok(())
    }

    /// Queue number `queue` was kicked, or its last call returned [`Progress::More`].
    ///
    /// # Errors
    /// See [`WorkerError`].
    fn kicked(&mut self, queue: usize, poller: &Poller) -> Result<Progress, WorkerError>;

    /// The descriptor that was added with `token` is ready. Level-triggered: a descriptor that is
    /// left ready is reported again at once.
    ///
    /// # Errors
    /// See [`WorkerError`].
    fn ready(
        &mut self,
        token: u32,
        readiness: Readiness,
        poller: &Poller,
    ) -> Result<(), WorkerError> {
        let _ = (token, readiness, poller);
        Ok(())
    }
}

/// Why a handler cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The guest broke the protocol: its device needs a reset.
    #[error("the guest broke the device's protocol")]
    Guest(#[from] GuestFault),
    /// The host failed: the VM ends.
    #[error("cannot {what}")]
    Host {
        /// What the host was asked for, as an infinitive.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// For what a descriptor is watched, or ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// It can be read (or has reached its end).
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// The peer closed its end, or the descriptor has an error. Always watched.
    pub hangup: bool,
}

impl Readiness {
    /// Watch for reading.
    pub const READ: Readiness = Readiness { readable: true, writable: false, hangup: false };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.readable);
        flags.set(EventFlags::OUT, self.writable);
        flags
    }

    fn from_flags(flags: EventFlags) -> Self {
        Readiness {
            readable: flags.contains(EventFlags::IN),
            writable: flags.contains(EventFlags::OUT),
            hangup: flags.intersects(EventFlags::HUP | EventFlags::ERR),
        }
    }
}

/// The descriptors that a worker waits for.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    fn new() -> io::Result<Self> {
        Ok(Poller { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches `fd`; [`Handler::ready`] gets `token`. The descriptor stays the caller's, who removes
    /// it before closing it. With nothing to watch for, only a hang-up is reported.
    ///
    /// # Errors
    /// The host refused (no memory, too many watches).
    pub fn add(&self, fd: BorrowedFd<'_>, token: u32, watch: Readiness) -> io::Result<()> {
        self.add_raw(fd, u64::from(token), watch.flags())
    }

    /// Changes for what `fd` is watched.
    ///
    /// # Errors
    /// The descriptor is not watched, or the host refused.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u32, watch: Readiness) -> io::Result<()> {
        epoll::modify(&self.epoll, fd, EventData::new_u64(u64::from(token)), watch.flags())?;
        Ok(())
    }

    /// Stops watching `fd`.
    ///
    /// # Errors
    /// The descriptor is not watched.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        epoll::delete(&self.epoll, fd)?;
        Ok(())
    }

    fn add_raw(&self, fd: BorrowedFd<'_>, data: u64, flags: EventFlags) -> io::Result<()> {
        epoll::add(&self.epoll, fd, EventData::new_u64(data), flags)?;
        Ok(())
    }
}

/// `vmm_sys_util`'s eventfd has no `AsFd`.
#[must_use]
pub fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and stays borrowed as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A device's running thread. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread `husk-NAME` that serves a device with `handler`.
    ///
    /// # Errors
    /// [`ActivateError::Host`].
    pub fn spawn<H: Handler>(
        name: &str,
        wiring: Wiring,
        mut handler: H,
    ) -> Result<Worker, ActivateError> {
        let failed = |what| move |source| ActivateError::Host { what, source };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("an eventfd"))?;
        let poller = Poller::new().map_err(failed("an epoll instance"))?;
        poller
            .add_raw(as_fd(&stop), STOP, EventFlags::IN)
            .map_err(failed("a watch on the stop eventfd"))?;
        for (kick, data) in wiring.kicks.iter().zip(FIRST_KICK..) {
            poller
                .add_raw(as_fd(kick), data, EventFlags::IN)
                .map_err(failed("a watch on a queue's eventfd"))?;
        }
        handler.watch(&poller).map_err(failed("a watch on the device's descriptors"))?;

        let thread_name: String = format!("husk-{name}").chars().take(MAX_THREAD_NAME).collect();
        let device = name.to_owned();
        let Wiring { kicks, interrupt, reporter } = wiring;
        let pending = vec![false; kicks.len()];
        let event_loop = EventLoop { device, poller, kicks, pending, handler };
        let thread = std::thread::Builder::new()
            .name(thread_name)
            .spawn(move || event_loop.supervise(&interrupt, &reporter))
            .map_err(failed("a thread"))?;
        Ok(Worker { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            // Only a full counter: then the thread is being told already.
            tracing::warn!(%error, "cannot signal a worker's stop");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            // Its panic was reported while it unwound.
            tracing::error!("a device's worker had panicked");
        }
    }
}

struct EventLoop<H> {
    device: String,
    poller: Poller,
    kicks: Vec<EventFd>,
    /// By queue: call the handler again without waiting.
    pending: Vec<bool>,
    handler: H,
}

impl<H: Handler> EventLoop<H> {
    fn supervise(self, interrupt: &Interrupt, reporter: &Reporter) {
        let device = self.device.clone();
        let _report = ReportPanic { device: &device, reporter };
        match self.run(interrupt) {
            Ok(()) => {}
            Err(WorkerError::Guest(fault)) => {
                tracing::warn!(device, error = %chain_of(&fault), "device needs a reset");
                interrupt.signal_needs_reset();
            }
            Err(error @ WorkerError::Host { .. }) => {
                reporter.fail(format!("device {device}: {}", chain_of(&error)));
            }
        }
    }

    /// Serves until told to stop.
    fn run(mut self, interrupt: &Interrupt) -> Result<(), WorkerError> {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        loop {
            let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let timeout = self.pending.contains(&true).then_some(&at_once);
            events.clear();
            match epoll::wait(
                &self.poller.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout,
            ) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => {
                    return Err(WorkerError::Host {
                        what: "wait for events",
                        source: errno.into(),
                    });
                }
            }
            // Stop first: after it no queue may be touched.
            if events.iter().any(|event| event.data.u64() == STOP) {
                return Ok(());
            }
            for event in &events {
                let data = event.data.u64();
                if let Ok(token) = u32::try_from(data) {
                    let readiness = Readiness::from_flags(event.flags);
                    self.handler.ready(token, readiness, &self.poller)?;
                } else if let Ok(queue) = usize::try_from(data.wrapping_sub(FIRST_KICK)) {
                    self.take_kick(queue, interrupt)?;
                }
            }
            self.serve_pending()?;
        }
    }

    /// Reads a queue's eventfd and marks the queue.
    fn take_kick(&mut self, queue: usize, interrupt: &Interrupt) -> Result<(), WorkerError> {
        let (Some(kick), Some(pending)) = (self.kicks.get(queue), self.pending.get_mut(queue))
        else {
            return Ok(());
        };
        match kick.read() {
            Ok(kicks) => interrupt.counters().count_kicks(kicks),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(source) => {
                return Err(WorkerError::Host { what: "read a queue's eventfd", source });
            }
        }
        *pending = true;
        Ok(())
    }

    fn serve_pending(&mut self) -> Result<(), WorkerError> {
        for (queue, pending) in self.pending.iter_mut().enumerate() {
            if *pending {
                *pending = self.handler.kicked(queue, &self.poller)? == Progress::More;
            }
        }
        Ok(())
    }
}

/// Reports when it is dropped by a panic.
struct ReportPanic<'a> {
    device: &'a str,
    reporter: &'a Reporter,
}

impl Drop for ReportPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.reporter.fail(format!("device {}: its worker panicked", self.device));
        }
    }
}

/// An error with its causes, on one line.
pub(super) fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;

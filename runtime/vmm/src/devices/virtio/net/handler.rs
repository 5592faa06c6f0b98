//! A queue pair's worker: when it receives and transmits.
//!
//! ```text
//!  receive:   Watching ── no buffers ──▶ Starved     (until the guest's kick)
//!                │  ▲ ──── limit ──────▶ Throttled   (until the timer)
//!                └──┘ ──── tap gone ───▶ Gone        (until the driver sets its pairs anew)
//!  transmit:  Idle ─────── tap full ───▶ Blocked     (until the tap is writable)
//!                └──────── limit ──────▶ Throttled   (until the timer)
//! ```
//! The tap is watched only while something would come of it: nothing spins.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::chain::{GuestFault, Progress};
use super::super::timer::Timer;
use super::super::worker::{Handler, Poller, Readiness, WorkerError};
use super::control::{Control, Served};
use super::pair::{Pair, Received, Transmitted};
use super::pairs::Pairs;

/// Queues of a pair's worker, in the order of its kicks.
const RX: usize = 0;
const TX: usize = 1;

const TAP: u32 = 0;
const DOORBELL: u32 = 1;
const TIMER: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Watching,
    Starved,
    Throttled(Instant),
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transmitting {
    /// A kick, or the worker's own list, tells of more.
    Idle,
    Blocked,
    Throttled(Instant),
}

/// The worker's side of one pair. The first pair's has the control queue too, if there is one.
pub(super) struct PairHandler {
    pair: Pair,
    index: usize,
    pairs: Arc<Pairs>,
    control: Option<Control>,
    /// Set while commands wait for their time.
    control_throttled: Option<Instant>,
    timer: Timer,
    receiving: Receiving,
    transmitting: Transmitting,
    /// For what the tap is watched; `None`: not at all.
    watched: Option<Readiness>,
}

impl PairHandler {
    pub(super) fn new(
        pair: Pair,
        index: usize,
        pairs: Arc<Pairs>,
        control: Option<Control>,
    ) -> io::Result<Self> {
        Ok(PairHandler {
            pair,
            index,
            pairs,
            control,
            control_throttled: None,
            timer: Timer::new()?,
            receiving: Receiving::Watching,
            transmitting: Transmitting::Idle,
            watched: None,
        })
    }

    fn receive(&mut self, now: Instant) -> Result<(), GuestFault> {
        if !self.pairs.is_in_use(self.index) {
            return Ok(());
        }
        let Some(backend) = self.pairs.backend(self.index) else { return Ok(()) };
        self.receiving = match self.pair.receive(backend.as_fd(), now)? {
            // What is left makes the tap ready again at once.
            Received::Idle | Received::More => Receiving::Watching,
            Received::Starved => Receiving::Starved,
            Received::Throttled(wait) => Receiving::Throttled(after(now, wait)),
            Received::Gone(error) => {
                // Detached by the control queue, or lost; either way not by this worker's doing.
                tracing::debug!(pair = self.index, %error, "nothing to receive from");
                Receiving::Gone
            }
        };
        Ok(())
    }

    /// Whether it should be called again.
    fn transmit(&mut self, now: Instant) -> Result<Progress, GuestFault> {
        let Some(backend) = self.pairs.backend(self.index) else { return Ok(Progress::Done) };
        let transmitted = self.pair.transmit(backend.as_fd(), now)?;
        self.transmitting = match transmitted {
            Transmitted::Idle | Transmitted::More => Transmitting::Idle,
            Transmitted::Blocked => Transmitting::Blocked,
            Transmitted::Throttled(wait) => Transmitting::Throttled(after(now, wait)),
        };
        Ok(if transmitted == Transmitted::More { Progress::More } else { Progress::Done })
    }

    /// As [`PairHandler::transmit`], where the worker does not call again by itself.
    fn resume_transmit(&mut self, now: Instant) -> Result<(), GuestFault> {
        if self.transmit(now)? == Progress::More {
            self.pairs.ring(self.index);
        }
        Ok(())
    }

    fn serve_control(&mut self, now: Instant) -> Result<Progress, GuestFault> {
        let Some(control) = &mut self.control else { return Ok(Progress::Done) };
        let served = control.serve(now)?;
        self.control_throttled = match served {
            Served::Throttled(wait) => Some(after(now, wait)),
            Served::Idle | Served::More => None,
        };
        Ok(if served == Served::More { Progress::More } else { Progress::Done })
    }

    /// Something may have changed: how many pairs are in use, or what this worker left for later.
    fn look(&mut self, now: Instant) -> Result<(), WorkerError> {
        self.pairs
            .silence(self.index)
            .map_err(|source| WorkerError::Host { what: "read an eventfd", source })?;
        // A kick for buffers may have been passed over while the pair was not in use.
        if matches!(self.receiving, Receiving::Gone | Receiving::Starved) {
            self.receiving = Receiving::Watching;
        }
        if self.transmitting == Transmitting::Idle {
            self.resume_transmit(now)?;
        }
        Ok(())
    }

    /// The timer fired: goes on with what had to wait.
    fn go_on(&mut self, now: Instant) -> Result<(), WorkerError> {
        self.timer.acknowledge()?;
        if matches!(self.receiving, Receiving::Throttled(until) if until <= now) {
            self.receive(now)?;
        }
        if matches!(self.transmitting, Transmitting::Throttled(until) if until <= now) {
            self.resume_transmit(now)?;
        }
        if self.control_throttled.is_some_and(|until| until <= now)
            && self.serve_control(now)? == Progress::More
        {
            // The limit is far below the budget.
            self.control_throttled = Some(now);
        }
        Ok(())
    }

    /// After each event: watches what is waited for now, and sets the timer.
    fn wait(&mut self, poller: &Poller, now: Instant) -> Result<(), WorkerError> {
        let receiving = match self.receiving {
            Receiving::Throttled(until) => Some(until),
            _ => None,
        };
        let transmitting = match self.transmitting {
            Transmitting::Throttled(until) => Some(until),
            _ => None,
        };
        let deadlines = [receiving, transmitting, self.control_throttled];
        if let Some(deadline) = deadlines.into_iter().flatten().min() {
            self.timer.arm(deadline, now)?;
        }
        self.watch_tap(poller).map_err(|source| WorkerError::Host { what: "watch a tap", source })
    }

    fn watch_tap(&mut self, poller: &Poller) -> io::Result<()> {
        let in_use = self.pairs.is_in_use(self.index);
        let wanted = Readiness {
            readable: in_use && self.receiving == Receiving::Watching,
            writable: in_use && self.transmitting == Transmitting::Blocked,
            hangup: false,
        };
        // One that is not watched for anything would still report its errors, again and again.
        let wanted = (wanted.readable || wanted.writable).then_some(wanted);
        if wanted == self.watched {
            return Ok(());
        }
        let Some(backend) = self.pairs.backend(self.index) else { return Ok(()) };
        match (self.watched, wanted) {
            (None, Some(watch)) => poller.add(backend.as_fd(), TAP, watch)?,
            (Some(_), Some(watch)) => poller.modify(backend.as_fd(), TAP, watch)?,
            (Some(_), None) => poller.remove(backend.as_fd())?,
            (None, None) => {}
        }
        self.watched = wanted;
        Ok(())
    }

    fn tap_ready(&mut self, readiness: Readiness, now: Instant) -> Result<(), GuestFault> {
        // An error is told by the system call.
        if (readiness.readable || readiness.hangup) && self.receiving == Receiving::Watching {
            self.receive(now)?;
        }
        if (readiness.writable || readiness.hangup) && self.transmitting == Transmitting::Blocked {
            self.resume_transmit(now)?;
        }
        Ok(())
    }
}

/// A limit's waits are of nanoseconds in 64 bits: any clock has room for them.
fn after(now: Instant, wait: Duration) -> Instant {
    now.checked_add(wait).unwrap_or(now)
}

impl Handler for PairHandler {
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        if let Some(doorbell) = self.pairs.doorbell(self.index) {
            poller.add(doorbell, DOORBELL, Readiness::READ)?;
        }
        poller.add(self.timer.as_fd(), TIMER, Readiness::READ)?;
        self.watch_tap(poller)
    }

    fn kicked(&mut self, queue: usize, poller: &Poller) -> Result<Progress, WorkerError> {
        let now = Instant::now();
        let progress = match queue {
            RX if self.receiving == Receiving::Starved => {
                self.receive(now)?;
                Progress::Done
            }
            TX if self.transmitting == Transmitting::Idle => self.transmit(now)?,
            // What is waited for tells of it.
            RX | TX => Progress::Done,
            _ if self.control_throttled.is_some() => Progress::Done,
            _ => self.serve_control(now)?,
        };
        self.wait(poller, now)?;
        Ok(progress)
    }

    fn ready(
        &mut self,
        token: u32,
        readiness: Readiness,
        poller: &Poller,
    ) -> Result<(), WorkerError> {
        let now = Instant::now();
        match token {
            TAP => self.tap_ready(readiness, now)?,
            DOORBELL => self.look(now)?,
            _ => self.go_on(now)?,
        }
        self.wait(poller, now)
    }
}

//! What vCPU threads and devices tell the control loop. Each thing is told once, so that a guest
//! cannot fill the queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_vmm_api::Phase;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::time::{ClockId, clock_gettime};

/// How the VM ended, as far as the reporting thread knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The agent powered the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reboot,
    /// The guest reset the machine because its kernel panicked.
    Panic,
    /// A vCPU shut down.
    TripleFault,
    /// KVM or the VMM failed.
    Failure(String),
}

/// An event for the control loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// A phase of the start was reached.
    Phase {
        /// Which one.
        phase: Phase,
        /// `CLOCK_MONOTONIC`, ns.
        at_ns: u64,
    },
    /// The process that serves the guest's files is lost; the VM runs on.
    FileServerLost {
        /// Why.
        reason: String,
    },
    /// The VM ended; the first one counts.
    Ended(Ending),
}

/// The sending half; cheap to clone.
#[derive(Debug, Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: OwnedFd,
}

#[derive(Debug)]
struct State {
    sender: Sender<VmEvent>,
    phases: Vec<Phase>,
    file_server_lost: bool,
    ended: Option<Ending>,
}

/// The receiving half.
#[derive(Debug)]
pub struct Reports {
    receiver: Receiver<VmEvent>,
    shared: Arc<Shared>,
}

/// Makes both halves.
///
/// # Errors
/// No eventfd can be had.
pub fn channel() -> io::Result<(Reporter, Reports)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let (sender, receiver) = mpsc::channel();
    let state =
        Mutex::new(State { sender, phases: Vec::new(), file_server_lost: false, ended: None });
    let shared = Arc::new(Shared { state, wake });
    Ok((Reporter { shared: shared.clone() }, Reports { receiver, shared }))
}

impl Reporter {
    /// Reports that `phase` is reached now. Later reports of the same phase are ignored.
    pub fn phase(&self, phase: Phase) {
        let at_ns = monotonic_ns();
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.phases.contains(&phase) {
            state.phases.push(phase);
            self.send(&state, VmEvent::Phase { phase, at_ns });
        }
    }

    /// Reports that the file server is lost. Later losses are ignored: there is one server.
    pub fn file_server_lost(&self, reason: String) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.file_server_lost {
            state.file_server_lost = true;
            self.send(&state, VmEvent::FileServerLost { reason });
        }
    }

    /// Reports the VM's end. Later ends are ignored.
    pub fn end(&self, ending: Ending) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.ended.is_none() {
            state.ended = Some(ending.clone());
            self.send(&state, VmEvent::Ended(ending));
        }
    }

    /// Reports that the host let a thread down: what failed, with its causes. It ends the VM, unless
    /// something else has.
    pub fn fail(&self, message: String) {
        self.end(Ending::Failure(message));
    }

    /// The end that was reported, if there was one.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended.clone()
    }

    /// Whether an end was reported: vCPUs then stop running the guest.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended.is_some()
    }

    fn send(&self, state: &State, event: VmEvent) {
        if state.sender.send(event).is_err() {
            tracing::debug!("the control loop has ended; nobody hears this report");
        }
        if let Err(error) = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes()) {
            // At most 11 reports are ever made, so the counter cannot be full.
            tracing::error!(%error, "cannot wake the control loop");
        }
    }
}

impl Reports {
    /// All events since the last call. Never blocks.
    #[must_use]
    pub fn drain(&self) -> Vec<VmEvent> {
        let mut count = [0; 8];
        match rustix::io::read(&self.shared.wake, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "cannot read the wake-up eventfd"),
        }
        self.receiver.try_iter().collect()
    }
}

impl AsFd for Reports {
    /// Readable while there may be events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

/// `CLOCK_MONOTONIC` in ns; comparable between the processes of one host.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (Ok(secs), Ok(nanos)) = (u64::try_from(now.tv_sec), u32::try_from(now.tv_nsec)) else {
        return 0;
    };
    u64::try_from(Duration::new(secs, nanos).as_nanos()).unwrap_or(u64::MAX)
}

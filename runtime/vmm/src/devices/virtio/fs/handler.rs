//! The file-system device's worker.
//!
//! ```text
//!   Starting ── the server has taken up the queues ──▶ Served
//!       │                                                │
//!       └────────────── it is lost ──▶ Orphaned ◀────────┘
//! ```
//! Starting may take as long as the server's process; the guest's CPU, which has just set the device
//! live, does not wait for it.

use std::io;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use vmm_sys_util::eventfd::EventFd;

use super::super::chain::Progress;
use super::super::worker::{Handler, Poller, Readiness, WorkerError, as_fd, chain_of};
use super::super::{ActiveQueue, Interrupt};
use super::Connection;
use super::frontend::{Frontend, FrontendError, SharedQueue};
use super::orphan::Orphan;
use crate::GuestMemory;
use crate::machine::report::Reporter;

const BEGIN: u32 = 0;
const CALL: u32 = 1;
const SOCKET: u32 = 2;
/// The kick of the first queue; the other queues' follow.
const FIRST_KICK: u32 = 3;

/// What a worker is made from.
pub(super) struct Parts {
    pub(super) connection: Connection,
    pub(super) memory: GuestMemory,
    pub(super) queues: Vec<ActiveQueue>,
    pub(super) interrupt: Interrupt,
    pub(super) features: u64,
    pub(super) reporter: Reporter,
    /// By which the server interrupts the guest.
    pub(super) call: EventFd,
    /// Signalled, so that the worker's first event is to begin.
    pub(super) begin: EventFd,
}

enum State {
    Starting,
    Served,
    /// Each queue with its kick.
    Orphaned(Vec<(Orphan, EventFd)>),
}

/// See the module.
pub(super) struct FsHandler {
    parts: Parts,
    state: State,
}

impl FsHandler {
    pub(super) fn new(parts: Parts) -> Self {
        FsHandler { parts, state: State::Starting }
    }

    /// Hands the queues over to the server.
    fn start(&mut self, poller: &Poller) -> Result<(), WorkerError> {
        let connection = self.parts.connection.clone();
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(frontend) = connection.as_mut() else { return self.adopt(poller) };
        let Parts { memory, queues, features, call, .. } = &self.parts;
        let shared: Vec<SharedQueue<'_>> = queues
            .iter()
            .map(|ActiveQueue { queue, kick }| SharedQueue { queue, kick: as_fd(kick) })
            .collect();
        let started = frontend.start(memory, *features, &shared, as_fd(call)).and_then(|()| {
            poller.add(frontend.as_fd(), SOCKET, Readiness::READ).map_err(|_| FrontendError::Closed)
        });
        match started {
            Ok(()) => {
                self.state = State::Served;
                Ok(())
            }
            Err(error) => {
                let lost = connection.take();
                drop(connection);
                self.lose(lost, &error, poller)
            }
        }
    }

    /// The server's socket is readable or closed.
    fn heard(&mut self, poller: &Poller) -> Result<(), WorkerError> {
        let connection = self.parts.connection.clone();
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(frontend) = connection.as_ref() else { return Ok(()) };
        let Some(error) = frontend.unasked() else { return Ok(()) };
        poller
            .remove(frontend.as_fd())
            .map_err(|source| WorkerError::Host { what: "forget the file server", source })?;
        let lost = connection.take();
        drop(connection);
        self.lose(lost, &error, poller)
    }

    /// The server is of no use any more: says so, and takes its place.
    fn lose(
        &mut self,
        lost: Option<Frontend>,
        error: &FrontendError,
        poller: &Poller,
    ) -> Result<(), WorkerError> {
        if let Some(frontend) = lost {
            frontend.close();
        }
        let reason = chain_of(error);
        tracing::warn!(reason, "the file server is lost");
        self.parts.reporter.file_server_lost(reason);
        self.adopt(poller)
    }

    fn adopt(&mut self, poller: &Poller) -> Result<(), WorkerError> {
        let failed = |source| WorkerError::Host { what: "watch a queue's eventfd", source };
        let Parts { memory, interrupt, features, .. } = &self.parts;
        let (memory, interrupt, features) = (memory.clone(), interrupt.clone(), *features);
        let mut orphans = Vec::with_capacity(self.parts.queues.len());
        for (ActiveQueue { queue, kick }, token) in self.parts.queues.drain(..).zip(FIRST_KICK..) {
            let orphan = Orphan::adopt(memory.clone(), queue, interrupt.clone(), features)?;
            poller.add(as_fd(&kick), token, Readiness::READ).map_err(failed)?;
            // Also for what the server was kicked for and has not served.
            kick.write(1).map_err(failed)?;
            orphans.push((orphan, kick));
        }
        self.state = State::Orphaned(orphans);
        // For what the server answered and did not live to tell.
        interrupt.signal_used();
        Ok(())
    }

    fn serve_orphan(&mut self, queue: usize) -> Result<(), WorkerError> {
        let State::Orphaned(orphans) = &mut self.state else { return Ok(()) };
        let Some((orphan, kick)) = orphans.get_mut(queue) else { return Ok(()) };
        let failed = |source| WorkerError::Host { what: "use a queue's eventfd", source };
        take(kick).map_err(failed)?;
        if orphan.serve()? == Progress::More {
            kick.write(1).map_err(failed)?;
        }
        Ok(())
    }
}

/// Reads an eventfd, which need not be signalled any more.
fn take(event: &EventFd) -> io::Result<()> {
    match event.read() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}

impl Handler for FsHandler {
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(as_fd(&self.parts.begin), BEGIN, Readiness::READ)?;
        poller.add(as_fd(&self.parts.call), CALL, Readiness::READ)
    }

    /// No queue is kicked through the worker, which has none.
    fn kicked(&mut self, _queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        Ok(Progress::Done)
    }

    fn ready(
        &mut self,
        token: u32,
        _readiness: Readiness,
        poller: &Poller,
    ) -> Result<(), WorkerError> {
        let failed = |source| WorkerError::Host { what: "read an eventfd", source };
        match token {
            BEGIN => {
                take(&self.parts.begin).map_err(failed)?;
                self.start(poller)
            }
            CALL => {
                take(&self.parts.call).map_err(failed)?;
                self.parts.interrupt.signal_used();
                Ok(())
            }
            SOCKET => self.heard(poller),
            kick => {
                let queue = kick.checked_sub(FIRST_KICK).and_then(|at| usize::try_from(at).ok());
                queue.map_or(Ok(()), |queue| self.serve_orphan(queue))
            }
        }
    }
}

impl Drop for FsHandler {
    /// The driver resets the device: the server has to let go of the queues before the driver may
    /// use their memory for something else.
    fn drop(&mut self) {
        if !matches!(self.state, State::Served) {
            return;
        }
        let mut connection = self.parts.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(frontend) = connection.as_mut() else { return };
        let queues = u32::try_from(self.parts.queues.len()).unwrap_or(u32::MAX);
        if let Err(error) = frontend.stop(queues) {
            let reason = chain_of(&error);
            tracing::warn!(reason, "the file server does not stop");
            frontend.close();
            *connection = None;
            self.parts.reporter.file_server_lost(reason);
        }
    }
}

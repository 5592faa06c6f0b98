//! Makes a process and follows it to its end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::pipe::PipeFlags;
use rustix::process::PidfdGetfdFlags;
use rustix::thread::ThreadNameSpaceType;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use super::init::{self, Job, Pipes};
use super::process::{StepError, step};
use super::report::{self, Report};
use super::scheduling::OnCpus;
use super::state::Event;
use super::{ContainerError, Exit, MAIN, Outcome, Process, Runner, StartFailure};
use crate::cgroup::Cgroup;
use crate::lock;
use crate::reaper::{How, Reaped};
use crate::stdio::Relay;
use crate::sys::{self, Cloned};

/// The agent's ends of the pipes that hold a new process back. Dropping it ends the process, if it is
/// held back.
pub(super) struct Gate {
    start: Option<OwnedFd>,
    report: pipe::Receiver,
}

impl Gate {
    /// Lets the process execute its program. Returns why that failed, if it did.
    pub(super) async fn open(mut self) -> Result<Option<StartFailure>, ContainerError> {
        // If the process is gone, the report says so (or rather nothing, which its end explains).
        if let Some(start) = &self.start
            && let Err(error) = rustix::io::write(start, &[1])
        {
            tracing::debug!(%error, "the process ended before its start");
        }
        match read_report(&mut self.report).await? {
            None => Ok(None),
            Some(Report::Failure(failure)) => Ok(Some(failure)),
            Some(Report::Error(message)) => Err(ContainerError::Reported(message)),
            Some(Report::Ready(_)) => Err(ContainerError::Died),
        }
    }

    /// Waits until the process is ready to be started. Returns the number of its terminal's master
    /// in it, if it has one; or why it cannot be started.
    pub(super) async fn ready(
        &mut self,
    ) -> Result<Result<Option<i32>, StartFailure>, ContainerError> {
        match read_report(&mut self.report).await? {
            Some(Report::Ready(terminal)) => Ok(Ok(terminal)),
            Some(Report::Failure(failure)) => Ok(Err(failure)),
            Some(Report::Error(message)) => Err(ContainerError::Reported(message)),
            None => Err(ContainerError::Died),
        }
    }
}

/// Reads one report; None at the end of the pipe.
pub(super) async fn read_report(
    pipe: &mut pipe::Receiver,
) -> Result<Option<Report>, ContainerError> {
    use tokio::io::AsyncReadExt;
    let mut buffer = vec![0_u8; report::MAX_BYTES];
    let count = pipe.read(&mut buffer).await.map_err(step("read the new process's report"))?;
    match buffer.get(..count).unwrap_or_default() {
        [] => Ok(None),
        bytes => Report::decode(bytes).map(Some).ok_or(ContainerError::Died),
    }
}

/// A process that has been made, and waits.
pub(super) struct Spawned {
    pub(super) process: Process,
    pub(super) gate: Gate,
    pub(super) reaped: oneshot::Receiver<Reaped>,
}

impl Runner {
    /// Clones a process for `job` into the namespaces of `flags` and into the cgroup, and into the
    /// process ID namespace of `pid_namespace` (a pidfd or a namespace's file) if that is given.
    pub(super) fn spawn(
        &self,
        job: &Job<'_>,
        stdio: [OwnedFd; 3],
        flags: u64,
        cgroup: BorrowedFd<'_>,
        pid_namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Spawned, StepError> {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"));
        let (report_read, report) = pipe()?;
        let (start, start_write) = match job.is_held() {
            true => pipe().map(|(read, write)| (Some(read), Some(write)))?,
            false => (None, None),
        };
        let report_read =
            pipe::Receiver::from_owned_fd(report_read).map_err(step("watch the report"))?;
        let pipes = Pipes { stdio, report, start };

        let kind = ThreadNameSpaceType::PROCESS_ID;
        if let Some(fd) = pid_namespace {
            rustix::thread::move_into_thread_name_spaces(fd, kind)
                .map_err(step("enter the process ID namespace"))?;
        }
        let cpus = match job {
            Job::Exec { plan, .. } => OnCpus::go(plan.affinity.initial),
            Job::Container { .. } => OnCpus::go(None),
        };
        let cloned = cpus.and_then(|guard| {
            let cloned = sys::clone_process(flags, Some(cgroup)).map_err(step("clone"));
            if matches!(cloned, Ok(Cloned::Child)) {
                // The new process stays there, if it is not told otherwise.
                std::mem::forget(guard);
            }
            cloned
        });
        if matches!(cloned, Ok(Cloned::Child)) {
            init::run(job, &pipes);
        }
        if pid_namespace.is_some()
            && let Err(error) =
                rustix::thread::move_into_thread_name_spaces(self.own_pid_namespace.as_fd(), kind)
        {
            // Every later process would land in a container: end the guest instead.
            tracing::error!(%error, "the agent cannot return to its own namespace");
            std::process::abort();
        }
        match cloned? {
            Cloned::Child => sys::exit_now(u8::MAX),
            Cloned::Parent { pid, pidfd } => {
                let process = Process {
                    pid,
                    pidfd: Arc::new(pidfd),
                    alive: true,
                    relay: Relay::default(),
                    outcome: watch::Sender::new(Outcome::Pending),
                    oom_kills_before: 0,
                };
                let gate = Gate { start: start_write, report: report_read };
                Ok(Spawned { process, gate, reaped: self.reaper.watch(pid) })
            }
        }
    }

    /// Follows a process that is in the table to its end, and then makes its outcome known.
    pub(super) fn follow(
        &self,
        id: &str,
        exec: &str,
        cgroup: Arc<super::Remains>,
        reaped: oneshot::Receiver<Reaped>,
    ) {
        // A process that could not be started frees its name before it is reaped: the next of that name
        // must not be taken for it.
        let known = lock(&self.table)
            .process(id, exec)
            .map(|process| (process.pid, process.outcome.clone()));
        let Ok((pid, outcome)) = known else { return };
        let (runner, id, exec) = (self.clone(), id.to_owned(), exec.to_owned());
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let Ok(reaped) = reaped.await else { return };
            // Where containers share their process IDs, one can be deleted before the last of its
            // processes is reaped: who waits for that is told all the same.
            let ended = runner.mark_ended(&id, &exec, pid, &cgroup.cgroup);
            // Of one that is gone there is no output left to wait for, and nothing to tell of its memory.
            let Ended { relay, oom_killed } = ended.unwrap_or_default();
            let (complete, unused_ports) = relay.drain().await;
            if !complete {
                tracing::warn!(
                    container = id,
                    exec,
                    "output cut: a descendant holds it open, or nobody reads"
                );
            }
            // Whoever is to hear of a kill for memory hears of it before the end.
            tokio::task::yield_now().await;
            let (code, signal) = match reaped.how {
                How::Code(code) => (u32::from(code), 0),
                How::Signal(signal) => (128 + u32::from(signal), u32::from(signal)),
            };
            let exit = Exit { code, signal, oom_killed, at: reaped.at, unused_ports };
            outcome.send_replace(Outcome::Ended(exit));
        });
    }

    /// Records that a process has ended. None if it is in the table no longer.
    fn mark_ended(&self, id: &str, exec: &str, pid: u32, cgroup: &Cgroup) -> Option<Ended> {
        let mut table = lock(&self.table);
        let container = table.containers.get_mut(id)?;
        if container.process(exec)?.pid != pid {
            return None;
        }
        if exec == MAIN {
            if let Err(error) = container.apply(id, Event::Exited) {
                tracing::error!(%error, "a process ended twice");
            }
            container.gate = None;
            // In its own process ID namespace the kernel has done so already.
            if let Err(error) = cgroup.kill() {
                tracing::warn!(container = id, %error, "cannot kill what the container left");
            }
        }
        let oom_kills = cgroup.oom_kills().unwrap_or_else(|error| {
            tracing::error!(container = id, error = crate::chain(&error), "kills for memory?");
            0
        });
        container.tell_oom_kills(id, oom_kills, &self.events);
        let process = container.process(exec)?;
        process.alive = false;
        Some(Ended {
            relay: std::mem::take(&mut process.relay),
            oom_killed: oom_kills > process.oom_kills_before,
        })
    }

    /// Runs `work` in a process of its own, because it may take long and the agent has one thread. It
    /// has no descriptors but those that it opens: the input of a process, or a connection, that it had
    /// as well could not end before it.
    ///
    /// # Errors
    /// If the process cannot be made, or `work` failed: its error goes to the log.
    pub(crate) async fn in_child(
        &self,
        name: &str,
        work: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StepError> {
        let failed = || step::<io::Error>(name);
        match sys::clone_process(0, None).map_err(failed())? {
            Cloned::Child => {
                let keep: Vec<_> = crate::log::descriptor().into_iter().collect();
                let result = sys::close_all_but(&keep).and_then(|()| work());
                if let Err(error) = &result {
                    tracing::error!(%error, work = name, "failed");
                }
                sys::exit_now(u8::from(result.is_err()));
            }
            Cloned::Parent { pid, pidfd: _ } => {
                let reaped = self
                    .reaper
                    .watch(pid)
                    .await
                    .map_err(|_| failed()(io::ErrorKind::Interrupted.into()))?;
                match reaped.how {
                    How::Code(0) => Ok(()),
                    how => Err(failed()(io::Error::other(format!("{how:?}; see the log")))),
                }
            }
        }
    }
}

/// What is left of a process that has just ended.
#[derive(Default)]
struct Ended {
    relay: Relay,
    oom_killed: bool,
}

/// Takes the terminal's master out of the process that made it.
pub(super) fn take_master(process: &Process, number: i32) -> Result<OwnedFd, StepError> {
    rustix::process::pidfd_getfd(process.pidfd.as_fd(), number, PidfdGetfdFlags::empty())
        .map_err(step("take the terminal"))
}

//! The task of a pod whose guest is ready: it feeds the state machine with what happens and does
//! what that says. It owns the state; everything else asks it, or watches the status it publishes.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::state::{Action, Event, Failure, Index, Machine, ProbeKind, RunId};
use super::status::{Moment, PodStatus};
use crate::guest::{GuestError, ProcessExit, StartFailure};
use crate::vm::VmExit;

/// Exit code of a container that the agent refused to start for another reason than its program,
/// as containerd's CRI reports it.
const REFUSED_EXIT_CODE: u8 = 128;

/// How a container is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopBy {
    /// Its stop signal.
    Asking,
    /// SIGKILL, to all its processes.
    Killing,
}

/// What comes of a probe or a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Success,
    /// With the reason.
    Failure(String),
    /// It could not be asked, for this reason.
    Unknown(String),
}

/// When a hook is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    PostStart,
    PreStop,
}

/// What the actor needs of a guest: the real one, or a test's.
pub(super) trait Runtime: Clone + Send + Sync + 'static {
    /// A container that was started.
    type Run: Send;

    /// Makes a container and starts its program.
    fn start(
        &self,
        container: Index,
    ) -> impl Future<Output = Result<Result<Self::Run, StartFailure>, GuestError>> + Send;

    /// Waits until a container's program has ended and its output is delivered, and removes it.
    /// Also returns its last words.
    fn wait(
        &self,
        run: Self::Run,
    ) -> impl Future<Output = Result<(ProcessExit, String), GuestError>> + Send;

    /// Puts a probe of a running container once, within the probe's own time limit.
    fn probe(
        &self,
        container: Index,
        kind: ProbeKind,
    ) -> impl Future<Output = Result<Answer, GuestError>> + Send;

    /// Runs a hook of a running container to its end.
    fn hook(
        &self,
        container: Index,
        turn: Turn,
    ) -> impl Future<Output = Result<Answer, GuestError>> + Send;

    /// Sends a container a signal; none if it has ended.
    fn signal(
        &self,
        container: Index,
        by: StopBy,
    ) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Shuts the guest down, by force if need be. Returns in bounded time; the VM is gone then.
    fn power_off(&self) -> impl Future<Output = ()> + Send;

    /// Waits until the pod's shares are not served any more, although the VM runs; returns the
    /// server's last words.
    fn file_server_lost(&self) -> impl Future<Output = String> + Send;

    /// Waits for the end of the VM.
    fn vm_ended(&self) -> impl Future<Output = Arc<VmExit>> + Send;
}

/// What the handle of a pod asks of its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// End the pod; its containers may take so long (as long as its specification says, if not
    /// given).
    Stop(Option<Duration>),
}

/// The time by which the state machine measures.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Clock(Instant::now())
    }

    /// The instant this long after the start; `None` if there is none.
    pub(super) fn after(self, time: Duration) -> Option<Instant> {
        self.0.checked_add(time)
    }

    pub(super) fn now(self) -> Moment {
        Moment { wall: SystemTime::now(), uptime: self.0.elapsed() }
    }
}

/// See the module.
pub(super) struct Actor<R: Runtime> {
    pub(super) machine: Machine,
    pub(super) runtime: R,
    pub(super) clock: Clock,
    pub(super) grace: Duration,
    pub(super) status: watch::Sender<PodStatus>,
}

/// The texts of an error and its causes in one line. Causes that the text above them repeats are
/// left out.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn vm_lost(message: String) -> Event {
    Event::VmLost(Failure { reason: "VmLost", message, containers: Vec::new() })
}

impl<R: Runtime> Actor<R> {
    /// Runs the pod to its end, which is due when `overdue` returns. The final status is published before what it holds is given back,
    /// which is up to the caller.
    pub(super) async fn run(
        mut self,
        commands: &mut mpsc::Receiver<Command>,
        overdue: impl Future<Output = ()>,
    ) {
        let (events, mut incoming) = mpsc::unbounded_channel();
        // Aborted when this returns.
        let mut tasks = JoinSet::new();
        let mut grace_over: Option<Instant> = None;
        let runtime = self.runtime.clone();
        let vm_ended = runtime.vm_ended();
        let files_lost = runtime.file_server_lost();
        tokio::pin!(vm_ended, files_lost);
        let mut are_served = true;
        tokio::pin!(overdue);
        let mut in_time = true;
        let mut handle_lives = true;
        let mut event = Event::Prepared;
        loop {
            let actions = self.machine.transition(event.clone(), self.clock.now());
            tracing::debug!(?event, ?actions, "transition");
            for action in actions {
                match action {
                    Action::ArmGrace(grace) => grace_over = Instant::now().checked_add(grace),
                    Action::Release => {}
                    action => self.act(action, &mut tasks, &events),
                }
            }
            // Probes are many in the life of a pod: those that are done are forgotten.
            while tasks.try_join_next().is_some() {}
            // Watchers are told of changes only.
            let status = self.machine.status();
            self.status.send_if_modified(|known| {
                let changed = *known != status;
                *known = status;
                changed
            });
            if self.machine.is_ended() {
                return;
            }
            let grace = async {
                match grace_over {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            event = tokio::select! {
                // What containers reported before the VM ended comes before its end.
                biased;
                Some(event) = incoming.recv() => event,
                exit = &mut vm_ended => {
                    if self.machine.is_powering_off() {
                        Event::VmEnded
                    } else {
                        vm_lost(exit.to_string())
                    }
                }
                words = &mut files_lost, if are_served => {
                    are_served = false;
                    Event::FileServerLost(words)
                }
                command = commands.recv(), if handle_lives => match command {
                    Some(Command::Stop(grace)) => Event::StopRequested(grace.unwrap_or(self.grace)),
                    None => {
                        // Nobody can ask for anything any more: the pod ends with its owner.
                        handle_lives = false;
                        Event::StopRequested(Duration::ZERO)
                    }
                },
                () = grace => {
                    grace_over = None;
                    Event::GraceElapsed
                }
                () = &mut overdue, if in_time => {
                    in_time = false;
                    Event::DeadlineExceeded
                }
            };
        }
    }

    /// Begins what an action says, in a task of its own: the actor itself never waits.
    fn act(&self, action: Action, tasks: &mut JoinSet<()>, events: &mpsc::UnboundedSender<Event>) {
        let runtime = self.runtime.clone();
        let events = events.clone();
        // The receiver outlives the tasks.
        let report = move |event| drop(events.send(event));
        match action {
            Action::Start(index) => {
                tasks.spawn(async move { run_container(&runtime, index, report).await });
            }
            Action::StartAfter(index, delay) => {
                tasks.spawn(async move {
                    tokio::time::sleep(delay).await;
                    report(Event::BackoffElapsed(index));
                });
            }
            Action::EndAfter(id, delay) => {
                tasks.spawn(async move {
                    tokio::time::sleep(delay).await;
                    report(Event::EndDue(id));
                });
            }
            Action::Probe(id, kind, delay) => {
                tasks.spawn(async move {
                    tokio::time::sleep(delay).await;
                    report(put_probe(&runtime, id, kind).await);
                });
            }
            Action::PostStart(id) => {
                tasks.spawn(async move { report(post_start(&runtime, id).await) });
            }
            Action::PreStop(id, limit) => {
                tasks.spawn(async move { report(pre_stop(&runtime, id, limit).await) });
            }
            Action::Terminate(index) | Action::Kill(index) => {
                let by =
                    if action == Action::Kill(index) { StopBy::Killing } else { StopBy::Asking };
                tasks.spawn(async move {
                    match runtime.signal(index, by).await {
                        Ok(()) => {}
                        Err(error) if error.is_fatal() => report(vm_lost(chain(&error))),
                        Err(error) => tracing::warn!(
                            container = index,
                            error = chain(&error),
                            "cannot signal a container"
                        ),
                    }
                });
            }
            Action::PowerOff => {
                tasks.spawn(async move { runtime.power_off().await });
            }
            Action::ArmGrace(_) | Action::Release => {}
        }
    }
}

/// One run of a container, from its making to its end.
async fn run_container<R: Runtime>(runtime: &R, index: Index, report: impl Fn(Event)) {
    let run = match runtime.start(index).await {
        Ok(Ok(run)) => run,
        Ok(Err(failure)) => return report(Event::StartFailed(index, failure)),
        Err(GuestError::Refused { message, .. }) => {
            let failure = StartFailure { exit_code: REFUSED_EXIT_CODE, message };
            return report(Event::StartFailed(index, failure));
        }
        Err(error) => return report(vm_lost(chain(&error))),
    };
    report(Event::Started(index));
    match runtime.wait(run).await {
        Ok((exit, message)) => report(Event::Exited(index, exit, message)),
        Err(error) => report(vm_lost(chain(&error))),
    }
}

/// Puts a probe once, and says what came of it.
async fn put_probe<R: Runtime>(runtime: &R, id: RunId, kind: ProbeKind) -> Event {
    let container = id.container;
    let success = match runtime.probe(container, kind).await {
        Ok(Answer::Success) => Some(true),
        Ok(Answer::Failure(reason)) => {
            tracing::info!(container, ?kind, reason, "a probe failed");
            Some(false)
        }
        Ok(Answer::Unknown(reason)) => {
            tracing::debug!(container, ?kind, reason, "a probe could not be put");
            None
        }
        Err(error) if error.is_fatal() => return vm_lost(chain(&error)),
        Err(error) => {
            tracing::warn!(container, ?kind, error = chain(&error), "a probe could not be put");
            None
        }
    };
    Event::Probed(id, kind, success)
}

/// Runs the hook after a container's start.
async fn post_start<R: Runtime>(runtime: &R, id: RunId) -> Event {
    let container = id.container;
    let reason = match runtime.hook(container, Turn::PostStart).await {
        Ok(Answer::Success) => return Event::PostStarted(id, true),
        Ok(Answer::Failure(reason) | Answer::Unknown(reason)) => reason,
        Err(error) if error.is_fatal() => return vm_lost(chain(&error)),
        Err(error) => chain(&error),
    };
    tracing::warn!(container, reason, "postStart failed: the container is ended");
    Event::PostStarted(id, false)
}

/// Runs the hook before a container's end, for at most so long. Whatever comes of it, the container
/// ends.
async fn pre_stop<R: Runtime>(runtime: &R, id: RunId, limit: Duration) -> Event {
    let container = id.container;
    let reason = match tokio::time::timeout(limit, runtime.hook(container, Turn::PreStop)).await {
        Ok(Ok(Answer::Success)) => return Event::PreStopped(id),
        Ok(Ok(Answer::Failure(reason) | Answer::Unknown(reason))) => reason,
        Ok(Err(error)) if error.is_fatal() => return vm_lost(chain(&error)),
        Ok(Err(error)) => chain(&error),
        Err(_) => format!("it was not done in {} s", limit.as_secs()),
    };
    tracing::warn!(container, reason, "preStop failed");
    Event::PreStopped(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

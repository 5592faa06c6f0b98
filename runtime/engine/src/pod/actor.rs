//! The task of a pod whose guest is ready: it feeds the state machine with what happens and does
//! what that says. It owns the state; everything else asks it, or watches the status it publishes.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::state::{Action, Event, Failure, Index, Machine};
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
    fn wait(&self, run: Self::Run) -> impl Future<Output = Result<ProcessExit, GuestError>> + Send;

    /// Sends a container a signal; none if it has ended.
    fn signal(
        &self,
        container: Index,
        by: StopBy,
    ) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Shuts the guest down, by force if need be. Returns in bounded time; the VM is gone then.
    fn power_off(&self) -> impl Future<Output = ()> + Send;

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
    /// Runs the pod to its end. The final status is published before what it holds is given back,
    /// which is up to the caller.
    pub(super) async fn run(mut self, commands: &mut mpsc::Receiver<Command>) {
        let (events, mut incoming) = mpsc::unbounded_channel();
        // Aborted when this returns.
        let mut tasks = JoinSet::new();
        let mut grace_over: Option<Instant> = None;
        let runtime = self.runtime.clone();
        let vm_ended = runtime.vm_ended();
        tokio::pin!(vm_ended);
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
        Ok(exit) => report(Event::Exited(index, exit)),
        Err(error) => report(vm_lost(chain(&error))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

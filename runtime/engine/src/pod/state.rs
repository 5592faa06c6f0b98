//! The life of a pod as a state machine without side effects: [`Machine::transition`] takes an
//! event, changes the state, and says what is to be done.
//!
//! ```text
//!            Prepared             last init container done            no container runs
//!  Preparing ───────▶ Initializing ────────────────────────▶ Running ─ or will again ──┐
//!      │                   │  an init container failed for good │                      │
//!      │ PrepareFailed     ├─────────────────┐   StopRequested  │                      │
//!      │ StopRequested     │ StopRequested   │  ┌───────────────┘                      │
//!      │                   └───────────────▶ ▼  ▼ ◀────────────────────────────────────┘
//!      │                                   Stopping: SIGTERM to containers, then to sidecars in
//!      │                                      │      reverse order; SIGKILL after the grace period
//!      │                                      │ nothing runs any more
//!      │                                      ▼
//!      │                                 PoweringOff
//!      ▼                                      │ VmEnded
//!    Ended ◀──────────────────────────────────┘
//!      ▲ VmLost, from every state but Ended
//!
//!  A container:  Idle ─▶ Starting ─▶ Up ─▶ Done
//!                           ▲ │       │
//!                           │ └───────┴─▶ BackingOff (will be started again)
//!                           └─────────────────┘
//! ```

use std::time::{Duration, SystemTime};

use super::backoff::Backoff;
use super::status::{
    ContainerState, ContainerStatus, EndReason, Moment, PodPhase, PodStatus, Terminated,
};
use crate::guest::{ProcessExit, StartFailure};
use crate::types::{ContainerKind, PodSpec, RestartPolicy};

/// How long containers may take to end after SIGKILL. Only a broken guest takes longer.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// Position of a container in the order of start: init containers first.
pub(super) type Index = usize;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest is ready for containers.
    Prepared,
    /// It will not be.
    PrepareFailed(Failure),
    /// A container's program runs.
    Started(Index),
    /// A container's program could not be started.
    StartFailed(Index, StartFailure),
    /// A container's program ended, and all its output is delivered.
    Exited(Index, ProcessExit),
    /// The time to start a container again has come.
    BackoffElapsed(Index),
    /// The pod is to end; its containers may take so long.
    StopRequested(Duration),
    /// The time that containers had to end is over.
    GraceElapsed,
    /// The VM is gone unexpectedly, or cannot be reached.
    VmLost(Failure),
    /// The VM is gone after it was powered off.
    VmEnded,
}

/// Why a pod failed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// In one word.
    pub(super) reason: &'static str,
    /// As a text.
    pub(super) message: String,
    /// The containers that it concerns in particular.
    pub(super) containers: Vec<Index>,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Make and start a container: [`Event::Started`] or [`Event::StartFailed`] comes of it, and
    /// after the first [`Event::Exited`].
    Start(Index),
    /// Come back with [`Event::BackoffElapsed`].
    StartAfter(Index, Duration),
    /// Ask a running container to end.
    Terminate(Index),
    /// End a running container.
    Kill(Index),
    /// Come back with [`Event::GraceElapsed`]. Replaces an earlier one.
    ArmGrace(Duration),
    /// Shut the guest down; [`Event::VmEnded`] comes of it.
    PowerOff,
    /// Give back what the pod holds: it is over.
    Release,
}

/// Where the pod is in its life: see the diagram.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Preparing,
    /// Init containers before this one are done.
    Initializing(Index),
    Running,
    /// Whether SIGKILL was sent already.
    Stopping {
        killed: bool,
    },
    PoweringOff,
    Ended {
        phase: PodPhase,
        reason: &'static str,
        message: String,
    },
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Activity {
    Idle,
    Starting,
    Up {
        since: Moment,
        told_to_end: bool,
    },
    BackingOff {
        delay: Duration,
        ended: Terminated,
    },
    Done(Terminated),
    /// It concerns this container that the pod could not be prepared.
    Blocked {
        reason: &'static str,
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Container {
    name: String,
    kind: ContainerKind,
    activity: Activity,
    last: Option<Terminated>,
    restarts: u32,
    backoff: Backoff,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    policy: RestartPolicy,
    grace: Duration,
    stage: Stage,
    containers: Vec<Container>,
}

impl Machine {
    pub(super) fn new(spec: &PodSpec) -> Self {
        let containers = spec.all_containers().map(|container| Container {
            name: container.name.clone(),
            kind: container.kind,
            activity: Activity::Idle,
            last: None,
            restarts: 0,
            backoff: Backoff::default(),
        });
        Machine {
            policy: spec.restart_policy,
            grace: Duration::from_secs(spec.termination_grace_s),
            stage: Stage::Preparing,
            containers: containers.collect(),
        }
    }

    /// Whether nothing will happen any more.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended { .. })
    }

    /// Whether the guest was told to power itself off.
    pub(super) fn is_powering_off(&self) -> bool {
        self.stage == Stage::PoweringOff
    }

    /// Takes note of what happened at `now` and says what is to be done, in this order. Total: an
    /// event that comes too late to mean anything changes nothing.
    pub(super) fn transition(&mut self, event: Event, now: Moment) -> Vec<Action> {
        if self.is_ended() {
            return Vec::new();
        }
        match event {
            Event::Prepared if self.stage == Stage::Preparing => self.initialize(0),
            Event::PrepareFailed(failure) if self.stage == Stage::Preparing => self.fail(failure),
            Event::Prepared | Event::PrepareFailed(_) => Vec::new(),
            Event::Started(index) => self.started(index, now),
            Event::StartFailed(index, StartFailure { exit_code, message }) => {
                let ended = Terminated {
                    exit_code,
                    signal: 0,
                    reason: EndReason::StartError,
                    message,
                    started_at: None,
                    finished_at: now.wall,
                };
                self.ended(index, ended, now)
            }
            Event::Exited(index, exit) => {
                let ended = self.terminated(index, exit);
                self.ended(index, ended, now)
            }
            Event::BackoffElapsed(index) => self.start_again(index),
            Event::StopRequested(grace) => self.stop_requested(grace),
            Event::GraceElapsed => match self.stage {
                Stage::Stopping { killed: false } => self.kill(),
                Stage::Stopping { killed: true } => self.lost(
                    Failure {
                        reason: "KillTimeout",
                        message: format!(
                            "containers did not end within {} s of being killed",
                            KILL_LIMIT.as_secs()
                        ),
                        containers: Vec::new(),
                    },
                    now.wall,
                ),
                _ => Vec::new(),
            },
            // Everything had ended before: how the VM goes does not change what they came to.
            Event::VmEnded | Event::VmLost(_) if self.stage == Stage::PoweringOff => {
                let phase = self.verdict();
                self.end(phase, "", String::new())
            }
            Event::VmLost(failure) => self.lost(failure, now.wall),
            Event::VmEnded => self.lost(
                Failure {
                    reason: "VmLost",
                    message: "the virtual machine ended by itself".into(),
                    containers: Vec::new(),
                },
                now.wall,
            ),
        }
    }

    fn end(&mut self, phase: PodPhase, reason: &'static str, message: String) -> Vec<Action> {
        self.stage = Stage::Ended { phase, reason, message };
        vec![Action::Release]
    }

    fn fail(&mut self, Failure { reason, message, containers }: Failure) -> Vec<Action> {
        for index in containers {
            if let Some(container) = self.containers.get_mut(index) {
                container.activity = Activity::Blocked { reason, message: message.clone() };
            }
        }
        self.end(PodPhase::Failed, reason, message)
    }

    /// The VM is gone: what ran in it has ended in an unknown way.
    fn lost(&mut self, failure: Failure, at: SystemTime) -> Vec<Action> {
        for container in &mut self.containers {
            let started_at = match &container.activity {
                Activity::Idle | Activity::Blocked { .. } | Activity::Done(_) => continue,
                Activity::BackingOff { ended, .. } => {
                    container.activity = Activity::Done(ended.clone());
                    continue;
                }
                Activity::Starting => None,
                Activity::Up { since, .. } => Some(since.wall),
            };
            container.activity = Activity::Done(Terminated {
                exit_code: 137,
                signal: 0,
                reason: EndReason::ContainerStatusUnknown,
                message: "the virtual machine ended while the container ran".into(),
                started_at,
                finished_at: at,
            });
        }
        self.end(PodPhase::Failed, failure.reason, failure.message)
    }

    /// Starts the init container at `index`, or the containers if there is none left.
    fn initialize(&mut self, index: Index) -> Vec<Action> {
        if self.containers.get(index).is_some_and(|c| c.kind != ContainerKind::Main) {
            self.stage = Stage::Initializing(index);
            return self.start(index);
        }
        self.stage = Stage::Running;
        let mains = index..self.containers.len();
        mains.flat_map(|main| self.start(main)).collect()
    }

    fn start(&mut self, index: Index) -> Vec<Action> {
        match self.containers.get_mut(index) {
            Some(container) => {
                container.activity = Activity::Starting;
                vec![Action::Start(index)]
            }
            None => Vec::new(),
        }
    }

    fn start_again(&mut self, index: Index) -> Vec<Action> {
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        match &container.activity {
            Activity::BackingOff { ended, .. } => {
                container.last = Some(ended.clone());
                container.restarts = container.restarts.saturating_add(1);
                self.start(index)
            }
            _ => Vec::new(),
        }
    }

    fn started(&mut self, index: Index, now: Moment) -> Vec<Action> {
        let stage = self.stage.clone();
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        if container.activity != Activity::Starting {
            return Vec::new();
        }
        container.activity = Activity::Up { since: now, told_to_end: false };
        let sidecar = container.kind == ContainerKind::Sidecar;
        match stage {
            Stage::Initializing(at) if at == index && sidecar => self.initialize(index + 1),
            // It was being started when the pod was told to stop.
            Stage::Stopping { killed: true } => vec![Action::Kill(index)],
            Stage::Stopping { killed: false } => self.advance_stop(),
            _ => Vec::new(),
        }
    }

    fn terminated(&self, index: Index, exit: ProcessExit) -> Terminated {
        let ProcessExit { exit_code, signal, oom_killed, at } = exit;
        let reason = match exit_code {
            0 => EndReason::Completed,
            _ if oom_killed => EndReason::OomKilled,
            _ => EndReason::Error,
        };
        let started_at = match self.containers.get(index).map(|c| &c.activity) {
            Some(Activity::Up { since, .. }) => Some(since.wall),
            _ => None,
        };
        Terminated {
            exit_code,
            signal,
            reason,
            message: String::new(),
            started_at,
            finished_at: at,
        }
    }

    /// A run of a container has ended, or could not begin.
    fn ended(&mut self, index: Index, ended: Terminated, now: Moment) -> Vec<Action> {
        let stage = self.stage.clone();
        let policy = self.policy;
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        let run = match container.activity {
            Activity::Up { since, .. } => now.uptime.saturating_sub(since.uptime),
            Activity::Starting => Duration::ZERO,
            _ => return Vec::new(),
        };
        let success = ended.exit_code == 0;
        let again = match (container.kind, policy) {
            _ if matches!(stage, Stage::Stopping { .. }) => false,
            (ContainerKind::Sidecar, _) | (ContainerKind::Main, RestartPolicy::Always) => true,
            (_, RestartPolicy::Never) => false,
            (ContainerKind::Init, _) | (_, RestartPolicy::OnFailure) => !success,
        };
        if again {
            let delay = container.backoff.after_run_of(run);
            container.activity = Activity::BackingOff { delay, ended };
            if delay.is_zero() {
                return self.start_again(index);
            }
            return vec![Action::StartAfter(index, delay)];
        }
        container.activity = Activity::Done(ended);
        match stage {
            Stage::Initializing(at) if at == index && success => self.initialize(index + 1),
            Stage::Initializing(_) => self.stop(self.grace),
            Stage::Running if self.mains().all(Container::is_done) => self.stop(self.grace),
            Stage::Stopping { .. } => self.advance_stop(),
            _ => Vec::new(),
        }
    }

    fn mains(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|container| container.kind == ContainerKind::Main)
    }

    /// The containers in which something runs, or is about to.
    fn alive(&self) -> impl Iterator<Item = Index> {
        self.containers.iter().enumerate().filter(|(_, c)| c.is_alive()).map(|(index, _)| index)
    }

    fn stop_requested(&mut self, grace: Duration) -> Vec<Action> {
        match self.stage {
            Stage::Preparing => self.fail(Failure {
                reason: "Stopped",
                message: "the pod was stopped before its containers were started".into(),
                containers: Vec::new(),
            }),
            // Only the time left can change.
            Stage::Stopping { killed: true } => Vec::new(),
            Stage::Stopping { killed: false } if grace.is_zero() => self.kill(),
            Stage::Stopping { killed: false } => vec![Action::ArmGrace(grace)],
            Stage::Initializing(_) | Stage::Running => self.stop(grace),
            Stage::PoweringOff | Stage::Ended { .. } => Vec::new(),
        }
    }

    /// Begins to end what runs.
    fn stop(&mut self, grace: Duration) -> Vec<Action> {
        self.stage = Stage::Stopping { killed: false };
        for container in &mut self.containers {
            if let Activity::BackingOff { ended, .. } = &container.activity {
                container.activity = Activity::Done(ended.clone());
            }
        }
        let mut actions = Vec::new();
        if self.alive().next().is_some() {
            if grace.is_zero() {
                return self.kill();
            }
            actions.push(Action::ArmGrace(grace));
        }
        actions.extend(self.advance_stop());
        actions
    }

    /// Ends what runs, sidecars and all; if even that does not help, the VM is ended.
    fn kill(&mut self) -> Vec<Action> {
        self.stage = Stage::Stopping { killed: true };
        let kills: Vec<Action> = self.alive().map(Action::Kill).collect();
        kills.into_iter().chain([Action::ArmGrace(KILL_LIMIT)]).collect()
    }

    /// Tells who is next to end: all but the sidecars at once, then each sidecar after those that
    /// were started after it.
    fn advance_stop(&mut self) -> Vec<Action> {
        let mut alive: Vec<Index> = self.alive().collect();
        let is_sidecar = |machine: &Self, index: &Index| {
            machine.containers.get(*index).is_some_and(|c| c.kind == ContainerKind::Sidecar)
        };
        if alive.is_empty() {
            self.stage = Stage::PoweringOff;
            return vec![Action::PowerOff];
        }
        if alive.iter().all(|index| is_sidecar(self, index)) {
            alive.drain(..alive.len() - 1);
        } else {
            alive.retain(|index| !is_sidecar(self, index));
        }
        let tell = |index: Index| match self.containers.get_mut(index).map(|c| &mut c.activity) {
            Some(Activity::Up { told_to_end, .. }) if !*told_to_end => {
                *told_to_end = true;
                Some(Action::Terminate(index))
            }
            _ => None,
        };
        alive.into_iter().filter_map(tell).collect()
    }

    /// The phase of a pod in which nothing will be started any more.
    fn verdict(&self) -> PodPhase {
        let succeeded = |container: &Container| matches!(&container.activity, Activity::Done(ended) if ended.exit_code == 0);
        if self.mains().all(succeeded) { PodPhase::Succeeded } else { PodPhase::Failed }
    }

    /// What is told of the pod.
    pub(super) fn status(&self) -> PodStatus {
        let (phase, reason, message) = match &self.stage {
            Stage::Preparing | Stage::Initializing(_) => (PodPhase::Pending, "", ""),
            // Kubernetes has no phase for what comes between running and final.
            Stage::Running | Stage::Stopping { .. } | Stage::PoweringOff => {
                (PodPhase::Running, "", "")
            }
            Stage::Ended { phase, reason, message } => (*phase, *reason, message.as_str()),
        };
        PodStatus {
            phase,
            reason: reason.to_owned(),
            message: message.to_owned(),
            containers: self.containers.iter().map(Container::status).collect(),
        }
    }
}

impl Container {
    fn is_done(&self) -> bool {
        matches!(self.activity, Activity::Done(_))
    }

    fn is_alive(&self) -> bool {
        matches!(self.activity, Activity::Starting | Activity::Up { .. })
    }

    fn status(&self) -> ContainerStatus {
        let waiting = |reason, message| ContainerState::Waiting { reason, message };
        let state = match &self.activity {
            Activity::Idle => waiting("PodInitializing", String::new()),
            Activity::Starting => waiting("ContainerCreating", String::new()),
            Activity::Up { since, .. } => ContainerState::Running { started_at: since.wall },
            Activity::BackingOff { delay, .. } => waiting(
                "CrashLoopBackOff",
                format!(
                    "back-off {} s before container {} is started again",
                    delay.as_secs(),
                    self.name
                ),
            ),
            Activity::Done(ended) => ContainerState::Terminated(ended.clone()),
            Activity::Blocked { reason, message } => waiting(reason, message.clone()),
        };
        let last = match &self.activity {
            Activity::BackingOff { ended, .. } => Some(ended.clone()),
            _ => self.last.clone(),
        };
        ContainerStatus {
            name: self.name.clone(),
            kind: self.kind,
            state,
            last,
            restarts: self.restarts,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

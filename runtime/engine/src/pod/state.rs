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
//!      ▲ VmLost, from every state but Ended              DeadlineExceeded is a StopRequested
//!                                                         after which the pod has failed
//!
//!  A container:  Idle ─▶ Starting ─▶ Up ─▶ Done          (how it ends: see `ending`)
//!                           ▲ │       │
//!                           │ └───────┴─▶ BackingOff (will be started again)
//!                           └─────────────────┘
//! ```

mod container;
mod ending;
mod probes;

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

pub(super) use self::container::RunId;
use self::container::{Activity, Container, Ending, Up, not_started};
pub(super) use self::probes::ProbeKind;
use self::probes::{RunProbes, Verdict};
use super::status::{Moment, PodPhase, PodStatus, Terminated, Warning};
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
    /// The hook after a container's start is done, or has failed.
    PostStarted(RunId, bool),
    /// A probe was answered: with success or not, or not at all.
    Probed(RunId, ProbeKind, Option<bool>),
    /// The hook before a container's end is done, however it went.
    PreStopped(RunId),
    /// The time that a single container had to end is over.
    EndDue(RunId),
    /// A container's program ended, and all its output is delivered; with its last words.
    Exited(Index, ProcessExit, String),
    /// The time to start a container again has come.
    BackoffElapsed(Index),
    /// The pod is to end; its containers may take so long.
    StopRequested(Duration),
    /// The time that containers had to end is over.
    GraceElapsed,
    /// The pod has taken longer than it may.
    DeadlineExceeded,
    /// The process that serves the pod's shares is gone; its last words.
    FileServerLost(String),
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
    /// Run the hook after a container's start: [`Event::PostStarted`] comes of it.
    PostStart(RunId),
    /// After so long, put a probe: [`Event::Probed`] comes of it.
    Probe(RunId, ProbeKind, Duration),
    /// Run the hook before a container's end, for at most so long: [`Event::PreStopped`] comes of
    /// it.
    PreStop(RunId, Duration),
    /// Come back with [`Event::EndDue`].
    EndAfter(RunId, Duration),
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

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    policy: RestartPolicy,
    grace: Duration,
    stage: Stage,
    containers: Vec<Container>,
    /// Whether the pod fails whatever its containers come to: its deadline is over.
    overdue: bool,
    /// Only told, as the warnings are: it decides nothing.
    addresses: Vec<IpAddr>,
    warnings: Vec<Warning>,
}

impl Machine {
    pub(super) fn new(spec: &PodSpec) -> Self {
        Machine {
            policy: spec.restart_policy,
            grace: Duration::from_secs(spec.termination_grace_s),
            stage: Stage::Preparing,
            containers: spec.all_containers().map(Container::new).collect(),
            overdue: false,
            addresses: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Takes note of the addresses by which the pod is reached.
    pub(super) fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.addresses = addresses;
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
            Event::StartFailed(index, failure) => {
                self.ended(index, not_started(failure, now.wall), now)
            }
            Event::PostStarted(id, true) => match self.current(id) {
                Some(_) => self.running(id, now),
                None => Vec::new(),
            },
            Event::PostStarted(id, false) => match self.current(id) {
                Some(_) => self.end_container(id.container, self.grace, now),
                None => Vec::new(),
            },
            Event::Probed(id, kind, success) => self.probed(id, kind, success, now),
            Event::PreStopped(id) => self.pre_stopped(id, now),
            Event::EndDue(id) => self.end_due(id, now),
            Event::Exited(index, exit, message) => {
                let Some(container) = self.containers.get(index) else { return Vec::new() };
                let ended = container.terminated(exit, message);
                self.ended(index, ended, now)
            }
            Event::BackoffElapsed(index) => self.start_again(index),
            Event::StopRequested(grace) => self.stop_requested(grace, now),
            Event::GraceElapsed => self.grace_elapsed(now),
            Event::DeadlineExceeded => self.deadline_exceeded(now),
            // There is one: it is told once. What it comes to, the containers see.
            Event::FileServerLost(message) => {
                self.warnings.push(Warning { reason: "FileServerLost", message });
                Vec::new()
            }
            // Everything had ended before: how the VM goes does not change what they came to.
            Event::VmEnded | Event::VmLost(_) if self.stage == Stage::PoweringOff => {
                if self.overdue {
                    let Failure { reason, message, .. } = overdue();
                    return self.end(PodPhase::Failed, reason, message);
                }
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
            container.lose(at);
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

    /// What runs in this run of a container, unless that is over.
    fn current(&mut self, id: RunId) -> Option<&mut Up> {
        self.containers.get_mut(id.container).filter(|c| c.restarts == id.run)?.up()
    }

    fn started(&mut self, index: Index, now: Moment) -> Vec<Action> {
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        if container.activity != Activity::Starting {
            return Vec::new();
        }
        let probes = RunProbes::default();
        container.activity = Activity::Up(Up { since: now, ending: Ending::No, probes });
        let id = RunId { container: index, run: container.restarts };
        let has_post_start = container.has_post_start;
        match self.stage {
            // It was being started when the pod was told to stop: it is ended without its hooks.
            Stage::Stopping { killed: true } => vec![Action::Kill(index)],
            Stage::Stopping { killed: false } => self.advance_stop(now),
            _ if has_post_start => vec![Action::PostStart(id)],
            _ => self.running(id, now),
        }
    }

    /// A container's program runs, and its hook is done: its probes begin.
    fn running(&mut self, id: RunId, now: Moment) -> Vec<Action> {
        let Some(container) = self.containers.get_mut(id.container) else { return Vec::new() };
        let Activity::Up(up) = &mut container.activity else { return Vec::new() };
        let due = up.probes.begin(&container.probes, up.since.uptime, now.uptime);
        let started = up.probes.started;
        let mut actions: Vec<Action> =
            due.into_iter().map(|(kind, after)| Action::Probe(id, kind, after)).collect();
        if started {
            actions.extend(self.sidecar_started(id.container));
        }
        actions
    }

    /// Goes on with the next init container, if it is a sidecar that this waited for.
    fn sidecar_started(&mut self, index: Index) -> Vec<Action> {
        let sidecar = self.containers.get(index).is_some_and(|c| c.kind == ContainerKind::Sidecar);
        match self.stage {
            Stage::Initializing(at) if at == index && sidecar => self.initialize(index + 1),
            _ => Vec::new(),
        }
    }

    fn probed(
        &mut self,
        id: RunId,
        kind: ProbeKind,
        success: Option<bool>,
        now: Moment,
    ) -> Vec<Action> {
        let Some(container) =
            self.containers.get_mut(id.container).filter(|c| c.restarts == id.run)
        else {
            return Vec::new();
        };
        let Activity::Up(up) = &mut container.activity else { return Vec::new() };
        // Who is told to end is not told again; but it stays ready as long as it says so.
        if up.ending != Ending::No && kind != ProbeKind::Readiness {
            return Vec::new();
        }
        let probes = &container.probes;
        let (verdict, due) = up.probes.answer(kind, success, probes, up.since.uptime, now.uptime);
        let mut actions: Vec<Action> =
            due.into_iter().map(|(kind, after)| Action::Probe(id, kind, after)).collect();
        match (kind, verdict) {
            (ProbeKind::Startup, Some(Verdict::Passed)) => {
                actions.extend(self.sidecar_started(id.container));
            }
            (ProbeKind::Startup | ProbeKind::Liveness, Some(Verdict::Failed)) => {
                let own = kind.of(probes).and_then(|probe| probe.termination_grace_s);
                let grace = own.map_or(self.grace, Duration::from_secs);
                actions.extend(self.end_container(id.container, grace, now));
            }
            _ => {}
        }
        actions
    }

    fn deadline_exceeded(&mut self, now: Moment) -> Vec<Action> {
        match self.stage {
            Stage::Preparing => self.fail(overdue()),
            Stage::Initializing(_) | Stage::Running => {
                self.overdue = true;
                self.stop(self.grace, now)
            }
            Stage::Stopping { .. } | Stage::PoweringOff | Stage::Ended { .. } => Vec::new(),
        }
    }

    /// A run of a container has ended, or could not begin.
    fn ended(&mut self, index: Index, ended: Terminated, now: Moment) -> Vec<Action> {
        let stage = self.stage.clone();
        let policy = self.policy;
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        let run = match container.activity {
            Activity::Up(Up { since, .. }) => now.uptime.saturating_sub(since.uptime),
            Activity::Starting => Duration::ZERO,
            _ => return Vec::new(),
        };
        let success = ended.exit_code == 0;
        let stopping = matches!(stage, Stage::Stopping { .. });
        if !stopping && container.is_restarted(policy, success) {
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
            Stage::Initializing(_) => self.stop(self.grace, now),
            Stage::Running if self.mains().all(Container::is_done) => self.stop(self.grace, now),
            Stage::Stopping { .. } => self.advance_stop(now),
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
            pod_ips: self.addresses.clone(),
            warnings: self.warnings.clone(),
            containers: self.containers.iter().map(Container::status).collect(),
        }
    }
}

/// Why a pod fails whose time is over, in the kubelet's words.
fn overdue() -> Failure {
    Failure {
        reason: "DeadlineExceeded",
        message: "Pod was active on the node longer than the specified deadline".into(),
        containers: Vec::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

//! One container in the life of its pod.

use std::time::{Duration, SystemTime};

use super::super::backoff::Backoff;
use super::super::status::{ContainerState, ContainerStatus, EndReason, Moment, Terminated};
use super::Index;
use super::probes::RunProbes;
use crate::guest::{ProcessExit, StartFailure};
use crate::types::{ContainerKind, ContainerSpec, Probes, RestartPolicy};

/// One run of a container. What comes late from an earlier run is told by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pod) struct RunId {
    pub(in crate::pod) container: Index,
    /// How often it was started again before.
    pub(in crate::pod) run: u32,
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Activity {
    Idle,
    Starting,
    Up(Up),
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

/// A container whose program runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Up {
    pub(super) since: Moment,
    pub(super) ending: Ending,
    pub(super) probes: RunProbes,
}

/// How far a container that runs is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    No,
    /// Its hook runs before it is told.
    PreStop,
    /// Its hook is done, but it is not its turn.
    Waiting,
    /// It was told, at this uptime, and late: the time for it has partly gone by.
    Told {
        at: Duration,
        late: bool,
    },
}

/// A container of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) kind: ContainerKind,
    pub(super) probes: Probes,
    pub(super) has_post_start: bool,
    pub(super) has_pre_stop: bool,
    pub(super) activity: Activity,
    pub(super) last: Option<Terminated>,
    pub(super) restarts: u32,
    pub(super) backoff: Backoff,
}

impl Container {
    pub(super) fn new(spec: &ContainerSpec) -> Self {
        Container {
            name: spec.name.clone(),
            kind: spec.kind,
            probes: spec.probes.clone(),
            has_post_start: spec.lifecycle.post_start.is_some(),
            has_pre_stop: spec.lifecycle.pre_stop.is_some(),
            activity: Activity::Idle,
            last: None,
            restarts: 0,
            backoff: Backoff::default(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.activity, Activity::Done(_))
    }

    pub(super) fn is_alive(&self) -> bool {
        matches!(self.activity, Activity::Starting | Activity::Up(_))
    }

    pub(super) fn up(&mut self) -> Option<&mut Up> {
        match &mut self.activity {
            Activity::Up(up) => Some(up),
            _ => None,
        }
    }

    /// Whether it is started again after a run that ended so, by the pod's policy.
    pub(super) fn is_restarted(&self, policy: RestartPolicy, success: bool) -> bool {
        match (self.kind, policy) {
            (ContainerKind::Sidecar, _) | (ContainerKind::Main, RestartPolicy::Always) => true,
            (_, RestartPolicy::Never) => false,
            (ContainerKind::Init, _) | (_, RestartPolicy::OnFailure) => !success,
        }
    }

    /// The end of a run, as the guest told it, with the container's last words.
    pub(super) fn terminated(&self, exit: ProcessExit, message: String) -> Terminated {
        let ProcessExit { exit_code, signal, oom_killed, at } = exit;
        let reason = match exit_code {
            0 => EndReason::Completed,
            _ if oom_killed => EndReason::OomKilled,
            _ => EndReason::Error,
        };
        let started_at = self.started_at();
        Terminated { exit_code, signal, reason, message, started_at, finished_at: at }
    }

    fn started_at(&self) -> Option<SystemTime> {
        match &self.activity {
            Activity::Up(Up { since, .. }) => Some(since.wall),
            _ => None,
        }
    }

    /// The VM is gone, and what ran has ended in an unknown way.
    pub(super) fn lose(&mut self, at: SystemTime) {
        let ended = match &self.activity {
            Activity::Idle | Activity::Blocked { .. } | Activity::Done(_) => return,
            Activity::BackingOff { ended, .. } => ended.clone(),
            Activity::Starting | Activity::Up(_) => Terminated {
                exit_code: 137,
                signal: 0,
                reason: EndReason::ContainerStatusUnknown,
                message: "the virtual machine ended while the container ran".into(),
                started_at: self.started_at(),
                finished_at: at,
            },
        };
        self.activity = Activity::Done(ended);
    }

    pub(super) fn status(&self) -> ContainerStatus {
        let waiting = |reason, message| ContainerState::Waiting { reason, message };
        let state = match &self.activity {
            Activity::Idle => waiting("PodInitializing", String::new()),
            Activity::Starting => waiting("ContainerCreating", String::new()),
            Activity::Up(up) => ContainerState::Running { started_at: up.since.wall },
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
        let (started, ready) = match &self.activity {
            Activity::Up(up) => (up.probes.started, up.probes.ready(&self.probes)),
            // An init container that has done its work.
            Activity::Done(ended) => {
                (false, self.kind == ContainerKind::Init && ended.exit_code == 0)
            }
            _ => (false, false),
        };
        ContainerStatus {
            name: self.name.clone(),
            kind: self.kind,
            state,
            last,
            restarts: self.restarts,
            started,
            ready,
        }
    }
}

/// The end of a container whose program could not be started.
pub(super) fn not_started(failure: StartFailure, at: SystemTime) -> Terminated {
    let StartFailure { exit_code, message } = failure;
    Terminated {
        exit_code,
        signal: 0,
        reason: EndReason::StartError,
        message,
        started_at: None,
        finished_at: at,
    }
}

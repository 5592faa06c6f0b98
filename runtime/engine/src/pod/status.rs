//! What is told of a pod: its phase and the states of its containers, as Kubernetes defines them.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::types::ContainerKind;

/// A pod's phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodPhase {
    /// It is being prepared, or its init containers have not all ended well.
    Pending,
    /// Its containers were started; at least one runs or will be started again.
    Running,
    /// All containers ended with success and none will be started again.
    Succeeded,
    /// None will be started again, and at least one did not end with success.
    Failed,
}

impl PodPhase {
    /// Whether the phase is final.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, PodPhase::Succeeded | PodPhase::Failed)
    }

    /// Its name in Kubernetes' API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PodPhase::Pending => "Pending",
            PodPhase::Running => "Running",
            PodPhase::Succeeded => "Succeeded",
            PodPhase::Failed => "Failed",
        }
    }
}

/// What is known of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStatus {
    /// Its phase.
    pub phase: PodPhase,
    /// Why it failed as a whole, in one word (`ErrImagePull`, `VmLost`, ...); empty if its
    /// containers tell everything.
    pub reason: String,
    /// The same as a text.
    pub message: String,
    /// The addresses by which it is reached, its own one first; none if it has no network, or not
    /// yet.
    pub pod_ips: Vec<IpAddr>,
    /// What went wrong without an end of the pod, in its order.
    pub warnings: Vec<Warning>,
    /// Init containers and containers, in the order of their start.
    pub containers: Vec<ContainerStatus>,
}

/// Something that went wrong with a pod that lives on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What, in one word: `FileServerLost`.
    pub reason: &'static str,
    /// The same as a text.
    pub message: String,
}

/// What is known of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// Its part in the life of the pod.
    pub kind: ContainerKind,
    /// Its state.
    pub state: ContainerState,
    /// How the run before this one ended, if there was one.
    pub last: Option<Terminated>,
    /// How often it was started again.
    pub restarts: u32,
    /// Whether it runs and its startup probe, if it has one, has succeeded.
    pub started: bool,
    /// Whether it runs and can serve, as its readiness probe says if it has one; of an init
    /// container, whether it has done its work.
    pub ready: bool,
}

/// The conditions of a pod that say how far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodConditions {
    /// Its init containers have done their work, and its sidecars have started.
    pub initialized: bool,
    /// All its containers and sidecars are ready.
    pub containers_ready: bool,
    /// The pod can serve: the same, as there are no readiness gates.
    pub ready: bool,
}

impl PodStatus {
    /// The pod's conditions.
    #[must_use]
    pub fn conditions(&self) -> PodConditions {
        let of = |kind| self.containers.iter().filter(move |container| container.kind == kind);
        let all_ready = |kind| of(kind).all(|container| container.ready);
        let past_init = of(ContainerKind::Main).any(|main| {
            !matches!(main.state, ContainerState::Waiting { reason: "PodInitializing", .. })
        });
        let started = of(ContainerKind::Sidecar).all(|sidecar| sidecar.started);
        let containers_ready = !self.phase.is_final()
            && all_ready(ContainerKind::Main)
            && all_ready(ContainerKind::Sidecar);
        PodConditions {
            initialized: all_ready(ContainerKind::Init) && (started || past_init),
            containers_ready,
            ready: containers_ready,
        }
    }
}

/// State of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerState {
    /// It does not run yet, or not at the moment.
    Waiting {
        /// In one word: `PodInitializing`, `ContainerCreating`, `CrashLoopBackOff`, `ErrImagePull`,
        /// ...
        reason: &'static str,
        /// The same as a text; may be empty.
        message: String,
    },
    /// It runs.
    Running {
        /// Since when.
        started_at: SystemTime,
    },
    /// It has ended.
    Terminated(Terminated),
}

/// How a run of a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminated {
    /// 0 to 255; 128 + n if signal n ended it.
    pub exit_code: u8,
    /// The signal that ended it, or 0.
    pub signal: u8,
    /// In one word.
    pub reason: EndReason,
    /// The same as a text; may be empty.
    pub message: String,
    /// When it was started; `None` if its program never ran.
    pub started_at: Option<SystemTime>,
    /// When it ended.
    pub finished_at: SystemTime,
}

/// Why a run of a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// With exit code 0.
    Completed,
    /// With another exit code, or by a signal.
    Error,
    /// The kernel killed it for memory.
    OomKilled,
    /// Its program could not be started.
    StartError,
    /// The virtual machine ended, and nobody knows.
    ContainerStatusUnknown,
}

impl EndReason {
    /// Its name in Kubernetes' API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Completed => "Completed",
            EndReason::Error => "Error",
            EndReason::OomKilled => "OOMKilled",
            EndReason::StartError => "StartError",
            EndReason::ContainerStatusUnknown => "ContainerStatusUnknown",
        }
    }
}

/// A moment by two clocks: what is shown, and what is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment {
    /// Wall-clock time.
    pub(super) wall: SystemTime,
    /// Time since the pod's actor was made; never goes back.
    pub(super) uptime: Duration,
}

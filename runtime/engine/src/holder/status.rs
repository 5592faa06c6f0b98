//! What is told of a pod to people and programs, and kept after its end: JSON with the names of
//! Kubernetes' PodStatus where it has them.
//!
//! Read by other versions of husk: fields are only ever added, and unknown ones are ignored.

use std::net::IpAddr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::cri_log::timestamp;
use crate::guest::GuestInfo;
use crate::pod::{ContainerState, ContainerStatus, PodConditions, PodStatus, Terminated, Warning};
use crate::types::ContainerKind;

/// A pod's status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusRecord {
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub phase: String,
    /// Why it failed as a whole, in one word; empty if its containers tell everything.
    #[serde(default)]
    pub reason: String,
    /// The same as a text.
    #[serde(default)]
    pub message: String,
    /// The addresses by which it is reached, its own one first.
    #[serde(default, rename = "podIPs", skip_serializing_if = "Vec::is_empty")]
    pub pod_ips: Vec<IpAddr>,
    /// What went wrong without an end of the pod, in its order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<WarningRecord>,
    /// Init containers and containers, in the order of their start.
    #[serde(default)]
    pub containers: Vec<ContainerRecord>,
    /// How far it has come.
    #[serde(default)]
    pub conditions: ConditionsRecord,
    /// When this was written (RFC 3339).
    #[serde(default)]
    pub at: String,
    /// What the guest told of itself, once the pod has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_kernel: Option<String>,
}

/// Something that went wrong with a pod that lived on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WarningRecord {
    /// In one word.
    pub reason: String,
    /// As a text.
    #[serde(default)]
    pub message: String,
}

/// A container's status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerRecord {
    /// Its name.
    pub name: String,
    /// `init`, `sidecar` or `main`.
    #[serde(default)]
    pub kind: String,
    /// Its state.
    pub state: StateRecord,
    /// How the run before this one ended, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<TerminatedRecord>,
    /// How often it was started again.
    #[serde(default)]
    pub restarts: u32,
    /// Whether it runs and its startup probe has succeeded.
    #[serde(default)]
    pub started: bool,
    /// Whether it runs and its readiness probe says that it can serve; of an init container,
    /// whether it has done its work.
    #[serde(default)]
    pub ready: bool,
}

/// Which of a pod's conditions hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionsRecord {
    /// Its init containers have done their work, and its sidecars have started.
    #[serde(default)]
    pub initialized: bool,
    /// All its containers and sidecars are ready.
    #[serde(default)]
    pub containers_ready: bool,
    /// It can serve.
    #[serde(default)]
    pub ready: bool,
}

/// A container's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StateRecord {
    /// It does not run yet, or not at the moment.
    Waiting {
        /// In one word.
        #[serde(default)]
        reason: String,
        /// As a text.
        #[serde(default)]
        message: String,
    },
    /// It runs.
    #[serde(rename_all = "camelCase")]
    Running {
        /// Since when.
        started_at: String,
    },
    /// It has ended.
    Terminated(TerminatedRecord),
}

impl Default for StateRecord {
    fn default() -> Self {
        StateRecord::Waiting { reason: String::new(), message: String::new() }
    }
}

/// How a run of a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TerminatedRecord {
    /// 0 to 255; 128 + n if signal n ended it.
    pub exit_code: u8,
    /// The signal that ended it, or 0.
    #[serde(default)]
    pub signal: u8,
    /// In one word.
    #[serde(default)]
    pub reason: String,
    /// As a text.
    #[serde(default)]
    pub message: String,
    /// When it was started; absent if its program never ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended.
    #[serde(default)]
    pub finished_at: String,
}

impl WarningRecord {
    fn of(Warning { reason, message }: &Warning) -> Self {
        WarningRecord { reason: (*reason).to_owned(), message: message.clone() }
    }
}

impl StatusRecord {
    /// Of a pod now.
    #[must_use]
    pub fn of(status: &PodStatus) -> Self {
        let PodConditions { initialized, containers_ready, ready } = status.conditions();
        StatusRecord {
            conditions: ConditionsRecord { initialized, containers_ready, ready },
            phase: status.phase.as_str().to_owned(),
            reason: status.reason.clone(),
            message: status.message.clone(),
            pod_ips: status.pod_ips.clone(),
            warnings: status.warnings.iter().map(WarningRecord::of).collect(),
            containers: status.containers.iter().map(ContainerRecord::of).collect(),
            at: timestamp(SystemTime::now()),
            guest_kernel: None,
        }
    }

    /// The same, with what the guest told.
    #[must_use]
    pub fn with_guest(mut self, guest: Option<&GuestInfo>) -> Self {
        self.guest_kernel = guest.map(|guest| guest.kernel_release.clone());
        self
    }

    /// Whether the phase is final.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }

    /// What becomes of the status of a pod whose process is gone without having said how it ended:
    /// it failed, with this reason, and nobody knows how its containers ended.
    #[must_use]
    pub fn abandoned(mut self, message: String) -> Self {
        if self.is_final() {
            return self;
        }
        self.phase = "Failed".to_owned();
        self.reason = ABANDONED.to_owned();
        self.message = message;
        self.conditions.containers_ready = false;
        self.conditions.ready = false;
        for container in &mut self.containers {
            if container.kind != "init" {
                container.started = false;
                container.ready = false;
            }
            if let StateRecord::Running { started_at } = &container.state {
                container.state = StateRecord::Terminated(TerminatedRecord {
                    exit_code: 137,
                    reason: "ContainerStatusUnknown".to_owned(),
                    message: "the pod's process ended while the container ran".to_owned(),
                    started_at: Some(started_at.clone()),
                    ..TerminatedRecord::default()
                });
            }
        }
        self
    }

    /// Whether any container's program ever ran.
    #[must_use]
    pub fn ever_ran(&self) -> bool {
        self.containers.iter().any(|container| {
            container.last.is_some()
                || match &container.state {
                    StateRecord::Waiting { .. } => false,
                    StateRecord::Running { .. } => true,
                    StateRecord::Terminated(ended) => ended.started_at.is_some(),
                }
        })
    }

    /// The exit code by which a command passes on how the pod ended: 0, that of the first container
    /// that failed, or `None` if the pod failed as a whole.
    #[must_use]
    pub fn exit_code(&self) -> Option<u8> {
        if self.phase == "Succeeded" {
            return Some(0);
        }
        if !self.reason.is_empty() {
            return None;
        }
        self.containers.iter().find_map(|container| match &container.state {
            StateRecord::Terminated(ended)
                if ended.exit_code != 0 && container.kind != "sidecar" =>
            {
                Some(ended.exit_code)
            }
            _ => None,
        })
    }
}

/// Reason of a pod whose process is gone.
pub const ABANDONED: &str = "HolderLost";

fn kind(kind: ContainerKind) -> &'static str {
    match kind {
        ContainerKind::Init => "init",
        ContainerKind::Sidecar => "sidecar",
        ContainerKind::Main => "main",
    }
}

impl ContainerRecord {
    fn of(status: &ContainerStatus) -> Self {
        ContainerRecord {
            name: status.name.clone(),
            kind: kind(status.kind).to_owned(),
            state: match &status.state {
                ContainerState::Waiting { reason, message } => {
                    StateRecord::Waiting { reason: (*reason).to_owned(), message: message.clone() }
                }
                ContainerState::Running { started_at, .. } => {
                    StateRecord::Running { started_at: timestamp(*started_at) }
                }
                ContainerState::Terminated(ended) => {
                    StateRecord::Terminated(TerminatedRecord::of(ended))
                }
            },
            last: status.last.as_ref().map(TerminatedRecord::of),
            restarts: status.restarts,
            started: status.started,
            ready: status.ready,
        }
    }
}

impl TerminatedRecord {
    fn of(ended: &Terminated) -> Self {
        TerminatedRecord {
            exit_code: ended.exit_code,
            signal: ended.signal,
            reason: ended.reason.as_str().to_owned(),
            message: ended.message.clone(),
            started_at: ended.started_at.map(timestamp),
            finished_at: timestamp(ended.finished_at),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn running() -> StatusRecord {
        let state = StateRecord::Running { started_at: "t".into() };
        let main = ContainerRecord { name: "c".into(), state, ..ContainerRecord::default() };
        StatusRecord { phase: "Running".into(), containers: vec![main], ..StatusRecord::default() }
    }

    #[test]
    fn an_abandoned_pod_has_failed_unless_it_had_ended() {
        let lost = running().abandoned("killed".into());
        assert_eq!((lost.phase.as_str(), lost.reason.as_str()), ("Failed", ABANDONED));
        assert!(
            matches!(&lost.containers[0].state, StateRecord::Terminated(t) if t.exit_code == 137)
        );
        assert_eq!(lost.exit_code(), None);
        let ended = StatusRecord { phase: "Succeeded".into(), ..running() };
        assert_eq!(ended.clone().abandoned("killed".into()), ended);
        assert_eq!(ended.exit_code(), Some(0));
    }

    #[test]
    fn a_record_survives_its_way_through_json_and_unknown_fields() {
        let mut json = serde_json::to_value(running()).unwrap();
        json["added later"] = 1.into();
        json["containers"][0]["state"]["running"]["more"] = 2.into();
        assert_eq!(serde_json::from_value::<StatusRecord>(json).unwrap(), running());
        let least =
            r#"{"phase": "Pending", "containers": [{"name": "c", "state": {"waiting": {}}}]}"#;
        assert!(!serde_json::from_str::<StatusRecord>(least).unwrap().ever_ran());
        assert!(running().ever_ran());
    }
}

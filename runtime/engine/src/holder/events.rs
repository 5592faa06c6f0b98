//! What happens to pods, as a log of JSON lines that all holders of a state directory share. Made
//! from changes of the status; bounded by rotation.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::cri_log::timestamp;
use super::record::{PodRecord, Records};
use super::rotate::{Rotation, Writer};
use super::status::{ContainerRecord, StateRecord, StatusRecord, TerminatedRecord};

/// Something that happened to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEvent {
    /// When it was seen (RFC 3339).
    pub time: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The container that it concerns, if it does not concern the whole pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// `Created`, `Running`, `Succeeded`, `Failed`, `Removed`; `FileServerLost`, of a pod that lives on
    /// without its shares; of a container `Started`, `Exited`,
    /// `OOMKilled`, `BackOff`.
    pub event: String,
    /// Details as a text; may be empty.
    #[serde(default)]
    pub message: String,
    /// How the container exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

/// Where events are kept, and how much of them.
const ROTATION: Rotation = Rotation { max_bytes: 4 << 20, max_files: 2 };

/// The log of events of these records.
#[must_use]
pub fn path(records: &Records) -> PathBuf {
    records.root().join("events.log")
}

/// Appends events. Blocks for moments.
///
/// # Errors
/// As write(2).
pub fn append(records: &Records, events: &[PodEvent]) -> io::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    let mut lines = Vec::new();
    for event in events {
        serde_json::to_writer(&mut lines, event)?;
        lines.push(b'\n');
    }
    // Others write there too, and only one may rotate.
    let lock = File::create(records.root().join(".events.lock"))?;
    lock.lock()?;
    Writer::open(path(records), ROTATION)?.write(&lines)
}

/// An event of a pod as a whole.
#[must_use]
pub fn of_pod(pod: &PodRecord, event: &str, message: &str) -> PodEvent {
    PodEvent {
        time: timestamp(SystemTime::now()),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        container: None,
        event: event.to_owned(),
        message: message.to_owned(),
        exit_code: None,
    }
}

/// What happened between two statuses of a pod. Of what came and went in between only what the
/// later status tells is known.
#[must_use]
pub fn between(pod: &PodRecord, old: &StatusRecord, new: &StatusRecord) -> Vec<PodEvent> {
    let mut events = Vec::new();
    for container in &new.containers {
        let known = old.containers.iter().find(|known| known.name == container.name);
        let happened = |event: &str, message: &str, exit_code| PodEvent {
            container: Some(container.name.clone()),
            exit_code,
            ..of_pod(pod, event, message)
        };
        let started = starts(container) > known.map_or(0, starts);
        let ended = ends(container) > known.map_or(0, ends);
        let running = matches!(container.state, StateRecord::Running { .. });
        // What ended had started before, what runs now started after.
        if started && !running {
            events.push(happened("Started", "", None));
        }
        if ended && let Some(end) = last_end(container) {
            let event = if end.reason == "OOMKilled" { "OOMKilled" } else { "Exited" };
            let message = if end.message.is_empty() { &end.reason } else { &end.message };
            events.push(happened(event, message, Some(end.exit_code)));
        }
        if started && running {
            events.push(happened("Started", "", None));
        }
        if let StateRecord::Waiting { reason, message } = &container.state
            && reason == "CrashLoopBackOff"
            && known.is_none_or(|known| known.state != container.state)
        {
            events.push(happened("BackOff", message, None));
        }
    }
    // Warnings are only ever added.
    for warning in new.warnings.iter().skip(old.warnings.len()) {
        events.push(of_pod(pod, &warning.reason, &warning.message));
    }
    if old.phase != new.phase {
        let message = match (new.reason.is_empty(), new.message.is_empty()) {
            (true, _) => String::new(),
            (false, true) => new.reason.clone(),
            (false, false) => format!("{}: {}", new.reason, new.message),
        };
        events.push(of_pod(pod, &new.phase, &message));
    }
    events
}

/// How often a container's program was started, as far as is known.
fn starts(container: &ContainerRecord) -> u32 {
    let now = match &container.state {
        StateRecord::Running { .. } => true,
        StateRecord::Terminated(end) => end.started_at.is_some(),
        // Its last run is not counted as a restart yet.
        StateRecord::Waiting { reason, .. } => reason == "CrashLoopBackOff",
    };
    container.restarts.saturating_add(u32::from(now))
}

/// How often it ended.
fn ends(container: &ContainerRecord) -> u32 {
    let now = match &container.state {
        StateRecord::Running { .. } => false,
        StateRecord::Terminated(_) => true,
        StateRecord::Waiting { reason, .. } => reason == "CrashLoopBackOff",
    };
    container.restarts.saturating_add(u32::from(now))
}

fn last_end(container: &ContainerRecord) -> Option<&TerminatedRecord> {
    match &container.state {
        StateRecord::Terminated(end) => Some(end),
        StateRecord::Running { .. } | StateRecord::Waiting { .. } => container.last.as_ref(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::record::tests::record;
    use super::super::status::WarningRecord;
    use super::*;

    fn status(phase: &str, state: StateRecord, restarts: u32) -> StatusRecord {
        let container =
            ContainerRecord { name: "c".into(), state, restarts, ..ContainerRecord::default() };
        let containers = vec![container];
        StatusRecord { phase: phase.into(), containers, ..StatusRecord::default() }
    }

    fn ended(exit_code: u8, reason: &str) -> TerminatedRecord {
        TerminatedRecord {
            exit_code,
            reason: reason.into(),
            started_at: Some("t".into()),
            ..TerminatedRecord::default()
        }
    }

    fn names(events: &[PodEvent]) -> Vec<&str> {
        events.iter().map(|event| event.event.as_str()).collect()
    }

    #[test]
    fn a_warning_is_told_once() {
        let pod = record("p", "u", true);
        let running = status("Running", StateRecord::Running { started_at: "t".into() }, 0);
        let lost = WarningRecord { reason: "FileServerLost".into(), message: "killed".into() };
        let warned = StatusRecord { warnings: vec![lost], ..running.clone() };
        let events = between(&pod, &running, &warned);
        assert_eq!(names(&events), ["FileServerLost"]);
        assert_eq!(events.iter().map(|event| &*event.message).collect::<Vec<_>>(), ["killed"]);
        assert!(between(&pod, &warned, &warned).is_empty());
    }

    #[test]
    fn a_short_life_is_told_even_if_only_its_end_was_seen() {
        let pod = record("p", "u", true);
        let waiting = status("Pending", StateRecord::default(), 0);
        let running = status("Running", StateRecord::Running { started_at: "t".into() }, 0);
        let end = status("Failed", StateRecord::Terminated(ended(1, "Error")), 0);
        assert_eq!(names(&between(&pod, &waiting, &running)), ["Started", "Running"]);
        assert_eq!(names(&between(&pod, &running, &end)), ["Exited", "Failed"]);
        let all = between(&pod, &waiting, &end);
        assert_eq!(names(&all), ["Started", "Exited", "Failed"]);
        assert_eq!(all.iter().find_map(|event| event.exit_code), Some(1));
        assert!(between(&pod, &end, &end).is_empty());
    }

    #[test]
    fn a_restart_is_an_end_and_a_start() {
        let pod = record("p", "u", true);
        let first = status("Running", StateRecord::Running { started_at: "t".into() }, 0);
        let mut second = status("Running", StateRecord::Running { started_at: "u".into() }, 1);
        for container in &mut second.containers {
            container.last = Some(ended(137, "OOMKilled"));
        }
        assert_eq!(names(&between(&pod, &first, &second)), ["OOMKilled", "Started"]);
        let reason = "CrashLoopBackOff".to_owned();
        let waiting = StateRecord::Waiting { reason, message: "back-off 10 s".into() };
        let mut back_off = status("Running", waiting, 1);
        for container in &mut back_off.containers {
            container.last = Some(ended(3, "Error"));
        }
        assert_eq!(names(&between(&pod, &second, &back_off)), ["Exited", "BackOff"]);
    }

    #[test]
    fn events_are_lines_of_json() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let event = of_pod(&record("p", "u", true), "Created", "");
        append(&records, &[event.clone(), event.clone()]).unwrap();
        let text = std::fs::read_to_string(path(&records)).unwrap();
        let read: Vec<PodEvent> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, [event.clone(), event]);
    }
}

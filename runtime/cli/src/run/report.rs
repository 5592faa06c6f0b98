//! What came of the pods: the closing tables, the JSON objects, the exit code.

use std::time::SystemTime;

use comfy_table::{CellAlignment, Table, presets};
use husk_engine::pod::{
    ContainerState, ContainerStatus, EndReason, Measured, PodPhase, PodReport, Step, Terminated,
};
use husk_engine::types::{ContainerKind, PodMetadata};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::EXIT_HUSK_FAILED;

/// Exit code if one of several pods failed.
const EXIT_SOME_FAILED: u8 = 1;

/// The exit code of `husk run`, as its help says.
pub(super) fn exit_code(reports: &[PodReport]) -> u8 {
    let failed = |report: &&PodReport| report.status.phase != PodPhase::Succeeded;
    let broken = |report: &PodReport| {
        report.status.phase != PodPhase::Succeeded && container_failure(report).is_none()
    };
    match reports {
        [only] if failed(&only) => container_failure(only).unwrap_or(EXIT_HUSK_FAILED),
        _ if reports.iter().any(broken) => EXIT_HUSK_FAILED,
        _ if reports.iter().any(|report| failed(&report)) => EXIT_SOME_FAILED,
        _ => 0,
    }
}

/// The exit code of the first container that failed, unless the pod failed as a whole.
fn container_failure(report: &PodReport) -> Option<u8> {
    if !report.status.reason.is_empty() {
        return None;
    }
    report.status.containers.iter().find_map(|container| match &container.state {
        ContainerState::Terminated(ended)
            if ended.exit_code != 0 && container.kind != ContainerKind::Sidecar =>
        {
            Some(ended.exit_code)
        }
        _ => None,
    })
}

fn kind(kind: ContainerKind) -> &'static str {
    match kind {
        ContainerKind::Init => "init",
        ContainerKind::Sidecar => "sidecar",
        ContainerKind::Main => "main",
    }
}

fn signal_name(ended: &Terminated) -> String {
    if ended.signal == 0 { String::new() } else { format!(" (signal {})", ended.signal) }
}

/// State, exit code and remark of a container.
fn cells(container: &ContainerStatus) -> (String, String, String) {
    match &container.state {
        ContainerState::Waiting { reason, message } => {
            ("Waiting".into(), String::new(), remark(reason, message))
        }
        ContainerState::Running { .. } => ("Running".into(), String::new(), String::new()),
        ContainerState::Terminated(ended) => (
            "Terminated".into(),
            format!("{}{}", ended.exit_code, signal_name(ended)),
            remark(ended.reason.as_str(), &ended.message),
        ),
    }
}

fn remark(reason: &str, message: &str) -> String {
    if message.is_empty() { reason.to_owned() } else { format!("{reason}: {message}") }
}

/// The closing tables of a pod.
pub(super) fn text(metadata: &PodMetadata, report: &PodReport, host_kernel: &str) -> String {
    let status = &report.status;
    let mut out =
        format!("\npod {}/{}: {}", metadata.namespace, metadata.name, status.phase.as_str());
    if !status.reason.is_empty() {
        out.push_str(&format!(" ({})", remark(&status.reason, &status.message)));
    }
    out.push('\n');
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "CONTAINER",
        "KIND",
        "STATE",
        "EXIT CODE",
        "RESTARTS",
        "REASON",
    ]);
    for container in &status.containers {
        let (state, code, mut reason) = cells(container);
        // The pod's own reason stands above already.
        if !status.message.is_empty() {
            reason = reason.replace(&format!(": {}", status.message), "");
        }
        let kind = kind(container.kind).to_owned();
        let restarts = container.restarts.to_string();
        table.add_row([container.name.clone(), kind, state, code, restarts, reason]);
    }
    out.push_str(&format!("{table}\n"));
    if !report.timeline.is_empty() {
        out.push_str(&format!("\n{}\n", time_line(&report.timeline)));
    }
    if let Some(guest) = &report.guest {
        out.push_str(&format!(
            "\nguest Linux {} on host Linux {host_kernel}\n",
            guest.kernel_release
        ));
    }
    out
}

/// Milliseconds with two decimals.
fn ms(ns: u64) -> String {
    let hundredths = ns / 10_000;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn time_line(steps: &[Step]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["START", "TOOK ms", "DONE AT ms"]);
    for step in steps {
        let took = step.end_ns.saturating_sub(step.begin_ns);
        let took = if took == 0 { String::new() } else { ms(took) };
        table.add_row([step.name.clone(), took, ms(step.end_ns)]);
    }
    for column in [1, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A pod as `--output json` shows it. Names are those of Kubernetes' PodStatus where it has them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonPod<'a> {
    name: &'a str,
    namespace: &'a str,
    phase: &'static str,
    reason: &'a str,
    message: &'a str,
    containers: Vec<JsonContainer<'a>>,
    /// `uname -r` of the guest; null if it never ran.
    guest_kernel: Option<&'a str>,
    host_kernel: &'a str,
    timeline: Vec<JsonStep<'a>>,
    /// What the VMM and the agent counted; null if they could not be asked.
    measured: Option<JsonMeasured<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonContainer<'a> {
    name: &'a str,
    kind: &'static str,
    state: &'static str,
    reason: String,
    message: &'a str,
    exit_code: Option<u8>,
    signal: Option<u8>,
    restarts: u32,
    started_at: Option<String>,
    finished_at: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonStep<'a> {
    step: &'a str,
    begin_ns: u64,
    end_ns: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonMeasured<'a> {
    vmm: &'a husk_engine::pod::Counters,
    agent_rss_bytes: u64,
}

fn rfc3339(time: SystemTime) -> Option<String> {
    OffsetDateTime::from(time).format(&Rfc3339).ok()
}

impl<'a> From<&'a ContainerStatus> for JsonContainer<'a> {
    fn from(status: &'a ContainerStatus) -> Self {
        // A report is of a pod that has ended: nothing in it is ready.
        let ContainerStatus {
            name,
            kind: its_kind,
            state,
            last: _,
            restarts,
            started: _,
            ready: _,
        } = status;
        let mut container = JsonContainer {
            name,
            kind: kind(*its_kind),
            state: "waiting",
            reason: String::new(),
            message: "",
            exit_code: None,
            signal: None,
            restarts: *restarts,
            started_at: None,
            finished_at: None,
        };
        match state {
            ContainerState::Waiting { reason, message } => {
                container.reason = (*reason).to_owned();
                container.message = message;
            }
            ContainerState::Running { started_at } => {
                container.state = "running";
                container.started_at = rfc3339(*started_at);
            }
            ContainerState::Terminated(ended) => {
                let Terminated { exit_code, signal, reason, message, started_at, finished_at } =
                    ended;
                let reason: &EndReason = reason;
                container.state = "terminated";
                container.reason = reason.as_str().to_owned();
                container.message = message;
                container.exit_code = Some(*exit_code);
                container.signal = Some(*signal).filter(|signal| *signal != 0);
                container.started_at = started_at.and_then(rfc3339);
                container.finished_at = rfc3339(*finished_at);
            }
        }
        container
    }
}

/// A pod's report as one line of JSON.
pub(super) fn json(
    metadata: &PodMetadata,
    report: &PodReport,
    host_kernel: &str,
) -> serde_json::Result<String> {
    let PodReport { status, guest, timeline, measured } = report;
    serde_json::to_string(&JsonPod {
        name: &metadata.name,
        namespace: &metadata.namespace,
        phase: status.phase.as_str(),
        reason: &status.reason,
        message: &status.message,
        containers: status.containers.iter().map(JsonContainer::from).collect(),
        guest_kernel: guest.as_ref().map(|guest| guest.kernel_release.as_str()),
        host_kernel,
        timeline: timeline
            .iter()
            .map(|Step { name, begin_ns, end_ns }| JsonStep {
                step: name,
                begin_ns: *begin_ns,
                end_ns: *end_ns,
            })
            .collect(),
        measured: measured
            .as_ref()
            .map(|Measured { vmm, agent_rss }| JsonMeasured { vmm, agent_rss_bytes: *agent_rss }),
    })
}

#[cfg(test)]
mod tests;

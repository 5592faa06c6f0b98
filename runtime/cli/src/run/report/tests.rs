//! Exit codes and tables.

use std::time::SystemTime;

use husk_engine::pod::PodStatus;

use super::*;

fn ended(name: &str, kind: ContainerKind, exit_code: u8) -> ContainerStatus {
    ContainerStatus {
        name: name.into(),
        kind,
        state: ContainerState::Terminated(Terminated {
            exit_code,
            signal: exit_code.saturating_sub(128),
            reason: if exit_code == 0 { EndReason::Completed } else { EndReason::Error },
            message: String::new(),
            started_at: None,
            finished_at: SystemTime::UNIX_EPOCH,
        }),
        last: None,
        restarts: 2,
        started: false,
        ready: false,
    }
}

fn report(phase: PodPhase, reason: &str, containers: Vec<ContainerStatus>) -> PodReport {
    let (reason, message) = (reason.to_owned(), "why".to_owned());
    PodReport {
        status: PodStatus {
            phase,
            reason,
            message,
            pod_ips: Vec::new(),
            warnings: Vec::new(),
            containers,
        },
        guest: None,
        timeline: vec![Step { name: "boot".into(), begin_ns: 1_000_000, end_ns: 13_340_000 }],
        measured: None,
    }
}

#[test]
fn exit_codes_are_those_of_the_help() {
    use ContainerKind::{Init, Main, Sidecar};
    let good = || report(PodPhase::Succeeded, "", vec![ended("a", Main, 0)]);
    let bad = || {
        let containers = vec![
            ended("i", Init, 0),
            ended("s", Sidecar, 143),
            ended("a", Main, 5),
            ended("b", Main, 6),
        ];
        report(PodPhase::Failed, "", containers)
    };
    let lost = || report(PodPhase::Failed, "VmLost", vec![ended("a", Main, 137)]);
    assert_eq!(exit_code(&[]), 0);
    assert_eq!(exit_code(&[good(), good()]), 0);
    assert_eq!(exit_code(&[bad()]), 5);
    assert_eq!(exit_code(&[lost()]), 125);
    assert_eq!(exit_code(&[good(), bad()]), 1);
    assert_eq!(exit_code(&[bad(), lost()]), 125);
}

#[test]
fn the_table_has_a_line_for_each_container_and_step() {
    let report = report(PodPhase::Failed, "", vec![ended("web", ContainerKind::Main, 143)]);
    let metadata =
        PodMetadata { name: "p".into(), namespace: "n".into(), ..PodMetadata::default() };
    let text = text(&metadata, &report, "6.1");
    let line = text.lines().find(|line| line.contains("web")).unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words, ["web", "main", "Terminated", "143", "(signal", "15)", "2", "Error"]);
    let line = text.lines().find(|line| line.contains("boot")).unwrap_or_default();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["boot", "12.34", "13.34"]);
}

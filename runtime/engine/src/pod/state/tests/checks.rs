//! Probes, hooks and deadlines in the life of pods.

use super::*;
use crate::types::{Check, Probe};
use Action::{EndAfter, PostStart, PreStop};
use ProbeKind::{Liveness, Readiness, Startup};

fn probe() -> Probe {
    Probe {
        check: Check::Exec(vec!["true".into()]),
        initial_delay_s: 0,
        period_s: 10,
        timeout_s: 1,
        success_threshold: 1,
        failure_threshold: 1,
        termination_grace_s: None,
    }
}

fn id(container: Index, run: u32) -> RunId {
    RunId { container, run }
}

fn ask(container: Index, kind: ProbeKind, seconds: u64) -> Action {
    Action::Probe(id(container, 0), kind, Duration::from_secs(seconds))
}

fn answer(container: Index, kind: ProbeKind, success: bool) -> Event {
    Event::Probed(id(container, 0), kind, Some(success))
}

fn up(kinds: &[ContainerKind], change: impl Fn(&mut Container)) -> Machine {
    let mut pod = machine(RestartPolicy::Always, kinds);
    pod.containers.iter_mut().for_each(change);
    pod.transition(Event::Prepared, at(0));
    pod
}

#[test]
fn a_container_is_ready_when_its_probe_says_so_and_the_pod_when_all_are() {
    let mut pod = up(&[Sidecar, Main, Main], |_| ());
    pod.containers[2].probes.readiness = Some(probe());
    feed(&mut pod, vec![Event::Started(0), Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(2)]), [ask(2, Readiness, 0)]);
    let status = pod.status();
    assert!(status.containers[1].ready && status.containers[2].started);
    assert!(!status.containers[2].ready && !status.conditions().ready);
    assert!(status.conditions().initialized);
    assert_eq!(feed(&mut pod, vec![answer(2, Readiness, true)]), [ask(2, Readiness, 10)]);
    assert!(pod.status().conditions().containers_ready && pod.status().conditions().ready);
    feed(&mut pod, vec![answer(2, Readiness, false)]);
    assert!(!pod.status().conditions().ready);
    assert_eq!(phase(&pod), PodPhase::Running, "it is not ended for that");
}

#[test]
fn init_containers_after_a_sidecar_wait_for_its_startup_probe() {
    let mut pod = up(&[Sidecar, Init, Main], |container| {
        if container.kind == Sidecar {
            container.probes.startup = Some(probe());
            container.probes.liveness = Some(probe());
        }
    });
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), [ask(0, Startup, 0)]);
    assert!(!pod.status().conditions().initialized);
    let next = feed(&mut pod, vec![answer(0, Startup, true)]);
    assert_eq!(next, [ask(0, Liveness, 0), Start(1)]);
    feed(&mut pod, vec![Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![exited(1, 0)]), [Start(2)]);
    assert!(pod.status().conditions().initialized);
}

#[test]
fn a_failed_probe_ends_the_container_in_its_own_time() {
    let mut pod = up(&[Main], |container| {
        let grace = Some(7);
        container.probes.startup = Some(Probe { termination_grace_s: grace, ..probe() });
    });
    feed(&mut pod, vec![Event::Started(0)]);
    let seven = Duration::from_secs(7);
    let ended = feed(&mut pod, vec![answer(0, Startup, false)]);
    assert_eq!(ended, [Terminate(0), EndAfter(id(0, 0), seven)]);
    assert_eq!(feed(&mut pod, vec![answer(0, Startup, false)]), [], "only once");
    assert_eq!(pod.transition(Event::EndDue(id(0, 0)), at(7)), [Kill(0)]);
    // Both of these concern the run before.
    assert_eq!(pod.transition(exited(0, 137), at(8)), [Start(0)]);
    pod.transition(Event::Started(0), at(8));
    assert_eq!(pod.transition(Event::EndDue(id(0, 0)), at(9)), []);
    assert_eq!(pod.transition(answer(0, Startup, false), at(9)), []);
    assert_eq!(pod.status().containers[0].restarts, 1);
}

#[test]
fn the_hook_after_the_start_comes_before_the_probes() {
    let mut pod = up(&[Main], |container| {
        container.has_post_start = true;
        container.probes.liveness = Some(Probe { initial_delay_s: 10, ..probe() });
    });
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), [PostStart(id(0, 0))]);
    assert!(!pod.status().containers[0].started);
    let event = Event::PostStarted(id(0, 0), true);
    // The delay counts from the container's start.
    assert_eq!(pod.transition(event, at(4)), [ask(0, Liveness, 6)]);
    assert!(pod.status().containers[0].ready);
}

#[test]
fn a_failed_hook_ends_the_container_by_its_other_hook() {
    let mut pod = up(&[Main], |container| {
        container.has_post_start = true;
        container.has_pre_stop = true;
    });
    feed(&mut pod, vec![Event::Started(0)]);
    let run = id(0, 0);
    let actions = feed(&mut pod, vec![Event::PostStarted(run, false)]);
    assert_eq!(actions, [PreStop(run, GRACE), EndAfter(run, GRACE)]);
    assert_eq!(feed(&mut pod, vec![Event::PreStopped(run)]), [Terminate(0)]);
    assert_eq!(feed(&mut pod, vec![Event::PreStopped(run)]), []);
    assert_eq!(feed(&mut pod, vec![exited(0, 143)]), [Start(0)]);
}

#[test]
fn hooks_before_the_end_run_at_once_and_sidecars_still_end_last() {
    let mut pod = up(&[Sidecar, Main, Main], |container| container.has_pre_stop = true);
    pod.containers[2].has_pre_stop = false;
    feed(&mut pod, vec![Event::Started(0), Event::Started(1), Event::Started(2)]);
    let actions = feed(&mut pod, vec![Event::StopRequested(GRACE)]);
    let (sidecar, main) = (id(0, 0), id(1, 0));
    let expected = [ArmGrace(GRACE), PreStop(sidecar, GRACE), PreStop(main, GRACE), Terminate(2)];
    assert_eq!(actions, expected);
    assert_eq!(feed(&mut pod, vec![Event::PreStopped(sidecar)]), []);
    assert_eq!(feed(&mut pod, vec![exited(2, 0)]), []);
    assert_eq!(feed(&mut pod, vec![Event::PreStopped(main)]), [Terminate(1)]);
    assert_eq!(feed(&mut pod, vec![exited(1, 0)]), [Terminate(0)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 0)]), [PowerOff]);
}

#[test]
fn who_was_told_late_has_two_seconds() {
    let mut pod = up(&[Main], |container| container.has_pre_stop = true);
    feed(&mut pod, vec![Event::Started(0), Event::StopRequested(GRACE)]);
    let two = Duration::from_secs(2);
    assert_eq!(pod.transition(Event::GraceElapsed, at(30)), [Terminate(0), ArmGrace(two)]);
    assert_eq!(pod.transition(Event::PreStopped(id(0, 0)), at(31)), []);
    let left = Duration::from_secs(1);
    assert_eq!(pod.transition(Event::GraceElapsed, at(31)), [ArmGrace(left)]);
    assert_eq!(pod.transition(Event::GraceElapsed, at(32)), [Kill(0), ArmGrace(KILL_LIMIT)]);
}

#[test]
fn a_container_that_is_being_ended_stays_ready_as_long_as_it_says_so() {
    let mut pod = up(&[Main], |container| container.probes.readiness = Some(probe()));
    feed(&mut pod, vec![Event::Started(0), answer(0, Readiness, true)]);
    feed(&mut pod, vec![Event::StopRequested(GRACE)]);
    assert!(pod.status().containers[0].ready);
    let next = pod.transition(answer(0, Readiness, false), at(10));
    assert_eq!(next, [ask(0, Readiness, 10)]);
    assert!(!pod.status().containers[0].ready);
}

#[test]
fn a_deadline_fails_the_pod_at_every_stage_before_its_end() {
    let overdue = |pod: &Machine| {
        let status = pod.status();
        (status.phase, status.reason == "DeadlineExceeded")
    };
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    assert_eq!(feed(&mut pod, vec![Event::DeadlineExceeded]), [Release]);
    assert_eq!(overdue(&pod), (PodPhase::Failed, true));

    for kind in [Init, Main] {
        let mut pod = up(&[kind, Main], |_| ());
        feed(&mut pod, vec![Event::Started(0), Event::Started(1)]);
        let actions = feed(&mut pod, vec![Event::DeadlineExceeded]);
        assert_eq!(actions[..2], [ArmGrace(GRACE), Terminate(0)]);
        feed(&mut pod, vec![exited(0, 0), exited(1, 0), Event::VmEnded]);
        assert_eq!(overdue(&pod), (PodPhase::Failed, true), "{kind:?}");
    }

    let mut pod = up(&[Main], |_| ());
    feed(&mut pod, vec![Event::Started(0), Event::StopRequested(GRACE)]);
    assert_eq!(feed(&mut pod, vec![Event::DeadlineExceeded]), []);
    feed(&mut pod, vec![exited(0, 0), Event::VmEnded]);
    assert_eq!(overdue(&pod), (PodPhase::Succeeded, false), "it was stopped before");
}

#[test]
fn last_words_are_those_of_the_run() {
    let mut pod = up(&[Main], |_| ());
    let exit = ProcessExit { exit_code: 1, signal: 0, oom_killed: false, at: at(0).wall };
    feed(&mut pod, vec![Event::Started(0), Event::Exited(0, exit, "why".into())]);
    assert_eq!(pod.status().containers[0].last.as_ref().unwrap().message, "why");
}

//! The life of pods, event by event.

use super::super::backoff::Backoff;
use super::super::status::{ContainerState, EndReason};
use super::*;
use crate::types::{PodMetadata, Probes, VmSize};
use Action::{ArmGrace, Kill, PowerOff, Release, Start, StartAfter, Terminate};
use ContainerKind::{Init, Main, Sidecar};

mod checks;

const GRACE: Duration = Duration::from_secs(30);

fn machine(policy: RestartPolicy, kinds: &[ContainerKind]) -> Machine {
    let container = |(index, kind): (usize, &ContainerKind)| Container {
        name: format!("c{index}"),
        kind: *kind,
        probes: Probes::default(),
        has_post_start: false,
        has_pre_stop: false,
        activity: Activity::Idle,
        last: None,
        restarts: 0,
        backoff: Backoff::default(),
    };
    Machine {
        policy,
        grace: GRACE,
        stage: Stage::Preparing,
        containers: kinds.iter().enumerate().map(container).collect(),
        overdue: false,
        addresses: Vec::new(),
        warnings: Vec::new(),
    }
}

fn at(seconds: u64) -> Moment {
    let uptime = Duration::from_secs(seconds);
    Moment { wall: SystemTime::UNIX_EPOCH + uptime, uptime }
}

fn exited(index: Index, exit_code: u8) -> Event {
    let exit = ProcessExit { exit_code, signal: 0, oom_killed: false, at: at(0).wall };
    Event::Exited(index, exit, String::new())
}

fn failure(reason: &'static str) -> Failure {
    Failure { reason, message: format!("because of {reason}"), containers: Vec::new() }
}

/// Feeds events at second 0 and returns what the last one asks for.
fn feed(machine: &mut Machine, events: Vec<Event>) -> Vec<Action> {
    let mut actions = Vec::new();
    for event in events {
        actions = machine.transition(event, at(0));
    }
    actions
}

fn phase(machine: &Machine) -> PodPhase {
    machine.status().phase
}

#[test]
fn a_new_machine_of_a_specification_is_pending() {
    let spec = PodSpec {
        metadata: PodMetadata::default(),
        hostname: "h".into(),
        restart_policy: RestartPolicy::Never,
        termination_grace_s: 7,
        active_deadline_s: None,
        init_containers: Vec::new(),
        containers: Vec::new(),
        volumes: Vec::new(),
        vm: VmSize { vcpus: 1, memory_mib: 128 },
        fs_group: None,
        supplemental_groups: Vec::new(),
        sysctls: std::collections::BTreeMap::new(),
        service_account: String::new(),
        network: crate::types::Network::Loopback,
        dns: Default::default(),
        host_aliases: Vec::new(),
    };
    let machine = Machine::new(&spec);
    assert_eq!(machine.grace, Duration::from_secs(7));
    assert_eq!(phase(&machine), PodPhase::Pending);
}

#[test]
fn init_containers_run_one_after_the_other_then_all_containers_at_once() {
    let mut pod = machine(RestartPolicy::Never, &[Init, Init, Main, Main]);
    assert_eq!(feed(&mut pod, vec![Event::Prepared]), [Start(0)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), []);
    assert_eq!(feed(&mut pod, vec![exited(0, 0)]), [Start(1)]);
    assert_eq!(phase(&pod), PodPhase::Pending);
    assert_eq!(feed(&mut pod, vec![Event::Started(1), exited(1, 0)]), [Start(2), Start(3)]);
    assert_eq!(phase(&pod), PodPhase::Running);
}

#[test]
fn a_pod_whose_containers_all_succeed_is_powered_off_and_succeeded() {
    let mut pod = machine(RestartPolicy::Never, &[Main, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 0)]), []);
    assert_eq!(feed(&mut pod, vec![exited(1, 0)]), [PowerOff]);
    assert_eq!(phase(&pod), PodPhase::Running);
    assert!(pod.is_powering_off());
    assert_eq!(feed(&mut pod, vec![Event::VmEnded]), [Release]);
    assert_eq!(phase(&pod), PodPhase::Succeeded);
    assert!(pod.is_ended());
}

#[test]
fn one_failed_container_fails_the_pod_when_all_have_ended() {
    let mut pod = machine(RestartPolicy::Never, &[Main, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 3)]), []);
    assert_eq!(phase(&pod), PodPhase::Running);
    feed(&mut pod, vec![exited(1, 0), Event::VmEnded]);
    assert_eq!(phase(&pod), PodPhase::Failed);
    assert!(pod.status().reason.is_empty(), "the container tells why");
}

#[test]
fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let mut pod = machine(RestartPolicy::Never, &[Init, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 1)]), [PowerOff]);
    feed(&mut pod, vec![Event::VmEnded]);
    assert_eq!(phase(&pod), PodPhase::Failed);
    let main = pod.status().containers.remove(1);
    assert!(matches!(main.state, ContainerState::Waiting { reason: "PodInitializing", .. }));
}

#[test]
fn a_failed_init_container_is_retried_otherwise() {
    for policy in [RestartPolicy::Always, RestartPolicy::OnFailure] {
        let mut pod = machine(policy, &[Init, Main]);
        feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
        assert_eq!(feed(&mut pod, vec![exited(0, 1)]), [Start(0)]);
        feed(&mut pod, vec![Event::Started(0)]);
        assert_eq!(feed(&mut pod, vec![exited(0, 0)]), [Start(1)], "{policy:?}");
    }
}

#[test]
fn a_sidecar_need_only_be_started_and_is_stopped_after_the_containers() {
    let mut pod = machine(RestartPolicy::Never, &[Sidecar, Init, Sidecar, Main]);
    assert_eq!(feed(&mut pod, vec![Event::Prepared]), [Start(0)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), [Start(1)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(1), exited(1, 0)]), [Start(2)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(2)]), [Start(3)]);
    feed(&mut pod, vec![Event::Started(3)]);
    assert_eq!(feed(&mut pod, vec![exited(3, 0)]), [ArmGrace(GRACE), Terminate(2)]);
    assert_eq!(feed(&mut pod, vec![exited(2, 143)]), [Terminate(0)], "reverse order");
    assert_eq!(feed(&mut pod, vec![exited(0, 143)]), [PowerOff]);
    feed(&mut pod, vec![Event::VmEnded]);
    assert_eq!(phase(&pod), PodPhase::Succeeded, "sidecars do not count");
}

#[test]
fn a_sidecar_is_always_restarted_until_the_pod_stops() {
    let mut pod = machine(RestartPolicy::Never, &[Sidecar, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 0)]), [Start(0)]);
    feed(&mut pod, vec![Event::Started(0)]);
    assert_eq!(pod.status().containers[0].restarts, 1);
    let ten = Duration::from_secs(10);
    assert_eq!(feed(&mut pod, vec![exited(0, 9)]), [StartAfter(0, ten)]);
    // It is backing off when the main container ends: nothing runs any more.
    assert_eq!(feed(&mut pod, vec![exited(1, 0)]), [PowerOff]);
    assert_eq!(feed(&mut pod, vec![Event::BackoffElapsed(0)]), [], "too late");
}

#[test]
fn restart_policies_decide_who_starts_again() {
    use RestartPolicy::{Always, Never, OnFailure};
    for (policy, code, again) in [
        (Always, 0, true),
        (Always, 1, true),
        (OnFailure, 0, false),
        (OnFailure, 1, true),
        (Never, 0, false),
        (Never, 1, false),
    ] {
        let mut pod = machine(policy, &[Main]);
        feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
        let expected = if again { Start(0) } else { PowerOff };
        assert_eq!(feed(&mut pod, vec![exited(0, code)]), [expected], "{policy:?} {code}");
    }
}

#[test]
fn restarts_back_off_and_are_counted() {
    let mut pod = machine(RestartPolicy::Always, &[Main]);
    feed(&mut pod, vec![Event::Prepared]);
    let mut delays = Vec::new();
    for _ in 0..4 {
        let actions = feed(&mut pod, vec![Event::Started(0), exited(0, 1)]);
        if let [StartAfter(0, delay)] = actions[..] {
            delays.push(delay.as_secs());
            let status = pod.status().containers.remove(0);
            assert!(matches!(
                status.state,
                ContainerState::Waiting { reason: "CrashLoopBackOff", .. }
            ));
            assert_eq!(status.last.map(|last| last.exit_code), Some(1));
            assert_eq!(feed(&mut pod, vec![Event::BackoffElapsed(0)]), [Start(0)]);
        }
    }
    assert_eq!(delays, [10, 20, 40]);
    assert_eq!(pod.status().containers[0].restarts, 4);
}

#[test]
fn a_long_run_resets_the_back_off() {
    let mut pod = machine(RestartPolicy::Always, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), exited(0, 1), Event::Started(0)]);
    assert_eq!(pod.transition(exited(0, 1), at(601)), [Start(0)]);
}

#[test]
fn a_program_that_cannot_be_started_ends_with_its_code_and_reason() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared]);
    let failure = StartFailure { exit_code: 127, message: "exec: \"foo\": not found".into() };
    assert_eq!(feed(&mut pod, vec![Event::StartFailed(0, failure)]), [PowerOff]);
    feed(&mut pod, vec![Event::VmEnded]);
    let status = pod.status();
    assert_eq!(status.phase, PodPhase::Failed);
    let ContainerState::Terminated(ended) = &status.containers[0].state else {
        panic!("{status:?}")
    };
    assert_eq!((ended.exit_code, ended.reason), (127, EndReason::StartError));
    assert_eq!(ended.message, "exec: \"foo\": not found");
    assert_eq!(ended.started_at, None);
}

#[test]
fn memory_kills_are_told_as_such() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
    let exit = ProcessExit { exit_code: 137, signal: 9, oom_killed: true, at: at(0).wall };
    feed(&mut pod, vec![Event::Exited(0, exit, String::new())]);
    let ContainerState::Terminated(ended) = pod.status().containers.remove(0).state else {
        panic!("{pod:?}")
    };
    assert_eq!((ended.reason, ended.signal), (EndReason::OomKilled, 9));
}

#[test]
fn a_stop_asks_then_kills() {
    let mut pod = machine(RestartPolicy::Always, &[Sidecar, Main, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::Started(1), Event::Started(2)]);
    let asked = feed(&mut pod, vec![Event::StopRequested(GRACE)]);
    assert_eq!(asked, [ArmGrace(GRACE), Terminate(1), Terminate(2)]);
    assert_eq!(feed(&mut pod, vec![exited(1, 0)]), [], "not restarted, and 2 still runs");
    let killed = pod.transition(Event::GraceElapsed, at(30));
    // The sidecar did not have its turn yet.
    assert_eq!(killed, [Terminate(0), Kill(2), ArmGrace(Duration::from_secs(2))]);
    assert_eq!(pod.transition(exited(2, 137), at(30)), []);
    let killed = pod.transition(Event::GraceElapsed, at(32));
    assert_eq!(killed, [Kill(0), ArmGrace(KILL_LIMIT)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 137)]), [PowerOff]);
    feed(&mut pod, vec![Event::VmEnded]);
    assert_eq!(phase(&pod), PodPhase::Failed);
}

#[test]
fn a_second_stop_can_only_shorten() {
    let mut pod = machine(RestartPolicy::Always, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::StopRequested(GRACE)]);
    let shorter = Duration::from_secs(1);
    assert_eq!(feed(&mut pod, vec![Event::StopRequested(shorter)]), [ArmGrace(shorter)]);
    let kill = [Kill(0), ArmGrace(KILL_LIMIT)];
    assert_eq!(feed(&mut pod, vec![Event::StopRequested(Duration::ZERO)]), kill);
    assert_eq!(feed(&mut pod, vec![Event::StopRequested(GRACE)]), []);
}

#[test]
fn a_container_that_was_being_started_is_told_when_it_runs() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared]);
    assert_eq!(feed(&mut pod, vec![Event::StopRequested(GRACE)]), [ArmGrace(GRACE)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), [Terminate(0)]);

    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::StopRequested(Duration::ZERO)]);
    assert_eq!(feed(&mut pod, vec![Event::Started(0)]), [Kill(0)]);
}

#[test]
fn a_guest_that_does_not_kill_its_containers_is_given_up() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), Event::StopRequested(GRACE)]);
    feed(&mut pod, vec![Event::GraceElapsed]);
    assert_eq!(feed(&mut pod, vec![Event::GraceElapsed]), [Release]);
    assert_eq!(pod.status().reason, "KillTimeout");
}

#[test]
fn a_stop_during_init_leaves_the_rest_unstarted() {
    let mut pod = machine(RestartPolicy::Always, &[Init, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
    let asked = feed(&mut pod, vec![Event::StopRequested(GRACE)]);
    assert_eq!(asked, [ArmGrace(GRACE), Terminate(0)]);
    assert_eq!(feed(&mut pod, vec![exited(0, 0)]), [PowerOff], "the container is not started");
    feed(&mut pod, vec![Event::VmEnded]);
    assert_eq!(phase(&pod), PodPhase::Failed, "it never ran");
}

#[test]
fn a_lost_vm_fails_the_pod_and_what_ran() {
    let mut pod = machine(RestartPolicy::Always, &[Init, Main, Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), exited(0, 0), Event::Started(1)]);
    assert_eq!(feed(&mut pod, vec![Event::VmLost(failure("VmLost"))]), [Release]);
    let status = pod.status();
    assert_eq!((status.phase, status.reason.as_str()), (PodPhase::Failed, "VmLost"));
    assert_eq!(status.message, "because of VmLost");
    let reasons: Vec<_> = status
        .containers
        .iter()
        .map(|container| match &container.state {
            ContainerState::Terminated(ended) => (ended.exit_code, ended.reason),
            other => panic!("{other:?}"),
        })
        .collect();
    let unknown = (137, EndReason::ContainerStatusUnknown);
    assert_eq!(reasons, [(0, EndReason::Completed), unknown, unknown]);
}

#[test]
fn a_vm_that_ends_by_itself_is_lost() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0)]);
    assert_eq!(feed(&mut pod, vec![Event::VmEnded]), [Release]);
    assert_eq!(pod.status().reason, "VmLost");
}

#[test]
fn a_vm_that_breaks_during_power_off_does_not_change_the_outcome() {
    let mut pod = machine(RestartPolicy::Never, &[Main]);
    feed(&mut pod, vec![Event::Prepared, Event::Started(0), exited(0, 0)]);
    assert_eq!(feed(&mut pod, vec![Event::VmLost(failure("VmLost"))]), [Release]);
    assert_eq!(phase(&pod), PodPhase::Succeeded);
}

#[test]
fn a_pod_that_cannot_be_prepared_names_whom_it_concerns() {
    let mut pod = machine(RestartPolicy::Always, &[Main, Main]);
    let mut failure = failure("ErrImagePull");
    failure.containers = vec![1, 99];
    assert_eq!(feed(&mut pod, vec![Event::PrepareFailed(failure)]), [Release]);
    let status = pod.status();
    assert_eq!((status.phase, status.reason.as_str()), (PodPhase::Failed, "ErrImagePull"));
    let reason = |index: usize| match &status.containers[index].state {
        ContainerState::Waiting { reason, .. } => *reason,
        other => panic!("{other:?}"),
    };
    assert_eq!((reason(0), reason(1)), ("PodInitializing", "ErrImagePull"));
}

mod totality {
    use proptest::prelude::*;

    use super::*;

    fn runs() -> impl Strategy<Value = RunId> {
        (0..5_usize, 0..2_u32).prop_map(|(container, run)| RunId { container, run })
    }

    fn kinds() -> impl Strategy<Value = ProbeKind> {
        prop_oneof![Just(ProbeKind::Startup), Just(ProbeKind::Liveness), Just(ProbeKind::Readiness)]
    }

    /// A pod whose containers have all hooks and probes that they can have.
    fn watched(policy: RestartPolicy, kinds: &[ContainerKind]) -> Machine {
        let mut pod = machine(policy, kinds);
        for container in pod.containers.iter_mut().filter(|container| container.kind != Init) {
            let probe = crate::types::Probe {
                check: crate::types::Check::Exec(Vec::new()),
                initial_delay_s: 0,
                period_s: 1,
                timeout_s: 1,
                success_threshold: 1,
                failure_threshold: 1,
                termination_grace_s: None,
            };
            container.has_post_start = true;
            container.has_pre_stop = true;
            container.probes.startup = Some(probe.clone());
            container.probes.liveness = Some(probe.clone());
            container.probes.readiness = Some(probe);
        }
        pod
    }

    fn events() -> impl Strategy<Value = Event> {
        let index = 0..5_usize;
        prop_oneof![
            Just(Event::Prepared),
            Just(Event::PrepareFailed(failure("X"))),
            index.clone().prop_map(Event::Started),
            index.clone().prop_map(|index| {
                Event::StartFailed(index, StartFailure { exit_code: 127, message: String::new() })
            }),
            (index.clone(), 0..3_u8).prop_map(|(index, code)| exited(index, code)),
            index.prop_map(Event::BackoffElapsed),
            (runs(), any::<bool>()).prop_map(|(id, success)| Event::PostStarted(id, success)),
            (runs(), kinds(), any::<Option<bool>>())
                .prop_map(|(id, kind, success)| Event::Probed(id, kind, success)),
            runs().prop_map(Event::PreStopped),
            runs().prop_map(Event::EndDue),
            Just(Event::DeadlineExceeded),
            (0..40_u64).prop_map(|s| Event::StopRequested(Duration::from_secs(s))),
            Just(Event::GraceElapsed),
            Just(Event::VmLost(failure("Y"))),
            Just(Event::VmEnded),
        ]
    }

    fn policies() -> impl Strategy<Value = RestartPolicy> {
        prop_oneof![
            Just(RestartPolicy::Always),
            Just(RestartPolicy::OnFailure),
            Just(RestartPolicy::Never)
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: no panic, one release, and nothing after it.
        #[test]
        fn any_events_in_any_order_are_taken(
            policy in policies(),
            events in proptest::collection::vec(events(), 0..80),
        ) {
            let mut pod = watched(policy, &[Sidecar, Init, Main, Main]);
            let mut released = 0;
            for (second, event) in events.into_iter().enumerate() {
                let ended = pod.is_ended();
                let actions = pod.transition(event, at(second as u64));
                prop_assert!(!ended || actions.is_empty());
                released += actions.iter().filter(|action| **action == Release).count();
                prop_assert_eq!(pod.is_ended(), pod.status().phase.is_final());
            }
            prop_assert_eq!(released, usize::from(pod.is_ended()));
        }

        /// A container is never started while it runs, and never after the pod began to stop.
        #[test]
        fn starts_are_balanced(
            policy in policies(),
            events in proptest::collection::vec(events(), 0..80),
        ) {
            let mut pod = watched(policy, &[Sidecar, Init, Main, Main]);
            for event in events {
                let before = pod.clone();
                let stopping =
                    matches!(event, Event::StopRequested(_) | Event::DeadlineExceeded);
                let ending = match &event {
                    Event::Exited(index, ..) | Event::StartFailed(index, _) => Some(*index),
                    _ => None,
                };
                for action in pod.transition(event, at(0)) {
                    if let Start(index) = action {
                        prop_assert!(!stopping);
                        prop_assert!(ending == Some(index) || !before.containers[index].is_alive());
                    }
                }
            }
        }

        /// If everyone does as told, every pod that is stopped ends.
        #[test]
        fn a_stopped_pod_ends(
            policy in policies(),
            events in proptest::collection::vec(events(), 0..40),
        ) {
            let mut pod = watched(policy, &[Sidecar, Init, Sidecar, Main]);
            feed(&mut pod, events);
            let mut todo = pod.transition(Event::StopRequested(GRACE), at(0));
            // What was under way before the stop.
            for index in 0..4 {
                todo.extend(pod.transition(Event::Started(index), at(0)));
                if pod.containers[index].is_alive() {
                    todo.push(Kill(index));
                }
            }
            if pod.is_powering_off() {
                todo.push(PowerOff);
            }
            let mut steps = 0;
            while let Some(action) = todo.pop() {
                steps += 1;
                prop_assert!(steps < 100, "{:?}", pod);
                todo.extend(match action {
                    Terminate(index) | Kill(index) => pod.transition(exited(index, 0), at(1)),
                    PowerOff => pod.transition(Event::VmEnded, at(1)),
                    Start(index) => pod.transition(Event::Started(index), at(1)),
                    Action::PreStop(id, _) => pod.transition(Event::PreStopped(id), at(1)),
                    Action::PostStart(id) => pod.transition(Event::PostStarted(id, true), at(1)),
                    Action::Probe(..) | Action::EndAfter(..) => Vec::new(),
                    StartAfter(..) | ArmGrace(_) | Release => Vec::new(),
                });
            }
            prop_assert!(pod.is_ended(), "{:?}", pod);
        }
    }
}

#[test]
fn a_lost_file_server_is_told_and_ends_nothing() {
    let mut machine = machine(RestartPolicy::Always, &[Main]);
    feed(&mut machine, vec![Event::Prepared, Event::Started(0)]);
    let actions = feed(&mut machine, vec![Event::FileServerLost("killed".into())]);
    assert_eq!(actions, []);
    let status = machine.status();
    assert_eq!(status.phase, PodPhase::Running);
    let expected = Warning { reason: "FileServerLost", message: "killed".into() };
    assert_eq!(status.warnings, [expected]);
}

//! The actor against a guest that a test scripts, with a clock that a test turns.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use husk_vmm_api::Exit;
use tokio::sync::Notify;

use super::*;
use crate::pod::status::{ContainerState, EndReason, PodPhase};
use crate::types::{
    Check, ContainerKind, ContainerSpec, Hook, Network, PodMetadata, PodSpec, Probe, PullPolicy,
    Resources, RestartPolicy, Rootfs, SecurityContext, VmSize,
};

/// What a container of the fake does.
#[derive(Debug, Clone, Copy)]
enum Script {
    /// Runs so long and ends with this code.
    Ends(u64, u8),
    /// Runs until it is asked to end, then ends with 143.
    Obeys,
    /// Runs until it is killed.
    Ignores,
    /// Cannot be started.
    NotFound,
    /// The agent refuses it.
    Refused,
    /// The connection breaks while it is started.
    Breaks,
}

#[derive(Debug, Default)]
struct Inner {
    scripts: Vec<Script>,
    log: Mutex<Vec<String>>,
    asked: Mutex<HashMap<Index, Arc<Notify>>>,
    killed: Mutex<HashMap<Index, Arc<Notify>>>,
    /// What probes and hooks come to, the next first; then they succeed.
    answers: Mutex<VecDeque<Answer>>,
    /// How long a hook takes.
    hook_s: u64,
    vm_end: Notify,
    file_server_lost: watch::Sender<Option<String>>,
    exit: Mutex<Option<Arc<VmExit>>>,
}

#[derive(Debug, Clone)]
struct Fake(Arc<Inner>);

fn unlocked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fake {
    fn note(&self, text: String) {
        unlocked(&self.0.log).push(text);
    }

    fn bell(bells: &Mutex<HashMap<Index, Arc<Notify>>>, index: Index) -> Arc<Notify> {
        unlocked(bells).entry(index).or_default().clone()
    }

    fn end_vm(&self, exit: Exit) {
        *unlocked(&self.0.exit) = Some(Arc::new(VmExit::Reported(exit)));
        self.0.vm_end.notify_one();
    }
}

impl Runtime for Fake {
    type Run = Index;

    async fn start(&self, index: Index) -> Result<Result<Index, StartFailure>, GuestError> {
        self.note(format!("start {index}"));
        match self.0.scripts[index] {
            Script::NotFound => {
                Ok(Err(StartFailure { exit_code: 127, message: "not found".into() }))
            }
            Script::Refused => Err(GuestError::Refused {
                rpc: "CreateContainer",
                code: tonic::Code::InvalidArgument,
                message: "no such thing".into(),
            }),
            Script::Breaks => Err(GuestError::Nonsense { rpc: "CreateContainer", what: "x" }),
            _ => Ok(Ok(index)),
        }
    }

    async fn probe(&self, index: Index, kind: ProbeKind) -> Result<Answer, GuestError> {
        self.note(format!("{kind:?} {index}"));
        let mut answers = unlocked(&self.0.answers);
        Ok(answers.pop_front().unwrap_or(Answer::Success))
    }

    async fn hook(&self, index: Index, turn: Turn) -> Result<Answer, GuestError> {
        self.note(format!("{turn:?} {index}"));
        tokio::time::sleep(Duration::from_secs(self.0.hook_s)).await;
        let mut answers = unlocked(&self.0.answers);
        Ok(answers.pop_front().unwrap_or(Answer::Success))
    }

    async fn wait(&self, index: Index) -> Result<(ProcessExit, String), GuestError> {
        let (asked, killed) = (Self::bell(&self.0.asked, index), Self::bell(&self.0.killed, index));
        let exit_code = match self.0.scripts[index] {
            Script::Ends(seconds, code) => tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => code,
                () = asked.notified() => 143,
                () = killed.notified() => 137,
            },
            Script::Obeys => tokio::select! {
                () = asked.notified() => 143,
                () = killed.notified() => 137,
            },
            _ => {
                killed.notified().await;
                137
            }
        };
        let signal = exit_code.saturating_sub(128);
        let exit = ProcessExit { exit_code, signal, oom_killed: false, at: SystemTime::now() };
        Ok((exit, format!("{exit_code}!")))
    }

    async fn signal(&self, index: Index, by: StopBy) -> Result<(), GuestError> {
        self.note(format!("{by:?} {index}"));
        let bells = if by == StopBy::Asking { &self.0.asked } else { &self.0.killed };
        Self::bell(bells, index).notify_one();
        Ok(())
    }

    async fn power_off(&self) {
        self.note("power off".into());
        self.end_vm(Exit::PowerOff);
    }

    async fn file_server_lost(&self) -> String {
        let mut lost = self.0.file_server_lost.subscribe();
        let words = lost.wait_for(Option::is_some).await.unwrap();
        words.clone().unwrap()
    }

    async fn vm_ended(&self) -> Arc<VmExit> {
        self.0.vm_end.notified().await;
        unlocked(&self.0.exit).clone().unwrap()
    }
}

fn container(name: usize, kind: ContainerKind) -> ContainerSpec {
    ContainerSpec {
        name: format!("c{name}"),
        kind,
        rootfs: Rootfs::Image { reference: "x".into(), pull_policy: PullPolicy::Never },
        command: Vec::new(),
        args: Vec::new(),
        env: Vec::new(),
        working_dir: None,
        ports: Vec::new(),
        resources: Resources::default(),
        volume_mounts: Vec::new(),
        volume_devices: Vec::new(),
        security: SecurityContext::default(),
        tty: false,
        stdin: false,
        stdin_once: false,
        probes: Default::default(),
        lifecycle: Default::default(),
        termination_message: Default::default(),
    }
}

fn spec(policy: RestartPolicy, sidecars: usize, mains: usize) -> PodSpec {
    let sidecar = |name| container(name, ContainerKind::Sidecar);
    let main = |name| container(name, ContainerKind::Main);
    PodSpec {
        metadata: PodMetadata::default(),
        hostname: "h".into(),
        restart_policy: policy,
        termination_grace_s: 30,
        active_deadline_s: None,
        init_containers: (0..sidecars).map(sidecar).collect(),
        containers: (sidecars..sidecars + mains).map(main).collect(),
        volumes: Vec::new(),
        vm: VmSize { vcpus: 1, memory_mib: 128 },
        fs_group: None,
        supplemental_groups: Vec::new(),
        sysctls: std::collections::BTreeMap::new(),
        service_account: String::new(),
        network: Network::Loopback,
        dns: Default::default(),
        host_aliases: Vec::new(),
    }
}

struct Running {
    fake: Fake,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<PodStatus>,
    task: tokio::task::JoinHandle<()>,
    started: Instant,
}

fn run(policy: RestartPolicy, sidecars: usize, scripts: &[Script]) -> Running {
    let spec = spec(policy, sidecars, scripts.len() - sidecars);
    run_spec(&spec, Inner { scripts: scripts.to_vec(), ..Inner::default() })
}

fn run_spec(spec: &PodSpec, inner: Inner) -> Running {
    let fake = Fake(Arc::new(inner));
    let machine = Machine::new(spec);
    let (sender, status) = watch::channel(machine.status());
    let (commands, mut requests) = mpsc::channel(4);
    let actor = Actor {
        machine,
        runtime: fake.clone(),
        clock: Clock::start(),
        grace: Duration::from_secs(spec.termination_grace_s),
        status: sender,
    };
    let deadline = spec.active_deadline_s;
    let overdue = async move {
        match deadline {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    let task = tokio::spawn(async move { actor.run(&mut requests, overdue).await });
    Running { fake, commands, status, task, started: Instant::now() }
}

impl Running {
    /// The log, the final status, and how long it took in seconds.
    async fn finish(self) -> (Vec<String>, PodStatus, u64) {
        self.task.await.unwrap();
        let took = self.started.elapsed().as_secs();
        let log = unlocked(&self.fake.0.log).clone();
        (log, self.status.borrow().clone(), took)
    }

    async fn stop(&self, grace: Option<Duration>) {
        self.commands.send(Command::Stop(grace)).await.unwrap();
    }
}

fn exit_codes(status: &PodStatus) -> Vec<Option<u8>> {
    let code = |state: &ContainerState| match state {
        ContainerState::Terminated(ended) => Some(ended.exit_code),
        _ => None,
    };
    status.containers.iter().map(|container| code(&container.state)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_pod_runs_its_containers_and_powers_off() {
    let pod = run(RestartPolicy::Never, 0, &[Script::Ends(5, 0), Script::Ends(3, 0)]);
    let (log, status, took) = pod.finish().await;
    assert_eq!(log, ["start 0", "start 1", "power off"]);
    assert_eq!((status.phase, took), (PodPhase::Succeeded, 5));
}

#[tokio::test(start_paused = true)]
async fn a_crashing_container_is_restarted_after_the_kubelets_delays() {
    let pod = run(RestartPolicy::Always, 0, &[Script::Ends(1, 1)]);
    let mut status = pod.status.clone();
    status.wait_for(|status| status.containers[0].restarts == 4).await.unwrap();
    // Five runs of 1 s are begun: delays of 0, 10, 20 and 40 s lie between them.
    assert_eq!(pod.started.elapsed().as_secs(), 4 + 70);
    pod.stop(Some(Duration::ZERO)).await;
    let (_, status, _) = pod.finish().await;
    assert_eq!(status.phase, PodPhase::Failed);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_asks_containers_then_sidecars() {
    let pod = run(RestartPolicy::Always, 1, &[Script::Obeys, Script::Obeys, Script::Obeys]);
    pod.status.clone().wait_for(|status| status.phase == PodPhase::Running).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    pod.stop(None).await;
    let (log, status, took) = pod.finish().await;
    assert_eq!(log[..3], ["start 0", "start 1", "start 2"]);
    assert_eq!(log[3..], ["Asking 1", "Asking 2", "Asking 0", "power off"]);
    assert_eq!(exit_codes(&status), [Some(143); 3]);
    assert_eq!(took, 1, "nobody waits for the grace period");
}

#[tokio::test(start_paused = true)]
async fn whoever_ignores_the_request_is_killed_after_the_grace_period() {
    let pod = run(RestartPolicy::Always, 0, &[Script::Ignores, Script::Obeys]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    pod.stop(None).await;
    let (log, status, took) = pod.finish().await;
    assert_eq!(log[2..], ["Asking 0", "Asking 1", "Killing 0", "power off"]);
    assert_eq!(exit_codes(&status), [Some(137), Some(143)]);
    assert_eq!(took, 31);
}

#[tokio::test(start_paused = true)]
async fn a_second_stop_kills_at_once() {
    let pod = run(RestartPolicy::Always, 0, &[Script::Ignores]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    pod.stop(None).await;
    pod.stop(Some(Duration::ZERO)).await;
    let (_, status, took) = pod.finish().await;
    assert_eq!((exit_codes(&status), took), (vec![Some(137)], 1));
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_an_owner_is_killed() {
    let Running { fake, commands, status, task, .. } =
        run(RestartPolicy::Always, 0, &[Script::Ignores]);
    drop(commands);
    task.await.unwrap();
    assert!(unlocked(&fake.0.log).contains(&"power off".to_owned()));
    assert!(status.borrow().phase.is_final());
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_dies_fails_the_pod_with_its_words() {
    let pod = run(RestartPolicy::Always, 0, &[Script::Obeys]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    pod.fake.end_vm(Exit::Panic { log_tail: "Oops: 0002".into() });
    let (log, status, _) = pod.finish().await;
    assert_eq!((status.phase, status.reason.as_str()), (PodPhase::Failed, "VmLost"));
    assert!(status.message.contains("panicked") && status.message.contains("Oops: 0002"));
    assert_eq!(exit_codes(&status), [Some(137)]);
    assert_eq!(log, ["start 0"], "there is nothing left to power off");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_talks_nonsense_fails_the_pod() {
    let pod = run(RestartPolicy::Always, 0, &[Script::Breaks]);
    let (_, status, _) = pod.finish().await;
    assert_eq!((status.phase, status.reason.as_str()), (PodPhase::Failed, "VmLost"));
    assert!(status.message.contains("makes no sense"), "{}", status.message);
}

#[tokio::test(start_paused = true)]
async fn programs_that_cannot_be_started_and_containers_that_are_refused_differ_in_code() {
    let pod = run(RestartPolicy::Never, 0, &[Script::NotFound, Script::Refused]);
    let (_, status, _) = pod.finish().await;
    assert_eq!(status.phase, PodPhase::Failed);
    assert_eq!(exit_codes(&status), [Some(127), Some(128)]);
    let ContainerState::Terminated(refused) = &status.containers[1].state else { panic!() };
    assert_eq!(
        (refused.reason, refused.message.as_str()),
        (EndReason::StartError, "no such thing")
    );
}

#[test]
fn chains_of_causes_do_not_repeat_themselves() {
    #[derive(Debug, thiserror::Error)]
    #[error("outer: {0}")]
    struct Outer(#[source] std::io::Error);
    let error = Outer(std::io::Error::other("inner"));
    assert_eq!(chain(&error), "outer: inner");
    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Plain(#[source] std::io::Error);
    assert_eq!(chain(&Plain(std::io::Error::other("inner"))), "outer: inner");
}

fn probe(period_s: u32, failure_threshold: u32) -> Probe {
    Probe {
        check: Check::Exec(vec!["true".into()]),
        initial_delay_s: 0,
        period_s,
        timeout_s: 1,
        success_threshold: 1,
        failure_threshold,
        termination_grace_s: None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_that_fails_its_liveness_probe_is_ended_and_started_again() {
    let mut spec = spec(RestartPolicy::Always, 0, 1);
    spec.containers[0].probes.liveness = Some(probe(5, 2));
    let failure = || Answer::Failure("no".into());
    let answers = [Answer::Success, failure(), Answer::Unknown("x".into()), failure()];
    let pod = run_spec(
        &spec,
        Inner {
            scripts: vec![Script::Obeys],
            answers: Mutex::new(answers.into()),
            ..Inner::default()
        },
    );
    let mut status = pod.status.clone();
    status.wait_for(|status| status.containers[0].restarts == 1).await.unwrap();
    // At 0, 5, 10 and 15 s: that of 10 s could not be put, and does not break the row.
    assert_eq!(pod.started.elapsed().as_secs(), 15);
    let last = status.borrow().containers[0].last.clone().unwrap();
    assert_eq!((last.exit_code, last.message.as_str()), (143, "143!"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    pod.stop(None).await;
    let (log, _, _) = pod.finish().await;
    let live = "Liveness 0";
    assert_eq!(
        log,
        ["start 0", live, live, live, live, "Asking 0", "start 0", live, "Asking 0", "power off"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_before_the_end_takes_from_the_grace_period_but_two_seconds_are_left() {
    for (hook_s, script, expected) in [
        // The hook, then the end that is asked for.
        (10, Script::Obeys, 10),
        // Killed when the grace period is over.
        (10, Script::Ignores, 30),
        // The hook takes all of it.
        (100, Script::Obeys, 30),
        (100, Script::Ignores, 32),
    ] {
        let mut spec = spec(RestartPolicy::Always, 0, 1);
        spec.containers[0].lifecycle.pre_stop = Some(Hook::Sleep(1));
        let pod = run_spec(&spec, Inner { scripts: vec![script], hook_s, ..Inner::default() });
        pod.status.clone().wait_for(|s| s.containers[0].started).await.unwrap();
        pod.stop(None).await;
        let (log, _, took) = pod.finish().await;
        assert_eq!(took, expected, "{hook_s} {script:?}");
        assert_eq!(log[..3], ["start 0", "PreStop 0", "Asking 0"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_whose_first_hook_fails_is_ended() {
    let mut spec = spec(RestartPolicy::Never, 0, 1);
    spec.containers[0].lifecycle.post_start = Some(Hook::Sleep(1));
    spec.containers[0].probes.readiness = Some(probe(1, 1));
    let answers = Mutex::new([Answer::Failure("no".into())].into());
    let pod = run_spec(
        &spec,
        Inner { scripts: vec![Script::Obeys], answers, hook_s: 3, ..Inner::default() },
    );
    let (log, status, took) = pod.finish().await;
    assert_eq!(log, ["start 0", "PostStart 0", "Asking 0", "power off"], "no probe before it");
    assert_eq!((status.phase, took), (PodPhase::Failed, 3));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_takes_too_long_is_ended_and_has_failed() {
    let mut spec = spec(RestartPolicy::Always, 0, 2);
    spec.active_deadline_s = Some(100);
    let scripts = vec![Script::Obeys, Script::Ends(5, 0)];
    let (_, status, took) = run_spec(&spec, Inner { scripts, ..Inner::default() }).finish().await;
    assert_eq!((status.phase, status.reason.as_str()), (PodPhase::Failed, "DeadlineExceeded"));
    assert_eq!(took, 100);
}

#[tokio::test(start_paused = true)]
async fn a_lost_file_server_is_told_at_once_and_the_pod_lives_on() {
    let mut pod = run(RestartPolicy::Never, 0, &[Script::Obeys]);
    pod.fake.0.file_server_lost.send_replace(Some("killed".into()));
    let status = pod.status.wait_for(|status| !status.warnings.is_empty()).await.unwrap().clone();
    assert_eq!(status.warnings[0].message, "killed");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(pod.status.borrow().warnings.len(), 1);
    pod.stop(None).await;
    let (_, status, _) = pod.finish().await;
    assert_eq!(exit_codes(&status), [Some(143)]);
    assert_eq!(status.warnings.len(), 1);
}

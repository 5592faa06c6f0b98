//! The actor against a guest that a test scripts, with a clock that a test turns.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use husk_vmm_api::Exit;
use tokio::sync::Notify;

use super::*;
use crate::pod::status::{ContainerState, EndReason, PodPhase};
use crate::types::{
    ContainerKind, ContainerSpec, Network, PodMetadata, PodSpec, PullPolicy, Resources,
    RestartPolicy, Rootfs, SecurityContext, VmSize,
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
    vm_end: Notify,
    exit: Mutex<Option<Arc<VmExit>>>,
}

#[derive(Debug, Clone)]
struct Fake(Arc<Inner>);

fn unlocked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fake {
    fn new(scripts: &[Script]) -> Self {
        Fake(Arc::new(Inner { scripts: scripts.to_vec(), ..Inner::default() }))
    }

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

    async fn wait(&self, index: Index) -> Result<ProcessExit, GuestError> {
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
        Ok(ProcessExit { exit_code, signal, oom_killed: false, at: SystemTime::now() })
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
    let fake = Fake::new(scripts);
    let machine = Machine::new(&spec);
    let (sender, status) = watch::channel(machine.status());
    let (commands, mut requests) = mpsc::channel(4);
    let actor = Actor {
        machine,
        runtime: fake.clone(),
        clock: Clock::start(),
        grace: Duration::from_secs(spec.termination_grace_s),
        status: sender,
    };
    let task = tokio::spawn(async move { actor.run(&mut requests).await });
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

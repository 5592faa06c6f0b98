//! Pods: their start, their life, their end. One task (actor) per pod.
//!
//! [`Pod::start`] gives a [`PodHandle`] at once; what becomes of the pod is told by its status,
//! which never waits for the guest. See [`state`] for a pod's life, [`prepare`] for its start.

mod access;
mod actor;
mod backoff;
mod changes;
mod check;
mod debug;
mod disks;
mod images;
mod input;
mod last_words;
mod logs;
mod prepare;
mod rundir;
mod runtime;
#[cfg(test)]
pub(crate) mod stand_in;
mod state;
mod status;
mod timeline;
mod undo;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use husk_vmm_api::Counters;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

pub use self::access::{
    AccessError, Copy, CopyRequest, ExecProcess, ExecRequest, ExecStreams, PodAccess,
};
pub(crate) use self::actor::chain;
use self::actor::{Actor, Clock, Command};
pub use self::disks::{DiskAttachment, DiskError};
pub use self::images::{ImageError, Images, ResolvedImage, Resolving};
pub use self::input::Input;
pub use self::logs::{LogChunk, Stream};
use self::prepare::Prepared;
pub use self::prepare::{PrepareError, new_uid};
pub use self::rundir::{RunDirError, sweep_dead};
use self::runtime::GuestRuntime;
use self::state::{Event, Machine};
pub use self::status::{
    ContainerState, ContainerStatus, EndReason, PodConditions, PodPhase, PodStatus, Terminated,
    Warning,
};
use self::timeline::Timeline;
pub use self::timeline::{Step, monotonic_ns};
use self::undo::Undo;
use crate::guest::GuestInfo;
use crate::paths::Config;
use crate::types::PodSpec;

/// How long the guest may take to become ready, unless another time is given. Generous on purpose:
/// a host that is busy, or itself emulated, is no reason to fail.
pub const DEFAULT_START_TIMEOUT: Duration = Duration::from_secs(600);

/// What the start of a pod needs besides its specification.
#[derive(Clone)]
pub struct PodOptions {
    /// Where things lie on the host.
    pub config: Config,
    /// How long the guest may take to become ready.
    pub start_timeout: Duration,
    /// Whether to ask the VMM and the agent, before they end, for what they counted: it takes a
    /// few messages.
    pub measure: bool,
    /// The image in which [`PodAccess::debug`] runs processes that see the whole guest; `None`: it
    /// runs none.
    pub debug_image: Option<String>,
    /// Where the guest kernel's log is written, in a new file; `None` for the pod's directory, with
    /// which it vanishes.
    pub console_log: Option<PathBuf>,
}

/// What is known of a pod that has ended.
#[derive(Debug, Clone)]
pub struct PodReport {
    /// Its final status.
    pub status: PodStatus,
    /// What the guest told of itself, if it came so far.
    pub guest: Option<GuestInfo>,
    /// When what happened at its start.
    pub timeline: Vec<Step>,
    /// What was counted, if that was asked for and it came so far.
    pub measured: Option<Measured>,
}

/// What was counted in a pod.
#[derive(Debug, Clone)]
pub struct Measured {
    /// By the VMM.
    pub vmm: Counters,
    /// Resident memory of the agent, in bytes.
    pub agent_rss: u64,
}

/// What is learned of a pod on its way, for its report.
#[derive(Debug, Default)]
struct Findings {
    guest: Option<GuestInfo>,
    measured: Option<Measured>,
    phases: Vec<(husk_vmm_api::Phase, u64)>,
}

/// Shared between who learns and who reports. Locked for moments, never across an await.
#[derive(Debug, Clone, Default)]
struct SharedFindings(Arc<Mutex<Findings>>);

impl SharedFindings {
    fn update(&self, change: impl FnOnce(&mut Findings)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Pods are started here.
#[derive(Debug)]
pub struct Pod;

impl Pod {
    /// Starts a pod. Must be called in a tokio runtime with I/O and time.
    ///
    /// Nothing has happened yet when this returns; what goes wrong is told by the status, in which
    /// the pod is then [`PodPhase::Failed`] with a reason.
    pub fn start(spec: PodSpec, images: Arc<dyn Images>, options: PodOptions) -> PodHandle {
        let machine = Machine::new(&spec);
        let (status, watcher) = watch::channel(machine.status());
        // A stop or two are all that is ever asked.
        let (commands, requests) = mpsc::channel(4);
        let (logs, log_reader) = mpsc::channel(logs::QUEUE);
        let (ready, running) = watch::channel(None);
        let spec = Arc::new(spec);
        let task =
            Task { spec: spec.clone(), images, options, machine, status, requests, logs, ready };
        let name = spec.metadata.name.clone();
        let span = tracing::info_span!("pod", pod = %name);
        let task = tokio::spawn(tracing::Instrument::instrument(task.run(), span));
        PodHandle { spec, status: watcher, running, commands, logs: Some(log_reader), task }
    }
}

/// A pod that was started. Dropping the handle kills the pod.
#[derive(Debug)]
pub struct PodHandle {
    spec: Arc<PodSpec>,
    status: watch::Receiver<PodStatus>,
    running: watch::Receiver<Option<GuestRuntime>>,
    commands: mpsc::Sender<Command>,
    logs: Option<mpsc::Receiver<LogChunk>>,
    task: JoinHandle<PodReport>,
}

/// A means of ending a pod, apart from its handle.
#[derive(Debug, Clone)]
pub struct Stopper(mpsc::WeakSender<Command>);

impl Stopper {
    /// Ends the pod: its containers are asked to end, and killed after `grace` (the specification's
    /// grace period if `None`). A later call can shorten that; zero kills at once. Does not wait.
    pub fn stop(&self, grace: Option<Duration>) {
        // A pod that is gone has ended; one with a full queue is told already.
        let told = self.0.upgrade().map(|commands| commands.try_send(Command::Stop(grace)));
        tracing::debug!(?told, "stop");
    }
}

impl PodHandle {
    /// What is run.
    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The same, to be kept longer than the handle.
    #[must_use]
    pub fn shared_spec(&self) -> Arc<PodSpec> {
        self.spec.clone()
    }

    /// What is known of the pod now.
    #[must_use]
    pub fn status(&self) -> PodStatus {
        self.status.borrow().clone()
    }

    /// Tells of every change of the status.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<PodStatus> {
        self.status.clone()
    }

    /// What the containers write, to be taken once. Who takes it must read it: containers wait for
    /// their reader. If it is never taken, or dropped, what they write is thrown away.
    #[must_use]
    pub fn take_logs(&mut self) -> Option<mpsc::Receiver<LogChunk>> {
        self.logs.take()
    }

    /// A means of ending the pod.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.commands.downgrade())
    }

    /// A means of asking things of its guest.
    #[must_use]
    pub fn access(&self) -> PodAccess {
        PodAccess::new(self.spec.clone(), self.running.clone())
    }

    /// Waits until the pod has ended and everything that it held is given back.
    pub async fn wait(mut self) -> PodReport {
        match (&mut self.task).await {
            Ok(report) => report,
            // Cancelled with its runtime.
            Err(error) => {
                tracing::error!(%error, "the pod's task did not end by itself");
                let status = self.status();
                PodReport { status, guest: None, timeline: Vec::new(), measured: None }
            }
        }
    }
}

/// The pod's task.
struct Task {
    spec: Arc<PodSpec>,
    images: Arc<dyn Images>,
    options: PodOptions,
    machine: Machine,
    status: watch::Sender<PodStatus>,
    requests: mpsc::Receiver<Command>,
    logs: mpsc::Sender<LogChunk>,
    /// The guest, while containers can run in it.
    ready: watch::Sender<Option<GuestRuntime>>,
}

impl Task {
    async fn run(self) -> PodReport {
        let Task { spec, images, options, mut machine, status, mut requests, logs, ready } = self;
        let timeline = Timeline::new();
        let findings = SharedFindings::default();
        let clock = Clock::start();
        let mut undo = Undo::default();
        let prepared = {
            let prepare = prepare::prepare(prepare::Inputs {
                spec: &spec,
                images: images.as_ref(),
                options: &options,
                undo: &mut undo,
                timeline: &timeline,
                findings: &findings,
                logs,
            });
            tokio::select! {
                prepared = prepare => prepared.map_err(|error| Event::PrepareFailed(error.failure(&spec))),
                () = deadline(&spec, clock) => Err(Event::DeadlineExceeded),
                // Whoever asks, and however much time it gives: nothing runs yet.
                _ = requests.recv() => Err(Event::StopRequested(Duration::ZERO)),
            }
        };
        match prepared {
            Ok(Prepared { runtime, addresses }) => {
                machine.set_addresses(addresses);
                let grace = Duration::from_secs(spec.termination_grace_s);
                let status = status.clone();
                ready.send_replace(Some(runtime.clone()));
                let overdue = deadline(&spec, clock);
                let actor = Actor { machine, runtime, clock, grace, status };
                actor.run(&mut requests, overdue).await;
                ready.send_replace(None);
            }
            Err(event) => {
                machine.transition(event, clock.now());
                status.send_replace(machine.status());
            }
        }
        undo.run().await;
        let mut report = PodReport {
            status: status.borrow().clone(),
            guest: None,
            timeline: Vec::new(),
            measured: None,
        };
        findings.update(|findings| {
            report.guest = findings.guest.take();
            report.measured = findings.measured.take();
            report.timeline = timeline.steps(&findings.phases);
        });
        report
    }
}

/// Returns when the pod has taken as long as it may; never if it may take for ever.
fn deadline(spec: &PodSpec, clock: Clock) -> impl Future<Output = ()> + use<> {
    let at = spec.active_deadline_s.map(|seconds| clock.after(Duration::from_secs(seconds)));
    async move {
        match at.flatten() {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

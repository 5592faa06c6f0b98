//! The real guest as the actor needs it: containers made from the pod's specification and images,
//! their output, their end.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_proto::agent::{BlockDevice, Rootfs};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::actor::{Answer, Runtime, StopBy, Turn, chain};
use super::changes::Changes;
use super::debug;
use super::disks::Disks;
use super::images::ResolvedImage;
use super::input::{self, Inputs};
use super::last_words::{self, Tail, Tee};
use super::logs::{self, LogChunk, Stream};
use super::state::{Index, ProbeKind};
use super::timeline::Timeline;
use super::{Measured, SharedFindings};
use crate::guest::{
    Guest, GuestError, ProcessEnd, ProcessExit, StartFailure, Streams, Wanted, clean,
};
use crate::oci::{self, SpecError, StartContext};
use crate::storage::Layout;
use crate::types::{ContainerSpec, PodSpec};
use crate::vm::{Accept, VmExit};

/// How long the guest may take to answer that it shuts down, and to do it. Its containers have
/// ended and its disks are thrown away, so that nothing is lost when the VM is ended instead.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How long the guest may take to tell what it counted.
const MEASURE_LIMIT: Duration = Duration::from_secs(5);

/// Exit code of a container whose configuration cannot be made, as containerd's CRI reports it.
const CONFIG_EXIT_CODE: u8 = 128;

/// Cannot be caught.
const SIGKILL: u32 = 9;

/// What a runtime is made from.
pub(super) struct Parts {
    pub(super) guest: Guest,
    pub(super) spec: Arc<PodSpec>,
    /// What of the specification is not so any more.
    pub(super) changes: Changes,
    pub(super) uid: String,
    /// Name of the host.
    pub(super) node_name: String,
    /// Addresses of the host, and of the pod, its own one first; none if it has no network.
    pub(super) host_ips: Vec<IpAddr>,
    pub(super) pod_ips: Vec<IpAddr>,
    pub(super) images: BTreeMap<String, ResolvedImage>,
    pub(super) layout: Layout,
    pub(super) logs: mpsc::Sender<LogChunk>,
    pub(super) inputs: Inputs,
    /// How often each container was started.
    pub(super) starts: Mutex<HashMap<Index, u32>>,
    /// What it was given while it runs.
    pub(super) disks: Disks,
    /// How many commands were run for probes and hooks.
    pub(super) checks: AtomicU64,
    pub(super) timeline: Timeline,
    pub(super) findings: SharedFindings,
    pub(super) measure: bool,
}

/// See the module. Clones are the same.
#[derive(Clone)]
pub(super) struct GuestRuntime(Arc<Parts>);

impl std::fmt::Debug for GuestRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRuntime").field("pod", &self.0.spec.metadata.name).finish()
    }
}

/// A container that runs: its streams are being read.
pub(super) struct Run {
    id: String,
    end: ProcessEnd,
    pumps: JoinSet<()>,
    ended: watch::Sender<bool>,
    /// The end of its output, if its message may come of it.
    tail: Option<Tail>,
}

impl GuestRuntime {
    pub(super) fn new(parts: Parts) -> Self {
        GuestRuntime(Arc::new(parts))
    }

    fn container(&self, index: Index) -> Result<&ContainerSpec, StartFailure> {
        // The state machine counts the containers of the same specification.
        self.0.spec.all_containers().nth(index).ok_or_else(|| refused("there is no such container"))
    }

    pub(super) fn guest(&self) -> &Guest {
        &self.0.guest
    }

    pub(super) fn disks(&self) -> &Disks {
        &self.0.disks
    }

    /// The pod's own address, if it has one.
    pub(super) fn address(&self) -> Option<IpAddr> {
        self.0.pod_ips.first().copied()
    }

    /// What changes of the pod, and its uid.
    pub(super) fn changes(&self) -> (&Changes, &str) {
        (&self.0.changes, &self.0.uid)
    }

    pub(super) fn inputs(&self) -> &Inputs {
        &self.0.inputs
    }

    /// The configuration of a container, as it was when it was last started.
    pub(super) fn config(
        &self,
        container: &ContainerSpec,
    ) -> Result<oci_spec::runtime::Spec, StartFailure> {
        let Parts { changes, uid, node_name, host_ips, pod_ips, images, .. } = &*self.0;
        let image = images.get(&container.name).ok_or_else(|| refused("it has no image"))?;
        let spec = changes.of(&container.name);
        let container = spec.container(&container.name).unwrap_or(container);
        let context = StartContext {
            container_id: &container.name,
            pod_uid: uid,
            node_name,
            host_ips,
            pod_ips,
        };
        oci::container_spec(&spec, container, &image.config, &context)
            .map_err(|error| refused(&chain(&error)))
    }

    /// What the agent needs to make a container: its configuration, its root and its block devices.
    fn plan(
        &self,
        container: &ContainerSpec,
    ) -> Result<(Vec<u8>, Rootfs, Vec<BlockDevice>), StartFailure> {
        let root = self.0.layout.root(&container.name).ok_or_else(|| refused("it has no root"))?;
        self.0.changes.start(&container.name);
        let mut config = self.config(container)?;
        let late = self.0.disks.mounts(&container.name);
        let late = late.map_err(|error| refused(&chain(&error)))?;
        config.set_mounts(Some([config.mounts().clone().unwrap_or_default(), late].concat()));
        let config = serde_json::to_vec(&config).map_err(|error| refused(&chain(&error)))?;
        Ok((config, root.clone(), self.0.layout.devices(container)))
    }

    /// What the agent needs to make a debug container: its configuration, with a shell for a
    /// process, and its root. `None` if the pod has no image for it.
    pub(super) fn debug_config(
        &self,
        id: &str,
    ) -> Option<Result<(oci_spec::runtime::Spec, Rootfs), SpecError>> {
        let Parts { spec, images, layout, .. } = &*self.0;
        let (image, root) = (images.get(debug::NAME)?, layout.root(debug::NAME)?);
        let config = oci::debug::debug_spec(spec, &image.config, id);
        Some(config.map(|config| (config, root.clone())))
    }

    /// A name for a command that nobody asked for, such as a probe.
    pub(super) fn next_check(&self) -> String {
        format!("check-{}", self.0.checks.fetch_add(1, Ordering::Relaxed))
    }

    /// The message of a container that has ended: of its file, or of its output.
    async fn last_words(
        &self,
        id: &str,
        exit: ProcessExit,
        tail: Option<Tail>,
    ) -> Result<String, GuestError> {
        let Some(container) = self.0.spec.container(id) else { return Ok(String::new()) };
        let path = &container.termination_message.path;
        let message = match self.0.guest.read_file(id, path, last_words::MAX_FILE).await {
            Ok(bytes) => clean(&String::from_utf8_lossy(&bytes)),
            Err(error) if error.is_fatal() => return Err(error),
            // A volume may be mounted there.
            Err(error) => {
                tracing::debug!(container = id, error = chain(&error), "no message");
                String::new()
            }
        };
        match tail {
            Some(tail) if message.is_empty() && exit.exit_code != 0 => Ok(tail.text()),
            _ => Ok(message),
        }
    }

    /// Counts one more start of a container; returns how many there were before.
    fn count_start(&self, index: Index) -> u32 {
        let mut starts = self.0.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = starts.entry(index).or_default();
        let before = *count;
        *count = before.saturating_add(1);
        before
    }

    /// Begins to carry a container's streams.
    fn attach(
        &self,
        (container, run): (&str, u32),
        streams: Streams,
        tail: Option<&Tail>,
    ) -> (JoinSet<()>, watch::Sender<bool>) {
        let ended = watch::Sender::new(false);
        let name: Arc<str> = container.into();
        let mut pumps = JoinSet::new();
        let Streams { stdin, stdout, stderr } = streams;
        let outputs = [(Some(stdout), Stream::Stdout), (stderr, Stream::Stderr)];
        for (from, stream) in outputs.into_iter().filter_map(|(o, stream)| Some((o?, stream))) {
            let (name, logs, ended) = (name.clone(), self.0.logs.clone(), ended.subscribe());
            let from = Tee::new(from, tail.cloned());
            pumps.spawn(logs::pump(from, (name, run), stream, logs, ended));
        }
        if let Some(stdin) = stdin {
            let (queue, ended) = (self.0.inputs.open(name), ended.subscribe());
            pumps.spawn(async move {
                if let Some(stdin) = connected(stdin, ended.clone()).await {
                    input::feed(stdin, queue, ended).await;
                }
            });
        }
        (pumps, ended)
    }

    async fn measure(&self) {
        let guest = &self.0.guest;
        let ask = async {
            let vmm = guest.vm().counters().await.map_err(|error| chain(&error))?;
            let stats = guest.stats().await.map_err(|error| chain(&error))?;
            Ok::<_, String>(Measured { vmm, agent_rss: stats.agent_rss })
        };
        match tokio::time::timeout(MEASURE_LIMIT, ask).await {
            Ok(Ok(measured)) => {
                self.0.findings.update(|findings| findings.measured = Some(measured))
            }
            Ok(Err(error)) => tracing::warn!(error, "the guest does not tell what it counted"),
            Err(_) => tracing::warn!("the guest does not tell what it counted in time"),
        }
    }
}

/// The signal by which an image's containers want to be asked to end.
fn stop_signal(image: Option<&ResolvedImage>) -> u32 {
    image.map_or(oci::signal::DEFAULT, |image| oci::signal::stop_signal(&image.config))
}

fn refused(reason: &str) -> StartFailure {
    StartFailure { exit_code: CONFIG_EXIT_CODE, message: reason.to_owned() }
}

/// The connection of a stream, unless the process ends without one.
async fn connected(accept: Accept, mut ended: watch::Receiver<bool>) -> Option<UnixStream> {
    tokio::select! {
        biased;
        stream = accept.connected() => stream.ok(),
        () = async {
            ended.wait_for(|ended| *ended).await.map(drop).unwrap_or_default();
            tokio::time::sleep(logs::EOF_GRACE).await;
        } => None,
    }
}

impl Runtime for GuestRuntime {
    type Run = Run;

    async fn start(&self, index: Index) -> Result<Result<Run, StartFailure>, GuestError> {
        let planned = self.container(index).and_then(|c| self.plan(c).map(|plan| (c, plan)));
        let (container, (config, root, devices)) = match planned {
            Ok(planned) => planned,
            Err(failure) => return Ok(Err(failure)),
        };
        let Parts { guest, timeline, .. } = &*self.0;
        let id = &container.name;
        let run = self.count_start(index);
        let wanted = Wanted { stdin: container.stdin, tty: container.tty };
        let (stdio, streams) = guest.expect_streams(wanted);
        let create = guest.create_container(id, config, root, devices, stdio);
        let created = timeline.during(format!("container {id} created"), create).await?;
        if let Err(failure) = created {
            return Ok(Err(failure));
        }
        let tail = container.termination_message.fall_back_to_logs.then(Tail::default);
        let (pumps, ended) = self.attach((id, run), streams, tail.as_ref());
        let start = guest.start_container(id);
        match timeline.during(format!("container {id} started"), start).await? {
            Ok(end) => Ok(Ok(Run { id: id.clone(), end, pumps, ended, tail })),
            Err(failure) => Ok(Err(failure)),
        }
    }

    async fn wait(&self, run: Run) -> Result<(ProcessExit, String), GuestError> {
        let Run { id, mut end, mut pumps, ended, tail } = run;
        let exit = end.wait().await;
        // Also after an error: what the container wrote before it is worth reading.
        ended.send_replace(true);
        while let Some(pump) = pumps.join_next().await {
            if let Err(error) = pump {
                tracing::error!(container = id, %error, "a stream was cut off");
            }
        }
        let exit = exit?;
        let message = self.last_words(&id, exit, tail).await?;
        match self.0.guest.delete_container(&id).await {
            Ok(()) => {}
            Err(error) if error.is_fatal() => return Err(error),
            Err(error) => tracing::warn!(container = id, error = chain(&error), "not removed"),
        }
        Ok((exit, message))
    }

    async fn probe(&self, index: Index, kind: ProbeKind) -> Result<Answer, GuestError> {
        match self.container(index) {
            Ok(container) => self.put_probe(container, kind).await,
            Err(failure) => Ok(Answer::Unknown(failure.message)),
        }
    }

    async fn hook(&self, index: Index, turn: Turn) -> Result<Answer, GuestError> {
        let container = match self.container(index) {
            Ok(container) => container,
            Err(failure) => return Ok(Answer::Unknown(failure.message)),
        };
        let hook = match turn {
            Turn::PostStart => &container.lifecycle.post_start,
            Turn::PreStop => &container.lifecycle.pre_stop,
        };
        match hook {
            Some(hook) => self.run_hook(container, hook).await,
            None => Ok(Answer::Success),
        }
    }

    async fn signal(&self, index: Index, by: StopBy) -> Result<(), GuestError> {
        let Ok(container) = self.container(index) else { return Ok(()) };
        let image = self.0.images.get(&container.name);
        let (signal, all) = match by {
            StopBy::Asking => (stop_signal(image), false),
            StopBy::Killing => (SIGKILL, true),
        };
        self.0.guest.signal(&container.name, signal, all).await
    }

    async fn power_off(&self) {
        if self.0.measure {
            self.measure().await;
        }
        let guest = &self.0.guest;
        let shut_down = async {
            guest.shutdown().await?;
            Ok::<_, GuestError>(guest.vm().exited().await)
        };
        match tokio::time::timeout(SHUTDOWN_LIMIT, shut_down).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = chain(&error),
                    "the guest does not shut down: its VM is ended"
                );
                guest.vm().kill().await;
            }
            Err(_) => {
                tracing::warn!("the guest does not shut down in time: its VM is ended");
                guest.vm().kill().await;
            }
        }
    }

    async fn file_server_lost(&self) -> String {
        self.0.guest.vm().file_server_lost().await.to_string()
    }

    async fn vm_ended(&self) -> Arc<VmExit> {
        self.0.guest.vm().exited().await
    }
}

//! What people ask of a running pod beside its end: processes, signals, lists, archives. Nothing of
//! it concerns the state machine: the guest is asked directly.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use husk_proto::agent as proto;
use oci_spec::runtime::{BoxBuilder, Process};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::actor::chain;
use super::debug::Remover;
use super::disks::DiskError;
use super::input::Input;
use super::runtime::GuestRuntime;
use crate::guest::{
    Guest, GuestError, KernelLog, Loopback, Output, ProcessEnd, ProcessExit, StartFailure, Streams,
    Tunnel, Wanted,
};
use crate::types::{ContainerSpec, PodSpec};
use crate::vm::Accept;

/// Why something cannot be done with a running pod.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Its guest is not ready yet, or gone.
    #[error("the pod's virtual machine does not run (yet, or any more)")]
    NotRunning,
    /// It has no such container.
    #[error("the pod has no container {name:?}; it has {}", known.join(", "))]
    NoContainer {
        /// The name.
        name: String,
        /// Those that it has.
        known: Vec<String>,
    },
    /// It was not started with an image for debugging.
    #[error(
        "debugging is not enabled for this pod: start it with `husk run --debug-image IMAGE`, where \
         IMAGE holds the tools, e.g. a shell"
    )]
    NoDebugging,
    /// A disk cannot be attached or detached.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The process cannot be described to the agent.
    #[error("cannot describe the process: {0}")]
    Describe(String),
    /// The guest refused, or is lost.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The program is ending.
    #[error("an internal task was cut off")]
    Task(#[from] tokio::task::JoinError),
}

/// A process that is to run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// In which container. Of no concern to [`PodAccess::debug`].
    pub container: String,
    /// The program and its arguments; empty for those of the container's own process.
    pub args: Vec<String>,
    /// `NAME=VALUE`, beside the container's own.
    pub env: Vec<String>,
    /// Instead of the container's.
    pub cwd: Option<String>,
    /// `USER[:GROUP]`, names or numbers, instead of the container's.
    pub user: Option<String>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it has a standard input.
    pub stdin: bool,
    /// Width and height of its terminal in characters.
    pub size: Option<(u32, u32)>,
}

/// Means of asking things of a pod's guest. Clones are the same.
#[derive(Debug, Clone)]
pub struct PodAccess {
    spec: Arc<PodSpec>,
    running: watch::Receiver<Option<GuestRuntime>>,
    next_exec: Arc<AtomicU64>,
    pub(super) next_debug: Arc<AtomicU64>,
}

/// A process that was started in a container, or as a debug container's first one. Dropping it
/// leaves the former alone, and ends the latter with all that it started.
#[derive(Debug)]
pub struct ExecProcess {
    pub(super) guest: Guest,
    pub(super) container: String,
    /// `None` for the first process of a debug container.
    pub(super) id: Option<String>,
    pub(super) end: tokio::sync::Mutex<ProcessEnd>,
    /// What removes the debug container.
    pub(super) debug: Option<Remover>,
}

/// The streams of a process that runs.
#[derive(Debug)]
pub struct ExecStreams {
    /// What is written there the process reads.
    pub stdin: Option<UnixStream>,
    /// What the process writes.
    pub stdout: Output,
    /// The same, without a terminal.
    pub stderr: Option<Output>,
}

impl PodAccess {
    pub(super) fn new(spec: Arc<PodSpec>, running: watch::Receiver<Option<GuestRuntime>>) -> Self {
        PodAccess { spec, running, next_exec: Arc::default(), next_debug: Arc::default() }
    }

    pub(super) fn runtime(&self) -> Result<GuestRuntime, AccessError> {
        self.running.borrow().clone().ok_or(AccessError::NotRunning)
    }

    /// Whether anything can be asked of the guest now.
    ///
    /// # Errors
    /// [`AccessError::NotRunning`].
    pub fn check_running(&self) -> Result<(), AccessError> {
        self.runtime().map(drop)
    }

    fn guest(&self) -> Result<Guest, AccessError> {
        Ok(self.runtime()?.guest().clone())
    }

    /// What the pod's specification says of a container.
    ///
    /// # Errors
    /// [`AccessError::NoContainer`].
    pub fn container(&self, name: &str) -> Result<&ContainerSpec, AccessError> {
        self.spec.container(name).ok_or_else(|| AccessError::NoContainer {
            name: name.to_owned(),
            known: self.spec.all_containers().map(|container| container.name.clone()).collect(),
        })
    }

    /// Runs a process in a running container, or says why its program cannot be executed.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn exec(
        &self,
        request: ExecRequest,
    ) -> Result<Result<(ExecProcess, ExecStreams), StartFailure>, AccessError> {
        let container = self.container(&request.container)?;
        let runtime = self.runtime()?;
        let config = match runtime.config(container) {
            Ok(config) => config,
            Err(failure) => return Ok(Err(failure)),
        };
        let Some(process) = config.process().clone() else {
            return Err(AccessError::Describe("the container has none of its own".into()));
        };
        let wanted = Wanted { stdin: request.stdin, tty: request.tty };
        let process = describe(process, request).map_err(AccessError::Describe)?;
        let guest = runtime.guest().clone();
        // Not held on to: it keeps the pod's output open.
        drop(runtime);
        let id = format!("exec-{}", self.next_exec.fetch_add(1, Ordering::Relaxed));
        let (stdio, streams) = guest.expect_streams(wanted);
        match guest.exec_process(&container.name, &id, process, stdio).await? {
            // The agent made the connection of the input before it answered.
            Ok(end) => {
                let streams = connect(streams).await?;
                let (container, id) = (container.name.clone(), Some(id));
                let process = ExecProcess { guest, container, id, end: end.into(), debug: None };
                Ok(Ok((process, streams)))
            }
            Err(failure) => Ok(Err(failure)),
        }
    }

    /// Sends a signal to a container's first process, or to all of its processes.
    ///
    /// # Errors
    /// [`AccessError`]; of a container that does not run, [`GuestError::Refused`].
    pub async fn signal(&self, container: &str, signal: u32, all: bool) -> Result<(), AccessError> {
        self.container(container)?;
        let guest = self.guest()?;
        if all {
            guest.signal(container, signal, true).await?;
        } else {
            guest.signal_process(container, None, signal).await?;
        }
        Ok(())
    }

    /// Sets the window size of a container's terminal, in characters.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn resize(&self, container: &str, size: (u32, u32)) -> Result<(), AccessError> {
        self.container(container)?;
        Ok(self.guest()?.resize_terminal(container, None, size).await?)
    }

    /// A way to write to the standard input of a container; `None` if it has none now.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn input(&self, container: &str) -> Result<Option<mpsc::Sender<Input>>, AccessError> {
        self.container(container)?;
        Ok(self.runtime()?.inputs().of(container))
    }

    /// What the guest and the containers use.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn stats(&self) -> Result<proto::StatsResponse, AccessError> {
        let mut stats = self.guest()?.stats().await?;
        // Debug containers are none of the pod's.
        stats.containers.retain(|container| self.spec.container(&container.id).is_some());
        Ok(stats)
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn processes(&self, container: &str) -> Result<Vec<proto::ProcessInfo>, AccessError> {
        self.container(container)?;
        Ok(self.guest()?.list_processes(container).await?)
    }

    /// Asks for the log of the guest's kernel; `follow`: also for what comes.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn kernel_log(&self, follow: bool) -> Result<KernelLog, AccessError> {
        Ok(self.guest()?.kernel_log(follow).await?)
    }

    /// Stops every process of a container, or lets them go on.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn set_paused(&self, container: &str, paused: bool) -> Result<(), AccessError> {
        self.container(container)?;
        Ok(self.guest()?.set_paused(container, paused).await?)
    }

    /// Connects to a server in the guest, as [`Guest::forward`].
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn forward(
        &self,
        port: u16,
        first: Loopback,
    ) -> Result<Result<Tunnel, String>, AccessError> {
        Ok(self.guest()?.forward(port, first).await?)
    }

    /// Makes the pod what this specification says, as far as it may change while it runs: labels,
    /// annotations, and what comes of ConfigMaps and Secrets. Returns the volumes whose files were
    /// replaced. Not to be called again before it has returned.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn change(&self, wanted: &PodSpec) -> Result<Vec<String>, AccessError> {
        Ok(self.runtime()?.change(wanted).await?)
    }

    /// Begins to take a file or tree out of a container, as a tar archive.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn copy_out(&self, container: &str, path: &str) -> Result<Copy, AccessError> {
        self.copy(container, path, Direction::Out)
    }

    /// Begins to bring a tar archive into a directory of a container.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn copy_in(&self, container: &str, path: &str) -> Result<Copy, AccessError> {
        self.copy(container, path, Direction::In)
    }

    fn copy(&self, name: &str, path: &str, direction: Direction) -> Result<Copy, AccessError> {
        self.container(name)?;
        let guest = self.guest()?;
        let (port, stream) = guest.expect_stream();
        let (container, path) = (name.to_owned(), path.to_owned());
        Ok(Copy { stream, request: CopyRequest { guest, container, path, port, direction } })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// An archive that is about to be carried: the request must be made, and the stream served at the
/// same time.
#[derive(Debug)]
pub struct Copy {
    /// The agent's connection, on which the archive goes.
    pub stream: Accept,
    /// The request.
    pub request: CopyRequest,
}

/// See [`Copy`].
#[derive(Debug)]
pub struct CopyRequest {
    guest: Guest,
    container: String,
    path: String,
    port: u32,
    direction: Direction,
}

impl CopyRequest {
    /// Has the agent do it; returns when it is done, with the archive's size in bytes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn run(self) -> Result<u64, GuestError> {
        let CopyRequest { guest, container, path, port, direction } = self;
        match direction {
            Direction::Out => guest.copy_out(&container, &path, port).await,
            Direction::In => guest.copy_in(&container, &path, port).await,
        }
    }
}

impl ExecProcess {
    /// Waits for its end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn wait(&self) -> Result<ProcessExit, GuestError> {
        self.end.lock().await.wait().await
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn signal(&self, signal: u32) -> Result<(), GuestError> {
        self.guest.signal_process(&self.container, self.id.as_deref(), signal).await
    }

    /// Sets the size of its terminal in characters.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn resize(&self, size: (u32, u32)) -> Result<(), GuestError> {
        self.guest.resize_terminal(&self.container, self.id.as_deref(), size).await
    }

    /// Has what is left of it removed, after [`Self::wait`] told of its end: a debug container, with
    /// what the process left running.
    pub async fn finish(self) {
        if let Some(remover) = self.debug {
            remover.remove().await;
        }
    }
}

pub(super) async fn connect(streams: Streams) -> Result<ExecStreams, GuestError> {
    let Streams { stdin, stdout, stderr } = streams;
    let stdin = match stdin {
        Some(accept) => Some(accept.connected().await.map_err(GuestError::Vm)?),
        None => None,
    };
    Ok(ExecStreams { stdin, stdout, stderr })
}

/// The process of an exec, as the agent takes it.
fn describe(process: Process, request: ExecRequest) -> Result<Vec<u8>, String> {
    serde_json::to_vec(&adapt(process, request)?).map_err(|error| chain(&error))
}

/// The process of a container, with what was asked for instead.
pub(super) fn adapt(mut process: Process, request: ExecRequest) -> Result<Process, String> {
    let ExecRequest { container: _, args, env, cwd, user, tty, stdin: _, size } = request;
    if !args.is_empty() {
        process.set_args(Some(args));
    }
    process.set_terminal(Some(tty));
    let mut all = process.env().clone().unwrap_or_default();
    let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
    for variable in env {
        all.retain(|known| name(known) != name(&variable));
        all.push(variable);
    }
    if tty && !all.iter().any(|variable| name(variable) == "TERM") {
        all.push("TERM=xterm".to_owned());
    }
    process.set_env(Some(all));
    if let Some(cwd) = cwd {
        process.set_cwd(PathBuf::from(cwd));
    }
    if let Some(wanted) = user {
        let mut user = process.user().clone();
        user.set_username(Some(wanted));
        user.set_uid(0);
        user.set_gid(0);
        process.set_user(user);
    }
    if let Some((width, height)) = size.filter(|_| tty) {
        let built = BoxBuilder::default().width(width).height(height).build();
        process.set_console_size(Some(built.map_err(|error| chain(&error))?));
    }
    Ok(process)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn described(request: ExecRequest) -> Value {
        let mut process = Process::default();
        process.set_env(Some(vec!["PATH=/bin".into(), "A=1".into()]));
        process.set_cwd("/srv".into());
        serde_json::from_slice(&describe(process, request).unwrap()).unwrap()
    }

    #[test]
    fn what_is_not_asked_for_is_the_containers() {
        let process =
            described(ExecRequest { args: vec!["true".into()], ..ExecRequest::default() });
        assert_eq!(process["args"], json!(["true"]));
        assert_eq!(process["env"], json!(["PATH=/bin", "A=1"]));
        assert_eq!(process["cwd"], "/srv");
        assert_eq!(process["terminal"], false);
    }

    #[test]
    fn what_is_asked_for_wins() {
        let process = described(ExecRequest {
            env: vec!["A=2".into(), "B=3".into(), "A=4".into()],
            cwd: Some("/tmp".into()),
            user: Some("nobody:daemon".into()),
            tty: true,
            size: Some((80, 25)),
            ..ExecRequest::default()
        });
        assert_eq!(process["env"], json!(["PATH=/bin", "B=3", "A=4", "TERM=xterm"]));
        assert_eq!(process["cwd"], "/tmp");
        assert_eq!(process["user"]["username"], "nobody:daemon");
        assert_eq!(process["consoleSize"], json!({"width": 80, "height": 25}));
    }
}

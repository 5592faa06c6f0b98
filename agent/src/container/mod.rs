//! The OCI runner: containers and their processes.
//!
//! Small because it has one environment: the guest's own kernel, cgroup v2, root. What it makes is
//! undone where it was made if a later step fails, and otherwise by [`lifecycle`]'s delete.

mod caps;
pub(crate) mod copy;
mod copy_up;
mod create;
mod discard;
pub(crate) mod events;
mod exec;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod hooks;
mod id_map;
mod init;
pub(crate) mod late_mounts;
mod lifecycle;
mod lookup;
mod mounting;
mod mounts;
mod namespaces;
mod path;
mod plan;
mod process;
mod processes;
mod read_file;
mod report;
pub(crate) mod rootfs;
mod scheduling;
mod seccomp;
mod spawn;
pub(crate) mod spec;
mod state;
mod stats;
mod user;
mod user_namespace;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::cgroup::{Cgroup, CgroupError, UpdateError};
use crate::lock;
use crate::reaper::Reaper;
use crate::stdio::{Relay, StdioError, UnusedPorts};
use crate::storage::StorageError;
use crate::transport::Transport;

use events::{Events, OomWatch};
pub(crate) use lookup::StartFailure;
use plan::ContainerPlan;
use process::StepError;
pub(crate) use scheduling::let_the_containers_go_first;
pub(crate) use seccomp::Instruction as FilterInstruction;
use spawn::Gate;
use spec::SpecError;
use state::{Event, Refused, State};

/// A request about a container that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("{field}: {value:?} is no name ([a-zA-Z0-9][a-zA-Z0-9_.-]*, at most 64 bytes)")]
    Name { field: &'static str, value: String },
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    #[error("container {container:?} has no process {exec:?}")]
    NoProcess { container: String, exec: String },
    #[error("process {exec:?} of container {container:?} has ended")]
    Ended { container: String, exec: String },
    #[error("process {exec:?} of container {container:?} has no terminal")]
    NoTerminal { container: String, exec: String },
    #[error("path: {0:?} must be absolute")]
    Path(String),
    #[error("container {container:?} has no file {path:?}: {reason}")]
    NoFile { container: String, path: String, reason: String },
    #[error("container {0:?} exists already")]
    Exists(String),
    #[error("container {container:?} has a process {exec:?} already")]
    ExecExists { container: String, exec: String },
    #[error("container {0:?} is being created or deleted")]
    Busy(String),
    #[error("container {0:?}")]
    Refused(String, #[source] Refused),
    #[error("container {0:?}: a process does not stand still, it may hang in the kernel")]
    NotFrozen(String),
    #[error("the pod {0}")]
    NoPod(&'static str),
    #[error("rootfs: {0}")]
    Rootfs(String),
    #[error("devices: {path:?}")]
    Disk {
        path: String,
        #[source]
        source: StorageError,
    },
    #[error("{field}: {value} must be {must}")]
    Value { field: &'static str, value: u32, must: &'static str },
    #[error("OCI specification")]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Update(#[from] UpdateError),
    #[error("read {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Step(#[from] StepError),
    #[error("the new process reports: {0}")]
    Reported(String),
    #[error("the new process ended before it was ready")]
    Died,
    #[error("the process is not followed to its end any more")]
    Unfollowed,
    #[error("the new process was killed for memory before it was ready: the limit is too low")]
    OutOfMemory,
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + n after signal n.
    pub(crate) code: u32,
    /// The signal that ended it, or 0.
    pub(crate) signal: u32,
    pub(crate) oom_killed: bool,
    pub(crate) at: SystemTime,
    pub(crate) unused_ports: UnusedPorts,
}

/// What is known of a process's end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outcome {
    /// It runs, or its output is still being delivered.
    Pending,
    /// It has ended, and its output has been delivered.
    Ended(Exit),
}

/// What tells the end of a process, also when that is known to nobody else any more.
pub(crate) struct Ending(watch::Receiver<Outcome>);

impl Ending {
    fn of(outcome: &watch::Sender<Outcome>) -> Self {
        Self(outcome.subscribe())
    }

    /// Waits for the end of the process and of its output.
    ///
    /// # Errors
    /// [`ContainerError::Unfollowed`].
    pub(crate) async fn told(mut self) -> Result<Exit, ContainerError> {
        loop {
            if let Outcome::Ended(exit) = *self.0.borrow_and_update() {
                return Ok(exit);
            }
            self.0.changed().await.map_err(|_| ContainerError::Unfollowed)?;
        }
    }
}

/// A process whose program was executed: its process ID, and its end. Or why it cannot be.
pub(crate) type Started = Result<(u32, Ending), StartFailure>;

/// A process of a container.
struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    /// False from the moment it is reaped.
    alive: bool,
    relay: Relay,
    outcome: watch::Sender<Outcome>,
    /// The container's count of kills for memory when this process was made.
    oom_kills_before: u64,
}

/// A container.
struct Container {
    state: State,
    plan: Arc<ContainerPlan>,
    remains: Arc<Remains>,
    main: Process,
    /// What holds the process back until it is started; taken by the start.
    gate: Option<Gate>,
    execs: BTreeMap<String, Process>,
    /// Names of processes that are being made.
    execs_starting: BTreeSet<String>,
    /// How many kills for memory have been told of.
    oom_kills_told: u64,
    /// Tells of kills for memory as they happen.
    _oom_watch: Option<OomWatch>,
}

/// What a container leaves behind outside its own namespaces.
#[derive(Debug)]
struct Remains {
    cgroup: Cgroup,
    /// Its writable layer, on one of the pod's file systems.
    layer: PathBuf,
    /// Its directory under CONTAINERS.
    directory: PathBuf,
}

/// All containers, and the identifiers that are in use though there is no container of that name
/// yet, or no longer.
#[derive(Default)]
struct Table {
    containers: BTreeMap<String, Container>,
    reserved: BTreeSet<String>,
}

/// The runner: everything that requests about containers need.
#[derive(Clone)]
pub(crate) struct Runner {
    table: Arc<Mutex<Table>>,
    transport: Transport,
    reaper: Reaper,
    events: Events,
    /// The agent's own namespace of process IDs, to return to after a clone into another.
    own_pid_namespace: Arc<OwnedFd>,
}

/// An identifier that nobody else can take; freed when dropped.
struct Reservation {
    table: Arc<Mutex<Table>>,
    id: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.table).reserved.remove(&self.id);
    }
}

/// Names the main process in requests.
const MAIN: &str = "";

/// Longest identifier in bytes.
const MAX_NAME: usize = 64;

/// How many ended processes of a container stay known, beside its main one. A probe that runs a
/// command each second for a year would fill the memory otherwise; the oldest are forgotten.
const MAX_ENDED_EXECS: usize = 256;

/// Checks an identifier, which becomes a component of paths.
pub(crate) fn check_name(field: &'static str, name: &str) -> Result<(), ContainerError> {
    let first = |c: u8| c.is_ascii_alphanumeric();
    let good = name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(first)
        && name.bytes().all(|c| first(c) || matches!(c, b'_' | b'.' | b'-'));
    if good { Ok(()) } else { Err(ContainerError::Name { field, value: name.to_owned() }) }
}

impl Container {
    /// The process of that name: the main one, or an exec.
    fn process(&mut self, exec: &str) -> Option<&mut Process> {
        if exec == MAIN { Some(&mut self.main) } else { self.execs.get_mut(exec) }
    }

    /// Moves on by an event.
    fn apply(&mut self, id: &str, event: Event) -> Result<(), ContainerError> {
        self.state = state::transition(self.state, event)
            .map_err(|refused| ContainerError::Refused(id.to_owned(), refused))?;
        Ok(())
    }
}

impl Table {
    fn container(&mut self, id: &str) -> Result<&mut Container, ContainerError> {
        if self.containers.contains_key(id) {
            return self
                .containers
                .get_mut(id)
                .ok_or_else(|| ContainerError::NoContainer(id.to_owned()));
        }
        if self.reserved.contains(id) {
            return Err(ContainerError::Busy(id.to_owned()));
        }
        Err(ContainerError::NoContainer(id.to_owned()))
    }

    fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process, ContainerError> {
        self.container(id)?.process(exec).ok_or_else(|| ContainerError::NoProcess {
            container: id.to_owned(),
            exec: exec.to_owned(),
        })
    }
}

impl Runner {
    /// A runner without containers. To be called in the runtime.
    ///
    /// # Errors
    /// If the agent's own namespace cannot be opened, or nothing can be watched.
    pub(crate) fn new(transport: Transport, reaper: Reaper) -> io::Result<Self> {
        let own = std::fs::File::open("/proc/self/ns/pid")?;
        let runner = Self {
            table: Arc::default(),
            transport,
            reaper,
            events: Events::new()?,
            own_pid_namespace: Arc::new(own.into()),
        };
        tokio::spawn(runner.clone().watch_oom_kills());
        Ok(runner)
    }

    /// Takes an identifier for a container that is to be made.
    fn reserve(&self, id: &str) -> Result<Reservation, ContainerError> {
        let mut table = lock(&self.table);
        if table.containers.contains_key(id) || !table.reserved.insert(id.to_owned()) {
            return Err(ContainerError::Exists(id.to_owned()));
        }
        Ok(Reservation { table: Arc::clone(&self.table), id: id.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_that_are_no_path_component_are_refused() {
        for name in ["", ".", "..", ".a", "-a", "a/b", "a b", "a\0", "ä"] {
            assert!(check_name("id", name).is_err(), "{name:?}");
        }
        assert!(check_name("id", &"a".repeat(MAX_NAME + 1)).is_err());
        check_name("id", "Web_1.a-b").unwrap();
    }
}

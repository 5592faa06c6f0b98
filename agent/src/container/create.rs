//! Making a container.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use husk_proto::agent::CreateContainerRequest;
use husk_proto::guest;

use super::events::OomWatch;
use super::init::Job;
use super::namespaces;
use super::plan::{ContainerPlan, check_disks};
use super::process::{StepError, step};
use super::rootfs::Overlay;
use super::spawn::{Spawned, take_master};
use super::spec::{self, NamespaceKind};
use super::state::Event;
use super::user_namespace::UserNamespace;
use super::{Container, ContainerError, MAIN, Remains, Runner, StartFailure, check_name};
use crate::cgroup::{Cgroup, devices};
use crate::lock;
use crate::pod::PodInfo;
use crate::stdio::{self, Relay, Unconnected};
use crate::storage;

/// Most layers of an overlay (OVL_MAX_STACK).
const MAX_LAYERS: usize = 500;

impl Runner {
    /// Makes a container up to the point where only its program remains to be started. Returns its
    /// process ID, or why its program cannot be executed. On failure nothing is left of it.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) async fn create(
        &self,
        pod: &PodInfo,
        request: CreateContainerRequest,
    ) -> Result<Result<u32, StartFailure>, ContainerError> {
        let CreateContainerRequest { id, spec, rootfs, stdio, devices: disks } = request;
        check_name("id", &id)?;
        let reservation = self.reserve(&id)?;
        let mut plan = ContainerPlan::new(&id, &spec::parse(&spec)?, &pod.hostname)?;
        check_disks(&disks)?;
        let rootfs = rootfs.unwrap_or_default();
        check_layers(pod, &rootfs.lower, &rootfs.upper_on)?;
        for disk in &disks {
            let device = storage::find_device(&disk.disk_serial).await;
            let path = || disk.path.clone();
            let device = device.map_err(|source| ContainerError::Disk { path: path(), source })?;
            plan.add_disk(disk, device);
        }
        let plan = Arc::new(plan);

        let terminal = plan.process.terminal.is_some();
        let ports = stdio.unwrap_or_default();
        let (streams, child_stdio) = stdio::prepare(&ports, terminal)?;

        let layer = storage::mount_point(&rootfs.upper_on).join("containers").join(&id);
        let directory = Path::new(guest::CONTAINERS).join(&id);
        let cgroup = Cgroup::create(&plan.cgroup_path, &plan.cgroup_settings)?;
        let remains = Arc::new(Remains { cgroup, layer, directory });
        let result = async {
            // What a guest that died left on a disk that outlived it.
            self.discard(&remains.layer)?;
            let overlay = make_directories(&remains, &rootfs.lower)?;
            devices::attach(remains.cgroup.fd(), &plan.all_device_rules())
                .map_err(step("linux.resources.devices"))?;
            let oom_watch = self
                .events
                .watch(&id, &remains.cgroup)
                .map_err(step("watch for kills for memory"))?;
            let user = self.hold_user_namespace(&plan, remains.cgroup.fd()).await?;
            let spawned = self.clone_main(&plan, &overlay, user.as_ref(), &remains, child_stdio)?;
            self.insert(&id, &plan, &remains, spawned, oom_watch);
            let ready = self.until_ready(&id, streams).await;
            if let Some(user) = user {
                user.release().await;
            }
            ready
        }
        .await;
        let killed = matches!(result, Err(ContainerError::Died))
            && remains.cgroup.oom_kills().is_ok_and(|n| n > 0);
        let result = if killed { Err(ContainerError::OutOfMemory) } else { result };
        if !matches!(result, Ok(Ok(_))) {
            // It leaves the table first, but keeps its name until nothing is left of it.
            lock(&self.table).containers.remove(&id);
            if let Err(error) = self.clear(&remains).await {
                tracing::error!(container = id, error = crate::chain(&error), "left behind");
            }
        }
        drop(reservation);
        result
    }

    /// Clones the container's first process.
    fn clone_main(
        &self,
        plan: &ContainerPlan,
        overlay: &Overlay,
        user: Option<&UserNamespace>,
        remains: &Remains,
        stdio: [std::os::fd::OwnedFd; 3],
    ) -> Result<Spawned, StepError> {
        let flags = plan.namespaces.by_clone();
        let joined = plan.namespaces.joins(NamespaceKind::Pid);
        let pid_namespace = joined.map(namespaces::open).transpose()?;
        use std::os::fd::AsFd;
        let job = Job::Container { plan, overlay, user };
        let namespace = pid_namespace.as_ref().map(AsFd::as_fd);
        self.spawn(&job, stdio, flags, remains.cgroup.fd(), namespace)
    }

    /// Puts a new container into the table.
    fn insert(
        &self,
        id: &str,
        plan: &Arc<ContainerPlan>,
        remains: &Arc<Remains>,
        spawned: Spawned,
        oom_watch: Option<OomWatch>,
    ) {
        let Spawned { process, gate, reaped } = spawned;
        let container = Container {
            state: super::state::State::Creating,
            plan: Arc::clone(plan),
            remains: Arc::clone(remains),
            main: process,
            gate: Some(gate),
            execs: Default::default(),
            execs_starting: Default::default(),
            oom_kills_told: 0,
            _oom_watch: oom_watch,
        };
        lock(&self.table).containers.insert(id.to_owned(), container);
        self.follow(id, MAIN, Arc::clone(remains), reaped);
    }

    /// Waits until the new container's process is ready, and lets its streams flow.
    async fn until_ready(
        &self,
        id: &str,
        streams: Unconnected,
    ) -> Result<Result<u32, StartFailure>, ContainerError> {
        let gate = lock(&self.table).container(id)?.gate.take();
        let mut gate = gate.ok_or(ContainerError::Died)?;
        let connected = async { Ok(streams.connect(&self.transport).await?) };
        let (ready, ends) = tokio::try_join!(gate.ready(), connected)?;
        let terminal = match ready {
            Ok(terminal) => terminal,
            Err(failure) => return Ok(Err(failure)),
        };
        let mut table = lock(&self.table);
        let container = table.container(id)?;
        let master = terminal.map(|fd| take_master(&container.main, fd)).transpose()?;
        // If the process has ended in the meantime it cannot become ready.
        container.apply(id, Event::Ready).map_err(|_| ContainerError::Died)?;
        container.main.relay = Relay::start(ends, master)?;
        container.gate = Some(gate);
        Ok(Ok(container.main.pid))
    }

    /// Removes what a container leaves behind. Its processes are killed.
    pub(super) async fn clear(&self, remains: &Remains) -> Result<(), ContainerError> {
        // All steps are tried, so that one that fails does not keep the others' remains.
        let cgroup = remains.cgroup.remove().await;
        let layer = self.discard(&remains.layer);
        let directory = match fs::remove_dir_all(&remains.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(step("remove the container's directory")),
        };
        cgroup?;
        layer?;
        directory?;
        Ok(())
    }
}

/// Checks the names of a container's layers.
pub(crate) fn check_layers(
    pod: &PodInfo,
    lower: &[String],
    upper_on: &str,
) -> Result<(), ContainerError> {
    if lower.is_empty() || lower.len() > MAX_LAYERS {
        let count = lower.len();
        return Err(ContainerError::Rootfs(format!("{count} layers; must be 1 to {MAX_LAYERS}")));
    }
    for name in lower.iter().map(String::as_str).chain([upper_on]) {
        if !pod.filesystems.contains_key(name) {
            return Err(ContainerError::Rootfs(format!("no file system is named {name:?}")));
        }
    }
    if pod.filesystems.get(upper_on) == Some(&true) {
        return Err(ContainerError::Rootfs(format!("upper_on: {upper_on:?} is read-only")));
    }
    Ok(())
}

/// Makes the directories of the container's root.
fn make_directories(remains: &Remains, lower: &[String]) -> Result<Overlay, StepError> {
    let what = || "make the container's directories";
    let target = remains.directory.join("rootfs");
    fs::create_dir_all(&target).map_err(step(what()))?;
    let (upper, work) = (remains.layer.join("upper"), remains.layer.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).map_err(step(what()))?;
    }
    // Writable for everybody: the container may bind it, and run as anybody.
    let last_words = remains.directory.join(guest::TERMINATION_LOG);
    fs::write(&last_words, "").map_err(step(what()))?;
    fs::set_permissions(&last_words, fs::Permissions::from_mode(0o666)).map_err(step(what()))?;
    // The upper directory is what the container sees as the owner and mode of its root.
    let lower: Vec<_> = lower.iter().map(|name| storage::mount_point(name)).collect();
    if let Some(top) = lower.last() {
        let metadata = fs::metadata(top).map_err(step(what()))?;
        std::os::unix::fs::chown(&upper, Some(metadata.uid()), Some(metadata.gid()))
            .map_err(step(what()))?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(metadata.mode() & 0o7777))
            .map_err(step(what()))?;
    }
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Ok(Overlay {
        lower: lower.iter().map(|path| text(path)).collect(),
        upper: text(&upper),
        work: text(&work),
        target: text(&target),
    })
}

//! The OCI runtime configuration (`config.json`) of a container: what Kubernetes' kubelet and a CRI
//! runtime together would make of it, for a container that shares a virtual machine with its pod.
//!
//! Made anew at every start of a container, because the environment can name the pod's addresses.
//! What it is not for: interpreting the configuration; that is the agent's runner.

pub(crate) mod capability;
pub(crate) mod debug;
mod environment;
mod expansion;
pub mod hooks;
mod limits;
mod mounts;
pub mod signal;
#[cfg(test)]
mod tests;
mod user;

use std::net::IpAddr;
use std::path::PathBuf;

use husk_proto::guest;
use oci_spec::OciSpecError;
use oci_spec::image::{Config, ImageConfiguration};
use oci_spec::runtime::{
    Linux, LinuxBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, PosixRlimit,
    PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

use crate::types::{ContainerSpec, PodSpec, ProcMount};

pub use environment::EnvError;
pub(crate) use environment::probe_command;
pub use mounts::SubPathError;
pub(crate) use mounts::disk_mount;
pub use user::UserError;

/// The version of the runtime specification that the configuration follows.
const OCI_VERSION: &str = "1.2.0";

/// Open files: what systemd gives to services and so to containers under containerd 2. The soft
/// limit stays low for programs that close every descriptor up to it; servers raise their own.
const RLIMIT_NOFILE: (u64, u64) = (1024, 512 * 1024);

/// What is known only when a container starts.
#[derive(Debug, Clone, Copy)]
pub struct StartContext<'a> {
    /// The container's id at the agent.
    pub container_id: &'a str,
    /// The pod's unique identifier, given or made.
    pub pod_uid: &'a str,
    /// Name of the host.
    pub node_name: &'a str,
    /// Addresses of the host, the primary one first. May be empty.
    pub host_ips: &'a [IpAddr],
    /// Addresses of the pod, the primary one first. May be empty.
    pub pod_ips: &'a [IpAddr],
}

/// Why there is no configuration for a container.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Neither the pod nor the image says what to run.
    #[error("no command: neither the container nor its image has one")]
    NoCommand,
    /// The environment or the command cannot be made.
    #[error("cannot make the environment")]
    Env(#[from] EnvError),
    /// A part of a volume cannot be told.
    #[error("cannot mount a part of a volume")]
    SubPath(#[from] SubPathError),
    /// The user cannot be taken.
    #[error("cannot run as this user")]
    User(#[from] UserError),
    /// A part of the configuration cannot be put together.
    #[error("cannot put the OCI configuration together")]
    Build(#[from] OciSpecError),
}

/// The configuration of `container`, which is one of `pod`'s, from an image of this configuration.
///
/// Its root is `guest::CONTAINERS/<id>/rootfs`, its volumes are bound from `guest::VOLUMES`, its
/// host name, hosts and resolver files from `guest::ETC`, its shared memory from `guest::SHM`. It
/// has mount, PID and cgroup namespaces of its own and shares all others with the pod.
///
/// `process.user.username` carries `USER[:GROUP]` for the agent, which resolves it against the
/// container's own `/etc/passwd` and `/etc/group`: see [`UserError`] and `docs/pod-manifest.md`.
///
/// # Errors
/// If the container cannot be run as its pod and its image say.
pub fn container_spec(
    pod: &PodSpec,
    container: &ContainerSpec,
    image: &ImageConfiguration,
    context: &StartContext<'_>,
) -> Result<Spec, SpecError> {
    let image = image.config().clone().unwrap_or_default();
    let root = format!("{}/{}/rootfs", guest::CONTAINERS, context.container_id);
    let declared = environment::declared(pod, container, context)?;
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(
            RootBuilder::default()
                .path(PathBuf::from(root))
                .readonly(container.security.read_only_root)
                .build()?,
        )
        .process(process(pod, container, &image, &declared)?)
        .mounts(mounts::mounts(pod, container, context.container_id, &declared)?)
        .linux(linux(container)?)
        .build()?;
    // The builder sets a host name, but the pod's is set once for all of its containers.
    spec.set_hostname(None);
    spec.set_annotations(None);
    Ok(spec)
}

fn process(
    pod: &PodSpec,
    container: &ContainerSpec,
    image: &Config,
    declared: &environment::Declared,
) -> Result<Process, SpecError> {
    let args = arguments(container, image, declared)?;
    let env = environment::complete(pod, container.tty, image, declared)?;
    Ok(ProcessBuilder::default()
        .terminal(container.tty)
        .user(user::user(pod, container, image.user().as_deref().unwrap_or_default())?)
        .args(args)
        .env(env)
        .cwd(working_dir(container, image))
        .capabilities(capability::sets(&container.security)?)
        .rlimits(vec![open_files()?])
        .no_new_privileges(!container.security.allow_privilege_escalation)
        .oom_score_adj(limits::oom_score_adj(pod, container))
        .build()?)
}

fn open_files() -> Result<PosixRlimit, OciSpecError> {
    let (soft, hard) = RLIMIT_NOFILE;
    PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).soft(soft).hard(hard).build()
}

/// What to run. A command of the container replaces the image's entrypoint and arguments, arguments
/// of the container replace only the image's arguments.
fn arguments(
    container: &ContainerSpec,
    image: &Config,
    declared: &environment::Declared,
) -> Result<Vec<String>, SpecError> {
    let of_image = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let command = declared.expand_all("command", &container.command)?;
    let args = declared.expand_all("args", &container.args)?;
    let mut all = match (command.is_empty(), args.is_empty()) {
        (true, true) => [of_image(image.entrypoint()), of_image(image.cmd())].concat(),
        (true, false) => of_image(image.entrypoint()),
        (false, _) => command,
    };
    all.extend(args);
    if all.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    Ok(all)
}

/// The container's working directory, or the image's, or the root. An image's is relative to the
/// root if it is relative.
fn working_dir(container: &ContainerSpec, image: &Config) -> PathBuf {
    let of_image = image.working_dir().as_deref().unwrap_or_default();
    PathBuf::from("/").join(container.working_dir.as_deref().unwrap_or(of_image))
}

fn linux(container: &ContainerSpec) -> Result<Linux, SpecError> {
    // Network, IPC and host name are the virtual machine's: there is one pod in it.
    let own = [LinuxNamespaceType::Mount, LinuxNamespaceType::Pid, LinuxNamespaceType::Cgroup];
    let namespaces = own
        .into_iter()
        .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
        .collect::<Result<Vec<_>, _>>()?;
    let security = &container.security;
    let masks_proc = !security.privileged && security.proc_mount == ProcMount::Default;
    let paths = |list: &[&str]| {
        let list = if masks_proc { list } else { &[] };
        list.iter().map(|&path| path.to_owned()).collect::<Vec<_>>()
    };
    let mut builder = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(limits::resources(container)?)
        .masked_paths(paths(mounts::MASKED_PATHS))
        .readonly_paths(paths(mounts::READONLY_PATHS));
    if let Some(propagation) = mounts::of_root(container) {
        builder = builder.rootfs_propagation(propagation);
    }
    if security.privileged {
        builder = builder.devices(mounts::privileged_devices()?);
    }
    Ok(builder.build()?)
}

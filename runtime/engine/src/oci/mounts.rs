//! The mounts and device nodes of a container: those of containerd's CRI plugin.

use std::path::PathBuf;

use husk_proto::guest;
use oci_spec::OciSpecError;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Mount, MountBuilder};

use super::SpecError;
use super::environment::Declared;
use super::expansion::TooLong;
use crate::types::{ContainerSpec, MountPropagation, PodSpec, SubPath, VolumeMount, VolumeSource};

/// Why a part of a volume cannot be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubPathError {
    /// A variable that the container does not declare.
    #[error("{mount_path}: subPathExpr {expr:?}: there is no variable {variable}")]
    NoVariable {
        /// Where it is mounted.
        mount_path: String,
        /// The expression.
        expr: String,
        /// The variable.
        variable: String,
    },
    /// It would lead out of the volume.
    #[error(
        "{mount_path}: subPathExpr {expr:?} becomes {path:?}: it must be relative, without .. and NUL \
         bytes"
    )]
    Outside {
        /// Where it is mounted.
        mount_path: String,
        /// The expression.
        expr: String,
        /// What it becomes.
        path: String,
    },
    /// It is longer than any path.
    #[error("{mount_path}: subPathExpr {expr:?} becomes too long for a path")]
    TooLong {
        /// Where it is mounted.
        mount_path: String,
        /// The expression.
        expr: String,
    },
}

/// Longest path in bytes (PATH_MAX, which counts a NUL byte).
const MAX_PATH: usize = 4095;

/// Hidden unless `procMount: Unmasked` or privileged.
pub(super) const MASKED_PATHS: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Read-only unless `procMount: Unmasked` or privileged.
pub(super) const READONLY_PATHS: &[&str] =
    &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Files of the pod that every container sees, and where.
const POD_FILES: &[&str] = &["hostname", "hosts", "resolv.conf"];

/// All mounts of a container, in the order in which they are made: what lies below another mount
/// comes after it.
pub(super) fn mounts(
    pod: &PodSpec,
    container: &ContainerSpec,
    id: &str,
    declared: &Declared,
) -> Result<Vec<Mount>, SpecError> {
    let mut mounts = systems(container.security.privileged)?;
    // Kubernetes: files of the pod may be written unless the root is read-only; a volume that the
    // container mounts at the same place wins.
    let file_access = if container.security.read_only_root { "ro" } else { "rw" };
    for file in POD_FILES {
        let destination = format!("/etc/{file}");
        if container.volume_mounts.iter().all(|mount| mount.mount_path != destination) {
            let source = format!("{}/{file}", guest::ETC);
            mounts.push(bind(&destination, &source, &[file_access])?);
        }
    }
    let last_words = format!("{}/{id}/{}", guest::CONTAINERS, guest::TERMINATION_LOG);
    mounts.push(bind(&container.termination_message.path, &last_words, &["rw"])?);
    for mount in &container.volume_mounts {
        // A volume takes the place of what is mounted there by default, e.g. /dev/shm.
        mounts.retain(|other| other.destination().as_os_str() != mount.mount_path.as_str());
        mounts.push(volume(pod, mount, declared)?);
    }
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

/// The mount of a volume.
fn volume(pod: &PodSpec, mount: &VolumeMount, declared: &Declared) -> Result<Mount, SpecError> {
    let VolumeMount { volume, mount_path, read_only, recursive_read_only, sub_path, propagation } =
        mount;
    let mut source = format!("{}/{volume}", guest::VOLUMES);
    let part = match sub_path {
        None => None,
        Some(SubPath::Path(path)) => Some(path.clone()),
        Some(SubPath::Expr(expr)) => Some(expand(mount_path, expr, declared)?),
    };
    if let Some(part) = part.filter(|part| !part.is_empty()) {
        source = format!("{source}/{part}");
    }
    let is_files = |source: &VolumeSource| matches!(source, VolumeSource::Files(_));
    let only_files = pod.volumes.iter().any(|v| v.name == *volume && is_files(&v.source));
    let access = match (*read_only || only_files, recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    Ok(system(mount_path, "bind", &source, &["rbind", option(*propagation), access])?)
}

fn option(propagation: MountPropagation) -> &'static str {
    match propagation {
        MountPropagation::None => "rprivate",
        MountPropagation::HostToContainer => "rslave",
        MountPropagation::Bidirectional => "rshared",
    }
}

/// How mounts in a container's root spread, so that those in its volumes can as they should; `None`
/// if none does. As of containerd's CRI plugin.
pub(super) fn of_root(container: &ContainerSpec) -> Option<&'static str> {
    let mounts = &container.volume_mounts;
    [MountPropagation::Bidirectional, MountPropagation::HostToContainer]
        .into_iter()
        .find(|wanted| mounts.iter().any(|mount| mount.propagation == *wanted))
        .map(option)
}

/// A `subPathExpr` as the kubelet expands it: with the variables that the pod declares, which must be
/// there.
fn expand(mount_path: &str, expr: &str, declared: &Declared) -> Result<String, SubPathError> {
    let (mount_path, expr) = (mount_path.to_owned(), expr.to_owned());
    let path = match declared.expand_known(&expr) {
        Ok(Ok(path)) if path.len() <= MAX_PATH => path,
        Ok(Ok(_) | Err(TooLong)) => return Err(SubPathError::TooLong { mount_path, expr }),
        Err(variable) => return Err(SubPathError::NoVariable { mount_path, expr, variable }),
    };
    let leads_out =
        path.starts_with('/') || path.contains('\0') || path.split('/').any(|part| part == "..");
    if leads_out { Err(SubPathError::Outside { mount_path, expr, path }) } else { Ok(path) }
}

/// The kernel's file systems and the pod's shared memory, as every container sees them.
fn systems(privileged: bool) -> Result<Vec<Mount>, OciSpecError> {
    let kernel_access = if privileged { "rw" } else { "ro" };
    let hidden = ["nosuid", "noexec", "nodev"];
    Ok(vec![
        system("/proc", "proc", "proc", &hidden)?,
        system("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        system(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        system("/dev/mqueue", "mqueue", "mqueue", &hidden)?,
        system("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", kernel_access])?,
        system(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", kernel_access],
        )?,
        bind("/dev/shm", guest::SHM, &["rw", "nosuid", "noexec", "nodev"])?,
    ])
}

/// The mounts of a debug container: what a privileged container has, and the guest's own root with
/// all that is mounted in it.
pub(super) fn debug() -> Result<Vec<Mount>, OciSpecError> {
    // First, so that it does not hold the container's other mounts once more. A slave: what is mounted
    // in the debug container does not show up in the guest.
    let mut mounts =
        vec![system(super::debug::GUEST_ROOT, "bind", "/", &["rbind", "rslave", "rw"])?];
    mounts.extend(systems(true)?);
    for file in POD_FILES {
        mounts.push(bind(&format!("/etc/{file}"), &format!("{}/{file}", guest::ETC), &["rw"])?);
    }
    Ok(mounts)
}

/// The mount of a disk's file system, which is at `source` in the guest.
pub(crate) fn disk_mount(
    destination: &str,
    source: &str,
    read_only: bool,
) -> Result<Mount, OciSpecError> {
    bind(destination, source, &[if read_only { "ro" } else { "rw" }])
}

fn system(
    destination: &str,
    typ: &str,
    source: &str,
    options: &[&str],
) -> Result<Mount, OciSpecError> {
    MountBuilder::default()
        .destination(PathBuf::from(destination))
        .typ(typ)
        .source(PathBuf::from(source))
        .options(options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>())
        .build()
}

fn bind(destination: &str, source: &str, options: &[&str]) -> Result<Mount, OciSpecError> {
    system(destination, "bind", source, &[&["rbind", "rprivate"], options].concat())
}

/// Device nodes of a privileged container beside those that every container has: those that tools
/// expect (FUSE, tunnels, loop devices). It may make any other one itself. Numbers:
/// Documentation/admin-guide/devices.txt of Linux.
pub(super) fn privileged_devices() -> Result<Vec<LinuxDevice>, OciSpecError> {
    [
        ("/dev/fuse", 10, 229, 0o666_u32),
        ("/dev/kmsg", 1, 11, 0o644),
        ("/dev/loop-control", 10, 237, 0o660),
        ("/dev/net/tun", 10, 200, 0o666),
    ]
    .into_iter()
    .map(|(path, major, minor, mode)| {
        LinuxDeviceBuilder::default()
            .path(PathBuf::from(path))
            .typ(LinuxDeviceType::C)
            .major(major)
            .minor(minor)
            .file_mode(mode)
            .uid(0_u32)
            .gid(0_u32)
            .build()
    })
    .collect()
}

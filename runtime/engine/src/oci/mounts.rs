//! The mounts and device nodes of a container: those of containerd's CRI plugin.

use std::path::PathBuf;

use husk_proto::guest;
use oci_spec::OciSpecError;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Mount, MountBuilder};

use crate::types::{ContainerSpec, PodSpec, VolumeMount, VolumeSource};

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
) -> Result<Vec<Mount>, OciSpecError> {
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
    for VolumeMount { volume, mount_path, read_only, sub_path } in &container.volume_mounts {
        // A volume takes the place of what is mounted there by default, e.g. /dev/shm.
        mounts.retain(|other| other.destination().as_os_str() != mount_path.as_str());
        let mut source = format!("{}/{volume}", guest::VOLUMES);
        if let Some(sub_path) = sub_path {
            source = format!("{source}/{sub_path}");
        }
        let only_files = pod
            .volumes
            .iter()
            .any(|other| other.name == *volume && matches!(other.source, VolumeSource::Files(_)));
        let access = if *read_only || only_files { "ro" } else { "rw" };
        mounts.push(bind(mount_path, &source, &[access])?);
    }
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
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

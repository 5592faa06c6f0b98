//! From the kernel's first call to a usable guest.

use std::fs;
use std::io;

use husk_proto::guest;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use crate::cgroup;
use crate::container::rootfs;
use crate::host::Host;
use crate::sys;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
#[error("boot: {step}")]
pub(crate) struct BootError {
    step: String,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> BootError {
    let step = step.to_owned();
    move |source| BootError { step, source: source.into() }
}

/// What is mounted, in this order: target, type, flags, options. All of it is small or virtual.
const MOUNTS: [(&str, &str, MountFlags, &str); 8] = [
    ("/proc", "proc", HARMLESS, ""),
    ("/sys", "sysfs", HARMLESS, ""),
    ("/dev", "devtmpfs", MountFlags::NOSUID.union(MountFlags::NOEXEC), "mode=0755"),
    (
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        "gid=5,mode=0620,ptmxmode=0666",
    ),
    ("/dev/mqueue", "mqueue", HARMLESS, ""),
    ("/run", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=0755"),
    ("/tmp", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=1777"),
    ("/sys/fs/cgroup", "cgroup2", HARMLESS, cgroup::MOUNT_OPTIONS),
];

const HARMLESS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounts what a guest needs, and brings up its cgroups and its loopback interface. Linear; the
/// order matters.
///
/// # Errors
/// [`BootError`] naming the step: the guest is of no use then.
pub(crate) fn run(host: &Host) -> Result<(), BootError> {
    leave_initramfs()?;
    for (target, fstype, flags, options) in MOUNTS {
        fs::create_dir_all(target).map_err(failed(target))?;
        let data = std::ffi::CString::new(options).map_err(failed(target))?;
        let data = (!options.is_empty()).then_some(data.as_c_str());
        rustix::mount::mount(fstype, target, fstype, flags, data)
            .map_err(failed(&format!("mount {target}")))?;
    }
    for directory in [guest::FILESYSTEMS, guest::VOLUMES, guest::CONTAINERS] {
        fs::create_dir_all(directory).map_err(failed(directory))?;
    }
    // A mount of its own, so that a container can make it private without touching the rest.
    bind_to_itself(guest::CONTAINERS).map_err(failed(guest::CONTAINERS))?;

    // The agent is never what the kernel kills for memory; its children change that for themselves.
    match fs::write("/proc/self/oom_score_adj", "-1000") {
        // A test's machine may withhold the capability (CAP_SYS_RESOURCE); a guest never does.
        Err(e) if matches!(host, Host::Test(_)) && e.kind() == io::ErrorKind::PermissionDenied => {}
        result => result.map_err(failed("oom_score_adj"))?,
    }
    raise_descriptors();
    cgroup::set_up().map_err(|e| failed("cgroups")(io::Error::other(crate::chain(&e))))?;
    sys::loopback_up().map_err(failed("bring the loopback interface up"))?;
    Ok(())
}

/// Lets the agent have a descriptor for each stream of each process. The kernel's first process may
/// have 1024 only.
fn raise_descriptors() {
    const MOST: u64 = 512 * 1024;
    let limit = |value| Rlimit { current: Some(value), maximum: Some(value) };
    if rustix::process::setrlimit(Resource::Nofile, limit(MOST)).is_err() {
        // In a test, without the capability: what is allowed.
        let allowed = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(MOST);
        if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit(allowed)) {
            tracing::warn!(%error, "few descriptors");
        }
    }
}

/// Makes an empty tmpfs the root. The initramfs cannot be a root that a container's process leaves
/// by pivot_root, because it is mounted on nothing. The agent's file stays where it is: its pages
/// are in use anyhow.
fn leave_initramfs() -> Result<(), BootError> {
    let step = "make the root";
    let root = rootfs::new_filesystem("tmpfs", "root", &[("mode".into(), Some("0755".into()))], 0)
        .map_err(failed(step))?;
    let old = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed(step))?;
    use std::os::fd::AsFd;
    rootfs::attach(root.as_fd(), old.as_fd()).map_err(failed(step))?;
    rustix::process::fchdir(&root).map_err(failed(step))?;
    rustix::process::chroot(".").map_err(failed(step))?;
    // Bidirectional propagation of volumes needs shared mounts; everything else starts private.
    rootfs::set_propagation("/", libc::MS_PRIVATE, false).map_err(failed(step))
}

/// Makes a directory a mount of itself.
pub(crate) fn bind_to_itself(path: &str) -> io::Result<()> {
    Ok(rustix::mount::mount_bind(path, path)?)
}

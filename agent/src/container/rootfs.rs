//! The container's view of the file system, made inside its new mount namespace.
//!
//! Everything is mounted by descriptors (fsopen, open_tree, move_mount), onto targets that are
//! resolved inside the container's root. The overlay is mounted here and not in the agent's own
//! namespace, so that it is gone with the container's last process: there is nothing to leak.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_proto::guest;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::mounting;
use super::mounts::{Kind, MountPlan};
use super::path::{self, Make};
use super::plan::{ContainerPlan, DeviceNode};
use super::process::{StepError, step};
use crate::sys::{self, MountAttr};

/// The layers of a container's root, as paths of the guest.
#[derive(Debug, Clone)]
pub(crate) struct Overlay {
    /// The lowest first.
    pub(crate) lower: Vec<String>,
    pub(crate) upper: String,
    pub(crate) work: String,
    /// Where it is mounted.
    pub(crate) target: String,
}

/// Nodes that every container has in /dev: name, major, minor (the specification, "Default
/// Devices"). All 0666.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Links that every container has in /dev.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the container's root with all its mounts. The process's root is still the agent's
/// afterwards: [`enter`] changes that.
pub(crate) fn make(plan: &ContainerPlan, overlay: &Overlay) -> Result<OwnedFd, StepError> {
    // Nothing that is mounted here may show up in the agent's namespace, except what the
    // specification asks to be shared.
    let (kind, recursive) = match plan.propagation {
        // What is unbindable could not be bound below either: the root becomes so at last.
        Some((libc::MS_UNBINDABLE, recursive)) => (libc::MS_PRIVATE, recursive),
        Some(given) => given,
        None => (libc::MS_SLAVE, true),
    };
    set_propagation("/", kind, recursive).map_err(step("rootfsPropagation"))?;
    set_propagation(guest::CONTAINERS, libc::MS_PRIVATE, false)
        .map_err(step("make the parent of the root private"))?;

    let root = mount_overlay(overlay)?;
    let mut read_only_later = Vec::new();
    for (index, mount) in plan.mounts.iter().enumerate() {
        let fd = mounting::perform(root.as_fd(), mount).map_err(|source| StepError {
            step: format!("mounts[{index}]: {}", describe(mount)),
            source,
        })?;
        let is_new = !matches!(mount.kind, Kind::Bind { .. });
        if is_new && mount.attr.set & libc::MOUNT_ATTR_RDONLY != 0 {
            read_only_later.push((index, fd));
        }
    }
    let bound_dev =
        plan.mounts.iter().any(|m| m.destination == "/dev" && matches!(m.kind, Kind::Bind { .. }));
    if !bound_dev {
        make_devices(root.as_fd()).map_err(step("make the default devices"))?;
    }
    for device in &plan.devices {
        make_device(root.as_fd(), device)
            .map_err(step(format!("linux.devices: {}", device.path)))?;
    }
    path::open_or_make(
        root.as_fd(),
        &plan.process.cwd,
        Make::Directory,
        Mode::from_raw_mode(0o755),
    )
    .map_err(step(format!("process.cwd: make {:?}", plan.process.cwd)))?;
    // Only now: later mounts may have needed a directory in them.
    for (index, fd) in read_only_later {
        let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        sys::mount_setattr(fd.as_fd(), false, attr)
            .map_err(step(format!("mounts[{index}]: make read-only")))?;
    }
    for path in &plan.readonly_paths {
        read_only(root.as_fd(), path).map_err(step(format!("linux.readonlyPaths: {path}")))?;
    }
    for path in &plan.masked_paths {
        mask(root.as_fd(), path).map_err(step(format!("linux.maskedPaths: {path}")))?;
    }
    Ok(root)
}

/// Makes `root` the root of this process and its namespace, and lets go of the agent's.
pub(crate) fn enter(root: &OwnedFd, plan: &ContainerPlan) -> Result<(), StepError> {
    let old =
        rustix::fs::open("/", OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(step("open the agent's root"))?;
    rustix::process::fchdir(root).map_err(step("enter the root"))?;
    // Both arguments the same: the old root is stacked under the new one, and no directory for it
    // is needed in the container.
    rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
    rustix::process::fchdir(&old).map_err(step("enter the old root"))?;
    // What is unmounted here must not be unmounted in the agent's namespace.
    set_propagation(".", libc::MS_SLAVE, true).map_err(step("make the old root a slave"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("unmount the old root"))?;
    rustix::process::chdir("/").map_err(step("enter the root"))?;
    if plan.read_only_root {
        let root = open_path("/").map_err(step("open the root"))?;
        let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        sys::mount_setattr(root.as_fd(), false, attr).map_err(step("root.readonly"))?;
    }
    if let Some((kind, recursive)) = plan.propagation {
        set_propagation("/", kind, recursive).map_err(step("rootfsPropagation"))?;
    }
    Ok(())
}

/// What a mount is, for an error.
fn describe(mount: &MountPlan) -> String {
    match &mount.kind {
        Kind::Bind { source, .. } => format!("bind {source} to {}", mount.destination),
        Kind::Overlay { .. } => format!("overlay on {}", mount.destination),
        Kind::Tmpfs { .. } => format!("tmpfs on {}", mount.destination),
        Kind::New { fstype, .. } => format!("{fstype} on {}", mount.destination),
    }
}

/// Opens (O_PATH) a path of the guest.
pub(super) fn open_path(path: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Changes how mounts and unmounts at `path` spread to and from its peers.
pub(crate) fn set_propagation(path: &str, kind: u64, recursive: bool) -> io::Result<()> {
    let fd = open_path(path)?;
    let attr = MountAttr { propagation: kind, ..MountAttr::default() };
    sys::mount_setattr(fd.as_fd(), recursive, attr)
}

/// A new file system of a type, with its options, as a mount that is attached nowhere yet.
pub(crate) fn new_filesystem(
    fstype: &str,
    source: &str,
    options: &[(String, Option<String>)],
    flags: u64,
) -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || -> rustix::io::Result<()> {
        rustix::mount::fsconfig_set_string(&fs, "source", source)?;
        for (key, value) in options {
            match value {
                Some(value) => {
                    rustix::mount::fsconfig_set_string(&fs, key.as_str(), value.as_str())?
                }
                None => rustix::mount::fsconfig_set_flag(&fs, key.as_str())?,
            }
        }
        rustix::mount::fsconfig_create(&fs)
    };
    if let Err(error) = configure() {
        return Err(with_kernel_words(fs, error.into()));
    }
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(flags).unwrap_or(u32::MAX));
    Ok(rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Adds to an error what the file system has to say about it: the messages that it left in its
/// configuration descriptor.
fn with_kernel_words(fs: OwnedFd, error: io::Error) -> io::Error {
    let mut words = String::new();
    let mut file = std::fs::File::from(fs);
    let mut buffer = [0_u8; 512];
    // At most eight messages are kept by the kernel; no message left is an error (ENODATA).
    for _ in 0..8 {
        let Ok(count) = file.read(&mut buffer) else { break };
        let message = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default());
        // "e " before an error, "w " before a warning.
        words.push_str(message.trim().get(2..).unwrap_or_default());
        words.push_str("; ");
    }
    if words.is_empty() {
        return error;
    }
    io::Error::new(error.kind(), format!("{}: {error}", words.trim_end_matches("; ")))
}

/// Attaches a mount to a place.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", target, "", flags)
}

/// Mounts the container's root and returns it.
fn mount_overlay(overlay: &Overlay) -> Result<OwnedFd, StepError> {
    let option = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    // The kernel wants the uppermost first.
    let mut options: Vec<_> = overlay.lower.iter().rev().map(|l| option("lowerdir+", l)).collect();
    options.push(option("upperdir", &overlay.upper));
    options.push(option("workdir", &overlay.work));
    // The writable layer dies with the VM, so that there is no crash to be safe from: no sync of a
    // program needs to reach the disk. (A crashed volatile overlay must not be mounted again, and
    // is not: every container gets a new upper directory.)
    options.push(("volatile".to_owned(), None));
    let mount = new_filesystem("overlay", "overlay", &options, 0)
        .map_err(step("mount the root's overlay"))?;
    let target = open_path(&overlay.target).map_err(step("open the root's mount point"))?;
    attach(mount.as_fd(), target.as_fd()).map_err(step("attach the root's overlay"))?;
    Ok(mount)
}

/// Makes the nodes and links that every container has in /dev.
fn make_devices(root: BorrowedFd<'_>) -> io::Result<()> {
    let dev = path::open_or_make(root, "/dev", Make::Directory, Mode::from_raw_mode(0o755))?;
    for (name, major, minor) in DEVICES {
        make_node(dev.as_fd(), name, FileType::CharacterDevice, 0o666, (major, minor))?;
    }
    for (name, target) in LINKS {
        match rustix::fs::symlinkat(target, &dev, name) {
            Err(rustix::io::Errno::EXIST) if name == "ptmx" => {
                // An image's own node would lead to the agent's pseudo-terminals.
                rustix::fs::unlinkat(&dev, name, AtFlags::empty())?;
                rustix::fs::symlinkat(target, &dev, name)?;
            }
            Err(rustix::io::Errno::EXIST) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Makes one node with exactly this mode; one that exists stays.
fn make_node(
    directory: BorrowedFd<'_>,
    name: &str,
    kind: FileType,
    permissions: u32,
    (major, minor): (u32, u32),
) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(permissions);
    match rustix::fs::mknodat(directory, name, kind, mode, rustix::fs::makedev(major, minor)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => {
            result?;
            rustix::fs::chmodat(directory, name, mode, AtFlags::empty())
        }
    }
}

/// Makes a node of `linux.devices`.
fn make_device(root: BorrowedFd<'_>, device: &DeviceNode) -> io::Result<()> {
    let (parent, name) = device.path.rsplit_once('/').ok_or(io::ErrorKind::InvalidInput)?;
    let parent = path::open_or_make(root, parent, Make::Directory, Mode::from_raw_mode(0o755))?;
    let kind = FileType::from_raw_mode(device.mode);
    let numbers = (device.major, device.minor);
    make_node(parent.as_fd(), name, kind, device.mode & 0o7777, numbers)?;
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    if kind == FileType::BlockDevice {
        // What is meant for a disk must not go into a file that the image has there.
        let found = rustix::fs::statat(&parent, name, nofollow)?;
        let device = rustix::fs::makedev(device.major, device.minor);
        if FileType::from_raw_mode(found.st_mode) != kind || found.st_rdev != device {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else"));
        }
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    Ok(rustix::fs::chownat(&parent, name, Some(uid), Some(gid), nofollow)?)
}

/// Opens a path that need not exist.
fn open_if_there(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match path::open(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Makes a path, and all below it, read-only.
fn read_only(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let Some(target) = open_if_there(root, path)? else { return Ok(()) };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = rustix::mount::open_tree(&target, "", flags)?;
    let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
    sys::mount_setattr(copy.as_fd(), true, attr)?;
    Ok(attach(copy.as_fd(), target.as_fd())?)
}

/// Hides a path: a directory becomes empty, a file becomes /dev/null.
fn mask(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let Some(target) = open_if_there(root, path)? else { return Ok(()) };
    let mode = rustix::fs::fstat(&target)?.st_mode;
    let cover = if FileType::from_raw_mode(mode) == FileType::Directory {
        let options = [("nr_inodes".to_owned(), Some("1".to_owned()))];
        new_filesystem("tmpfs", "tmpfs", &options, libc::MOUNT_ATTR_RDONLY)?
    } else {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        rustix::mount::open_tree(CWD, "/dev/null", flags)?
    };
    Ok(attach(cover.as_fd(), target.as_fd())?)
}

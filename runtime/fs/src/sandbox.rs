//! The mount namespace of this process: a root directory with an entry for each share, and nothing
//! else of the host.
//!
//! ```text
//!   /          tmpfs, read-only
//!   ├── 0      share 0: a copy of its mount, with what is mounted below it
//!   ├── 1      share 1, read-only if it is to be: then also against this process
//!   └── ...
//! ```
//! Symbolic links that the library would follow, and there should be none, end here as well.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, mknodat, open, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A share as it arrived.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Opened with `O_PATH`.
    pub(crate) path: OwnedFd,
    /// Whether nobody may write.
    pub(crate) read_only: bool,
}

/// What the library needs of `/proc`, which is not in the namespace.
#[derive(Debug)]
pub(crate) struct Proc {
    /// `/proc/self/fd`, as the root of a mount: no way leads up from it.
    pub(crate) descriptors: File,
    /// `/proc/self/mountinfo`, of the namespace.
    pub(crate) mountinfo: File,
}

/// The namespace cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// A step failed.
    #[error("cannot {step}")]
    Step {
        /// The step, as an infinitive.
        step: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A share could not be mounted.
    #[error("cannot {step} share {number}")]
    Share {
        /// The step, as an infinitive.
        step: &'static str,
        /// The share.
        number: usize,
        /// Why.
        #[source]
        source: Errno,
    },
}

fn failed(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Step { step, source }
}

/// Moves this process, which has one thread, into a namespace with these shares.
///
/// The order matters. The shares are copied while this process is in the namespace of the host, where
/// their descriptors come from. Afterwards nothing of what is mounted may spread to the host.
pub(crate) fn enter(shares: &[Shared]) -> Result<Proc, SandboxError> {
    let copies = shares
        .iter()
        .enumerate()
        .map(|(number, share)| copy(number, share))
        .collect::<Result<Vec<_>, _>>()?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let this = open("/proc/self", directory, Mode::empty()).map_err(failed("open /proc/self"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors =
        open_tree(&this, "fd", flags).map_err(failed("copy the mount of /proc/self/fd"))?;

    // SAFETY: only the mount namespace is unshared: descriptors stay as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(failed("make a mount namespace; husk-fs has to be started by root"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("keep mounts from spreading to the host"))?;
    let root = empty_root().map_err(failed("mount an empty root directory"))?;
    for (number, (share, copy)) in shares.iter().zip(&copies).enumerate() {
        attach(&root, number, &share.path, copy.as_fd())?;
    }
    change_root(&root).map_err(failed("change the root directory"))?;
    set_attributes(root.as_fd(), MOUNT_ATTR_RDONLY, false)
        .map_err(failed("make the root directory read-only"))?;

    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let mountinfo =
        openat(&this, "mountinfo", read, Mode::empty()).map_err(failed("open mountinfo"))?;
    Ok(Proc { descriptors: descriptors.into(), mountinfo: mountinfo.into() })
}

/// A copy of a share's mount, which is nowhere yet, with all that is mounted below it.
fn copy(number: usize, share: &Shared) -> Result<OwnedFd, SandboxError> {
    let failed = |step| move |source| SandboxError::Share { step, number, source };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let copy = open_tree(&share.path, "", flags).map_err(failed("copy the mount of"))?;
    // What the guest may execute or open as a device is the guest's business: here nothing is.
    let mut attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    if share.read_only {
        attributes |= MOUNT_ATTR_RDONLY;
    }
    set_attributes(copy.as_fd(), attributes, true).map_err(failed("restrict"))?;
    Ok(copy)
}

/// Mounts a copy as the entry of its number.
fn attach(
    root: &OwnedFd,
    number: usize,
    path: &OwnedFd,
    copy: BorrowedFd<'_>,
) -> Result<(), SandboxError> {
    let failed = |step| move |source| SandboxError::Share { step, number, source };
    let name = number.to_string();
    let kind = fstat(path).map_err(failed("look at"))?.st_mode;
    // A mount point is a directory or not, as what is mounted is.
    let made = match FileType::from_raw_mode(kind) {
        FileType::Directory => mkdirat(root, &name, Mode::RWXU),
        _ => mknodat(root, &name, FileType::RegularFile, Mode::RUSR, 0),
    };
    made.map_err(failed("make an entry for"))?;
    move_mount(copy, "", root, &name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("mount"))
}

/// A new tmpfs, mounted over `/proc`: any directory does that is there on every Linux.
fn empty_root() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Entries for shares, and no more.
    for (key, value) in [("size", "64k"), ("nr_inodes", "256"), ("mode", "0755")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(root.as_fd(), "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(root)
}

fn change_root(root: &OwnedFd) -> Result<(), Errno> {
    fchdir(root)?;
    // The old root lies over the new one afterwards, and is taken away.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

// Linux: include/uapi/linux/mount.h.
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;

/// `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Adds attributes to a mount, and to those below it; and has it take no part in what is mounted
/// elsewhere.
fn set_attributes(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> Result<(), Errno> {
    let attr = MountAttr { set, clear: 0, propagation: libc::MS_PRIVATE, user_namespace: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string, `attr` is a struct mount_attr of the size that is said, and both
    // live for the whole call, which changes neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}

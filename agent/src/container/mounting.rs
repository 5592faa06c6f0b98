//! Performs one mount of the specification: made by descriptor, attached to what its destination
//! leads to inside the container's root.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use husk_proto::guest;
use rustix::fs::{CWD, FileType, Gid, Mode, Uid};
use rustix::mount::OpenTreeFlags;

use super::copy_up;
use super::id_map;
use super::mounts::{Kind, MountPlan, Options};
use super::path::{self, Make};
use super::rootfs::{attach, new_filesystem, open_path};
use crate::sys::{self, MountAttr};

/// `PROC_SUPER_MAGIC` of linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;

/// Files of /proc that a bind mount may replace: those of lxcfs and of a faked FIPS mode, as in runc.
const REPLACEABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// What is to be attached.
struct Made {
    fd: OwnedFd,
    /// What it can be attached to.
    onto: Make,
    /// Sources of an overlay, which must stay open until it is attached.
    _sources: Vec<OwnedFd>,
}

/// Performs one mount of the specification and returns it.
pub(super) fn perform(root: BorrowedFd<'_>, mount: &MountPlan) -> io::Result<OwnedFd> {
    let Made { fd, onto, _sources } = make(root, mount)?;
    if matches!(mount.kind, Kind::Bind { .. }) && mount.attr != MountAttr::default() {
        sys::mount_setattr(fd.as_fd(), false, mount.attr)?;
    }
    if mount.recursive_attr != MountAttr::default() {
        sys::mount_setattr(fd.as_fd(), true, mount.recursive_attr)?;
    }
    if let Some(map) = &mount.id_map {
        id_map::apply(fd.as_fd(), map)?;
    }
    let target = path::open_or_make(root, &mount.destination, onto, Mode::from_raw_mode(0o755))?;
    check_target(target.as_fd(), mount)?;
    attach(fd.as_fd(), target.as_fd())?;
    // Attaching may have changed it, so that it comes last. Private by default, as containerd asks.
    let default = [(libc::MS_PRIVATE, true)];
    let given = mount.propagation.as_slice();
    for &(propagation, recursive) in if given.is_empty() { &default } else { given } {
        let attr = MountAttr { propagation, ..MountAttr::default() };
        sys::mount_setattr(fd.as_fd(), recursive, attr)?;
    }
    Ok(fd)
}

/// Makes the mount, attached nowhere yet.
fn make(root: BorrowedFd<'_>, mount: &MountPlan) -> io::Result<Made> {
    // Read-only comes later: later mounts may need a directory in it.
    let flags = mount.attr.set & !libc::MOUNT_ATTR_RDONLY;
    let mut sources = Vec::new();
    let mut onto = Make::Directory;
    let fd = match &mount.kind {
        Kind::Bind { source, recursive } => {
            let fd = bind_source(source, *recursive)?;
            let mode = rustix::fs::fstat(&fd)?.st_mode;
            if FileType::from_raw_mode(mode) != FileType::Directory {
                onto = Make::File;
            }
            fd
        }
        Kind::Overlay { directories, options } => {
            let mut all = Vec::with_capacity(directories.len() + options.len());
            for (key, path) in directories {
                // A path below a volume would be followed by the kernel wherever it leads.
                let path = match open_in_volume(path)? {
                    None => path.clone(),
                    Some(fd) => {
                        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                        sources.push(fd);
                        path
                    }
                };
                all.push(((*key).to_owned(), Some(path)));
            }
            all.extend_from_slice(options);
            new_filesystem("overlay", "overlay", &all, flags)?
        }
        Kind::Tmpfs { source, options, copy_up } => {
            tmpfs(root, mount, (source, options), *copy_up, flags)?
        }
        Kind::New { fstype, source, options } => new_filesystem(fstype, source, options, flags)?,
    };
    Ok(Made { fd, onto, _sources: sources })
}

/// Nothing may hide what /proc says: programs, and the masking of its paths, rely on it.
fn check_target(target: BorrowedFd<'_>, mount: &MountPlan) -> io::Result<()> {
    let on_proc = u64::try_from(rustix::fs::fstatfs(target)?.f_type) == Ok(PROC_MAGIC);
    let destination = mount.destination.trim_end_matches('/');
    let may = match &mount.kind {
        Kind::Bind { .. } => destination == "/proc" || REPLACEABLE.contains(&destination),
        Kind::New { fstype, .. } => *fstype == "proc",
        Kind::Overlay { .. } | Kind::Tmpfs { .. } => false,
    };
    if on_proc && !may {
        return Err(io::Error::other("it is inside /proc"));
    }
    Ok(())
}

/// A new tmpfs. Without a mode of its own it has that of its destination, as in runc; with `copy_up`
/// also what its destination holds.
fn tmpfs(
    root: BorrowedFd<'_>,
    mount: &MountPlan,
    (source, options): (&str, &Options),
    copy_up: bool,
    flags: u64,
) -> io::Result<OwnedFd> {
    let given = |key: &str| options.iter().any(|(k, _)| k == key);
    let fd = new_filesystem("tmpfs", source, options, flags)?;
    let covered = match path::open(root, &mount.destination) {
        Ok(covered) => covered,
        Err(rustix::io::Errno::NOENT) => return Ok(fd),
        Err(error) => return Err(error.into()),
    };
    let stat = rustix::fs::fstat(&covered)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    if copy_up {
        copy_up::copy_tree(covered.as_fd(), fd.as_fd())?;
        let uid = (!given("uid")).then(|| Uid::from_raw(stat.st_uid));
        let gid = (!given("gid")).then(|| Gid::from_raw(stat.st_gid));
        rustix::fs::chownat(&fd, "", uid, gid, rustix::fs::AtFlags::EMPTY_PATH)?;
    }
    if !given("mode") {
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        rustix::fs::chmodat(&fd, ".", mode, rustix::fs::AtFlags::empty())?;
    }
    Ok(fd)
}

/// A copy of the mount at `source`, attached nowhere yet.
fn bind_source(source: &str, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    match open_in_volume(source)? {
        None => Ok(rustix::mount::open_tree(CWD, source, flags)?),
        Some(fd) => Ok(rustix::mount::open_tree(&fd, "", flags | OpenTreeFlags::AT_EMPTY_PATH)?),
    }
}

/// Opens a path below a volume; None if it is not below one.
///
/// It is resolved inside that volume, because containers write there and may have put a link in the
/// way; what is missing of it is made, with the mode of the volume's root (Kubernetes: subPath).
fn open_in_volume(path: &str) -> io::Result<Option<OwnedFd>> {
    let below = path.strip_prefix(guest::VOLUMES).and_then(|s| s.strip_prefix('/'));
    let Some((volume, path)) = below.and_then(|below| below.split_once('/')) else {
        return Ok(None);
    };
    if matches!(volume, "" | "." | "..") {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let volume = open_path(&format!("{}/{volume}", guest::VOLUMES))?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&volume)?.st_mode & 0o7777);
    path::open_or_make(volume.as_fd(), path, Make::Directory, mode).map(Some)
}

//! Copies a directory of an image into a new tmpfs that is to cover it.
//!
//! This runs in the container's new process: what it costs is charged to the container.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

/// Deepest tree that is copied: each level takes two descriptors.
const MAX_DEPTH: usize = 200;

/// Longest list of names, and longest value, of extended attributes (XATTR_LIST_MAX and
/// XATTR_SIZE_MAX of Linux).
const MAX_XATTR: usize = 65_536;

/// A directory that is being copied.
struct Level {
    from: OwnedFd,
    to: OwnedFd,
    /// Names that are still to be copied.
    rest: Vec<CString>,
    /// What the copy is to be given at the end: while it is filled it may have to be writable, and
    /// filling changes its times.
    stat: Stat,
    /// Relative to the root; ends with a slash unless it is the root.
    path: Vec<u8>,
}

/// Copies all that is in the directory `from` into the empty directory `to`: types, owners, modes,
/// times, extended attributes, hard links. Not the directory itself.
///
/// # Errors
/// What the kernel answers, e.g. `ENOSPC`; `ELOOP` for a tree that is too deep.
pub(super) fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let root = rustix::fs::openat(to, c".", DIRECTORY, Mode::empty())?;
    let first = open_directory(from, c".")?;
    let stat = rustix::fs::fstat(&first)?;
    let mut levels = vec![level(
        first,
        rustix::fs::openat(to, c".", DIRECTORY, Mode::empty())?,
        stat,
        Vec::new(),
    )?];
    while let Some(current) = levels.last_mut() {
        let Some(name) = current.rest.pop() else {
            let done = levels.pop();
            if let Some(done) = done.filter(|_| !levels.is_empty()) {
                copy_xattrs(done.from.as_fd(), done.to.as_fd())?;
                finish(done.to.as_fd(), c".", &done.stat, AtFlags::empty())?;
            }
            continue;
        };
        let (from, to) = (current.from.as_fd(), current.to.as_fd());
        let stat = rustix::fs::statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let path = [&current.path, name.to_bytes()].concat();
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            rustix::fs::mkdirat(to, &name, Mode::RWXU)?;
            let below = (open_directory(from, &name)?, open_directory(to, &name)?);
            if levels.len() == MAX_DEPTH {
                return Err(Errno::LOOP.into());
            }
            levels.push(level(below.0, below.1, stat, [&path[..], b"/"].concat())?);
            continue;
        }
        if stat.st_nlink > 1 {
            if let Some(other) = links.get(&(stat.st_dev, stat.st_ino)) {
                rustix::fs::linkat(&root, other.as_slice(), to, &name, AtFlags::empty())?;
                continue;
            }
            links.insert((stat.st_dev, stat.st_ino), path);
        }
        copy_one(from, to, &name, &stat)?;
    }
    Ok(())
}

const DIRECTORY: OFlags =
    OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())
}

fn level(from: OwnedFd, to: OwnedFd, stat: Stat, path: Vec<u8>) -> io::Result<Level> {
    let mut rest = Vec::new();
    for entry in rustix::fs::Dir::read_from(&from)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            rest.push(entry.file_name().to_owned());
        }
    }
    Ok(Level { from, to, rest, stat, path })
}

/// Copies what is no directory.
fn copy_one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::RegularFile => {
            // It may be replaced meanwhile in a volume: by a pipe, which must not be waited for.
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let source = rustix::fs::openat(from, name, flags, Mode::empty())?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let copy = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
            copy_xattrs(source.as_fd(), copy.as_fd())?;
            io::copy(&mut File::from(source), &mut File::from(copy))?;
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target, to, name)?;
        }
        _ => {
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?;
        }
    }
    finish(to, name, stat, AtFlags::SYMLINK_NOFOLLOW)
}

/// Gives a copy the owner, mode and times of what it is a copy of.
fn finish(to: BorrowedFd<'_>, name: &CStr, stat: &Stat, flags: AtFlags) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), flags)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        // After the owner, whose change takes the set-user-ID bit.
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::utimensat(to, name, &times, flags)?)
}

/// Copies extended attributes, as far as a tmpfs has them.
fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0_u8; MAX_XATTR];
    let count = match rustix::fs::flistxattr(from, &mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        count => count?,
    };
    let names = names.get(..count).unwrap_or_default();
    let mut value = vec![0_u8; if names.is_empty() { 0 } else { MAX_XATTR }];
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let length = rustix::fs::fgetxattr(from, name, &mut value)?;
        let value = value.get(..length).unwrap_or_default();
        match rustix::fs::fsetxattr(to, name, value, XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => {}
            result => result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn open(path: &std::path::Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn a_tree_is_copied_with_modes_times_and_links() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("sub/deep")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/file"), "text").unwrap();
        fs::hard_link(from.join("sub/file"), from.join("sub/deep/other")).unwrap();
        symlink("/nowhere", from.join("sub/link")).unwrap();
        rustix::fs::mkfifoat(open(&from), "pipe", Mode::RUSR).unwrap();
        fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("sub"), PermissionsExt::from_mode(0o500)).unwrap();
        copy_tree(open(&from).as_fd(), open(&to).as_fd()).unwrap();
        let copy = fs::metadata(to.join("sub/file")).unwrap();
        let original = fs::metadata(from.join("sub/file")).unwrap();
        assert_eq!(fs::read_to_string(to.join("sub/deep/other")).unwrap(), "text");
        assert_eq!(copy.ino(), fs::metadata(to.join("sub/deep/other")).unwrap().ino());
        assert_eq!(copy.mode(), original.mode());
        assert_eq!((copy.mtime(), copy.mtime_nsec()), (original.mtime(), original.mtime_nsec()));
        assert_eq!(fs::metadata(to.join("sub")).unwrap().mode() & 0o7777, 0o500);
        assert_eq!(fs::read_link(to.join("sub/link")).unwrap().to_str().unwrap(), "/nowhere");
        assert_eq!(
            fs::metadata(to.join("pipe")).unwrap().mode(),
            fs::metadata(from.join("pipe")).unwrap().mode()
        );
    }

    #[test]
    fn a_tree_that_is_too_deep_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("d/".repeat(MAX_DEPTH + 1))).unwrap();
        fs::create_dir(&to).unwrap();
        let error = copy_tree(open(&from).as_fd(), open(&to).as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}

//! Idmapped mounts: files whose owners are shown as others.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{WaitId, WaitIdOptions};

use super::mounts::IdMap;
use super::spec::IdMapping;
use crate::sys::{self, Cloned};

/// Lets a mount that is attached nowhere yet show owners by `map`.
///
/// # Errors
/// What the kernel answers, e.g. `EINVAL` for a file system that cannot be mapped.
pub(super) fn apply(mount: BorrowedFd<'_>, map: &IdMap) -> io::Result<()> {
    let namespace = user_namespace(map)?;
    sys::mount_set_id_map(mount, map.recursive, namespace.as_fd())
}

/// A user namespace of these mappings, which is what the kernel takes them from. It is made by a
/// process that does nothing else.
fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let flag = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    match sys::clone_process(flag, None)? {
        Cloned::Child => loop {
            // Until it is killed: with the container, if its maker dies.
            std::thread::sleep(Duration::from_secs(3600));
        },
        Cloned::Parent { pid: _, pidfd } => {
            let namespace = fill(pidfd.as_fd(), map);
            sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL.unsigned_abs())?;
            rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            namespace
        }
    }
}

/// Writes the mappings of a process's new user namespace, and opens it.
fn fill(pidfd: BorrowedFd<'_>, map: &IdMap) -> io::Result<OwnedFd> {
    // The process's number in the namespace that /proc shows, which need not be this process's.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = info.lines().find_map(|l| l.strip_prefix("Pid:")?.trim().parse::<u32>().ok());
    let pid = pid.ok_or(io::ErrorKind::NotFound)?;
    fs::write(format!("/proc/{pid}/uid_map"), lines(&map.uids))?;
    fs::write(format!("/proc/{pid}/gid_map"), lines(&map.gids))?;
    Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// Mappings as the kernel takes them, in one write.
pub(super) fn lines(mappings: &[IdMapping]) -> String {
    let line = |m: &IdMapping| format!("{} {} {}\n", m.container_id, m.host_id, m.size);
    mappings.iter().map(line).collect()
}

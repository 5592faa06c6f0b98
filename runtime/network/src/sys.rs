//! The system calls that no safe wrapper exists for. The only module here that may be `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where taps are made.
const TUN: &str = "/dev/net/tun";

/// Puts this thread into a new network namespace.
///
/// # Errors
/// `EPERM` without the capability CAP_SYS_ADMIN, and others.
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: a network namespace belongs to the thread; nothing that other threads share with this
    // one (descriptors, memory, file system) is changed by CLONE_NEWNET.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Makes a queue of the tap of this name in the network namespace of this thread, and the tap if it
/// is its first. The tap is gone when its last queue is closed.
///
/// Frames on it have the header of virtio-net before them, in the size that the kernel begins with
/// (10 bytes): who reads them sets what it wants.
///
/// # Errors
/// `ENOENT` without the device, `EBUSY` if there is such an interface and it is in use, and others.
pub(crate) fn open_tap(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let tap = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
    // SAFETY: ifreq is a plain structure for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len().saturating_sub(1);
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap.into())
}

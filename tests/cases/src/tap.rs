//! Taps, for guests without pods: each in a network namespace of the thread that makes it.
#![allow(unsafe_code)] // system calls for which there is no safe wrapper

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// `struct ifreq` as far as TUNSETIFF uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Moves this thread, and those that it starts, to a network namespace of their own.
///
/// # Errors
/// It may not.
pub fn own_network() -> Result<()> {
    // SAFETY: only the calling thread's network namespace changes.
    ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, "{}", last_error());
    ip("link set lo up")
}

fn last_error() -> std::io::Error {
    std::io::Error::last_os_error()
}

/// Runs ip(8) with these arguments.
///
/// # Errors
/// It fails; with its words.
pub fn ip(args: &str) -> Result<()> {
    let output = Command::new("ip").args(args.split(' ')).output().context("cannot run ip")?;
    ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Flags of a tap as husk has it (the kernel's networking/tuntap).
pub const TAP: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A tap with so many queues, which lasts as long as one of them.
///
/// # Errors
/// There is no `/dev/net/tun`, or the name is taken.
pub fn queues(name: &str, queues: usize) -> Result<Vec<OwnedFd>> {
    let flags = if queues > 1 { TAP | libc::IFF_MULTI_QUEUE } else { TAP };
    (0..queues).map(|_| queue(name, flags)).collect()
}

/// Opens one queue of a tap, which is made by the first one, with these flags.
///
/// # Errors
/// As [`queues`].
pub fn queue(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: libc::c_short::try_from(flags)?,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `request` is.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "TUNSETIFF: {}", last_error());
    Ok(file.into())
}

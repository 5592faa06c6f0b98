//! `husk-fs`: serves what a pod shares with its host to the pod's VM, over virtio-fs. Started by a
//! pod's process, not by people; there is none for a pod that shares nothing.
//!
//! What it is for: the guest's requests on files. The work is the virtiofsd library's; what is here
//! is the process around it, in this order: it takes what it serves as descriptors from the socket
//! whose number `--control-fd` says ([`husk_vmm_api::ServeFiles`]), moves into a mount namespace that
//! holds nothing else ([`sandbox`]), limits itself ([`limits`]), gives up what it does not need
//! ([`privilege`], [`seccomp`]), and serves one connection of vhost-user to its end ([`server`]).
//!
//! What it is not for: deciding what is shared. And it trusts the guest in nothing: a request that
//! the library cannot make sense of ends this process, and with it only the pod's shares.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

mod limits;
mod logger;
mod privilege;
mod sandbox;
mod seccomp;
mod server;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_vmm_api::{Channel, ChannelError, MAX_SHARES, ServeFiles};

use self::sandbox::Shared;

const HELP: &str = "\
husk-fs: serves the files that a pod shares with its host; started by husk, not by hand

Usage:
  husk-fs --control-fd N   take what is served from socket N
  husk-fs --version

HUSK_LOG sets the level of the log on standard error: error, warn (default), info, debug, trace.
Exit codes: 0 the VM is gone, 1 failure, 2 usage.";

/// Why nothing is served (any more).
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// What is to be served did not arrive.
    #[error("cannot learn what to serve")]
    Control(#[from] ChannelError),
    /// The pod's process closed the socket.
    #[error("the pod's process is gone")]
    NothingToServe,
    /// More than a VM can have.
    #[error("{shares} shares; there can be {MAX_SHARES}")]
    TooMany { shares: usize },
    /// A limit cannot be set.
    #[error(transparent)]
    Limits(#[from] limits::LimitError),
    /// The namespace cannot be made.
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
    /// A privilege cannot be given up.
    #[error(transparent)]
    Privilege(#[from] privilege::PrivilegeError),
    /// System calls cannot be given up.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
    /// The server.
    #[error(transparent)]
    Server(#[from] server::ServerError),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["--control-fd", fd] => match inherited(fd) {
            Some(fd) => {
                logger::start();
                match serve(fd) {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(failure) => {
                        log::error!("{}", chain(&failure));
                        ExitCode::FAILURE
                    }
                }
            }
            None => usage(&format!("{fd}: not the number of an open descriptor")),
        },
        ["--version"] => {
            println!("husk-fs {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--help" | "-h"] => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        _ => usage("see --help"),
    }
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("husk-fs: {problem}");
    ExitCode::from(2)
}

/// Takes over an inherited descriptor.
fn inherited(number: &str) -> Option<OwnedFd> {
    let number = number.parse().ok().filter(|n| *n > 2)?;
    // SAFETY: F_SETFD on a number that may or may not be open changes no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: the descriptor is open (fcntl succeeded), was passed to us by the parent for our use,
    // and nothing else in this process, which has just started, owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Serves to the end of the VM.
fn serve(control: OwnedFd) -> Result<(), Failure> {
    let channel = Channel::from_fd(control);
    let mut received = channel.receive::<ServeFiles>()?.ok_or(Failure::NothingToServe)?;
    let ServeFiles { listener, shares } = received.message.clone();
    if shares.len() > MAX_SHARES {
        return Err(Failure::TooMany { shares: shares.len() });
    }
    let listener = received.take_fd(listener)?;
    let shares: Vec<Shared> = shares
        .into_iter()
        .map(|share| Ok(Shared { path: received.take_fd(share.fd)?, read_only: share.read_only }))
        .collect::<Result<_, ChannelError>>()?;
    // The pod's process does not wait for a word: it sees this one's end.
    drop(channel);

    let open_files = limits::set()?;
    let proc = sandbox::enter(&shares)?;
    drop(shares);
    privilege::give_up()?;
    seccomp::install()?;
    server::run(listener, proc, open_files)?;
    Ok(())
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

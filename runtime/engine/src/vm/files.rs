//! The process that serves a VM's shares, `husk-fs`: how it is started, and what becomes of it.
//!
//! It gets what it serves as descriptors, and has a socket to the VMM. The VMM sees its end first, by
//! that socket; what it said last is known here. It ends with the VM: by itself, when the socket
//! closes, or else it is killed.

use std::fs::DirBuilder;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use husk_vmm_api::{Channel, FdIndex, MAX_SHARES, ServeFiles, SharedPath};
use tokio::sync::watch;

use super::process::{self, PodProcess};
use super::{EXIT_GRACE, Shared, Vm, VmError, VmExited, borrow};

/// Name of the socket, for the moment for which it has one.
const SOCKET: &str = "fs";

/// A file or directory of the host that the guest sees.
#[derive(Debug)]
pub struct Share {
    /// What errors call it: the volume's name.
    pub name: String,
    /// What is shared: opened with `O_PATH` and checked by who shares it. Of a directory everything
    /// below it is shared, with what is mounted there now.
    pub path: OwnedFd,
    /// Whether the guest may only read; the host sees to it.
    pub read_only: bool,
}

/// How shares are served. Not looked at if there are none.
#[derive(Debug, Clone)]
pub struct FileServer {
    /// The executable, `husk-fs`.
    pub program: PathBuf,
    /// Where its socket can have a name for a moment. Others must not have access.
    pub dir: PathBuf,
}

/// What becomes of a VM's file server.
#[derive(Debug)]
pub(super) struct Fate {
    /// Why the VMM gave it up.
    given_up: watch::Sender<Option<String>>,
    /// Why it is of no use any more, while the VM runs.
    lost: watch::Sender<Option<Arc<str>>>,
    /// Whether its process lives.
    lives: watch::Sender<bool>,
}

impl Default for Fate {
    fn default() -> Self {
        Fate {
            given_up: watch::Sender::new(None),
            lost: watch::Sender::new(None),
            lives: watch::Sender::new(false),
        }
    }
}

impl Fate {
    /// The VMM has given the server up.
    pub(super) fn lost(&self, reason: String) {
        self.given_up.send_replace(Some(reason));
    }

    pub(super) async fn wait_lost(&self) -> Arc<str> {
        let mut lost = self.lost.subscribe();
        loop {
            if let Some(reason) = &*lost.borrow_and_update() {
                return reason.clone();
            }
            // The sender is here.
            if lost.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    #[cfg(test)]
    pub(super) fn lives(&self) -> watch::Ref<'_, bool> {
        self.lives.borrow()
    }

    pub(super) async fn wait_gone(&self) {
        drop(self.lives.subscribe().wait_for(|lives| !lives).await);
    }
}

/// Starts the server of a VM's shares; returns the VMM's end of the socket between them.
pub(super) async fn start(
    vm: &Vm,
    server: &FileServer,
    shares: Vec<Share>,
) -> Result<OwnedFd, VmError> {
    let FileServer { program, dir } = server;
    if shares.len() > MAX_SHARES {
        return Err(VmError::TooManyShares { shares: shares.len() });
    }
    for (number, Share { name, read_only, .. }) in shares.iter().enumerate() {
        tracing::debug!(number, name, read_only, "share");
    }
    let failed = |source| VmError::FileServerSocket { dir: dir.clone(), source };
    let (listener, connected) = connected(dir).map_err(failed)?;
    let (ours, theirs) = Channel::pair()?;
    let spawned = process::spawn("fs", program, theirs.into_fd()).await;
    let process = spawned.map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => VmError::NoFileServer { path: program.clone() },
        _ => VmError::SpawnFileServer { path: program.clone(), source },
    })?;
    let (message, fds) = describe(listener.into(), shares);
    // The one message fits into the socket whether it is read or not. A server that is gone already
    // is found out by its end.
    if let Err(error) = ours.try_send(&message, &borrow(&fds)) {
        tracing::debug!(%error, "the file server does not hear what to serve");
    }
    vm.shared.files.lives.send_replace(true);
    tokio::spawn(watch_over(vm.shared.clone(), vm.exit.clone(), process));
    Ok(connected.into())
}

fn describe(listener: OwnedFd, shares: Vec<Share>) -> (ServeFiles, Vec<OwnedFd>) {
    let mut fds = vec![listener];
    let shares = shares
        .into_iter()
        .map(|Share { name: _, path, read_only }| {
            fds.push(path);
            // At most MAX_SHARES.
            let fd = FdIndex(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX));
            SharedPath { fd, read_only }
        })
        .collect();
    (ServeFiles { listener: FdIndex(0), shares }, fds)
}

/// A listening socket and a connection that waits in it. The library of the server takes nothing
/// else; no other can connect, because the socket's name is in a directory of ours, and soon gone.
fn connected(dir: &Path) -> std::io::Result<(UnixListener, UnixStream)> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let opened = std::fs::File::open(dir)?;
    // By this name it is short enough for an address, wherever it is.
    let path = format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let connected = UnixStream::connect(&path);
    std::fs::remove_file(&path)?;
    Ok((listener, connected?))
}

/// Sees the server's process to its end, and says why it ended if the VM outlives it.
async fn watch_over(shared: Arc<Shared>, mut exit: VmExited, mut process: PodProcess) {
    let fate = &shared.files;
    let mut given_up = fate.given_up.subscribe();
    tokio::select! {
        () = ended(&mut exit) => {}
        _ = given_up.wait_for(Option::is_some) => {}
        _ = process.ended() => {}
    }
    // Whichever of the three it was, the others follow if they are to: a server that has lost its VMM
    // ends by itself, and a VMM that is ending says so.
    let status = match tokio::time::timeout(EXIT_GRACE, process.ended()).await {
        Ok(status) => status,
        Err(_) => {
            process.kill();
            process.ended().await
        }
    };
    // One that ends well has seen the VMM's end before it is known here.
    let ended_well = status.is_some_and(|status| status.success());
    let grace = if ended_well { EXIT_GRACE } else { Duration::ZERO };
    let vm_lives = tokio::time::timeout(grace, ended(&mut exit)).await.is_err();
    if vm_lives {
        let text = last_words(given_up.borrow().as_deref(), status, &process.stderr_tail());
        tracing::warn!("{text}");
        fate.lost.send_replace(Some(text.into()));
    }
    fate.lives.send_replace(false);
}

async fn ended(exit: &mut VmExited) {
    // An error means that the driver is gone, and with it the VM.
    drop(exit.wait_for(Option::is_some).await);
}

/// Why a server is lost: what the VMM says of it, how its process ended, and what that wrote last.
fn last_words(given_up: Option<&str>, status: Option<ExitStatus>, stderr_tail: &str) -> String {
    let mut text = "the file server husk-fs has ended".to_owned();
    if let Some(status) = status {
        text = format!("{text} ({status})");
    }
    if let Some(reason) = given_up {
        text = format!("{text}: {reason}");
    }
    if !stderr_tail.is_empty() {
        text = format!("{text}; the last that it wrote:\n{stderr_tail}");
    }
    text
}

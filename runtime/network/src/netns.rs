//! Network namespaces by path: a file on which one is mounted, as `ip netns` and CNI have them.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use husk_netlink::{NetlinkError, Socket, link};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// Where `ip netns` has them.
pub const DIRECTORY: &str = "/run/netns";

/// The namespace of the thread that looks.
const OWN: &str = "/proc/thread-self/ns/net";

/// Most mounts on one path that are taken away. One is made; more are other people's mistakes.
const MAX_MOUNTS: usize = 16;

/// Why something could not be done with a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A step failed.
    #[error("cannot {step} the network namespace {path}")]
    Io {
        /// What was done, e.g. `create`.
        step: &'static str,
        /// To which.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Its loopback interface could not be used.
    #[error("cannot bring up the loopback interface of the network namespace {path}")]
    Loopback {
        /// Whose.
        path: PathBuf,
        /// Why.
        #[source]
        source: NetlinkError,
    },
    /// The path is that of something else.
    #[error("{path} is no network namespace")]
    NotOne {
        /// The path.
        path: PathBuf,
    },
}

fn failed<E: Into<io::Error>>(step: &'static str, path: &Path) -> impl FnOnce(E) -> NetnsError {
    let path = path.to_owned();
    move |source| NetnsError::Io { step, path, source: source.into() }
}

/// A network namespace, open. It lives as long as this does, even if its path is removed.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Makes a network namespace at `directory/name`, with its loopback interface up, in place of
    /// what an earlier owner that died may have left there.
    ///
    /// # Errors
    /// [`NetnsError`]; nothing is left then.
    pub fn create(directory: &Path, name: &str) -> Result<Self, NetnsError> {
        let path = directory.join(name);
        share(directory).map_err(failed("make a place for", &path))?;
        delete(&path)?;
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(failed("create", &path))?;
        let made = on_thread(|| {
            sys::leave_network()?;
            rustix::mount::mount_bind(OWN, &path)?;
            io::Result::Ok(())
        });
        let made = made
            .and_then(|made| made)
            .map_err(failed("create", &path))
            .and_then(|()| Self::open(&path))
            .and_then(|netns| netns.with_loopback());
        if made.is_err()
            && let Err(error) = delete(&path)
        {
            tracing::warn!(%error, "a network namespace is left");
        }
        made
    }

    fn with_loopback(self) -> Result<Self, NetnsError> {
        let up = self.enter(|| {
            let mut socket = Socket::open()?;
            let links = link::list(&mut socket)?;
            match links.iter().find(|link| link.flags & link::LOOPBACK != 0) {
                Some(lo) => link::set_flags(&mut socket, lo.index, link::UP, link::UP),
                None => Ok(()),
            }
        })?;
        up.map_err(|source| NetnsError::Loopback { path: self.path.clone(), source })?;
        Ok(self)
    }

    /// Opens the network namespace at this path.
    ///
    /// # Errors
    /// [`NetnsError::NotOne`] if it is something else, and others.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = File::open(path).map_err(failed("open", path))?;
        let netns = Netns { path: path.to_owned(), file };
        netns.enter(|| ())?;
        Ok(netns)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Does `work` in it, on a thread of its own, and waits for that.
    ///
    /// # Errors
    /// If it cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let entered = on_thread(|| {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        entered.and_then(|entered| entered).map_err(|source: io::Error| {
            if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
                return NetnsError::NotOne { path: self.path.clone() };
            }
            failed("enter", &self.path)(source)
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs `work` on a thread that ends with it: what it does to its namespaces ends there, too.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the thread in it panicked"))
    })
}

/// Makes the directory, as `ip netns` does: a mount of its own that others see what is mounted in,
/// so that a namespace which is removed here is not kept by a copy of it elsewhere.
fn share(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let shared = || {
        let flags = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
        rustix::mount::mount_change(directory, flags)
    };
    match shared() {
        Err(Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(directory, directory)?;
            Ok(shared()?)
        }
        result => Ok(result?),
    }
}

/// Removes the network namespace at this path, unless it is gone. It lives on while somebody is in
/// it, or has it open.
///
/// # Errors
/// [`NetnsError`].
pub fn delete(path: &Path) -> Result<(), NetnsError> {
    for _ in 0..MAX_MOUNTS {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not mounted; not there.
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(errno) => return Err(failed("unmount", path)(errno)),
        }
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path)(source))
        }
        _ => Ok(()),
    }
}

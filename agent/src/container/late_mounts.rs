//! Mounts that a running container gets, and gives back.
//!
//! A process of its own does it, which enters the container's mount namespace: paths there are the
//! container's, and may lead into a file system that answers slowly or never.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::ThreadNameSpaceType;

use super::process::step;
use super::state::{self, Event};
use super::{ContainerError, Runner, namespaces, path, rootfs};
use crate::lock;
use crate::reaper::How;
use crate::sys::{self, Cloned};

/// Mode of directories that are made on the way.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

/// Exit code of the process for an error that is none of the kernel's.
const OTHER: u8 = u8::MAX;

impl Runner {
    /// Attaches a mount at `path` of a running container; the outer error is the container's, the
    /// inner one of the path.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) async fn mount_into(
        &self,
        id: &str,
        path: &str,
        mount: OwnedFd,
    ) -> Result<io::Result<()>, ContainerError> {
        let path = path.to_owned();
        let keep = [mount.as_raw_fd()];
        self.in_mount_namespace(id, &keep, || {
            let root = open_root()?;
            let target =
                path::open_or_make(root.as_fd(), &path, path::Make::Directory, DIRECTORY_MODE)?;
            Ok(rootfs::attach(mount.as_fd(), target.as_fd())?)
        })
        .await
    }

    /// Takes the mount of the file system `device` at `path` of a running container away. One that is
    /// not there is no error.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) async fn unmount_from(
        &self,
        id: &str,
        path: &str,
        device: u64,
    ) -> Result<io::Result<()>, ContainerError> {
        let path = path.to_owned();
        self.in_mount_namespace(id, &[], || match rustix::fs::stat(&path) {
            // The container may have mounted something else over it.
            Ok(stat) if stat.st_dev == device => {
                Ok(rustix::mount::unmount(&path, UnmountFlags::empty())?)
            }
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(errno) => Err(errno.into()),
        })
        .await
    }

    /// Whether a container is one that can get a mount now.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) fn check_mountable(&self, id: &str) -> Result<(), ContainerError> {
        self.main_process(id).map(drop)
    }

    /// The first process of a container that can get a mount now.
    fn main_process(&self, id: &str) -> Result<Arc<OwnedFd>, ContainerError> {
        let mut table = lock(&self.table);
        let container = table.container(id)?;
        state::transition(container.state, Event::Mount)
            .map_err(|refused| ContainerError::Refused(id.to_owned(), refused))?;
        Ok(Arc::clone(&container.main.pidfd))
    }

    /// Does something in a process of its own in a container's mount namespace. It has the
    /// descriptors `keep`.
    async fn in_mount_namespace(
        &self,
        id: &str,
        keep: &[RawFd],
        work: impl FnOnce() -> io::Result<()>,
    ) -> Result<io::Result<()>, ContainerError> {
        let pidfd = self.main_process(id)?;
        let how = match sys::clone_process(0, None).map_err(step("clone"))? {
            Cloned::Child => {
                let keep = [keep, &[pidfd.as_raw_fd()]].concat();
                let result = sys::close_all_but(&keep).and_then(|()| {
                    namespaces::enter_of(pidfd.as_fd(), ThreadNameSpaceType::MOUNT)
                        .map_err(|error| error.source)?;
                    work()
                });
                sys::exit_now(result.err().map_or(0, |error| exit_code(&error)));
            }
            Cloned::Parent { pid, pidfd: _ } => self.reaper.watch(pid).await,
        };
        let how = how.map_err(|_| ContainerError::Died)?.how;
        Ok(match how {
            How::Code(0) => Ok(()),
            How::Code(OTHER) => Err(io::Error::other("it is none that can be used")),
            How::Code(errno) => Err(io::Error::from_raw_os_error(errno.into())),
            How::Signal(_) => Err(io::ErrorKind::Interrupted.into()),
        })
    }
}

/// The number of an error of the kernel, all of which are below 134.
fn exit_code(error: &io::Error) -> u8 {
    error.raw_os_error().and_then(|errno| u8::try_from(errno).ok()).unwrap_or(OTHER)
}

/// The root of the mount namespace in which this process is.
fn open_root() -> rustix::io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/", flags, Mode::empty())
}

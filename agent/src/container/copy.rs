//! Files and trees of a running container, as tar archives, out of it and into it.
//!
//! A process of its own does it, because the agent has one thread, and what a container has mounted
//! may answer slowly or never. That process is in the container's cgroup, so that the container pays
//! for it and takes it along when it ends. It sees the container's files by way of its first
//! process's root, volumes and all, and no symbolic link leads it out of there. If the container has
//! a user namespace, it is that one's root, and sees the owners that the container sees.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use husk_archive::{pack, unpack};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::DumpableBehavior;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::process::{StepError, step};
use super::state::{self, Event};
use super::{ContainerError, Remains, Runner, path, user_namespace};
use crate::cgroup::Cgroup;
use crate::sys::{self, Cloned};
use crate::{chain, lock};

/// Longest report of the process, in bytes: PIPE_BUF, which is written as a whole.
const MAX_REPORT: usize = 4096;

/// Longest path in bytes: PATH_MAX of Linux, with its NUL.
const MAX_PATH: usize = 4096;

/// How much is read and written at once.
const BUFFER: usize = 64 * 1024;

/// Which way an archive goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the container to the host.
    Out,
    /// From the host into a directory of the container.
    In,
}

/// An archive that was not carried, or not whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("path: {0:?} must be absolute, at most 4095 bytes long, and without a NUL")]
    Path(String),
    #[error("{path}: {reason}")]
    NotFound { path: String, reason: String },
    #[error("{0}: not a directory")]
    NotADirectory(String),
    #[error("{0}")]
    Failed(String),
    #[error("the process that copied was killed")]
    Killed,
}

impl From<StepError> for CopyError {
    fn from(error: StepError) -> Self {
        CopyError::Container(error.into())
    }
}

/// The container, as the process needs it.
struct Target {
    /// The root that its first process sees.
    root: OwnedFd,
    pid: u32,
    /// Of its first process, if that is in a user namespace.
    user: Option<Arc<OwnedFd>>,
    remains: Arc<Remains>,
}

/// What the process needs.
struct Work {
    root: OwnedFd,
    user: Option<Arc<OwnedFd>>,
    path: String,
    stream: File,
    direction: Direction,
}

impl Work {
    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let user = self.user.iter().map(|pidfd| pidfd.as_raw_fd());
        user.chain([self.root.as_raw_fd(), self.stream.as_raw_fd()])
    }
}

/// What the process says at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Report {
    Done(u64),
    NotFound(String),
    NotADirectory,
    Failed(String),
}

impl Report {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = match self {
            Report::Done(bytes) => [&b"D"[..], &bytes.to_le_bytes()].concat(),
            Report::NotFound(reason) => [&b"N"[..], reason.as_bytes()].concat(),
            Report::NotADirectory => b"T".to_vec(),
            Report::Failed(reason) => [&b"F"[..], reason.as_bytes()].concat(),
        };
        bytes.truncate(MAX_REPORT);
        bytes
    }

    /// None for what is no report, e.g. nothing.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes {
            [b'D', rest @ ..] => Some(Report::Done(u64::from_le_bytes(rest.try_into().ok()?))),
            [b'N', rest @ ..] => Some(Report::NotFound(text(rest))),
            [b'T'] => Some(Report::NotADirectory),
            [b'F', rest @ ..] => Some(Report::Failed(text(rest))),
            _ => None,
        }
    }
}

impl Runner {
    /// Carries an archive between a running container and a port of the host. Returns its size in
    /// bytes.
    ///
    /// # Errors
    /// [`CopyError`].
    pub(crate) async fn copy(
        &self,
        id: &str,
        path: String,
        port: u32,
        direction: Direction,
    ) -> Result<u64, CopyError> {
        if !path.starts_with('/') || path.len() >= MAX_PATH || path.contains('\0') {
            return Err(CopyError::Path(path.chars().take(MAX_PATH).collect()));
        }
        let Target { root, pid, user, remains } = self.target(id)?;
        let stream =
            self.transport.connect(port).await.map_err(|error| CopyError::Failed(chain(&error)))?;
        let stream = stream.into_std().map_err(step("take a connection"))?;
        stream.set_nonblocking(false).map_err(step("let a connection wait"))?;
        let stream = File::from(OwnedFd::from(stream));
        let work = Work { root, user, path: path.clone(), stream, direction };
        let report = self.copy_in_child(work, pid, &remains).await?;
        match report {
            Some(Report::Done(bytes)) => Ok(bytes),
            Some(Report::NotFound(reason)) => Err(CopyError::NotFound { path, reason }),
            Some(Report::NotADirectory) => Err(CopyError::NotADirectory(path)),
            Some(Report::Failed(reason)) => Err(CopyError::Failed(reason)),
            None => Err(CopyError::Killed),
        }
    }

    /// The container, if it runs.
    fn target(&self, id: &str) -> Result<Target, CopyError> {
        let mut table = lock(&self.table);
        let container = table.container(id)?;
        state::transition(container.state, Event::Copy)
            .map_err(|refused| ContainerError::Refused(id.to_owned(), refused))?;
        let pid = container.main.pid;
        // The process is not reaped while this runs. The way to its root leads through none of the
        // container's files.
        let root = format!("/proc/{pid}/root");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())
            .map_err(step("open the container's root"))?;
        let user = container.plan.namespaces.user.as_ref();
        let user = user.map(|_| Arc::clone(&container.main.pidfd));
        Ok(Target { root, pid, user, remains: Arc::clone(&container.remains) })
    }

    /// Does the work in a process of its own. None if that was killed.
    async fn copy_in_child(
        &self,
        work: Work,
        pid: u32,
        remains: &Remains,
    ) -> Result<Option<Report>, CopyError> {
        let (read, write) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
        let mut read = pipe::Receiver::from_owned_fd(read).map_err(step("watch the report"))?;
        // As an exec: where processes may be if the container divides its cgroup.
        let cgroup = &remains.cgroup;
        let divided =
            cgroup.keyed("cgroup.stat").map_err(ContainerError::from)?.get("nr_descendants") > 0;
        let below = if divided { Cgroup::of_process(pid).ok() } else { None };
        let directory = below.as_ref().map_or(cgroup.fd(), AsFd::as_fd);
        let reaped = match sys::clone_process(0, Some(directory)).map_err(step("clone"))? {
            Cloned::Child => {
                // What it has of the agent would stay open as long as it runs: the input of another
                // process, for instance, could not end.
                let keep = work.descriptors().chain([write.as_raw_fd()]).collect::<Vec<_>>();
                let report = match sys::close_all_but(&keep) {
                    Ok(()) => run(work),
                    Err(error) => Report::Failed(error.to_string()),
                };
                let report = report.encode();
                // Without a reader there is nobody to tell.
                let told = rustix::io::write(&write, &report);
                sys::exit_now(u8::from(told.is_err()));
            }
            Cloned::Parent { pid, pidfd: _ } => self.reaper.watch(pid),
        };
        drop((write, work));
        let mut report = vec![0; MAX_REPORT];
        let count = read.read(&mut report).await.map_err(step("read the report"))?;
        // Not before it is gone: the container may be removed next.
        drop(reaped.await);
        Ok(Report::decode(report.get(..count).unwrap_or_default()))
    }
}

/// What the process does.
fn run(Work { root, user, path, stream, direction }: Work) -> Report {
    if let Some(process) = user
        && let Err(error) = become_root_of(process.as_fd())
    {
        return Report::Failed(chain(&error));
    }
    let target = match path::open(root.as_fd(), &path) {
        Ok(target) => target,
        Err(errno @ (Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS)) => {
            return Report::NotFound(std::io::Error::from(errno).to_string());
        }
        // What /proc/PID/root and its like lead to has no path that could be kept inside.
        Err(Errno::XDEV) => {
            return Report::NotFound("a link of /proc leads out of the container's root".into());
        }
        Err(errno) => return Report::Failed(std::io::Error::from(errno).to_string()),
    };
    let done = match direction {
        Direction::Out => {
            let name = path.split('/').rfind(|part| !matches!(*part, "" | "." | ".."));
            let name = name.unwrap_or("root").as_bytes();
            let to = BufWriter::with_capacity(BUFFER, stream);
            pack::pack(target.as_fd(), name, None, to).map_err(|error| chain(&error))
        }
        Direction::In => {
            let directory = match open_directory(target.as_fd()) {
                Ok(directory) => directory,
                Err(Errno::NOTDIR) => return Report::NotADirectory,
                Err(errno) => return Report::Failed(std::io::Error::from(errno).to_string()),
            };
            let from = BufReader::with_capacity(BUFFER, stream);
            let options = unpack::Options { owners: true, rename: None };
            unpack::unpack(directory.as_fd(), from, options).map_err(|error| chain(&error))
        }
    };
    done.map_or_else(Report::Failed, Report::Done)
}

/// Becomes root of a process's user namespace: owners are then those that the container sees, and
/// what its root may not touch an archive does not touch either.
fn become_root_of(process: BorrowedFd<'_>) -> Result<(), StepError> {
    // It still has the agent's memory and descriptors, which are nothing for a debugger inside.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("make undumpable"))?;
    user_namespace::enter(process)
}

/// A directory that was opened with O_PATH, opened to be used.
fn open_directory(path: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let stat = rustix::fs::fstat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(path, c".", flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_pipe() {
        for report in [
            Report::Done(u64::MAX),
            Report::NotFound("no such file".into()),
            Report::NotADirectory,
            Report::Failed("reason".into()),
        ] {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        assert_eq!(Report::decode(b""), None);
        assert_eq!(Report::decode(b"Dshort"), None);
        assert_eq!(Report::Failed("x".repeat(10_000)).encode().len(), MAX_REPORT);
    }
}

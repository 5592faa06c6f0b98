//! The guest's tree of cgroups (version 2 only).
//!
//! ```text
//!  /sys/fs/cgroup
//!    agent          the agent
//!    husk           all containers; `cgroup.kill` here ends them all
//!      <path>       one container: its cgroupsPath, or its id
//! ```

mod apply;
pub(crate) mod devices;
mod read;
pub(crate) mod values;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use apply::UpdateError;
use values::Setting;

/// Where the tree is mounted.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// How it is mounted. `nsdelegate`: a container that sees its cgroup writable cannot raise its own
/// limits.
pub(crate) const MOUNT_OPTIONS: &str = "nsdelegate,memory_recursiveprot";
/// The agent's own.
const AGENT: &str = "/sys/fs/cgroup/agent";
/// The parent of all containers'.
const CONTAINERS: &str = "/sys/fs/cgroup/husk";

/// Controllers that are switched on for containers, where the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Longest path of a container's cgroup, in components: the kernel charges every level.
const MAX_DEPTH: usize = 16;

/// Longest path of a container's cgroup, in bytes: far below that of a path (PATH_MAX), of which the
/// container itself may want the rest.
const MAX_PATH: usize = 1024;

/// How long a removal waits for the kernel to let go of killed processes.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);
const REMOVE_RETRY: Duration = Duration::from_millis(5);

/// A failed operation on a cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error(
        "cgroup path {0:?} must be names separated by `/`, none of them `.` or `..`, at most 16 of them and 1024 bytes"
    )]
    Path(String),
    #[error("cgroup {0:?} exists already")]
    Exists(PathBuf),
    #[error("`{field}`")]
    Setting {
        field: String,
        #[source]
        source: Box<CgroupError>,
    },
    #[error("the guest's kernel has no {file:?}")]
    NoController { file: String },
    #[error("{path:?} cannot be read, so that it could not be put back")]
    WriteOnly {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("write {value:?} to {path:?}")]
    Write {
        path: PathBuf,
        value: String,
        #[source]
        source: io::Error,
    },
    #[error("{what} cgroup {path:?}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether the request is at fault: it asks for what this kernel cannot do, or for a value that
    /// it does not take.
    pub(crate) fn is_invalid(&self) -> bool {
        match self {
            Self::Path(_) | Self::NoController { .. } | Self::WriteOnly { .. } => true,
            Self::Setting { source, .. } => source.is_invalid(),
            Self::Write { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::EINVAL | libc::ERANGE | libc::ENODEV | libc::EOPNOTSUPP)
            ),
            Self::Exists(_) | Self::Io { .. } => false,
        }
    }
}

/// Writes one file of a cgroup.
fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// Makes the tree in the mounted file system and moves the agent to its place in it.
pub(crate) fn set_up() -> Result<(), CgroupError> {
    for directory in [AGENT, CONTAINERS] {
        create_directory(Path::new(directory))?;
    }
    write(&Path::new(AGENT).join("cgroup.procs"), "0")?;
    enable_controllers(Path::new(MOUNT_POINT))?;
    enable_controllers(Path::new(CONTAINERS))
}

/// Creates a directory that may exist.
fn create_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::io("create", path)(e))
        }
        _ => Ok(()),
    }
}

/// Gives the children of `path` every controller of [`CONTROLLERS`] that `path` itself has.
fn enable_controllers(path: &Path) -> Result<(), CgroupError> {
    let available = fs::read_to_string(path.join("cgroup.controllers"))
        .map_err(CgroupError::io("read the controllers of", path))?;
    for name in CONTROLLERS {
        if available.split_ascii_whitespace().any(|a| a == name) {
            write(&path.join("cgroup.subtree_control"), &format!("+{name}"))?;
        }
    }
    Ok(())
}

/// Ends every process of every container. Returns before they have ended.
pub(crate) fn kill_all() -> Result<(), CgroupError> {
    write(&Path::new(CONTAINERS).join("cgroup.kill"), "1")
}

/// The components of a container's cgroup path.
///
/// # Errors
/// [`CgroupError::Path`] for a path that would lead elsewhere.
pub(crate) fn components(path: &str) -> Result<Vec<&str>, CgroupError> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let good = |p: &&str| !matches!(*p, "." | "..") && p.len() <= 255 && !p.contains(['\0', '\n']);
    let fits = path.len() <= MAX_PATH && (1..=MAX_DEPTH).contains(&parts.len());
    if !fits || !parts.iter().all(good) {
        return Err(CgroupError::Path(path.to_owned()));
    }
    Ok(parts)
}

/// A container's cgroup. It must be removed by [`Cgroup::remove`]: that can take a while, so that
/// no `Drop` may do it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup at `path` below that of all containers, with its limits. On failure nothing
    /// is left.
    ///
    /// # Errors
    /// [`CgroupError::Exists`] if another container has this path.
    pub(crate) fn create(path: &str, settings: &[Setting]) -> Result<Self, CgroupError> {
        let parts = components(path)?;
        let path: PathBuf = [CONTAINERS].into_iter().chain(parts.iter().copied()).collect();
        let result = Self::make_directory(&parts, &path);
        if result.is_err() {
            remove_empty_parents(&path);
        }
        result?;
        let made = Self::fill(&path, settings);
        if made.is_err() {
            remove_with_parents(&path).map_err(CgroupError::io("remove", &path))?;
        }
        made
    }

    /// Makes the directory `path`, which has these components, and those above it.
    fn make_directory(parts: &[&str], path: &Path) -> Result<(), CgroupError> {
        let mut parent = PathBuf::from(CONTAINERS);
        for part in parts.iter().take(parts.len().saturating_sub(1)) {
            parent.push(part);
            create_directory(&parent)?;
            enable_controllers(&parent)?;
        }
        match fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(CgroupError::Exists(path.to_owned()))
            }
            result => result.map_err(CgroupError::io("create", path)),
        }
    }

    /// Sets the limits of the new cgroup.
    fn fill(path: &Path, settings: &[Setting]) -> Result<Self, CgroupError> {
        // A container is one unit for the OOM killer, as under the kubelet: half a container, with
        // its main process alive and a worker gone, helps nobody.
        let group = path.join("memory.oom.group");
        if group.exists() {
            write(&group, "1")?;
        }
        apply::write_all(path, settings, None)?;
        let directory = open_directory(path).map_err(CgroupError::io("open", path))?;
        Ok(Self { path: path.to_owned(), directory })
    }

    /// The directory, e.g. to put a new process here.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Ends every process in it. Returns before they have ended.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Sends a signal to every process in it. Those that end meanwhile are no error.
    pub(crate) fn signal_all(&self, signal: u32) -> Result<(), CgroupError> {
        for pid in self.processes()?.into_iter().filter_map(rustix::process::Pid::from_raw) {
            let flags = rustix::process::PidfdFlags::empty();
            if let Ok(pidfd) = rustix::process::pidfd_open(pid, flags) {
                match crate::sys::pidfd_send_signal(pidfd.as_fd(), signal) {
                    Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                        return Err(CgroupError::io("signal the processes of", &self.path)(e));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Lets its processes stand still, or go on. Returns before they do.
    pub(crate) fn freeze(&self, freeze: bool) -> Result<(), CgroupError> {
        write(&self.path.join("cgroup.freeze"), if freeze { "1" } else { "0" })
    }

    /// The file whose changes tell of kills for memory.
    pub(crate) fn memory_events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// The cgroup in which process `pid` is now, which can be below this one if the container
    /// divides its own cgroup.
    pub(crate) fn of_process(pid: u32) -> io::Result<OwnedFd> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path =
            text.lines().find_map(|l| l.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
        open_directory(&Path::new(MOUNT_POINT).join(path))
    }

    /// Kills what is left in it and removes it, with the cgroups that the container made inside.
    ///
    /// # Errors
    /// [`CgroupError::Io`] if the kernel does not let go of it within [`REMOVE_LIMIT`].
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        let deadline = tokio::time::Instant::now() + REMOVE_LIMIT;
        loop {
            match remove_with_parents(&self.path) {
                Ok(()) => return Ok(()),
                Err(e) if tokio::time::Instant::now() > deadline => {
                    return Err(CgroupError::io("remove", &self.path)(e));
                }
                Err(_) => self.kill()?,
            }
            tokio::time::sleep(REMOVE_RETRY).await;
        }
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(fs::File::open(path)?.into())
}

/// The processes of a cgroup and of those inside it.
fn processes(path: &Path, depth: usize, pids: &mut Vec<i32>) -> io::Result<()> {
    let below = depth.checked_sub(1).ok_or_else(|| io::Error::from_raw_os_error(libc::ELOOP))?;
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            processes(&entry.path(), below, pids)?;
        }
    }
    Ok(())
}

/// Removes a cgroup and those inside it, then the empty parents that its path had.
fn remove_with_parents(path: &Path) -> io::Result<()> {
    remove_tree(path, MAX_DEPTH)?;
    remove_empty_parents(path);
    Ok(())
}

/// Removes the parents that a container's path had, as far as they are empty.
fn remove_empty_parents(path: &Path) {
    for parent in path.ancestors().skip(1).take_while(|p| *p != Path::new(CONTAINERS)) {
        // Busy: another container is there. That ends the walk.
        // One that was not made yet does not end it.
        if fs::remove_dir(parent).is_err_and(|e| e.kind() != io::ErrorKind::NotFound) {
            break;
        }
    }
}

/// Removes a cgroup and those inside it, to a depth that a container cannot exhaust the stack with.
fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let below = depth.checked_sub(1).ok_or_else(|| io::Error::from_raw_os_error(libc::ELOOP))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path(), below)?;
        }
    }
    match fs::remove_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in ["", "/", "..", "/a/../b", "a/./b", "a\0", "a\nb"] {
            assert!(matches!(components(path), Err(CgroupError::Path(_))), "{path:?}");
        }
        assert!(components(&"a/".repeat(MAX_DEPTH + 1)).is_err());
        assert!(components(&"a".repeat(256)).is_err());
        assert!(components(&format!("{0}/{0}/{0}/{0}/{0}", "a".repeat(250))).is_err());
    }

    #[test]
    fn usual_paths_are_accepted() {
        assert_eq!(components("/kubepods/pod1/c1").unwrap(), ["kubepods", "pod1", "c1"]);
        assert_eq!(components("a.slice:cri:b").unwrap(), ["a.slice:cri:b"]);
    }
}

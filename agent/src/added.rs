//! File systems on disks that come while the pod runs, and go.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use husk_proto::agent::{AddFilesystemRequest, Filesystem};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::container::{ContainerError, Runner};
use crate::host::Host;
use crate::pod::PodInfo;
use crate::storage::{self, StorageError};
use crate::{hotplug, lock};

/// Longest path in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;

/// A file system that was not added, or not taken away.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddedError {
    #[error("{0} must be set")]
    Unset(&'static str),
    #[error("path: {0:?} must be absolute, below the root, shorter than 4096 bytes, without a NUL")]
    Path(String),
    #[error("a file system {0:?} exists already")]
    Exists(String),
    #[error("no file system {0:?} was added")]
    NotAdded(String),
    #[error("file system {0:?} is being added or taken away")]
    Changing(String),
    #[error("cannot mount at {path:?} of container {container:?}")]
    Mount {
        container: String,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("file system {name:?} is in use: {by}")]
    InUse { name: String, by: String },
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("cannot {what} of file system {name:?}")]
    Io {
        what: &'static str,
        name: String,
        #[source]
        source: io::Error,
    },
}

/// Where a file system that was added is seen.
#[derive(Debug, Clone)]
struct Place {
    host: Host,
    filesystem: Filesystem,
    container: String,
    path: String,
}

/// Those that were added, by name. `None`: one is being added or taken away.
#[derive(Debug, Clone, Default)]
pub(crate) struct Added(Arc<Mutex<BTreeMap<String, Option<Place>>>>);

impl Added {
    /// Adds a file system.
    ///
    /// # Errors
    /// [`AddedError`]. Nothing of it is left then.
    pub(crate) async fn add(
        &self,
        host: &Host,
        runner: &Runner,
        pod: &PodInfo,
        request: AddFilesystemRequest,
    ) -> Result<(), AddedError> {
        let AddFilesystemRequest { filesystem, device, container_id, path } = request;
        let filesystem = filesystem.ok_or(AddedError::Unset("filesystem"))?;
        storage::check_filesystem(&filesystem)?;
        if !path.starts_with('/') || path.len() >= MAX_PATH || path.contains('\0') || path == "/" {
            return Err(AddedError::Path(path.chars().take(MAX_PATH).collect()));
        }
        // Before anything is made.
        runner.check_mountable(&container_id)?;
        let name = filesystem.name.clone();
        if pod.filesystems.contains_key(&name) {
            return Err(AddedError::Exists(name));
        }
        {
            let mut added = lock(&self.0);
            if added.contains_key(&name) {
                return Err(AddedError::Exists(name));
            }
            added.insert(name.clone(), None);
        }
        let place = Place { host: host.clone(), filesystem, container: container_id, path };
        let result = mount(runner, &name, device, &place).await;
        let mut added = lock(&self.0);
        match &result {
            Ok(()) => added.insert(name, Some(place)),
            Err(_) => added.remove(&name),
        };
        result
    }

    /// Takes a file system away that was added.
    ///
    /// # Errors
    /// [`AddedError`]. Nothing has changed then.
    pub(crate) async fn remove(&self, runner: &Runner, name: &str) -> Result<(), AddedError> {
        let place = match lock(&self.0).get_mut(name) {
            None => return Err(AddedError::NotAdded(name.to_owned())),
            Some(entry) => entry.take().ok_or_else(|| AddedError::Changing(name.to_owned()))?,
        };
        let result = unmount(runner, name, &place).await;
        let mut added = lock(&self.0);
        match &result {
            Ok(()) => added.remove(name),
            Err(_) => added.insert(name.to_owned(), Some(place)),
        };
        result
    }
}

fn failed<E: Into<io::Error>>(what: &'static str, name: &str) -> impl FnOnce(E) -> AddedError {
    let name = name.to_owned();
    move |source| AddedError::Io { what, name, source: source.into() }
}

/// Mounts a file system and shows it to its container.
async fn mount(runner: &Runner, name: &str, device: u32, place: &Place) -> Result<(), AddedError> {
    let in_vm = matches!(place.host, Host::Vm);
    if in_vm {
        hotplug::bind(device).map_err(failed("find the disk", name))?;
    }
    let mounted = match storage::mount(&place.host, &place.filesystem).await {
        Ok(()) => {
            let shown = show(runner, name, place).await;
            if shown.is_err()
                && let Err(error) = storage::unmount(name)
            {
                tracing::error!(name, %error, "a file system stays that nobody has");
            }
            shown
        }
        Err(error) => {
            // Its mount point; not there if even that could not be made.
            let _none = fs::remove_dir(storage::mount_point(name));
            Err(error.into())
        }
    };
    if mounted.is_err()
        && in_vm
        && let Err(error) = hotplug::unbind(device)
    {
        tracing::error!(name, %error, "a disk stays that nobody has");
    }
    mounted
}

/// Shows a mounted file system to its container.
async fn show(runner: &Runner, name: &str, place: &Place) -> Result<(), AddedError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree: OwnedFd = rustix::mount::open_tree(CWD, storage::mount_point(name), flags)
        .map_err(failed("duplicate the mount", name))?;
    let Place { container, path, .. } = place;
    let mounted = runner.mount_into(container, path, tree).await?;
    let (container, path) = (container.clone(), path.clone());
    mounted.map_err(|source| AddedError::Mount { container, path, source })
}

async fn unmount(runner: &Runner, name: &str, place: &Place) -> Result<(), AddedError> {
    let Place { container, path, .. } = place;
    let device = rustix::fs::stat(storage::mount_point(name))
        .map_err(failed("look at the mount", name))?
        .st_dev;
    match runner.unmount_from(container, path, device).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.raw_os_error() == Some(libc::EBUSY) => {
            let by = format!("by container {container:?} at {path:?}");
            return Err(AddedError::InUse { name: name.to_owned(), by });
        }
        Ok(Err(source)) => return Err(failed("unmount the container's mount", name)(source)),
        // It does not run (any more): its mounts are gone with it. A paused one still has them, and the
        // disk is found to be in use below.
        Err(ContainerError::NoContainer(_) | ContainerError::Refused(..)) => {}
        Err(error) => return Err(error.into()),
    }
    let result = let_go(name, place).await;
    if result.is_err()
        // As it was: for who uses it, and for whoever tries again.
        && let Err(error) = show(runner, name, place).await
    {
        tracing::debug!(name, error = crate::chain(&error), "its container has ended");
    }
    result
}

/// Unmounts a file system, and has the driver let go of its disk.
async fn let_go(name: &str, place: &Place) -> Result<(), AddedError> {
    match storage::unmount(name) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let by = "in the guest".to_owned();
            return Err(AddedError::InUse { name: name.to_owned(), by });
        }
        Err(error) => return Err(failed("unmount", name)(error)),
    }
    if matches!(place.host, Host::Test(_)) {
        return Ok(());
    }
    let released = release_disk(name, &place.filesystem.disk_serial).await;
    if released.is_err()
        && let Err(error) = storage::mount(&place.host, &place.filesystem).await
    {
        tracing::error!(name, error = crate::chain(&error), "it is not mounted again");
    }
    released
}

/// Has the driver let go of a disk that is not mounted any more, by us.
async fn release_disk(name: &str, serial: &str) -> Result<(), AddedError> {
    let disk = storage::find_disk(serial).await?;
    // Exclusive use is refused as long as it is mounted anywhere, e.g. in a mount namespace that a
    // container has made.
    match rustix::fs::open(&disk, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => {}
        Err(Errno::BUSY) => {
            let by = "mounted by a process of a container".to_owned();
            return Err(AddedError::InUse { name: name.to_owned(), by });
        }
        Err(errno) => return Err(failed("look at the disk", name)(errno)),
    }
    let device = Path::new("/sys/block").join(disk.file_name().unwrap_or_default()).join("device");
    let device = fs::canonicalize(device).map_err(failed("find the device", name))?;
    let number = hotplug::place_of(&device).ok_or(io::ErrorKind::NotFound);
    let number = number.map_err(failed("find the place", name))?;
    hotplug::unbind(number).map_err(failed("let go of the disk", name))
}

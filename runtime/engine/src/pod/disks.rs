//! Disks that a running pod is given, and gives back: file systems of image files and block devices of
//! the host, each at one place of one container. A container that is started again has it again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use husk_proto::agent as proto;
use husk_proto::guest;
use husk_vmm_api::MAX_SERIAL_LEN;
use oci_spec::runtime::Mount;

use super::access::{AccessError, PodAccess};
use super::actor::chain;
use super::runtime::GuestRuntime;
use crate::oci;
use crate::storage::host_disk::{FsType, HostDisk, HostDiskError};
use crate::vm::{Disk, VmError};

/// What the guest's name of such a disk begins with, which no other disk's does.
const PREFIX: &str = "disk-";

/// Longest name of a disk in bytes: with the prefix it is a serial.
const MAX_NAME: usize = MAX_SERIAL_LEN - PREFIX.len();

/// A disk for a running pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskAttachment {
    /// By which it is called in the pod: `[a-z0-9][a-z0-9.-]*`, at most 15 bytes.
    pub name: String,
    /// The image file or block device; absolute.
    pub path: PathBuf,
    /// Whether the pod may only read it.
    pub read_only: bool,
    /// What is on it; `None`: whatever is.
    pub fstype: Option<FsType>,
    /// The container that gets it.
    pub container: String,
    /// Where in the container: absolute, and not the root.
    pub mount_path: String,
}

/// Why a disk cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The name is none.
    #[error("disk name {name:?}: must be [a-z0-9][a-z0-9.-]*, at most {MAX_NAME} bytes")]
    Name {
        /// The name.
        name: String,
    },
    /// The path in the container is none.
    #[error("mount path {path:?}: must be absolute, and not the root")]
    MountPath {
        /// The path.
        path: String,
    },
    /// Another one has the name.
    #[error("the pod has a disk {name:?} already")]
    Exists {
        /// The name.
        name: String,
    },
    /// None has the name.
    #[error("the pod has no disk {name:?} that was attached; it has {known}")]
    NotAttached {
        /// The name.
        name: String,
        /// Those that it has.
        known: String,
    },
    /// It is being attached or detached.
    #[error("disk {name:?} is being attached or detached")]
    Changing {
        /// The name.
        name: String,
    },
    /// The host's side.
    #[error(transparent)]
    Host(#[from] HostDiskError),
    /// The VM's side.
    #[error(transparent)]
    Vm(#[from] VmError),
}

/// One that is attached, or about to be, or not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    container: String,
    mount_path: String,
    read_only: bool,
    /// Whether containers that are started get it.
    ready: bool,
}

/// Those of a pod, by name.
#[derive(Debug, Default)]
pub(super) struct Disks(Mutex<BTreeMap<String, Entry>>);

impl Disks {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Every change is one operation of the map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for a disk that is about to be attached.
    fn reserve(&self, disk: &DiskAttachment) -> Result<(), DiskError> {
        let entry = Entry {
            container: disk.container.clone(),
            mount_path: disk.mount_path.clone(),
            read_only: disk.read_only,
            ready: false,
        };
        let mut all = self.lock();
        if all.contains_key(&disk.name) {
            return Err(DiskError::Exists { name: disk.name.clone() });
        }
        all.insert(disk.name.clone(), entry);
        Ok(())
    }

    /// Marks one that is attached as one that is about to be detached.
    fn release(&self, name: &str) -> Result<(), DiskError> {
        let mut all = self.lock();
        let known: Vec<&str> = all.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        match all.get_mut(name) {
            None => Err(DiskError::NotAttached { name: name.to_owned(), known }),
            Some(Entry { ready, .. }) if !*ready => {
                Err(DiskError::Changing { name: name.to_owned() })
            }
            Some(entry) => {
                entry.ready = false;
                Ok(())
            }
        }
    }

    /// Makes one that was reserved or released what it is now: attached, or gone.
    fn settle(&self, name: &str, attached: bool) {
        let mut all = self.lock();
        match all.get_mut(name).filter(|_| attached) {
            Some(entry) => entry.ready = true,
            None => drop(all.remove(name)),
        }
    }

    /// The mounts that a container gets when it is started.
    pub(super) fn mounts(&self, container: &str) -> Result<Vec<Mount>, oci_spec::OciSpecError> {
        let all = self.lock();
        let of = all.iter().filter(|(_, entry)| entry.ready && entry.container == container);
        of.map(|(name, entry)| {
            let source = format!("{}/{PREFIX}{name}", guest::FILESYSTEMS);
            oci::disk_mount(&entry.mount_path, &source, entry.read_only)
        })
        .collect()
    }
}

impl DiskAttachment {
    fn check(&self) -> Result<(), DiskError> {
        let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let name = self.name.as_str();
        let good = name.len() <= MAX_NAME
            && name.bytes().next().is_some_and(first)
            && name.bytes().all(|c| first(c) || c == b'.' || c == b'-');
        if !good {
            return Err(DiskError::Name { name: name.to_owned() });
        }
        let path = &self.mount_path;
        if !path.starts_with('/') || path.contains('\0') || path.trim_matches('/').is_empty() {
            return Err(DiskError::MountPath { path: path.clone() });
        }
        Ok(())
    }
}

impl PodAccess {
    /// Gives a running pod a disk. Goes on to its end if the caller does not wait for it. Returns what
    /// is on the disk.
    ///
    /// # Errors
    /// [`AccessError`]. Nothing of it is left then.
    pub async fn attach_disk(&self, disk: DiskAttachment) -> Result<FsType, AccessError> {
        self.container(&disk.container)?;
        let runtime = self.runtime()?;
        disk.check()?;
        tokio::spawn(async move {
            runtime.disks().reserve(&disk)?;
            let result = attach(&runtime, &disk).await;
            runtime.disks().settle(&disk.name, result.is_ok());
            result
        })
        .await?
    }

    /// Takes a disk away that [`Self::attach_disk`] gave. Goes on to its end if the caller does not
    /// wait for it; then nobody has the disk open.
    ///
    /// # Errors
    /// [`AccessError`], e.g. if it is in use. Nothing has changed then.
    pub async fn detach_disk(&self, name: &str) -> Result<(), AccessError> {
        let (runtime, name) = (self.runtime()?, name.to_owned());
        tokio::spawn(async move {
            runtime.disks().release(&name)?;
            let serial = format!("{PREFIX}{name}");
            let removed = runtime.guest().remove_filesystem(&serial).await;
            runtime.disks().settle(&name, removed.is_err());
            removed?;
            Ok(runtime.guest().vm().remove_disk(&serial).await.map_err(DiskError::from)?)
        })
        .await?
    }
}

async fn attach(runtime: &GuestRuntime, disk: &DiskAttachment) -> Result<FsType, AccessError> {
    let DiskAttachment { name, path, read_only, fstype, container, mount_path } = disk.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let disk = HostDisk::open(&path, read_only)?;
        let fstype = disk.filesystem(fstype)?;
        Ok::<_, HostDiskError>((disk.into_file(), fstype))
    });
    let (image, fstype) = opened.await?.map_err(DiskError::from)?;
    let serial = format!("{PREFIX}{name}");
    let (guest, vm) = (runtime.guest(), runtime.guest().vm());
    let added = vm.add_disk(Disk { serial: serial.clone(), image: image.into(), read_only }).await;
    let device = added.map_err(DiskError::from)?;
    let filesystem = proto::Filesystem {
        name: serial.clone(),
        disk_serial: serial.clone(),
        fstype: fstype.name().to_owned(),
        read_only,
    };
    let request = proto::AddFilesystemRequest {
        filesystem: Some(filesystem),
        device,
        container_id: container,
        path: mount_path,
    };
    if let Err(error) = guest.add_filesystem(request).await {
        // The guest has let go of it.
        if let Err(error) = vm.remove_disk(&serial).await {
            tracing::warn!(error = chain(&error), serial, "a disk stays that nobody has");
        }
        return Err(error.into());
    }
    Ok(fstype)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn disk(name: &str, mount_path: &str) -> DiskAttachment {
        DiskAttachment {
            name: name.into(),
            path: "/disk.img".into(),
            read_only: true,
            fstype: None,
            container: "main".into(),
            mount_path: mount_path.into(),
        }
    }

    #[test]
    fn names_are_short_and_paths_absolute() {
        disk("data-1.x", "/mnt").check().unwrap();
        for name in ["", "Data", "a/b", "-a", "0123456789abcdef"] {
            assert!(matches!(disk(name, "/mnt").check(), Err(DiskError::Name { .. })), "{name}");
        }
        for path in ["", "mnt", "/", "//", "/a\0"] {
            let refused = disk("a", path).check();
            assert!(matches!(refused, Err(DiskError::MountPath { .. })), "{path:?}");
        }
    }

    #[test]
    fn containers_that_are_started_get_what_is_attached_then() {
        let disks = Disks::default();
        let mounts = |container| {
            let mounts = disks.mounts(container).unwrap();
            mounts.iter().map(|m| m.destination().display().to_string()).collect::<Vec<_>>()
        };
        disks.reserve(&disk("a", "/mnt/a")).unwrap();
        assert!(matches!(disks.reserve(&disk("a", "/b")), Err(DiskError::Exists { .. })));
        assert!(matches!(disks.release("a"), Err(DiskError::Changing { .. })));
        assert!(mounts("main").is_empty());
        disks.settle("a", true);
        assert_eq!(mounts("main"), ["/mnt/a"]);
        assert!(mounts("other").is_empty());
        disks.release("a").unwrap();
        assert!(mounts("main").is_empty());
        disks.settle("a", false);
        let refused = disks.release("a").unwrap_err().to_string();
        assert_eq!(refused, "the pod has no disk \"a\" that was attached; it has none");
        disks.reserve(&disk("a", "/mnt/a")).unwrap();
    }
}

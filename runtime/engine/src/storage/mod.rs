//! The disks of a pod: which it has, how the guest knows them, and their making.
//!
//! - Every layer of its images is a read-only disk, once, whichever containers use it.
//! - One sparse ext4 disk, the scratch disk, holds the writable layers of the containers and the
//!   disk-backed emptyDirs without a limit.
//! - A disk-backed emptyDir with a `sizeLimit` is a disk of its own: `df` shows the limit and
//!   writing more is ENOSPC.
//!
//! - A file or directory of the host is no disk but a share, which the guest sees by virtio-fs
//!   ([`host_path`]).
//! - A disk of the host is what it is ([`host_disk`]): mounted for the containers that mount it, or left
//!   alone for those that have it as a block device.
//!
//! [`layout`] is pure; [`Layout::open`] touches the host. The disks that are made have no name on the
//! host: they vanish with the VM, whatever ends it.

pub mod ext4;
pub mod host_disk;
pub mod host_path;
mod sparse;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_proto::agent as proto;
use husk_vmm_api::{MAX_DISKS, MAX_SERIAL_LEN};

use self::host_disk::{FsType, HostDisk, HostDiskError};
use crate::downward;
use crate::paths::Config;
use crate::types::{
    ContainerSpec, FileContent, FileSpec, Hidden, Medium, PodSpec, VolumeDevice, VolumeSource,
    VolumeSpec,
};
use crate::vm::Disk;

/// Size of the scratch disk unless another is configured, in bytes. It is sparse: what is not
/// written takes no space.
pub const DEFAULT_SCRATCH_BYTES: u64 = 10 << 30;

/// Serial of the scratch disk, and name of its file system.
const SCRATCH: &str = "scratch";

/// Mode of the root of an emptyDir, as the kubelet makes it.
const EMPTY_DIR_MODE: u32 = 0o777;

/// Mode of the root of a volume of files, as the kubelet makes it: nobody makes a file there, but
/// everybody finds those that are there.
const FILES_MODE: u32 = 0o755;

/// How many hex digits of a layer's digest are its serial.
const LAYER_DIGITS: usize = MAX_SERIAL_LEN - 1;

/// Why a pod's disks cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// More than a VM can have.
    #[error(
        "the pod needs {needed} disks ({layers} image layers, {} others), and a VM can have \
         {MAX_DISKS}: use images with fewer layers, or that share more of them",
        needed - layers
    )]
    TooManyDisks {
        /// All that it needs.
        needed: usize,
        /// Those that are layers.
        layers: usize,
    },
    /// An image without content.
    #[error("the image of container {container:?} has no layers: there is nothing to run in it")]
    NoLayers {
        /// Whose image.
        container: String,
    },
    /// A digest that is none, or two that begin alike.
    #[error("layer {diff_id:?} cannot be told by its digest from every other layer of the pod")]
    BadDigest {
        /// The layer.
        diff_id: String,
    },
    /// A layer's descriptor cannot be duplicated.
    #[error("cannot use the image layer {layer}")]
    Layer {
        /// The beginning of its digest.
        layer: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The host's file system is full.
    #[error(
        "no space left in {dir} to make the pod's disk: free some, or use another directory with \
         --state-dir"
    )]
    NoSpace {
        /// Where.
        dir: PathBuf,
    },
    /// A path of the host cannot be a volume.
    #[error("{field}")]
    HostPath {
        /// The volume's field.
        field: String,
        /// Why.
        #[source]
        source: host_path::HostPathError,
    },
    /// A disk of the host cannot be used.
    #[error(transparent)]
    HostDisk(#[from] HostDiskError),
    /// A step of making a disk failed.
    #[error("cannot {step} {path}")]
    Io {
        /// What was done, e.g. `create`.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// `mkfs.ext4` is not there.
    #[error("mkfs.ext4 is not installed: install the package e2fsprogs")]
    NoMkfs,
    /// `mkfs.ext4` failed.
    #[error("mkfs.ext4 failed on {path} ({status}): {output}")]
    Mkfs {
        /// The image.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        output: String,
    },
    /// A size that ext4 cannot have.
    #[error("a disk of {bytes} bytes is not possible: 1 MiB to 8 TiB are")]
    Size {
        /// The size.
        bytes: u64,
    },
}

impl StorageError {
    /// An error of a step, told as a full disk if it is that.
    fn io(step: &'static str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                let dir = path.parent().unwrap_or(path).to_owned();
                StorageError::NoSpace { dir }
            }
            _ => StorageError::Io { step, path: path.to_owned(), source },
        }
    }
}

/// A layer of an image: a read-only EROFS blob.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Digest of its content (`sha256:...`), which names it.
    pub diff_id: String,
    /// The blob, open for reading.
    pub file: Arc<File>,
}

/// What a disk is made from.
#[derive(Debug, Clone)]
enum Source {
    /// This file, read-only.
    Layer(Arc<File>),
    /// An empty ext4 file system on a disk of this size, in bytes.
    Scratch(u64),
    /// An empty ext4 file system that holds this many bytes.
    Volume(u64),
    /// A disk of the host, with a file system on it.
    Host { path: PathBuf, fstype: FsType, read_only: bool },
    /// A disk of the host, whatever is on it.
    Raw { path: PathBuf, read_only: bool },
}

/// The disks of a pod, and how the guest is told of them.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    disks: Vec<(String, Source)>,
    /// What the guest mounts.
    pub filesystems: Vec<proto::Filesystem>,
    /// What the containers share.
    pub volumes: Vec<proto::Volume>,
    roots: BTreeMap<String, proto::Rootfs>,
    /// The disks that containers have as block devices, by their volumes.
    raw: BTreeMap<String, RawDisk>,
}

/// A disk that containers have as a block device.
#[derive(Debug, Clone)]
struct RawDisk {
    serial: String,
    read_only: bool,
}

/// Plans the disks of a pod of this `uid` whose containers have these layers, the lowest first.
/// Pure.
///
/// # Errors
/// [`StorageError::TooManyDisks`], [`StorageError::NoLayers`], [`StorageError::BadDigest`].
pub fn layout(
    spec: &PodSpec,
    uid: &str,
    layers: &BTreeMap<String, Vec<Layer>>,
    scratch_bytes: u64,
) -> Result<Layout, StorageError> {
    let mut plan = Layout {
        disks: Vec::new(),
        filesystems: Vec::new(),
        volumes: Vec::new(),
        roots: BTreeMap::new(),
        raw: BTreeMap::new(),
    };
    plan.add_disk(SCRATCH.into(), Source::Scratch(scratch_bytes));
    let mut known = BTreeMap::new();
    for (container, layers) in layers {
        let root = plan.add_root(layers, &mut known)?;
        if root.lower.is_empty() {
            return Err(StorageError::NoLayers { container: container.clone() });
        }
        plan.roots.insert(container.clone(), root);
    }
    for (index, volume) in spec.volumes.iter().enumerate() {
        plan.add_volume(index, volume, spec, uid);
    }
    if plan.disks.len() > MAX_DISKS {
        let needed = plan.disks.len();
        return Err(StorageError::TooManyDisks { needed, layers: known.len() });
    }
    Ok(plan)
}

impl Layout {
    fn add_disk(&mut self, name: String, source: Source) {
        let (fstype, read_only) = match source {
            Source::Layer(_) => (FsType::Erofs, true),
            Source::Scratch(_) | Source::Volume(_) => (FsType::Ext4, false),
            Source::Host { fstype, read_only, .. } => (fstype, read_only),
            // Nothing is mounted of it.
            Source::Raw { .. } => return self.disks.push((name, source)),
        };
        self.filesystems.push(proto::Filesystem {
            name: name.clone(),
            disk_serial: name.clone(),
            fstype: fstype.name().into(),
            read_only,
        });
        self.disks.push((name, source));
    }

    /// Adds the layers that are not `known` yet (name -> digest).
    fn add_root(
        &mut self,
        layers: &[Layer],
        known: &mut BTreeMap<String, String>,
    ) -> Result<proto::Rootfs, StorageError> {
        let mut lower: Vec<String> = Vec::new();
        for Layer { diff_id, file } in layers {
            let bad = || StorageError::BadDigest { diff_id: diff_id.clone() };
            let digits = diff_id.split_once(':').map(|(_, digits)| digits).ok_or_else(bad)?;
            let name = digits.get(..LAYER_DIGITS).ok_or_else(bad)?.to_owned();
            if !name.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()) {
                return Err(bad());
            }
            match known.get(&name) {
                Some(same) if same == diff_id => {}
                Some(_) => return Err(bad()),
                None => {
                    known.insert(name.clone(), diff_id.clone());
                    self.add_disk(name.clone(), Source::Layer(file.clone()));
                }
            }
            // overlayfs refuses a directory twice. Of a layer that occurs twice the upper one
            // decides alone: whatever the lower one holds, it holds too.
            lower.retain(|other| *other != name);
            lower.push(name);
        }
        Ok(proto::Rootfs { lower, upper_on: SCRATCH.into() })
    }

    fn add_volume(&mut self, index: usize, volume: &VolumeSpec, spec: &PodSpec, uid: &str) {
        use proto::volume::Source as Made;
        let VolumeSpec { name, source } = volume;
        let made = match *source {
            VolumeSource::HostPath { .. } => {
                let number = host_path::of(spec).take_while(|(other, ..)| *other < index).count();
                // No pod has so many volumes.
                Made::Share(u32::try_from(number).unwrap_or(u32::MAX))
            }
            VolumeSource::Disk { ref path, fstype: _, read_only } if is_device(spec, name) => {
                let serial = format!("vol-{index}");
                self.add_disk(serial.clone(), Source::Raw { path: path.clone(), read_only });
                self.raw.insert(name.clone(), RawDisk { serial, read_only });
                // Nor is there anything to share.
                return;
            }
            VolumeSource::Disk { ref path, fstype, read_only } => {
                let disk = format!("vol-{index}");
                let path = path.clone();
                self.add_disk(disk.clone(), Source::Host { path, fstype, read_only });
                Made::Filesystem(disk)
            }
            VolumeSource::Files(ref files) => Made::Files(self::files(files, spec, uid)),
            VolumeSource::EmptyDir { medium: Medium::Memory, size_limit } => {
                let memory = u64::from(spec.vm.memory_mib) << 20;
                Made::Tmpfs(proto::Tmpfs { size: size_limit.unwrap_or(memory).min(memory) })
            }
            VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: None } => {
                Made::DirectoryOn(SCRATCH.into())
            }
            VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: Some(limit) } => {
                let disk = format!("vol-{index}");
                self.add_disk(disk.clone(), Source::Volume(limit));
                Made::Filesystem(disk)
            }
        };
        let (mode, fs_group) = match source {
            VolumeSource::Files(_) => (FILES_MODE, spec.fs_group),
            VolumeSource::EmptyDir { .. } => (EMPTY_DIR_MODE, spec.fs_group),
            // As in Kubernetes, what is the host's keeps its owners and permissions.
            VolumeSource::HostPath { .. } | VolumeSource::Disk { .. } => (0, None),
        };
        self.volumes.push(proto::Volume { name: name.clone(), source: Some(made), mode, fs_group });
    }

    /// The root file system of a container for which layers were given.
    #[must_use]
    pub fn root(&self, container: &str) -> Option<&proto::Rootfs> {
        self.roots.get(container)
    }

    /// The block devices of a container. As containerd's `device_ownership_from_security_context` has
    /// it, they belong to whom its manifest has it run as.
    #[must_use]
    pub fn devices(&self, container: &ContainerSpec) -> Vec<proto::BlockDevice> {
        let security = &container.security;
        let devices = container.volume_devices.iter().filter_map(|device| {
            let VolumeDevice { volume, device_path } = device;
            let RawDisk { serial, read_only } = self.raw.get(volume)?;
            Some(proto::BlockDevice {
                disk_serial: serial.clone(),
                path: device_path.clone(),
                read_only: *read_only,
                uid: security.run_as_user.unwrap_or_default(),
                gid: security.run_as_group.unwrap_or_default(),
            })
        });
        devices.collect()
    }

    /// Opens or makes every disk. Blocks: on the first use of a size, for as long as `mkfs.ext4`
    /// takes.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn open(&self, config: &Config) -> Result<Vec<Disk>, StorageError> {
        let disks = self.disks.iter().map(|(serial, source)| {
            let (image, read_only) = match source {
                Source::Layer(file) => {
                    let layer = serial.clone();
                    (
                        file.try_clone().map_err(|source| StorageError::Layer { layer, source })?,
                        true,
                    )
                }
                Source::Scratch(bytes) => (ext4::disk(config, *bytes)?, false),
                Source::Volume(bytes) => (ext4::disk(config, ext4::size_to_hold(*bytes)?)?, false),
                Source::Host { path, fstype, read_only } => {
                    let disk = HostDisk::open(path, *read_only)?;
                    disk.filesystem(Some(*fstype))?;
                    (disk.into_file(), *read_only)
                }
                Source::Raw { path, read_only } => {
                    (HostDisk::open(path, *read_only)?.into_file(), *read_only)
                }
            };
            Ok(Disk { serial: serial.clone(), image: image.into(), read_only })
        });
        disks.collect()
    }
}

/// Whether a volume is a block device to containers, so that it is not mounted.
fn is_device(spec: &PodSpec, volume: &str) -> bool {
    let mut devices = spec.all_containers().flat_map(|container| &container.volume_devices);
    devices.any(|device| device.volume == volume)
}

/// The files of a volume of a pod of this `uid`, with their content.
pub(crate) fn files(files: &[FileSpec], spec: &PodSpec, uid: &str) -> proto::Files {
    proto::Files { files: files.iter().map(|file| render(file, spec, uid)).collect() }
}

fn render(file: &FileSpec, spec: &PodSpec, uid: &str) -> proto::VolumeFile {
    let content = match &file.content {
        FileContent::Bytes(Hidden(bytes)) => bytes.clone(),
        // The door answers for references that exist; another one is an empty file.
        FileContent::Field(field) => {
            downward::metadata_field(field, &spec.metadata, uid).unwrap_or_default().into_bytes()
        }
        FileContent::Resource(reference) => {
            downward::resource(reference, spec).unwrap_or_default().into_bytes()
        }
    };
    proto::VolumeFile { path: file.path.clone(), content, mode: file.mode }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

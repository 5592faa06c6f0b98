//! The pod's file systems and volumes.

mod shares;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_proto::agent::{Files, Filesystem, Volume, volume};
use husk_proto::guest;

use crate::container::rootfs;
use crate::files::{self, FilesError};
use crate::host::Host;

/// A file system or volume that was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("{field}: {value:?} is no name ([a-z0-9][a-z0-9.-]*, at most 64 bytes)")]
    Name { field: &'static str, value: String },
    #[error("{field}: {value:?} appears twice")]
    Twice { field: &'static str, value: String },
    #[error("{field}: {count} of them; a pod has at most {MAX_ENTRIES}")]
    TooMany { field: &'static str, count: usize },
    #[error("filesystems.fstype: {0:?} must be \"erofs\" or \"ext4\"")]
    Type(String),
    #[error("filesystems.read_only: erofs ({0:?}) must be read-only")]
    WritableErofs(String),
    #[error("{field}: {value:?} is no serial (at most 20 bytes, no slash)")]
    Serial { field: &'static str, value: String },
    #[error("volumes.source: {0:?} has none")]
    NoSource(String),
    #[error("volumes.source")]
    Files(#[from] FilesError),
    #[error("no volume of files is named {0:?}")]
    NoFiles(String),
    #[error("volumes: no file system is named {0:?}")]
    NoFilesystem(String),
    #[error("volumes.source.share: the host has no share {number} (volume {volume:?})")]
    NoShare { number: u32, volume: String },
    #[error("disk with serial {serial:?} did not appear in {limit:?}")]
    NoDisk { serial: String, limit: Duration },
    #[error("{what} {name:?}")]
    Io {
        what: &'static str,
        name: String,
        #[source]
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str, name: &str) -> impl FnOnce(E) -> StorageError {
    let name = name.to_owned();
    move |source| StorageError::Io { what, name, source: source.into() }
}

/// How long a disk may take to appear. The drivers are part of the kernel and find the disks before
/// PID 1 starts; a disk that is added while the pod runs may take a moment.
const DISK_LIMIT: Duration = Duration::from_secs(10);
const DISK_RETRY: Duration = Duration::from_millis(10);

/// Longest name of a file system or volume in bytes.
const MAX_NAME: usize = 64;

/// Most file systems of a pod, and most volumes: each is a mount at least.
const MAX_ENTRIES: usize = 1024;

/// Length of a virtio-blk serial (VIRTIO_BLK_ID_BYTES).
const MAX_SERIAL: usize = 20;

/// Checks a name that becomes one component of a path.
pub(crate) fn check_name(field: &'static str, name: &str) -> Result<(), StorageError> {
    let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(first)
        && name.bytes().all(|c| first(c) || c == b'.' || c == b'-');
    if good { Ok(()) } else { Err(StorageError::Name { field, value: name.to_owned() }) }
}

/// Checks everything about a request that can be checked before anything is made.
pub(crate) fn check(filesystems: &[Filesystem], volumes: &[Volume]) -> Result<(), StorageError> {
    for (field, count) in [("filesystems", filesystems.len()), ("volumes", volumes.len())] {
        if count > MAX_ENTRIES {
            return Err(StorageError::TooMany { field, count });
        }
    }
    let mut names = std::collections::BTreeSet::new();
    for filesystem in filesystems {
        check_filesystem(filesystem)?;
        let name = &filesystem.name;
        if !names.insert(name) {
            return Err(StorageError::Twice { field: "filesystems.name", value: name.clone() });
        }
    }
    let mut volume_names = std::collections::BTreeSet::new();
    for Volume { name, source, mode: _, fs_group: _ } in volumes {
        check_name("volumes.name", name)?;
        if !volume_names.insert(name) {
            return Err(StorageError::Twice { field: "volumes.name", value: name.clone() });
        }
        match source {
            None => return Err(StorageError::NoSource(name.clone())),
            Some(volume::Source::Files(files)) => files::check(files)?,
            Some(volume::Source::Tmpfs(_) | volume::Source::Share(_)) => {}
            Some(volume::Source::DirectoryOn(on) | volume::Source::Filesystem(on)) => {
                if !names.contains(on) {
                    return Err(StorageError::NoFilesystem(on.clone()));
                }
            }
        }
    }
    Ok(())
}

/// Checks what can be checked of a file system alone.
pub(crate) fn check_filesystem(filesystem: &Filesystem) -> Result<(), StorageError> {
    let Filesystem { name, disk_serial, fstype, read_only } = filesystem;
    check_name("filesystems.name", name)?;
    match (fstype.as_str(), read_only) {
        ("erofs", true) | ("ext4", _) => {}
        ("erofs", false) => return Err(StorageError::WritableErofs(name.clone())),
        _ => return Err(StorageError::Type(fstype.clone())),
    }
    check_serial("filesystems.disk_serial", disk_serial)
}

/// Checks the serial of a disk.
pub(crate) fn check_serial(field: &'static str, serial: &str) -> Result<(), StorageError> {
    if serial.is_empty() || serial.len() > MAX_SERIAL || serial.contains('/') {
        return Err(StorageError::Serial { field, value: serial.to_owned() });
    }
    Ok(())
}

/// Where a file system is mounted.
pub(crate) fn mount_point(name: &str) -> PathBuf {
    Path::new(guest::FILESYSTEMS).join(name)
}

/// Finds a disk by its serial, waiting for it if need be.
pub(crate) async fn find_disk(serial: &str) -> Result<PathBuf, StorageError> {
    let deadline = tokio::time::Instant::now() + DISK_LIMIT;
    loop {
        if let Some(disk) = disk_now(serial).map_err(failed("look for disk", serial))? {
            return Ok(disk);
        }
        if tokio::time::Instant::now() > deadline {
            return Err(StorageError::NoDisk { serial: serial.to_owned(), limit: DISK_LIMIT });
        }
        tokio::time::sleep(DISK_RETRY).await;
    }
}

/// The device number of the disk of this serial.
///
/// # Errors
/// [`StorageError`].
pub(crate) async fn find_device(serial: &str) -> Result<rustix::fs::Dev, StorageError> {
    let disk = find_disk(serial).await?;
    Ok(rustix::fs::stat(&disk).map_err(failed("look at disk", serial))?.st_rdev)
}

/// Finds a disk by its serial among those that are there now.
fn disk_now(serial: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        // Not every block device has a serial; and one can vanish while being looked at.
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end_matches(['\n', '\0']) == serial {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Mounts a file system. Its description has passed [`check`].
///
/// # Errors
/// [`StorageError`].
pub(crate) async fn mount(host: &Host, filesystem: &Filesystem) -> Result<(), StorageError> {
    let name = filesystem.name.as_str();
    let target = mount_point(name);
    fs::create_dir_all(&target).map_err(failed("make mount point", name))?;
    let disk = match host {
        Host::Vm => find_disk(&filesystem.disk_serial).await?,
        Host::Test(directory) => {
            let source = directory.join(format!("disk-{}", filesystem.disk_serial));
            if source.is_dir() {
                return rustix::mount::mount_bind(&source, &target)
                    .map_err(failed("bind the test's disk", name));
            }
            find_disk(&filesystem.disk_serial).await?
        }
    };
    let disk = disk.to_string_lossy();
    // ext4: space that containers free goes back to the host. The device says if it cannot do so,
    // and then the option does nothing.
    let options: &[_] = match (filesystem.fstype.as_str(), filesystem.read_only) {
        ("ext4", false) => &[("discard".to_owned(), None)],
        _ => &[],
    };
    let mut options = options.to_vec();
    if filesystem.read_only {
        // Of the file system itself, not only of this mount: no journal must be replayed.
        options.push(("ro".to_owned(), None));
    }
    let flags = if filesystem.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let mount = rootfs::new_filesystem(&filesystem.fstype, &disk, &options, flags)
        .map_err(failed("mount file system", name))?;
    attach(&mount, &target).map_err(failed("mount file system", name))
}

/// Unmounts a file system, and removes its mount point.
///
/// # Errors
/// The kernel's; EBUSY if it is in use.
pub(crate) fn unmount(name: &str) -> io::Result<()> {
    let target = mount_point(name);
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::NOFOLLOW)?;
    fs::remove_dir(target)
}

/// Attaches a mount at a path.
pub(crate) fn attach(mount: &std::os::fd::OwnedFd, target: &Path) -> io::Result<()> {
    use std::os::fd::AsFd;
    let target = rustix::fs::open(
        target,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    Ok(rootfs::attach(mount.as_fd(), target.as_fd())?)
}

/// Makes a volume. Its description has passed [`check`].
///
/// # Errors
/// [`StorageError`].
pub(crate) fn make_volume(host: &Host, volume: &Volume) -> Result<(), StorageError> {
    let name = volume.name.as_str();
    let target = Path::new(guest::VOLUMES).join(name);
    if !matches!(volume.source, Some(volume::Source::Share(_))) {
        fs::create_dir_all(&target).map_err(failed("make volume", name))?;
    }
    match &volume.source {
        None => return Err(StorageError::NoSource(name.to_owned())),
        Some(volume::Source::Share(number)) => {
            shares::bind(host, *number, name, &target)?;
            // Owner and mode are the host's.
            return spread(&target, name);
        }
        Some(volume::Source::Files(wanted)) => {
            // Not a part of the agent's own tmpfs, so that its size has a bound.
            let mount = new_tmpfs(files::volume_size(memory_size()))
                .map_err(failed("mount volume", name))?;
            attach(&mount, &target).map_err(failed("mount volume", name))?;
            files::replace(&target, wanted, volume.fs_group)
                .map_err(failed("write the files of volume", name))?;
        }
        Some(volume::Source::DirectoryOn(on)) => {
            let directory = mount_point(on).join("volumes").join(name);
            fs::create_dir_all(&directory).map_err(failed("make volume", name))?;
            rustix::mount::mount_bind(&directory, &target).map_err(failed("bind volume", name))?;
        }
        Some(volume::Source::Filesystem(on)) => {
            let root = mount_point(on);
            if volume.mode != 0 {
                // mkfs.ext4 puts it there; programs that want an empty directory stumble over it. A
                // file system that has been checked may hold files in it: then it stays.
                let _stays_if_used = fs::remove_dir(root.join("lost+found"));
            }
            rustix::mount::mount_bind(&root, &target).map_err(failed("bind volume", name))?;
        }
        Some(volume::Source::Tmpfs(tmpfs)) => {
            let mount = new_tmpfs(tmpfs.size).map_err(failed("mount volume", name))?;
            attach(&mount, &target).map_err(failed("mount volume", name))?;
        }
    }
    if volume.mode != 0 {
        set_owner(&target, volume.mode, volume.fs_group)
            .map_err(failed("set owner of volume", name))?;
    }
    spread(&target, name)
}

/// Lets a container mount in a volume for the others to see (Bidirectional propagation).
fn spread(target: &Path, name: &str) -> Result<(), StorageError> {
    rootfs::set_propagation(&target.to_string_lossy(), libc::MS_SHARED, false)
        .map_err(failed("share volume", name))
}

/// Replaces the files of a volume.
///
/// # Errors
/// [`StorageError`].
pub(crate) fn update_volume(
    volumes: &BTreeMap<String, Option<u32>>,
    name: &str,
    wanted: &Files,
) -> Result<(), StorageError> {
    let group = volumes.get(name).ok_or_else(|| StorageError::NoFiles(name.to_owned()))?;
    files::check(wanted)?;
    files::replace(&Path::new(guest::VOLUMES).join(name), wanted, *group)
        .map_err(failed("write the files of volume", name))
}

/// The guest's memory in bytes.
fn memory_size() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// A tmpfs with a size in bytes; 0 for half of the memory.
fn new_tmpfs(size: u64) -> io::Result<std::os::fd::OwnedFd> {
    let size = match size {
        0 => "50%".to_owned(),
        bytes => bytes.to_string(),
    };
    rootfs::new_filesystem("tmpfs", "tmpfs", &[("size".to_owned(), Some(size))], 0)
}

/// Mounts the pod's shared memory.
pub(crate) fn make_shm(size: u64) -> Result<(), StorageError> {
    /// What container runtimes give.
    const DEFAULT_BYTES: u64 = 64 << 20;
    let target = Path::new(guest::SHM);
    let make = || -> io::Result<()> {
        fs::create_dir_all(target)?;
        let size = if size == 0 { DEFAULT_BYTES } else { size };
        attach(&new_tmpfs(size)?, target)?;
        fs::set_permissions(target, fs::Permissions::from_mode(0o1777))
    };
    make().map_err(failed("make shared memory", guest::SHM))
}

/// Sets mode and group of a volume's root, as the kubelet does for an fsGroup: the group may do
/// what the owner may, and what is made inside belongs to it too.
fn set_owner(path: &Path, mode: u32, fs_group: Option<u32>) -> io::Result<()> {
    let mut mode = mode & 0o7777;
    if let Some(group) = fs_group {
        chown(path, None, Some(group))?;
        mode |= 0o2770;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Unmounts everything below the agent's directories, the latest first, so that the disks are
/// clean. What is still in use is detached.
///
/// # Errors
/// If the list of mounts cannot be read.
pub(crate) fn unmount_all() -> io::Result<()> {
    for target in mounts_below(&fs::read_to_string("/proc/self/mountinfo")?, "/run/husk/") {
        if let Err(error) = rustix::mount::unmount(&*target, rustix::mount::UnmountFlags::empty()) {
            tracing::warn!(target, %error, "still in use at shutdown");
            // As a last resort; sync(2) follows.
            rustix::mount::unmount(&*target, rustix::mount::UnmountFlags::DETACH)?;
        }
    }
    rustix::fs::sync();
    Ok(())
}

/// The mount points below a directory in the text of a mountinfo file, the latest first.
fn mounts_below(mountinfo: &str, directory: &str) -> Vec<String> {
    let point = |line: &str| line.split(' ').nth(4).map(str::to_owned);
    let mut all: Vec<String> =
        mountinfo.lines().filter_map(point).filter(|p| p.starts_with(directory)).collect();
    all.reverse();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn filesystem(name: &str, fstype: &str, serial: &str, read_only: bool) -> Filesystem {
        Filesystem {
            name: name.into(),
            disk_serial: serial.into(),
            fstype: fstype.into(),
            read_only,
        }
    }

    fn volume(name: &str, source: Option<volume::Source>) -> Volume {
        Volume { name: name.into(), source, mode: 0o777, fs_group: None }
    }

    #[test]
    fn names_that_are_no_path_component_are_refused() {
        for name in ["", ".", "..", "a/b", "A", "-a", "a_b", "a\0"] {
            assert!(check_name("f", name).is_err(), "{name:?}");
        }
        assert!(check_name("f", &"a".repeat(MAX_NAME + 1)).is_err());
        check_name("f", "layer-0.sha256").unwrap();
    }

    #[test]
    fn impossible_file_systems_are_refused() {
        let refuse = |fs: &[Filesystem]| check(fs, &[]).unwrap_err().to_string();
        assert!(refuse(&[filesystem("a", "xfs", "s", true)]).contains("fstype"));
        assert!(refuse(&[filesystem("a", "erofs", "s", false)]).contains("read_only"));
        assert!(refuse(&[filesystem("a", "ext4", "", false)]).contains("disk_serial"));
        assert!(refuse(&[filesystem("a", "ext4", "../x", false)]).contains("disk_serial"));
        let many = vec![filesystem("a", "ext4", "s", false); MAX_ENTRIES + 1];
        assert_eq!(refuse(&many), "filesystems: 1025 of them; a pod has at most 1024");
        let same = filesystem("a", "ext4", "s", false);
        assert!(refuse(&[same.clone(), same]).contains("twice"));
    }

    #[test]
    fn volumes_must_have_a_source_that_exists() {
        let filesystems = [filesystem("scratch", "ext4", "s", false)];
        let on = |name: &str| Some(volume::Source::DirectoryOn(name.into()));
        check(&filesystems, &[volume("v", on("scratch"))]).unwrap();
        assert!(check(&filesystems, &[volume("v", on("other"))]).is_err());
        assert!(check(&filesystems, &[volume("v", None)]).is_err());
        assert!(
            check(&filesystems, &[volume("v", on("scratch")), volume("v", on("scratch"))]).is_err()
        );
    }

    #[test]
    fn a_group_gets_the_rights_of_the_owner_and_the_set_group_id_bit() {
        let directory = tempfile::tempdir().unwrap();
        let own = fs::metadata(directory.path()).unwrap().gid();
        set_owner(directory.path(), 0o755, Some(own)).unwrap();
        assert_eq!(fs::metadata(directory.path()).unwrap().mode() & 0o7777, 0o2775);
        set_owner(directory.path(), 0o777, None).unwrap();
        assert_eq!(fs::metadata(directory.path()).unwrap().mode() & 0o7777, 0o777);
    }

    #[test]
    fn mounts_are_found_latest_first() {
        let text = "1 0 0:1 / / rw - t t rw\n2 1 0:2 / /run/husk/fs/a rw - t t rw\n\
                    3 1 0:3 / /run/husk/volumes/v rw - t t rw\n4 1 0:4 / /tmp rw - t t rw\n";
        assert_eq!(mounts_below(text, "/run/husk/"), ["/run/husk/volumes/v", "/run/husk/fs/a"]);
    }
}

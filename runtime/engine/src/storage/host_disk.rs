//! Disks that are the host's: image files and block devices that a pod is given by their paths.
//!
//! Nobody else may write a disk that a pod uses: a lock on the file (flock) says so to other pods and to
//! whoever respects such locks, and it is held by the open file, that is by the VMM, until the last one
//! closes it. A block device is also claimed from the kernel, which then refuses to mount it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

/// Bytes in which every file system that is known here has said what it is.
const HEAD: usize = 66 * 1024;

/// Least size of a disk: a sector.
const SECTOR: u64 = 512;

/// Why a disk of the host cannot be a pod's.
#[derive(Debug, thiserror::Error)]
pub enum HostDiskError {
    /// The path is relative.
    #[error("disk {path}: the path must be absolute")]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("cannot open disk {path}")]
    Open {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device, or too small.
    #[error("{path} cannot be a disk: {reason}")]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Somebody uses it in a way that excludes this one.
    #[error(
        "disk {path} is in use{by}: a disk has one user that writes, or any number that only read"
    )]
    InUse {
        /// The path.
        path: PathBuf,
        /// Who, as far as it is known; begins with a space.
        by: String,
    },
    /// What is on it cannot be mounted.
    #[error("disk {path} holds {found}; husk mounts ext4 and erofs")]
    Unsupported {
        /// The path.
        path: PathBuf,
        /// What it holds.
        found: &'static str,
    },
    /// A file system that is only ever read.
    #[error("disk {path} holds erofs, which cannot be written: mount it read-only")]
    WritableErofs {
        /// The path.
        path: PathBuf,
    },
}

/// A file system that a guest can mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// Also an ext2 or ext3 file system, which ext4 mounts.
    Ext4,
    /// Read-only.
    Erofs,
}

impl FsType {
    /// By the kernel's name.
    #[must_use]
    pub fn named(name: &str) -> Option<FsType> {
        [FsType::Ext4, FsType::Erofs].into_iter().find(|fstype| fstype.name() == name)
    }

    /// The kernel's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FsType::Ext4 => "ext4",
            FsType::Erofs => "erofs",
        }
    }
}

/// A disk of the host, open and locked.
#[derive(Debug)]
pub struct HostDisk {
    path: PathBuf,
    file: File,
    read_only: bool,
}

impl HostDisk {
    /// Opens and locks it. Blocks for as long as the host's file system takes.
    ///
    /// # Errors
    /// [`HostDiskError`].
    pub fn open(path: &Path, read_only: bool) -> Result<HostDisk, HostDiskError> {
        if !path.is_absolute() {
            return Err(HostDiskError::Relative { path: path.to_owned() });
        }
        let open = |source: io::Error| HostDiskError::Open { path: path.to_owned(), source };
        let not = |reason| HostDiskError::NotADisk { path: path.to_owned(), reason };
        // Looked at before it is opened: to open a device can do something.
        let kind = std::fs::metadata(path).map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(not("it is neither a regular file nor a block device"));
        }
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        // Of a block device: nobody else has claimed it, e.g. by mounting it.
        let claim = kind.is_block_device() && !read_only;
        let claim = if claim { OFlags::EXCL } else { OFlags::empty() };
        let flags = access | claim | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::BUSY) => {
                let by = " (mounted, or claimed by another program)".to_owned();
                return Err(HostDiskError::InUse { path: path.to_owned(), by });
            }
            Err(errno) => return Err(open(errno.into())),
        };
        let opened = file.metadata().map_err(open)?;
        if !opened.file_type().is_file() && !opened.file_type().is_block_device() {
            return Err(not("it is neither a regular file nor a block device"));
        }
        lock(path, &file, read_only)?;
        let len = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(open)?;
        if len < SECTOR {
            return Err(not("it is smaller than a sector of 512 bytes"));
        }
        Ok(HostDisk { path: path.to_owned(), file, read_only })
    }

    /// The file system that is on it, which must be `wanted` if something is. Blocks.
    ///
    /// # Errors
    /// [`HostDiskError`].
    pub fn filesystem(&self, wanted: Option<FsType>) -> Result<FsType, HostDiskError> {
        let path = || self.path.clone();
        let head = self.head().map_err(|source| HostDiskError::Open { path: path(), source })?;
        let found = match recognise(&head) {
            Ok(fstype) if wanted.is_none_or(|wanted| wanted == fstype) => fstype,
            Ok(FsType::Ext4) => {
                return Err(HostDiskError::Unsupported { path: path(), found: "ext4, not erofs" });
            }
            Ok(FsType::Erofs) => {
                return Err(HostDiskError::Unsupported { path: path(), found: "erofs, not ext4" });
            }
            Err(found) => return Err(HostDiskError::Unsupported { path: path(), found }),
        };
        if found == FsType::Erofs && !self.read_only {
            return Err(HostDiskError::WritableErofs { path: path() });
        }
        Ok(found)
    }

    /// Its first bytes; zeros behind its end.
    fn head(&self) -> io::Result<Vec<u8>> {
        let mut head = vec![0; HEAD];
        let mut at = 0;
        while let Some(rest) = head.get_mut(at..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, u64::try_from(at).unwrap_or(u64::MAX)) {
                Ok(0) => break,
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(head)
    }

    /// The descriptor, with the lock.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Locks a disk for a reader or a writer, without waiting.
fn lock(path: &Path, file: &File, read_only: bool) -> Result<(), HostDiskError> {
    let how = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, how) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            let by = holder(file).map(|by| format!(" by {by}")).unwrap_or_default();
            Err(HostDiskError::InUse { path: path.to_owned(), by })
        }
        Err(errno) => Err(HostDiskError::Open { path: path.to_owned(), source: errno.into() }),
    }
}

/// Who has locked a file, if the kernel tells: the process that did it, which of a pod is the one that
/// holds it.
fn holder(file: &File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let device = metadata.dev();
    let pid = locker(&locks, rustix::fs::major(device), rustix::fs::minor(device), metadata.ino())?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let words: Vec<_> = words.map(|word| String::from_utf8_lossy(word)).collect();
    let command: String = words.join(" ").chars().filter(|c| !c.is_control()).take(120).collect();
    Some(match command.is_empty() {
        true => format!("process {pid}"),
        false => format!("process {pid} ({command})"),
    })
}

/// The process that has an flock on a file, by the text of /proc/locks (proc_locks(5)).
fn locker(locks: &str, major: u32, minor: u32, inode: u64) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if *at == file => pid.parse().ok(),
            _ => None,
        }
    })
}

/// What the first bytes of a disk say that is on it: a file system, or what it is instead.
fn recognise(head: &[u8]) -> Result<FsType, &'static str> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    // struct ext4_super_block's s_magic; struct erofs_super_block's magic. Both begin at 1024.
    if has(1024 + 56, &[0x53, 0xef]) {
        return Ok(FsType::Ext4);
    }
    if has(1024, &0xe0f5_e1e2_u32.to_le_bytes()) {
        return Ok(FsType::Erofs);
    }
    let others: [(usize, &[u8], &'static str); 10] = [
        (0, b"XFSB", "xfs"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (0, b"hsqs", "squashfs"),
        (0x8001, b"CD001", "iso9660"),
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (0, b"QFI\xfb", "a qcow2 image, which is no raw disk"),
        (3, b"NTFS    ", "ntfs"),
        (512, b"LABELONE", "a physical volume of LVM"),
        (512, b"EFI PART", "a partition table: name a partition"),
        (510, &[0x55, 0xaa], "a boot sector: a partition table, or vfat"),
    ];
    let other = others.into_iter().find(|(at, magic, _)| has(*at, magic));
    Err(other.map_or("no file system that is known", |(_, _, name)| name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn image(dir: &tempfile::TempDir, name: &str, at: usize, magic: &[u8]) -> PathBuf {
        let path = dir.path().join(name);
        let mut bytes = vec![0; 128 * 1024];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn one_writes_or_many_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "disk", 0, &[]);
        let readers = [(); 2].map(|()| HostDisk::open(&path, true).unwrap());
        let refused = HostDisk::open(&path, false).unwrap_err().to_string();
        let (pid, name) = (std::process::id(), path.display());
        assert!(
            refused.starts_with(&format!("disk {name} is in use by process {pid} (")),
            "{refused}"
        );
        drop(readers);
        let writer = HostDisk::open(&path, false).unwrap();
        for read_only in [true, false] {
            let refused = HostDisk::open(&path, read_only);
            assert!(matches!(refused, Err(HostDiskError::InUse { .. })));
        }
        // The lock is the open file's, whoever has it.
        let fd = writer.into_file();
        let duplicate = fd.try_clone().unwrap();
        drop(fd);
        assert!(HostDisk::open(&path, true).is_err());
        drop(duplicate);
        HostDisk::open(&path, true).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tiny = dir.path().join("tiny");
        std::fs::write(&tiny, [0; 511]).unwrap();
        let not =
            |path: &Path| matches!(HostDisk::open(path, true), Err(HostDiskError::NotADisk { .. }));
        assert!(not(&tiny) && not(dir.path()) && not(Path::new("/dev/null")));
        let missing = HostDisk::open(&dir.path().join("none"), true);
        assert!(matches!(missing, Err(HostDiskError::Open { .. })));
        let relative = HostDisk::open(Path::new("disk"), true);
        assert!(matches!(relative, Err(HostDiskError::Relative { .. })));
    }

    #[test]
    fn file_systems_are_recognised_and_others_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = |at, magic, read_only| {
            HostDisk::open(&image(&dir, "disk", at, magic), read_only).unwrap()
        };
        let ext4 = open(1080, &[0x53, 0xef], false);
        assert_eq!(ext4.filesystem(None).unwrap(), FsType::Ext4);
        assert_eq!(ext4.filesystem(Some(FsType::Ext4)).unwrap(), FsType::Ext4);
        let other = ext4.filesystem(Some(FsType::Erofs)).unwrap_err().to_string();
        assert!(other.contains("holds ext4, not erofs"), "{other}");
        drop(ext4);
        let erofs = &[0xe2, 0xe1, 0xf5, 0xe0];
        assert_eq!(open(1024, erofs, true).filesystem(None).unwrap(), FsType::Erofs);
        let writable = open(1024, erofs, false).filesystem(None);
        assert!(matches!(writable, Err(HostDiskError::WritableErofs { .. })));
        let found = |at, magic| open(at, magic, true).filesystem(None).unwrap_err().to_string();
        assert!(found(0, b"XFSB").contains("holds xfs;"));
        assert!(found(0x1_0040, b"_BHRfS_M").contains("holds btrfs;"));
        assert!(found(0, b"").contains("no file system that is known"));
        assert_eq!(recognise(&[]), Err("no file system that is known"));
    }

    #[test]
    fn the_process_with_the_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fe:01:17 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 fe:01:17 0 EOF\n\
                     3: FLOCK  ADVISORY  READ x fe:01:18 0 EOF\nrubbish\n";
        assert_eq!(locker(locks, 0xfe, 1, 17), Some(4711));
        assert_eq!(locker(locks, 0xfe, 1, 18), None);
        assert_eq!(locker(locks, 0xfe, 2, 17), None);
    }
}

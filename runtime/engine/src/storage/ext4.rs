//! Empty ext4 file systems. `mkfs.ext4` makes a template once for each size; a disk is a sparse
//! copy of it that has no name.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;

use super::{StorageError, sparse};
use crate::paths::Config;

/// Block size of the file systems, in bytes.
const BLOCK: u64 = 4096;

/// Smallest and largest disk, in bytes. The largest is what any host file system can hold sparsely
/// (ext4: 16 TiB), halved.
const MIN_BYTES: u64 = 1 << 20;
const MAX_BYTES: u64 = 8 << 40;

/// Changes when the options of [`mkfs`] do: templates of other versions are not used.
const TEMPLATE_VERSION: u32 = 1;

/// How much of what `mkfs.ext4` says goes into an error, in bytes.
const MAX_OUTPUT: usize = 2048;

/// Size of a disk whose file system holds `bytes` of file content, in bytes: `mkfs.ext4` sets
/// 1/64 of the disk aside for inodes (256 bytes for each 16 KiB) and a few blocks for each
/// block group of 128 MiB.
pub(super) fn size_to_hold(bytes: u64) -> Result<u64, StorageError> {
    if bytes > MAX_BYTES {
        return Err(StorageError::Size { bytes });
    }
    let inodes = bytes / 63;
    let groups = (bytes >> 27).saturating_add(1).saturating_mul(4 * BLOCK);
    let fixed = 512 << 10;
    let size = bytes.saturating_add(inodes).saturating_add(groups).saturating_add(fixed);
    Ok(size.next_multiple_of(BLOCK).max(MIN_BYTES))
}

/// A new disk of `bytes` bytes with an empty file system. It has no name and ends with its last
/// descriptor. Blocks.
pub(super) fn disk(config: &Config, bytes: u64) -> Result<File, StorageError> {
    let template = template(&config.templates_dir(), bytes)?;
    let dir = config.scratch_dir();
    std::fs::create_dir_all(&dir).map_err(|source| StorageError::io("create", &dir, source))?;
    let disk =
        nameless(&dir).map_err(|source| StorageError::io("create a file in", &dir, source))?;
    sparse::copy(&template, &disk)
        .map_err(|source| StorageError::io("write a disk in", &dir.join("disk"), source))?;
    Ok(disk)
}

/// A new file in `dir` without a name.
fn nameless(dir: &Path) -> std::io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(file) => Ok(file.into()),
        // The file system has no O_TMPFILE: a name for a moment.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
            let path = dir.join(format!(".{}-{:016x}", std::process::id(), random()?));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The template for disks of this size: made if it is not there yet. Crash-safe: it gets its name
/// when it is complete. Two who make it at once make the same.
fn template(dir: &Path, bytes: u64) -> Result<File, StorageError> {
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
        return Err(StorageError::Size { bytes });
    }
    let path = dir.join(format!("ext4-v{TEMPLATE_VERSION}-{bytes}"));
    match File::open(&path) {
        Ok(file) => return Ok(file),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(source) => return Err(StorageError::io("open", &path, source)),
    }
    std::fs::create_dir_all(dir).map_err(|source| StorageError::io("create", dir, source))?;
    let step = |step: &'static str| {
        let path = path.clone();
        move |source: std::io::Error| StorageError::io(step, &path, source)
    };
    let unfinished = random().map_err(step("name"))?;
    let unfinished = dir.join(format!(".{}-{unfinished:016x}", std::process::id()));
    let made = make(&unfinished, &path, bytes);
    let removed = std::fs::remove_file(&unfinished);
    let file = made?;
    removed.map_err(step("finish"))?;
    Ok(file)
}

/// Makes a template as `unfinished` and gives it its name beside that one.
fn make(unfinished: &Path, path: &Path, bytes: u64) -> Result<File, StorageError> {
    let io = |step: &'static str| {
        move |source: std::io::Error| StorageError::io(step, unfinished, source)
    };
    let create = File::options().read(true).write(true).create_new(true).open(unfinished);
    let file = create.map_err(io("create"))?;
    file.set_len(bytes).map_err(io("size"))?;
    mkfs(unfinished)?;
    file.sync_all().map_err(io("sync"))?;
    match linkat(CWD, unfinished, CWD, path, AtFlags::empty()) {
        Ok(()) | Err(Errno::EXIST) => Ok(file),
        Err(errno) => Err(StorageError::io("name", path, errno)),
    }
}

/// Makes an empty file system in an image of zeros.
///
/// It lives no longer than a pod: so no journal, no checksums, nothing kept for growing. Metadata
/// lie together and are not written before they are used, which keeps the template small (about
/// 200 KiB for 10 GiB) and so its copies fast.
fn mkfs(image: &Path) -> Result<(), StorageError> {
    let block = BLOCK.to_string();
    let features =
        "^has_journal,^resize_inode,^metadata_csum,^orphan_file,uninit_bg,extents,dir_index";
    let extended = "lazy_itable_init=1,packed_meta_blocks=1,assume_storage_prezeroed=1,nodiscard,\
                    root_owner=0:0";
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", &block, "-I", "256", "-i", "16384"])
        .args(["-O", features, "-E", extended])
        .arg(image)
        // It lies in sbin, which is not in every user's path.
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output();
    let output = match made {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(StorageError::NoMkfs),
        Err(source) => return Err(StorageError::io("run mkfs.ext4 on", image, source)),
    };
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No space left on device") {
        return Err(StorageError::io("make a file system in", image, Errno::NOSPC));
    }
    Err(StorageError::Mkfs {
        path: image.to_owned(),
        status: output.status,
        output: said.trim().chars().take(MAX_OUTPUT).collect(),
    })
}

/// Where programs of the system are: the user's path and the directories of the administrator.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// Whether `mkfs.ext4` can be found, and where.
#[must_use]
pub fn find_mkfs() -> Option<std::path::PathBuf> {
    std::env::split_paths(&search_path())
        .map(|dir| dir.join("mkfs.ext4"))
        .find(|candidate| candidate.is_file())
}

/// Bytes that can still be written to an empty file system, from its superblock (Linux:
/// Documentation/filesystems/ext4, "Super Block": at 1024; `s_free_blocks_count_lo` 0x0c,
/// `s_log_block_size` 0x18, `s_magic` 0x38, `s_free_blocks_count_hi` 0x158). For tests.
#[cfg(test)]
fn free_bytes(disk: &File) -> std::io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let field = |at: u64| {
        let mut bytes = [0; 4];
        disk.read_exact_at(&mut bytes, 1024 + at).map(|()| u32::from_le_bytes(bytes))
    };
    assert_eq!(field(0x38)? & 0xffff, 0xef53, "no ext4 file system");
    let blocks = u64::from(field(0x0c)?) | u64::from(field(0x158)?) << 32;
    Ok(blocks * (1024 << field(0x18)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::PathBuf;

    use super::*;

    pub(crate) fn config(state_dir: &Path) -> Config {
        Config {
            state_dir: state_dir.to_owned(),
            run_dir: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            kvm: PathBuf::new(),
            vmm: PathBuf::new(),
            file_server: PathBuf::new(),
            scratch_bytes: 0,
        }
    }

    #[test]
    fn a_disk_holds_what_it_was_sized_to_hold_and_little_more() {
        let state = tempfile::tempdir().unwrap();
        for limit in [1, 4096, 1 << 20, 10 << 20, 100 << 20, 1 << 30, 50 << 30, 1 << 40] {
            let size = size_to_hold(limit).unwrap();
            let free = free_bytes(&disk(&config(state.path()), size).unwrap()).unwrap();
            assert!(free >= limit, "{limit}: {free} free");
            let slack = free - limit;
            assert!(slack <= limit / 200 + (1 << 20), "{limit}: {slack} too many");
        }
    }

    #[test]
    fn disks_are_sparse_nameless_and_made_from_one_template() {
        let state = tempfile::tempdir().unwrap();
        let config = config(state.path());
        let first = disk(&config, 10 << 30).unwrap();
        first.write_all_at(b"mine", 1 << 30).unwrap();
        let second = disk(&config, 10 << 30).unwrap();
        let metadata = second.metadata().unwrap();
        assert_eq!(metadata.len(), 10 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
        assert_eq!(metadata.nlink(), 0);
        let mut text = [0; 4];
        second.read_exact_at(&mut text, 1 << 30).unwrap();
        assert_eq!(text, [0; 4], "no other disk's data");
        assert_eq!(std::fs::read_dir(config.scratch_dir()).unwrap().count(), 0);
        let templates: Vec<_> = std::fs::read_dir(config.templates_dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(templates, [format!("ext4-v{TEMPLATE_VERSION}-{}", 10_u64 << 30).as_str()]);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let state = tempfile::tempdir().unwrap();
        for bytes in [0, MIN_BYTES - 1, MAX_BYTES + 1, u64::MAX] {
            let error = disk(&config(state.path()), bytes).unwrap_err();
            assert!(matches!(error, StorageError::Size { .. }), "{error}");
        }
        assert!(size_to_hold(u64::MAX).is_err());
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_is_named() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = disk(&config(&file), 1 << 30).unwrap_err();
        assert!(error.to_string().contains("file/templates"), "{error}");
    }
}

//! Crash-safe files and locks.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use tempfile::NamedTempFile;

use super::StoreError;

/// Start of the names of files that are being written. What has it when no writer is at work was
/// left behind by a crash.
pub(super) const TEMP_PREFIX: &str = ".tmp-";

/// A file that is being written beside its final place. Dropped without [`TempBlob::persist`], it
/// is gone.
#[derive(Debug)]
pub(crate) struct TempBlob {
    file: NamedTempFile,
    target: PathBuf,
}

impl TempBlob {
    /// Starts a file that will be `directory/name`.
    pub(super) fn new(directory: &Path, name: &str) -> Result<Self, StoreError> {
        let file = tempfile::Builder::new()
            .prefix(TEMP_PREFIX)
            .tempfile_in(directory)
            .map_err(|source| StoreError::io("create a file in", directory, source))?;
        Ok(Self { file, target: directory.join(name) })
    }

    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Makes the file durable, then visible, then its name durable. Replaces what was there.
    pub(crate) fn persist(self) -> Result<(), StoreError> {
        let Self { file, target } = self;
        let failed = |action, source| StoreError::io(action, &target, source);
        file.as_file()
            .set_permissions(Permissions::from_mode(0o444))
            .map_err(|source| failed("set the permissions of", source))?;
        file.as_file().sync_all().map_err(|source| failed("write", source))?;
        file.persist(&target).map_err(|error| failed("rename a file to", error.error))?;
        let directory = target.parent().unwrap_or(Path::new("."));
        sync_directory(directory)
    }
}

/// Writes a small file whole, or not at all.
pub(super) fn write_atomically(
    directory: &Path,
    name: &str,
    bytes: &[u8],
) -> Result<(), StoreError> {
    let mut temp = TempBlob::new(directory, name)?;
    temp.file()
        .write_all(bytes)
        .map_err(|source| StoreError::io("write", &directory.join(name), source))?;
    temp.persist()
}

/// Makes renames and removals in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), StoreError> {
    File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(|source| StoreError::io("synchronise", directory, source))
}

/// Holds an advisory lock until dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock on the file `path`, which is made if missing. Blocks.
    pub(super) fn shared(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, FlockOperation::LockShared)
    }

    /// As [`Lock::shared`], for one holder alone.
    pub(super) fn exclusive(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, FlockOperation::LockExclusive)
    }

    /// `None` if another holds it.
    pub(super) fn try_exclusive(path: &Path) -> Result<Option<Self>, StoreError> {
        let file = Self::open(path)?;
        let taken =
            try_flock_exclusive(&file).map_err(|source| StoreError::io("lock", path, source))?;
        Ok(taken.then_some(Self { _file: file }))
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Self, StoreError> {
        let file = Self::open(path)?;
        flock(&file, operation).map_err(|source| StoreError::io("lock", path, source))?;
        Ok(Self { _file: file })
    }

    fn open(path: &Path) -> Result<File, StoreError> {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(|source| StoreError::io("open", path, source))
    }
}

/// Whether the exclusive lock could be had. Tries for an instant: a thread that starts a process
/// just now has given it copies of all descriptors, and so of all locks, until it calls exec.
pub(super) fn try_flock_exclusive(file: &File) -> io::Result<bool> {
    const ATTEMPTS: u32 = 6;
    const DELAY: Duration = Duration::from_millis(5);
    for attempt in 1..=ATTEMPTS {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if attempt < ATTEMPTS => std::thread::sleep(DELAY),
            Err(_) => {}
        }
    }
    Ok(false)
}

/// `flock(2)`, again when a signal interrupts it.
pub(super) fn flock(file: &File, operation: FlockOperation) -> io::Result<()> {
    loop {
        match rustix::fs::flock(file, operation) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// The names in a directory of the store; those that are no UTF-8 are not ours and left out.
pub(super) fn names(directory: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |source| StoreError::io("list", directory, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

//! Locks and files that are there completely or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::progress::say;

/// An advisory lock; released on drop, and by the kernel when the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the exclusive lock; says so if another process holds it.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn exclusive(path: &Path, what: &str) -> Result<Self> {
        if let Some(lock) = Self::try_exclusive(path)? {
            return Ok(lock);
        }
        say(format_args!("waiting for another process that {what}"));
        Self::take(path, FlockOperation::LockExclusive)
    }

    /// Waits for a lock that many may hold at once.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn shared(path: &Path) -> Result<Self> {
        Self::take(path, FlockOperation::LockShared)
    }

    /// The exclusive lock, unless somebody holds it.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
        }
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Self> {
        let file = open(path)?;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
    }
}

fn open(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Writes a small file that readers see either whole or not at all, and that only its owner reads.
///
/// # Errors
/// When it cannot be written or renamed.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Removes a directory and all in it, if it is there.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// How long a cached thing that is no longer made is kept after its last use.
const KEEP: Duration = Duration::from_secs(14 * 86_400);

/// Marks a cached directory as used now.
///
/// # Errors
/// When the mark cannot be written.
pub fn mark_used(directory: &Path) -> Result<()> {
    let path = directory.join("used");
    fs::write(&path, "").with_context(|| format!("writing {}", path.display()))
}

/// Removes from `base` what killed builds left, and what was not used for long, except `current`.
/// The lock under which things are built must be held.
///
/// # Errors
/// When something cannot be read or removed.
pub fn remove_leftovers(base: &Path, current: &Path) -> Result<()> {
    for entry in fs::read_dir(base).with_context(|| format!("reading {}", base.display()))? {
        let path = entry.context("reading the cache")?.path();
        if !path.is_dir() || path == current {
            continue;
        }
        let old = fs::metadata(path.join("used"))
            .and_then(|used| used.modified())
            .is_ok_and(|used| used.elapsed().is_ok_and(|age| age > KEEP));
        let unfinished = path.extension().is_some_and(|end| end == "tmp" || end == "old");
        if old || unfinished {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

/// Makes the finished directory `work` visible as `finished`, only after all of it is on disk, and
/// read-only. One that is there already is replaced; who has its files open keeps them.
///
/// # Errors
/// When a file cannot be synced or the directory not renamed.
pub fn publish(work: &Path, finished: &Path) -> Result<()> {
    sync_tree(work)?;
    if finished.exists() {
        let old = finished.with_extension("old");
        remove_tree(&old)?;
        fs::rename(finished, &old).with_context(|| format!("renaming {}", finished.display()))?;
        remove_tree(&old)?;
    }
    fs::rename(work, finished).with_context(|| format!("publishing {}", finished.display()))?;
    mark_used(finished)?;
    finished.parent().map_or(Ok(()), sync)
}

fn sync_tree(directory: &Path) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", directory.display()))?;
        let path = entry.path();
        let kind = entry.file_type().with_context(|| format!("reading {}", path.display()))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
                .with_context(|| format!("making {} read-only", path.display()))?;
            sync(&path)?;
        }
    }
    sync(directory)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("syncing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exclusive_lock_excludes_until_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/lock");
        let held = Lock::try_exclusive(&path).unwrap().unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(held);
        let shared = Lock::shared(&path).unwrap();
        let _also = Lock::shared(&path).unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(shared);
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn removing_a_tree_that_is_not_there_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        remove_tree(&dir.path().join("absent")).unwrap();
    }

    #[test]
    fn what_is_published_is_whole_and_replaces_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let (work, finished) = (dir.path().join("k.tmp"), dir.path().join("k"));
        for content in ["one", "two"] {
            fs::create_dir_all(work.join("sub")).unwrap();
            fs::write(work.join("sub/file"), content).unwrap();
            publish(&work, &finished).unwrap();
            assert_eq!(fs::read_to_string(finished.join("sub/file")).unwrap(), content);
            assert!(!work.exists());
        }
        let mode = fs::metadata(finished.join("sub/file")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444);
    }

    #[test]
    fn leftovers_of_killed_builds_are_removed_and_results_kept() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["killed.tmp", "replaced.old", "other", "current"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        mark_used(&dir.path().join("other")).unwrap();
        remove_leftovers(dir.path(), &dir.path().join("current")).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["current", "other"]);
    }
}

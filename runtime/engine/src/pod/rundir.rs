//! The directory of a running pod: what it keeps on the host, and proof that it is alive.
//!
//! The owner holds a lock on a file in it. A directory whose lock nobody holds is of a pod whose
//! process was killed: it is swept.

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Name of the lock in a pod's directory, and of the one that guards making and sweeping them.
const LOCK: &str = "lock";
const GUARD: &str = ".lock";

/// Why a pod's directory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A pod with this identifier runs.
    #[error("a pod with the uid {uid:?} runs already (its directory is {path})")]
    Exists {
        /// The identifier.
        uid: String,
        /// Its directory.
        path: PathBuf,
    },
    /// The identifier cannot name a directory.
    #[error("the uid {uid:?} cannot name a directory: it must be 1 to 128 letters, digits, - or _")]
    BadUid {
        /// The identifier.
        uid: String,
    },
    /// A step failed.
    #[error("cannot {step} {path}; another place can be given with --run-dir")]
    Io {
        /// What was done, e.g. `create`.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

fn io(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { step, path, source }
}

/// A pod's directory. Removed when this is dropped.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes the directory of a pod under `pods`, after sweeping those whose owners died. Blocks
    /// for moments.
    pub(super) fn create(pods: &Path, uid: &str) -> Result<RunDir, RunDirError> {
        let harmless = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if uid.is_empty() || uid.len() > 128 || !uid.bytes().all(harmless) {
            return Err(RunDirError::BadUid { uid: uid.to_owned() });
        }
        private_dirs(pods).map_err(io("create", pods))?;
        // Held while a directory exists without its lock.
        let _guard = lock(&pods.join(GUARD))?;
        sweep(pods);
        let path = pods.join(uid);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(RunDirError::Exists { uid: uid.to_owned(), path });
            }
            Err(source) => return Err(io("create", &path)(source)),
        }
        let lock = lock(&path.join(LOCK))?;
        Ok(RunDir { path, _lock: lock })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a new file in it.
    pub(super) fn create_file(&self, name: &str) -> Result<File, RunDirError> {
        let path = self.path.join(name);
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(io("create", &path))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a pod's directory");
        }
    }
}

fn private_dirs(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Opens a lock file and waits for its lock, which lasts until the file is closed.
fn lock(path: &Path) -> Result<File, RunDirError> {
    let open = File::options().write(true).create(true).truncate(false).open(path);
    let file = open.map_err(io("open", path))?;
    file.lock().map_err(io("lock", path))?;
    Ok(file)
}

/// Removes the directories under `pods` whose owners died. Blocks for moments.
///
/// # Errors
/// If they cannot be looked at; what cannot be removed is left and told in the log.
pub fn sweep_dead(pods: &Path) -> Result<(), RunDirError> {
    if !pods.exists() {
        return Ok(());
    }
    let _guard = lock(&pods.join(GUARD))?;
    sweep(pods);
    Ok(())
}

/// Removes the directories whose owners died. What cannot be removed is left and told.
fn sweep(pods: &Path) {
    let entries = match std::fs::read_dir(pods) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(path = %pods.display(), %error, "cannot look for pods whose owner died");
            return;
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        // Without a lock file the owner died between two steps: nobody else is there, because the
        // guard is held.
        let held = match File::open(path.join(LOCK)) {
            Ok(file) => matches!(file.try_lock(), Err(TryLockError::WouldBlock)),
            Err(_) => false,
        };
        if held {
            continue;
        }
        match std::fs::remove_dir_all(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "swept a pod whose owner died"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot sweep"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_private_and_gone_with_its_owner() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(&root.path().join("pods"), "u1").unwrap();
        let path = dir.path.clone();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        dir.create_file("console.log").unwrap();
        assert!(dir.create_file("console.log").is_err());
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn what_the_dead_left_is_swept_and_what_lives_is_not() {
        let root = tempfile::tempdir().unwrap();
        let alive = RunDir::create(root.path(), "alive").unwrap();
        for dead in ["dead", "half-made"] {
            std::fs::create_dir(root.path().join(dead)).unwrap();
        }
        std::fs::write(root.path().join("dead").join(LOCK), "").unwrap();
        let other = RunDir::create(root.path(), "other").unwrap();
        assert!(alive.path.exists() && other.path.exists());
        assert!(!root.path().join("dead").exists() && !root.path().join("half-made").exists());
        assert!(matches!(RunDir::create(root.path(), "alive"), Err(RunDirError::Exists { .. })));
    }

    #[test]
    fn a_uid_cannot_lead_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        for uid in ["", "..", "a/b", ".lock", &"x".repeat(129)] {
            assert!(matches!(RunDir::create(root.path(), uid), Err(RunDirError::BadUid { .. })));
        }
    }
}

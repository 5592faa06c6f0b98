//! Where the files of one record are.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use super::RecordError;
use super::files::read_json;
use crate::holder::status::StatusRecord;

/// Names of files in a record.
pub(super) const POD: &str = "pod.json";
pub(super) const MANIFEST: &str = "manifest.yaml";
pub(super) const STATUS: &str = "status.json";
pub(super) const LOCK: &str = "lock";
const SOCKET: &str = "control.sock";
const CONSOLE: &str = "console.log";
const HOLDER_LOG: &str = "holder.log";

/// Where the files of a record are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordDir(pub(super) PathBuf);

impl RecordDir {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> PathBuf {
        self.0.join(MANIFEST)
    }

    /// The log of the guest's kernel.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.join(CONSOLE)
    }

    /// What the process in the background says.
    #[must_use]
    pub fn holder_log(&self) -> PathBuf {
        self.0.join(HOLDER_LOG)
    }

    /// The directory of a container's logs.
    #[must_use]
    pub fn container(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The log of a container's run: 0 is its first one. Rotated as [`super::rotate`] says.
    #[must_use]
    pub fn log(&self, container: &str, run: u32) -> PathBuf {
        self.container(container).join(format!("{run}.log"))
    }

    /// The file that the process of the pod has locked.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.0.join(LOCK)
    }

    /// The socket's name in the directory.
    #[must_use]
    pub fn socket_name() -> &'static str {
        SOCKET
    }

    /// The status that was written last; the first one is there as soon as the record is.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn status(&self) -> Result<StatusRecord, RecordError> {
        read_json(&self.0.join(STATUS))
    }

    /// Whether a process holds the pod.
    pub(super) fn is_held(&self) -> bool {
        match File::open(self.lock_file()) {
            Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
            Err(_) => false,
        }
    }
}

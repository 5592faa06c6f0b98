//! What is kept of pods on disk, from their start until they are removed: one directory each, under
//! the state directory,
//!
//! ```text
//! pods/<namespace>_<name>_<uid>/
//!     pod.json          who it is and who holds it; written once
//!     manifest.yaml     what it was made from
//!     status.json       its status, replaced at each change
//!     lock              locked by the process that holds the pod, as long as it lives
//!     control.sock      where that process serves commands
//!     console.log       what the guest's kernel said
//!     holder.log        what the process said, if it runs in the background
//!     <container>/<restart>.log
//! ```
//!
//! All of it can be read without the process. A directory whose lock nobody holds is of a pod that
//! has ended, or whose process was killed. Nothing is synced to the disk: what a crash of the host
//! could lose is of pods that it ended.

mod dir;
mod error;
mod files;
mod pod;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(super) mod tests;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub use dir::RecordDir;
pub use error::RecordError;
pub use pod::{ContainerInfo, PodRecord};

use self::dir::{LOCK, MANIFEST, POD, STATUS};
use self::error::failed;
use self::files::{lock, read_json, remove_if_there, write_file, write_json};
use super::status::StatusRecord;

/// Version of the layout and of `pod.json`. Raised when an older husk would misread it.
pub const VERSION: u32 = 1;

/// Largest file of a record that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// Guards making and removing records.
const GUARD: &str = ".lock";

/// The record of a pod that this process holds.
#[derive(Debug)]
pub struct OwnRecord {
    dir: RecordDir,
    _lock: File,
}

impl OwnRecord {
    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &RecordDir {
        &self.dir
    }

    /// Replaces the status. Blocks for moments.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn write_status(&self, status: &StatusRecord) -> Result<(), RecordError> {
        write_json(&self.dir.0, STATUS, status)
    }

    /// Removes the record with everything in it.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove(self) -> Result<(), RecordError> {
        std::fs::remove_dir_all(&self.dir.0).map_err(failed("remove", &self.dir.0))
    }
}

/// The records of all pods.
#[derive(Debug, Clone)]
pub struct Records {
    root: PathBuf,
}

/// A record as it was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where its files are.
    pub dir: RecordDir,
    /// Who the pod is.
    pub pod: PodRecord,
    /// Its status: Failed, for one whose process is gone without having said how it ended.
    pub status: StatusRecord,
    /// Whether a process holds it.
    pub held: bool,
}

/// Something in the directory of records that is none, or a broken one.
#[derive(Debug)]
pub struct Broken {
    /// Where.
    pub path: PathBuf,
    /// Why.
    pub error: RecordError,
}

impl Records {
    /// Those below this directory, which is made when the first record is.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Records { root }
    }

    /// Where they are.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn guard(&self) -> Result<File, RecordError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(failed("create", &self.root))?;
        let path = self.root.join(GUARD);
        lock(&path)
    }

    /// Makes the record of a pod that this process is about to hold. One in the background must be
    /// the only one of its name; `replace` removes one of this name that has ended. Blocks for
    /// moments.
    ///
    /// # Errors
    /// [`RecordError::Exists`] and others.
    pub fn create(
        &self,
        pod: &PodRecord,
        manifest: &str,
        status: &StatusRecord,
        replace: bool,
    ) -> Result<OwnRecord, RecordError> {
        let path = self.root.join(pod.directory()?);
        let _guard = self.guard()?;
        if pod.background {
            self.make_room(pod, replace)?;
        }
        // Found by nobody before it is complete.
        let draft = self.root.join(format!(".{}", pod.uid));
        remove_if_there(&draft)?;
        DirBuilder::new().mode(0o700).create(&draft).map_err(failed("create", &draft))?;
        let lock = lock(&draft.join(LOCK))?;
        write_file(&draft, MANIFEST, manifest.as_bytes())?;
        write_json(&draft, STATUS, status)?;
        write_json(&draft, POD, pod)?;
        for container in &pod.containers {
            let logs = draft.join(&container.name);
            DirBuilder::new().mode(0o700).create(&logs).map_err(failed("create", &logs))?;
        }
        match std::fs::rename(&draft, &path) {
            Ok(()) => Ok(OwnRecord { dir: RecordDir(path), _lock: lock }),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                remove_if_there(&draft)?;
                Err(self.exists(pod, &RecordDir(path)))
            }
            Err(source) => Err(failed("create", &path)(source)),
        }
    }

    fn exists(&self, pod: &PodRecord, dir: &RecordDir) -> RecordError {
        let phase = match dir.status() {
            Ok(status) => status.phase,
            Err(error) => format!("in an unknown phase: {error}"),
        };
        RecordError::Exists { name: pod.full_name(), uid: pod.uid.clone(), phase }
    }

    fn make_room(&self, pod: &PodRecord, replace: bool) -> Result<(), RecordError> {
        let (found, _broken) = self.list()?;
        let same =
            |other: &&Found| (&other.pod.namespace, &other.pod.name) == (&pod.namespace, &pod.name);
        for other in found.iter().filter(same) {
            if other.held || !replace {
                return Err(RecordError::Exists {
                    name: other.pod.full_name(),
                    uid: other.pod.uid.clone(),
                    phase: other.status.phase.clone(),
                });
            }
            remove_if_there(&other.dir.0)?;
        }
        Ok(())
    }

    /// All records, sorted by namespace, name and age; and what cannot be read.
    ///
    /// # Errors
    /// If the directory cannot be read. That there is none is no error: there are no pods then.
    pub fn list(&self) -> Result<(Vec<Found>, Vec<Broken>), RecordError> {
        let (mut found, mut broken) = (Vec::new(), Vec::new());
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((found, broken)),
            Err(source) => return Err(failed("read", &self.root)(source)),
        };
        for entry in entries {
            let entry = entry.map_err(failed("read", &self.root))?;
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if hidden || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match self.read(entry.path()) {
                Ok(record) => found.push(record),
                // Removed since.
                Err(RecordError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && !entry.path().exists() => {}
                Err(error) => broken.push(Broken { path: entry.path(), error }),
            }
        }
        found.sort_by(|a, b| {
            let key = |found: &Found| {
                let pod = &found.pod;
                (pod.namespace.clone(), pod.name.clone(), pod.created_at.clone())
            };
            key(a).cmp(&key(b))
        });
        Ok((found, broken))
    }

    /// Reads the record in this directory.
    fn read(&self, path: PathBuf) -> Result<Found, RecordError> {
        let dir = RecordDir(path);
        // Asked first: a process that ends writes its last status before it lets go.
        let held = dir.is_held();
        let file = dir.0.join(POD);
        let pod: PodRecord = read_json(&file)?;
        if pod.version > VERSION {
            let PodRecord { version, husk_version, .. } = pod;
            return Err(RecordError::Newer { path: file, version, husk_version });
        }
        let mut status = dir.status()?;
        if !held {
            status = status.abandoned(format!(
                "the process {} that held the pod ended without a word: it was killed, or the \
                 host restarted",
                pod.pid
            ));
        }
        Ok(Found { dir, pod, status, held })
    }

    /// The record as it is now; `None` if it was removed.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn look_again(&self, known: &RecordDir) -> Result<Option<Found>, RecordError> {
        match self.read(known.0.clone()) {
            Ok(found) => Ok(Some(found)),
            Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes the record of a pod that nobody holds, with everything in it.
    ///
    /// # Errors
    /// [`RecordError::Runs`] and others.
    pub fn remove(&self, found: &Found) -> Result<(), RecordError> {
        let _guard = self.guard()?;
        if found.dir.is_held() {
            return Err(RecordError::Runs { name: found.pod.full_name() });
        }
        remove_if_there(&found.dir.0)
    }

    /// Removes something in the directory of records that cannot be read, unless a process holds it.
    ///
    /// # Errors
    /// [`RecordError::Runs`] and others.
    pub fn remove_broken(&self, broken: &Broken) -> Result<(), RecordError> {
        let _guard = self.guard()?;
        if RecordDir(broken.path.clone()).is_held() {
            return Err(RecordError::Runs { name: broken.path.display().to_string() });
        }
        remove_if_there(&broken.path)
    }
}

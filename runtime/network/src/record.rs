//! What is kept on disk of a pod's network, so that it is taken back whatever happens: a file for
//! each pod, written before anything is made.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cni::Attachment;

/// Largest record in bytes: a configuration and a result, each of at most 1 MiB.
const MAX_FILE: u64 = 8 << 20;

/// How the files' names end, and those of the locks of processes that hold them.
const SUFFIX: &str = ".json";
const LOCK: &str = ".lock";

/// Name of the lock under which other locks are made and removed.
const GUARD: &str = ".lock";

/// Name of the lock that whoever calls plugins shares, and that is exclusive for what must not be done
/// at the same time.
const PLUGINS: &str = ".plugins";

/// Version of the form.
const VERSION: u32 = 1;

/// Why a record could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A step failed.
    #[error("cannot {step} {path}")]
    Io {
        /// What was done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It makes no sense.
    #[error("{path} is no record of a pod's network")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A newer husk wrote it.
    #[error("{path} is of a newer version of husk ({version})")]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { step, path, source }
}

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    version: u32,
    /// Path of its network namespace.
    pub(crate) netns: PathBuf,
    /// Whether husk made that, and removes it.
    pub(crate) owned: bool,
    /// Its interface in a network, if husk asked for one.
    pub(crate) attachment: Option<Attachment>,
    /// Where that network's plugins were found.
    pub(crate) plugin_directories: Vec<PathBuf>,
}

impl Record {
    /// Of a namespace of somebody else.
    pub(crate) fn of_other(netns: PathBuf) -> Self {
        let plugin_directories = Vec::new();
        Record { version: VERSION, netns, owned: false, attachment: None, plugin_directories }
    }

    /// Of an attachment, whose namespace is husk's own.
    pub(crate) fn of(attachment: &Attachment, plugin_directories: &[PathBuf]) -> Self {
        Record {
            version: VERSION,
            netns: attachment.netns.clone(),
            owned: true,
            attachment: Some(attachment.clone()),
            plugin_directories: plugin_directories.to_vec(),
        }
    }
}

/// The records of all pods.
#[derive(Debug, Clone)]
pub(crate) struct Records(pub(crate) PathBuf);

impl Records {
    fn path(&self, uid: &str) -> PathBuf {
        self.0.join(format!("{uid}{SUFFIX}"))
    }

    fn make(&self) -> Result<(), RecordError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(failed("make", &self.0))
    }

    /// Takes the lock of a pod, which lasts until the file is closed; `None` if somebody has it.
    pub(crate) fn lock(&self, uid: &str) -> Result<Option<File>, RecordError> {
        self.make()?;
        let _guard = self.guard()?;
        let path = self.0.join(format!("{uid}{LOCK}"));
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
        }
    }

    /// Removes the lock of a pod, which the caller has.
    pub(crate) fn remove_lock(&self, uid: &str) -> Result<(), RecordError> {
        let _guard = self.guard()?;
        remove(&self.0.join(format!("{uid}{LOCK}")))
    }

    /// Waits for moments.
    fn guard(&self) -> Result<File, RecordError> {
        let path = self.0.join(GUARD);
        let file = open_lock(&path)?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// Says that plugins are called for an attachment, as long as the file is open. Waits for who has
    /// them for itself.
    pub(crate) fn share_plugins(&self) -> Result<File, RecordError> {
        self.make()?;
        let path = self.0.join(PLUGINS);
        let file = open_lock(&path)?;
        file.lock_shared().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// Keeps everybody else from calling plugins for attachments, as long as the file is open; `None`
    /// if somebody does.
    pub(crate) fn plugins_alone(&self) -> Result<Option<File>, RecordError> {
        self.make()?;
        let path = self.0.join(PLUGINS);
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
        }
    }

    /// Writes a record so that also after a crash the old one or the new one is there, whole.
    pub(crate) fn write(&self, uid: &str, record: &Record) -> Result<(), RecordError> {
        let path = self.path(uid);
        let draft = self.0.join(format!(".{uid}"));
        self.make()?;
        let bytes = serde_json::to_vec(record)
            .map_err(|source| RecordError::Malformed { path: path.clone(), source })?;
        let open = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        open.and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        })
        .map_err(failed("write", &draft))?;
        std::fs::rename(&draft, &path).map_err(failed("write", &path))?;
        self.sync()
    }

    /// Makes the kernel remember names.
    fn sync(&self) -> Result<(), RecordError> {
        File::open(&self.0)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync", &self.0))
    }

    /// The record of a pod, if there is one.
    pub(crate) fn read(&self, uid: &str) -> Result<Option<Record>, RecordError> {
        let path = self.path(uid);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened
                .and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
                .map_err(failed("read", &path))?,
        };
        let malformed = |source| RecordError::Malformed { path: path.clone(), source };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(malformed)?;
        let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let version = u32::try_from(version).unwrap_or(u32::MAX);
        if version > VERSION {
            return Err(RecordError::Newer { path, version });
        }
        serde_json::from_value(value).map(Some).map_err(malformed)
    }

    /// Forgets a pod.
    pub(crate) fn remove(&self, uid: &str) -> Result<(), RecordError> {
        remove(&self.path(uid))?;
        self.sync()
    }

    /// The pods that have records.
    pub(crate) fn list(&self) -> Result<Vec<String>, RecordError> {
        let entries = match std::fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &self.0)(error)),
        };
        let mut uids = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("read", &self.0))?.file_name();
            let uid = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            uids.extend(uid.filter(|uid| !uid.starts_with('.')).map(str::to_owned));
        }
        uids.sort();
        Ok(uids)
    }
}

fn open_lock(path: &Path) -> Result<File, RecordError> {
    let mut options = File::options();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(failed("open", path))
}

/// Removes a file, unless it is gone.
fn remove(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_kept_listed_and_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records(directory.path().join("network"));
        assert_eq!(records.list().unwrap(), Vec::<String>::new());
        let record = Record::of_other("/run/netns/x".into());
        records.write("b", &record).unwrap();
        records.write("a", &record).unwrap();
        records.write("a", &record).unwrap();
        assert_eq!(records.list().unwrap(), ["a", "b"]);
        assert_eq!(records.read("a").unwrap(), Some(record));
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert_eq!(records.read("a").unwrap(), None);
        assert_eq!(records.list().unwrap(), ["b"]);
    }

    #[test]
    fn a_pod_is_held_by_one_process_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records(directory.path().join("network"));
        let held = records.lock("a").unwrap().unwrap();
        assert!(records.lock("a").unwrap().is_none() && records.lock("b").unwrap().is_some());
        records.remove_lock("a").unwrap();
        drop(held);
        assert!(records.lock("a").unwrap().is_some());
        assert_eq!(records.list().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn plugins_are_called_by_many_or_by_one_alone() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records(directory.path().join("network"));
        let (one, other) = (records.share_plugins().unwrap(), records.share_plugins().unwrap());
        assert!(records.plugins_alone().unwrap().is_none());
        drop((one, other));
        assert!(records.plugins_alone().unwrap().is_some());
        assert_eq!(records.list().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_is_no_record_or_a_newer_one_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records(directory.path().to_owned());
        let write = |text: &str| std::fs::write(directory.path().join("a.json"), text).unwrap();
        write("{");
        assert!(matches!(records.read("a"), Err(RecordError::Malformed { .. })));
        write(r#"{"version": 1}"#);
        assert!(matches!(records.read("a"), Err(RecordError::Malformed { .. })));
        write(r#"{"version": 2}"#);
        assert!(matches!(records.read("a"), Err(RecordError::Newer { version: 2, .. })));
    }
}

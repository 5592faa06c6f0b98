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

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cri_log::timestamp;
use super::status::StatusRecord;
use crate::types::{PodSpec, Rootfs};

/// Version of the layout and of `pod.json`. Raised when an older husk would misread it.
pub const VERSION: u32 = 1;

/// Largest file of a record that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// Names of files in a record.
const POD: &str = "pod.json";
const MANIFEST: &str = "manifest.yaml";
const STATUS: &str = "status.json";
const LOCK: &str = "lock";
const SOCKET: &str = "control.sock";
const CONSOLE: &str = "console.log";
const HOLDER_LOG: &str = "holder.log";
/// Guards making and removing records.
const GUARD: &str = ".lock";

/// Why a record cannot be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file system's refusal.
    #[error("cannot {step} {}; run as root, or choose a directory of your own with --state-dir", path.display())]
    Io {
        /// What was done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} cannot be understood", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is too large to be what it should be.
    #[error("{} is larger than {MAX_FILE} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Made by a husk that is newer than this one.
    #[error("{} is of version {version}, made by husk {husk_version}; this husk knows {VERSION}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Who made it.
        husk_version: String,
    },
    /// The pod exists.
    #[error(
        "a pod {name} exists already ({phase}, uid {uid}); remove it with `husk rm {name}`, or \
         give --replace if it has ended"
    )]
    Exists {
        /// Its namespace and name.
        name: String,
        /// Its uid.
        uid: String,
        /// Its phase.
        phase: String,
    },
    /// A part of the name cannot be part of a file's name.
    #[error("{part:?} cannot be part of a file's name")]
    BadName {
        /// The part.
        part: String,
    },
    /// The pod runs.
    #[error("pod {name} runs; stop it first, or give --force")]
    Runs {
        /// Its name.
        name: String,
    },
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { step, path, source }
}

/// `pod.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRecord {
    /// [`VERSION`].
    pub version: u32,
    /// The husk that made it.
    pub husk_version: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its unique identifier.
    pub uid: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// Whether it runs in the background: then its record stays when it has ended.
    pub background: bool,
    /// The process that holds it.
    pub pid: u32,
    /// The directory in which that process has the directory of the running pod.
    pub run_dir: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Init containers and containers, in the order of their start.
    pub containers: Vec<ContainerInfo>,
}

/// What `pod.json` says of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerInfo {
    /// Its name.
    pub name: String,
    /// Its image, as the manifest names it.
    pub image: String,
    /// Whether it has a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Whether it has a standard input.
    #[serde(default)]
    pub stdin: bool,
}

impl PodRecord {
    /// Of a pod that this process is about to hold.
    #[must_use]
    pub fn new(spec: &PodSpec, uid: &str, run_dir: &Path, background: bool) -> Self {
        let containers = spec.all_containers().map(|container| ContainerInfo {
            name: container.name.clone(),
            image: match &container.rootfs {
                Rootfs::Image { reference, pull_policy: _ } => reference.clone(),
            },
            tty: container.tty,
            stdin: container.stdin,
        });
        PodRecord {
            version: VERSION,
            husk_version: env!("CARGO_PKG_VERSION").to_owned(),
            namespace: spec.metadata.namespace.clone(),
            name: spec.metadata.name.clone(),
            uid: uid.to_owned(),
            created_at: timestamp(SystemTime::now()),
            background,
            pid: std::process::id(),
            run_dir: run_dir.to_owned(),
            vcpus: spec.vm.vcpus,
            memory_mib: spec.vm.memory_mib,
            containers: containers.collect(),
        }
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The name of its directory.
    fn directory(&self) -> Result<String, RecordError> {
        for part in [&self.namespace, &self.name, &self.uid] {
            let harmless = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if part.is_empty() || part.starts_with('.') || !part.bytes().all(harmless) {
                return Err(RecordError::BadName { part: part.clone() });
            }
        }
        Ok(format!("{}_{}_{}", self.namespace, self.name, self.uid))
    }
}

/// Where the files of a record are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordDir(PathBuf);

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

    fn is_held(&self) -> bool {
        match File::open(self.lock_file()) {
            Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
            Err(_) => false,
        }
    }
}

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
        let phase = dir.status().map(|status| status.phase).unwrap_or_default();
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

fn remove_if_there(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path)(source))
        }
        _ => Ok(()),
    }
}

/// Opens a lock file and waits for its lock, which lasts until the file is closed.
fn lock(path: &Path) -> Result<File, RecordError> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed("open", path))?;
    file.lock().map_err(failed("lock", path))?;
    Ok(file)
}

fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), RecordError> {
    let path = dir.join(name);
    let mut bytes =
        serde_json::to_vec(value).map_err(|source| RecordError::Malformed { path, source })?;
    bytes.push(b'\n');
    write_file(dir, name, &bytes)
}

/// Writes a file so that readers see the old one or the new one, whole.
fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
    let (draft, path) = (dir.join(format!(".{name}")), dir.join(name));
    let open = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
    open.and_then(|mut file| file.write_all(bytes)).map_err(failed("write", &draft))?;
    std::fs::rename(&draft, &path).map_err(failed("write", &path))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(failed("read", path))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(RecordError::TooLarge { path: path.to_owned() });
    }
    serde_json::from_slice(&bytes)
        .map_err(|source| RecordError::Malformed { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    pub(crate) fn record(name: &str, uid: &str, background: bool) -> PodRecord {
        PodRecord {
            version: VERSION,
            husk_version: "0".into(),
            namespace: "default".into(),
            name: name.into(),
            uid: uid.into(),
            created_at: "2026-01-02T15:04:05.000000000Z".into(),
            background,
            pid: 1,
            run_dir: "/run/husk".into(),
            vcpus: 1,
            memory_mib: 128,
            containers: vec![ContainerInfo {
                name: "main".into(),
                image: "i".into(),
                tty: false,
                stdin: false,
            }],
        }
    }

    pub(crate) fn found(namespace: &str, name: &str, uid: &str, held: bool) -> Found {
        let pod = PodRecord { namespace: namespace.into(), ..record(name, uid, true) };
        let dir = RecordDir(PathBuf::from("/nowhere"));
        Found { dir, pod, status: StatusRecord::default(), held }
    }

    fn running() -> StatusRecord {
        StatusRecord { phase: "Running".into(), ..StatusRecord::default() }
    }

    fn records() -> (tempfile::TempDir, Records) {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("pods"));
        (dir, records)
    }

    #[test]
    fn a_record_is_private_found_and_abandoned_with_its_owner() {
        let (_dir, records) = records();
        assert!(records.list().unwrap().0.is_empty());
        let own = records.create(&record("p", "u1", true), "kind: Pod", &running(), false).unwrap();
        let mode = std::fs::metadata(own.dir().path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(std::fs::read_to_string(own.dir().manifest()).unwrap(), "kind: Pod");
        assert!(own.dir().container("main").is_dir());
        let (found, broken) = records.list().unwrap();
        assert!(found[0].held && broken.is_empty());
        assert_eq!(found[0].status.phase, "Running");
        assert!(matches!(records.remove(&found[0]), Err(RecordError::Runs { .. })));
        drop(own);
        let found = records.look_again(&found[0].dir).unwrap().unwrap();
        assert!(!found.held);
        assert_eq!(found.status.reason, super::super::status::ABANDONED);
        records.remove(&found).unwrap();
        assert!(records.look_again(&found.dir).unwrap().is_none());
        assert!(records.list().unwrap().0.is_empty());
    }

    #[test]
    fn the_last_status_is_kept() {
        let (_dir, records) = records();
        let own = records.create(&record("p", "u1", true), "", &running(), false).unwrap();
        let last = StatusRecord { phase: "Succeeded".into(), ..StatusRecord::default() };
        own.write_status(&last).unwrap();
        drop(own);
        assert_eq!(records.list().unwrap().0[0].status, last);
    }

    #[test]
    fn in_the_background_a_name_is_used_once() {
        let (_dir, records) = records();
        let create = |uid: &str, background, replace| {
            records.create(&record("p", uid, background), "", &running(), replace)
        };
        let first = create("u1", true, false).unwrap();
        assert!(matches!(create("u2", true, true), Err(RecordError::Exists { .. })), "it runs");
        let foreground = create("u3", false, false).unwrap();
        foreground.remove().unwrap();
        drop(first);
        assert!(matches!(create("u4", true, false), Err(RecordError::Exists { .. })));
        drop(create("u5", true, true).unwrap());
        let (found, _) = records.list().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pod.uid, "u5");
        // The same uid again, whoever holds it.
        assert!(matches!(create("u5", false, false), Err(RecordError::Exists { .. })));
    }

    #[test]
    fn what_a_newer_husk_made_and_what_is_broken_is_told_and_can_be_removed() {
        let (_dir, records) = records();
        let newer = PodRecord { version: VERSION + 1, ..record("new", "u1", true) };
        drop(records.create(&newer, "", &running(), false).unwrap());
        std::fs::create_dir(records.root().join("default_torn_u2")).unwrap();
        let (found, broken) = records.list().unwrap();
        assert!(found.is_empty());
        assert_eq!(broken.len(), 2);
        assert!(broken.iter().any(|b| matches!(b.error, RecordError::Newer { version: 2, .. })));
        for broken in &broken {
            records.remove_broken(broken).unwrap();
        }
        assert!(records.list().unwrap().1.is_empty());
    }

    #[test]
    fn names_cannot_lead_elsewhere() {
        let (_dir, records) = records();
        for uid in ["", "..", "a/b", ".x", "a b"] {
            let created = records.create(&record("p", uid, false), "", &running(), false);
            assert!(matches!(created, Err(RecordError::BadName { .. })), "{uid:?}");
        }
    }
}

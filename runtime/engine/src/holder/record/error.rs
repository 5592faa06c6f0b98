//! Why something cannot be done with a record.

use std::io;
use std::path::{Path, PathBuf};

use super::{MAX_FILE, VERSION};

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

pub(super) fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { step, path, source }
}

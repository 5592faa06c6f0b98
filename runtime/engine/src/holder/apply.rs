//! The documents of a pod that runs, and those that it takes over (`husk apply`).

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::manifest::{self, Applied, Documents, ManifestError};
use crate::pod::{AccessError, PodAccess};

/// How messages call the documents with which the pod was started.
const SOURCE_NAME: &str = "the pod's manifest";

/// Longest name of a source, in bytes (PATH_MAX): every message repeats it.
const MAX_SOURCE_NAME: usize = 4096;

/// Why documents are not taken over.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    /// The name of the documents is too long.
    #[error("source_name: {len} bytes; must be at most {MAX_SOURCE_NAME}")]
    SourceName { len: usize },
    /// The pod cannot take them over.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The pod's own documents cannot be read.
    #[error("cannot read the pod's manifest {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// They do not describe the pod.
    #[error("the pod's manifest {} does not describe it any more", path.display())]
    NotInManifest { path: PathBuf },
    /// The guest does not take them.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The program is ending.
    #[error("an internal task was cut off")]
    Task(#[from] tokio::task::JoinError),
}

/// What takes documents over. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Applier(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    access: PodAccess,
    /// Where the documents are with which the pod was started.
    manifest: PathBuf,
    /// Its namespace and name.
    who: (String, String),
    /// The pod's documents as they are now; `None` as long as nothing was taken over. Locked for the
    /// whole of an update: they come one after the other.
    documents: Mutex<Option<Arc<Documents>>>,
}

impl Applier {
    pub(super) fn new(access: PodAccess, manifest: PathBuf, who: (String, String)) -> Self {
        Applier(Arc::new(Inner { access, manifest, who, documents: Mutex::default() }))
    }

    /// Has the pod take over what in these documents concerns it; returns the volumes whose files
    /// were replaced, or `None` if nothing concerns it.
    pub(super) async fn apply(
        &self,
        text: String,
        source_name: String,
    ) -> Result<Option<Vec<String>>, ApplyError> {
        let inner = self.0.clone();
        // In a task of its own: who asks may go away halfway.
        tokio::spawn(async move { inner.apply(text, source_name).await }).await?
    }
}

impl Inner {
    async fn apply(
        &self,
        text: String,
        source_name: String,
    ) -> Result<Option<Vec<String>>, ApplyError> {
        if source_name.len() > MAX_SOURCE_NAME {
            return Err(ApplyError::SourceName { len: source_name.len() });
        }
        self.access.check_running()?;
        let mut documents = self.documents.lock().await;
        let known = match &*documents {
            Some(known) => known.clone(),
            None => {
                let (path, who) = (self.manifest.clone(), self.who.clone());
                let read = tokio::task::spawn_blocking(move || read(path, &who)).await??;
                documents.insert(Arc::new(read)).clone()
            }
        };
        let applied =
            tokio::task::spawn_blocking(move || known.apply(&text, &source_name)).await??;
        let Some(Applied { documents: next, pod }) = applied else { return Ok(None) };
        let replaced = self.access.change(&pod).await?;
        *documents = Some(Arc::new(next));
        tracing::info!(volumes = ?replaced, "documents were taken over");
        Ok(Some(replaced))
    }
}

/// Reads the documents with which the pod was started.
fn read(path: PathBuf, (namespace, name): &(String, String)) -> Result<Documents, ApplyError> {
    let limit = (manifest::MAX_LEN as u64).saturating_add(1);
    let mut text = String::new();
    let read = File::open(&path).and_then(|file| file.take(limit).read_to_string(&mut text));
    if let Err(source) = read {
        return Err(ApplyError::Read { path, source });
    }
    let documents = Documents::read(&text, SOURCE_NAME, (namespace.as_str(), name.as_str()))?;
    documents.ok_or(ApplyError::NotInManifest { path })
}

//! The images of a host, shared by its pods.
//!
//! ```text
//! ROOT/refs.json                which reference stands for which manifest
//!      blobs/sha256/HEX         manifests and configurations, as they came
//!      layers/sha256/HEX.erofs  layers by diff-id, as read-only file systems
//!      writers.lock             shared by who adds, exclusive for who collects garbage
//!      index.lock               held while refs.json is read, changed and replaced
//! ```
//! Every file is written beside its place, made durable and renamed, so that whatever has its
//! final name is complete. A layer is in use as long as anybody holds its file open as
//! [`Store::resolve`] gave it, which has a shared lock on it that also survives being passed to
//! another process: such a layer is never collected, and a crash needs no clean-up.

mod files;
mod garbage;
mod index;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::ImageConfiguration;
use rustix::fs::FlockOperation;

use crate::digest::Digest;
use crate::document::{self, Document, DocumentError, Manifest};
use crate::erofs;
use crate::limits::Limits;
use crate::reference::{Reference, ReferenceError};

pub(crate) use files::{Lock, TempBlob};
pub use garbage::Collected;
use index::{Index, Record};

/// Why the store cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host's file system failed.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of the store is not the JSON that was written.
    #[error("{path} is damaged", path = .path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A file of the store is not what was written.
    #[error("{path} is damaged: {reason}", path = .path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A stored document cannot be read.
    #[error("{path} is damaged", path = .path.display())]
    Document {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: DocumentError,
    },
    /// The name is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The store does not have the image.
    #[error("the image {reference} is not in the store; pull or import it first")]
    NotFound {
        /// The complete reference.
        reference: String,
    },
}

impl StoreError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

/// A layer that cannot be collected while [`Layer::file`] or a duplicate of it is open anywhere.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Digest of the uncompressed archive that it was made from.
    pub diff_id: Digest,
    /// The EROFS blob.
    pub path: PathBuf,
    /// Bytes of the blob; a multiple of 4096.
    pub size: u64,
    /// The blob, open for reading. Pass this one to whoever uses the layer.
    pub file: Arc<File>,
}

/// An image that is ready to be used.
#[derive(Debug, Clone)]
pub struct Image {
    /// Complete.
    pub reference: String,
    /// Digest of the manifest for this platform.
    pub manifest_digest: Digest,
    /// Digest of the configuration, which Docker calls the image's id.
    pub config_digest: Digest,
    /// How its containers run unless told otherwise.
    pub config: ImageConfiguration,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// A line of [`Store::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Complete.
    pub reference: String,
    /// Digest of the manifest.
    pub manifest_digest: Digest,
    /// Digest of the configuration.
    pub config_digest: Digest,
    /// `os/architecture`.
    pub platform: String,
    /// How many layers it has.
    pub layers: usize,
    /// Bytes of its layers' blobs, those shared with other images included.
    pub size: u64,
    /// When the reference came to stand for this image.
    pub stored_at: SystemTime,
}

/// See the module's documentation. Methods block on the file system, and on other processes that
/// use the same store; they are never to be called from an async task directly.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
}

impl Store {
    /// Opens the store in the directory `root`, which is made if missing, with the default limits.
    /// Removes what a crashed writer left half-made.
    ///
    /// # Errors
    /// If the directory cannot be made or written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self::open_with_limits(root, Limits::default())
    }

    /// As [`Store::open`], with limits of the caller's.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_limits(root: impl Into<PathBuf>, limits: Limits) -> Result<Self, StoreError> {
        let store = Self { root: root.into(), limits };
        for directory in [store.blobs(), store.layers()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&directory)
                .map_err(|source| StoreError::io("create", &directory, source))?;
        }
        store.sweep_temporary()?;
        Ok(store)
    }

    /// The limits that images are held to.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The image that `reference` stands for, completed if it is short. Its layers are protected
    /// for as long as the result's files are open.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what is damaged.
    pub fn resolve(&self, reference: &str) -> Result<Image, StoreError> {
        let reference = reference.parse::<Reference>()?.to_string();
        // Nothing is collected between the look into the index and the locks on the layers.
        let _writer = self.writer_lock()?;
        let index = Index::load(&self.root)?;
        let Some(record) = index.images.get(&reference) else {
            return Err(StoreError::NotFound { reference });
        };
        let (manifest, config) = self.documents(record.manifest)?;
        let diff_ids = self.diff_ids_of(&manifest, &config)?;
        let layers = diff_ids.into_iter().map(|diff_id| self.open_layer(diff_id));
        Ok(Image {
            reference,
            manifest_digest: record.manifest,
            config_digest: manifest.config.digest,
            layers: layers.collect::<Result<_, _>>()?,
            config,
        })
    }

    /// All images, sorted by reference.
    ///
    /// # Errors
    /// If something is damaged.
    pub fn list(&self) -> Result<Vec<ImageSummary>, StoreError> {
        let _writer = self.writer_lock()?;
        let index = Index::load(&self.root)?;
        let summary = |(reference, record): (&String, &Record)| {
            let (manifest, config) = self.documents(record.manifest)?;
            let diff_ids = self.diff_ids_of(&manifest, &config)?;
            let mut size = 0u64;
            for diff_id in &diff_ids {
                let path = self.layer_path(diff_id);
                let metadata =
                    fs::metadata(&path).map_err(|source| StoreError::io("read", &path, source))?;
                size = size.saturating_add(metadata.len());
            }
            Ok(ImageSummary {
                reference: reference.clone(),
                manifest_digest: record.manifest,
                config_digest: manifest.config.digest,
                platform: format!("{}/{}", config.os(), config.architecture()),
                layers: diff_ids.len(),
                size,
                stored_at: UNIX_EPOCH
                    .checked_add(std::time::Duration::from_secs(record.stored_at))
                    .unwrap_or(UNIX_EPOCH),
            })
        };
        index.images.iter().map(summary).collect()
    }

    /// Forgets a reference, and removes what no other reference needs and nobody uses.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if files cannot be removed.
    pub fn remove(&self, reference: &str) -> Result<Collected, StoreError> {
        let reference = reference.parse::<Reference>()?.to_string();
        self.change_index(|index| match index.images.remove(&reference) {
            Some(_) => Ok(()),
            None => Err(StoreError::NotFound { reference: reference.clone() }),
        })?;
        self.collect_garbage()
    }

    /// Held by whoever adds to the store, from before the first file until it is in the index.
    pub(crate) fn writer_lock(&self) -> Result<Lock, StoreError> {
        Lock::shared(&self.root.join("writers.lock"))
    }

    pub(crate) fn has_layer(&self, diff_id: &Digest) -> bool {
        self.open_layer(*diff_id).is_ok()
    }

    /// Starts the blob of a layer.
    pub(crate) fn new_layer(&self, diff_id: &Digest) -> Result<TempBlob, StoreError> {
        TempBlob::new(&self.layers(), &layer_name(diff_id))
    }

    /// Makes an image whose layers are in the store known under `references`. The caller has
    /// verified the documents, and holds the writer lock.
    pub(crate) fn commit(
        &self,
        references: &[Reference],
        manifest: &[u8],
        config: &[u8],
    ) -> Result<Digest, StoreError> {
        for bytes in [config, manifest] {
            let digest = Digest::of(bytes);
            files::write_atomically(&self.blobs(), &digest.to_hex(), bytes)?;
        }
        let manifest = Digest::of(manifest);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.change_index(|index| {
            for reference in references {
                let record = Record { manifest, stored_at: since_epoch.as_secs() };
                index.images.insert(reference.to_string(), record);
            }
            Ok(())
        })?;
        Ok(manifest)
    }

    fn change_index(
        &self,
        change: impl FnOnce(&mut Index) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let _writer = self.writer_lock()?;
        let _index = Lock::exclusive(&self.root.join("index.lock"))?;
        let mut index = Index::load(&self.root)?;
        change(&mut index)?;
        index.save(&self.root)
    }

    fn diff_ids_of(
        &self,
        manifest: &Manifest,
        config: &ImageConfiguration,
    ) -> Result<Vec<Digest>, StoreError> {
        document::diff_ids(config).map_err(|source| {
            let path = self.blob_path(&manifest.config.digest);
            StoreError::Document { path, source }
        })
    }

    /// A stored image's manifest and configuration.
    fn documents(&self, manifest: Digest) -> Result<(Manifest, ImageConfiguration), StoreError> {
        let (path, bytes) = self.read_blob(&manifest)?;
        let manifest = match Document::parse(&bytes, &self.limits) {
            Ok(Document::Manifest(manifest)) => manifest,
            Ok(Document::Index(_)) => {
                let reason = "an index where a manifest belongs".to_owned();
                return Err(StoreError::Corrupt { path, reason });
            }
            Err(source) => return Err(StoreError::Document { path, source }),
        };
        let (path, bytes) = self.read_blob(&manifest.config.digest)?;
        let config = document::parse_config(&bytes)
            .map_err(|source| StoreError::Document { path, source })?;
        Ok((manifest, config))
    }

    fn read_blob(&self, digest: &Digest) -> Result<(PathBuf, Vec<u8>), StoreError> {
        let path = self.blob_path(digest);
        let bytes = fs::read(&path).map_err(|source| StoreError::io("read", &path, source))?;
        if Digest::of(&bytes) != *digest {
            let reason = "its content does not have the digest in its name".to_owned();
            return Err(StoreError::Corrupt { path, reason });
        }
        Ok((path, bytes))
    }

    /// Opens a layer's blob, takes the lock that protects it, and checks that it is whole.
    fn open_layer(&self, diff_id: Digest) -> Result<Layer, StoreError> {
        let path = self.layer_path(&diff_id);
        let failed = |source| StoreError::io("open", &path, source);
        let mut file = File::open(&path).map_err(failed)?;
        files::flock(&file, FlockOperation::LockShared).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut start = Vec::new();
        file.by_ref().take(u64::from(erofs::BLOCK_SIZE)).read_to_end(&mut start).map_err(failed)?;
        if erofs::blob_size(&start) != Some(size) {
            let reason = "it is truncated, or no blob of a layer".to_owned();
            return Err(StoreError::Corrupt { path, reason });
        }
        Ok(Layer { diff_id, path, size, file: Arc::new(file) })
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    fn layers(&self) -> PathBuf {
        self.root.join("layers/sha256")
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.to_hex())
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.layers().join(layer_name(diff_id))
    }
}

fn layer_name(diff_id: &Digest) -> String {
    format!("{}.erofs", diff_id.to_hex())
}

//! Images from files: OCI layouts and Docker archives.

mod archive;
mod docker;
mod layout;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::digest::{Digest, DigestError};
use crate::document::{self, Descriptor, Document, DocumentError, Manifest, Platform};
use crate::layer::{self, Compression, LayerError, LayerSpec};
use crate::limits::Limits;
use crate::progress::{Event, NoProgress, Progress};
use crate::reference::{Reference, ReferenceError};
use crate::store::{Store, StoreError};
use husk_archive::tar::TarError;

/// How deep indexes may refer to indexes.
pub(crate) const MAX_INDEX_DEPTH: u32 = 4;

/// Why an image cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the image cannot be read.
    #[error("cannot read {path}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no archive.
    #[error("{path} is not a usable archive", path = .path.display())]
    Archive {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: TarError,
    },
    /// Something that the image must have is not there, or is not what it must be.
    #[error("{path} is not a usable image: {reason}", path = .path.display())]
    Format {
        /// The layout or archive.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A JSON file of the layout or archive is not what it must be.
    #[error("{name} in {path} is malformed", path = .path.display())]
    Json {
        /// The layout or archive.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A digest that cannot be verified.
    #[error("{name} in {path} has a name that is no digest", path = .path.display())]
    Digest {
        /// The layout or archive.
        path: PathBuf,
        /// What has it.
        name: String,
        /// Why not.
        #[source]
        source: DigestError,
    },
    /// A manifest, index or configuration cannot be used.
    #[error("cannot use {digest}")]
    Document {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: DocumentError,
    },
    /// A document is not what its digest or length says.
    #[error(
        "the {what} {expected} does not have the content that its descriptor names: it has {actual}"
    )]
    Mismatch {
        /// Manifest, index or configuration.
        what: &'static str,
        /// What the descriptor says.
        expected: String,
        /// What there is.
        actual: String,
    },
    /// A document above the limit.
    #[error("the {what} has {size} bytes, more than {max}")]
    TooLarge {
        /// Which document.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// Indexes in indexes.
    #[error("indexes are nested more than {MAX_INDEX_DEPTH} deep at {digest}")]
    TooDeep {
        /// The innermost that was seen.
        digest: Digest,
    },
    /// A layer cannot be converted.
    #[error("layer {number} of {count}, {digest}, cannot be used")]
    Layer {
        /// Counted from 1, the lowest.
        number: usize,
        /// How many the image has.
        count: usize,
        /// Its digest in the manifest.
        digest: Digest,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// Neither the image nor the caller gives a name.
    #[error("{path} holds an image without a name; give one", path = .path.display())]
    NoName {
        /// The layout or archive.
        path: PathBuf,
    },
    /// The name that the image or the caller gives is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
}

/// What to import, and how.
#[derive(Clone, Copy)]
pub struct ImportOptions<'a> {
    /// Name for the image, in place of those that it has. Selects nothing: with it the source must
    /// hold a single image.
    pub name: Option<&'a str>,
    /// Which manifest of an index to take; an image for another platform is refused.
    pub platform: &'a Platform,
    /// Told of what happens.
    pub progress: &'a dyn Progress,
}

impl std::fmt::Debug for ImportOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, platform, progress: _ } = self;
        f.debug_struct("ImportOptions").field("name", name).field("platform", platform).finish()
    }
}

impl ImportOptions<'_> {
    /// `linux/amd64`, the image's own names, and no progress.
    #[must_use]
    pub fn new(platform: &Platform) -> ImportOptions<'_> {
        ImportOptions { name: None, platform, progress: &NoProgress }
    }
}

/// An image that was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// What it is known as in the store, complete.
    pub references: Vec<String>,
    /// Digest of its manifest.
    pub manifest_digest: Digest,
}

/// Where the blobs of an image are.
trait Blobs {
    /// Opens the blob of this digest.
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + '_>, ImportError>;
}

impl Store {
    /// Imports every image of a directory or archive, whichever of the two forms it has: an OCI
    /// image layout if it claims to be one, else what `docker save` writes. Blocks.
    ///
    /// # Errors
    /// See [`ImportError`]; then nothing of the image that failed is left in the store.
    pub fn import(
        &self,
        path: impl AsRef<Path>,
        options: &ImportOptions<'_>,
    ) -> Result<Vec<Imported>, ImportError> {
        let path = path.as_ref();
        if layout::is_layout(path)? {
            self.import_oci_layout(path, options)
        } else {
            self.import_docker_archive(path, options)
        }
    }

    /// Imports every image of an OCI image layout: a directory, or a tar archive of one (not
    /// compressed). Images that the store holds already cost nothing. Blocks.
    ///
    /// # Errors
    /// See [`ImportError`]; then nothing of the image that failed is left in the store.
    pub fn import_oci_layout(
        &self,
        path: impl AsRef<Path>,
        options: &ImportOptions<'_>,
    ) -> Result<Vec<Imported>, ImportError> {
        self.importing(|store| layout::import(store, path.as_ref(), options))
    }

    /// Imports every image of an archive made by `docker save` (not compressed). Blocks.
    ///
    /// # Errors
    /// See [`ImportError`]; then nothing of the image that failed is left in the store.
    pub fn import_docker_archive(
        &self,
        path: impl AsRef<Path>,
        options: &ImportOptions<'_>,
    ) -> Result<Vec<Imported>, ImportError> {
        self.importing(|store| docker::import(store, path.as_ref(), options))
    }

    /// Keeps collectors away while `import` runs, and cleans up behind it if it fails.
    fn importing<T>(
        &self,
        import: impl FnOnce(&Self) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let lock = self.writer_lock()?;
        let result = import(self);
        drop(lock);
        if result.is_err()
            && let Err(error) = self.collect_garbage()
        {
            // The import's own error is the one to report.
            tracing::warn!(%error, "cannot clean up after a failed import");
        }
        result
    }

    /// Imports the image behind a descriptor, whatever holds its blobs.
    fn import_image(
        &self,
        blobs: &dyn Blobs,
        descriptor: &Descriptor,
        references: &[Reference],
        options: &ImportOptions<'_>,
    ) -> Result<Imported, ImportError> {
        let (bytes, manifest) = find_manifest(self.limits(), blobs, descriptor, options.platform)?;
        let config_bytes = read_document(self.limits(), blobs, &manifest.config, "configuration")?;
        let digest = manifest.config.digest;
        let diff_ids = document::parse_config(&config_bytes)
            .and_then(|config| document::check_config(&manifest, &config, options.platform))
            .map_err(|source| ImportError::Document { digest, source })?;
        let count = diff_ids.len();
        options.progress.event(Event::Layers { count });
        for (number, (layer, &diff_id)) in manifest.layers.iter().zip(&diff_ids).enumerate() {
            let compression = layer
                .layer_compression()
                .map_err(|source| ImportError::Document { digest: layer.digest, source })?;
            let spec = LayerSpec { blob: Some((layer.digest, layer.size)), diff_id, compression };
            let number = number.saturating_add(1);
            self.add_layer(
                &spec,
                options.progress,
                || blobs.open(&layer.digest),
                |source| ImportError::Layer { number, count, digest: layer.digest, source },
            )?;
        }
        let manifest_digest = self.commit(references, &bytes, &config_bytes)?;
        let references = references.iter().map(ToString::to_string).collect();
        Ok(Imported { references, manifest_digest })
    }

    /// Converts a layer into the store, unless it is there already. `open` is only called if its
    /// bytes are needed.
    pub(crate) fn add_layer<Input: Read, Failure: From<StoreError>>(
        &self,
        spec: &LayerSpec,
        progress: &dyn Progress,
        open: impl FnOnce() -> Result<Input, Failure>,
        wrap: impl FnOnce(LayerError) -> Failure,
    ) -> Result<(), Failure> {
        let diff_id = spec.diff_id;
        if self.has_layer(&diff_id) {
            progress.event(Event::LayerExists { diff_id });
            return Ok(());
        }
        let size = spec.blob.map_or(0, |(_, size)| size);
        progress.event(Event::LayerStarted { diff_id, size });
        let mut temp = self.new_layer(&diff_id)?;
        let input = open()?;
        let on_bytes = |bytes| progress.event(Event::LayerProgress { diff_id, bytes });
        let out = io::BufWriter::with_capacity(1 << 20, temp.file());
        let stats = match layer::convert(input, spec, self.limits(), out, &on_bytes) {
            Ok(stats) => stats,
            Err(error) => return Err(wrap(error)),
        };
        temp.persist()?;
        tracing::debug!(%diff_id, size = stats.size, inodes = stats.inodes, "layer stored");
        progress.event(Event::LayerDone { diff_id, size: stats.size });
        Ok(())
    }
}

/// Follows indexes down to the manifest for the platform; returns its bytes as well.
fn find_manifest(
    limits: &Limits,
    blobs: &dyn Blobs,
    descriptor: &Descriptor,
    platform: &Platform,
) -> Result<(Vec<u8>, Manifest), ImportError> {
    let mut descriptor = descriptor.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        let digest = descriptor.digest;
        let bytes = read_document(limits, blobs, &descriptor, "manifest")?;
        let failed = |source| ImportError::Document { digest, source };
        match Document::parse(&bytes, limits).map_err(failed)? {
            Document::Manifest(manifest) => return Ok((bytes, manifest)),
            Document::Index(entries) => {
                descriptor = document::choose(&entries, platform).map_err(failed)?.clone();
            }
        }
    }
    Err(ImportError::TooDeep { digest: descriptor.digest })
}

/// Reads a document whole, within the limit, and verifies it.
fn read_document(
    limits: &Limits,
    blobs: &dyn Blobs,
    descriptor: &Descriptor,
    what: &'static str,
) -> Result<Vec<u8>, ImportError> {
    let max = limits.max_document_bytes;
    if descriptor.size > max {
        return Err(ImportError::TooLarge { what: what.to_owned(), size: descriptor.size, max });
    }
    let mut bytes = Vec::new();
    blobs
        .open(&descriptor.digest)?
        .take(max.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|source| ImportError::Io { path: descriptor.digest.to_string().into(), source })?;
    verify_document(&bytes, descriptor, what)?;
    Ok(bytes)
}

/// Whether a document is what its descriptor says.
pub(crate) fn verify_document(
    bytes: &[u8],
    descriptor: &Descriptor,
    what: &'static str,
) -> Result<(), ImportError> {
    let digest = Digest::of(bytes);
    let expected = || descriptor.digest.to_string();
    if digest != descriptor.digest {
        return Err(ImportError::Mismatch {
            what,
            expected: expected(),
            actual: digest.to_string(),
        });
    }
    if bytes.len() as u64 != descriptor.size {
        let expected = format!("{} of {} bytes", expected(), descriptor.size);
        let actual = format!("{} bytes", bytes.len());
        return Err(ImportError::Mismatch { what, expected, actual });
    }
    Ok(())
}

/// The names of an image: the caller's, or else its own.
fn names(
    path: &Path,
    options: &ImportOptions<'_>,
    own: &[String],
) -> Result<Vec<Reference>, ImportError> {
    let references: Vec<Reference> = match options.name {
        Some(name) => vec![name.parse()?],
        None => own.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
    };
    if references.is_empty() {
        return Err(ImportError::NoName { path: path.to_owned() });
    }
    Ok(references)
}

/// How the layers of an archive that says nothing about it are compressed.
const UNSAID: Compression = Compression::Detect;

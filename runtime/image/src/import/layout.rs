//! OCI image layouts (image-spec 1.1, "Image Layout").

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::archive::Archive;
use super::{Blobs, ImportError, ImportOptions, Imported, names};
use crate::digest::Digest;
use crate::document::{Descriptor, Document};
use crate::store::Store;

const INDEX: &str = "index.json";
const MARKER: &str = "oci-layout";
/// The version of the layout that this reads.
const LAYOUT_VERSION: &str = "1.0.0";
/// A full name, as containerd and BuildKit write it.
const FULL_NAME: &str = "io.containerd.image.name";
/// By the specification; a tag alone with some tools, a full name with others.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The files of a layout.
enum Layout {
    Directory(PathBuf),
    Archive(Archive),
}

impl Layout {
    fn open(path: &Path) -> Result<Self, ImportError> {
        let metadata = std::fs::metadata(path)
            .map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
        if metadata.is_dir() {
            Ok(Self::Directory(path.to_owned()))
        } else {
            Archive::open(path).map(Self::Archive)
        }
    }

    /// Opens a file by its path in the layout, which this module made: never one from the image.
    fn file(&self, name: &str) -> Result<Box<dyn Read + '_>, ImportError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(name);
                match File::open(&path) {
                    Ok(file) => Ok(Box::new(file)),
                    Err(source) => Err(ImportError::Io { path, source }),
                }
            }
            Self::Archive(archive) => Ok(Box::new(archive.file(name)?)),
        }
    }

    /// A small file whole.
    fn read(&self, path: &Path, name: &str, max: u64) -> Result<Vec<u8>, ImportError> {
        let mut bytes = Vec::new();
        self.file(name)?
            .take(max.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|source| ImportError::Io { path: path.join(name), source })?;
        if bytes.len() as u64 > max {
            let size = bytes.len() as u64;
            return Err(ImportError::TooLarge { what: name.to_owned(), size, max });
        }
        Ok(bytes)
    }
}

impl Blobs for Layout {
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + '_>, ImportError> {
        self.file(&format!("blobs/sha256/{}", digest.to_hex()))
    }
}

/// Whether the directory or archive is meant to be a layout. A directory can be nothing else.
pub(super) fn is_layout(path: &Path) -> Result<bool, ImportError> {
    Ok(match Layout::open(path)? {
        Layout::Directory(_) => true,
        Layout::Archive(archive) => archive.contains(MARKER),
    })
}

pub(super) fn import(
    store: &Store,
    path: &Path,
    options: &ImportOptions<'_>,
) -> Result<Vec<Imported>, ImportError> {
    let layout = Layout::open(path)?;
    let max = store.limits().max_document_bytes;
    check_marker(path, &layout.read(path, MARKER, max)?)?;
    let bytes = layout.read(path, INDEX, max)?;
    let format = |reason: String| ImportError::Format { path: path.to_owned(), reason };
    let entries = match Document::parse(&bytes, store.limits()) {
        Ok(Document::Index(entries)) => entries,
        Ok(Document::Manifest(_)) => {
            return Err(format(format!("its {INDEX} is a manifest, not an index")));
        }
        Err(source) => {
            return Err(ImportError::Document { digest: Digest::of(&bytes), source });
        }
    };
    // One image may stand there once for each platform, or be accompanied by signatures and such.
    let usable = |entry: &&Descriptor| match &entry.platform {
        Some(_) => crate::document::choose(std::slice::from_ref(*entry), options.platform).is_ok(),
        None => true,
    };
    let chosen: Vec<&Descriptor> = entries.iter().filter(usable).collect();
    if chosen.is_empty() {
        return Err(format(crate::document::no_platform(&entries, options.platform).to_string()));
    }
    if let (Some(_), [_, _, ..]) = (options.name, chosen.as_slice()) {
        return Err(format(format!("it holds {} images: one name is not enough", chosen.len())));
    }
    let mut imported = Vec::new();
    for descriptor in chosen {
        let own = own_name(descriptor);
        let references = names(path, options, own.as_slice())?;
        imported.push(store.import_image(&layout, descriptor, &references, options)?);
    }
    Ok(imported)
}

fn check_marker(path: &Path, bytes: &[u8]) -> Result<(), ImportError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Marker {
        image_layout_version: String,
    }
    let marker: Marker = serde_json::from_slice(bytes).map_err(|source| ImportError::Json {
        path: path.to_owned(),
        name: MARKER.to_owned(),
        source,
    })?;
    if marker.image_layout_version != LAYOUT_VERSION {
        let version = marker.image_layout_version;
        let reason = format!("it is a layout of version {version:?}, not {LAYOUT_VERSION}");
        return Err(ImportError::Format { path: path.to_owned(), reason });
    }
    Ok(())
}

fn own_name(descriptor: &Descriptor) -> Option<String> {
    let annotation = |key: &str| descriptor.annotations.get(key).cloned();
    annotation(FULL_NAME).or_else(|| annotation(REF_NAME))
}

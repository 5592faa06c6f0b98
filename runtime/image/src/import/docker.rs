//! Archives made by `docker save`: a `manifest.json` that lists configurations and layers by their
//! paths in the archive.

use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::archive::Archive;
use super::{ImportError, ImportOptions, Imported, UNSAID, names};
use crate::digest::Digest;
use crate::document::{self, Document};
use crate::layer::LayerSpec;
use crate::progress::Event;
use crate::reference::Reference;
use crate::store::Store;

const MANIFEST: &str = "manifest.json";

/// One image, as `manifest.json` lists it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

pub(super) fn import(
    store: &Store,
    path: &Path,
    options: &ImportOptions<'_>,
) -> Result<Vec<Imported>, ImportError> {
    let archive = Archive::open(path)?;
    let bytes = read(store, path, &archive, MANIFEST)?;
    let listed: Vec<Listed> = serde_json::from_slice(&bytes).map_err(|source| {
        ImportError::Json { path: path.to_owned(), name: MANIFEST.to_owned(), source }
    })?;
    let format = |reason| ImportError::Format { path: path.to_owned(), reason };
    let max = store.limits().max_index_entries;
    match listed.as_slice() {
        [] => return Err(format("it holds no image".to_owned())),
        many if many.len() > max => {
            return Err(format(format!("it holds {} images, more than {max}", many.len())));
        }
        [_, _, ..] if options.name.is_some() => {
            let reason = format!("it holds {} images: one name is not enough", listed.len());
            return Err(format(reason));
        }
        _ => {}
    }
    listed.iter().map(|image| import_image(store, path, &archive, image, options)).collect()
}

fn import_image(
    store: &Store,
    path: &Path,
    archive: &Archive,
    image: &Listed,
    options: &ImportOptions<'_>,
) -> Result<Imported, ImportError> {
    let references = names(path, options, image.repo_tags.as_deref().unwrap_or_default())?;
    let config_bytes = read(store, path, archive, &image.config)?;
    let digest = Digest::of(&config_bytes);
    check_named_digest(path, &image.config, digest)?;
    let config = document::parse_config(&config_bytes)
        .map_err(|source| ImportError::Document { digest, source })?;
    let diff_ids =
        document::diff_ids(&config).map_err(|source| ImportError::Document { digest, source })?;
    // A manifest is made up for the image: nothing but its configuration vouches for the layers.
    let sizes = image.layers.iter().map(|name| archive.size(name));
    let sizes: Vec<u64> = sizes.collect::<Result<_, _>>()?;
    let layers: Vec<(Digest, u64)> = diff_ids.iter().copied().zip(sizes).collect();
    let manifest = document::synthesize_manifest((digest, config_bytes.len() as u64), &layers);
    let parsed = match Document::parse(&manifest, store.limits()) {
        Ok(Document::Manifest(parsed)) => parsed,
        Ok(Document::Index(_)) => {
            return Err(ImportError::Document {
                digest,
                source: document::DocumentError::Ambiguous,
            });
        }
        Err(source) => return Err(ImportError::Document { digest, source }),
    };
    if image.layers.len() != diff_ids.len() {
        let (layers, diff_ids) = (image.layers.len(), diff_ids.len());
        let source = document::DocumentError::LayerCount { layers, diff_ids };
        return Err(ImportError::Document { digest, source });
    }
    document::check_config(&parsed, &config, options.platform)
        .map_err(|source| ImportError::Document { digest, source })?;
    let count = layers.len();
    options.progress.event(Event::Layers { count });
    for (number, (name, &(diff_id, _))) in image.layers.iter().zip(&layers).enumerate() {
        let spec = LayerSpec { blob: None, diff_id, compression: UNSAID };
        let number = number.saturating_add(1);
        store.add_layer(
            &spec,
            options.progress,
            || archive.file(name),
            |source| ImportError::Layer { number, count, digest: diff_id, source },
        )?;
    }
    let manifest_digest = store.commit(&references, &manifest, &config_bytes)?;
    let references = references.iter().map(Reference::to_string).collect();
    Ok(Imported { references, manifest_digest })
}

/// Docker names the configuration by its digest: `HEX.json`, or `blobs/sha256/HEX`.
fn check_named_digest(path: &Path, name: &str, actual: Digest) -> Result<(), ImportError> {
    let stem = name.rsplit('/').next().unwrap_or(name);
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    let expected: Digest = format!("sha256:{stem}").parse().map_err(|source| {
        ImportError::Digest { path: path.to_owned(), name: name.to_owned(), source }
    })?;
    if actual != expected {
        let (expected, actual) = (expected.to_string(), actual.to_string());
        return Err(ImportError::Mismatch { what: "configuration", expected, actual });
    }
    Ok(())
}

fn read(store: &Store, path: &Path, archive: &Archive, name: &str) -> Result<Vec<u8>, ImportError> {
    let max = store.limits().max_document_bytes;
    let size = archive.size(name)?;
    if size > max {
        return Err(ImportError::TooLarge { what: name.to_owned(), size, max });
    }
    let mut bytes = Vec::new();
    archive
        .file(name)?
        .read_to_end(&mut bytes)
        .map_err(|source| ImportError::Io { path: path.join(name), source })?;
    Ok(bytes)
}

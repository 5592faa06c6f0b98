//! Entry points for the fuzz targets in `tests/fuzz`; not for anything else.

use std::io::Cursor;

use crate::digest::Digest;
use crate::document::{self, Document, Platform};
use crate::layer::{self, Compression, LayerSpec};
use crate::limits::Limits;

/// Converts a layer whose digests are right, whatever it is.
pub fn layer_tar(bytes: &[u8]) {
    let diff_id = Digest::of(bytes);
    let blob = Some((diff_id, bytes.len() as u64));
    let limits = Limits { max_layer_entries: 10_000, ..Limits::default() };
    let spec = LayerSpec { blob, diff_id, compression: Compression::None };
    let mut out = Cursor::new(Vec::new());
    // Refusing is as good as converting; only a panic or a hang is a finding.
    if let Ok(stats) = layer::convert(bytes, &spec, &limits, &mut out, &|_| {}) {
        assert_eq!(stats.size, out.get_ref().len() as u64);
    }
}

/// Parses a manifest, index or configuration.
pub fn image_manifest(bytes: &[u8]) {
    let platform = Platform::default();
    let config = document::parse_config(bytes);
    match Document::parse(bytes, &Limits::default()) {
        Ok(Document::Index(entries)) => drop(document::choose(&entries, &platform)),
        Ok(Document::Manifest(manifest)) => {
            for layer in &manifest.layers {
                drop(layer.layer_compression());
            }
            drop(config.map(|config| document::check_config(&manifest, &config, &platform)));
        }
        Err(_) => drop(config.map(|config| document::diff_ids(&config))),
    }
}

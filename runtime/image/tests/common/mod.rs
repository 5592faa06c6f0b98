//! Small images for the tests. Not every test uses all of this.
#![allow(dead_code)]

use husk_image::Digest;
use serde_json::{Value, json};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image as a registry serves it.
pub(crate) struct TestImage {
    pub(crate) config: Vec<u8>,
    /// Compressed.
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()})
}

fn archive(path: &str, data: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, path, data).unwrap();
    builder.into_inner().unwrap()
}

/// An image of two layers; `salt` makes it another one.
pub(crate) fn image(architecture: &str, salt: &str) -> TestImage {
    let noise = (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8);
    let noise: Vec<u8> = noise.collect();
    image_of(architecture, vec![archive("base", &noise), archive("top", salt.as_bytes())])
}

/// An image of these layers, of which the lowest is compressed with gzip, the others with zstd.
pub(crate) fn image_of(architecture: &str, plain: Vec<Vec<u8>>) -> TestImage {
    let diff_ids: Vec<Digest> = plain.iter().map(|bytes| Digest::of(bytes)).collect();
    let mut layers = Vec::new();
    let mut descriptors = Vec::new();
    for (number, bytes) in plain.iter().enumerate() {
        let (compression, stored) = if number == 0 {
            let level = flate2::Compression::fast();
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
            std::io::Write::write_all(&mut gzip, bytes).unwrap();
            ("gzip", gzip.finish().unwrap())
        } else {
            ("zstd", zstd::encode_all(bytes.as_slice(), 1).unwrap())
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar+{compression}");
        descriptors.push(descriptor(&media_type, &stored));
        layers.push(stored);
    }
    let config = json!({
        "os": "linux", "architecture": architecture, "config": {"Cmd": ["/top"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": descriptors,
    });
    TestImage { config, layers, manifest: manifest.to_string().into_bytes() }
}

/// An index of images with their architectures.
pub(crate) fn index(images: &[(&str, &TestImage)]) -> Vec<u8> {
    let entries: Vec<Value> = images
        .iter()
        .map(|(architecture, image)| {
            let mut entry = descriptor(OCI_MANIFEST, &image.manifest);
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    index.to_string().into_bytes()
}

/// An error and everything below it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

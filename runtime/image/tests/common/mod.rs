//! Small images for the tests of pulling.

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

/// An image of two layers, one compressed with gzip, one with zstd; `salt` makes it another one.
pub(crate) fn image(architecture: &str, salt: &str) -> TestImage {
    let noise: Vec<u8> =
        (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let plain = [archive("base", &noise), archive("top", salt.as_bytes())];
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &plain[0]).unwrap();
    let layers = vec![gzip.finish().unwrap(), zstd::encode_all(plain[1].as_slice(), 1).unwrap()];
    let config = json!({
        "os": "linux", "architecture": architecture, "config": {"Cmd": ["/top"]},
        "rootfs": {"type": "layers", "diff_ids": plain.map(|bytes| Digest::of(&bytes))},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [
            descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layers[0]),
            descriptor("application/vnd.oci.image.layer.v1.tar+zstd", &layers[1]),
        ],
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

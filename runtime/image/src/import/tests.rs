use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// A tar archive of regular files.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, path, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A layout under construction.
struct Builder<'a>(&'a Path);

impl Builder<'_> {
    fn new(path: &Path) -> Builder<'_> {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Builder(path)
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes);
        fs::write(self.0.join("blobs/sha256").join(digest.to_hex()), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn image(&self, layers: &[(&str, Vec<u8>, Digest)]) -> serde_json::Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.2).collect();
        let config = serde_json::json!({
            "os": "linux", "architecture": "amd64",
            "config": {"Cmd": ["sh"], "Entrypoint": null, "Env": ["A=b"], "Volumes": null},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob(document::OCI_CONFIG, config.to_string().as_bytes());
        let layers: Vec<_> =
            layers.iter().map(|(media_type, bytes, _)| self.blob(media_type, bytes)).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": document::OCI_MANIFEST,
            "config": config, "layers": layers,
        });
        self.blob(document::OCI_MANIFEST, manifest.to_string().as_bytes())
    }

    fn index(&self, mut manifest: serde_json::Value, name: &str) {
        manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.0.join("index.json"), index.to_string()).unwrap();
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn layout_is_imported_and_resolved() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("layout");
    let builder = Builder::new(&source);
    let lower = tar_of(&[("etc/motd", b"hello\n"), ("big", &[7; 10_000])]);
    let upper = tar_of(&[("etc/.wh.motd", b""), ("etc/new", b"x")]);
    let zipped = gzip(&lower);
    let layers = [
        ("application/vnd.oci.image.layer.v1.tar+gzip", zipped, Digest::of(&lower)),
        (PLAIN, upper.clone(), Digest::of(&upper)),
    ];
    builder.index(builder.image(&layers), "web:1");

    let store = Store::open(directory.path().join("store")).unwrap();
    let platform = Platform::default();
    let imported = store.import_oci_layout(&source, &ImportOptions::new(&platform)).unwrap();
    assert_eq!(imported[0].references, ["docker.io/library/web:1"]);
    let image = store.resolve("web:1").unwrap();
    assert_eq!(image.manifest_digest, imported[0].manifest_digest);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[0].diff_id, Digest::of(&lower));
    assert_eq!(image.config.config().as_ref().unwrap().cmd().as_ref().unwrap(), &["sh"]);
    for layer in &image.layers {
        let output = Command::new("fsck.erofs").arg(&layer.path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

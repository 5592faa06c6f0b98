//! OCI image layouts (image-spec, image-layout.md): a directory with `oci-layout`, `index.json` and
//! blobs named by their digests.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::layer::Layer;

/// Media type of an image's manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Annotation that names an image in an index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// All images say that they were made then, so that their digests depend on their content only.
const CREATED: &str = "2025-01-01T00:00:00Z";
/// The tag of each image.
pub const TAG: &str = "latest";

/// How the image's containers are run: the `config` object of image-spec, config.md.
#[derive(Debug, Clone, Default)]
pub struct RunConfig {
    /// `KEY=VALUE`.
    pub env: Vec<&'static str>,
    /// First words of the command line.
    pub entrypoint: Vec<&'static str>,
    /// Default for the rest of it.
    pub cmd: Vec<&'static str>,
    /// User name or number; empty for root.
    pub user: &'static str,
    /// Empty for `/`.
    pub working_dir: &'static str,
    /// Such as `80/tcp`.
    pub exposed_ports: Vec<&'static str>,
    /// Paths.
    pub volumes: Vec<&'static str>,
    /// Such as `SIGQUIT`; empty for the default.
    pub stop_signal: &'static str,
}

impl RunConfig {
    fn to_json(&self) -> Value {
        let set = |keys: &[&str]| -> Value {
            keys.iter().map(|key| ((*key).to_owned(), json!({}))).collect::<Map<_, _>>().into()
        };
        let mut config = Map::new();
        let mut add = |key: &str, present: bool, value: Value| {
            if present {
                config.insert(key.to_owned(), value);
            }
        };
        add("Env", !self.env.is_empty(), json!(self.env));
        add("Entrypoint", !self.entrypoint.is_empty(), json!(self.entrypoint));
        add("Cmd", !self.cmd.is_empty(), json!(self.cmd));
        add("User", !self.user.is_empty(), json!(self.user));
        add("WorkingDir", !self.working_dir.is_empty(), json!(self.working_dir));
        add("ExposedPorts", !self.exposed_ports.is_empty(), set(&self.exposed_ports));
        add("Volumes", !self.volumes.is_empty(), set(&self.volumes));
        add("StopSignal", !self.stop_signal.is_empty(), json!(self.stop_signal));
        config.into()
    }
}

/// The architecture's name in images, of the machine that this was built for.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The image's configuration file: image-spec, config.md.
#[must_use]
pub fn config_file(run: &RunConfig, layers: &[Layer]) -> Vec<u8> {
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    let history: Vec<Value> = layers
        .iter()
        .map(|_| json!({ "created": CREATED, "created_by": "husk-test-images" }))
        .collect();
    let config = json!({
        "created": CREATED,
        "architecture": architecture(),
        "os": "linux",
        "config": run.to_json(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": history,
    });
    config.to_string().into_bytes()
}

/// Writes the layout of one image into `directory`, which must not be there. The layers' blobs are
/// linked, not copied.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path, name: &str, run: &RunConfig, layers: &[Layer]) -> Result<()> {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
    let mut descriptors = Vec::new();
    for layer in layers {
        let link = blobs.join(layer.digest.trim_start_matches("sha256:"));
        fs::hard_link(&layer.blob, &link).with_context(|| format!("linking {}", link.display()))?;
        descriptors.push(descriptor(layer.compression.media_type(), &layer.digest, layer.size));
    }
    let config = write_blob(&blobs, CONFIG, &config_file(run, layers))?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": descriptors,
    });
    let mut manifest = write_blob(&blobs, MANIFEST, manifest.to_string().as_bytes())?;
    manifest["platform"] = json!({ "architecture": architecture(), "os": "linux" });
    manifest["annotations"] = json!({
        REF_NAME: TAG,
        "io.containerd.image.name": format!("{name}:{TAG}"),
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
    let write = |name: &str, content: String| {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
    };
    write("index.json", index.to_string())?;
    write("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string())
}

fn write_blob(blobs: &Path, media_type: &str, content: &[u8]) -> Result<Value> {
    let hash = hex::encode(Sha256::digest(content));
    let path = blobs.join(&hash);
    fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
    Ok(descriptor(media_type, &format!("sha256:{hash}"), content.len() as u64))
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest, "size": size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{self, Compression};

    #[test]
    fn every_blob_of_a_layout_is_there_under_its_digest_and_size() {
        let dir = tempfile::tempdir().unwrap();
        let (root, blobs) = (dir.path().join("root"), dir.path().join("blobs"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        fs::write(root.join("file"), "x").unwrap();
        let layers = [layer::write(&root, Compression::Zstd, &blobs).unwrap()];
        let run =
            RunConfig { cmd: vec!["sh"], exposed_ports: vec!["80/tcp"], ..Default::default() };
        let layout = dir.path().join("layout");
        write(&layout, "busybox", &run, &layers).unwrap();

        let parse =
            |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let blob = |descriptor: &Value| {
            let hash = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let path = layout.join("blobs/sha256").join(hash);
            let content = fs::read(&path).unwrap();
            assert_eq!(hex::encode(Sha256::digest(&content)), hash);
            assert_eq!(content.len() as u64, descriptor["size"].as_u64().unwrap());
            path
        };
        let index = parse(&layout.join("index.json"));
        assert_eq!(index["manifests"][0]["annotations"][REF_NAME], TAG);
        let manifest = parse(&blob(&index["manifests"][0]));
        assert_eq!(manifest["layers"][0]["mediaType"], Compression::Zstd.media_type());
        blob(&manifest["layers"][0]);
        let config = parse(&blob(&manifest["config"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], layers[0].diff_id.as_str());
        assert_eq!(config["config"], json!({ "Cmd": ["sh"], "ExposedPorts": { "80/tcp": {} } }));
    }
}

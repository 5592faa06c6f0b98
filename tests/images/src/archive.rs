//! Archives as `docker save` writes them: a tar with `manifest.json`, the configuration and
//! uncompressed layers.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

use crate::layer::{Compression, Layer};
use crate::layout::{RunConfig, TAG, config_file};

/// Writes the image `name` as a Docker archive.
///
/// # Errors
/// When a layer cannot be read or the file not written.
pub fn write(path: &Path, name: &str, run: &RunConfig, layers: &[Layer]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut tar = Builder::new(file);
    let config = config_file(run, layers);
    let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
    append(&mut tar, &config_name, config.len() as u64, config.as_slice())?;
    let mut layer_names = Vec::new();
    for layer in layers {
        let name = format!("{}/layer.tar", layer.diff_id.trim_start_matches("sha256:"));
        let mut content = uncompressed(layer)?;
        let size = content.metadata().context("reading a layer's size")?.len();
        content.rewind().context("rewinding a layer")?;
        append(&mut tar, &name, size, content)?;
        layer_names.push(name);
    }
    let manifest = json!([{
        "Config": config_name,
        "RepoTags": [format!("{name}:{TAG}")],
        "Layers": layer_names,
    }])
    .to_string();
    append(&mut tar, "manifest.json", manifest.len() as u64, manifest.as_bytes())?;
    tar.into_inner()
        .and_then(|file| file.sync_all())
        .with_context(|| format!("writing {}", path.display()))
}

/// The layer's tar in a file without a name, beside its blob.
fn uncompressed(layer: &Layer) -> Result<File> {
    let blob = &layer.blob;
    let temporary = blob.with_extension(format!("tar-{}", std::process::id()));
    let unpack = || -> io::Result<File> {
        let input = File::open(blob)?;
        let mut reader: Box<dyn Read> = match layer.compression {
            Compression::Gzip => Box::new(flate2::read::GzDecoder::new(input)),
            Compression::Zstd => Box::new(zstd::Decoder::new(input)?),
        };
        let mut output =
            File::options().read(true).write(true).create_new(true).open(&temporary)?;
        std::fs::remove_file(&temporary)?;
        io::copy(&mut reader, &mut output)?;
        Ok(output)
    };
    unpack().with_context(|| format!("unpacking {}", blob.display()))
}

fn append(tar: &mut Builder<File>, name: &str, size: u64, content: impl Read) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(size);
    tar.append_data(&mut header, name, content).with_context(|| format!("adding {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer;

    #[test]
    fn an_archive_holds_its_layers_uncompressed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, blobs) = (dir.path().join("root"), dir.path().join("blobs"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(root.join("file"), "x").unwrap();
        let layers = [layer::write(&root, Compression::Gzip, &blobs).unwrap()];
        let path = dir.path().join("busybox.tar");
        write(&path, "busybox", &RunConfig::default(), &layers).unwrap();

        let mut names = Vec::new();
        for entry in tar::Archive::new(File::open(&path).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            if name.ends_with("/layer.tar") {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                let digest = format!("sha256:{}", hex::encode(Sha256::digest(&content)));
                assert_eq!(digest, layers[0].diff_id);
            }
            names.push(name);
        }
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(names.last().unwrap(), "manifest.json");
    }
}

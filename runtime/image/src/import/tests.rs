use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::store::Collected;

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
        self.raw_index(&[manifest]);
    }

    fn raw_index(&self, entries: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
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

/// A directory with a layout `NAME` for each name, of an image with one plain layer.
struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// A layout of one image with the layers given as plain archives.
    fn layout(&self, name: &str, layers: &[&Vec<u8>]) -> std::path::PathBuf {
        let path = self.path(name);
        let builder = Builder::new(&path);
        let layers: Vec<_> =
            layers.iter().map(|&bytes| (PLAIN, bytes.clone(), Digest::of(bytes))).collect();
        builder.index(builder.image(&layers), name);
        path
    }

    fn import(&self, path: &Path) -> Result<Vec<Imported>, ImportError> {
        let platform = Platform::default();
        self.store.import_oci_layout(path, &ImportOptions::new(&platform))
    }

    fn import_docker(&self, path: &Path, name: Option<&str>) -> Result<Vec<Imported>, ImportError> {
        let platform = Platform::default();
        let options = ImportOptions { name, ..ImportOptions::new(&platform) };
        self.store.import_docker_archive(path, &options)
    }

    /// Everything in the store but its locks and index.
    fn files(&self) -> Vec<String> {
        let mut all: Vec<String> = ["layers/sha256", "blobs/sha256"]
            .iter()
            .flat_map(|name| fs::read_dir(self.path("store").join(name)).unwrap())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    }
}

/// An error and everything below it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn layout_in_an_archive_is_the_same_image() {
    let fixture = Fixture::new();
    let layer = tar_of(&[("f", b"x")]);
    let path = fixture.layout("a", &[&layer]);
    let archive = fixture.path("a.tar");
    let mut builder = tar::Builder::new(fs::File::create(&archive).unwrap());
    builder.append_dir_all(".", &path).unwrap();
    builder.finish().unwrap();
    let from_directory = fixture.import(&path).unwrap();
    assert_eq!(fixture.import(&archive).unwrap(), from_directory);
    let platform = Platform::default();
    let options = ImportOptions::new(&platform);
    assert_eq!(fixture.store.import(&archive, &options).unwrap(), from_directory);
    assert_eq!(fixture.store.import(&path, &options).unwrap(), from_directory);
}

#[test]
fn shared_layers_stay_until_the_last_image_goes() {
    let fixture = Fixture::new();
    let (shared, own) = (tar_of(&[("s", b"shared")]), tar_of(&[("o", b"own")]));
    fixture.import(&fixture.layout("a", &[&shared])).unwrap();
    fixture.import(&fixture.layout("b", &[&shared, &own])).unwrap();
    assert_eq!(fixture.store.list().unwrap().len(), 2);
    let collected = fixture.store.remove("b").unwrap();
    assert_eq!((collected.layers_removed, collected.layers_in_use), (1, 0));
    assert_eq!(fixture.store.resolve("a").unwrap().layers.len(), 1);
    assert_eq!(fixture.store.remove("a").unwrap().layers_removed, 1);
    assert_eq!(fixture.files(), [""; 0]);
    assert!(matches!(fixture.store.remove("a"), Err(StoreError::NotFound { .. })));
}

#[test]
fn layer_in_use_is_not_removed() {
    let fixture = Fixture::new();
    fixture.import(&fixture.layout("a", &[&tar_of(&[("f", b"x")])])).unwrap();
    let image = fixture.store.resolve("a").unwrap();
    // As when the descriptor is handed to another process.
    let handed_over = image.layers[0].file.try_clone().unwrap();
    let path = image.layers[0].path.clone();
    drop(image);
    let collected = fixture.store.remove("a").unwrap();
    assert_eq!((collected.layers_removed, collected.layers_in_use), (0, 1));
    assert!(path.exists());
    drop(handed_over);
    assert_eq!(fixture.store.collect_garbage().unwrap().layers_removed, 1);
    assert!(!path.exists());
}

#[test]
fn nothing_is_collected_while_somebody_adds() {
    let fixture = Fixture::new();
    fixture.import(&fixture.layout("a", &[&tar_of(&[("f", b"x")])])).unwrap();
    let writer = fixture.store.writer_lock().unwrap();
    let deferred = Collected { deferred: true, ..Collected::default() };
    assert_eq!(fixture.store.remove("a").unwrap(), deferred);
    drop(writer);
    assert_eq!(fixture.store.collect_garbage().unwrap().layers_removed, 1);
}

#[test]
fn what_a_crash_left_is_swept_at_open() {
    let fixture = Fixture::new();
    for name in ["store/layers/sha256/.tmp-a", "store/blobs/sha256/.tmp-b"] {
        fs::write(fixture.path(name), b"half").unwrap();
    }
    Store::open(fixture.path("store")).unwrap();
    assert_eq!(fixture.files(), [""; 0]);
}

#[test]
fn damaged_store_is_told_by_file() {
    let fixture = Fixture::new();
    fixture.import(&fixture.layout("a", &[&tar_of(&[("f", b"x")])])).unwrap();
    let path = fixture.store.resolve("a").unwrap().layers[0].path.clone();
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 4096]).unwrap();
    let message = chain(&fixture.store.resolve("a").unwrap_err());
    assert!(message.contains("truncated") && message.contains(path.to_str().unwrap()), "{message}");
    // Importing again repairs it.
    fixture.import(&fixture.path("a")).unwrap();
    fixture.store.resolve("a").unwrap();
    fs::write(fixture.path("store/refs.json"), b"{").unwrap();
    assert!(matches!(fixture.store.resolve("a"), Err(StoreError::Json { .. })));
}

#[test]
fn failed_import_leaves_nothing() {
    let fixture = Fixture::new();
    let good = tar_of(&[("f", b"x")]);
    let path = fixture.path("bad");
    let builder = Builder::new(&path);
    let layers = [
        (PLAIN, good.clone(), Digest::of(&good)),
        (PLAIN, tar_of(&[("g", b"y")]), Digest::of(b"another layer")),
    ];
    builder.index(builder.image(&layers), "bad");
    let message = chain(&fixture.import(&path).unwrap_err());
    assert!(message.contains("layer 2 of 2"), "{message}");
    assert!(message.contains("the image's configuration says"), "{message}");
    assert_eq!(fixture.files(), [""; 0]);
    assert!(fixture.store.list().unwrap().is_empty());
}

#[test]
fn hostile_layouts_are_refused() {
    type Spoil = fn(&Builder<'_>, serde_json::Value);
    let cases: [(&str, &str, Spoil); 9] = [
        ("path", "is not sha256: and 64", |builder, mut manifest| {
            manifest["digest"] = "sha256:../../../../etc/passwd".into();
            builder.raw_index(&[manifest]);
        }),
        ("algorithm", "is not sha256, the only", |builder, mut manifest| {
            manifest["digest"] = "md5:00".into();
            builder.raw_index(&[manifest]);
        }),
        ("missing", "cannot read", |builder, mut manifest| {
            manifest["digest"] = Digest::of(b"missing").to_string().into();
            builder.index(manifest, "x");
        }),
        ("size", "does not have the content", |builder, mut manifest| {
            manifest["size"] = 5.into();
            builder.index(manifest, "x");
        }),
        ("huge", "more than 4194304", |builder, mut manifest| {
            manifest["size"] = (1u64 << 40).into();
            builder.index(manifest, "x");
        }),
        ("content", "does not have the content", |builder, manifest| {
            let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
            fs::write(builder.0.join("blobs/sha256").join(digest.to_hex()), b"{}").unwrap();
            builder.index(manifest, "x");
        }),
        ("both", "claims to be both", |builder, manifest| {
            let bytes = serde_json::json!({
                "schemaVersion": 2, "config": manifest, "layers": [], "manifests": [],
            });
            let both = builder.blob(document::OCI_MANIFEST, bytes.to_string().as_bytes());
            builder.index(both, "x");
        }),
        ("deep", "nested more than 4 deep", |builder, manifest| {
            let nested = (0..6).fold(manifest, |inner, _| {
                let bytes = serde_json::json!({"schemaVersion": 2, "manifests": [inner]});
                builder.blob(document::OCI_INDEX, bytes.to_string().as_bytes())
            });
            builder.index(nested, "x");
        }),
        ("unnamed", "without a name", |builder, manifest| builder.raw_index(&[manifest])),
    ];
    for (name, expected, spoil) in cases {
        let fixture = Fixture::new();
        let layer = tar_of(&[("f", b"x")]);
        let path = fixture.path(name);
        let builder = Builder::new(&path);
        let manifest = builder.image(&[(PLAIN, layer.clone(), Digest::of(&layer))]);
        spoil(&builder, manifest);
        let message = chain(&fixture.import(&path).unwrap_err());
        assert!(message.contains(expected), "{name}: {message:?} should say {expected:?}");
        assert_eq!(fixture.files(), [""; 0], "{name}");
    }
}

#[test]
fn media_types_of_other_things_are_refused() {
    let fixture = Fixture::new();
    let path = fixture.path("chart");
    let builder = Builder::new(&path);
    let layer = tar_of(&[("f", b"x")]);
    let media_type = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";
    builder.index(builder.image(&[(media_type, layer.clone(), Digest::of(&layer))]), "chart");
    let message = chain(&fixture.import(&path).unwrap_err());
    assert!(message.contains("helm.chart"), "{message}");
}

/// What `docker save` writes: the configuration by its digest, layers in folders.
fn docker_archive(path: &Path, config_name: Option<&str>, tags: &[&str]) -> Digest {
    let layer = tar_of(&[("etc/motd", b"hello")]);
    let config = serde_json::json!({
        "os": "linux", "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer), Digest::of(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let name = format!("{}.json", Digest::of(&config).to_hex());
    let name = config_name.unwrap_or(&name);
    let manifest = serde_json::json!([
        {"Config": name, "RepoTags": tags, "Layers": ["one/layer.tar", "two/layer.tar"]},
    ]);
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).unwrap();
    };
    append("one/layer.tar", &layer);
    append(name, &config);
    append("manifest.json", manifest.to_string().as_bytes());
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "two/layer.tar", "../one/layer.tar").unwrap();
    builder.finish().unwrap();
    Digest::of(&config)
}

#[test]
fn docker_archive_is_imported_under_its_tags() {
    let fixture = Fixture::new();
    let path = fixture.path("saved.tar");
    let config = docker_archive(&path, None, &["web:1", "registry.example/web:2"]);
    let imported = fixture.import_docker(&path, None).unwrap();
    assert_eq!(imported[0].references, ["docker.io/library/web:1", "registry.example/web:2"]);
    let image = fixture.store.resolve("web:1").unwrap();
    assert_eq!((image.config_digest, image.layers.len()), (config, 2));
    let platform = Platform::default();
    let detected = fixture.store.import(&path, &ImportOptions::new(&platform)).unwrap();
    assert_eq!(detected, imported);
    let renamed = fixture.import_docker(&path, Some("other")).unwrap();
    assert_eq!(renamed[0].references, ["docker.io/library/other:latest"]);
}

#[test]
fn bad_docker_archives_are_refused() {
    let fixture = Fixture::new();
    let path = fixture.path("saved.tar");
    docker_archive(&path, Some(&format!("{}.json", "0".repeat(64))), &["web:1"]);
    let message = chain(&fixture.import_docker(&path, None).unwrap_err());
    assert!(message.contains("does not have the content"), "{message}");
    docker_archive(&path, None, &[]);
    let message = chain(&fixture.import_docker(&path, None).unwrap_err());
    assert!(message.contains("without a name"), "{message}");
    fs::write(&path, b"no archive".repeat(100)).unwrap();
    let message = chain(&fixture.import_docker(&path, None).unwrap_err());
    assert!(message.contains("not a usable archive"), "{message}");
    assert_eq!(fixture.files(), [""; 0]);
}

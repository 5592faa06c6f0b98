//! A real registry (Debian's `docker-registry`) on loopback, for the tests of pulling.
//!
//! Its storage is laid out directly from OCI layouts, by links, instead of being pushed to: under
//! TCG the registry would spend minutes hashing what is known to be right.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_harness::debian::run;
use serde_json::Value;

use crate::layout::TAG;

/// First component of the repositories' names.
pub const PREFIX: &str = "husk";

/// Generous: under TCG a Go program takes seconds to start.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const START_POLL: Duration = Duration::from_millis(50);
/// Of a file in a layout that is parsed here.
const JSON_MAX: u64 = 4 << 20;

/// How the registry is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of OCI layouts: each becomes `husk/NAME:latest`.
    pub images: PathBuf,
    /// Where the registry keeps its storage, configuration and keys; made if it is not there.
    pub state: PathBuf,
    /// Where it listens.
    pub address: SocketAddr,
    /// With a certificate of its own for `localhost` and the address.
    pub tls: bool,
    /// User and password that every request needs.
    pub credentials: Option<(String, String)>,
}

impl Options {
    /// The certificate to trust when [`Options::tls`] is set, in PEM.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.state.join("certificate.pem")
    }
}

/// A registry that runs; it ends when this is dropped, and when this process dies.
#[derive(Debug)]
pub struct Registry {
    child: Child,
}

impl Registry {
    /// Starts the registry and blocks until it takes connections. Its log goes to standard error.
    ///
    /// # Errors
    /// When a layout is malformed, a tool is missing, or the registry does not come up.
    pub fn start(options: &Options) -> Result<Self> {
        make_dir(&options.state)?;
        let storage = options.state.join("storage");
        store_all(&options.images, &storage)?;
        if options.tls {
            make_certificate(options)?;
        }
        if let Some((user, password)) = &options.credentials {
            make_htpasswd(&options.state.join("htpasswd"), user, password)?;
        }
        let config = options.state.join("config.json");
        // JSON is YAML.
        write(&config, &config_of(options, &storage).to_string())?;
        // The registry ends with this process, however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "docker-registry", "serve"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("running setpriv and docker-registry")?;
        let mut registry = Self { child };
        registry.wait_until_up(options.address)?;
        Ok(registry)
    }

    /// Blocks until the registry ends.
    ///
    /// # Errors
    /// When the operating system says so.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().context("waiting for docker-registry")
    }

    fn wait_until_up(&mut self, address: SocketAddr) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().context("waiting for docker-registry")? {
                bail!("docker-registry ended: {status}");
            }
            if TcpStream::connect(address).is_ok() {
                return Ok(());
            }
            ensure!(started.elapsed() < START_TIMEOUT, "docker-registry does not listen");
            sleep(START_POLL);
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("ending docker-registry: {error}");
        }
    }
}

fn config_of(options: &Options, storage: &Path) -> Value {
    let mut config = serde_json::json!({
        "version": "0.1",
        "log": { "level": "warn", "accesslog": { "disabled": true } },
        "storage": {
            "filesystem": { "rootdirectory": storage },
            "maintenance": { "uploadpurging": { "enabled": false } },
        },
        "http": { "addr": options.address.to_string(), "secret": "for tests only" },
    });
    if options.tls {
        config["http"]["tls"] = serde_json::json!({
            "certificate": options.certificate(),
            "key": options.state.join("key.pem"),
        });
    }
    if options.credentials.is_some() {
        config["auth"] = serde_json::json!({
            "htpasswd": { "realm": "husk tests", "path": options.state.join("htpasswd") },
        });
    }
    config
}

fn make_certificate(options: &Options) -> Result<()> {
    let names = format!("subjectAltName=DNS:localhost,IP:{}", options.address.ip());
    // Unless told, openssl makes a CA's, which strict clients do not take from a server.
    let not_a_ca = "basicConstraints=critical,CA:FALSE";
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "3650", "-subj", "/CN=localhost", "-addext", &names])
        .args(["-addext", not_a_ca, "-keyout"])
        .arg(options.state.join("key.pem"))
        .arg("-out")
        .arg(options.certificate()))
}

fn make_htpasswd(path: &Path, user: &str, password: &str) -> Result<()> {
    // Cost 5 is bcrypt's cheapest here: it is computed at each request.
    let mut child = Command::new("htpasswd")
        .args(["-n", "-i", "-B", "-C", "5", user])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("running htpasswd")?;
    let mut input = child.stdin.take().context("no input of htpasswd")?;
    input.write_all(password.as_bytes()).context("sending the password")?;
    drop(input);
    let output = child.wait_with_output().context("waiting for htpasswd")?;
    ensure!(output.status.success(), "htpasswd: {}", output.status);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(&output.stdout))
        .with_context(|| format!("writing {}", path.display()))
}

/// Puts each layout in `images` into the registry's storage.
fn store_all(images: &Path, storage: &Path) -> Result<()> {
    let entries = fs::read_dir(images).with_context(|| format!("reading {}", images.display()))?;
    let mut found = false;
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", images.display()))?;
        let layout = entry.path();
        if !layout.join("oci-layout").is_file() {
            continue;
        }
        let name = entry.file_name();
        let name = name.to_str().context("a layout's name is not UTF-8")?;
        store(&layout, &format!("{PREFIX}/{name}"), storage)
            .with_context(|| format!("storing {}", layout.display()))?;
        found = true;
    }
    ensure!(found, "{} holds no OCI layout", images.display());
    Ok(())
}

/// The storage's form is that of distribution's `registry/storage/paths.go`: blobs by digest, and
/// per repository small files that hold the digests of what it has.
fn store(layout: &Path, repository: &str, storage: &Path) -> Result<()> {
    let root = storage.join("docker/registry/v2");
    let repository = root.join("repositories").join(repository);
    let index = read_json(&layout.join("index.json"))?;
    for descriptor in index["manifests"].as_array().into_iter().flatten() {
        let digest = Hash::of(descriptor)?;
        let manifest = read_json(&digest.in_layout(layout))?;
        let layers = manifest["layers"].as_array().into_iter().flatten();
        for blob in layers.chain([&manifest["config"]]) {
            let digest = Hash::of(blob)?;
            digest.store(layout, &root)?;
            digest.link(&repository.join("_layers/sha256").join(&digest.0))?;
        }
        digest.store(layout, &root)?;
        let manifests = repository.join("_manifests");
        digest.link(&manifests.join("revisions/sha256").join(&digest.0))?;
        digest.link(&manifests.join("tags").join(TAG).join("current"))?;
        digest.link(&manifests.join("tags").join(TAG).join("index/sha256").join(&digest.0))?;
    }
    Ok(())
}

/// The hexadecimal digits of a SHA-256 digest.
#[derive(Debug, PartialEq, Eq)]
struct Hash(String);

impl Hash {
    fn of(descriptor: &Value) -> Result<Self> {
        let digest = descriptor["digest"].as_str().context("a descriptor without a digest")?;
        match digest.strip_prefix("sha256:") {
            Some(hash) if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(Self(hash.to_owned()))
            }
            _ => bail!("malformed digest {digest:?}"),
        }
    }

    fn in_layout(&self, layout: &Path) -> PathBuf {
        layout.join("blobs/sha256").join(&self.0)
    }

    fn store(&self, layout: &Path, root: &Path) -> Result<()> {
        let first = self.0.get(..2).context("digest too short")?;
        let directory = root.join("blobs/sha256").join(first).join(&self.0);
        make_dir(&directory)?;
        let (source, data) = (self.in_layout(layout), directory.join("data"));
        match fs::hard_link(&source, &data) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
                fs::copy(&source, &data)
                    .map(drop)
                    .with_context(|| format!("copying {}", source.display()))
            }
            Err(error) => Err(error).with_context(|| format!("linking {}", source.display())),
        }
    }

    fn link(&self, directory: &Path) -> Result<()> {
        make_dir(directory)?;
        write(&directory.join("link"), &format!("sha256:{}", self.0))
    }
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("writing {}", path.display()))
}

fn read_json(path: &Path) -> Result<Value> {
    let mut text = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(JSON_MAX).read_to_end(&mut text))
        .with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parsing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{self, Compression};
    use crate::layout::{self, RunConfig};

    #[test]
    fn the_storage_leads_from_the_tag_to_every_blob() {
        let dir = tempfile::tempdir().unwrap();
        let [root, blobs, images, storage] =
            ["root", "blobs", "images", "storage"].map(|name| dir.path().join(name));
        for path in [&root, &blobs, &images] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(root.join("file"), "x").unwrap();
        let layers = [layer::write(&root, Compression::Gzip, &blobs).unwrap()];
        layout::write(&images.join("one"), "one", &RunConfig::default(), &layers).unwrap();
        store_all(&images, &storage).unwrap();

        let v2 = storage.join("docker/registry/v2");
        let repository = v2.join("repositories/husk/one");
        let digest =
            fs::read_to_string(repository.join("_manifests/tags/latest/current/link")).unwrap();
        let hash = digest.strip_prefix("sha256:").unwrap();
        let data = |hash: &str| v2.join("blobs/sha256").join(&hash[..2]).join(hash).join("data");
        let manifest = read_json(&data(hash)).unwrap();
        let layer = Hash::of(&manifest["layers"][0]).unwrap();
        assert!(data(&layer.0).is_file());
        assert!(repository.join("_layers/sha256").join(&layer.0).join("link").is_file());
        // A second time, as after a crash.
        store_all(&images, &storage).unwrap();
    }

    #[test]
    fn a_directory_without_layouts_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(store_all(dir.path(), &dir.path().join("storage")).is_err());
    }

    #[test]
    fn malformed_digests_are_refused() {
        for digest in ["", "sha256:", "sha256:../../etc", "md5:abc"] {
            assert!(Hash::of(&serde_json::json!({ "digest": digest })).is_err(), "{digest}");
        }
    }
}

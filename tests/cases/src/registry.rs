//! A real registry on loopback, for the tests of pulling.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::place;

/// Where the tests keep stores and registries: on a disk, as husk's state must be, whatever `/tmp` is.
///
/// # Errors
/// None can be made.
pub fn disk_dir() -> Result<TempDir> {
    tempfile::tempdir_in("/var/tmp").context("cannot make a directory in /var/tmp")
}

/// A `docker-registry` that serves the test images as `husk/NAME:latest`, and ends with this.
#[derive(Debug)]
pub struct Registry {
    state: TempDir,
    address: String,
    child: Child,
}

impl Registry {
    /// Starts one with these options of `husk-test-images registry`, and waits until it serves.
    ///
    /// # Errors
    /// It does not come up; with its log.
    pub fn start(options: &[&str]) -> Result<Registry> {
        let state = disk_dir()?;
        // Free now; that another process takes it before the registry does is most unlikely.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let log = state.path().join("log");
        let mut child = Command::new(place::tree().join("tests/husk-test-images"))
            .args(["registry", "--listen", &address, "--state"])
            .arg(state.path())
            .arg("--images")
            .arg(place::tree().join("images"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start husk-test-images")?;
        let stdout = child.stdout.take().context("no standard output")?;
        let registry = Registry { state, address, child };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.starts_with("ready"), "no registry: {}", std::fs::read_to_string(&log)?);
        Ok(registry)
    }

    /// The reference of one of its images.
    #[must_use]
    pub fn image(&self, name: &str) -> String {
        format!("{}/husk/{name}", self.address)
    }

    /// The certificate of one that was started with `--tls`.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.state.path().join("certificate.pem")
    }

    /// Where it keeps the blob with this digest (`sha256:...`).
    #[must_use]
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hash = digest.trim_start_matches("sha256:");
        let blobs = Path::new("storage/docker/registry/v2/blobs/sha256");
        self.state
            .path()
            .join(blobs)
            .join(hash.get(..2).unwrap_or_default())
            .join(hash)
            .join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // docker-registry itself dies with its parent.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("cannot end the registry: {error}");
        }
    }
}

//! What the images are made of, and the making.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use husk_harness::cache::Key;
use husk_harness::cache::files::{Lock, mark_used, publish, remove_leftovers, remove_tree};
use husk_harness::debian;
use husk_harness::progress::{Step, say};

use crate::archive;
use crate::layer::{self, Compression, Layer};
use crate::layout::{self, RunConfig};

/// Raised when this crate's code changes what the images contain.
const RECIPE_VERSION: u32 = 1;

/// In the Debian base besides what debootstrap's minbase has.
const BASE_PACKAGES: [&str; 1] = ["python3"];
/// Not wanted in the base; the first three also not in what is installed on top of it.
const BASE_REMOVED: [&str; 9] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/cache/debconf",
    "var/log",
    // Device nodes, which the runtime makes.
    "dev",
];
/// Directories that must be there though what was in them is not wanted.
const BASE_EMPTY: [&str; 6] =
    ["var/cache/apt", "var/lib/apt/lists", "var/cache/debconf", "var/log/apt", "dev", "proc"];
const BASE_DPKG: &str = "path-exclude /usr/share/doc/*\npath-exclude /usr/share/man/*\n\
    path-exclude /usr/share/info/*\npath-exclude /usr/share/locale/*\n";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const PRELUDE: &str = include_str!("../recipes/prelude");
const IN_OVERLAY: &str = include_str!("../recipes/in-overlay");
const BUSYBOX: &str = include_str!("../recipes/busybox");
const NGINX: &str = include_str!("../recipes/nginx");
const NGINX_CONFIG: &str = include_str!("../recipes/nginx-config");
const REDIS: &str = include_str!("../recipes/redis");
const NETWORK: &str = include_str!("../recipes/network");

/// The images that [`ensure_built`] makes.
pub const NAMES: [&str; 5] = ["busybox", "debian", "nginx", "redis", "network"];

/// Name of the Docker archive of busybox beside the layouts.
pub const BUSYBOX_ARCHIVE: &str = "busybox.tar";

fn run_config(image: &str) -> RunConfig {
    let base = RunConfig { env: vec![PATH], ..RunConfig::default() };
    match image {
        "busybox" => RunConfig { cmd: vec!["sh"], ..base },
        "nginx" => RunConfig {
            cmd: vec!["nginx", "-g", "daemon off;"],
            exposed_ports: vec!["80/tcp"],
            stop_signal: "SIGQUIT",
            ..base
        },
        "redis" => RunConfig {
            entrypoint: vec!["redis-server"],
            cmd: vec!["--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data"],
            user: "redis",
            working_dir: "/data",
            exposed_ports: vec!["6379/tcp"],
            volumes: vec!["/data"],
            ..base
        },
        _ => RunConfig { cmd: vec!["bash"], ..base },
    }
}

/// A hash of everything that the images are made from, except for the versions that the mirror
/// holds on the day.
fn cache_key() -> String {
    let mut key = Key::new();
    key.add(RECIPE_VERSION.to_le_bytes());
    key.add(debian::SUITE);
    key.add(std::env::consts::ARCH);
    for part in BASE_PACKAGES.iter().chain(&BASE_REMOVED).chain(&BASE_EMPTY) {
        key.add(part);
    }
    for part in [BASE_DPKG, PRELUDE, IN_OVERLAY, BUSYBOX, NGINX, NGINX_CONFIG, REDIS, NETWORK] {
        key.add(part);
    }
    for image in NAMES {
        key.add(format!("{:?}", run_config(image)));
    }
    key.finish()
}

/// The directory of the images in the cache: one OCI layout for each of [`NAMES`], and
/// [`BUSYBOX_ARCHIVE`]. Made first if it is not there or `refresh` is set.
///
/// # Errors
/// When a package cannot be fetched, or this is not root.
pub fn ensure_built(cache: &Path, checkout: &Path, refresh: bool) -> Result<PathBuf> {
    let base = cache.join("images");
    let finished = base.join(cache_key());
    if finished.is_dir() && !refresh {
        mark_used(&finished)?;
        return Ok(finished);
    }
    let _lock = Lock::exclusive(&base.join("lock"), "builds the test images")?;
    if finished.is_dir() && !refresh {
        return Ok(finished);
    }
    remove_leftovers(&base, &finished)?;
    say("building the test images; this happens once and takes about two minutes");
    let work = finished.with_extension("tmp");
    Builder::new(cache, work.clone())?.build(checkout)?;
    publish(&work, &finished)?;
    Ok(finished)
}

struct Builder<'a> {
    cache: &'a Path,
    /// Becomes the result.
    output: PathBuf,
    /// Roots and changes from which the layers are made; gone at the end.
    scratch: PathBuf,
    /// Finished layers; the layouts link to them.
    blobs: PathBuf,
}

impl<'a> Builder<'a> {
    fn new(cache: &'a Path, output: PathBuf) -> Result<Self> {
        let (scratch, blobs) = (output.join("scratch"), output.join("blobs"));
        for directory in [&scratch, &blobs] {
            fs::create_dir_all(directory)
                .with_context(|| format!("making {}", directory.display()))?;
        }
        Ok(Self { cache, output, scratch, blobs })
    }

    fn build(&self, checkout: &Path) -> Result<()> {
        debian::need_packages(checkout, &["debootstrap", "debian-archive-keyring", "util-linux"])?;
        let base = self.debian_base()?;
        let busybox = self.changes("busybox", &[&base], BUSYBOX)?.join("out");
        let nginx = self.changes("nginx", &[&base], NGINX)?;
        let nginx_config = self.changes("nginx-config", &[&nginx, &base], NGINX_CONFIG)?;
        let redis = self.changes("redis", &[&base], REDIS)?;
        let network = self.changes("network", &[&base], NETWORK)?;

        let busybox = self.layer(&busybox, Compression::Gzip)?;
        let base = self.layer(&base, Compression::Gzip)?;
        let nginx = self.layer(&nginx, Compression::Gzip)?;
        let nginx_config = self.layer(&nginx_config, Compression::Gzip)?;
        let redis = self.layer(&redis, Compression::Zstd)?;
        let network = self.layer(&network, Compression::Gzip)?;

        self.image("busybox", std::slice::from_ref(&busybox))?;
        self.image("debian", std::slice::from_ref(&base))?;
        self.image("nginx", &[base.clone(), nginx, nginx_config])?;
        self.image("redis", &[base.clone(), redis])?;
        self.image("network", &[base, network])?;
        let archive = self.output.join(BUSYBOX_ARCHIVE);
        archive::write(&archive, "busybox", &run_config("busybox"), &[busybox])?;
        remove_tree(&self.scratch)?;
        remove_tree(&self.blobs)
    }

    fn debian_base(&self) -> Result<PathBuf> {
        let root = self.scratch.join("debian");
        debian::debootstrap(self.cache, &root, &BASE_PACKAGES)?;
        for path in BASE_REMOVED {
            remove_tree(&root.join(path))?;
        }
        for path in BASE_EMPTY {
            let path = root.join(path);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        let write = |path: &str, content: &str| {
            let path = root.join(path);
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
        };
        write("etc/dpkg/dpkg.cfg.d/husk", BASE_DPKG)?;
        // The runtime's to say.
        write("etc/hostname", "")?;
        write("etc/resolv.conf", "")?;
        Ok(root)
    }

    /// Runs a recipe over the lower trees, the topmost first. Returns the tree of what it changed.
    fn changes(&self, name: &str, lower: &[&Path], recipe: &str) -> Result<PathBuf> {
        let step = Step::new(format!("making {name}"));
        let upper = self.scratch.join(format!("{name}-changes"));
        let work = self.scratch.join(format!("{name}-work"));
        let lower: Vec<String> = lower.iter().map(|path| path.display().to_string()).collect();
        // Kept apart from the changes, so that the next recipe has them too.
        let apt = self.scratch.join("apt");
        let mut child = debian::contained("/bin/sh")
            .args(["-c", IN_OVERLAY, "in-overlay", &lower.join(":")])
            .args([&upper, &work, &apt])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running setpriv and unshare")?;
        let mut input = child.stdin.take().context("no input of the recipe")?;
        // A recipe fits a pipe: this never blocks on a chroot that failed before reading.
        input.write_all(format!("{PRELUDE}\n{recipe}").as_bytes()).context("sending the recipe")?;
        drop(input);
        let output = child.wait_with_output().context("waiting for the recipe")?;
        if !output.status.success() {
            bail!(
                "making {name}: {}\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        step.finish("done");
        Ok(upper)
    }

    fn layer(&self, tree: &Path, compression: Compression) -> Result<Layer> {
        let name = tree.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = Step::new(format!("packing {name}"));
        let layer = layer::write(tree, compression, &self.blobs)?;
        step.finish(&format!("{} KiB", layer.size >> 10));
        Ok(layer)
    }

    fn image(&self, name: &str, layers: &[Layer]) -> Result<()> {
        layout::write(&self.output.join(name), name, &run_config(name), layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_fit_a_pipe() {
        for recipe in [BUSYBOX, NGINX, NGINX_CONFIG, REDIS, NETWORK] {
            assert!(PRELUDE.len() + recipe.len() < 60_000);
        }
    }

    #[test]
    fn the_cache_key_is_stable() {
        assert_eq!(cache_key(), cache_key());
    }
}

//! The test host's disk image and kernel, made once and kept in the cache.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use husk_harness::cache::Key;
use husk_harness::cache::files::{Lock, mark_used, publish, remove_leftovers, remove_tree};
use husk_harness::debian;
use husk_harness::progress::{Step, say};

/// Raised when this file changes what the image contains.
const RECIPE_VERSION: u32 = 1;

/// Room for images, cores and benchmarks; sparse, so that only what is written takes space.
const DISK_SIZE: &str = "24G";

const PACKAGES: &str = include_str!("../../testhost/packages");

/// Files that are put into the image: path, mode, content.
const FILES: [(&str, u32, &str); 8] = [
    ("usr/lib/husk-testhost/bootstrap", 0o755, include_str!("../../testhost/bootstrap")),
    (
        "etc/systemd/system/husk-testhost.service",
        0o644,
        include_str!("../../testhost/husk-testhost.service"),
    ),
    ("etc/modules-load.d/husk.conf", 0o644, include_str!("../../testhost/modules.conf")),
    ("etc/sysctl.d/90-husk.conf", 0o644, include_str!("../../testhost/sysctl.conf")),
    ("etc/systemd/journald.conf.d/husk.conf", 0o644, "[Journal]\nStorage=volatile\n"),
    ("etc/hostname", 0o644, "husk-testhost\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost husk-testhost\n::1 localhost\n"),
    // QEMU's user network has its name server there.
    ("etc/resolv.conf", 0o644, "nameserver 10.0.2.3\n"),
];

/// Units that cost boot time or disturb measurements and that no test needs.
const MASKED: [&str; 25] = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "cni-dhcp.service",
    "cni-dhcp.socket",
    "docker-registry.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fio.service",
    "fstrim.timer",
    "getty.target",
    "getty@tty1.service",
    "ldconfig.service",
    "nftables.service",
    "qemu-vmsr-helper.socket",
    "serial-getty@ttyS0.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-pstore.service",
    // On disk instead: a test writes more there than memory holds.
    "tmp.mount",
    "systemd-user-sessions.service",
];

/// Removed to keep the image small.
const REMOVED: [&str; 6] = [
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
];

/// A finished image in the cache; read-only.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) dir: PathBuf,
}

impl Image {
    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("root.ext4")
    }
}

/// The names in `testhost/packages`.
fn packages() -> Vec<&'static str> {
    PACKAGES
        .lines()
        .map(|line| line.split('#').next().unwrap_or("").trim())
        .filter(|line| !line.is_empty())
        .collect()
}

/// A hash of everything that the image is made from, except for the versions that the mirror
/// holds on the day: `build --refresh` takes newer ones.
pub(crate) fn cache_key() -> String {
    let mut key = Key::new();
    key.add(RECIPE_VERSION.to_le_bytes());
    key.add(debian::SUITE);
    key.add(std::env::consts::ARCH.as_bytes());
    key.add(DISK_SIZE.as_bytes());
    for package in packages() {
        key.add(package.as_bytes());
    }
    for (path, mode, content) in FILES {
        key.add(path.as_bytes());
        key.add(mode.to_le_bytes());
        key.add(content.as_bytes());
    }
    for name in MASKED.iter().chain(REMOVED.iter()) {
        key.add(name.as_bytes());
    }
    key.finish()
}

/// The image from the cache; made first if it is not there or `refresh` is set.
///
/// # Errors
/// When a package cannot be fetched, or this is not root.
pub(crate) fn ensure_built(cache: &Path, checkout: &Path, refresh: bool) -> Result<Image> {
    let base = cache.join("testhost");
    let image = Image { dir: base.join(cache_key()) };
    if image.dir.is_dir() && !refresh {
        mark_used(&image.dir)?;
        return Ok(image);
    }
    let _lock = Lock::exclusive(&base.join("lock"), "builds the test host's image")?;
    if image.dir.is_dir() && !refresh {
        return Ok(image);
    }
    remove_leftovers(&base, &image.dir)?;

    say("building the image of the test host; this happens once and takes about two minutes");
    let work = base.join(format!("{}.tmp", cache_key()));
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    debian::need_packages(checkout, &["debootstrap", "debian-archive-keyring", "e2fsprogs"])?;
    debian::debootstrap(cache, &work.join("root"), &packages())?;
    customise(&work.join("root"))?;
    make_disk(&work)?;
    remove_tree(&work.join("root"))?;
    publish(&work, &image.dir)?;
    Ok(image)
}

fn customise(root: &Path) -> Result<()> {
    let step = Step::new("configuring the image");
    for (path, mode, content) in FILES {
        let path = root.join(path);
        let parent = path.parent().context("no parent directory")?;
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        replace_with_symlink(&units.join(unit), Path::new("/dev/null"))?;
    }
    let service = "husk-testhost.service";
    let wants = units.join("multi-user.target.wants");
    replace_with_symlink(&wants.join(service), &Path::new("/etc/systemd/system").join(service))?;
    for path in REMOVED {
        remove_tree(&root.join(path))?;
    }
    // Each boot is a new machine.
    fs::write(root.join("etc/machine-id"), "uninitialized\n").context("writing machine-id")?;
    fs::write(root.join("etc/fstab"), "").context("writing fstab")?;
    step.finish("done");
    Ok(())
}

fn replace_with_symlink(path: &Path, target: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    }
    symlink(target, path).with_context(|| format!("linking {}", path.display()))
}

fn make_disk(work: &Path) -> Result<()> {
    let root = work.join("root");
    let boot = root.join("boot");
    let mut kernels = Vec::new();
    for entry in fs::read_dir(&boot).with_context(|| format!("reading {}", boot.display()))? {
        let name = entry.context("reading /boot")?.file_name();
        if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
            kernels.push(release.to_owned());
        }
    }
    let [release] = kernels.as_slice() else {
        bail!("expected one kernel in the image, found {kernels:?}");
    };
    fs::copy(boot.join(format!("vmlinuz-{release}")), work.join("vmlinuz"))
        .context("copying the kernel")?;

    let step = Step::new("writing the disk image");
    // No journal: the image is only ever written through an overlay that is thrown away.
    debian::run(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "husk-testhost", "-O", "^has_journal", "-E"])
            .arg("lazy_itable_init=1")
            .arg("-d")
            .arg(&root)
            .arg(work.join("root.ext4"))
            .arg(DISK_SIZE),
    )?;
    step.finish("done");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_list_has_names_only() {
        let packages = packages();
        assert!(packages.contains(&"linux-image-cloud-amd64"));
        for name in packages {
            assert!(
                name.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c)),
                "{name:?} is no package name"
            );
        }
    }

    #[test]
    fn the_cache_key_is_stable_and_short() {
        assert_eq!(cache_key(), cache_key());
        assert_eq!(cache_key().len(), 16);
    }
}

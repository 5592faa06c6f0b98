//! The test host's disk image and kernel, made once and kept in the cache.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::files::{Lock, remove_tree};
use super::progress::{Step, say};

/// Raised when this file changes what the image contains.
const RECIPE_VERSION: u32 = 1;

const SUITE: &str = "trixie";
/// Room for images, cores and benchmarks; sparse, so that only what is written takes space.
const DISK_SIZE: &str = "24G";
/// Images older than the newest are kept this long after their last use.
const KEEP_DAYS: u64 = 14;

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
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        // With its length, so that no two lists of parts look alike.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(&RECIPE_VERSION.to_le_bytes());
    add(SUITE.as_bytes());
    add(std::env::consts::ARCH.as_bytes());
    add(DISK_SIZE.as_bytes());
    for package in packages() {
        add(package.as_bytes());
    }
    for (path, mode, content) in FILES {
        add(path.as_bytes());
        add(&mode.to_le_bytes());
        add(content.as_bytes());
    }
    for name in MASKED.iter().chain(REMOVED.iter()) {
        add(name.as_bytes());
    }
    let digest = hex::encode(hash.finalize());
    digest.get(..16).unwrap_or(&digest).to_owned()
}

/// The image from the cache; made first if it is not there or `refresh` is set.
///
/// # Errors
/// When a package cannot be fetched, or this is not root.
pub(crate) fn ensure_built(cache: &Path, checkout: &Path, refresh: bool) -> Result<Image> {
    let base = cache.join("testhost");
    let image = Image { dir: base.join(cache_key()) };
    if image.dir.is_dir() && !refresh {
        mark_used(&image)?;
        return Ok(image);
    }
    let _lock = Lock::exclusive(&base.join("lock"), "builds the test host's image")?;
    if image.dir.is_dir() && !refresh {
        return Ok(image);
    }
    remove_leftovers(&base, &image)?;

    say("building the image of the test host; this happens once and takes about two minutes");
    let work = base.join(format!("{}.tmp", cache_key()));
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    install_tools(checkout)?;
    debootstrap(cache, &work.join("root"))?;
    customise(&work.join("root"))?;
    make_disk(&work)?;
    remove_tree(&work.join("root"))?;
    publish(&work, &image)?;
    Ok(image)
}

/// The time of the last use decides what is removed.
fn mark_used(image: &Image) -> Result<()> {
    let path = image.dir.join("used");
    fs::write(&path, "").with_context(|| format!("writing {}", path.display()))
}

/// Removes what a killed build left, and images that were not used for long. The lock is held.
fn remove_leftovers(base: &Path, current: &Image) -> Result<()> {
    for entry in fs::read_dir(base).with_context(|| format!("reading {}", base.display()))? {
        let path = entry.context("reading the cache")?.path();
        if !path.is_dir() || path == current.dir {
            continue;
        }
        let old = fs::metadata(path.join("used"))
            .and_then(|used| used.modified())
            .is_ok_and(|used| used.elapsed().is_ok_and(|age| age.as_secs() > KEEP_DAYS * 86_400));
        if old || path.extension().is_some_and(|extension| extension == "tmp" || extension == "old")
        {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

fn install_tools(checkout: &Path) -> Result<()> {
    run(Command::new(checkout.join("scripts/need-packages")).args([
        "debootstrap",
        "debian-archive-keyring",
        "e2fsprogs",
    ]))
}

fn debootstrap(cache: &Path, root: &Path) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "debootstrap needs root: run this once as root");
    let debs = cache.join("debs");
    fs::create_dir_all(&debs).with_context(|| format!("making {}", debs.display()))?;
    let mut command = Command::new("debootstrap");
    command
        .arg("--variant=minbase")
        .arg(format!("--cache-dir={}", debs.display()))
        .arg(format!("--include={}", packages().join(",")))
        .arg(SUITE)
        .arg(root)
        .arg(mirror()?);
    run_with_progress("installing Debian packages", &mut command)
}

/// The Debian mirror that this machine's apt uses.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(LABEL)", "Identifier: Packages"])
        .output()
        .context("running apt-get")?;
    first_debian_mirror(&String::from_utf8_lossy(&output.stdout))
        .context("apt has no Debian source from which the mirror could be taken")
}

fn first_debian_mirror(targets: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, label)| *label == "Debian")
        .map(|(uri, _)| uri.to_owned())
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
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", "husk-testhost", "-O", "^has_journal", "-E"])
        .arg("lazy_itable_init=1")
        .arg("-d")
        .arg(&root)
        .arg(work.join("root.ext4"))
        .arg(DISK_SIZE))?;
    step.finish("done");
    Ok(())
}

/// Makes the finished directory visible under its final name, only after all of it is on disk.
fn publish(work: &Path, image: &Image) -> Result<()> {
    for name in ["root.ext4", "vmlinuz"] {
        let path = work.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
            .and_then(|()| File::open(&path)?.sync_all())
            .with_context(|| format!("finishing {}", path.display()))?;
    }
    fs::write(work.join("used"), "").context("writing the time of use")?;
    let sync_dir = |dir: &Path| {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("syncing {}", dir.display()))
    };
    sync_dir(work)?;
    if image.dir.exists() {
        // Test hosts that run keep the old files open.
        let old = image.dir.with_extension("old");
        remove_tree(&old)?;
        fs::rename(&image.dir, &old).context("moving the old image away")?;
        remove_tree(&old)?;
    }
    fs::rename(work, &image.dir).with_context(|| format!("publishing {}", image.dir.display()))?;
    image.dir.parent().map_or(Ok(()), sync_dir)
}

/// Runs a command whose output matters only if it fails.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("running {name}"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Runs a command and shows its last line of output while it runs.
fn run_with_progress(what: &str, command: &mut Command) -> Result<()> {
    const SHOWN_ON_FAILURE: usize = 20;
    let name = command.get_program().to_string_lossy().into_owned();
    let mut step = Step::new(what);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("running {name}"))?;
    let output = child.stdout.take().context("no output of the command")?;
    let mut last = std::collections::VecDeque::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("reading the output of {name}"))?;
        let line = String::from_utf8_lossy(&line).into_owned();
        step.detail(line.trim_start_matches("I: "));
        if last.len() == SHOWN_ON_FAILURE {
            last.pop_front();
        }
        last.push_back(line);
    }
    let status = child.wait().with_context(|| format!("waiting for {name}"))?;
    if !status.success() {
        bail!("{name}: {status}\n{}", Vec::from(last).join("\n"));
    }
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

    #[test]
    fn the_mirror_is_the_first_of_debian_itself() {
        let targets = "http://other/ Something\nhttp://mirror/debian/ Debian\nhttp://x/ Debian\n";
        assert_eq!(first_debian_mirror(targets).as_deref(), Some("http://mirror/debian/"));
        assert_eq!(first_debian_mirror("http://other/ Something\n"), None);
        assert_eq!(first_debian_mirror(""), None);
    }
}

//! Debian packages: the mirror, debootstrap, and commands that take long.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::progress::Step;

/// The release that test hosts and test images are made of.
pub const SUITE: &str = "trixie";

/// Installs packages on this machine by `scripts/need-packages`.
///
/// # Errors
/// When one is missing and cannot be installed.
pub fn need_packages(checkout: &Path, packages: &[&str]) -> Result<()> {
    run(Command::new(checkout.join("scripts/need-packages")).args(packages))
}

/// Installs a minimal Debian system with `packages` into the directory `root`. Downloaded packages
/// are kept in `cache`.
///
/// # Errors
/// When this is not root, a package cannot be fetched, or debootstrap fails.
pub fn debootstrap(cache: &Path, root: &Path, packages: &[&str]) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "debootstrap needs root: run this once as root");
    let debs = cache.join("debs");
    fs::create_dir_all(&debs).with_context(|| format!("making {}", debs.display()))?;
    let mut command = contained("debootstrap");
    command.arg("--variant=minbase").arg(format!("--cache-dir={}", debs.display()));
    if !packages.is_empty() {
        command.arg(format!("--include={}", packages.join(",")));
    }
    command.arg(SUITE).arg(root).arg(mirror()?);
    run_with_progress("installing Debian packages", &mut command)
}

/// A command whose mounts and processes are gone when it ends, and that ends when this process does,
/// both whatever happens: debootstrap mounts `/proc` and `/sys` in its target, and what is half made
/// is removed later with all that is in it.
#[must_use]
pub fn contained(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation=private"]);
    command.args(["--pid", "--fork", "--kill-child", "--", program]);
    command
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

/// Runs a command whose output matters only if it fails.
///
/// # Errors
/// With that output, if it fails.
pub fn run(command: &mut Command) -> Result<()> {
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
///
/// # Errors
/// With the last lines of output, if it fails.
pub fn run_with_progress(what: &str, command: &mut Command) -> Result<()> {
    const SHOWN_ON_FAILURE: usize = 20;
    let mut step = Step::new(what);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{what}: cannot run {}", command.get_program().display()))?;
    let output = child.stdout.take().context("no output of the command")?;
    let mut last = VecDeque::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("{what}: reading the output"))?;
        let line = String::from_utf8_lossy(&line).into_owned();
        step.detail(line.trim_start_matches("I: "));
        if last.len() == SHOWN_ON_FAILURE {
            last.pop_front();
        }
        last.push_back(line);
    }
    let status = child.wait().with_context(|| format!("{what}: waiting"))?;
    if !status.success() {
        bail!("{what}: {status}\n{}", Vec::from(last).join("\n"));
    }
    step.finish("done");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_contained_command_mounts_and_starts_is_gone_with_it() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: namespaces cannot be made");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let script =
            format!("mount -t tmpfs none {0} && touch {0}/x; sleep 600 &", dir.path().display());
        let status = contained("sh").args(["-c", &script]).status().unwrap();
        assert!(status.success());
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn the_mirror_is_the_first_of_debian_itself() {
        let targets = "http://other/ Something\nhttp://mirror/debian/ Debian\nhttp://x/ Debian\n";
        assert_eq!(first_debian_mirror(targets).as_deref(), Some("http://mirror/debian/"));
        assert_eq!(first_debian_mirror("http://other/ Something\n"), None);
        assert_eq!(first_debian_mirror(""), None);
    }
}

//! Runs test binaries, in the test host or here, and keeps what explains a failure.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::client::{self, Input};
use super::instance::Lease;
use super::push::{GUEST_ROOT, Plan, push_and_say};
use crate::wire::{Command, Outcome};
use husk_harness::progress::say;

/// What is collected of the test host, and how. Each is tried by itself: after a failure any of it
/// may be broken.
const LOGS: [(&str, &str); 5] = [
    ("journal.txt", "journalctl --no-pager --boot --output=short-monotonic"),
    ("dmesg.txt", "dmesg"),
    ("processes.txt", "ps axfo pid,ppid,stat,wchan:20,rss,etimes,args; free -m; df -h"),
    ("mounts.txt", "cat /proc/self/mountinfo; ip -all netns exec ip address; ip address"),
    ("husk.tar", "cd / && tar -c --ignore-failed-read --warning=none var/log/husk run/husk; true"),
];
const CORES: (&str, &str) = ("cores.tar.zst", "cd /var/crash && tar -c core.* | zstd -q -T2");
/// A machine that is in trouble must not hold up the report of its trouble.
const LOG_TIMEOUT: Duration = Duration::from_secs(60);

/// How test binaries are run.
#[derive(Debug, clap::Args)]
pub(crate) struct SuiteOptions {
    /// Kill a test binary after this time.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub(crate) timeout: u64,
    /// Environment variable for the test binaries.
    #[arg(long, value_name = "KEY=VALUE", value_parser = crate::parse_env)]
    pub(crate) env: Vec<(String, String)>,
    /// Run them on this machine, whose own KVM must work.
    #[arg(long)]
    pub(crate) native: bool,
    /// In a test host booted for this run alone, though one may be running.
    #[arg(long, conflicts_with = "native")]
    pub(crate) once: bool,
    /// Product tree that the tests use: brought to /opt/husk, or with --native used where it is.
    #[arg(long, value_name = "DIR")]
    pub(crate) tree: Option<PathBuf>,
    /// Where logs of a failed run go.
    #[arg(long, value_name = "DIR", default_value = "target/testhost-logs")]
    pub(crate) logs: PathBuf,
    /// Argument for each test binary.
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
    /// Executables of `cargo test --no-run`.
    #[arg(required = true)]
    pub(crate) binaries: Vec<PathBuf>,
}

/// How the binaries ended: those that failed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) failed: Vec<String>,
}

/// Runs each binary in the test host; collects its logs if any fails.
///
/// # Errors
/// When the test host fails; that a test fails is in the report.
pub(crate) fn run_in(lease: &Lease, options: &SuiteOptions) -> Result<Report> {
    let mut plan = Plan::default();
    if let Some(tree) = &options.tree {
        plan.tree(tree)?;
    }
    for binary in &options.binaries {
        plan.add(binary, &format!("{GUEST_ROOT}/tests/{}", crate::file_name(binary)?))?;
    }
    push_and_say(lease, &plan)?;

    // What is collected is of this run.
    fetch(lease, "rm -f /var/crash/core.*", &mut std::io::sink())?;
    let timeout = Duration::from_secs(options.timeout);
    let mut report = Report::default();
    for binary in &options.binaries {
        let name = crate::file_name(binary)?;
        say(format_args!("running {name}"));
        let mut argv = vec![format!("{GUEST_ROOT}/tests/{name}")];
        argv.extend(options.arguments.iter().cloned());
        let mut env = vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())];
        env.extend(options.env.iter().cloned());
        let command = Command { argv, env, cwd: "/root".into(), terminal: None };
        match client::run(&lease.instance, command, Input::Empty, Some(timeout)) {
            Ok(Outcome::Exited(0)) => {}
            Ok(outcome) => report.failed.push(format!("{name}: {outcome:?}")),
            Err(error) => report.failed.push(format!("{name}: {error:#}")),
        }
    }
    if !report.failed.is_empty() {
        collect(lease, &options.logs)?;
    }
    Ok(report)
}

/// Copies the test host's logs and core dumps to a directory here.
pub(crate) fn collect(lease: &Lease, directory: &Path) -> Result<()> {
    husk_harness::cache::files::remove_tree(directory)?;
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    for log in [lease.state.console_log(), lease.state.qemu_log(), lease.state.supervisor_log()] {
        let name = log.file_name().context("log without a name")?;
        fs::copy(&log, directory.join(name))
            .with_context(|| format!("copying {}", log.display()))?;
    }
    let has_cores = matches!(
        fetch(lease, "ls /var/crash/core.* >/dev/null 2>&1", &mut std::io::sink()),
        Ok(Outcome::Exited(0))
    );
    for (name, script) in LOGS.into_iter().chain(has_cores.then_some(CORES)) {
        let path = directory.join(name);
        let mut file =
            File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        match fetch(lease, script, &mut file) {
            Ok(Outcome::Exited(0)) => {}
            Ok(outcome) => say(format_args!("collecting {name}: {outcome:?}")),
            Err(error) => say(format_args!("collecting {name}: {error:#}")),
        }
    }
    say(format_args!("logs of the test host are in {}", directory.display()));
    Ok(())
}

fn fetch(lease: &Lease, script: &str, output: &mut dyn std::io::Write) -> Result<Outcome> {
    let command = Command {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: Vec::new(),
        cwd: "/".into(),
        terminal: None,
    };
    let stderr = &mut std::io::stderr();
    client::run_into(&lease.instance, command, Input::Empty, Some(LOG_TIMEOUT), output, stderr)
}

/// Runs each binary on this machine.
///
/// # Errors
/// When this machine's KVM does not work, or a binary cannot be started.
pub(crate) fn run_native(options: &SuiteOptions) -> Result<Report> {
    if let Err(reason) = crate::kvm::probe() {
        bail!("--native needs a working KVM: {reason}");
    }
    let mut env = vec![("RUST_BACKTRACE".into(), "1".into())];
    if let Some(tree) = &options.tree {
        let tree = tree.canonicalize().with_context(|| format!("finding {}", tree.display()))?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let parts: Vec<_> =
            std::iter::once(tree.join("bin")).chain(std::env::split_paths(&path)).collect();
        let path = std::env::join_paths(parts).context("extending PATH")?;
        env.push((OsString::from("PATH"), path));
        // Where the tests find what is at /opt/husk in the test host.
        env.push(("HUSK_TREE".into(), tree.into_os_string()));
    }
    let mut report = Report::default();
    for binary in &options.binaries {
        let name = crate::file_name(binary)?;
        say(format_args!("running {name} on this machine"));
        // Killed at the time-out with all that it started, and if this process dies.
        let status = std::process::Command::new("timeout")
            .arg("--kill-after=10")
            .arg(options.timeout.to_string())
            .arg(binary.canonicalize().with_context(|| format!("finding {}", binary.display()))?)
            .args(&options.arguments)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .envs(options.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("running {}", binary.display()))?;
        if !status.success() {
            report.failed.push(format!("{name}: {status}"));
        }
    }
    Ok(report)
}

//! `husk check`: what this host has and lacks to run pods, each line with what to do.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use comfy_table::{Table, presets};
use husk_engine::holder::record::PodRecord;
use husk_engine::network::{self, Checked};
use husk_engine::paths::Config;
use husk_engine::storage::ext4;
use husk_engine::vm::{assets, kvm, probe_kvm};
use serde::Serialize;

use crate::args::{CheckArgs, Global, Output};
use crate::image::human_bytes;
use crate::pods::Pods;

/// Oldest kernel that has all that husk uses of it: `close_range` with `CLOSE_RANGE_CLOEXEC`.
const OLDEST_KERNEL: (u32, u32) = (5, 11);

/// Free disk space below which there is a warning, and below which nothing can be run, in bytes.
const LOW_DISK: u64 = 5 << 30;
const NO_DISK: u64 = 64 << 20;

/// Available memory below which there is a warning, in bytes.
const LOW_MEMORY: u64 = 512 << 20;

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    name: Cow<'static, str>,
    level: Level,
    /// What was found, and what to do about it.
    detail: String,
}

fn finding(name: impl Into<Cow<'static, str>>, level: Level, detail: impl Into<String>) -> Finding {
    Finding { name: name.into(), level, detail: detail.into() }
}

/// The texts of an error and its causes.
fn chain(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}

/// Checks this host.
pub(crate) fn run(global: &Global, args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let config = global.config()?;
    let findings = match args.pods.as_slice() {
        [] => check(&config),
        named => {
            let pods = Pods::read(global)?;
            let found = named.iter().map(|name| pods.find(name));
            let found = found.collect::<anyhow::Result<Vec<_>>>()?;
            found.into_iter().map(|found| pod_network(&config, &found.pod)).collect()
        }
    };
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
        Output::Text => println!("{}", table(&findings)),
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(ExitCode::from(u8::from(failed)))
}

fn table(findings: &[Finding]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for Finding { name, level, detail } in findings {
        let level = match level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        table.add_row([level, name.as_ref(), detail]);
    }
    table
}

/// Whether a pod's network is as it was made.
fn pod_network(config: &Config, pod: &PodRecord) -> Finding {
    let (level, detail) = match network::check(&config.state_dir, &pod.uid) {
        Ok(Checked::NoNetwork) => (Level::Ok, "it has no network".to_owned()),
        Ok(Checked::Namespace(path)) => {
            (Level::Ok, format!("its network namespace {} is there", path.display()))
        }
        Ok(Checked::AsMade(network)) => {
            (Level::Ok, format!("the plugins of network {network:?} find it as they made it"))
        }
        Ok(Checked::Unfinished) => (Level::Warn, "its network is not made yet".to_owned()),
        Ok(Checked::Unchecked(network)) => {
            let why = "its configuration has disableCheck, or a version of CNI before 0.4.0";
            (Level::Warn, format!("the plugins of network {network:?} cannot be asked: {why}"))
        }
        Err(error) => (Level::Fail, chain(error)),
    };
    finding(pod.full_name(), level, detail)
}

fn check(config: &Config) -> Vec<Finding> {
    let mut findings = vec![host_kernel()];
    let (device, opened) = kvm_device(config);
    findings.push(device);
    findings.push(program("VMM", Level::Fail, &config.vmm, "husk-vmm", "--vmm or HUSK_VMM"));
    // Only pods that share files with the host need it.
    findings.push(program(
        "file server",
        Level::Warn,
        &config.file_server,
        "husk-fs",
        "--file-server or HUSK_FS",
    ));
    findings.push(kvm_runs(config, opened.as_ref()));
    findings.push(match assets::open_kernel(&config.kernel) {
        Ok(_) => finding("guest kernel", Level::Ok, config.kernel.display().to_string()),
        Err(error) => finding("guest kernel", Level::Fail, chain(error)),
    });
    findings.push(match assets::open_initramfs(&config.initramfs) {
        Ok(_) => finding("initramfs", Level::Ok, config.initramfs.display().to_string()),
        Err(error) => finding("initramfs", Level::Fail, chain(error)),
    });
    findings.push(mkfs());
    findings.push(directory("state directory", &config.state_dir, "--state-dir", true));
    findings.push(directory("run directory", &config.run_dir, "--run-dir", false));
    findings.push(memory());
    findings.push(cgroups());
    findings
}

fn host_kernel() -> Finding {
    const NAME: &str = "host kernel";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let (major, minor) = OLDEST_KERNEL;
    match version(&release) {
        Some(found) if found >= OLDEST_KERNEL => {
            finding(NAME, Level::Ok, format!("Linux {release}"))
        }
        Some(_) => finding(
            NAME,
            Level::Fail,
            format!("Linux {release} is too old: upgrade to {major}.{minor} or newer"),
        ),
        None => finding(
            NAME,
            Level::Warn,
            format!("Linux {release}: cannot tell whether it is {major}.{minor} or newer"),
        ),
    }
}

/// Major and minor version of a kernel release, e.g. `6.1.0-49-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kvm_device(config: &Config) -> (Finding, Option<OwnedFd>) {
    match kvm::open(&config.kvm) {
        Ok(opened) => {
            let detail = format!("{} can be opened", config.kvm.display());
            (finding("KVM device", Level::Ok, detail), Some(opened))
        }
        Err(error) => (finding("KVM device", Level::Fail, chain(error)), None),
    }
}

/// Whether one of husk's own programs is there, and how bad it is if it is not; `option` is by what
/// another one is named.
fn program(
    name: &'static str,
    missing: Level,
    path: &Path,
    program: &str,
    option: &str,
) -> Finding {
    let shown = path.display();
    match rustix::fs::access(path, rustix::fs::Access::EXEC_OK) {
        Ok(()) => finding(name, Level::Ok, shown.to_string()),
        Err(errno) => finding(
            name,
            missing,
            format!(
                "cannot execute {shown} ({errno}): install {program} beside husk, or name it with \
                 {option}"
            ),
        ),
    }
}

fn kvm_runs(config: &Config, device: Option<&OwnedFd>) -> Finding {
    const NAME: &str = "KVM runs guests";
    let Some(device) = device else {
        return finding(NAME, Level::Fail, "not tried: the device cannot be opened");
    };
    match probe_kvm(&config.vmm, device) {
        Ok(probe) if probe.ok => finding(NAME, Level::Ok, probe.detail),
        Ok(probe) => finding(
            NAME,
            Level::Fail,
            format!(
                "{}. KVM can be opened here but does not run a guest{}: use a host with hardware \
                 virtualization, or, if this is a virtual machine, enable nested virtualization on \
                 its host; husk's own tests and demo run in the project's test host instead \
                 (`make host-shell`)",
                probe.detail.trim_end_matches('.'),
                nested_hint()
            ),
        ),
        Err(error) => finding(NAME, Level::Fail, chain(error)),
    }
}

/// What the processor's flags say of where this is.
fn nested_hint() -> &'static str {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|known| known == flag);
    match (has("hypervisor"), has("vmx") || has("svm")) {
        (true, false) => " (this is a virtual machine whose processor shows no virtualization)",
        (true, true) => " (this is a virtual machine)",
        (false, false) => " (the processor shows no virtualization)",
        (false, true) => "",
    }
}

fn mkfs() -> Finding {
    match ext4::find_mkfs() {
        Some(path) => finding("mkfs.ext4", Level::Ok, path.display().to_string()),
        None => finding(
            "mkfs.ext4",
            Level::Fail,
            "not found: install the package e2fsprogs (`apt install e2fsprogs`)",
        ),
    }
}

/// Whether a directory (or that in which it will be made) can be written, and what is free there.
fn directory(name: &'static str, dir: &Path, option: &str, needs_space: bool) -> Finding {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let existing = absolute.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let shown = dir.display();
    if let Err(errno) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        return finding(
            name,
            Level::Fail,
            format!(
                "{shown} cannot be written ({errno}): run as root, or choose another with {option}"
            ),
        );
    }
    if !needs_space {
        return finding(name, Level::Ok, shown.to_string());
    }
    let free = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(errno) => {
            let detail = format!("{shown}: cannot tell what is free there ({errno})");
            return finding(name, Level::Warn, detail);
        }
    };
    let detail = format!("{shown}, {} free", human_bytes(free));
    let advice = format!("; free some, or choose another with {option}");
    match free {
        0..NO_DISK => finding(name, Level::Fail, format!("{detail}: too little{advice}")),
        NO_DISK..LOW_DISK => finding(name, Level::Warn, format!("{detail}: little{advice}")),
        _ => finding(name, Level::Ok, detail),
    }
}

fn memory() -> Finding {
    const NAME: &str = "memory";
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_memory(&meminfo) {
        Some(bytes) if bytes < LOW_MEMORY => finding(
            NAME,
            Level::Warn,
            format!("{} available: enough for small pods only", human_bytes(bytes)),
        ),
        Some(bytes) => finding(NAME, Level::Ok, format!("{} available", human_bytes(bytes))),
        None => finding(NAME, Level::Warn, "cannot tell from /proc/meminfo what is available"),
    }
}

fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        finding("cgroup v2", Level::Ok, "/sys/fs/cgroup")
    } else {
        finding(
            "cgroup v2",
            Level::Warn,
            "not mounted at /sys/fs/cgroup: `husk run` works, but Kubernetes will not; boot with \
             systemd.unified_cgroup_hierarchy=1",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_understood() {
        assert_eq!(version("6.1.0-49-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("5.11"), Some((5, 11)));
        assert_eq!(version("weird"), None);
        assert!(version("5.4.0-1") < Some(OLDEST_KERNEL));
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(available_memory("MemTotal: 9 kB\nMemAvailable:   1024 kB\n"), Some(1 << 20));
        assert_eq!(available_memory("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_its_parent() {
        let parent = std::env::temp_dir();
        let found = directory("x", &parent.join("a/b/c"), "--x", false);
        assert_eq!(found.level, Level::Ok);
        let found = directory("x", Path::new("/proc/1/none"), "--x", true);
        assert_ne!(found.level, Level::Ok);
    }
}

//! `kill -9` of a pod's process, or of its VMM, at any moment of a pod's life: the pod is Failed with
//! a reason, `husk rm` takes it away, and nothing is left. The moments are spread over the time that
//! an undisturbed pod takes here, so they fall into every phase on a slow host and on a fast one.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_cases::pods::Husk;
use husk_cases::registry::disk_dir;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const ROUNDS: u32 = 8;
const IMAGE: &str = "localhost/husk/busybox:test";
/// How long anything may take. Nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(120);
const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  restartPolicy: Never
  initContainers:
  - {name: first, image: localhost/husk/busybox:test, command: [sh, -c, 'echo first > /shared/file'],
     volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: localhost/husk/busybox:test, command: [sh, -c, 'cat /shared/file; sleep 2'],
     volumeMounts: [{name: shared, mountPath: /shared}]}
  volumes: [{name: shared, emptyDir: {}}]
";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Holder,
    Vmm,
}

/// husk with directories of its own, so that what is left can be counted.
struct Place {
    husk: Husk,
    run: PathBuf,
    _dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Place> {
        let dir = disk_dir()?;
        let place = Place {
            husk: Husk::at(&dir.path().join("state")),
            run: dir.path().join("run"),
            _dir: dir,
        };
        let layout = husk_cases::place::tree().join("images/busybox");
        place.ok(&["image", "import", layout.to_str().context("a path")?, IMAGE])?;
        Ok(place)
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.husk.command(&[]);
        command.arg("--run-dir").arg(&self.run).args(args);
        command
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{args:?}: {} {text}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Begins to run a pod in the background; the command that does is not waited for.
    fn begin(&self, name: &str) -> Result<std::process::Child> {
        let mut command = self.command(&["run", "-d", "-"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let manifest = POD.replace("NAME", name);
        child.stdin.take().context("no input")?.write_all(manifest.as_bytes())?;
        Ok(child)
    }

    /// What `husk ps` knows of the pod.
    fn pod(&self, name: &str) -> Result<Option<Value>> {
        let pods: Vec<Value> = serde_json::from_str(&self.ok(&["ps", "-a", "-o", "json"])?)?;
        Ok(pods.into_iter().find(|pod| pod["name"] == name))
    }

    fn until_ended(&self, name: &str) -> Result<Value> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(pod) = self.pod(name)?.filter(|pod| pod["running"] == false) {
                return Ok(pod);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{name} does not end: {:?}", self.pod(name)?)
    }

    /// The processes that were started for a pod of this place: holders name its directory on their
    /// command line, VMMs are children of holders.
    fn holders(&self) -> Result<BTreeSet<i32>> {
        let run = self.run.to_str().context("a path")?;
        let of_pod = |command: &str| command.contains(run);
        processes(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|text| of_pod(&text))
        })
    }

    /// Files, sockets, mounts, processes.
    fn assert_nothing_is_left(&self) -> Result<()> {
        let pods = [self.husk.state().join("pods"), self.run.join("pods")];
        for directory in pods.iter().filter(|directory| directory.exists()) {
            // What is told of all pods is a file; what is of one is a directory.
            let mut left = visible(directory)?.into_iter();
            let left = left.find(|path| path.is_dir());
            ensure!(left.is_none(), "{left:?} is left in {}", directory.display());
        }
        let scratch = self.husk.state().join("scratch");
        if scratch.exists() {
            ensure!(visible(&scratch)?.is_empty(), "a disk is left");
        }
        let run = self.run.to_str().context("a path")?;
        for table in ["/proc/net/unix", "/proc/mounts"] {
            ensure!(!fs::read_to_string(table)?.contains(run), "{table} names what is left");
        }
        let started = Instant::now();
        loop {
            let left = self.holders()?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "processes are left: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What is in a directory, but for the locks that guard it.
fn visible(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn processes(wanted: impl Fn(i32) -> bool) -> Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_string_lossy().parse::<i32>();
        found.extend(pid.ok().filter(|pid| wanted(*pid)));
    }
    Ok(found)
}

/// The VMM of a holder, if it has one now.
fn vmm_of(holder: i32) -> Result<Option<i32>> {
    let is_child = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("Name:\thusk-vmm") && status.contains(&format!("PPid:\t{holder}\n"))
    };
    Ok(processes(is_child)?.pop_first())
}

/// Kills, if it lives; whether it did.
fn kill(pid: Option<i32>) -> Result<bool> {
    match pid.and_then(Pid::from_raw).map(|pid| kill_process(pid, Signal::KILL)) {
        Some(Ok(())) => Ok(true),
        None | Some(Err(rustix::io::Errno::SRCH)) => Ok(false),
        Some(Err(errno)) => Err(errno.into()),
    }
}

#[test]
fn a_pod_killed_at_any_moment_is_failed_with_a_reason_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    // The first takes longer: it makes the disk's template. The second is the measure.
    let mut whole = Duration::ZERO;
    for name in ["first", "second"] {
        let started = Instant::now();
        let mut command = place.begin(name)?;
        let end = place.until_ended(name)?;
        ensure!(end["phase"] == "Succeeded", "undisturbed: {end:#}");
        whole = started.elapsed();
        command.wait()?;
        place.ok(&["rm", name])?;
        place.assert_nothing_is_left()?;
    }

    let (mut killed, mut reasons) = (0, BTreeSet::new());
    for round in 0..ROUNDS {
        let name = format!("killed-{round}");
        let victim = if round % 2 == 0 { Victim::Holder } else { Victim::Vmm };
        let mut command = place.begin(&name)?;
        std::thread::sleep(whole * round / ROUNDS);
        // `husk run -d` itself names the directory too: the holder is its child, or nobody's.
        let client = i32::try_from(command.id())?;
        let holder = place.holders()?.into_iter().find(|pid| *pid != client);
        let struck = match victim {
            Victim::Holder => kill(holder)?,
            Victim::Vmm => kill(holder.map(vmm_of).transpose()?.flatten())?,
        };
        let status = command.wait()?;
        let Some(end) = place.pod(&name)?.map(|_| place.until_ended(&name)).transpose()? else {
            // Before it was a pod that runs: the command itself says why, and keeps nothing.
            ensure!(!status.success(), "{name}: the command said that it runs");
            place.assert_nothing_is_left()?;
            killed += u32::from(struck);
            continue;
        };
        println!("{name}: {victim:?} struck: {struck}; {} {}", end["phase"], end["reason"]);
        if end["phase"] != "Succeeded" {
            ensure!(end["phase"] == "Failed", "{end:#}");
            let reason = end["reason"].as_str().unwrap_or_default();
            ensure!(!reason.is_empty(), "failed without a reason: {end:#}");
            reasons.insert(reason.to_owned());
            killed += 1;
        } else {
            ensure!(!struck || victim == Victim::Vmm, "succeeded without its process: {end:#}");
        }
        place.ok(&["rm", &name])?;
        place.assert_nothing_is_left()?;
    }
    // The rest were over already, on a machine that has become faster since the measure was taken.
    ensure!(killed >= ROUNDS / 4, "only {killed} pods were hit");
    ensure!(reasons.iter().all(|r| ["HolderLost", "VmLost"].contains(&r.as_str())), "{reasons:?}");
    Ok(())
}

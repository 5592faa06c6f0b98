//! However the processes around it end, QEMU ends: shown with a stand-in for QEMU, so that it needs
//! neither an image nor a KVM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Generous: the machine may be busy.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The process that starts the supervisor; both are gone at the end, also of a test that fails.
struct Shell<'a> {
    child: std::process::Child,
    place: &'a Place,
}

impl Shell<'_> {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Shell<'_> {
    fn drop(&mut self) {
        // Each may have ended already, which is as good.
        let supervisor = fs::read_to_string(self.place.path("supervisor.pid")).ok();
        if let Some(pid) = supervisor.and_then(|text| Pid::from_raw(text.trim().parse().ok()?)) {
            kill_process(pid, Signal::KILL).ok();
        }
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let qemu = bin.join("qemu-system-x86_64");
        let pid_file = dir.path().join("qemu.pid");
        let script = format!(
            "#!/bin/sh\necho $$ >{0}.new\nmv {0}.new {0}\nexec sleep 1000\n",
            pid_file.display()
        );
        fs::write(&qemu, script).unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A shell that starts the supervisor, so that there is a parent to kill. `$$` in the arguments
    /// is the shell's process.
    fn shell(&self, arguments: &str) -> Shell<'_> {
        let supervise = format!(
            "{} supervise --state {} --image /nonexistent --accelerator tcg --cpus 1 \
             --memory-mib 64 {arguments} & echo $! >{}; wait",
            env!("CARGO_BIN_EXE_husk-testhost"),
            self.path("state").display(),
            self.path("supervisor.pid").display(),
        );
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let child = Command::new("sh")
            .args(["-c", &supervise])
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Shell { child, place: self }
    }

    fn pid(&self, name: &str) -> Pid {
        let path = self.path(name);
        wait_until(&format!("{} is written", path.display()), || {
            fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))
        });
        let text = fs::read_to_string(&path).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    /// The stand-in's process, once the supervisor has written how to reach it.
    fn qemu(&self) -> Pid {
        wait_until("the instance is written", || self.path("state/instance.json").exists());
        self.pid("qemu.pid")
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < TIMEOUT, "not within {TIMEOUT:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// Whether the process is gone, or only waits for a parent that does not reap.
fn has_ended(pid: Pid) -> bool {
    if test_kill_process(pid).is_err() {
        return true;
    }
    let status = Path::new("/proc").join(pid.as_raw_nonzero().to_string()).join("stat");
    fs::read_to_string(status)
        .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}

#[test]
fn qemu_ends_with_its_supervisor_however_that_ends() {
    let place = Place::new();
    let _shell = place.shell("--idle-minutes 60");
    let qemu = place.qemu();
    assert!(!has_ended(qemu));
    kill_process(place.pid("supervisor.pid"), Signal::KILL).unwrap();
    wait_until("QEMU ends", || has_ended(qemu));
}

#[test]
fn a_one_shot_ends_with_the_process_that_wanted_it() {
    let place = Place::new();
    let mut shell = place.shell("--idle-minutes 60 --die-with $$");
    let (qemu, supervisor) = (place.qemu(), place.pid("supervisor.pid"));
    shell.kill();
    wait_until("the supervisor ends", || has_ended(supervisor));
    wait_until("QEMU ends", || has_ended(qemu));
}

#[test]
fn a_kept_one_outlives_the_process_that_started_it() {
    let place = Place::new();
    let mut shell = place.shell("--idle-minutes 60");
    let (qemu, supervisor) = (place.qemu(), place.pid("supervisor.pid"));
    shell.kill();
    sleep(Duration::from_millis(500));
    assert!(!has_ended(supervisor) && !has_ended(qemu));
    kill_process(supervisor, Signal::TERM).unwrap();
    wait_until("QEMU ends", || has_ended(qemu));
}

#[test]
fn a_supervisor_whose_parent_is_gone_starts_nothing() {
    let place = Place::new();
    // No process has this number: it is above the kernel's limit.
    let _shell = place.shell("--idle-minutes 60 --die-with 2147483647");
    let supervisor = place.pid("supervisor.pid");
    wait_until("the supervisor ends", || has_ended(supervisor));
    assert!(!place.path("qemu.pid").exists());
}

#[test]
fn files_that_hold_the_token_are_private() {
    let place = Place::new();
    let mut shell = place.shell("--idle-minutes 60 --die-with $$");
    let qemu = place.qemu();
    for file in ["state/transfer.raw", "state/instance.json"] {
        let mode = fs::metadata(place.path(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} has mode {mode:o}");
    }
    shell.kill();
    wait_until("QEMU ends", || has_ended(qemu));
}

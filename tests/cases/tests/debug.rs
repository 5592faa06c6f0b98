//! `husk debug`: what a process beside the containers sees of the guest, and what is left of it. One
//! pod for everything, because each takes seconds.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::pods::Husk;
use serde_json::Value;

const NAME: &str = "debugged";

const MANIFEST: &str = "apiVersion: v1
kind: Pod
metadata: {name: debugged}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 20
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command: [sh, -c, 'echo mine > /tmp/mark; trap \"exit 3\" TERM; sleep 1234 & wait']
";

/// Removes the pod when it is dropped.
struct Pod(&'static Husk);

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.0.output(&["rm", "-f", NAME]) {
            eprintln!("{NAME} stays: {error:#}");
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Pod {
    fn up() -> Result<Pod> {
        let pod = Pod(Husk::shared()?);
        let mut child = pod
            .0
            .command(&["run", "-d", "--debug-image", "localhost/husk/debian:test", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no input")?.write_all(MANIFEST.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        Ok(pod)
    }

    fn debug(&self, script: &str) -> Result<Output> {
        self.0.output(&["debug", NAME, "--", "sh", "-c", script])
    }

    /// Runs a script that must succeed; its standard output.
    fn ok(&self, script: &str) -> Result<String> {
        let output = self.debug(script)?;
        ensure!(output.status.success(), "{script}: {} {}", output.status, text(&output.stderr));
        Ok(text(&output.stdout))
    }

    /// The command lines of all processes of the guest.
    fn processes(&self) -> Result<String> {
        self.ok("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    }

    fn until(&self, what: &str, done: impl Fn(&str) -> bool) -> Result<()> {
        for _ in 0..100 {
            if done(&self.processes()?) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("never: {what}")
    }
}

#[test]
fn a_debug_container_sees_the_guest_and_is_none_of_the_pods() -> Result<()> {
    let pod = Pod::up()?;
    what_it_sees(&pod)?;
    what_is_left(&pod)?;
    on_a_terminal(&pod)?;

    // The pod does not know of it, nor waits for it.
    let mut debug =
        pod.0.command(&["debug", NAME, "sleep", "7777"]).stderr(Stdio::piped()).spawn()?;
    pod.until("the command runs", |all| all.contains("sleep 7777"))?;
    let told = pod.0.output(&["stats", "--no-stream", "--output", "json", NAME])?;
    let told: Value = serde_json::from_slice(&told.stdout)?;
    ensure!(told["containers"].as_array().is_some_and(|all| all.len() == 1), "{told:#}");
    let stopped = pod.0.output(&["stop", NAME])?;
    ensure!(stopped.status.success(), "{}", text(&stopped.stderr));
    // It is killed as the guest shuts down, and its end may be told before the VM is gone.
    let told = debug.wait()?.code();
    ensure!(matches!(told, Some(125 | 137)), "{told:?}");
    let inspected = pod.0.output(&["inspect", NAME])?;
    let inspected: Value = serde_json::from_slice(&inspected.stdout)?;
    let containers = &inspected[0]["status"]["containers"];
    ensure!(containers.as_array().is_some_and(|all| all.len() == 1), "{inspected:#}");
    ensure!(containers[0]["state"]["terminated"]["exitCode"] == 3, "{inspected:#}");
    Ok(())
}

fn what_it_sees(pod: &Pod) -> Result<()> {
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)] {
        let output = pod.debug(script)?;
        ensure!(output.status.code() == Some(code), "{script}: {:?}", output.status);
    }
    let missing = pod.0.output(&["debug", NAME, "/no/such"])?;
    ensure!(missing.status.code() == Some(127), "{}", text(&missing.stderr));

    // Nothing but its mounts is its own.
    let kinds = "for n in pid net ipc uts cgroup user mnt; do
        [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n; done";
    ensure!(pod.ok(kinds)? == "mnt\n", "{}", pod.ok(kinds)?);
    ensure!(pod.ok("hostname; id -u")? == "debugged\n0\n");
    let all = pod.processes()?;
    ensure!(all.contains("sleep 1234"), "{all}");
    let status = pod.ok("grep -E '^(CapEff|Seccomp|NoNewPrivs):' /proc/self/status")?;
    ensure!(status == "CapEff:\t000001ffffffffff\nNoNewPrivs:\t0\nSeccomp:\t0\n", "{status}");
    let cgroups = pod.ok("find /sys/fs/cgroup -type d -name main")?;
    ensure!(cgroups.lines().count() == 1, "{cgroups}");
    // What the kernel says of a disk is one thing, that it may be read is another.
    ensure!(pod.ok("head -c 4096 /guest/dev/vda | wc -c")?.trim() == "4096");
    // Its tools are the image's, not those of the containers; their files are in reach.
    pod.ok("cat /etc/debian_version")?;
    let mark = pod.ok("for p in /proc/[0-9]*; do
        case $(tr '\\0' ' ' < $p/cmdline) in 'sleep 1234 ') cat $p/root/tmp/mark;; esac; done")?;
    ensure!(mark == "mine\n", "{mark}");
    let guest = pod.ok("ls /guest/run/husk/containers")?;
    ensure!(guest.lines().any(|name| name == "main"), "{guest}");
    Ok(())
}

fn what_is_left(pod: &Pod) -> Result<()> {
    // Neither a mount nor a file nor a process outlives the command.
    let mounts = "grep -c . /proc/1/mounts";
    let before = pod.ok(mounts)?;
    let mount = format!("mount -t tmpfs none /guest/tmp && touch /left && {mounts}");
    ensure!(pod.ok(&mount)? == before, "what it mounts is in the guest");
    pod.ok("[ ! -e /left ]")?;
    ensure!(pod.ok("sleep 4321 > /dev/null 2>&1 & sleep 0.1; echo ran")? == "ran\n");
    let all = pod.processes()?;
    ensure!(!all.contains("sleep 4321"), "{all}");

    let mut command = pod.0.command(&["debug", NAME, "sleep", "5555"]).spawn()?;
    pod.until("the command runs", |all| all.contains("sleep 5555"))?;
    command.kill()?;
    command.wait()?;
    pod.until("it ends with its client", |all| !all.contains("sleep 5555"))?;
    // The one that looks is the only one that is left.
    let left = pod.ok("ls /guest/run/husk/containers | grep -c debug")?;
    ensure!(left == "1\n", "{left}");
    Ok(())
}

fn on_a_terminal(pod: &Pod) -> Result<()> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let person: OwnedFd = openpt(flags)?;
    grantpt(&person)?;
    unlockpt(&person)?;
    let terminal = File::from(ioctl_tiocgptpeer(&person, flags)?);
    let mut person = File::from(person);
    // Without a command it is a shell.
    let mut debug = pod
        .0
        .command(&["debug", "-it", NAME])
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal)
        .spawn()?;
    person.write_all(b"tty; exit 6\r")?;
    let mut shown = String::new();
    let mut buffer = [0; 1024];
    while !shown.contains("/dev/pts/") {
        let n = person.read(&mut buffer)?;
        shown.push_str(&text(&buffer[..n]));
    }
    ensure!(debug.wait()?.code() == Some(6), "{shown}");
    Ok(())
}

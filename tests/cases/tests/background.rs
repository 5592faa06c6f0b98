//! Pods in the background, for real: what commands see of them, and what is left of them. The guest
//! half of each test is its manifest. Few pods, each for many things, because each takes seconds.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::background::{Pod, text};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

fn alive(pid: Pid) -> bool {
    std::path::Path::new(&format!("/proc/{}/exe", pid.as_raw_nonzero())).exists()
}

/// A terminal: what a person has, and what the command gets.
fn terminal(columns: u16, rows: u16) -> Result<(File, File)> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let person: OwnedFd = openpt(flags)?;
    grantpt(&person)?;
    unlockpt(&person)?;
    let command = ioctl_tiocgptpeer(&person, flags)?;
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&command, size)?;
    Ok((person.into(), command.into()))
}

/// Reads what is shown until these words.
fn read_until(from: &mut File, words: &str) -> Result<String> {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(words) {
        let n = from.read(&mut buffer)?;
        ensure!(n > 0, "never showed {words:?}: {seen}");
        seen.push_str(&text(&buffer[..n]));
    }
    Ok(seen)
}

const TWO: &str = "  - name: main
    image: localhost/husk/busybox:test
    command: [sh, -c, 'trap \"echo asked; exit 3\" TERM; echo up; while :; do sleep 0.2; done']
  - name: shell
    image: localhost/husk/busybox:test
    command: [sh, -c, 'trap \"exit 0\" TERM; while read line; do echo got $line; done; sleep 1000']
    stdin: true
    tty: true
    securityContext: {privileged: true}
";

#[test]
fn commands_work_on_a_pod_in_the_background() -> Result<()> {
    let pod = Pod::up("background", TWO, &[])?;
    let list = pod.ok(&["ps"])?;
    ensure!(list.contains("background") && list.contains("2/2"), "{list}");
    pod.until("the first line", |pod| Ok(pod.ok(&["logs", "-c", "main", pod.name])? == "up\n"))?;

    // Exit codes are exact, and so are the words.
    for (command, code) in
        [("exit 0", 0), ("exit 42", 42), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
    {
        let output = pod.exec(&["sh", "-c", command])?;
        ensure!(output.status.code() == Some(code), "{command}: {:?}", output.status);
    }
    let missing = pod.exec(&["/no/such"])?;
    ensure!(missing.status.code() == Some(127), "{}", text(&missing.stderr));
    let directory = pod.exec(&["/etc"])?;
    ensure!(directory.status.code() == Some(126), "{}", text(&directory.stderr));
    let who = pod.ok(&[
        "exec",
        "-u",
        "7:8",
        "-w",
        "/tmp",
        "-e",
        "A=b",
        pod.name,
        "sh",
        "-c",
        "id -u; id -g; pwd; echo $A; hostname",
    ])?;
    ensure!(who == "7\n8\n/tmp\nb\nbackground\n", "{who}");

    // What goes in comes out.
    let input: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[1] ^ 0x5a).collect();
    let mut cat = pod
        .husk
        .command(&["exec", "-i", pod.name, "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = cat.stdin.take().context("no input")?;
    let sent = input.clone();
    let writing = std::thread::spawn(move || stdin.write_all(&sent));
    let mut got = Vec::new();
    cat.stdout.take().context("no output")?.read_to_end(&mut got)?;
    writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(got == input && cat.wait()?.success(), "{} of {}", got.len(), input.len());

    what_is_told(&pod)?;
    terminals(&pod)?;
    files(&pod)?;

    pod.ok(&["stop", pod.name])?;
    let ended = pod.inspect()?;
    ensure!(ended["status"]["phase"] == "Failed", "{ended:#}");
    ensure!(pod.ok(&["logs", "-c", "main", pod.name])? == "up\nasked\n");
    ensure!(pod.husk.output(&["wait", pod.name])?.status.code() == Some(3));
    let events = pod.ok(&["events", "--no-follow", pod.name])?;
    ensure!(events.contains("main Exited (3)"), "{events}");
    let console = pod.husk.output(&["console", pod.name])?;
    ensure!(console.status.success() && text(&console.stderr).contains("has ended"));
    pod.gone()
}

/// The whole log of the guest's kernel, although it is started to be quiet.
fn console(pod: &Pod) -> Result<()> {
    let output = pod.husk.output(&["console", pod.name])?;
    let (log, notes) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success() && notes.is_empty(), "{}: {notes}", output.status);
    ensure!(log.starts_with("[    0.000000] Linux version "), "{log}");
    ensure!(log.lines().all(|line| line.starts_with('[')), "{log}");
    let mut follow =
        pod.husk.command(&["console", "-f", pod.name]).stdout(Stdio::piped()).spawn()?;
    let mut told = File::from(OwnedFd::from(follow.stdout.take().context("no output")?));
    read_until(&mut told, "Linux version ")?;
    let say = "mknod /tmp/kmsg c 1 11 && echo '<6>said by the guest' > /tmp/kmsg";
    pod.ok(&["exec", "-c", "shell", pod.name, "sh", "-c", say])?;
    read_until(&mut told, "said by the guest")?;
    follow.kill()?;
    follow.wait()?;
    Ok(())
}

/// Lists, statistics, the console; pauses.
fn what_is_told(pod: &Pod) -> Result<()> {
    console(pod)?;
    let top = pod.ok(&["top", pod.name])?;
    ensure!(top.contains("sleep") && top.contains("shell"), "{top}");

    // 32 MiB that are the container's, and stay.
    pod.ok(&["exec", pod.name, "sh", "-c", "head -c 33554432 /dev/zero > /dev/shm/ballast"])?;
    let stats: Value =
        serde_json::from_str(&pod.ok(&["stats", "--no-stream", "--output", "json", pod.name])?)?;
    let told = stats["containers"].as_array().into_iter().flatten();
    let told = told.clone().find(|container| container["name"] == "main").context("no main")?;
    let told = told["memory"].as_u64().context("no memory")?;
    let seen: u64 =
        pod.ok(&["exec", pod.name, "cat", "/sys/fs/cgroup/memory.current"])?.trim().parse()?;
    ensure!(told.abs_diff(seen) * 20 <= seen, "told {told}, the guest says {seen}");
    ensure!(told > 32 << 20, "{told}");

    pod.ok(&["pause", "-c", "main", pod.name])?;
    pod.ok(&["unpause", "-c", "main", pod.name])?;
    Ok(())
}

/// exec -it and attach on a terminal: its size, its keys, and its settings afterwards.
fn terminals(pod: &Pod) -> Result<()> {
    let settings =
        |terminal: &File| -> Result<String> { Ok(format!("{:?}", tcgetattr(terminal)?)) };
    let (mut person, command) = terminal(97, 31)?;
    let before = settings(&command)?;
    let mut exec = pod
        .husk
        .command(&["exec", "-it", pod.name, "sh", "-c", "stty size; read x; stty size; exit 6"])
        .stdin(command.try_clone()?)
        .stdout(command.try_clone()?)
        .stderr(command.try_clone()?)
        .spawn()?;
    read_until(&mut person, "31 97")?;
    let size = Winsize { ws_col: 55, ws_row: 22, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&command, size)?;
    // The kernel tells the terminal's foreground; this command is in none.
    kill_process(Pid::from_child(&exec), Signal::WINCH)?;
    std::thread::sleep(Duration::from_secs(1));
    person.write_all(b"\r")?;
    read_until(&mut person, "22 55")?;
    ensure!(exec.wait()?.code() == Some(6));
    ensure!(settings(&command)? == before, "the terminal was left changed");

    let mut attach = pod
        .husk
        .command(&["attach", "-c", "shell", pod.name])
        .stdin(command.try_clone()?)
        .stdout(command.try_clone()?)
        .stderr(command.try_clone()?)
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    person.write_all(b"hello\r")?;
    read_until(&mut person, "got hello")?;
    // ctrl-p ctrl-q
    person.write_all(b"\x10\x11")?;
    ensure!(attach.wait()?.code() == Some(0));
    ensure!(settings(&command)? == before, "the terminal was left changed");

    // Ended by a signal, it is put right as well.
    let mut exec = pod
        .husk
        .command(&["attach", "-c", "shell", pod.name])
        .stdin(command.try_clone()?)
        .stdout(command.try_clone()?)
        .stderr(command.try_clone()?)
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(settings(&command)? != before, "it is not raw");
    kill_process(Pid::from_child(&exec), Signal::TERM)?;
    exec.wait()?;
    ensure!(settings(&command)? == before, "the terminal was left changed");
    Ok(())
}

/// Copies both ways, volumes and all, and what leads astray.
fn files(pod: &Pod) -> Result<()> {
    let here = tempfile::tempdir()?;
    let tree = here.path().join("tree");
    std::fs::create_dir_all(tree.join("deep"))?;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    std::fs::write(tree.join("deep/file"), &content)?;
    std::os::unix::fs::symlink("/etc/hostname", tree.join("link"))?;
    let tree = tree.to_str().context("not UTF-8")?;
    let in_pod = |path: &str| format!("{}:{path}", pod.name);
    pod.ok(&["cp", tree, &in_pod("/tmp")])?;
    // Shared memory is a file system of its own.
    pod.ok(&["cp", &format!("{tree}/deep/file"), &in_pod("/dev/shm/named")])?;
    let seen = pod.ok(&["exec", pod.name, "sh", "-c",
        "cmp /tmp/tree/deep/file /dev/shm/named && wc -c < /dev/shm/named; readlink /tmp/tree/link; \
         stat -c %u /tmp/tree/deep/file"])?;
    ensure!(seen == "3000000\n/etc/hostname\n0\n", "{seen}");
    let back = here.path().join("back");
    pod.ok(&["cp", &in_pod("/tmp/tree"), back.to_str().context("not UTF-8")?])?;
    ensure!(std::fs::read(back.join("deep/file"))? == content, "it came back changed");

    // Links that are in the container lead to what is in the container.
    pod.ok(&[
        "exec",
        pod.name,
        "sh",
        "-c",
        "ln -s /../../../../etc /tmp/out; echo mine > /etc/only-here",
    ])?;
    let fetched = here.path().join("fetched");
    pod.ok(&["cp", &in_pod("/tmp/out/only-here"), fetched.to_str().context("not UTF-8")?])?;
    ensure!(std::fs::read_to_string(&fetched)? == "mine\n");
    for (from, to) in [
        (in_pod("/no/such"), "/tmp/never".to_owned()),
        (tree.to_owned(), in_pod("/no/such/tree")),
        (in_pod("/dev/null"), "/tmp/never".to_owned()),
    ] {
        let output = pod.husk.output(&["cp", &from, &to])?;
        ensure!(output.status.code() == Some(125), "{from} {to}: {}", text(&output.stderr));
        ensure!(!text(&output.stderr).is_empty(), "{from} {to}");
    }
    Ok(())
}

const WAITS: &str = "  - name: main
    image: localhost/husk/busybox:test
    command: [sh, -c, 'echo up; sleep 1000']
";

#[test]
fn a_killed_vmm_fails_the_pod_and_its_record_tells_why() -> Result<()> {
    let pod = Pod::up("vmm-killed", WAITS, &[])?;
    let vmm = pod.vmm()?;
    let mut exec = pod.husk.command(&["exec", pod.name, "sleep", "1000"]).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    kill_process(vmm, Signal::KILL)?;
    ensure!(pod.husk.output(&["wait", pod.name])?.status.code() == Some(125));
    ensure!(exec.wait()?.code() == Some(125), "the exec is told");
    let status = pod.inspect()?["status"].clone();
    ensure!(status["phase"] == "Failed" && status["reason"] == "VmLost", "{status:#}");
    ensure!(pod.ok(&["logs", pod.name])? == "up\n", "the log stays");
    pod.ok(&["console", pod.name])?;
    pod.gone()
}

#[test]
fn a_killed_holder_takes_the_vm_with_it_and_rm_cleans_up() -> Result<()> {
    let pod = Pod::up("holder-killed", WAITS, &[])?;
    let (holder, vmm) = (pod.holder()?, pod.vmm()?);
    kill_process(holder, Signal::KILL)?;
    pod.until("the VMM is gone", |_| Ok(!alive(vmm) && !alive(holder)))?;
    let status = pod.inspect()?["status"].clone();
    ensure!(status["phase"] == "Failed" && status["reason"] == "HolderLost", "{status:#}");
    ensure!(status["containers"][0]["state"]["terminated"]["exitCode"] == 137, "{status:#}");
    ensure!(pod.ok(&["ps", "-a"])?.contains("HolderLost"));
    ensure!(!pod.ok(&["ps"])?.contains("holder-killed"));
    ensure!(pod.husk.output(&["exec", pod.name, "true"])?.status.code() == Some(125));
    pod.gone()
}

//! Shares: a real guest, the VMM's file-system device and `husk-fs`. The guest half is a shell script
//! that is PID 1 of husk's kernel and ends with a reboot if all went well, and `husk-test-files`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cases::background::Pod;
use husk_cases::files::FileServer;
use husk_cases::vmm::{Running, Vm};
use husk_cases::{initramfs, place};
use husk_vmm_api::{Event, Exit, FsConfig};
use rustix::process::{Signal, kill_process};

/// Nothing takes longer than this, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Within this, a process that uses a share gets an error when the share's server dies.
const ERROR_LIMIT_S: u64 = 10;

/// How each guest begins.
const MOUNT: &str = "mkdir /shares\nmount -t virtiofs husk /shares\n";

/// A guest that shares files, and its console.
struct Guest {
    running: Running,
    console: File,
    server: FileServer,
}

impl Guest {
    fn start(script: &str, shares: &[(&Path, bool)]) -> Result<Guest> {
        let kernel = File::open(place::kernel()).context("the guest kernel")?;
        let mut vm = Vm::new(kernel, 256)?;
        let table = place::tree().join("tests/husk-test-files");
        let initramfs = initramfs::with_programs(&format!("{MOUNT}{script}"), &[&table])?;
        vm.config.initramfs = Some(vm.add(initramfs));
        let console = tempfile::tempfile()?;
        vm.config.console = Some(vm.add(console.try_clone()?));
        let (server, socket) = FileServer::start(shares)?;
        let socket = vm.add(socket);
        vm.config.fs = Some(FsConfig { tag: "husk".to_owned(), socket });
        Ok(Guest { running: vm.start()?, console, server })
    }

    fn text(&mut self) -> Result<String> {
        let mut text = String::new();
        std::io::Seek::rewind(&mut self.console)?;
        self.console.read_to_string(&mut text)?;
        // As a terminal gets it.
        Ok(text.replace("\r\n", "\n"))
    }

    /// Runs it to its end, which must be a reboot; returns what it wrote, and what was reported.
    fn finish(mut self) -> Result<(String, Vec<Event>)> {
        let mut events = Vec::new();
        let exit = loop {
            match self.running.event()? {
                Event::Exited(exit) => break exit,
                event => events.push(event),
            }
        };
        let text = self.text()?;
        ensure!(exit == Exit::Reboot, "{exit}\n{text}");
        Ok((text, events))
    }
}

/// A directory on a disk.
fn directory() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("husk-fs").tempdir_in("/var/tmp")?)
}

fn wait_for(path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        ensure!(start.elapsed() < PATIENCE, "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A tmpfs of one MiB, in a mount namespace of this thread's own.
fn small_tmpfs(at: &Path) -> Result<()> {
    // SAFETY: only the calling thread's mount namespace changes.
    ensure!(unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0, "unshare");
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", &at.display().to_string()])
}

#[test]
fn what_posix_promises_holds_on_a_share() -> Result<()> {
    let dir = directory()?;
    let script = "husk-test-files /shares/0\n";
    let (text, events) = Guest::start(script, &[(dir.path(), false)])?.finish()?;
    ensure!(text.contains("cases hold") && !text.contains("FAILED"), "{text}");
    let lost = events.iter().any(|event| matches!(event, Event::FileServerLost { .. }));
    ensure!(!lost, "{events:?}");
    ensure!(fs::read_dir(dir.path())?.count() == 0, "something is left");
    Ok(())
}

#[test]
fn a_guest_sees_its_shares_and_nothing_else_of_the_host() -> Result<()> {
    let (writable, read_only, secret) = (directory()?, directory()?, directory()?);
    fs::write(read_only.path().join("file"), "from the host")?;
    fs::write(secret.path().join("file"), "secret")?;
    symlink(secret.path().join("file"), writable.path().join("absolute"))?;
    let up = "../".repeat(20);
    let relative = format!("{up}{}/file", secret.path().strip_prefix("/")?.display());
    symlink(relative, writable.path().join("relative"))?;
    let single = writable.path().join("single");
    fs::write(&single, "alone")?;
    let script = "\
        echo \"entries: $(ls -a /shares | tr '\\n' ' ')\"\n\
        cat /shares/1/file; echo\n\
        if echo x > /shares/1/file; then exit 1; fi\n\
        mount -o remount,rw /shares\n\
        for way in 'touch /shares/1/new' 'rm /shares/1/file' 'chmod 0 /shares/1/file' \
            'mkdir /shares/1/sub' 'touch /shares/new' 'mv /shares/1/file /shares/1/other'; do\n\
          if $way; then exit 1; fi\n\
        done\n\
        if cat /shares/0/absolute || cat /shares/0/relative; then exit 1; fi\n\
        ls /shares/0/../../shares/0/../.. > /dev/null\n\
        cat /shares/2; echo\n\
        echo more > /shares/2\n\
        echo guest > /shares/0/file\n\
        cp /bin/busybox /shares/0/busybox\n\
        /shares/0/busybox echo executed from a share\n";
    let shares: [(&Path, bool); 3] =
        [(writable.path(), false), (read_only.path(), true), (&single, false)];
    let (text, _) = Guest::start(script, &shares)?.finish()?;
    ensure!(text.contains("entries: . .. 0 1 2 \n"), "{text}");
    ensure!(text.contains("from the host\n") && text.contains("alone\n"), "{text}");
    ensure!(text.contains("executed from a share\n"), "{text}");
    ensure!(text.contains("Read-only file system") && !text.contains("secret"), "{text}");
    ensure!(fs::read_to_string(read_only.path().join("file"))? == "from the host");
    ensure!(fs::read_dir(read_only.path())?.count() == 1, "something was made");
    ensure!(fs::read_to_string(single)? == "more\n", "the single file");
    ensure!(fs::read_to_string(writable.path().join("file"))? == "guest\n", "the guest's file");
    Ok(())
}

#[test]
fn a_full_file_system_is_told_and_works_again_when_there_is_room() -> Result<()> {
    let dir = directory()?;
    small_tmpfs(dir.path())?;
    let script = "\
        cd /shares/0\n\
        df -k . | tail -n 1\n\
        if dd if=/dev/zero of=/shares/0/large bs=64k count=64; then exit 1; fi\n\
        rm /shares/0/large\n\
        dd if=/dev/zero of=/shares/0/fits bs=64k count=8\n";
    let (text, _) = Guest::start(script, &[(dir.path(), false)])?.finish()?;
    ensure!(text.contains("No space left on device") && text.contains(" 1024 "), "{text}");
    ensure!(fs::metadata(dir.path().join("fits"))?.len() == 512 << 10, "{text}");
    Ok(())
}

#[test]
fn the_guest_sees_what_the_host_changes() -> Result<()> {
    let dir = directory()?;
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    fs::write(path("config"), "first")?;
    let script = "\
        cd /shares/0\n\
        [ $(cat config) = first ]\n\
        touch ready\n\
        until [ \"$(cat config)\" = second ]; do sleep 0.1; done\n\
        touch seen\n\
        until [ -e new ]; do sleep 0.1; done\n\
        until [ ! -e gone ]; do sleep 0.1; done\n\
        [ $(stat -c %s grown) = 8192 ]\n";
    fs::write(path("gone"), "")?;
    let guest = Guest::start(script, &[(dir.path(), false)])?;
    wait_for(&path("ready"))?;
    // As editors do, and as the kubelet does it.
    fs::write(path("other"), "second")?;
    fs::rename(path("other"), path("config"))?;
    wait_for(&path("seen"))?;
    fs::write(path("grown"), [0; 8192])?;
    fs::remove_file(path("gone"))?;
    fs::write(path("new"), "")?;
    guest.finish()?;
    Ok(())
}

#[test]
fn files_that_were_seen_cost_no_descriptors() -> Result<()> {
    const FILES: u32 = 5000;
    let dir = directory()?;
    for number in 0..FILES {
        let sub = dir.path().join(format!("files/{}", number % 10));
        fs::create_dir_all(&sub)?;
        fs::write(sub.join(number.to_string()), "")?;
    }
    let script = "\
        cd /shares/0\n\
        find files -type f | xargs stat -c %n | wc -l > seen\n\
        touch all\n\
        until [ -e counted ]; do sleep 0.1; done\n";
    let guest = Guest::start(script, &[(dir.path(), false)])?;
    wait_for(&dir.path().join("all"))?;
    let open = guest.server.open_files()?;
    fs::write(dir.path().join("counted"), "")?;
    guest.finish()?;
    ensure!(fs::read_to_string(dir.path().join("seen"))?.trim() == FILES.to_string());
    ensure!(open < 100, "{open} descriptors are open");
    Ok(())
}

#[test]
fn the_guest_gets_errors_when_its_file_server_dies_and_lives_on() -> Result<()> {
    let dir = directory()?;
    fs::write(dir.path().join("file"), "x")?;
    // Each failing program must end: the waits are the test. A write is on its way when it happens.
    let script = format!(
        "cd /\n\
         exec 5< /shares/0/file\n\
         (while dd if=/dev/zero of=/shares/0/busy bs=1M count=4 conv=fsync; do :; done) 2> /tmp/busy &\n\
         touch /shares/0/ready || true\n\
         while [ -e /shares/0/ready ]; do sleep 0.1; done\n\
         from=$(cut -d . -f 1 /proc/uptime)\n\
         wait\n\
         if ls /shares/0 || cat <&5 || touch /shares/0/new; then exit 1; fi\n\
         to=$(cut -d . -f 1 /proc/uptime)\n\
         cat /tmp/busy\n\
         echo took $((to - from)) s\n\
         [ $((to - from)) -le {ERROR_LIMIT_S} ]\n\
         exec 5<&-\n\
         umount -l /shares\n\
         echo alive\n"
    );
    let mut guest = Guest::start(&script, &[(dir.path(), false)])?;
    wait_for(&dir.path().join("ready"))?;
    guest.server.kill()?;
    let (text, events) = guest.finish()?;
    ensure!(text.contains("not connected") && text.contains("alive"), "{text}");
    let lost: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::FileServerLost { reason } => Some(reason),
            _ => None,
        })
        .collect();
    ensure!(lost.len() == 1 && lost[0].contains("closed its connection"), "{events:?}");
    Ok(())
}

#[test]
fn the_file_server_ends_with_its_vmm() -> Result<()> {
    let dir = directory()?;
    let script = "touch /shares/0/ready\nsleep 1000\n";
    let mut guest = Guest::start(script, &[(dir.path(), false)])?;
    wait_for(&dir.path().join("ready"))?;
    guest.running.kill()?;
    let status = guest.server.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn the_file_server_has_few_rights_and_sees_only_the_shares() -> Result<()> {
    let dir = directory()?;
    let script = "\
        touch /shares/0/ready\n\
        until [ -e /shares/0/looked ]; do sleep 0.1; done\n\
        touch /shares/0/owned\n";
    let guest = Guest::start(script, &[(dir.path(), false)])?;
    wait_for(&dir.path().join("ready"))?;
    let pid = guest.server.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    // chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid.
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        ensure!(field(set) == "00000000000000df", "{status}");
    }
    ensure!((field("NoNewPrivs:"), field("Seccomp:")) == ("1".into(), "2".into()), "{status}");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let points: BTreeSet<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    ensure!(points == BTreeSet::from(["/", "/0"]), "{mounts}");
    fs::write(dir.path().join("looked"), "")?;
    guest.finish()?;
    ensure!(fs::metadata(dir.path().join("owned"))?.uid() == 0, "another owner");
    Ok(())
}

#[test]
fn a_pod_outlives_its_file_server_and_says_so() -> Result<()> {
    let dir = directory()?;
    fs::write(dir.path().join("file"), "x")?;
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: orphan}}\nspec:\n  restartPolicy: Never\n  \
         volumes:\n  - {{name: data, hostPath: {{path: {}}}}}\n  containers:\n  \
         - name: main\n    image: localhost/husk/busybox:test\n    \
         command: [sh, -c, 'trap exit TERM; while :; do sleep 1; done']\n    \
         volumeMounts:\n    - {{name: data, mountPath: /data}}\n",
        dir.path().display()
    );
    let pod = Pod::of("orphan", &manifest, &[])?;
    ensure!(pod.ok(&["exec", "orphan", "--", "cat", "/data/file"])? == "x");
    let server = pod.child("husk-fs")?.context("the pod has no file server")?;
    kill_process(server, Signal::KILL)?;
    pod.until("the warning", |pod| {
        let warning = &pod.inspect()?["status"]["warnings"][0];
        let message = warning["message"].as_str().unwrap_or_default();
        Ok(warning["reason"] == "FileServerLost" && message.contains("signal: 9"))
    })?;
    let failed = pod.exec(&["touch", "/data/new"])?;
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(!failed.status.success() && said.contains("not connected"), "{said}");
    let events = pod.ok(&["events", "--no-follow", "orphan"])?;
    ensure!(events.matches("FileServerLost").count() == 1, "{events}");
    ensure!(pod.inspect()?["status"]["phase"] == "Running");
    pod.ok(&["stop", "orphan"])?;
    pod.gone()
}

#[test]
fn a_pod_that_shares_nothing_has_no_file_server() -> Result<()> {
    let containers = "  - {name: main, image: localhost/husk/busybox:test, \
                      command: [sh, -c, 'trap exit TERM; while :; do sleep 1; done']}\n";
    let pod = Pod::up("alone", containers, &[])?;
    pod.vmm()?;
    ensure!(pod.child("husk-fs")?.is_none());
    pod.ok(&["stop", "alone"])?;
    pod.gone()
}

//! What goes wrong: each thing is told for what it is, and nothing is left.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::process::Child;

use anyhow::{Context, Result, ensure};
use husk_cases::place;
use husk_cases::pods::{self, Husk};
use rustix::process::{Pid, Signal, kill_process};

/// Reads a pod's messages until a line contains `words`.
fn read_until(child: &mut Child, words: &str) -> Result<String> {
    let stderr = child.stderr.as_mut().context("no standard error")?;
    let mut seen = String::new();
    // Byte by byte, so that nothing is lost for whoever reads on.
    let mut byte = [0];
    while stderr.read(&mut byte)? > 0 {
        seen.push(char::from(byte[0]));
        if seen.ends_with(words) {
            return Ok(seen);
        }
    }
    anyhow::bail!("never said {words:?}:\n{seen}")
}

/// The VMM that `husk` has started.
fn vmm_of(husk: &Child) -> Result<Pid> {
    // A thread of its own is the VMM's parent.
    let mut all = String::new();
    for thread in std::fs::read_dir(format!("/proc/{}/task", husk.id()))? {
        let children = std::fs::read_to_string(thread?.path().join("children"))?;
        for child in children.split_whitespace() {
            if std::fs::read_to_string(format!("/proc/{child}/comm"))?.starts_with("husk-vmm") {
                return Pid::from_raw(child.parse()?).context("PID 0");
            }
        }
        all.push_str(&children);
    }
    anyhow::bail!("husk has no husk-vmm among its children {all:?}")
}

fn vmms() -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc")? {
        let comm = std::fs::read_to_string(entry?.path().join("comm"));
        count += usize::from(comm.is_ok_and(|comm| comm.trim() == "husk-vmm"));
    }
    Ok(count)
}

const WAITS: &str = "echo ready to wait; sleep 1000";

#[test]
fn a_killed_vmm_fails_the_pod() -> Result<()> {
    let husk = Husk::shared()?;
    let mut child = husk.start(&pods::shell(WAITS))?;
    read_until(&mut child, "ready to wait")?;
    kill_process(vmm_of(&child)?, Signal::KILL)?;
    let pod = pods::finish(child)?;
    assert_eq!((pod.phase(), pod.code), ("Failed", Some(125)), "{}", pod.text);
    assert_eq!(pod.container("main")["reason"], "ContainerStatusUnknown");
    Ok(())
}

#[test]
fn a_panic_of_the_guest_is_told_with_its_log() -> Result<()> {
    // A guest whose administrator wants a panic when memory is short gets one.
    let script = "echo 2 > /proc/sys/vm/panic_on_oom && tail /dev/zero; sleep 1000";
    let more = "    securityContext: {privileged: true}\n    \
                resources: {limits: {memory: 64Mi, cpu: 1}}";
    let pod = Husk::shared()?.run(&pods::one("busybox", script, more))?;
    assert_eq!((pod.phase(), pod.code), ("Failed", Some(125)), "{}", pod.text);
    let message = pod.report["message"].as_str().unwrap_or_default();
    ensure!(message.contains("guest kernel panicked"), "{message}");
    ensure!(message.contains("panic_on_oom"), "the log's tail is missing: {message}");
    Ok(())
}

#[test]
fn a_reset_of_the_guest_is_told_from_a_panic() -> Result<()> {
    // Machine code in an executable page: mov dx, 0x64; mov al, 0xfe; out dx, al; ret
    let script = r#"
exec python3 -c '
import ctypes, mmap
assert ctypes.CDLL(None).ioperm(0x60, 5, 1) == 0
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes([0x66, 0xba, 0x64, 0, 0xb0, 0xfe, 0xee, 0xc3]))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
'"#;
    let more = "    securityContext: {privileged: true}";
    let pod = Husk::shared()?.run(&pods::one("debian", script, more))?;
    assert_eq!((pod.phase(), pod.code), ("Failed", Some(125)), "{}", pod.text);
    let message = pod.report["message"].as_str().unwrap_or_default();
    ensure!(message.contains("rebooted"), "{message}");
    Ok(())
}

#[test]
fn a_killed_husk_takes_its_vmm_with_it() -> Result<()> {
    let husk = Husk::shared()?;
    let mut child = husk.start(&pods::shell(WAITS))?;
    read_until(&mut child, "ready to wait")?;
    let vmm = vmm_of(&child)?;
    child.kill()?;
    child.wait()?;
    // The kernel kills it at the parent's death; it may take a moment to be gone.
    let gone = || !std::path::Path::new(&format!("/proc/{}", vmm.as_raw_nonzero())).exists();
    for _ in 0..600 {
        if gone() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    anyhow::bail!("husk-vmm {vmm:?} has outlived its parent")
}

#[test]
fn an_interrupt_stops_the_pod_gracefully() -> Result<()> {
    let script = "trap 'echo asked to stop; exit 0' TERM; echo ready to wait; \
                  while :; do sleep 0.2; done";
    let mut child = Husk::shared()?.start(&pods::shell(script))?;
    let mut seen = read_until(&mut child, "ready to wait")?;
    let husk = Pid::from_raw(child.id().try_into()?).context("PID 0")?;
    kill_process(husk, Signal::INT)?;
    let stderr = child.stderr.take().context("no standard error")?;
    for line in BufReader::new(stderr).lines() {
        seen.push_str(&line?);
        seen.push('\n');
    }
    let status = child.wait()?;
    ensure!(seen.contains("asked to stop"), "{status}: {seen}");
    Ok(())
}

#[test]
fn nothing_is_left_when_pods_have_ended() -> Result<()> {
    let husk = Husk::shared()?;
    let run_dirs = || -> Result<BTreeSet<OsString>> {
        let entries = std::fs::read_dir("/run/husk/pods")?;
        Ok(entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
    };
    husk.run(&pods::shell("true"))?.succeeded()?;
    let (before, mounts) = (run_dirs()?, std::fs::read_to_string("/proc/mounts")?);
    for _ in 0..3 {
        husk.run(&pods::shell("true"))?.succeeded()?;
    }
    // Other tests' pods may be among them; those end, what is left behind does not.
    let mut more = &run_dirs()? - &before;
    for _ in 0..600 {
        if more.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        more = &more & &run_dirs()?;
    }
    assert!(more.is_empty(), "{more:?} are left behind");
    assert_eq!(std::fs::read_to_string("/proc/mounts")?, mounts);
    assert!(vmms()? <= 8, "VMMs are left behind");
    Ok(())
}

#[test]
fn missing_and_broken_parts_are_named_with_what_to_do() -> Result<()> {
    let husk = Husk::shared()?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), pods::shell("true"))?;
    let manifest = file.path().to_str().unwrap_or_default().to_owned();
    let dir = tempfile::tempdir()?;
    let truncated = dir.path().join("truncated");
    let kernel = std::fs::read(place::kernel())?;
    std::fs::write(&truncated, &kernel[..1 << 20])?;
    let text = dir.path().join("text");
    std::fs::write(&text, "not a kernel, and not a cpio archive either\n".repeat(200))?;
    let (truncated, text) =
        (truncated.to_str().unwrap_or_default(), text.to_str().unwrap_or_default());
    let cases: [(&[&str], &str); 5] = [
        (&["--kernel", "/no/vmlinux"], "/no/vmlinux"),
        (&["--kernel", truncated], "truncated"),
        (&["--kernel", text], "ELF"),
        (&["--initramfs", text], "initramfs"),
        (&["--vmm", "/no/husk-vmm"], "/no/husk-vmm"),
    ];
    for (options, words) in cases {
        let mut args = options.to_vec();
        args.extend(["run", &manifest]);
        let output = husk.output(&args)?;
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{options:?}: {text}");
        assert!(text.contains(words), "{options:?}: {text}");
    }
    Ok(())
}

#[test]
fn a_host_without_kvm_says_so() -> Result<()> {
    // A mount namespace in which /dev/kvm is something else.
    let husk = Husk::shared()?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), pods::shell("true"))?;
    let run = |prepare: &str| -> Result<(Option<i32>, String)> {
        let husk_line = format!(
            "{} --state-dir {} run {}",
            place::program("husk").display(),
            husk.state().display(),
            file.path().display()
        );
        let script = format!("{prepare} && exec {husk_line}");
        let output =
            std::process::Command::new("unshare").args(["-m", "sh", "-c", &script]).output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let hide = "mkdir -p /tmp/dev && mount --bind /dev /tmp/dev && mount -t tmpfs none /dev && \
                for n in null zero urandom; do touch /dev/$n && mount --bind /tmp/dev/$n /dev/$n; done";
    let (code, text) = run(hide)?;
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("/dev/kvm"), "{text}");
    let no_permission = format!(
        "chmod 1777 /tmp && cd /tmp && exec setpriv --reuid 65534 --regid 65534 --clear-groups \
         {} --state-dir /tmp/nobody --run-dir /tmp/nobody/run check",
        place::program("husk").display()
    );
    let output = std::process::Command::new("sh").args(["-c", &no_permission]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("ermission"), "{text}");
    let (code, text) = run("mount --bind /dev/null /dev/kvm")?;
    assert_eq!(code, Some(125), "{text}");
    assert!(text.to_lowercase().contains("kvm"), "{text}");
    Ok(())
}

#[test]
fn a_manifest_that_is_wrong_never_becomes_a_vm() -> Result<()> {
    let husk = Husk::shared()?;
    let cases = [
        ("kind: [", "standard input:1:7"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\n", "spec.containers"),
        (&pods::shell("true").replace("command:", "comand:"), "spec.containers[0].comand"),
        (
            &pods::one("busybox", "true", "    livenessProbe: {httpGet: {port: 1, scheme: FTP}}"),
            "spec.containers[0].livenessProbe.httpGet.scheme",
        ),
        (
            &pods::one("busybox", "true", "    volumeMounts: [{name: nope, mountPath: /x}]"),
            "spec.containers[0].volumeMounts[0]",
        ),
        (
            &pods::one("busybox", "true", "    resources: {limits: {memory: 8Mi, cpu: 1}}"),
            "spec.containers[0].resources.limits.memory",
        ),
        (
            &pods::shell("true").replace("husk/busybox:test", "husk/nope:test"),
            "localhost/husk/nope",
        ),
    ];
    for (manifest, words) in cases {
        let pod = husk.run(manifest)?;
        assert_eq!(pod.code, Some(125), "{words}: {}", pod.text);
        let all = format!("{}{}", pod.text, pod.report);
        assert!(all.contains(words), "{words}: {all}");
    }
    Ok(())
}

#[test]
fn check_proves_kvm() -> Result<()> {
    let output = Husk::shared()?.output(&["check"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("KVM"), "{text}");
    Ok(())
}

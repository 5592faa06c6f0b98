//! `husk` as its users see it, without KVM: bad input, and pods on a stand-in for the VMM
//! (`examples/fake_vmm.rs`).
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use common::{Host, command_pod, pod, text};

/// Reads until a line contains these words.
fn read_until(from: &mut impl BufRead, words: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(words) {
        assert_ne!(from.read_line(&mut seen).unwrap(), 0, "never said {words:?}: {seen}");
    }
    seen
}

fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_pod_runs_and_its_output_and_report_are_shown() {
    let host = Host::with_image();
    let manifest = pod("hello", &[("main", "echo to stdout; echo to stderr >&2; printf partial")]);
    let output = host.start(&[], &manifest).wait_with_output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert_eq!(out, "main | to stdout\nmain | partial\n");
    assert!(err.contains("main | to stderr\n"), "{err}");
    assert!(err.contains("pod default/hello: Succeeded"), "{err}");
    assert!(err.contains("guest Linux 0.0.0-fake on host Linux "), "{err}");
    assert!(err.contains("vm: agent ready"), "{err}");
    host.nothing_is_left();
}

#[test]
fn a_report_in_json_tells_everything() {
    let host = Host::with_image();
    let (output, report) = host.json(&pod("j", &[("ok", "echo x"), ("bad", "exit 7")]));
    assert_eq!(output.status.code(), Some(7));
    assert!(text(&output.stderr).contains("ok  | x\n"));
    assert_eq!((&report["name"], &report["phase"]), (&json!("j"), &json!("Failed")));
    let bad = &report["containers"][1];
    assert_eq!((&bad["exitCode"], &bad["reason"]), (&json!(7), &json!("Error")));
    assert_eq!(report["containers"][0]["reason"], "Completed");
    assert_eq!(report["guestKernel"], "0.0.0-fake");
    assert_eq!(report["measured"]["agentRssBytes"], 1 << 20);
    let steps = report["timeline"].as_array().unwrap();
    for step in ["VMM spawned", "images", "disks", "boot", "pod set up", "container ok started"] {
        assert!(steps.iter().any(|known| known["step"] == step), "{step}: {steps:?}");
    }
}

#[test]
fn every_byte_of_a_large_output_arrives() {
    let host = Host::with_image();
    let manifest = pod("big", &[("main", "seq 1 200000")]);
    let output = host.start(&["--no-summary"], &manifest).wait_with_output().unwrap();
    let expected: String = (1..=200_000).map(|n| format!("main | {n}\n")).collect();
    assert!(text(&output.stdout) == expected, "{} bytes", output.stdout.len());
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn several_pods_run_at_once_and_are_told_apart() {
    let host = Host::with_image();
    let (one, two) = (pod("one", &[("c", "echo 1")]), pod("two", &[("c", "echo 2; exit 3")]));
    let output = host.start(&[], &format!("{one}\n---\n{two}\n")).wait_with_output().unwrap();
    let out = text(&output.stdout);
    assert!(out.contains("one/c | 1\n") && out.contains("two/c | 2\n"), "{out}");
    assert_eq!(output.status.code(), Some(1), "one of several failed");
    let same = host.start(&[], &format!("{one}\n---\n{one}\n")).wait_with_output().unwrap();
    assert_eq!(same.status.code(), Some(125));
    assert!(!same.stderr.is_empty());
}

#[test]
fn a_program_that_does_not_exist_is_127_with_its_reason() {
    let host = Host::with_image();
    let (output, report) = host.json(&command_pod(&["/no/such"]));
    assert_eq!(output.status.code(), Some(127));
    let container = &report["containers"][0];
    assert_eq!((&container["exitCode"], &container["reason"]), (&json!(127), &json!("StartError")));
    assert!(container["message"].as_str().unwrap().contains("no such file"));
}

#[test]
fn a_vmm_that_dies_and_a_kernel_that_panics_fail_the_pod() {
    let host = Host::with_image();
    for (program, words) in [("fake:die", "signal: 6"), ("fake:panic", "Kernel panic - fake")] {
        let (output, report) = host.json(&command_pod(&[program]));
        assert_eq!(output.status.code(), Some(125), "{program}");
        assert_eq!((&report["phase"], &report["reason"]), (&json!("Failed"), &json!("VmLost")));
        let message = report["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
        assert_eq!(report["containers"][0]["reason"], "ContainerStatusUnknown");
        host.nothing_is_left();
    }
}

#[test]
fn an_interrupt_asks_and_a_second_one_kills() {
    let host = Host::with_image();
    let obedient = "trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let mut child = host.start(&[], &pod("p", &[("main", obedient)]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    read_until(&mut stdout, "up");
    interrupt(&child);
    read_until(&mut stdout, "asked");
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let stubborn = "trap '' TERM; echo up; while :; do sleep 0.1; done";
    let mut child = host.start(&[], &pod("p", &[("main", stubborn)]));
    read_until(&mut BufReader::new(child.stdout.take().unwrap()), "up");
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    interrupt(&child);
    read_until(&mut stderr, "once more kills");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    host.nothing_is_left();
}

#[test]
fn a_husk_that_is_killed_leaves_no_vmm_and_is_swept() {
    let host = Host::with_image();
    let mut child = host.start(&[], &pod("p", &[("main", "echo up $PPID; sleep 600")]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let seen = read_until(&mut stdout, "up");
    let vmm = seen.trim().rsplit(' ').next().unwrap().to_owned();
    child.kill().unwrap();
    child.wait().unwrap();
    let alive = || Path::new("/proc").join(&vmm).join("exe").exists();
    for _ in 0..200 {
        if !alive() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(!alive(), "VMM {vmm} outlived husk");
    host.json(&pod("next", &[("main", "true")]));
    host.nothing_is_left();
}

#[test]
fn a_reader_that_goes_away_does_not_stop_the_pod() {
    let host = Host::with_image();
    let mut child = host.start(&["--no-summary"], &pod("p", &[("main", "seq 1 100000; exit 5")]));
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn what_is_missing_or_broken_is_named_with_what_to_do() {
    let host = Host::with_image();
    let manifest = host.path("pod.json");
    std::fs::write(&manifest, pod("p", &[("main", "true")])).unwrap();
    std::fs::write(host.path("cut"), &std::fs::read(host.path("vmlinux")).unwrap()[..70]).unwrap();
    std::fs::write(host.path("text"), "no kernel\n".repeat(100)).unwrap();
    let file = |name: &str| host.path(name).to_str().unwrap().to_owned();
    for (option, value, words) in [
        ("--kvm", file("none"), ["does not exist", "modprobe kvm_intel"]),
        ("--kernel", file("none"), ["guest kernel", "HUSK_KERNEL"]),
        ("--kernel", file("cut"), ["truncated", "install it again"]),
        ("--kernel", file("text"), ["not an uncompressed ELF", "install it again"]),
        ("--initramfs", file("none"), ["initramfs", "HUSK_INITRAMFS"]),
        ("--initramfs", file("text"), ["cpio", "install it again"]),
        ("--vmm", file("none"), ["VMM", "HUSK_VMM"]),
        ("--run-dir", file("text"), ["text/pods", "--run-dir"]),
        ("--state-dir", file("text"), ["text", "--state-dir"]),
    ] {
        let output = host.output(&[option, &value, "run", manifest.to_str().unwrap()]);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{option} {value}: {err}");
        for word in words {
            assert!(err.contains(word), "{option} {value}: {word:?} is not in {err}");
        }
    }
}

#[test]
fn a_full_disk_is_told_as_such() {
    let host = Host::with_image();
    let manifest = host.path("pod.json");
    std::fs::write(&manifest, pod("p", &[("main", "true")])).unwrap();
    // In a mount namespace of its own, with a tiny file system for disks.
    let scratch = host.path("state/scratch");
    std::fs::create_dir_all(&scratch).unwrap();
    let mount = "mount -t tmpfs -o size=64k none \"$0\" && exec \"$@\"";
    let husk = host.husk(&["run", manifest.to_str().unwrap()]);
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]).arg(&scratch);
    unshare.arg(husk.get_program()).args(husk.get_args());
    for (name, value) in husk.get_envs() {
        if let Some(value) = value {
            unshare.env(name, value);
        }
    }
    let output = unshare.output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{err}");
    assert!(err.contains("no space left") && err.contains("--state-dir"), "{err}");
}

#[test]
fn a_pod_that_is_hung_up_is_stopped_unless_it_is_told_to_ignore_that() {
    let host = Host::with_image();
    let hang_up = |child: &Child| {
        let status = Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
        assert!(status.success());
    };
    let manifest = pod("p", &[("main", "trap 'exit 9' TERM; echo up; sleep 3 & wait")]);
    // The tests themselves may run under nohup, which every process inherits.
    let cases: [(&[&str], i32); 2] = [(&["env", "--default-signal=HUP"], 9), (&["nohup"], 0)];
    for (through, code) in cases {
        let husk = host.husk(&["run", "--no-summary", "-"]);
        let mut command = Command::new(through[0]);
        command.args(&through[1..]).arg(husk.get_program()).args(husk.get_args());
        for (name, value) in husk.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
        read_until(&mut BufReader::new(child.stdout.take().unwrap()), "up");
        hang_up(&child);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{through:?}");
    }
}

#[test]
fn bad_manifests_and_images_are_refused_before_anything_runs() {
    let host = Host::new();
    let missing = host.output(&["run", "/no/such.yaml"]);
    assert_eq!(missing.status.code(), Some(125));
    assert!(text(&missing.stderr).contains("/no/such.yaml"));

    let broken = host.start(&[], "kind: [").wait_with_output().unwrap();
    assert_eq!(broken.status.code(), Some(125));
    assert!(text(&broken.stderr).contains("standard input:"), "{}", text(&broken.stderr));

    let (unknown, report) = host.json(&pod("p", &[("main", "true")]));
    assert_eq!(unknown.status.code(), Some(125));
    assert_eq!(report["reason"], "ErrImageNeverPull");
    assert_eq!(report["containers"][0]["reason"], "ErrImageNeverPull");
    assert!(report["message"].as_str().unwrap().contains("test/image"));
    host.nothing_is_left_to_run();

    let usage = host.output(&["run"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn images_are_imported_listed_and_removed() {
    let host = Host::with_image();
    let list = || -> Value {
        serde_json::from_slice(&host.output(&["image", "ls", "--output", "json"]).stdout).unwrap()
    };
    let images = list();
    assert_eq!(images.as_array().unwrap().len(), 1);
    assert!(images[0]["reference"].as_str().unwrap().ends_with("test/image:latest"));
    let shown = text(&host.output(&["image", "ls"]).stdout);
    assert!(shown.contains("IMAGE") && shown.contains("linux/amd64"), "{shown}");
    assert!(host.output(&["image", "rm", "test/image"]).status.success());
    assert_eq!(list(), json!([]));
    let again = host.output(&["image", "rm", "test/image"]);
    assert_eq!(again.status.code(), Some(125));
    assert!(text(&again.stderr).contains("test/image"));
}

/// What other tools call a command does what it does, to the letter, and help says so.
#[test]
fn aliases_are_the_commands_that_they_stand_for() {
    let host = Host::with_image();
    let seen = |args: &[&str]| {
        let output = host.output(args);
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let missing = "localhost:1/no/such";
    let wrong = "no reference";
    for (alias, command) in [
        (&["images", "--output", "json"][..], &["image", "ls", "--output", "json"][..]),
        (&["image", "list", "--output", "json"], &["image", "ls", "--output", "json"]),
        (&["list", "-a"], &["ps", "-a"]),
        (&["list", "--output", "json"], &["ps", "--output", "json"]),
        (&["pull", wrong], &["image", "pull", wrong]),
        (&["pull"], &["image", "pull"]),
        (&["image", "load", "/no/such"], &["image", "import", "/no/such"]),
        (&["rmi", missing], &["image", "rm", missing]),
        (&["image", "remove", missing], &["image", "rm", missing]),
    ] {
        let (alias, command) = (seen(alias), seen(command));
        // The way in which it was called is part of what is said about a wrong call.
        let usage = |text: &str| text.replace("husk image pull", "husk pull");
        assert_eq!((alias.0, &alias.1), (command.0, &command.1), "{}", alias.2);
        assert_eq!(usage(&alias.2), usage(&command.2));
    }
    let layout = host.path("layout");
    let (code, _, err) = seen(&["image", "load", layout.to_str().unwrap(), "test/other"]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(seen(&["rmi", "test/other"]).0, Some(0));
    assert!(!seen(&["images"]).1.contains("test/other"));

    let (_, help, _) = seen(&["--help"]);
    for words in ["The same as `husk image pull`", "`husk image ls`", "`husk image rm`", "list"] {
        assert!(help.contains(words), "{words}: {help}");
    }
    assert!(help.contains("[aliases: list]") || help.contains("[alias: list]"), "{help}");
    let (_, help, _) = seen(&["image", "--help"]);
    for alias in ["load", "list", "remove"] {
        let alias = format!("{alias}]");
        assert!(help.contains(&alias), "{alias}: {help}");
    }
}

#[test]
fn check_names_each_lack_and_fails() {
    let host = Host::new();
    let output = host.output(&["--vmm", "/no/vmm", "check", "--output", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let level = |name: &str| {
        let found = findings.as_array().unwrap().iter().find(|f| f["name"] == name);
        found.unwrap_or_else(|| panic!("{name}: {findings}"))["level"].clone()
    };
    assert_eq!(level("VMM"), "fail");
    assert_eq!(level("KVM runs guests"), "fail");
    for name in ["KVM device", "guest kernel", "initramfs", "mkfs.ext4", "state directory"] {
        assert_eq!(level(name), "ok", "{name}: {findings}");
    }
    let shown = text(&host.output(&["--kvm", "/no/kvm", "check"]).stdout);
    assert!(shown.contains("FAIL") && shown.contains("modprobe kvm_amd"), "{shown}");
}

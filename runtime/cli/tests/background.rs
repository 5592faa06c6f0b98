//! Pods in the background, and the commands on them, without KVM: on the stand-in for the VMM.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use common::{Host, command_pod, pod, text};

/// Waits in the way of tests: for something that comes soon, or never.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..600 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("never: {what}");
}

/// A host whose pods are killed at the test's end, however it ends.
struct Background(Host);

impl Background {
    fn new() -> Self {
        Background(Host::with_image())
    }

    fn output(&self, args: &[&str]) -> Output {
        self.0.output(args)
    }

    /// Runs a command that must succeed; its standard output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn run(&self, manifest: &str, args: &[&str]) -> Output {
        let mut all = vec!["-d"];
        all.extend(args);
        self.0.start(&all, manifest).wait_with_output().unwrap()
    }

    /// Starts a pod in the background.
    fn up(&self, manifest: &str) {
        let output = self.run(manifest, &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    fn ps(&self) -> Vec<Value> {
        serde_json::from_str(&self.ok(&["ps", "-a", "--output", "json"])).unwrap()
    }

    fn inspect(&self, name: &str) -> Value {
        let all: Value = serde_json::from_str(&self.ok(&["inspect", name])).unwrap();
        all[0].clone()
    }

    fn pid(&self, name: &str) -> i32 {
        self.inspect(name)["pod"]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// The VMM that a pod's process started, on whatever thread.
    fn vmm(&self, name: &str) -> i32 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid(name))).unwrap();
        let children = threads.map(|thread| {
            std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap()
        });
        let children = children.collect::<String>();
        children.split_whitespace().next().expect("it has a child").parse().unwrap()
    }

    fn code(&self, args: &[&str]) -> Option<i32> {
        self.output(args).status.code()
    }

    fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.0.husk(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Nothing of any pod is left, but the log of events.
    fn nothing_is_left(&self) {
        self.0.nothing_is_left();
        let left: Vec<_> = std::fs::read_dir(self.0.path("state/pods"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with('.') && name != "events.log")
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for pod in self.ps() {
            self.output(&["rm", "-f", pod["uid"].as_str().unwrap()]);
        }
    }
}

fn kill_9(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

const WAITS: &str = "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.1; done";

#[test]
fn a_pod_lives_in_the_background_from_its_start_to_its_removal() {
    let host = Background::new();
    let started =
        host.run(&pod("web", &[("main", WAITS), ("other", "echo other; sleep 600")]), &[]);
    assert_eq!(started.status.code(), Some(0), "{}", text(&started.stderr));
    assert_eq!(text(&started.stdout), "web\n");

    let list = host.ok(&["ps"]);
    assert!(list.contains("default") && list.contains("2/2") && list.contains("Running"), "{list}");
    let wide = host.ok(&["ps", "--output", "wide"]);
    assert!(wide.contains("test/image"), "{wide}");
    let pod = &host.ps()[0];
    assert_eq!(
        (&pod["name"], &pod["running"], &pod["background"]),
        (&json!("web"), &json!(true), &json!(true))
    );
    let uid = pod["uid"].as_str().unwrap();
    assert_eq!(host.inspect(&uid[..6])["pod"]["name"], "web");
    assert_eq!(host.inspect("default/web")["status"]["phase"], "Running");

    // Its name is its own.
    let again = host.run(&crate::pod("web", &[("main", "true")]), &["--replace"]);
    assert_eq!(again.status.code(), Some(125));
    assert!(text(&again.stderr).contains("exists already"), "{}", text(&again.stderr));
    assert_eq!(host.code(&["rm", "web"]), Some(1), "it runs");

    until("the first line", || host.ok(&["logs", "web"]) == "up\n");
    assert_eq!(host.ok(&["stop", "web"]), "web\n");
    assert_eq!(host.ok(&["stop", "web"]), "web\n", "twice is as good");
    assert_eq!(host.ok(&["logs", "-c", "main", "web"]), "up\nasked\n");
    assert_eq!(host.ok(&["logs", "--tail", "1", "web"]), "asked\n");
    let stamped = host.ok(&["logs", "--timestamps", "--since", "1h", "web"]);
    assert!(stamped.lines().all(|line| line.starts_with("20") && line.contains("Z ")), "{stamped}");
    assert_eq!(host.ok(&["ps"]).lines().count(), 1, "only the header");
    let ended = host.inspect("web");
    assert_eq!((&ended["running"], &ended["status"]["phase"]), (&json!(false), &json!("Failed")));
    assert_eq!(ended["status"]["containers"][0]["state"]["terminated"]["exitCode"], 3);
    assert_eq!(ended["status"]["guestKernel"], "0.0.0-fake");
    assert_eq!(host.code(&["wait", "web"]), Some(3), "as husk run");
    assert_eq!(host.code(&["exec", "web", "true"]), Some(125));

    let conflict = host.run(&crate::pod("web", &[("main", "true")]), &[]);
    assert_eq!(conflict.status.code(), Some(125));
    let replaced = host.run(&crate::pod("web", &[("main", "true")]), &["--replace"]);
    assert_eq!(replaced.status.code(), Some(0), "{}", text(&replaced.stderr));
    assert_eq!(host.ok(&["wait", "web"]), "web Succeeded\n");
    let events = host.ok(&["events", "--no-follow", "--since", "1h", "web"]);
    for words in ["default/web main Started", "main Exited (0) Completed", "default/web Succeeded"]
    {
        assert!(events.contains(words), "{words}: {events}");
    }
    assert_eq!(host.ok(&["rm", "web"]), "web\n");
    assert_eq!(host.code(&["rm", "web"]), Some(1));
    assert_eq!(host.code(&["logs", "web"]), Some(125));
    host.nothing_is_left();
}

#[test]
fn a_pod_that_does_not_start_says_why_and_leaves_nothing() {
    let host = Background::new();
    for (manifest, words) in [
        (command_pod(&["/no/such"]), "no such file"),
        (command_pod(&["fake:panic"]), "Kernel panic - fake"),
        (pod("p", &[("main", "true")]).replace("test/image", "no/image"), "ErrImageNeverPull"),
    ] {
        let output = host.run(&manifest, &[]);
        assert_eq!(output.status.code(), Some(125));
        assert!(text(&output.stderr).contains(words), "{words}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
        assert!(host.ps().is_empty());
    }
    // One that failed after it ran was started.
    let output = host.run(&pod("p", &[("main", "exit 4")]), &["--output", "json"]);
    assert_eq!(output.status.code(), Some(0));
    let launched: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(launched["name"], "p");
    assert_eq!(host.code(&["wait", "p"]), Some(4));
}

#[test]
fn a_command_runs_in_a_container_and_its_exit_code_is_passed_on() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    let exec = |args: &[&str]| {
        let mut all = vec!["exec", "p"];
        all.extend(args);
        host.output(&all)
    };
    let output = exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("out\n".into(), "err\n".into()));
    let missing = exec(&["no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(text(&missing.stderr).contains("executable file not found"));
    assert_eq!(exec(&["sh", "-c", "kill -KILL $$"]).status.code(), Some(137));
    let env = host.ok(&["exec", "-e", "A=b", "p", "sh", "-c", "echo $A"]);
    assert_eq!(env, "b\n");
    assert_eq!(host.code(&["exec", "-c", "none", "p", "true"]), Some(125));
    assert_eq!(host.code(&["exec", "-it", "p", "true"]), Some(125), "no terminal");

    // Everything that goes in comes out, and the end of the input is one.
    let mut cat = host.spawn(&["exec", "-i", "p", "cat"]);
    let input: Vec<u8> = (0..2_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let mut stdin = cat.stdin.take().unwrap();
    let sent = input.clone();
    let writing = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut got = Vec::new();
    cat.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == input, "{} of {}", got.len(), input.len());
    assert_eq!(cat.wait().unwrap().code(), Some(0));

    // Signals reach the process, and not the command.
    let mut child = host.spawn(&[
        "exec",
        "p",
        "sh",
        "-c",
        "trap 'exit 9' INT; echo up; while :; do sleep 0.1; done",
    ]);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn clients_that_die_or_stop_reading_harm_nothing() {
    let host = Background::new();
    let script = "while :; do echo line; sleep 0.01; done";
    host.up(&pod("p", &[("main", script)]));
    // They never read, and are killed in the midst of it.
    let mut stuck: Vec<Child> = [
        &["exec", "p", "yes"][..],
        &["logs", "-f", "p"],
        &["attach", "--no-stdin", "p"],
        &["exec", "-i", "p", "cat"],
    ]
    .into_iter()
    .map(|args| host.spawn(args))
    .collect();
    std::thread::sleep(Duration::from_millis(500));
    let lines = || host.ok(&["logs", "p"]).lines().count();
    let before = lines();
    until("the container goes on", || lines() > before + 20);
    for child in &mut stuck {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(host.ok(&["exec", "p", "echo", "well"]), "well\n");
    host.ok(&["stop", "--time", "0", "p"]);
    host.ok(&["rm", "p"]);
    host.nothing_is_left();
}

#[test]
fn a_holder_that_is_killed_fails_its_pod_and_is_cleaned_up() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "echo $PPID; sleep 600")]));
    until("the first line", || !host.ok(&["logs", "p"]).is_empty());
    let vmm: i32 = host.ok(&["logs", "p"]).trim().parse().unwrap();
    let mut follower = host.spawn(&["logs", "-f", "p"]);
    kill_9(host.pid("p"));
    until("the VMM is gone", || !alive(vmm));
    let pod = host.inspect("p");
    assert_eq!(
        (&pod["status"]["phase"], &pod["status"]["reason"]),
        (&json!("Failed"), &json!("HolderLost"))
    );
    assert!(pod["status"]["message"].as_str().unwrap().contains("was killed"));
    assert_eq!(host.code(&["wait", "p"]), Some(125));
    assert_eq!(follower.wait().unwrap().code(), Some(0), "it ends with the pod");
    assert_eq!(host.code(&["stop", "p"]), Some(0), "there is nothing to stop");
    host.ok(&["rm", "p"]);
    host.nothing_is_left();
}

#[test]
fn a_holder_that_hangs_is_removed_by_force() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    let pid = host.pid("p");
    // It answers nobody, and yet what is on disk is told.
    let holder = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(holder, rustix::process::Signal::STOP).unwrap();
    assert_eq!(host.ps()[0]["phase"], "Running");
    rustix::process::kill_process(holder, rustix::process::Signal::CONT).unwrap();
    host.ok(&["rm", "-f", "p"]);
    assert!(!alive(pid));
    host.nothing_is_left();
}

#[test]
fn a_pod_in_the_foreground_can_be_entered_and_stopped() {
    let host = Background::new();
    let mut child = host.0.start(&["--no-summary"], &pod("front", &[("main", WAITS)]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "main | up\n");
    until("the log is written", || host.ok(&["logs", "front"]) == "up\n");
    assert_eq!(host.ok(&["exec", "front", "echo", "inside"]), "inside\n");
    assert_eq!(host.ps()[0]["background"], false);
    assert_eq!(host.code(&["wait", "front", "none"]), Some(125));
    host.ok(&["stop", "front"]);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    host.nothing_is_left();
}

#[test]
fn the_terminal_ends_and_the_pod_does_not() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.pid("p"))).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let (session, terminal) = (fields[3], fields[4]);
    assert_eq!(session, host.pid("p").to_string(), "a session of its own");
    assert_eq!(terminal, "0", "and no terminal");
    for (fd, target) in [(0, "/dev/null"), (1, "/dev/null")] {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", host.pid("p"))).unwrap();
        assert_eq!(link, Path::new(target));
    }
}

#[test]
fn logs_are_in_the_cris_format_rotated_and_followed() {
    let host = Background::new();
    // 3 MiB in lines of 1000 bytes, and a line without an end.
    let script = "i=0; while [ $i -lt 3000 ]; do printf '%0999d\\n' $i; i=$((i+1)); done; \
                  printf rest; while [ ! -e $STOP ]; do sleep 0.1; done";
    let flag = host.0.path("flag");
    let script = script.replace("$STOP", flag.to_str().unwrap());
    let output =
        host.run(&pod("p", &[("main", &script)]), &["--log-max-size", "1", "--log-max-files", "9"]);
    assert!(output.status.success());
    let follower = host.spawn(&["logs", "-f", "p"]);
    std::thread::sleep(Duration::from_millis(300));
    std::fs::write(&flag, "").unwrap();
    host.ok(&["wait", "p"]);
    let all = follower.wait_with_output().unwrap();
    let expected: String =
        (0..3000).map(|n| format!("{n:0999}\n")).chain(["rest".into()]).collect();
    assert!(text(&all.stdout) == expected, "{} of {}", all.stdout.len(), expected.len());
    let dir = host.inspect("p")["directory"].as_str().unwrap().to_owned();
    let files: Vec<_> = std::fs::read_dir(Path::new(&dir).join("main")).unwrap().collect();
    assert!(files.len() >= 3, "{files:?}");
    let last = std::fs::read_to_string(Path::new(&dir).join("main/0.log")).unwrap();
    assert!(last.lines().last().unwrap().ends_with(" stdout P rest"), "{last}");
    assert!(host.ok(&["logs", "--tail", "2", "p"]) == format!("{:0999}\nrest", 2999));
}

#[test]
fn restarts_have_logs_of_their_own() {
    let host = Background::new();
    let flag = host.0.path("flag");
    let script = format!(
        "if [ -e {0} ]; then echo second; sleep 600; else touch {0}; echo first; exit 1; fi",
        flag.display()
    );
    let mut manifest: Value = serde_json::from_str(&pod("p", &[("main", &script)])).unwrap();
    manifest["spec"]["restartPolicy"] = json!("OnFailure");
    host.up(&manifest.to_string());
    until("it was started again", || host.ok(&["logs", "p"]) == "second\n");
    assert_eq!(host.ok(&["logs", "-p", "p"]), "first\n");
    assert_eq!(host.ps()[0]["containers"][0]["restarts"], 1);
}

#[test]
fn attaching_shows_what_is_written_and_passes_on_what_is_typed() {
    let host = Background::new();
    let script = "read line; echo got $line; read line; exit 5";
    let mut manifest: Value = serde_json::from_str(&pod("p", &[("main", script)])).unwrap();
    manifest["spec"]["containers"][0]["stdin"] = json!(true);
    host.up(&manifest.to_string());
    let mut attached = host.spawn(&["attach", "p"]);
    let mut stdin = attached.stdin.take().unwrap();
    let mut stdout = BufReader::new(attached.stdout.take().unwrap());
    std::thread::sleep(Duration::from_millis(300));
    stdin.write_all(b"hello\n").unwrap();
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "got hello\n");
    // Leaving harms nothing, and another may come.
    attached.kill().unwrap();
    attached.wait().unwrap();
    let mut attached = host.spawn(&["attach", "p"]);
    attached.stdin.take().unwrap().write_all(b"bye\n").unwrap();
    assert_eq!(attached.wait().unwrap().code(), Some(5), "that of the container");
    assert_eq!(host.code(&["wait", "p"]), Some(5));
}

#[test]
fn what_pods_use_and_run_is_told() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    let stats: Value =
        serde_json::from_str(&host.ok(&["stats", "--no-stream", "--output", "json", "p"])).unwrap();
    assert_eq!(stats["containers"][0]["memory"], 3 << 20);
    assert_eq!(stats["memoryTotal"], 128 << 20);
    // The stand-in uses a quarter of a CPU, exactly.
    let cpu = stats["containers"][0]["cpu"].as_f64().unwrap();
    assert!((cpu - 0.25).abs() < 0.001, "{cpu}");
    let table = host.ok(&["stats", "--no-stream"]);
    for words in ["default/p", "3.0MiB", "64.0MiB", "25.0", "2.0KiB"] {
        assert!(table.contains(words), "{words}: {table}");
    }
    let top = host.ok(&["top", "p"]);
    assert!(top.contains("1:01") && top.contains("sleep 600"), "{top}");
    host.ok(&["kill", "-s", "USR1", "-c", "main", "p"]);
    until("the signal ended it", || host.code(&["wait", "p"]) == Some(138));
    assert_eq!(host.code(&["top", "p"]), Some(125));
}

#[test]
fn the_guest_tells_its_kernels_log_and_the_console_what_it_cannot_tell() {
    const LOG: &str = "[    0.000000] Linux version 0.0.0-fake\n[    1.650695] two\n\
                       [    1.650695] lines \u{e4}\\x9b\\x1b[31m\t.\n";
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    let output = host.output(&["console", "p"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), LOG));
    assert!(text(&output.stderr).contains("7 records of the log were overwritten"));

    let mut follow = host.spawn(&["console", "-f", "p"]);
    let mut told = BufReader::new(follow.stdout.take().unwrap());
    let mut seen = String::new();
    while seen != LOG {
        assert_ne!(told.read_line(&mut seen).unwrap(), 0, "{seen}");
    }
    // Its last words, when it can tell nothing any more.
    let console = host.inspect("p")["console"].as_str().unwrap().to_owned();
    let last = "[    1.000000] old\r\n[    2.000000] Kernel \x1b[31mpanic\r\n more";
    std::fs::write(&console, last).unwrap();
    kill_9(host.vmm("p"));
    told.read_to_string(&mut seen).unwrap();
    let words = "[    2.000000] Kernel \\x1b[31mpanic\n more\n";
    assert_eq!(seen, format!("{LOG}{words}"));
    assert_eq!(follow.wait().unwrap().code(), Some(0));

    assert_eq!(host.code(&["wait", "p"]), Some(125));
    for args in [&["console", "p"][..], &["console", "-f", "p"]] {
        let output = host.output(args);
        assert_eq!(text(&output.stdout), format!("[    1.000000] old\n{words}"));
        assert!(text(&output.stderr).contains("pod default/p has ended"));
    }
}

#[test]
fn files_are_copied_both_ways() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "sleep 600")]));
    // The stand-in's containers see this host's files.
    let (here, there) = (host.0.path("here"), host.0.path("there"));
    std::fs::create_dir_all(here.join("tree/deep")).unwrap();
    std::fs::create_dir(&there).unwrap();
    let content: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(here.join("tree/deep/file"), &content).unwrap();
    let in_pod = |path: &str| format!("p:{}", there.join(path).display());
    let tree = here.join("tree");
    // Into a directory, under a new name, and once more over it.
    for (to, file) in [("", "tree/deep/file"), ("new", "new/deep/file"), ("", "tree/deep/file")] {
        host.ok(&["cp", tree.to_str().unwrap(), &in_pod(to)]);
        assert_eq!(std::fs::read(there.join(file)).unwrap(), content, "{to:?}");
    }
    let back = here.join("back");
    host.ok(&["cp", &in_pod("tree"), back.to_str().unwrap()]);
    assert_eq!(std::fs::read(back.join("deep/file")).unwrap(), content);
    host.ok(&["cp", &in_pod("tree/deep/file"), back.to_str().unwrap()]);
    assert_eq!(std::fs::read(back.join("file")).unwrap(), content);
    for (from, to) in [
        (in_pod("none"), "x".to_owned()),
        ("/no/such".to_owned(), in_pod("x")),
        (tree.to_str().unwrap().to_owned(), in_pod("no/such/x")),
        ("a".to_owned(), "b".to_owned()),
        ("p:/a".to_owned(), "p:/b".to_owned()),
    ] {
        assert_eq!(host.code(&["cp", &from, &to]), Some(125), "{from} {to}");
    }
}

#[test]
fn pausing_stops_the_processes_where_they_are() {
    let host = Background::new();
    host.up(&pod("p", &[("main", "while :; do echo tick; sleep 0.05; done")]));
    let lines = || host.ok(&["logs", "p"]).lines().count();
    until("it runs", || lines() > 2);
    host.ok(&["pause", "p"]);
    let before = lines();
    std::thread::sleep(Duration::from_millis(400));
    assert!(lines() <= before + 1);
    host.ok(&["unpause", "p"]);
    until("it goes on", || lines() > before + 2);
}

#[test]
fn completions_know_the_commands() {
    let host = Background::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.ok(&["completion", shell]);
        for word in ["attach", "--follow", "--replace"] {
            assert!(script.contains(word.trim_start_matches('-')), "{shell}: {word}");
        }
    }
}

#[test]
fn debugging_is_off_unless_an_image_is_given_for_it() {
    let host = Background::new();
    host.up(&pod("web", &[("main", WAITS)]));
    let refused = host.output(&["debug", "web"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(text(&refused.stderr).contains("--debug-image IMAGE"), "{}", text(&refused.stderr));
    assert_eq!(host.ok(&["stop", "web"]), "web\n");

    let missing = host.run(&pod("other", &[("main", WAITS)]), &["--debug-image=Not/an/Image"]);
    assert_eq!(missing.status.code(), Some(125));
    assert!(text(&missing.stderr).contains("Not/an/Image"), "{}", text(&missing.stderr));
}

#[test]
fn a_debug_container_is_none_of_the_pods() {
    let host = Background::new();
    let started = host.run(&pod("web", &[("main", WAITS)]), &["--debug-image", "test/image"]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    for (command, code) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)] {
        assert_eq!(host.code(&["debug", "web", "--", "sh", "-c", command]), Some(code));
    }
    assert_eq!(host.code(&["debug", "web", "/no/such"]), Some(127));

    // Without a command it is a shell, which runs until its input ends.
    let mut shell = host.spawn(&["debug", "-i", "web"]);
    let mut output = BufReader::new(shell.stdout.take().unwrap()).lines();
    let mut input = shell.stdin.take().unwrap();
    input.write_all(b"echo up\n").unwrap();
    assert_eq!(output.next().unwrap().unwrap(), "up");
    let stats: Value =
        serde_json::from_str(&host.ok(&["stats", "--no-stream", "--output", "json"])).unwrap();
    let names: Vec<_> =
        stats["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
    assert_eq!(names, ["main"]);
    assert_eq!(host.inspect("web")["status"]["containers"].as_array().unwrap().len(), 1);
    assert_eq!(host.code(&["exec", "-c", "husk.debug-4", "web", "true"]), Some(125));
    input.write_all(b"exit 5\n").unwrap();
    assert_eq!(shell.wait().unwrap().code(), Some(5));

    // It does not keep the pod from ending, and is told of its end.
    let mut sleeps = host.spawn(&["debug", "web", "sleep", "20"]);
    std::thread::sleep(Duration::from_millis(300));
    host.ok(&["stop", "web"]);
    assert_eq!(sleeps.wait().unwrap().code(), Some(125));
    assert_eq!(
        host.inspect("web")["status"]["containers"][0]["state"]["terminated"]["exitCode"],
        3
    );
    host.ok(&["rm", "web"]);
    host.nothing_is_left();
}

#[test]
fn changed_objects_reach_the_pods_that_use_them_and_no_others() {
    let host = Background::new();
    let config = |name: &str, color: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{color: {color}}}\n---\n"
        )
    };
    let web = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers:\n  \
         - {name: main, image: test/image, imagePullPolicy: Never, command: [sleep, '600']}\n  \
         volumes:\n  - {name: files, configMap: {name: config, items: [{key: color, path: c}]}}\n  \
         - {name: labels, downwardAPI: {items: [{path: l, fieldRef: {fieldPath: metadata.labels}}]}}\n";
    host.up(&format!("{}{web}", config("config", "blue")));
    host.up(&pod("other", &[("main", "sleep 600")]));
    let apply = |args: &[&str], documents: &str| {
        let mut child = host.spawn(&[&["apply"], args, &["-"]].concat());
        child.stdin.take().unwrap().write_all(documents.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let red = config("config", "red");
    let updated = (Some(0), "default/web: volume files updated\n".to_owned(), String::new());
    assert_eq!(apply(&[], &red), updated);
    let same = (Some(0), "default/web: no files changed\n".to_owned(), String::new());
    assert_eq!(apply(&["--pod", "web"], &red), same);
    let both = format!(
        "{}{}",
        config("config", "green"),
        web.replace("name: web", "name: web, labels: {a: b}")
    );
    assert_eq!(apply(&[], &both).1, "default/web: volumes files, labels updated\n");

    // What the guest does not take is not taken for granted.
    let (code, _, why) = apply(&[], &config("config", "'fake:refuse'"));
    assert_eq!((code, why.contains("volume \"files\" is full")), (Some(1), true), "{why}");
    assert_eq!(apply(&[], &config("config", "green")), updated);

    for (args, document, code, words) in [
        (&[][..], config("none", "x"), 1, "no running pod uses anything of standard input"),
        (&["--pod", "other"], red.clone(), 1, "no running pod uses"),
        (&["--pod", "nobody"], red.clone(), 125, "nobody"),
        (&[], String::new(), 125, "no ConfigMap, Secret or Pod in it"),
        (&[], config("config", "x").replace("color", "colour"), 1, "config has no such key"),
        (&[], web.replace("'600'", "'1'"), 1, "spec.containers[0].command"),
    ] {
        let (got, printed, why) = apply(args, &document);
        assert_eq!((got, printed.as_str()), (Some(code), ""), "{why}");
        assert!(why.contains(words), "{why}");
    }
    host.ok(&["stop", "web"]);
    assert_eq!(apply(&["--pod", "web"], &red).0, Some(1), "it does not run any more");
}

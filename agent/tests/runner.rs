//! Runs the agent on this machine's own kernel, in namespaces of its own, and drives it over Unix
//! sockets as a pod's process would over vsock.
//!
//! Needs root, a static busybox at /bin/busybox, and cgroup v2. The tests that set limits also need
//! its controllers, which a machine that gives them to cgroup v1 lacks: they are in `limits`.
//! Run: `cargo test -p husk-agent --features runner-tests --test runner`.
#![allow(missing_docs)]

#[path = "runner/calls.rs"]
mod calls;
#[path = "runner/copy.rs"]
mod copy;
#[path = "runner/dial.rs"]
mod dial;
#[path = "runner/files.rs"]
mod files;
mod guest;
#[path = "runner/hooks.rs"]
mod hooks;
#[path = "runner/hostile.rs"]
mod hostile;
#[path = "runner/kernel_log.rs"]
mod kernel_log;
#[path = "runner/lifecycle.rs"]
mod lifecycle;
#[path = "runner/limits.rs"]
mod limits;
#[path = "runner/mounts.rs"]
mod mounts;
#[path = "runner/namespaces.rs"]
mod namespaces;
#[path = "runner/network.rs"]
mod network;
#[path = "runner/process.rs"]
mod process;
#[path = "runner/seccomp.rs"]
mod seccomp;
#[path = "runner/streams.rs"]
mod streams;
#[path = "runner/user_namespaces.rs"]
mod user_namespaces;

use std::time::Duration;

use guest::{Guest, Options, base_spec, exec_process};
use husk_proto::agent as wire;
use serde_json::json;
use tonic::Code;

#[tokio::test]
async fn a_program_runs_and_its_output_and_exit_code_are_exact() {
    let guest = Guest::boot().await;
    let run = guest.run("a", &["sh", "-c", "echo out; echo err >&2; exit 7"]).await;
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!((run.exit.exit_code, run.exit.signal), (7, 0));
    guest.delete("a").await;
    assert!(guest.nothing_left("a"), "something is left of the container");
}

#[tokio::test]
async fn a_signal_ends_with_128_plus_its_number() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let error = guest.client().delete_container(guest::id("a")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    guest.signal("a", "", 9).await.unwrap();
    let exit = guest.wait("a", "").await;
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, 9, false));
    // It can be asked again, and a signal finds nothing.
    assert_eq!(guest.wait("a", "").await.exit_code, 137);
    assert_eq!(guest.signal("a", "", 9).await.unwrap_err().code(), Code::NotFound);
    guest.delete("a").await;
}

#[tokio::test]
async fn input_reaches_the_program_and_its_end_too() {
    let guest = Guest::boot().await;
    let options = Options { stdin: Some(b"one\ntwo\n".to_vec()), ..Options::default() };
    let run = guest.run_with("a", base_spec(&["cat"]), options).await;
    assert_eq!(run.stdout, "one\ntwo\n");
    assert_eq!(run.exit.exit_code, 0);
}

#[tokio::test]
async fn a_mebibyte_of_output_is_complete() {
    let guest = Guest::boot().await;
    let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x";
    let run = guest.run("a", &["sh", "-c", script]).await;
    assert_eq!(run.stdout.len(), 1 << 20);
    assert!(run.stdout.bytes().all(|b| b == b'x'));
}

#[tokio::test]
async fn a_program_that_does_not_exist_fails_at_create_as_in_runc() {
    let guest = Guest::boot().await;
    for (args, code, message) in [
        (&["foo"][..], 127, r#"exec: "foo": executable file not found in $PATH"#),
        (&["/nope"][..], 127, r#"exec: "/nope": stat /nope: no such file or directory"#),
        (&["/etc/passwd"][..], 126, r#"exec: "/etc/passwd": permission denied"#),
    ] {
        let failure = guest.create_failure("a", base_spec(args)).await;
        assert_eq!((failure.exit_code, failure.message.as_str()), (code, message));
        assert!(guest.nothing_left("a"));
    }
}

#[tokio::test]
async fn a_file_that_is_no_program_fails_at_start_and_leaves_nothing() {
    let guest = Guest::boot().await;
    guest.create("a", base_spec(&["/bin/garbage"]), Options::default()).await;
    let failure = guest.try_start("a").await.unwrap().unwrap_err();
    assert_eq!(failure.exit_code, 126);
    assert_eq!(failure.message, "exec /bin/garbage: exec format error");
    assert!(guest.nothing_left("a"));
    assert_eq!(guest.list().await, []);
}

#[tokio::test]
async fn the_process_is_what_the_specification_says() {
    let guest = Guest::boot().await;
    let script = "id -u; id -g; id -G; umask; pwd; echo $HOME; ulimit -n; hostname; echo $$; \
                  grep -E '^(Cap|NoNewPrivs|Seccomp)' /proc/self/status; cat /proc/self/oom_score_adj";
    let mut spec = base_spec(&["sh", "-c", script]);
    let process = spec["process"].as_object_mut().unwrap();
    process.insert(
        "user".into(),
        json!({"uid": 33, "gid": 34, "additionalGids": [35], "umask": 0o27}),
    );
    process.insert("cwd".into(), json!("/made/for/it"));
    process.insert("rlimits".into(), json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]));
    process.insert("noNewPrivileges".into(), json!(true));
    process.insert("oomScoreAdj".into(), json!(321));
    process.insert(
        "capabilities".into(),
        json!({"bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"],
               "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}),
    );
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(run.stderr, "");
    let expected = "33\n34\n34 35\n0027\n/made/for/it\n/var/www\n77\npod\n1\n\
                    CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\n\
                    CapEff:\t0000000000000020\nCapBnd:\t0000000000000021\n\
                    CapAmb:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t0\n\
                    Seccomp_filters:\t0\n321\n";
    assert_eq!(run.stdout, expected);
}

#[tokio::test]
async fn a_user_is_found_by_name_and_can_open_its_streams_again() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sh", "-c", "id -u; id -g; id -G; echo again > /dev/stdout"]);
    spec["process"]["user"] =
        json!({"uid": 0, "gid": 0, "username": "w:extra", "additionalGids": [7]});
    let run = guest.run_with("a", spec.clone(), Options::default()).await;
    assert_eq!(run.stdout, "33\n44\n44 7\nagain\n", "{}", run.stderr);
    spec["process"]["user"]["username"] = json!("nobody");
    let error = guest.try_create("b", spec, Options::default()).await.unwrap_err();
    assert!(error.message().contains("unable to find user nobody"), "{error}");
    assert!(guest.nothing_left("b"));
}

#[tokio::test]
async fn the_files_of_the_pod_can_be_bound() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["cat", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"]);
    for file in ["hostname", "hosts", "resolv.conf"] {
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": format!("/etc/{file}"), "type": "bind",
            "source": format!("/run/husk/etc/{file}"), "options": ["rbind", "rprivate", "ro"],
        }));
    }
    let run = guest.run_with("a", spec, Options::default()).await;
    assert!(run.stdout.starts_with("pod\n127.0.0.1\tlocalhost\n"), "{}", run.stderr);
    assert!(run.stdout.ends_with("127.0.0.1\tpod\n"), "{}", run.stdout);
}

#[tokio::test]
async fn the_container_sees_its_own_world_only() {
    let guest = Guest::boot().await;
    let script = "ls /; ls /proc | grep -c '^[0-9]'; ls /dev | tr '\\n' ' '; \
                  grep ^0 /proc/self/cgroup; touch /written && echo ok; \
                  wc -c < /proc/uptime; \
                  echo x > /proc/sys/kernel/hostname";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["linux"]["maskedPaths"] = json!(["/proc/uptime", "/proc/acpi", "/proc/nothing"]);
    spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    let run = guest.run_with("a", spec, Options::default()).await;
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert!(run.stdout.starts_with("bin\ndev\netc\nlinks\nproc\nsys\ntmp\n"), "{}", run.stdout);
    assert!(run.stdout.contains("\nok\n"), "the root is writable: {}", run.stdout);
    assert!(
        run.stdout.contains(
            "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
        ),
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("0::/\n"), "own cgroup namespace: {}", run.stdout);
    assert_eq!(*lines.last().unwrap(), "0", "/proc/uptime is masked: {}", run.stdout);
    assert!(run.stderr.contains("Read-only file system"), "{}", run.stderr);
}

#[tokio::test]
async fn mounts_never_lead_outside_the_root() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sh", "-c", "cat /etc/inside; cat /links/etc/inside; ls /run/x"]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    // /links/up leads to ../../../../etc, /links/etc to /etc, /links/dangling to /run/x.
    for destination in ["/links/up/inside", "/links/dangling/y"] {
        mounts.push(json!({"destination": destination, "type": "bind", "options": ["bind", "ro"],
                           "source": "/run/husk/volumes/v/file"}));
    }
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(run.stdout, "volume\nvolume\ny\n", "{}", run.stderr);
}

#[tokio::test]
async fn volumes_are_shared_and_sub_paths_stay_inside_them() {
    let guest = Guest::boot().await;
    let with_volume = |script: &str, source: &str| {
        let mut spec = base_spec(&["sh", "-c", script]);
        spec["mounts"].as_array_mut().unwrap().push(json!(
            {"destination": "/data", "type": "bind", "source": source, "options": ["rbind"]}
        ));
        spec
    };
    let whole = "/run/husk/volumes/v";
    let run = guest
        .run_with(
            "a",
            with_volume("echo 1 > /data/x; ln -s / /data/root; stat -c %a:%g /data", whole),
            Options::default(),
        )
        .await;
    assert_eq!(run.stdout, "2777:1234\n");
    let run = guest.run_with("b", with_volume("cat /data/x", whole), Options::default()).await;
    assert_eq!(run.stdout, "1\n");
    // The link leads to the volume's root, not to the agent's.
    let sub = "/run/husk/volumes/v/root/sub";
    let run =
        guest.run_with("c", with_volume("stat -c %a:%g /data", sub), Options::default()).await;
    assert_eq!(run.stdout, "2777:1234\n", "{}", run.stderr);
    let run = guest.run_with("d", with_volume("ls /data", whole), Options::default()).await;
    assert_eq!(run.stdout, "file\nroot\nsub\nx\n");
}

#[tokio::test]
async fn who_starts_a_process_is_told_its_end() {
    use wire::process_event::Event::{self, Exited, Failure, Started};
    async fn all(mut events: tonic::Streaming<wire::ProcessEvent>) -> Vec<Event> {
        let mut all = Vec::new();
        while let Some(told) = events.message().await.unwrap() {
            all.push(told.event.unwrap());
        }
        all
    }
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let exec = async |name: &str, args: &[&str]| {
        let request = guest::exec_request("a", name, &exec_process(args), None);
        all(guest.client().exec_process(request).await.unwrap().into_inner()).await
    };
    for round in 0..30 {
        let told = exec(&format!("e{round}"), &["sh", "-c", "exit 7"]).await;
        let [Started(pid), Exited(exit)] = &told[..] else { panic!("{told:?}") };
        assert_eq!((exit.exit_code, exit.signal), (7, 0));
        assert!(*pid > 1);
    }
    let told = exec("f", &["nope"]).await;
    assert!(matches!(&told[..], [Failure(failure)] if failure.exit_code == 127), "{told:?}");

    guest.create("b", base_spec(&["sh", "-c", "exit 9"]), Options::default()).await;
    let told = guest.client().start_container(guest::start_id("b")).await.unwrap().into_inner();
    let told = all(told).await;
    assert!(matches!(&told[..], [Started(_), Exited(exit)] if exit.exit_code == 9), "{told:?}");

    // Whoever gives that up does nothing to the process.
    let request =
        guest::exec_request("a", "g", &exec_process(&["sh", "-c", "sleep 1; exit 6"]), None);
    drop(guest.client().exec_process(request).await.unwrap());
    assert_eq!(guest.wait("a", "g").await.exit_code, 6);
}

#[tokio::test]
async fn a_process_can_be_added_to_a_running_container() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let script = "echo $$; hostname; cat /proc/1/comm; grep ^0 /proc/self/cgroup; exit 3";
    let run = guest.exec("a", "e1", exec_process(&["sh", "-c", script])).await.unwrap();
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(&lines[1..], ["pod", "sleep", "0::/"], "{}", run.stderr);
    assert_eq!(run.exit.exit_code, 3);
    let again = guest.exec("a", "e1", exec_process(&["true"])).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let failure = guest.exec_failure("a", "e2", exec_process(&["nope"])).await;
    assert_eq!(failure.exit_code, 127);
    // A name whose process failed to start is free again.
    guest.exec("a", "e2", exec_process(&["true"])).await.unwrap();
    guest.signal("a", "", 9).await.unwrap();
    guest.wait("a", "").await;
    let late = guest.exec("a", "e3", exec_process(&["true"])).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    guest.delete("a").await;
}

#[tokio::test]
async fn a_terminal_is_one_and_can_be_resized() {
    let guest = Guest::boot().await;
    let script = "tty; stty size; read x; stty size; echo got $x; ls -l /dev/console | cut -c1";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 101, "height": 33});
    let options = Options { terminal: true, ..Options::default() };
    let mut streams = guest.start("a", spec, options).await;
    streams.read_until("33 101").await;
    guest.resize("a", 80, 24).await.unwrap();
    streams.write(b"line\n").await;
    let exit = guest.wait("a", "").await;
    let output = streams.rest().await;
    assert!(output.contains("24 80\r\ngot line\r\nc"), "{output:?}");
    assert_eq!(exit.exit_code, 0);
    assert_eq!(guest.resize("a", 80, 24).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn an_added_process_can_have_a_terminal_and_input() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let mut process = exec_process(&["sh", "-c", "tty; read x; echo got $x; exit 4"]);
    process["terminal"] = json!(true);
    let options = Options { terminal: true, ..Options::default() };
    let mut streams = guest.start_exec("a", "e", process, options).await.unwrap();
    streams.read_until("/dev/pts/").await;
    streams.write(b"line\n").await;
    let rest = streams.rest().await;
    assert!(rest.contains("got line\r\n"), "{rest:?}");
    assert_eq!(guest.wait("a", "e").await.exit_code, 4);
}

#[tokio::test]
async fn a_signal_can_go_to_every_process() {
    let guest = Guest::boot().await;
    // The first process has no handler, so that the kernel spares it: it is the container's init.
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    for exec in ["e1", "e2"] {
        let process = exec_process(&["sleep", "1000"]);
        guest.start_exec("a", exec, process, Options::default()).await.unwrap();
    }
    guest.signal_all("a", 15).await.unwrap();
    for exec in ["e1", "e2"] {
        assert_eq!(guest.wait("a", exec).await.exit_code, 143);
    }
    assert_eq!(guest.list().await.len(), 1);
    guest.signal_all("a", 9).await.unwrap();
    assert_eq!(guest.wait("a", "").await.exit_code, 137);
    assert_eq!(guest.signal_all("a", 9).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(guest.signal("a", "", 65).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn the_list_shows_every_state() {
    use husk_proto::agent::container::State;
    let guest = Guest::boot().await;
    guest.create("created", base_spec(&["true"]), Options::default()).await;
    guest.start("running", base_spec(&["sleep", "1000"]), Options::default()).await;
    guest.run("stopped", &["true"]).await;
    let states: Vec<_> =
        guest.list().await.into_iter().map(|c| (c.id.clone(), c.state())).collect();
    assert_eq!(
        states,
        [
            ("created".to_owned(), State::Created),
            ("running".to_owned(), State::Running),
            ("stopped".to_owned(), State::Stopped)
        ]
    );
}

#[tokio::test]
async fn waiting_may_begin_before_the_start_and_by_many() {
    let guest = Guest::boot().await;
    guest.create("a", base_spec(&["sh", "-c", "exit 5"]), Options::default()).await;
    let start = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        guest.try_start("a").await.unwrap().unwrap();
    };
    let (first, second, ()) = tokio::join!(guest.wait("a", ""), guest.wait("a", ""), start);
    assert_eq!((first.exit_code, second.exit_code), (5, 5));
}

#[tokio::test]
async fn requests_out_of_order_are_refused() {
    let guest = Guest::boot().await;
    let mut client = guest.client();
    let setup = client.setup_pod(guest::setup_request(None)).await.unwrap_err();
    assert_eq!(setup.code(), Code::FailedPrecondition);
    for error in [
        guest.try_start("x").await.unwrap_err(),
        client.delete_container(guest::id("x")).await.unwrap_err(),
        guest.signal("x", "", 9).await.unwrap_err(),
        guest.resize("x", 1, 1).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::NotFound, "{error}");
    }
    guest.create("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let again = guest.try_create("a", base_spec(&["true"]), Options::default()).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let exec = guest.exec("a", "e", exec_process(&["true"])).await.unwrap_err();
    assert_eq!(exec.code(), Code::FailedPrecondition);
    // A container that was never started can be deleted.
    guest.delete("a").await;
    assert!(guest.nothing_left("a"));
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let start = guest.try_start("a").await.unwrap_err();
    assert_eq!(start.code(), Code::FailedPrecondition);
    let no_terminal = guest.resize("a", 1, 1).await.unwrap_err();
    assert_eq!(no_terminal.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn bad_requests_name_what_is_wrong_and_leave_nothing() {
    let guest = Guest::boot().await;
    let refuse = async |id: &str, spec: serde_json::Value| {
        guest.try_create(id, spec, Options::default()).await.unwrap_err()
    };
    for (id, field, spec) in [
        ("../x", "id", base_spec(&["true"])),
        ("a", "linux.seccomp", {
            let mut spec = base_spec(&["true"]);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
            spec
        }),
        ("a", "cgroup path", {
            let mut spec = base_spec(&["true"]);
            spec["linux"]["cgroupsPath"] = json!("../../agent");
            spec
        }),
    ] {
        let error = refuse(id, spec).await;
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{error}");
    }
    let mut spec = base_spec(&["true"]);
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}),
    );
    let error = refuse("a", spec).await;
    assert_eq!(error.code(), Code::Internal);
    assert!(error.message().contains("bind /no/such to /x"), "{error}");
    assert!(guest.nothing_left("a"));
    assert_eq!(guest.list().await, []);
}

#[tokio::test]
async fn a_descendant_that_holds_the_output_delays_the_exit_by_a_bound() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let script = "sleep 500 & echo done";
    let begin = std::time::Instant::now();
    let run = guest.exec("a", "e", exec_process(&["sh", "-c", script])).await.unwrap();
    assert_eq!(run.stdout, "done\n");
    assert!(begin.elapsed() > Duration::from_secs(5), "it was not waited for");
}

#[tokio::test]
async fn a_reader_that_stops_grows_nothing_in_the_agent() {
    let guest = Guest::boot().await;
    let spec = base_spec(&["sh", "-c", "dd if=/dev/zero bs=65536 count=4096 2>/dev/null"]);
    let streams = guest.start("a", spec, Options::default()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = guest.stats().await.agent_rss;
    println!("resident memory of the agent with one container: {before} bytes");
    assert!(before > 0 && before < 32 << 20, "{before}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = guest.stats().await.agent_rss;
    assert!(after <= before + (1 << 20), "{before} -> {after}");
    let total = streams.drain_output().await;
    assert_eq!(total, 65536 * 4096);
    assert_eq!(guest.wait("a", "").await.exit_code, 0);
}

#[tokio::test]
async fn a_pod_without_disks_is_refused_and_a_shutdown_ends_the_agent() {
    let mut guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    guest.client().shutdown(husk_proto::agent::ShutdownRequest {}).await.unwrap();
    assert!(guest.ended().await.success());
}

#[tokio::test]
async fn the_agent_ends_when_its_connection_does() {
    let mut guest = Guest::boot().await;
    guest.hang_up();
    assert!(guest.ended().await.success());
}

#[tokio::test]
async fn many_containers_one_after_another_leave_nothing() {
    let guest = Guest::boot().await;
    let before = guest.count_left();
    for round in 0..20 {
        let id = format!("c{round}");
        let run = guest.run(&id, &["echo", &id]).await;
        assert_eq!(run.stdout, format!("{id}\n"));
        guest.delete(&id).await;
    }
    assert_eq!(guest.count_left(), before);
}

#[tokio::test]
async fn many_containers_at_once_are_complete_and_leave_nothing() {
    let guest = std::sync::Arc::new(Guest::boot().await);
    guest.run("warm", &["true"]).await;
    guest.delete("warm").await;
    let before = guest.count_left();
    let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x; exit 6";
    let one = async |guest: std::sync::Arc<Guest>, number: usize| {
        let id = format!("c{number}");
        for _ in 0..3 {
            let run = guest.run(&id, &["sh", "-c", script]).await;
            assert_eq!((run.stdout.len(), run.exit.exit_code), (1 << 20, 6));
            guest.delete(&id).await;
        }
    };
    let all: Vec<_> = (0..10).map(|number| tokio::spawn(one(guest.clone(), number))).collect();
    for task in all {
        task.await.unwrap();
    }
    assert_eq!(guest.count_left(), before);
}

#[tokio::test]
async fn failures_leave_nothing() {
    let guest = Guest::boot().await;
    guest.start("other", base_spec(&["sleep", "1000"]), Options::default()).await;
    guest.create_failure("warm", base_spec(&["nope"])).await;
    let before = guest.count_left();
    for round in 0..10 {
        let id = format!("c{round}");
        guest.create_failure(&id, base_spec(&["nope"])).await;
        let mut spec = base_spec(&["true"]);
        spec["mounts"][0]["options"] = json!(["no-such-option"]);
        guest.try_create(&id, spec, Options::default()).await.unwrap_err();
        guest.exec_failure("other", &id, exec_process(&["nope"])).await;
        guest.create(&id, base_spec(&["true"]), Options::default()).await;
        guest.delete(&id).await;
        guest.create(&id, base_spec(&["sleep", "1000"]), Options::default()).await;
        guest.signal(&id, "", 9).await.unwrap();
        assert_eq!(guest.wait(&id, "").await.exit_code, 137);
        guest.delete(&id).await;
    }
    assert_eq!(guest.count_left(), before);
}

#[tokio::test]
async fn a_client_that_gives_up_leaves_a_whole_container_or_none() {
    let guest = Guest::boot().await;
    for delay in [0, 1, 2, 5, 10, 20] {
        let id = format!("c{delay}");
        let create = guest.create(&id, base_spec(&["sleep", "1000"]), Options::default());
        let given_up = tokio::time::timeout(Duration::from_millis(delay), create).await.is_err();
        // Whatever became of it: it can be removed, or it is not there.
        let deleted = async {
            loop {
                let error = match guest.client().delete_container(guest::id(&id)).await {
                    Ok(_) => return,
                    Err(error) => error,
                };
                // The list was asked for after the create, if that was ever sent.
                let gone = error.code() == Code::NotFound && guest.list().await.is_empty();
                if gone && given_up {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), deleted).await.expect("it can be deleted");
        assert!(guest.nothing_left(&id));
    }
}

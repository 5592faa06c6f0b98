//! `linux.namespaces`: new ones, shared ones, and what an exec is in.

use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec, exec_process};

const SHOW: &str = "for n in ipc net uts pid cgroup time; do readlink /proc/self/ns/$n; done";

fn with_namespaces(args: &[&str], namespaces: &[Value]) -> Value {
    let mut spec = base_spec(args);
    let mut all = vec![json!({"type": "mount"})];
    all.extend_from_slice(namespaces);
    spec["linux"]["namespaces"] = json!(all);
    spec
}

/// Namespaces by kind that a process of the container sees itself in.
async fn seen(guest: &Guest, id: &str, exec: &str) -> Vec<String> {
    let run = guest.exec(id, exec, exec_process(&["sh", "-c", SHOW])).await.unwrap();
    let seen: Vec<String> = run.stdout.lines().map(str::to_owned).collect();
    assert_eq!(seen.len(), 6, "{}", run.stderr);
    seen
}

async fn pid(guest: &Guest, id: &str) -> u32 {
    guest.list().await.iter().find(|c| c.id == id).unwrap().pid
}

#[tokio::test]
async fn namespaces_are_new_or_those_of_a_path_and_an_exec_is_in_them() {
    let guest = Guest::boot().await;
    let kinds = ["ipc", "network", "uts", "pid", "time"];
    let new: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    let spec = with_namespaces(&["sh", "-c", &format!("{SHOW}; sleep 1000")], &new);
    let mut streams = guest.start("first", spec, Options::default()).await;
    streams.read_until("time:").await;
    let first = seen(&guest, "first", "e").await;
    let at = pid(&guest, "first").await;
    let joined: Vec<Value> = kinds
        .iter()
        .map(|kind| {
            let file = if *kind == "network" { "net" } else { kind };
            json!({"type": kind, "path": format!("/proc/{at}/ns/{file}")})
        })
        .collect();
    guest.start("second", with_namespaces(&["sleep", "1000"], &joined), Options::default()).await;
    assert_eq!(seen(&guest, "second", "e").await, first);
    let own = with_namespaces(&["sleep", "1000"], &new);
    guest.start("third", own, Options::default()).await;
    let third = seen(&guest, "third", "e").await;
    for (index, kind) in ["ipc", "net", "uts", "pid", "cgroup", "time"].iter().enumerate() {
        // None has a cgroup namespace of its own.
        assert_eq!(third[index] == first[index], *kind == "cgroup", "{kind}");
    }
    let own = guest.exec("first", "main", exec_process(&["sh", "-c", SHOW])).await.unwrap().stdout;
    assert!(streams.seen().starts_with(&own[..own.rfind("time:").unwrap()]), "{own}");
}

#[tokio::test]
async fn a_uts_namespace_has_names_of_its_own() {
    let guest = Guest::boot().await;
    let show = "hostname; cat /proc/sys/kernel/domainname";
    let mut spec = with_namespaces(&["sh", "-c", show], &[json!({"type": "uts"})]);
    spec["hostname"] = json!("own");
    spec["domainname"] = json!("example.org");
    assert_eq!(guest.run_with("a", spec, Options::default()).await.stdout, "own\nexample.org\n");
    let pods = guest.run("b", &["sh", "-c", show]).await.stdout;
    assert!(pods.starts_with("pod\n") && !pods.contains("example.org"), "{pods}");
}

#[tokio::test]
async fn a_shared_process_namespace_shows_all_and_outlives_those_that_join_it() {
    let guest = Guest::boot().await;
    let new = [json!({"type": "pid"}), json!({"type": "cgroup"})];
    guest.start("first", with_namespaces(&["sleep", "1001"], &new), Options::default()).await;
    let path = format!("/proc/{}/ns/pid", pid(&guest, "first").await);
    let joined = [json!({"type": "pid", "path": path}), json!({"type": "cgroup"})];
    guest.start("second", with_namespaces(&["sleep", "1002"], &joined), Options::default()).await;
    let processes = exec_process(&["sh", "-c", "ps -o args | grep -c ^sleep; cat /proc/1/cmdline"]);
    for id in ["first", "second"] {
        let run = guest.exec(id, "e", processes.clone()).await.unwrap();
        assert_eq!(run.stdout, "2\nsleep\x001001\x00", "{}", run.stderr);
    }
    guest
        .start_exec("second", "left", exec_process(&["sleep", "1003"]), Options::default())
        .await
        .unwrap();
    guest.signal("second", "", 9).await.unwrap();
    assert_eq!(guest.wait("second", "").await.exit_code, 137);
    assert_eq!(guest.wait("second", "left").await.exit_code, 137, "it ends with its container");
    guest.delete("second").await;
    assert!(guest.nothing_left("second"));
    guest.exec("first", "again", exec_process(&["true"])).await.unwrap();
}

#[tokio::test]
async fn clocks_of_a_time_namespace_have_their_offsets() {
    let guest = Guest::boot().await;
    let read = "cut -d. -f1 /proc/uptime";
    let guests = guest.run("plain", &["sh", "-c", read]).await.stdout;
    let guests: i64 = guests.trim().parse().unwrap();
    let new = [json!({"type": "time"}), json!({"type": "pid"})];
    let mut spec = with_namespaces(&["sh", "-c", &format!("{read}; sleep 1000")], &new);
    spec["linux"]["timeOffsets"] =
        json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 86_400, "nanosecs": 1}});
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("\n").await;
    let main: i64 = streams.seen().trim().parse().unwrap();
    assert!(main >= guests + 1_000_000, "{main} {guests}");
    let run = guest.exec("a", "e", exec_process(&["sh", "-c", read])).await.unwrap();
    let exec: i64 = run.stdout.trim().parse().unwrap();
    assert!(exec >= main, "{exec} {main}");
}

#[tokio::test]
async fn namespaces_that_cannot_be_had_are_errors_and_leave_nothing() {
    let guest = Guest::boot().await;
    for (namespace, words, code) in [
        (json!({"type": "mount"}), "must appear once", Code::InvalidArgument),
        (json!({"type": "ipc", "path": "x"}), "linux.namespaces[1].path", Code::InvalidArgument),
        (json!({"type": "ipc", "path": "/no/such"}), "/no/such", Code::Internal),
        (json!({"type": "pid", "path": "/no/such"}), "/no/such", Code::Internal),
        (
            json!({"type": "pid", "path": "/run/husk/etc/hosts"}),
            "process ID namespace",
            Code::Internal,
        ),
        (json!({"type": "uts", "path": "/proc/self/ns/ipc"}), "/proc/self/ns/ipc", Code::Internal),
    ] {
        let spec = with_namespaces(&["true"], &[namespace]);
        let error = guest.try_create("refused", spec, Options::default()).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
        assert!(guest.nothing_left("refused"));
    }
    // The agent is still where it was.
    assert_eq!(guest.run("b", &["sh", "-c", "echo $$"]).await.stdout, "1\n");
}

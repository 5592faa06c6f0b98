//! User namespaces: the container's root is root inside, and nobody of the guest.

use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec, exec_process};

/// Every kind of namespace of its own but the network's, which has no device then, and users.
const KINDS: [&str; 6] = ["mount", "pid", "ipc", "uts", "cgroup", "user"];

pub(crate) fn confined(args: &[&str]) -> Value {
    let mut spec = base_spec(args);
    spec["linux"]["namespaces"] = KINDS.iter().map(|kind| json!({ "type": kind })).collect();
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"],
        "effective": ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"],
        "permitted": ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"]});
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/v", "type": "bind", "source": "/run/husk/volumes/v", "options": ["bind"]}
    ));
    spec
}

/// Where files are that the container writes into its root.
fn written(guest: &Guest, id: &str, file: &str) -> std::path::PathBuf {
    guest.layer(id).join("upper").join(file)
}

#[tokio::test]
async fn root_is_root_inside_and_somebody_else_outside() {
    let guest = Guest::boot().await;
    let script = "id -u; id -g; tr -s ' ' < /proc/self/uid_map; stat -c %u:%g / /bin/busybox /dev/null; \
                  touch /made /v/made; chown 7:8 /made; stat -c %u:%g /made; echo ok > /dev/null; \
                  mount -t tmpfs -o size=1m none /tmp && echo mounted; hostname; \
                  grep ^CapEff /proc/self/status; mknod /tmp/d c 1 3 || echo refused";
    let mut spec = confined(&["sh", "-c", script]);
    spec["hostname"] = json!("own");
    let run = guest.run_with("a", spec, Options::default()).await;
    let expected = "0\n0\n 0 100000 65536\n0:0\n0:0\n0:0\n7:8\nmounted\nown\n\
                    CapEff:\t00000000002000c1\nrefused\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);
    let volume = std::fs::metadata(guest.volume().join("made")).unwrap();
    assert_eq!(volume.uid(), 100_000);
    let file = std::fs::metadata(written(&guest, "a", "made")).unwrap();
    assert_eq!((file.uid(), file.gid()), (7, 8), "the disk holds what the container says");
    guest.delete("a").await;
    assert!(guest.nothing_left("a"));
}

#[tokio::test]
async fn users_execs_and_terminals_are_as_ever() {
    let guest = Guest::boot().await;
    let mut spec = confined(&["sh", "-c", "id -u; id -G; echo again > /dev/stdout; sleep 1000"]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 34, "additionalGids": [35]});
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("33\n34 35\nagain\n").await;
    let script = "id -u; touch /exec; stat -c %u /exec; tr -s ' ' < /proc/self/uid_map; \
                  echo again > /dev/stdout";
    let run = guest.exec("a", "e", exec_process(&["sh", "-c", script])).await.unwrap();
    assert_eq!(run.stdout, "0\n0\n 0 100000 65536\nagain\n", "{}", run.stderr);
    let mut process = exec_process(&["sh", "-c", "tty; read x; stat -c %u $(tty); echo got $x"]);
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 5, "gid": 5});
    let options = Options { terminal: true, ..Options::default() };
    let mut streams = guest.start_exec("a", "t", process, options).await.unwrap();
    streams.read_until("/dev/pts/").await;
    streams.write(b"line\n").await;
    assert!(streams.rest().await.contains("\r\n5\r\ngot line\r\n"));
}

#[tokio::test]
async fn a_terminal_a_profile_and_hooks_work_for_a_mapped_root() {
    let guest = Guest::boot().await;
    let mut spec = confined(&["sh", "-c", "mkdir /x; ls -ln /dev/console; cat /v/hook; tty"]);
    spec["process"]["terminal"] = json!(true);
    spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
    let bin = "/run/husk/fs/base/bin";
    spec["hooks"]["createContainer"] = json!([{"path": format!("{bin}/sh"),
        "args": ["sh", "-c", "id -u > /run/husk/volumes/v/hook"], "env": [format!("PATH={bin}")]}]);
    let options = Options { terminal: true, ..Options::default() };
    let streams = guest.start("a", spec, options).await;
    let output = streams.rest().await;
    assert!(output.contains("Operation not supported"), "{output}");
    assert!(output.contains("\n0\r\n/dev/pts/"), "the hook is root of the namespace: {output}");
    assert_eq!(guest.wait("a", "").await.exit_code, 0);
}

#[tokio::test]
async fn a_user_namespace_can_be_joined() {
    let guest = Guest::boot().await;
    guest.start("first", confined(&["sleep", "1000"]), Options::default()).await;
    let pid = guest.list().await[0].pid;
    let mut spec = confined(&["sh", "-c", "readlink /proc/self/ns/user; touch /made /v/joined"]);
    let user = json!({"type": "user", "path": format!("/proc/{pid}/ns/user")});
    *spec["linux"]["namespaces"].as_array_mut().unwrap().last_mut().unwrap() = user;
    for field in ["uidMappings", "gidMappings"] {
        spec["linux"].as_object_mut().unwrap().remove(field);
    }
    let run = guest.run_with("second", spec, Options::default()).await;
    let show = exec_process(&["readlink", "/proc/self/ns/user"]);
    assert_eq!(guest.exec("first", "e", show).await.unwrap().stdout, run.stdout, "{}", run.stderr);
    assert_eq!(std::fs::metadata(guest.volume().join("joined")).unwrap().uid(), 100_000);
    assert_eq!(std::fs::metadata(written(&guest, "second", "made")).unwrap().uid(), 0);
}

#[tokio::test]
async fn mappings_that_cannot_be_are_errors_and_leave_nothing() {
    let guest = Guest::boot().await;
    let error = async |change: &dyn Fn(&mut Value)| {
        let mut spec = confined(&["true"]);
        change(&mut spec);
        let error = guest.try_create("refused", spec, Options::default()).await.unwrap_err();
        assert!(guest.nothing_left("refused"));
        error
    };
    let without = error(&|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().pop();
    });
    let without = without.await;
    assert_eq!(without.code(), Code::InvalidArgument);
    assert!(without.message().contains("linux.uidMappings"), "{without}");
    let none = error(&|spec| spec["linux"]["gidMappings"] = json!([])).await;
    assert!(none.message().contains("linux.gidMappings"), "{none}");
    let twice = error(&|spec| {
        let one = json!({"containerID": 0, "hostID": 1000, "size": 2});
        spec["linux"]["uidMappings"] = json!([one, one]);
    });
    let twice = twice.await;
    assert_eq!(twice.code(), Code::Internal);
    assert!(twice.message().contains("uid_map"), "{twice}");
    let nowhere = error(&|spec| {
        for field in ["uidMappings", "gidMappings"] {
            spec["linux"].as_object_mut().unwrap().remove(field);
        }
        let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
        *all.last_mut().unwrap() = json!({"type": "user", "path": "/no/such"});
    });
    assert!(nowhere.await.message().contains("/no/such"));
    let unmapped = error(&|spec| {
        spec["linux"]["devices"] =
            json!([{"type": "c", "path": "/dev/x", "major": 1, "minor": 3, "uid": 70_000}]);
    });
    assert!(unmapped.await.message().contains("70000 is not mapped"));
}

#[tokio::test]
async fn containers_with_user_namespaces_leave_nothing() {
    let guest = Guest::boot().await;
    guest.run_with("warm", confined(&["true"]), Options::default()).await;
    guest.delete("warm").await;
    let before = guest.count_left();
    for round in 0..5 {
        let id = format!("c{round}");
        let run = guest.run_with(&id, confined(&["true"]), Options::default()).await;
        assert_eq!(run.exit.exit_code, 0, "{}", run.stderr);
        guest.delete(&id).await;
        guest.create_failure(&id, confined(&["nope"])).await;
    }
    assert_eq!(guest.count_left(), before);
}

//! Requests that no engine makes: names and paths that try to escape, and documents of absurd size.

use std::path::{Path, PathBuf};

use husk_proto::agent as wire;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::calls::{call, calls_of_a_container};
use crate::copy::{bring, entry, out};
use crate::guest::{Guest, Options, base_spec, exec_process, setup_request};

/// How much the agent may ever grow, in KiB: a document of the largest message, parsed, and what is
/// made of it.
const MAX_GROWTH_KIB: u64 = 96 * 1024;

/// Longest text of an error, in bytes.
const MAX_TEXT: usize = 3100;

/// Names that are no component of a path, or no text that should get into a log.
fn evil_names() -> Vec<String> {
    ["", ".", "..", "../a", "a/b", "/etc", "a\0b", "\0", "a\nb", "-a", ".a", "ä", "\u{202e}a", " "]
        .into_iter()
        .map(str::to_owned)
        .chain(["a".repeat(65), "a".repeat(300), "a".repeat(1 << 20), "../".repeat(1000)])
        .collect()
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// What was not as it should be, all of it: a table is read better whole.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    /// What every refusal must be: of this code, with these words, and not endless.
    fn check(&mut self, got: Result<(), Status>, code: Code, words: &str, place: &str) {
        let Err(status) = got else {
            return self.0.push(format!("{place}: not refused"));
        };
        let text = status.message();
        if status.code() != code || !text.contains(words) || text.len() > MAX_TEXT {
            let text: String = text.chars().take(300).collect();
            self.0.push(format!("{place}: {:?}, {text}", status.code()));
        }
    }

    fn none(self) {
        assert_eq!(self.0, [] as [String; 0]);
    }
}

async fn create(guest: &Guest, id: &str, spec: Value) -> Result<(), Status> {
    guest.try_create(id, spec, Options::default()).await.map(drop)
}

#[tokio::test]
async fn a_name_that_could_escape_is_refused_or_not_found() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    guest.start("main", base_spec(&["sleep", "1000"]), Options::default()).await;
    let before = guest.count_left();
    for name in evil_names() {
        for rpc in calls_of_a_container() {
            let place = format!("{rpc} {:?}", short(&name));
            let got = call(&guest, rpc, &name, "").await;
            match rpc {
                "CreateContainer" => faults.check(got, Code::InvalidArgument, "id: \"", &place),
                _ => faults.check(got, Code::NotFound, "does not exist", &place),
            }
        }
        let place = format!("exec {:?}", short(&name));
        let got = guest.exec("main", &name, exec_process(&["true"])).await.map(drop);
        faults.check(got, Code::InvalidArgument, "exec_id: \"", &place);
        if !name.is_empty() {
            for rpc in ["WaitProcess", "SignalProcess", "ResizeTerminal"] {
                let got = call(&guest, rpc, "main", &name).await;
                faults.check(got, Code::NotFound, "has no process", &place);
            }
        }
    }
    assert_eq!(guest.count_left(), before);
    guest.exec("main", "e", exec_process(&["true"])).await.unwrap();
    faults.none();
}

/// Puts a value at a JSON pointer, making the objects on the way; `/-` appends to a list.
fn put(spec: &mut Value, pointer: &str, value: Value) {
    let mut at = spec;
    for part in pointer.split('/').skip(1) {
        if part == "-" {
            if at.is_null() {
                *at = json!([]);
            }
            let list = at.as_array_mut().unwrap();
            list.push(Value::Null);
            at = list.last_mut().unwrap();
        } else {
            at = &mut at[part];
        }
    }
    *at = value;
}

fn with(changes: &[(&str, Value)]) -> Value {
    let mut spec = base_spec(&["true"]);
    for (pointer, value) in changes {
        put(&mut spec, pointer, value.clone());
    }
    spec
}

#[tokio::test]
async fn a_path_that_could_escape_is_refused_by_name() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    let before = guest.count_left();
    let long = "a/".repeat(3000);
    let bind = |destination: &str, source: &str| json!({"destination": destination, "type": "bind", "source": source, "options": ["bind"]});
    let device = |path: &str| json!({"type": "c", "path": path, "major": 1, "minor": 3});
    for (pointer, value, words) in [
        ("/linux/cgroupsPath", json!(".."), "cgroup path"),
        ("/linux/cgroupsPath", json!("/a/../../agent"), "cgroup path"),
        ("/linux/cgroupsPath", json!("/"), "cgroup path"),
        ("/linux/cgroupsPath", json!("a\0b"), "`linux.cgroupsPath`"),
        ("/linux/cgroupsPath", json!("a\nb"), "cgroup path"),
        ("/linux/cgroupsPath", json!("a".repeat(300)), "cgroup path"),
        ("/linux/cgroupsPath", json!(long), "cgroup path"),
        ("/linux/cgroupsPath", json!(vec!["a".repeat(255); 16].join("/")), "cgroup path"),
        ("/mounts/-", bind("relative", "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind("../up", "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind("/a\0b", "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind("/a", "../tmp"), "`mounts[7].source`"),
        ("/mounts/-", bind("/a", "/tmp\0"), "`mounts[7].source`"),
        ("/mounts/-", bind("", "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind("//proc", "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind(&format!("/{long}"), "/tmp"), "`mounts[7].destination`"),
        ("/mounts/-", bind("/a", &format!("/{long}")), "`mounts[7].source`"),
        ("/linux/devices/-", device("dev/x"), "`linux.devices[0].path`"),
        ("/linux/devices/-", device("../dev/x"), "`linux.devices[0].path`"),
        ("/linux/devices/-", device("/dev/x\0"), "`linux.devices[0].path`"),
        ("/linux/devices/-", device(&format!("/{long}")), "`linux.devices[0].path`"),
        ("/linux/maskedPaths", json!(["../x"]), "`linux.maskedPaths[0]`"),
        ("/linux/maskedPaths", json!(["/x\0"]), "`linux.maskedPaths[0]`"),
        ("/linux/readonlyPaths", json!(["x"]), "`linux.readonlyPaths[0]`"),
        ("/linux/sysctl", json!({"net/../kernel/x": "1"}), "`linux.sysctl`"),
        ("/linux/sysctl", json!({"net.../x": "1"}), "`linux.sysctl`"),
        ("/linux/sysctl", json!({"net.x": "1\0"}), "`linux.sysctl.net.x`"),
        (
            "/linux/resources/unified",
            json!({"../agent/memory.max": "1"}),
            "linux.resources.unified",
        ),
        ("/linux/resources/unified", json!({"cgroup.kill": "1"}), "linux.resources.unified"),
        ("/process/cwd", json!("../x"), "`process.cwd`"),
        ("/process/cwd", json!("/x\0"), "`process.cwd`"),
        ("/process/args", json!(["true", "a\0"]), "`process.args[1]`"),
        ("/process/env", json!(["A=\0"]), "`process.env[0]`"),
        (
            "/process/user",
            json!({"uid": 0, "gid": 0, "username": "a\0"}),
            "`process.user.username`",
        ),
        ("/hostname", json!("a\0"), "`hostname`"),
        (
            "/hooks",
            json!({"createContainer": [{"path": "../x"}]}),
            "`hooks.createContainer[0].path`",
        ),
    ] {
        let place = format!("{pointer} {}", short(&value.to_string()));
        let got = create(&guest, "a", with(&[(pointer, value)])).await;
        faults.check(got, Code::InvalidArgument, words, &place);
        assert!(guest.nothing_left("a"), "{place}");
    }
    // Only the mount itself shows where this leads: the create fails all the same.
    let got = create(&guest, "a", with(&[("/mounts/-", bind("/proc/../proc", "/tmp"))])).await;
    faults.check(got, Code::Internal, "mounts[7]: bind /tmp to /proc/../proc", "/proc/../proc");
    for path in ["/", "/run/husk/containers/b/rootfs", "/run/husk/containers/a/rootfs/..", "", "x"]
    {
        // Not by the helper, which sets it.
        let mut spec = base_spec(&["true"]);
        spec["root"]["path"] = json!(path);
        let got = create_raw(&guest, "a", serde_json::to_vec(&spec).unwrap()).await;
        faults.check(got, Code::InvalidArgument, "`root.path`", path);
    }
    for (lower, upper_on) in [("../base", "scratch"), ("base", "../scratch"), ("base", "base")] {
        let rootfs = wire::Rootfs { lower: vec![lower.into()], upper_on: upper_on.into() };
        let mut spec = base_spec(&["true"]);
        spec["root"]["path"] = json!("/run/husk/containers/a/rootfs");
        let spec = serde_json::to_vec(&spec).unwrap();
        let request = wire::CreateContainerRequest {
            id: "a".into(),
            spec,
            rootfs: Some(rootfs),
            stdio: None,
            devices: Vec::new(),
        };
        let got = guest.client().create_container(request).await.map(drop);
        faults.check(got, Code::InvalidArgument, "rootfs: ", lower);
    }
    assert_eq!(guest.count_left(), before);
    guest.run("a", &["true"]).await;
    faults.none();
}

/// A create whose document is given as bytes, without streams.
async fn create_raw(guest: &Guest, id: &str, spec: Vec<u8>) -> Result<(), Status> {
    let rootfs = Some(wire::Rootfs { lower: vec!["base".into()], upper_on: "scratch".into() });
    let request =
        wire::CreateContainerRequest { id: id.into(), spec, rootfs, ..Default::default() };
    guest.client().create_container(request).await.map(drop)
}

/// Everything below a directory, as paths, not into mounts of kernel file systems.
fn names_in(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_the_root_resolves_stays_in_it() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    let outside = [guest.root(), guest.root().join("etc"), guest.root().join("run/husk")];
    let outside: Vec<_> = outside.into_iter().filter(|path| path.exists()).collect();
    let before: Vec<_> = outside.iter().map(|path| names_in(path)).collect();
    let bind = |destination: &str| json!({"destination": destination, "type": "bind", "source": "/run/husk/volumes/v", "options": ["bind"]});
    let made = [
        ("/../../../../../husk-escaped", "/husk-escaped"),
        ("/links/up/../../../husk-climbed", "/husk-climbed"),
        ("/links/etc/husk-linked", "/etc/husk-linked"),
        ("/links/dangling/husk-deep", "/run/x/husk-deep"),
    ];
    let mut spec = with(&[
        (
            "/linux/devices/-",
            json!({"type": "c", "path": "/dev/../../../husk-null", "major": 1, "minor": 3}),
        ),
        ("/linux/maskedPaths", json!(["/../../../etc/passwd"])),
        ("/linux/readonlyPaths", json!(["/links/up/../tmp"])),
    ]);
    for (destination, _) in made {
        put(&mut spec, "/mounts/-", bind(destination));
    }
    let script = "for f in /husk-escaped /husk-climbed /etc/husk-linked /run/x/husk-deep; do cat $f/file; done; \
                  echo x > /husk-null && wc -c < /etc/passwd; sleep 1000";
    spec["process"]["args"] = json!(["sh", "-c", script]);
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("volume\nvolume\nvolume\nvolume\n0\n").await;
    // And so do archives, whatever the links say.
    for path in ["/links/up/group", "/../../../../etc/../links/up/../bin/../etc/group"] {
        let (archive, _) = out(&guest, "a", path).await.unwrap();
        let text = String::from_utf8_lossy(&archive).into_owned();
        assert!(text.contains("extra:x:44:w"), "{path}: {text}");
    }
    let file = || entry(tar::EntryType::Regular, "husk-brought", "", b"x");
    bring(&guest, "a", "/../../../links/up", file()).await.unwrap();
    let ls = guest.exec("a", "ls", exec_process(&["ls", "/etc/husk-brought"])).await.unwrap();
    assert_eq!(ls.stdout, "/etc/husk-brought\n");
    for (path, code) in [
        ("relative", Code::InvalidArgument),
        ("", Code::InvalidArgument),
        ("../etc", Code::InvalidArgument),
        ("/a\0b", Code::InvalidArgument),
        (&"/a".repeat(3000), Code::InvalidArgument),
        ("/no/such", Code::NotFound),
        ("/proc/1/root/etc", Code::NotFound),
    ] {
        let place = short(path);
        faults.check(out(&guest, "a", path).await.map(drop), code, "", &place);
        faults.check(bring(&guest, "a", path, file()).await.map(drop), code, "", &place);
    }
    let after: Vec<_> = outside.iter().map(|path| names_in(path)).collect();
    assert_eq!(before, after, "something is outside of the container");
    assert!(!Path::new("/husk-escaped").exists());
    faults.none();
}

/// Memory of the agent in KiB by a field of /proc/PID/status.
fn memory_kib(guest: &Guest, field: &str) -> u64 {
    let status = std::fs::read_to_string(guest.agent().join("status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn json_list(item: &str, count: usize) -> String {
    format!("[{}]", vec![item; count].join(","))
}

/// A document with `text` at the place of the string `@` in it.
fn document(spec: &Value, text: &str) -> Vec<u8> {
    serde_json::to_string(spec).unwrap().replacen("\"@\"", text, 1).into_bytes()
}

/// What becomes of a request.
enum Fate {
    /// Refused by this code and these words.
    Refused(Code, &'static str),
    /// It is a container, which is removed again.
    Made,
    /// Its program is not found, or cannot be executed, for this reason.
    NotStarted(&'static str),
}

/// Documents that fit into a message and are absurd all the same: where, what, and their fate.
fn absurd() -> Vec<(&'static str, String, Fate)> {
    use Fate::{Made, NotStarted, Refused};
    const BAD: Code = Code::InvalidArgument;
    let objects = |count: usize| -> String {
        let field = |index| format!("\"k{index}\":\"v\"");
        format!("{{{}}}", (0..count).map(field).collect::<Vec<_>>().join(","))
    };
    let mapping = r#"{"containerID":0,"hostID":1,"size":1}"#;
    let letters = format!("\"{}\"", "a".repeat(4_000_000));
    vec![
        // What costs the most memory for a byte.
        ("/annotations", json_list(r#"{"":0}"#, 570_000), Refused(BAD, "lists and objects")),
        ("/annotations", json_list("[0]", 900_000), Refused(BAD, "lists and objects")),
        ("/process/args", json_list("\"a\"", 1_000_000), Refused(BAD, "values")),
        ("/process/env", json_list("\"a=\"", 800_000), Refused(BAD, "values")),
        ("/annotations", objects(150_000), Made),
        ("/annotations", objects(270_000), Refused(BAD, "values")),
        ("/annotations", "[".repeat(4_000_000), Refused(BAD, "lists and objects")),
        ("/annotations", "[".repeat(60_000), Refused(BAD, "recursion")),
        ("/annotations", r#"{"a":"#.repeat(60_000), Refused(BAD, "recursion")),
        ("/annotations", letters.clone(), Refused(BAD, "`annotations`")),
        ("/process/args", json_list("\"true\"", 200_000), NotStarted("argument list too long")),
        ("/process/args", format!("[{letters}]"), NotStarted("executable file not found")),
        ("/process/args", format!("[\"true\",{letters}]"), NotStarted("argument list too long")),
        ("/process/env", json_list("\"a=\"", 250_000), NotStarted("executable file not found")),
        ("/process/cwd", letters.clone(), Refused(BAD, "`process.cwd`")),
        ("/process/cwd", format!("\"{}\"", "/a".repeat(1_900_000)), Refused(BAD, "`process.cwd`")),
        ("/hostname", letters.clone(), Refused(BAD, "`hostname`")),
        ("/ociVersion", letters.clone(), Refused(BAD, "`ociVersion`")),
        ("/process/user/additionalGids", json_list("7", 70_000), Refused(BAD, "additionalGids")),
        (
            "/process/rlimits",
            json_list(r#"{"type":"RLIMIT_CORE","soft":1,"hard":1}"#, 50_000),
            Refused(BAD, "`process.rlimits"),
        ),
        (
            "/process/capabilities",
            format!("{{\"bounding\":{}}}", json_list("\"CAP_KILL\"", 100_000)),
            Made,
        ),
        (
            "/mounts",
            json_list(r#"{"destination":"/a","type":"tmpfs"}"#, 60_000),
            Refused(BAD, "`mounts`"),
        ),
        (
            "/linux/namespaces",
            json_list(r#"{"type":"mount"}"#, 60_000),
            Refused(BAD, "`linux.namespaces"),
        ),
        (
            "/linux/devices",
            json_list(r#"{"type":"c","path":"/dev/x"}"#, 60_000),
            Refused(BAD, "`linux.devices`"),
        ),
        (
            "/linux/resources/devices",
            json_list(r#"{"allow":true,"access":"r"}"#, 60_000),
            Refused(BAD, "`linux.resources.devices`"),
        ),
        (
            "/linux/resources/hugepageLimits",
            json_list(r#"{"pageSize":"2MB","limit":1}"#, 60_000),
            Refused(BAD, "`linux.resources.hugepageLimits`"),
        ),
        ("/linux/resources/unified", objects(100_000), Refused(BAD, "`linux.resources.unified`")),
        ("/linux/sysctl", objects(100_000), Refused(BAD, "`linux.sysctl`")),
        ("/linux/maskedPaths", json_list("\"/a\"", 200_000), Refused(BAD, "`linux.maskedPaths`")),
        (
            "/linux/readonlyPaths",
            json_list("\"/a\"", 200_000),
            Refused(BAD, "`linux.readonlyPaths`"),
        ),
        ("/linux/uidMappings", json_list(mapping, 60_000), Refused(BAD, "`linux.uidMappings`")),
        (
            "/linux/seccomp",
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":{}}}"#,
                json_list(r#"{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}"#, 30_000)
            ),
            Refused(BAD, "`linux.seccomp.syscalls`"),
        ),
        (
            "/linux/seccomp",
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"action":"SCMP_ACT_ERRNO","names":{}}}]}}"#,
                json_list("\"mkdir\"", 200_000)
            ),
            Refused(BAD, "`linux.seccomp.syscalls`"),
        ),
        (
            "/linux/seccomp",
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","architectures":{}}}"#,
                json_list("\"SCMP_ARCH_X86\"", 200_000)
            ),
            Made,
        ),
        (
            "/hooks",
            format!(r#"{{"createContainer":{}}}"#, json_list(r#"{"path":"/x"}"#, 60_000)),
            Refused(BAD, "`hooks"),
        ),
        ("/unknown", objects(100_000), Refused(BAD, "not supported: `unknown`")),
    ]
}

#[tokio::test]
async fn a_document_of_absurd_size_is_refused_and_costs_a_bounded_memory() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    guest.run("warm", &["true"]).await;
    guest.delete("warm").await;
    let (before, left) = (memory_kib(&guest, "VmRSS"), guest.count_left());
    for (pointer, text, fate) in absurd() {
        let place = format!("{pointer} {}", short(&text));
        let mut spec = with(&[(pointer, json!("@"))]);
        spec["root"]["path"] = json!("/run/husk/containers/a/rootfs");
        let rootfs = Some(wire::Rootfs { lower: vec!["base".into()], upper_on: "scratch".into() });
        let spec = document(&spec, &text);
        let request =
            wire::CreateContainerRequest { id: "a".into(), spec, rootfs, ..Default::default() };
        let got = guest.client().create_container(request).await.map(|r| r.into_inner().result);
        use wire::create_container_response::Result::{Failure, Pid};
        match (fate, got) {
            (Fate::Made, Ok(Some(Pid(_)))) => guest.delete("a").await,
            (Fate::NotStarted(words), Ok(Some(Pid(_)))) => {
                // It is the kernel that says so, when it is started.
                let started = guest.try_start("a").await.unwrap();
                let message = started.err().map(|failure| failure.message).unwrap_or_default();
                if !message.contains(words) {
                    faults.0.push(format!("{place}: {message}"));
                }
            }
            (Fate::NotStarted(words), Ok(Some(Failure(failure)))) => {
                let message = failure.message;
                if !message.contains(words) || message.len() > 4096 {
                    faults.0.push(format!("{place}: {} bytes, {}", message.len(), short(&message)));
                }
            }
            (Fate::Refused(code, words), got) => {
                faults.check(got.map(drop), code, words, &place);
            }
            (_, got) => faults.0.push(format!("{place}: {}", short(&format!("{got:?}")))),
        }
        let peak = memory_kib(&guest, "VmHWM");
        if peak >= before + MAX_GROWTH_KIB {
            faults.0.push(format!("{place}: {before} KiB became {peak} KiB"));
        }
        for left in guest.list().await {
            faults.0.push(format!("{place}: {} is left", left.id));
            guest.delete(&left.id).await;
        }
    }
    assert_eq!(guest.count_left(), left);
    assert_eq!(guest.run("a", &["echo", "alive"]).await.stdout, "alive\n");
    faults.none();
}

#[tokio::test]
async fn a_message_of_absurd_size_is_refused_before_it_is_read() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    guest.start("main", base_spec(&["sleep", "1000"]), Options::default()).await;
    let before = memory_kib(&guest, "VmRSS");
    let huge = || vec![b' '; 100 << 20];
    let create = create_raw(&guest, "a", huge()).await;
    let process = wire::ExecProcessRequest {
        container_id: "main".into(),
        exec_id: "e".into(),
        process: huge(),
        stdio: None,
    };
    let exec = guest.client().exec_process(process).await.map(drop);
    let update = wire::UpdateContainerRequest { id: "main".into(), resources: huge() };
    let update = guest.client().update_container(update).await.map(drop);
    let file = wire::VolumeFile { path: "a".into(), content: huge(), mode: 0o644 };
    let files = Some(wire::Files { files: vec![file] });
    let volume = wire::UpdateVolumeRequest { name: "files".into(), files };
    let volume = guest.client().update_volume(volume).await.map(drop);
    let mut request = setup_request(None);
    request.hostname = "a".repeat(100 << 20);
    let setup = guest.client().setup_pod(request).await.map(drop);
    let id = wire::PauseContainerRequest { id: "a".repeat(100 << 20) };
    let pause = guest.client().pause_container(id).await.map(drop);
    let dial = wire::DialRequest { host: "a".repeat(100 << 20), ..wire::DialRequest::default() };
    let dial = guest.client().dial(dial).await.map(drop);
    for (place, got) in [
        ("create", create),
        ("exec", exec),
        ("update", update),
        ("volume", volume),
        ("setup", setup),
        ("pause", pause),
        ("dial", dial),
    ] {
        faults.check(got, Code::OutOfRange, "the limit is: 4194304 bytes", place);
    }
    let peak = memory_kib(&guest, "VmHWM");
    assert!(peak < before + 16 * 1024, "{before} KiB became {peak} KiB");
    guest.exec("main", "e", exec_process(&["true"])).await.unwrap();
    faults.none();
}

#[tokio::test]
async fn a_connection_to_nowhere_is_refused_by_the_fields_name() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    let before = guest.count_left();
    let good = || wire::DialRequest { port: 9, timeout_ms: 60_000, ..wire::DialRequest::default() };
    let hosts = evil_names().into_iter().filter(|name| !name.is_empty());
    let hosts = hosts.chain(["localhost", "127.0.0.1:9", "[::1]"].map(str::to_owned));
    let mut requests: Vec<_> =
        hosts.map(|host| (wire::DialRequest { host, ..good() }, "host: ")).collect();
    requests
        .extend([0, 65536, u32::MAX].map(|port| (wire::DialRequest { port, ..good() }, "port: ")));
    requests.extend(
        [0, 86_400_001, u64::MAX]
            .map(|timeout_ms| (wire::DialRequest { timeout_ms, ..good() }, "timeout_ms: ")),
    );
    for (request, words) in requests {
        let place = short(&format!("{request:?}"));
        let got = guest.client().dial(request).await.map(drop);
        faults.check(got, Code::InvalidArgument, words, &place);
    }
    assert_eq!(guest.count_left(), before);
    faults.none();
}

#[tokio::test]
async fn the_documents_of_execs_and_updates_have_the_same_bounds() {
    let mut faults = Faults::default();
    let guest = Guest::boot().await;
    guest.start("main", base_spec(&["sleep", "1000"]), Options::default()).await;
    let before = memory_kib(&guest, "VmRSS");
    for (text, words) in [
        (json_list(r#"{"":0}"#, 570_000), "lists and objects"),
        (json_list("0", 2_000_000), "values"),
        ("[".repeat(60_000), "recursion"),
        (format!("{{\"{}\":1}}", "a".repeat(4_000_000)), ""),
        ("\"a\\u0000\"".to_owned(), "NUL"),
        (String::new(), "JSON"),
    ] {
        let place = short(&text);
        let process = wire::ExecProcessRequest {
            container_id: "main".into(),
            exec_id: "e".into(),
            process: text.clone().into_bytes(),
            stdio: None,
        };
        let exec = guest.client().exec_process(process).await.map(drop);
        faults.check(exec, Code::InvalidArgument, words, &place);
        let resources = text.into_bytes();
        let update = wire::UpdateContainerRequest { id: "main".into(), resources };
        let update = guest.client().update_container(update).await.map(drop);
        faults.check(update, Code::InvalidArgument, words, &place);
        let peak = memory_kib(&guest, "VmHWM");
        assert!(peak < before + MAX_GROWTH_KIB, "{place}: {before} KiB became {peak} KiB");
    }
    guest.exec("main", "e", exec_process(&["true"])).await.unwrap();
    faults.none();
}

#[tokio::test]
async fn a_pod_of_absurd_size_is_refused_before_anything_is_made() {
    let mut faults = Faults::default();
    use wire::volume::Source;
    let filesystem = setup_request(None).filesystems.remove(1);
    let volume = |source| wire::Volume { name: "x".into(), source, mode: 0, fs_group: None };
    let tmpfs = volume(Some(Source::Tmpfs(wire::Tmpfs { size: 0 })));
    let file = |path: &str| wire::VolumeFile { path: path.into(), content: vec![], mode: 0 };
    let files = |files| vec![volume(Some(Source::Files(wire::Files { files })))];
    let base = || setup_request(None);
    let sysctl = |count: usize| (0..count).map(|n| (format!("net.x{n}"), "1".to_owned())).collect();
    let requests = [
        (
            wire::SetupPodRequest { filesystems: vec![filesystem; 5000], ..base() },
            "filesystems: 5000",
        ),
        (wire::SetupPodRequest { volumes: vec![tmpfs; 5000], ..base() }, "volumes: 5000"),
        (wire::SetupPodRequest { sysctls: sysctl(5000), ..base() }, "sysctls: 5000"),
        (
            wire::SetupPodRequest { volumes: files(vec![file("a"); 200_000]), ..base() },
            "files: 200000",
        ),
        (
            wire::SetupPodRequest { volumes: files(vec![file("../a")]), ..base() },
            "files.path: \"../a\"",
        ),
        (
            wire::SetupPodRequest { volumes: files(vec![file("a\0")]), ..base() },
            "files.path: \"a\\0\"",
        ),
        (wire::SetupPodRequest { hostname: "a".repeat(3 << 20), ..base() }, "hostname: "),
        (wire::SetupPodRequest { hostname: "a\0".into(), ..base() }, "hostname: "),
    ];
    for (request, words) in requests {
        let guest = Guest::boot_without_pod().await;
        let got = guest.client().setup_pod(request).await.map(drop);
        faults.check(got, Code::InvalidArgument, words, words);
        assert!(!guest.root().join("run/husk/volumes/x").exists(), "{words}");
        assert_eq!(guest.list().await, []);
    }
    faults.none();
}

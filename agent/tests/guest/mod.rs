//! A guest without a VM: the agent in namespaces of its own, and what stands for its host.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio as Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use husk_proto::agent::agent_client::AgentClient;
use husk_proto::agent::{self as wire, create_container_response};
use husk_proto::ports;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Nothing here depends on a time; this only ends what hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// The group that owns the volume.
pub(crate) const FS_GROUP: u32 = 1234;

pub(crate) type Client = AgentClient<Channel>;

/// Set if there are virtio disks with the serials `base` (erofs, holding what [`make_layer`] makes)
/// and `scratch` (an empty ext4): the pod then has these, and not directories. For one test at a
/// time.
fn real_disks() -> bool {
    std::env::var_os("HUSK_TEST_REAL_DISKS").is_some()
}

/// The agent: that of the build, or where it was put for a test on another machine.
fn agent_binary() -> String {
    let built = env!("CARGO_BIN_EXE_husk-agent").to_owned();
    std::env::var("HUSK_AGENT_BIN").unwrap_or(built)
}

/// A running agent with a pod that is set up: file systems `base` and `scratch`, a volume `v`.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
    process: Mutex<Child>,
    client: Option<Client>,
    next_port: AtomicU32,
    /// What waits for the ends of processes.
    follows: Mutex<JoinSet<()>>,
}

/// What a process gets.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) stdin: Option<Vec<u8>>,
    pub(crate) terminal: bool,
}

/// A program that has run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) exit: wire::ProcessExit,
}

/// The host's ends of a process's streams.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<Connection>,
    stdout: Connection,
    stderr: Option<Connection>,
    seen: Vec<u8>,
    end: watch::Sender<Ended>,
}

/// Once the process has ended: the ports to which there will be no connection, or None for all.
type Ended = Option<Option<Vec<u32>>>;

/// One stream, which the agent connects when it pleases.
#[derive(Debug)]
struct Connection {
    port: u32,
    listener: UnixListener,
    stream: Option<UnixStream>,
    end: watch::Receiver<Ended>,
}

impl Connection {
    /// The connection; None if there will be none.
    async fn open(&mut self) -> Option<&mut UnixStream> {
        if self.stream.is_none() {
            let ended = async {
                let ended = self.end.wait_for(Option::is_some).await;
                let unused = ended.ok().and_then(|ended| ended.clone().flatten());
                // One that is used was connected before the end was told.
                if !unused.is_none_or(|unused| unused.contains(&self.port)) {
                    std::future::pending::<()>().await;
                }
            };
            self.stream = tokio::select! {
                biased;
                accepted = self.listener.accept() => Some(accepted.unwrap().0),
                () = ended => None,
            };
        }
        self.stream.as_mut()
    }

    async fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self.open().await {
            Some(stream) => stream.read(buffer).await.unwrap(),
            None => 0,
        }
    }

    async fn read_to_end(&mut self, bytes: &mut Vec<u8>) {
        if let Some(stream) = self.open().await {
            stream.read_to_end(bytes).await.unwrap();
        }
    }
}

pub(crate) fn id(id: &str) -> wire::DeleteContainerRequest {
    wire::DeleteContainerRequest { id: id.into() }
}

pub(crate) fn start_id(id: &str) -> wire::StartContainerRequest {
    wire::StartContainerRequest { id: id.into() }
}

/// A `config.json` as an engine would make it for a container of a pod.
pub(crate) fn base_spec(args: &[&str]) -> Value {
    config(args, |_| ())
}

pub(crate) fn config(args: &[&str], change: impl FnOnce(&mut Value)) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin", "TERM=xterm"],
        },
        "root": {"path": "/run/husk/containers/a/rootfs"},
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts",
                  &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            {"destination": "/dev/shm", "type": "bind", "source": "/run/husk/shm",
             "options": ["rbind"]},
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    });
    change(&mut spec);
    spec
}

pub(crate) fn exec_request(
    id: &str,
    exec: &str,
    process: &Value,
    stdio: Option<wire::Stdio>,
) -> wire::ExecProcessRequest {
    wire::ExecProcessRequest {
        container_id: id.into(),
        exec_id: exec.into(),
        process: serde_json::to_vec(process).unwrap(),
        stdio,
    }
}

/// What a process's start came to: its process ID, or why its program cannot be executed.
pub(crate) type Started = Result<u32, wire::StartFailure>;

/// The first that is told of a process.
pub(crate) async fn first(
    mut events: tonic::Streaming<wire::ProcessEvent>,
) -> Result<Started, Status> {
    use wire::process_event::Event;
    match events.message().await?.and_then(|told| told.event).expect("an event") {
        Event::Started(pid) => Ok(Ok(pid)),
        Event::Failure(failure) => Ok(Err(failure)),
        Event::Exited(exit) => panic!("it ended before its start: {exit:?}"),
    }
}

/// The `process` of an exec.
pub(crate) fn exec_process(args: &[&str]) -> Value {
    json!({"args": args, "cwd": "/", "env": ["PATH=/bin"]})
}

/// Files of a volume: path, content, mode.
pub(crate) fn files(list: &[(&str, &str, u32)]) -> wire::Files {
    let file = |(path, content, mode): &(&str, &str, u32)| wire::VolumeFile {
        path: (*path).into(),
        content: content.as_bytes().to_vec(),
        mode: *mode,
    };
    wire::Files { files: list.iter().map(file).collect() }
}

pub(crate) fn setup_request(fs_group: Option<u32>) -> wire::SetupPodRequest {
    let filesystem = |name: &str, read_only| wire::Filesystem {
        name: name.into(),
        disk_serial: name.into(),
        fstype: if read_only && real_disks() { "erofs" } else { "ext4" }.into(),
        read_only,
    };
    wire::SetupPodRequest {
        hostname: "pod".into(),
        filesystems: vec![filesystem("base", true), filesystem("scratch", false)],
        volumes: vec![
            wire::Volume {
                name: "v".into(),
                source: Some(wire::volume::Source::DirectoryOn("scratch".into())),
                mode: 0o777,
                fs_group,
            },
            wire::Volume {
                name: "files".into(),
                source: Some(wire::volume::Source::Files(files(&[
                    ("a", "one\n", 0o644),
                    ("d/b", "two\n", 0o400),
                ]))),
                mode: 0o755,
                fs_group,
            },
        ],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        realtime_ns: 0,
        shm_size: 0,
        hosts: None,
        resolv_conf: String::new(),
    }
}

/// The layer of an image: a static busybox, and traps.
pub(crate) fn make_layer(base: &Path) {
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.exists(), "the tests need a static busybox (Debian: busybox-static)");
    for directory in ["bin", "etc", "links", "tmp", "proc", "dev", "sys"] {
        fs::create_dir_all(base.join(directory)).unwrap();
    }
    fs::copy(busybox, base.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox).arg("--list").output().unwrap();
    for name in String::from_utf8(applets.stdout).unwrap().lines().filter(|n| *n != "busybox") {
        symlink("busybox", base.join("bin").join(name)).unwrap();
    }
    fs::write(base.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nw:x:33:33::/var/www:\n")
        .unwrap();
    fs::write(base.join("etc/group"), "root:x:0:\nw:x:33:\nextra:x:44:w\n").unwrap();
    fs::write(base.join("bin/garbage"), [0x7f, b'E', b'L', b'F', 0, 1, 2, 3]).unwrap();
    fs::set_permissions(base.join("bin/garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../../../../etc", base.join("links/up")).unwrap();
    symlink("/etc", base.join("links/etc")).unwrap();
    symlink("/run/x", base.join("links/dangling")).unwrap();
}

/// A new cgroup of version 2 for an agent, with every controller that there is.
fn make_cgroup() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = mounts
        .lines()
        .find(|l| l.contains(" - cgroup2 "))
        .and_then(|l| l.split(' ').nth(4))
        .expect("cgroup v2 is not mounted");
    let root = Path::new(root);
    for controller in
        fs::read_to_string(root.join("cgroup.controllers")).unwrap().split_whitespace()
    {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = root.join(format!("husk-test-{}-{count}", std::process::id()));
    fs::create_dir(&path).unwrap();
    path
}

impl Guest {
    pub(crate) async fn boot() -> Self {
        let guest = Self::boot_without_pod().await;
        let request = setup_request(Some(FS_GROUP));
        let pod = guest.client().setup_pod(request).await.unwrap().into_inner();
        assert!(!pod.kernel_release.is_empty() && pod.init_ns <= pod.ready_ns);
        let volume = guest.volume();
        if let Ok(left_on_disk) = fs::read_dir(&volume) {
            for entry in left_on_disk {
                let path = entry.unwrap().path();
                fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path)).unwrap();
            }
        }
        fs::write(volume.join("file"), "volume\n").unwrap();
        guest
    }

    /// An agent that has not been asked for anything.
    pub(crate) async fn boot_without_pod() -> Self {
        let directory = tempfile::tempdir().unwrap();
        if !real_disks() {
            make_layer(&directory.path().join("disk-base"));
            fs::create_dir(directory.path().join("disk-scratch")).unwrap();
            fs::create_dir(directory.path().join("disk-late")).unwrap();
        }
        let control =
            UnixListener::bind(directory.path().join(ports::CONTROL.to_string())).unwrap();
        let cgroup = make_cgroup();
        // Only the agent itself may be in the cgroup that becomes the root of its namespace.
        let script = format!(
            "echo 0 > {}/cgroup.procs && exec unshare --cgroup {}",
            cgroup.display(),
            agent_binary()
        );
        // As the kernel starts it, whatever the one who runs the tests ignores.
        let process = Command::new("env")
            .args(["--default-signal", "unshare"])
            .args(["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"])
            .args(["sh", "-c", &script])
            .env("HUSK_AGENT_TEST_DIR", directory.path())
            .stdin(Output::null())
            .spawn()
            .unwrap();
        let (stream, _) =
            tokio::time::timeout(LIMIT, control.accept()).await.expect("the agent came").unwrap();
        let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
        let channel = Endpoint::from_static("http://agent")
            .connect_with_connector(tower::service_fn(move |_| {
                let stream = stream.take();
                async move { stream.ok_or(std::io::Error::other("it connects only once")) }
            }))
            .await
            .unwrap();
        Self {
            directory,
            cgroup,
            process: Mutex::new(process),
            client: Some(AgentClient::new(channel)),
            next_port: AtomicU32::new(ports::FIRST_STREAM),
            follows: Mutex::default(),
        }
    }

    /// Where the shares of its host are, by their numbers.
    pub(crate) fn shares(&self) -> PathBuf {
        self.directory.path().join("shares")
    }

    /// The agent's directory in /proc, as seen from outside.
    pub(crate) fn agent(&self) -> PathBuf {
        let agent = fs::read_to_string(self.cgroup.join("agent/cgroup.procs")).unwrap();
        PathBuf::from(format!("/proc/{}", agent.lines().next().unwrap()))
    }

    /// The agent's root directory, as seen from outside.
    pub(crate) fn root(&self) -> PathBuf {
        self.agent().join("root")
    }

    /// The directory of the volume `v`, as seen from outside.
    pub(crate) fn volume(&self) -> PathBuf {
        self.root().join("run/husk/volumes/v")
    }

    /// Where the writable layer of a container is, as seen from outside.
    pub(crate) fn layer(&self, id: &str) -> PathBuf {
        self.root().join("run/husk/fs/scratch/containers").join(id)
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone().unwrap()
    }

    pub(crate) fn listen(&self) -> (u32, UnixListener) {
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        (port, UnixListener::bind(self.directory.path().join(port.to_string())).unwrap())
    }

    /// Listens for the streams that `options` asks for.
    fn streams(&self, options: &Options) -> (wire::Stdio, Streams) {
        let end = watch::Sender::new(None);
        let listen = || {
            let (port, listener) = self.listen();
            Connection { port, listener, stream: None, end: end.subscribe() }
        };
        let stdin = (options.stdin.is_some() || options.terminal).then(listen);
        let stdout = listen();
        let stderr = (!options.terminal).then(listen);
        let port = |stream: &Option<Connection>| stream.as_ref().map_or(0, |stream| stream.port);
        let stdio = wire::Stdio {
            stdin_port: port(&stdin),
            stdout_port: stdout.port,
            stderr_port: port(&stderr),
        };
        (stdio, Streams { stdin, stdout, stderr, seen: Vec::new(), end })
    }

    /// Has the streams of a process end with it that were not connected by then.
    fn follow(&self, id: &str, exec: &str, streams: &Streams) {
        let request = wire::WaitProcessRequest { container_id: id.into(), exec_id: exec.into() };
        let (mut client, end) = (self.client(), streams.end.clone());
        self.follows.lock().unwrap().spawn(async move {
            let answer = client.wait_process(request).await;
            // A container that was deleted, or an agent that is gone, connects nothing more.
            let unused = answer.map(|answer| answer.into_inner().unused_ports);
            end.send_replace(Some(unused.ok()));
        });
    }

    pub(crate) async fn try_create(
        &self,
        id: &str,
        mut spec: Value,
        options: Options,
    ) -> Result<(wire::CreateContainerResponse, Streams), Status> {
        spec["root"]["path"] = json!(format!("/run/husk/containers/{id}/rootfs"));
        let (stdio, streams) = self.streams(&options);
        let request = wire::CreateContainerRequest {
            id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            rootfs: Some(wire::Rootfs { lower: vec!["base".into()], upper_on: "scratch".into() }),
            stdio: Some(stdio),
            devices: Vec::new(),
        };
        let response = self.client().create_container(request).await?.into_inner();
        self.follow(id, "", &streams);
        Ok((response, streams))
    }

    pub(crate) async fn create(&self, id: &str, spec: Value, options: Options) -> Streams {
        let (response, streams) = self.try_create(id, spec, options).await.unwrap();
        match response.result {
            Some(create_container_response::Result::Pid(pid)) => assert!(pid > 1),
            other => panic!("{other:?}"),
        }
        streams
    }

    pub(crate) async fn create_failure(&self, id: &str, spec: Value) -> wire::StartFailure {
        let (response, _) = self.try_create(id, spec, Options::default()).await.unwrap();
        match response.result {
            Some(create_container_response::Result::Failure(failure)) => failure,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn start(&self, id: &str, spec: Value, options: Options) -> Streams {
        let streams = self.create(id, spec, options).await;
        let started = self.try_start(id).await.unwrap();
        assert!(started.is_ok_and(|pid| pid > 1));
        streams
    }

    /// Starts the program of a created container: its process ID, or why it cannot be executed.
    pub(crate) async fn try_start(&self, id: &str) -> Result<Started, Status> {
        first(self.client().start_container(start_id(id)).await?.into_inner()).await
    }

    pub(crate) async fn run(&self, id: &str, args: &[&str]) -> Run {
        self.run_with(id, base_spec(args), Options::default()).await
    }

    pub(crate) async fn run_with(&self, id: &str, spec: Value, mut options: Options) -> Run {
        let stdin = options.stdin.take();
        if stdin.is_some() {
            options.stdin = Some(Vec::new());
        }
        let streams = self.start(id, spec, options).await;
        let (stdout, stderr) = streams.finish(stdin).await;
        Run { stdout, stderr, exit: self.wait(id, "").await }
    }

    async fn try_exec(
        &self,
        id: &str,
        exec: &str,
        process: Value,
        options: Options,
    ) -> Result<(Started, Streams), Status> {
        let (stdio, streams) = self.streams(&options);
        let request = exec_request(id, exec, &process, Some(stdio));
        let started = first(self.client().exec_process(request).await?.into_inner()).await?;
        self.follow(id, exec, &streams);
        Ok((started, streams))
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str, process: Value) -> Result<Run, Status> {
        let streams = self.start_exec(id, exec, process, Options::default()).await?;
        let (stdout, stderr) = streams.finish(None).await;
        Ok(Run { stdout, stderr, exit: self.wait(id, exec).await })
    }

    pub(crate) async fn start_exec(
        &self,
        id: &str,
        exec: &str,
        process: Value,
        options: Options,
    ) -> Result<Streams, Status> {
        let (started, streams) = self.try_exec(id, exec, process, options).await?;
        assert!(started.unwrap() > 1);
        Ok(streams)
    }

    pub(crate) async fn exec_failure(
        &self,
        id: &str,
        exec: &str,
        process: Value,
    ) -> wire::StartFailure {
        self.try_exec(id, exec, process, Options::default()).await.unwrap().0.unwrap_err()
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> wire::ProcessExit {
        let request = wire::WaitProcessRequest { container_id: id.into(), exec_id: exec.into() };
        let mut client = self.client();
        let answer = tokio::time::timeout(LIMIT, client.wait_process(request)).await;
        answer.expect("the process ended").unwrap().into_inner()
    }

    pub(crate) async fn signal(&self, id: &str, exec: &str, signal: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (id.into(), exec.into());
        let request = wire::SignalProcessRequest { container_id, exec_id, signal, all: false };
        self.client().signal_process(request).await.map(|_| ())
    }

    pub(crate) async fn signal_all(&self, id: &str, signal: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (id.into(), String::new());
        let request = wire::SignalProcessRequest { container_id, exec_id, signal, all: true };
        self.client().signal_process(request).await.map(|_| ())
    }

    pub(crate) async fn resize(&self, id: &str, width: u32, height: u32) -> Result<(), Status> {
        let (container_id, exec_id) = (id.into(), String::new());
        let request = wire::ResizeTerminalRequest { container_id, exec_id, width, height };
        self.client().resize_terminal(request).await.map(|_| ())
    }

    pub(crate) async fn delete(&self, name: &str) {
        self.client().delete_container(id(name)).await.unwrap();
    }

    pub(crate) async fn list(&self) -> Vec<wire::Container> {
        let request = wire::ListContainersRequest {};
        self.client().list_containers(request).await.unwrap().into_inner().containers
    }

    pub(crate) async fn stats(&self) -> wire::StatsResponse {
        self.client().stats(wire::StatsRequest {}).await.unwrap().into_inner()
    }

    /// What the kernel thinks of the agent when memory runs out.
    pub(crate) fn agent_oom_score_adj(&self) -> String {
        let agent = fs::read_to_string(self.cgroup.join("agent/cgroup.procs")).unwrap();
        let path = format!("/proc/{}/oom_score_adj", agent.lines().next().unwrap());
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// Closes the control connection.
    pub(crate) fn hang_up(&mut self) {
        self.follows.lock().unwrap().abort_all();
        self.client = None;
    }

    /// Waits for the agent's end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let wait = async {
            loop {
                if let Some(status) = self.process.lock().unwrap().try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.expect("the agent ended")
    }

    /// The places where a container leaves something: its writable layer, its cgroup, its directory.
    fn places(&self) -> [PathBuf; 3] {
        [
            self.root().join("run/husk/fs/scratch/containers"),
            self.cgroup.join("husk"),
            self.root().join("run/husk/containers"),
        ]
    }

    pub(crate) fn nothing_left(&self, id: &str) -> bool {
        self.places().iter().all(|place| !place.join(id).exists())
    }

    /// Directories in these places, processes in the cgroup, and mounts and descriptors of the
    /// agent.
    pub(crate) fn count_left(&self) -> [usize; 4] {
        // The agent lets go of some things only after it has answered.
        loop {
            let before = self.count_once();
            std::thread::sleep(Duration::from_millis(50));
            if self.count_once() == before && self.discarded_layers() == 0 {
                return before;
            }
        }
    }

    /// Layers of deleted containers that the agent has not emptied yet.
    fn discarded_layers(&self) -> usize {
        let place = self.root().join("run/husk/fs/scratch/discarded");
        fs::read_dir(place).map_or(0, Iterator::count)
    }

    fn count_once(&self) -> [usize; 4] {
        let entries = |path: &Path| {
            fs::read_dir(path).map_or(0, |d| {
                d.filter(|e| e.as_ref().unwrap().file_type().unwrap().is_dir()).count()
            })
        };
        let agent = fs::read_to_string(self.cgroup.join("agent/cgroup.procs")).unwrap();
        let first = agent.lines().next().unwrap();
        [
            self.places().iter().map(|p| entries(p)).sum(),
            agent.lines().count(),
            fs::read_to_string(format!("/proc/{first}/mountinfo")).unwrap().lines().count(),
            fs::read_dir(format!("/proc/{first}/fd")).unwrap().count(),
        ]
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut process = self.process.lock().unwrap();
        // It may have ended by itself.
        process.kill().ok();
        process.wait().unwrap();
        fs::write(self.cgroup.join("cgroup.kill"), "1").unwrap();
        for _ in 0..500 {
            if remove_cgroups(&self.cgroup).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left", self.cgroup.display());
    }
}

fn remove_cgroups(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

impl Streams {
    /// Writes all input, and reads all output.
    pub(crate) async fn finish(mut self, stdin: Option<Vec<u8>>) -> (String, String) {
        let input = self.stdin.take();
        let feed = async move {
            if let (Some(mut input), Some(bytes)) = (input, stdin) {
                let socket = input.open().await.expect("the input is connected");
                socket.write_all(&bytes).await.unwrap();
                socket.shutdown().await.unwrap();
            }
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let stderr = self.stderr.take();
        let read_err = async {
            if let Some(mut stderr) = stderr {
                stderr.read_to_end(&mut err).await;
            }
        };
        let all = async { tokio::join!(feed, self.stdout.read_to_end(&mut out), read_err) };
        tokio::time::timeout(LIMIT, all).await.expect("the output ended");
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        let input = self.stdin.as_mut().unwrap().open().await.expect("the input is connected");
        input.write_all(bytes).await.unwrap();
    }

    /// Reads until the output contains `text`.
    pub(crate) async fn read_until(&mut self, text: &str) {
        let read = async {
            while !String::from_utf8_lossy(&self.seen).contains(text) {
                let mut buffer = [0; 256];
                let count = self.stdout.read(&mut buffer).await;
                assert!(count > 0, "{:?}", String::from_utf8_lossy(&self.seen));
                self.seen.extend(&buffer[..count]);
            }
        };
        tokio::time::timeout(LIMIT, read).await.expect("the text came");
    }

    /// What has been read so far.
    pub(crate) fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Everything that came on the standard output.
    pub(crate) async fn rest(mut self) -> String {
        self.stdout.read_to_end(&mut self.seen).await;
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Counts the rest of the standard output.
    pub(crate) async fn drain_output(mut self) -> usize {
        let mut buffer = vec![0; 1 << 16];
        let mut total = 0;
        loop {
            match self.stdout.read(&mut buffer).await {
                0 => return total,
                count => total += count,
            }
        }
    }
}

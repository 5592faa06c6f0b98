//! Stands in for `husk-vmm`, with a guest and its agent, in tests that need no KVM: it speaks both
//! protocols, and runs containers as processes of this host, in no isolation at all. What it is not
//! for: anything else.
//!
//! A container whose first argument is `fake:die` kills the "VM", `fake:panic` panics its "kernel". A
//! volume does not take files of which one is `fake:refuse`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::collections::HashMap;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use husk_proto::agent as proto;
use husk_proto::agent::agent_server::{Agent, AgentServer};
use husk_proto::ports;
use husk_vmm_api::{Channel, Event, Exit, FdIndex, Phase, Request as VmmRequest};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
struct Fake {
    vmm: Arc<Channel>,
    containers: Arc<Mutex<HashMap<String, Process>>>,
    /// Processes beside the containers' own, by container and exec.
    execs: Arc<Mutex<HashMap<(String, String), Process>>>,
}

struct Process {
    command: Option<Command>,
    running: Option<(u32, End)>,
}

/// The end of a process, once there is one.
type End = watch::Receiver<Option<proto::ProcessExit>>;

type Answers<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Follows a process to its end.
fn follow(mut child: Child) -> (u32, End) {
    let pid = child.id().unwrap();
    let (tell, end) = watch::channel(None);
    tokio::spawn(async move {
        let status = child.wait().await.unwrap();
        let signal = status.signal().unwrap_or(0);
        let since_epoch = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        tell.send_replace(Some(proto::ProcessExit {
            exit_code: u32::try_from(status.code().unwrap_or(128 + signal)).unwrap(),
            signal: u32::try_from(signal).unwrap(),
            oom_killed: false,
            exited_at_ns: u64::try_from(since_epoch.as_nanos()).unwrap(),
            // It connects all of them.
            unused_ports: Vec::new(),
        }));
    });
    (pid, end)
}

async fn told(mut end: End) -> proto::ProcessExit {
    end.wait_for(Option::is_some).await.unwrap().clone().unwrap()
}

/// What becomes of a process.
fn events((pid, end): (u32, End)) -> Answers<proto::ProcessEvent> {
    use proto::process_event::Event::{Exited, Started};
    let event = |event| Ok(proto::ProcessEvent { event: Some(event) });
    let exit = tokio_stream::once(end).then(|end| async { Exited(told(end).await) });
    Box::pin(tokio_stream::once(Started(pid)).chain(exit).map(event))
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

impl Fake {
    /// The guest connects to a port of the host.
    fn connect(&self, port: u32) -> UnixStream {
        let (guest, host) = UnixStream::pair().unwrap();
        let event = Event::VsockAccepted { port, guest_port: 1, fd: FdIndex(0) };
        self.vmm.send(&event, &[host.as_fd()]).unwrap();
        guest
    }

    fn stream(&self, port: u32) -> Stdio {
        if port == 0 { Stdio::null() } else { OwnedFd::from(self.connect(port)).into() }
    }

    /// The command of an OCI `process`, with its streams connected.
    fn command(&self, process: &serde_json::Value, stdio: proto::Stdio) -> Command {
        let args = strings(&process["args"]);
        let mut command = Command::new(&args[0]);
        command.args(&args[1..]).env_clear();
        for variable in strings(&process["env"]) {
            let (name, value) = variable.split_once('=').unwrap();
            command.env(name, value);
        }
        command
            .stdin(self.stream(stdio.stdin_port))
            .stdout(self.stream(stdio.stdout_port))
            .stderr(self.stream(stdio.stderr_port));
        command
    }

    /// The process of a container, or one beside it: its process ID, and its end.
    fn running(&self, container: String, exec: String) -> Result<(u32, End), Status> {
        let running = if exec.is_empty() {
            self.containers.lock().unwrap().get(&container).and_then(|one| one.running.clone())
        } else {
            self.execs.lock().unwrap().get(&(container, exec)).and_then(|one| one.running.clone())
        };
        running.ok_or_else(|| Status::not_found("no such process"))
    }

    fn pid(&self, container: String, exec: String) -> Result<u32, Status> {
        Ok(self.running(container, exec)?.0)
    }

    async fn kill(&self, pid: u32, signal: &str) {
        Command::new("kill").arg(signal).arg(pid.to_string()).status().await.unwrap();
    }

    fn exit(&self, exit: &Exit) -> ! {
        self.vmm.send(&Event::Exited(exit.clone()), &[]).unwrap();
        std::process::exit(exit.code());
    }
}

fn strings(value: &serde_json::Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}

#[tonic::async_trait]
impl Agent for Fake {
    async fn setup_pod(
        &self,
        _: Request<proto::SetupPodRequest>,
    ) -> Answer<proto::SetupPodResponse> {
        let kernel_release = "0.0.0-fake".into();
        Ok(Response::new(proto::SetupPodResponse { kernel_release, init_ns: 1, ready_ns: 2 }))
    }

    async fn update_network(
        &self,
        _: Request<proto::UpdateNetworkRequest>,
    ) -> Answer<proto::UpdateNetworkResponse> {
        Ok(Response::new(proto::UpdateNetworkResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Answer<proto::CreateContainerResponse> {
        use proto::create_container_response::Result::{Failure, Pid};
        let request = request.into_inner();
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        let args = strings(&spec["process"]["args"]);
        match args[0].as_str() {
            "fake:die" => std::process::abort(),
            "fake:panic" => self.exit(&Exit::Panic { log_tail: "Kernel panic - fake".into() }),
            program if program.starts_with('/') && !std::path::Path::new(program).exists() => {
                let message = format!("exec: {program:?}: no such file or directory");
                let failure = proto::StartFailure { exit_code: 127, message };
                let result = Some(Failure(failure));
                return Ok(Response::new(proto::CreateContainerResponse { result }));
            }
            _ => {}
        }
        let command = self.command(&spec["process"], request.stdio.unwrap());
        let container = Process { command: Some(command), running: None };
        self.containers.lock().unwrap().insert(request.id, container);
        Ok(Response::new(proto::CreateContainerResponse { result: Some(Pid(1)) }))
    }

    type StartContainerStream = Answers<proto::ProcessEvent>;

    async fn start_container(
        &self,
        request: Request<proto::StartContainerRequest>,
    ) -> Answer<Self::StartContainerStream> {
        let mut containers = self.containers.lock().unwrap();
        let container = containers.get_mut(&request.into_inner().id).unwrap();
        let running = follow(container.command.take().unwrap().spawn().unwrap());
        container.running = Some(running.clone());
        Ok(Response::new(events(running)))
    }

    type ExecProcessStream = Answers<proto::ProcessEvent>;

    async fn exec_process(
        &self,
        request: Request<proto::ExecProcessRequest>,
    ) -> Answer<Self::ExecProcessStream> {
        use proto::process_event::Event::Failure;
        let request = request.into_inner();
        self.pid(request.container_id.clone(), String::new())?;
        let process: serde_json::Value = serde_json::from_slice(&request.process).unwrap();
        let mut command = self.command(&process, request.stdio.unwrap());
        let Ok(child) = command.spawn() else {
            let message =
                format!("exec: {}: executable file not found in $PATH", process["args"][0]);
            let failure = Failure(proto::StartFailure { exit_code: 127, message });
            let event = proto::ProcessEvent { event: Some(failure) };
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(event)))));
        };
        let running = follow(child);
        let exec = Process { command: None, running: Some(running.clone()) };
        self.execs.lock().unwrap().insert((request.container_id, request.exec_id), exec);
        Ok(Response::new(events(running)))
    }

    async fn wait_process(
        &self,
        request: Request<proto::WaitProcessRequest>,
    ) -> Answer<proto::ProcessExit> {
        let proto::WaitProcessRequest { container_id: id, exec_id: exec } = request.into_inner();
        Ok(Response::new(told(self.running(id, exec)?.1).await))
    }

    async fn signal_process(
        &self,
        request: Request<proto::SignalProcessRequest>,
    ) -> Answer<proto::SignalProcessResponse> {
        let request = request.into_inner();
        let pid = self.pid(request.container_id, request.exec_id)?;
        self.kill(pid, &format!("-{}", request.signal)).await;
        Ok(Response::new(proto::SignalProcessResponse {}))
    }

    async fn resize_terminal(
        &self,
        _: Request<proto::ResizeTerminalRequest>,
    ) -> Answer<proto::ResizeTerminalResponse> {
        // There is none whose size could be told.
        Ok(Response::new(proto::ResizeTerminalResponse {}))
    }

    async fn delete_container(
        &self,
        request: Request<proto::DeleteContainerRequest>,
    ) -> Answer<proto::DeleteContainerResponse> {
        self.containers.lock().unwrap().remove(&request.into_inner().id);
        Ok(Response::new(proto::DeleteContainerResponse {}))
    }

    async fn list_containers(
        &self,
        _: Request<proto::ListContainersRequest>,
    ) -> Answer<proto::ListContainersResponse> {
        Err(Status::unimplemented("lists"))
    }

    async fn stats(&self, _: Request<proto::StatsRequest>) -> Answer<proto::StatsResponse> {
        let known = self.containers.lock().unwrap();
        let containers = known.keys().map(|id| proto::ContainerStats {
            id: id.clone(),
            cpu_usage_us: now() / 4000,
            memory_current: 3 << 20,
            memory_limit: Some(64 << 20),
            pids: 2,
            io_read_bytes: 4096,
            ..Default::default()
        });
        Ok(Response::new(proto::StatsResponse {
            agent_rss: 1 << 20,
            memory_total: 128 << 20,
            memory_available: 64 << 20,
            containers: containers.collect(),
            interfaces: vec![proto::InterfaceStats {
                name: "eth0".into(),
                rx_bytes: 1 << 10,
                tx_bytes: 2 << 10,
                ..Default::default()
            }],
            at_ns: now(),
        }))
    }

    async fn pause_container(
        &self,
        request: Request<proto::PauseContainerRequest>,
    ) -> Answer<proto::PauseContainerResponse> {
        let pid = self.pid(request.into_inner().id, String::new())?;
        self.kill(pid, "-STOP").await;
        Ok(Response::new(proto::PauseContainerResponse {}))
    }

    async fn resume_container(
        &self,
        request: Request<proto::ResumeContainerRequest>,
    ) -> Answer<proto::ResumeContainerResponse> {
        let pid = self.pid(request.into_inner().id, String::new())?;
        self.kill(pid, "-CONT").await;
        Ok(Response::new(proto::ResumeContainerResponse {}))
    }

    async fn update_container(
        &self,
        _: Request<proto::UpdateContainerRequest>,
    ) -> Answer<proto::UpdateContainerResponse> {
        Err(Status::unimplemented("update"))
    }

    async fn list_processes(
        &self,
        request: Request<proto::ListProcessesRequest>,
    ) -> Answer<proto::ListProcessesResponse> {
        let pid = self.pid(request.into_inner().container_id, String::new())?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let process = proto::ProcessInfo {
            pid,
            ppid: 1,
            uid: 0,
            state: "S".into(),
            cpu_us: 61_000_000,
            rss: 2 << 20,
            started_at_ns: 1_000_000_000,
            command: String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned(),
        };
        Ok(Response::new(proto::ListProcessesResponse { processes: vec![process] }))
    }

    type KernelLogStream = Answers<proto::KernelLogRecords>;

    async fn kernel_log(
        &self,
        request: Request<proto::KernelLogRequest>,
    ) -> Answer<Self::KernelLogStream> {
        let record = |lost, at_us, text: &str| proto::KernelLogRecord {
            lost,
            level: 6,
            facility: 0,
            at_us,
            text: text.into(),
        };
        let records = vec![
            record(0, 0, "Linux version 0.0.0-fake"),
            record(7, 1_650_695, "two\nlines \u{e4}\u{9b}\x1b[31m\t."),
        ];
        let all = tokio_stream::once(Ok(proto::KernelLogRecords { records }));
        if request.into_inner().follow {
            Ok(Response::new(Box::pin(all.chain(tokio_stream::pending()))))
        } else {
            Ok(Response::new(Box::pin(all)))
        }
    }

    type WatchEventsStream = tokio_stream::Pending<Result<proto::AgentEvent, Status>>;

    async fn watch_events(
        &self,
        _: Request<proto::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        Ok(Response::new(tokio_stream::pending()))
    }

    async fn dial(&self, _: Request<proto::DialRequest>) -> Answer<proto::DialResponse> {
        Err(Status::unimplemented("connections"))
    }

    async fn read_file(
        &self,
        _: Request<proto::ReadFileRequest>,
    ) -> Answer<proto::ReadFileResponse> {
        Err(Status::not_found("there are no files"))
    }

    async fn add_filesystem(
        &self,
        _: Request<proto::AddFilesystemRequest>,
    ) -> Answer<proto::AddFilesystemResponse> {
        Err(Status::unimplemented("disks"))
    }

    async fn remove_filesystem(
        &self,
        _: Request<proto::RemoveFilesystemRequest>,
    ) -> Answer<proto::RemoveFilesystemResponse> {
        Err(Status::unimplemented("disks"))
    }

    async fn update_volume(
        &self,
        request: Request<proto::UpdateVolumeRequest>,
    ) -> Answer<proto::UpdateVolumeResponse> {
        let proto::UpdateVolumeRequest { name, files } = request.into_inner();
        if files.unwrap().files.iter().any(|file| file.content == b"fake:refuse") {
            return Err(Status::internal(format!("volume {name:?} is full")));
        }
        Ok(Response::new(proto::UpdateVolumeResponse {}))
    }

    /// By this host's tar: paths are this host's.
    async fn copy_out(
        &self,
        request: Request<proto::CopyOutRequest>,
    ) -> Answer<proto::CopyOutResponse> {
        let proto::CopyOutRequest { container_id: _, path, port } = request.into_inner();
        let path = std::path::Path::new(&path);
        if !path.exists() {
            return Err(Status::not_found(format!("{}: no such file", path.display())));
        }
        let status = Command::new("tar")
            .arg("-cC")
            .arg(path.parent().unwrap())
            .arg(path.file_name().unwrap())
            .stdout(OwnedFd::from(self.connect(port)))
            .status()
            .await
            .unwrap();
        assert!(status.success());
        Ok(Response::new(proto::CopyOutResponse { bytes: 0 }))
    }

    async fn copy_in(
        &self,
        request: Request<proto::CopyInRequest>,
    ) -> Answer<proto::CopyInResponse> {
        let proto::CopyInRequest { container_id: _, path, port } = request.into_inner();
        if !std::path::Path::new(&path).is_dir() {
            return Err(Status::not_found(format!("{path}: no such directory")));
        }
        let stdin = OwnedFd::from(self.connect(port));
        let status = Command::new("tar").arg("-xC").arg(&path).stdin(stdin).status().await.unwrap();
        assert!(status.success());
        Ok(Response::new(proto::CopyInResponse { bytes: 0 }))
    }

    async fn shutdown(
        &self,
        _: Request<proto::ShutdownRequest>,
    ) -> Answer<proto::ShutdownResponse> {
        let fake = self.clone();
        tokio::spawn(async move {
            // After the answer.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            fake.exit(&Exit::PowerOff);
        });
        Ok(Response::new(proto::ShutdownResponse {}))
    }
}

fn main() {
    // SAFETY: the parent gave descriptor 3 to this process, and nothing else here owns it.
    let control = unsafe { OwnedFd::from_raw_fd(3) };
    let vmm = Arc::new(Channel::from_fd(control));
    let first = vmm.receive::<VmmRequest>().unwrap();
    let Some(VmmRequest::Boot(_)) = first.map(|first| first.message) else { return };
    for phase in [Phase::VmmStarted, Phase::Kvm, Phase::Memory, Phase::Init, Phase::AgentReady] {
        vmm.send(&Event::Phase { phase, at_ns: now() }, &[]).unwrap();
    }
    let fake = Fake { vmm: vmm.clone(), containers: Arc::default(), execs: Arc::default() };
    let served = fake.clone();
    std::thread::spawn(move || {
        tokio::runtime::Runtime::new().unwrap().block_on(async move {
            let control = served.connect(ports::CONTROL);
            control.set_nonblocking(true).unwrap();
            let control = tokio::net::UnixStream::from_std(control).unwrap();
            // One connection, and no end of waiting for another.
            let connections = tokio_stream::StreamExt::chain(
                tokio_stream::once(Ok::<_, std::io::Error>(control)),
                tokio_stream::pending(),
            );
            tonic::transport::Server::builder()
                .add_service(AgentServer::new(served))
                .serve_with_incoming(connections)
                .await
                .unwrap();
        });
    });
    loop {
        match vmm.receive::<VmmRequest>().unwrap().map(|request| request.message) {
            Some(VmmRequest::Counters) => {
                vmm.send(&Event::Counters(Box::default()), &[]).unwrap();
            }
            Some(VmmRequest::Stop) => fake.exit(&Exit::Stopped),
            Some(_) => {}
            None => std::process::exit(0),
        }
    }
}

//! Stands in for `husk-vmm`, with a guest and its agent, in tests that need no KVM: it speaks both
//! protocols, and runs containers as processes of this host, in no isolation at all. What it is not
//! for: anything else.
//!
//! A container whose first argument is `fake:die` kills the "VM", `fake:panic` panics its "kernel".
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
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
struct Fake {
    vmm: Arc<Channel>,
    containers: Arc<Mutex<HashMap<String, Container>>>,
}

struct Container {
    command: Option<Command>,
    child: Option<Child>,
    pid: Option<u32>,
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

    fn exit(&self, exit: &Exit) -> ! {
        self.vmm.send(&Event::Exited(exit.clone()), &[]).unwrap();
        std::process::exit(exit.code());
    }
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

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Answer<proto::CreateContainerResponse> {
        use proto::create_container_response::Result::{Failure, Pid};
        let request = request.into_inner();
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        let strings = |value: &serde_json::Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
        };
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
        let stdio = request.stdio.unwrap();
        let mut command = Command::new(&args[0]);
        command.args(&args[1..]).env_clear();
        for variable in strings(&spec["process"]["env"]) {
            let (name, value) = variable.split_once('=').unwrap();
            command.env(name, value);
        }
        command
            .stdin(self.stream(stdio.stdin_port))
            .stdout(self.stream(stdio.stdout_port))
            .stderr(self.stream(stdio.stderr_port));
        let container = Container { command: Some(command), child: None, pid: None };
        self.containers.lock().unwrap().insert(request.id, container);
        Ok(Response::new(proto::CreateContainerResponse { result: Some(Pid(1)) }))
    }

    async fn start_container(
        &self,
        request: Request<proto::StartContainerRequest>,
    ) -> Answer<proto::StartContainerResponse> {
        let mut containers = self.containers.lock().unwrap();
        let container = containers.get_mut(&request.into_inner().id).unwrap();
        let child = container.command.take().unwrap().spawn().unwrap();
        container.pid = child.id();
        container.child = Some(child);
        Ok(Response::new(proto::StartContainerResponse { failure: None }))
    }

    async fn exec_process(
        &self,
        _: Request<proto::ExecProcessRequest>,
    ) -> Answer<proto::ExecProcessResponse> {
        Err(Status::unimplemented("exec"))
    }

    async fn wait_process(
        &self,
        request: Request<proto::WaitProcessRequest>,
    ) -> Answer<proto::WaitProcessResponse> {
        let id = request.into_inner().container_id;
        let child = self.containers.lock().unwrap().get_mut(&id).unwrap().child.take();
        let status = child.unwrap().wait().await.unwrap();
        let signal = status.signal().unwrap_or(0);
        let exit_code = u32::try_from(status.code().unwrap_or(128 + signal)).unwrap();
        let since_epoch = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        Ok(Response::new(proto::WaitProcessResponse {
            exit_code,
            signal: u32::try_from(signal).unwrap(),
            oom_killed: false,
            exited_at_ns: u64::try_from(since_epoch.as_nanos()).unwrap(),
        }))
    }

    async fn signal_process(
        &self,
        request: Request<proto::SignalProcessRequest>,
    ) -> Answer<proto::SignalProcessResponse> {
        let request = request.into_inner();
        let pid = self.containers.lock().unwrap().get(&request.container_id).and_then(|c| c.pid);
        let pid = pid.ok_or_else(|| Status::not_found("no such process"))?;
        let signal = format!("-{}", request.signal);
        Command::new("kill").arg(signal).arg(pid.to_string()).status().await.unwrap();
        Ok(Response::new(proto::SignalProcessResponse {}))
    }

    async fn resize_terminal(
        &self,
        _: Request<proto::ResizeTerminalRequest>,
    ) -> Answer<proto::ResizeTerminalResponse> {
        Err(Status::unimplemented("terminals"))
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
        Ok(Response::new(proto::StatsResponse { agent_rss: 1 << 20, ..Default::default() }))
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
    let fake = Fake { vmm: vmm.clone(), containers: Arc::default() };
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

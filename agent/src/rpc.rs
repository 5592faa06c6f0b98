//! The gRPC service: requests in, statuses out, nothing else.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use husk_proto::agent as wire;
use husk_proto::agent::agent_server::{Agent as Service, AgentServer};
use tokio::sync::Notify;
use tonic::{Code, Request, Response, Status};

use crate::container::{ContainerError, Runner, StartFailure};
use crate::host::Host;
use crate::pod::{self, PodError, PodInfo};
use crate::reaper::Reaper;
use crate::{chain, lock, storage};

/// Where the pod is in its life.
#[derive(Debug, Clone)]
enum Pod {
    /// Nothing has been asked for.
    New,
    /// Its world is being made.
    SettingUp,
    /// Its world is there.
    Ready(Arc<PodInfo>),
    /// Its world could not be made, or is gone.
    Over,
}

/// When the agent came to life, ns of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    init_ns: u64,
    ready_ns: u64,
}

/// The service.
#[derive(Clone)]
pub(crate) struct Agent {
    host: Host,
    runner: Runner,
    pod: Arc<Mutex<Pod>>,
    times: Arc<Mutex<Times>>,
    shutdown: Arc<Notify>,
}

impl Agent {
    /// The service of an agent whose first instruction ran at `init_ns`.
    ///
    /// # Errors
    /// If /proc is not there.
    pub(crate) fn new(host: Host, reaper: Reaper, init_ns: u64) -> std::io::Result<Self> {
        Ok(Self {
            runner: Runner::new(host.transport(), reaper)?,
            host,
            pod: Arc::new(Mutex::new(Pod::New)),
            times: Arc::new(Mutex::new(Times { init_ns, ready_ns: 0 })),
            shutdown: Arc::default(),
        })
    }

    /// Notes when the agent became ready.
    pub(crate) fn mark_ready(&self, ready_ns: u64) {
        lock(&self.times).ready_ns = ready_ns;
    }

    /// Is notified when a client has asked for the end.
    pub(crate) fn shutdown_requested(&self) -> Arc<Notify> {
        Arc::clone(&self.shutdown)
    }

    /// As a service for a connection.
    pub(crate) fn into_service(self) -> AgentServer<Self> {
        AgentServer::new(self)
    }

    fn ready_pod(&self) -> Result<Arc<PodInfo>, ContainerError> {
        match &*lock(&self.pod) {
            Pod::Ready(info) => Ok(Arc::clone(info)),
            Pod::New | Pod::SettingUp | Pod::Over => Err(ContainerError::NoPod),
        }
    }

    async fn set_up(
        &self,
        request: wire::SetupPodRequest,
    ) -> Result<wire::SetupPodResponse, Status> {
        {
            let mut pod = lock(&self.pod);
            if !matches!(*pod, Pod::New) {
                return Err(Status::failed_precondition("the pod has been set up before"));
            }
            *pod = Pod::SettingUp;
        }
        let result = pod::set_up(&self.host, &request).await;
        *lock(&self.pod) = match &result {
            Ok(info) => Pod::Ready(Arc::new(info.clone())),
            Err(_) => Pod::Over,
        };
        result.map_err(|e| pod_status(&e))?;
        let Times { init_ns, ready_ns } = *lock(&self.times);
        let release = rustix::system::uname();
        let kernel_release = release.release().to_string_lossy().into_owned();
        Ok(wire::SetupPodResponse { kernel_release, init_ns, ready_ns })
    }

    async fn shut_down(&self) -> Result<(), Status> {
        *lock(&self.pod) = Pod::Over;
        self.runner.kill_all().await;
        // In a process of its own: writing back a disk can take long.
        if let Err(error) = self.runner.in_child("unmount", storage::unmount_all).await {
            // The VM ends all the same: nobody could do better.
            tracing::error!(error = chain(&error), "the pod's disks may not be clean");
        }
        self.shutdown.notify_one();
        Ok(())
    }
}

/// Runs a request to its end even if its client goes away: half of a create helps nobody.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::spawn(work).await {
        Ok(result) => result.map(Response::new),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

fn pod_status(error: &PodError) -> Status {
    let code = if error.is_invalid() { Code::InvalidArgument } else { Code::Internal };
    Status::new(code, chain(error))
}

fn container_status(error: &ContainerError) -> Status {
    use ContainerError as E;
    let code = match error {
        E::Name { .. } | E::Rootfs(_) | E::Value { .. } | E::Spec(_) => Code::InvalidArgument,
        E::NoContainer(_) | E::NoProcess { .. } | E::Ended { .. } => Code::NotFound,
        E::Exists(_) | E::ExecExists { .. } => Code::AlreadyExists,
        E::Busy(_) | E::Refused(..) | E::NoPod | E::NoTerminal { .. } => Code::FailedPrecondition,
        E::Stdio(crate::stdio::StdioError::StderrOfTerminal(_)) => Code::InvalidArgument,
        E::Cgroup(e) => match e {
            crate::cgroup::CgroupError::Path(_) => Code::InvalidArgument,
            crate::cgroup::CgroupError::Exists(_) => Code::AlreadyExists,
            _ => Code::Internal,
        },
        E::Stdio(_) | E::Step(_) | E::Reported(_) | E::Died | E::OutOfMemory => Code::Internal,
    };
    Status::new(code, chain(error as &dyn Error))
}

fn failure(failure: StartFailure) -> wire::StartFailure {
    wire::StartFailure { exit_code: failure.exit_code.into(), message: failure.message }
}

/// ns since the epoch; 0 for a clock that was never set.
fn epoch_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

#[tonic::async_trait]
impl Service for Agent {
    async fn setup_pod(
        &self,
        request: Request<wire::SetupPodRequest>,
    ) -> Result<Response<wire::SetupPodResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move { agent.set_up(request.into_inner()).await }).await
    }

    async fn create_container(
        &self,
        request: Request<wire::CreateContainerRequest>,
    ) -> Result<Response<wire::CreateContainerResponse>, Status> {
        use wire::create_container_response::Result as Wire;
        let agent = self.clone();
        to_the_end(async move {
            let pod = agent.ready_pod().map_err(|e| container_status(&e))?;
            let result = agent.runner.create(&pod, request.into_inner()).await;
            let result = match result.map_err(|e| container_status(&e))? {
                Ok(pid) => Wire::Pid(pid),
                Err(why) => Wire::Failure(failure(why)),
            };
            Ok(wire::CreateContainerResponse { result: Some(result) })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<wire::StartContainerRequest>,
    ) -> Result<Response<wire::StartContainerResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let wire::StartContainerRequest { id } = request.into_inner();
            let result = agent.runner.start(&id).await.map_err(|e| container_status(&e))?;
            Ok(wire::StartContainerResponse { failure: result.map(failure) })
        })
        .await
    }

    async fn exec_process(
        &self,
        request: Request<wire::ExecProcessRequest>,
    ) -> Result<Response<wire::ExecProcessResponse>, Status> {
        use wire::exec_process_response::Result as Wire;
        let agent = self.clone();
        to_the_end(async move {
            let result = agent.runner.exec(request.into_inner()).await;
            let result = match result.map_err(|e| container_status(&e))? {
                Ok(pid) => Wire::Pid(pid),
                Err(why) => Wire::Failure(failure(why)),
            };
            Ok(wire::ExecProcessResponse { result: Some(result) })
        })
        .await
    }

    async fn wait_process(
        &self,
        request: Request<wire::WaitProcessRequest>,
    ) -> Result<Response<wire::WaitProcessResponse>, Status> {
        let wire::WaitProcessRequest { container_id, exec_id } = request.into_inner();
        let exit = self.runner.wait(&container_id, &exec_id).await;
        let exit = exit.map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::WaitProcessResponse {
            exit_code: exit.code,
            signal: exit.signal,
            oom_killed: exit.oom_killed,
            exited_at_ns: epoch_ns(exit.at),
        }))
    }

    async fn signal_process(
        &self,
        request: Request<wire::SignalProcessRequest>,
    ) -> Result<Response<wire::SignalProcessResponse>, Status> {
        let wire::SignalProcessRequest { container_id, exec_id, signal, all } =
            request.into_inner();
        let result = self.runner.signal(&container_id, &exec_id, signal, all);
        result.map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::SignalProcessResponse {}))
    }

    async fn resize_terminal(
        &self,
        request: Request<wire::ResizeTerminalRequest>,
    ) -> Result<Response<wire::ResizeTerminalResponse>, Status> {
        let wire::ResizeTerminalRequest { container_id, exec_id, width, height } =
            request.into_inner();
        let result = self.runner.resize(&container_id, &exec_id, width, height);
        result.map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::ResizeTerminalResponse {}))
    }

    async fn delete_container(
        &self,
        request: Request<wire::DeleteContainerRequest>,
    ) -> Result<Response<wire::DeleteContainerResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let wire::DeleteContainerRequest { id } = request.into_inner();
            agent.runner.delete(&id).await.map_err(|e| container_status(&e))?;
            Ok(wire::DeleteContainerResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        _: Request<wire::ListContainersRequest>,
    ) -> Result<Response<wire::ListContainersResponse>, Status> {
        let containers = self.runner.list();
        Ok(Response::new(wire::ListContainersResponse { containers }))
    }

    async fn stats(
        &self,
        _: Request<wire::StatsRequest>,
    ) -> Result<Response<wire::StatsResponse>, Status> {
        // A number that cannot be had is an error, never a zero.
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(|e| Status::internal(format!("{path}: {e}")))
        };
        let (memory, own) = (read("/proc/meminfo")?, read("/proc/self/status")?);
        Ok(Response::new(wire::StatsResponse {
            agent_rss: kib_of(&own, "VmRSS:"),
            memory_total: kib_of(&memory, "MemTotal:"),
            memory_available: kib_of(&memory, "MemAvailable:"),
            containers: self.runner.stats(),
            ..wire::StatsResponse::default()
        }))
    }

    async fn pause_container(
        &self,
        _: Request<wire::PauseContainerRequest>,
    ) -> Result<Response<wire::PauseContainerResponse>, Status> {
        Err(Status::unimplemented("pause_container"))
    }

    async fn resume_container(
        &self,
        _: Request<wire::ResumeContainerRequest>,
    ) -> Result<Response<wire::ResumeContainerResponse>, Status> {
        Err(Status::unimplemented("resume_container"))
    }

    async fn update_container(
        &self,
        _: Request<wire::UpdateContainerRequest>,
    ) -> Result<Response<wire::UpdateContainerResponse>, Status> {
        Err(Status::unimplemented("update_container"))
    }

    async fn list_processes(
        &self,
        _: Request<wire::ListProcessesRequest>,
    ) -> Result<Response<wire::ListProcessesResponse>, Status> {
        Err(Status::unimplemented("list_processes"))
    }

    async fn probe(
        &self,
        _: Request<wire::ProbeRequest>,
    ) -> Result<Response<wire::ProbeResponse>, Status> {
        Err(Status::unimplemented("probe"))
    }

    async fn read_file(
        &self,
        _: Request<wire::ReadFileRequest>,
    ) -> Result<Response<wire::ReadFileResponse>, Status> {
        Err(Status::unimplemented("read_file"))
    }

    async fn update_volume(
        &self,
        _: Request<wire::UpdateVolumeRequest>,
    ) -> Result<Response<wire::UpdateVolumeResponse>, Status> {
        Err(Status::unimplemented("update_volume"))
    }

    async fn copy_out(
        &self,
        _: Request<wire::CopyOutRequest>,
    ) -> Result<Response<wire::CopyOutResponse>, Status> {
        Err(Status::unimplemented("copy_out"))
    }

    async fn copy_in(
        &self,
        _: Request<wire::CopyInRequest>,
    ) -> Result<Response<wire::CopyInResponse>, Status> {
        Err(Status::unimplemented("copy_in"))
    }

    type WatchEventsStream = std::pin::Pin<
        Box<dyn tokio_stream::Stream<Item = Result<wire::AgentEvent, Status>> + Send>,
    >;

    async fn watch_events(
        &self,
        _: Request<wire::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Err(Status::unimplemented("watch_events"))
    }

    async fn shutdown(
        &self,
        _: Request<wire::ShutdownRequest>,
    ) -> Result<Response<wire::ShutdownResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            agent.shut_down().await?;
            Ok(wire::ShutdownResponse {})
        })
        .await
    }
}

/// The value of a line `key  number kB`, in bytes; 0 if there is none.
fn kib_of(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_sizes_are_read_in_bytes() {
        let text = "MemTotal:         100 kB\nMemAvailable:   7 kB\n";
        assert_eq!(kib_of(text, "MemTotal:"), 102_400);
        assert_eq!(kib_of(text, "MemFree:"), 0);
    }

    #[test]
    fn statuses_say_whose_fault_it_is() {
        let code = |e: ContainerError| container_status(&e).code();
        assert_eq!(code(ContainerError::NoContainer("a".into())), Code::NotFound);
        assert_eq!(code(ContainerError::Exists("a".into())), Code::AlreadyExists);
        assert_eq!(code(ContainerError::NoPod), Code::FailedPrecondition);
        assert_eq!(code(ContainerError::Died), Code::Internal);
        let name = crate::container::check_name("id", "/").unwrap_err();
        assert_eq!(code(name), Code::InvalidArgument);
    }
}

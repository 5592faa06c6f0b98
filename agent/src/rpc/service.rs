//! The calls, one by one.

use husk_proto::agent as wire;
use husk_proto::agent::agent_server::Agent as Service;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

use super::Agent;
use super::status::{
    added_status, container_status, copy_status, dial_status, network_status, volume_status,
};
use crate::container::copy::Direction;
use crate::container::{Exit, StartFailure, Started};
use crate::epoch_ns;
use crate::kmsg;
use crate::storage;

/// What a call with more than one answer gives.
type Answers<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Runs a request to its end even if its client goes away: half of a create helps nobody.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::spawn(work).await {
        Ok(result) => result.map(Response::new),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

fn failure(failure: StartFailure) -> wire::StartFailure {
    wire::StartFailure { exit_code: failure.exit_code.into(), message: failure.message }
}

fn process_exit(exit: Exit) -> wire::ProcessExit {
    wire::ProcessExit {
        exit_code: exit.code,
        signal: exit.signal,
        oom_killed: exit.oom_killed,
        exited_at_ns: epoch_ns(exit.at),
        unused_ports: exit.unused_ports.into_iter().filter(|port| *port != 0).collect(),
    }
}

/// What becomes of a process, told as it comes.
fn process_events(started: Started) -> Answers<wire::ProcessEvent> {
    use wire::process_event::Event;
    let (first, ending) = match started {
        Ok((pid, ending)) => (Event::Started(pid), Some(ending)),
        Err(why) => (Event::Failure(failure(why)), None),
    };
    let first = tokio_stream::once(Ok(first));
    let last = tokio_stream::iter(ending).then(|ending| async {
        let exit = ending.told().await.map_err(|e| container_status(&e))?;
        Ok(Event::Exited(process_exit(exit)))
    });
    let event = |event| wire::ProcessEvent { event: Some(event) };
    Box::pin(first.chain(last).map(move |told| told.map(event)))
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

    async fn update_network(
        &self,
        request: Request<wire::UpdateNetworkRequest>,
    ) -> Result<Response<wire::UpdateNetworkResponse>, Status> {
        self.ready_pod().map_err(|e| container_status(&e))?;
        self.network.update(&request.into_inner()).map_err(|e| network_status(&e))?;
        Ok(Response::new(wire::UpdateNetworkResponse {}))
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

    type StartContainerStream = Answers<wire::ProcessEvent>;

    async fn start_container(
        &self,
        request: Request<wire::StartContainerRequest>,
    ) -> Result<Response<Self::StartContainerStream>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let wire::StartContainerRequest { id } = request.into_inner();
            let started = agent.runner.start(&id).await.map_err(|e| container_status(&e))?;
            agent.look_for_late_devices();
            Ok(process_events(started))
        })
        .await
    }

    type ExecProcessStream = Answers<wire::ProcessEvent>;

    async fn exec_process(
        &self,
        request: Request<wire::ExecProcessRequest>,
    ) -> Result<Response<Self::ExecProcessStream>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let started = agent.runner.exec(request.into_inner()).await;
            Ok(process_events(started.map_err(|e| container_status(&e))?))
        })
        .await
    }

    async fn wait_process(
        &self,
        request: Request<wire::WaitProcessRequest>,
    ) -> Result<Response<wire::ProcessExit>, Status> {
        let wire::WaitProcessRequest { container_id, exec_id } = request.into_inner();
        let exit = self.runner.wait(&container_id, &exec_id).await;
        Ok(Response::new(process_exit(exit.map_err(|e| container_status(&e))?)))
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
        Ok(Response::new(self.runner.stats().map_err(|e| container_status(&e))?))
    }

    async fn pause_container(
        &self,
        request: Request<wire::PauseContainerRequest>,
    ) -> Result<Response<wire::PauseContainerResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let wire::PauseContainerRequest { id } = request.into_inner();
            agent.runner.pause(&id).await.map_err(|e| container_status(&e))?;
            Ok(wire::PauseContainerResponse {})
        })
        .await
    }

    async fn resume_container(
        &self,
        request: Request<wire::ResumeContainerRequest>,
    ) -> Result<Response<wire::ResumeContainerResponse>, Status> {
        let wire::ResumeContainerRequest { id } = request.into_inner();
        self.runner.resume(&id).map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::ResumeContainerResponse {}))
    }

    async fn update_container(
        &self,
        request: Request<wire::UpdateContainerRequest>,
    ) -> Result<Response<wire::UpdateContainerResponse>, Status> {
        let wire::UpdateContainerRequest { id, resources } = request.into_inner();
        self.runner.update(&id, &resources).map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::UpdateContainerResponse {}))
    }

    async fn list_processes(
        &self,
        request: Request<wire::ListProcessesRequest>,
    ) -> Result<Response<wire::ListProcessesResponse>, Status> {
        let wire::ListProcessesRequest { container_id } = request.into_inner();
        let processes = self.runner.processes(&container_id).await;
        let processes = processes.map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::ListProcessesResponse { processes }))
    }

    async fn dial(
        &self,
        request: Request<wire::DialRequest>,
    ) -> Result<Response<wire::DialResponse>, Status> {
        use wire::dial_response::Result as Wire;
        let dialled = self.dialer.dial(request.into_inner()).await;
        let result = match dialled.map_err(|e| dial_status(&e))? {
            Ok(()) => Wire::Connected(wire::Connected {}),
            Err(why) => Wire::Failure(why),
        };
        Ok(Response::new(wire::DialResponse { result: Some(result) }))
    }

    async fn read_file(
        &self,
        request: Request<wire::ReadFileRequest>,
    ) -> Result<Response<wire::ReadFileResponse>, Status> {
        let wire::ReadFileRequest { container_id, path, max_bytes } = request.into_inner();
        let content = self.runner.read_file(&container_id, &path, max_bytes);
        let content = content.map_err(|e| container_status(&e))?;
        Ok(Response::new(wire::ReadFileResponse { content }))
    }

    async fn add_filesystem(
        &self,
        request: Request<wire::AddFilesystemRequest>,
    ) -> Result<Response<wire::AddFilesystemResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            let pod = agent.ready_pod().map_err(|e| container_status(&e))?;
            let added = agent.added.add(&agent.host, &agent.runner, &pod, request.into_inner());
            added.await.map_err(|e| added_status(&e))?;
            Ok(wire::AddFilesystemResponse {})
        })
        .await
    }

    async fn remove_filesystem(
        &self,
        request: Request<wire::RemoveFilesystemRequest>,
    ) -> Result<Response<wire::RemoveFilesystemResponse>, Status> {
        let agent = self.clone();
        to_the_end(async move {
            agent.ready_pod().map_err(|e| container_status(&e))?;
            let wire::RemoveFilesystemRequest { name } = request.into_inner();
            agent.added.remove(&agent.runner, &name).await.map_err(|e| added_status(&e))?;
            Ok(wire::RemoveFilesystemResponse {})
        })
        .await
    }

    async fn update_volume(
        &self,
        request: Request<wire::UpdateVolumeRequest>,
    ) -> Result<Response<wire::UpdateVolumeResponse>, Status> {
        let wire::UpdateVolumeRequest { name, files } = request.into_inner();
        let pod = self.ready_pod().map_err(|e| container_status(&e))?;
        storage::update_volume(&pod.file_volumes, &name, &files.unwrap_or_default())
            .map_err(|e| volume_status(&e))?;
        Ok(Response::new(wire::UpdateVolumeResponse {}))
    }

    async fn copy_out(
        &self,
        request: Request<wire::CopyOutRequest>,
    ) -> Result<Response<wire::CopyOutResponse>, Status> {
        let wire::CopyOutRequest { container_id, path, port } = request.into_inner();
        let copied = self.runner.copy(&container_id, path, port, Direction::Out).await;
        let bytes = copied.map_err(|e| copy_status(&e))?;
        Ok(Response::new(wire::CopyOutResponse { bytes }))
    }

    async fn copy_in(
        &self,
        request: Request<wire::CopyInRequest>,
    ) -> Result<Response<wire::CopyInResponse>, Status> {
        let wire::CopyInRequest { container_id, path, port } = request.into_inner();
        let copied = self.runner.copy(&container_id, path, port, Direction::In).await;
        let bytes = copied.map_err(|e| copy_status(&e))?;
        Ok(Response::new(wire::CopyInResponse { bytes }))
    }

    type KernelLogStream = Answers<wire::KernelLogRecords>;

    async fn kernel_log(
        &self,
        request: Request<wire::KernelLogRequest>,
    ) -> Result<Response<Self::KernelLogStream>, Status> {
        let wire::KernelLogRequest { follow } = request.into_inner();
        let failed = |e: std::io::Error| Status::internal(format!("read the kernel's log: {e}"));
        let records = kmsg::stream(follow, self.over.subscribe()).map_err(failed)?;
        Ok(Response::new(Box::pin(records.map(move |piece| piece.map_err(failed)))))
    }

    type WatchEventsStream = Answers<wire::AgentEvent>;

    async fn watch_events(
        &self,
        _: Request<wire::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let events = self.runner.events();
        let events = events.ok_or_else(|| Status::failed_precondition("the guest shuts down"))?;
        Ok(Response::new(Box::pin(events.map(Ok))))
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

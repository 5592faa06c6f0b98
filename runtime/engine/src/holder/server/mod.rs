//! The service of a pod's process: what `husk` commands ask of it.
//!
//! Whoever can open the socket owns the pod. Even so nobody can hold up the pod: connections and
//! calls are counted, and everything that flows to a client waits in a queue of a few pieces.

mod attach;
mod copy;
mod disk;
mod exec;
mod kernel_log;
mod port_forward;
mod refusal;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
mod tests;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent as guest_wire;
use husk_proto::pod as wire;
use husk_proto::pod::pod_server::{Pod as Service, PodServer};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::MAX_CALLS;
use super::apply::Applier;
use super::output::Taps;
use super::status::StatusRecord;
use crate::guest::GuestError;
use crate::pod::{AccessError, PodAccess, PodStatus, Stopper};
use refusal::{check_piece, not_applied, refused, refused_by_guest};

/// Most connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 128;

/// How much of a call, and of all calls of a connection, a client may send ahead, in bytes: one that
/// is not taken does not hold up the others.
const CALL_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = CALL_WINDOW * MAX_CALLS;

/// Largest message of a client in bytes: room for the arguments and environment of a process. A
/// larger one is refused before it is read.
const MAX_REQUEST: usize = 4 * 1024 * 1024;

/// How many pieces wait for a client before what makes them is held up.
const QUEUE: usize = 4;

/// Largest piece of a stream, in bytes.
const PIECE: usize = 32 * 1024;

/// How long clients may take, once the pod has ended, to be told the rest.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Pause after a connection could not be accepted, e.g. for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What flows to a client.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type To<T> = mpsc::Sender<Result<T, Status>>;

/// The pod as the service sees it.
#[derive(Debug, Clone)]
pub(super) struct Served {
    pub(super) access: PodAccess,
    pub(super) applier: Applier,
    pub(super) stopper: Stopper,
    pub(super) status: watch::Receiver<PodStatus>,
    pub(super) taps: Taps,
    /// The final status, once it is known and written.
    pub(super) ended: watch::Receiver<Option<StatusRecord>>,
}

/// Serves commands until the pod has ended and they have been told.
pub(super) async fn serve(listener: UnixListener, served: Served) {
    let mut ended = served.ended.clone();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => {
                    let served = served.clone();
                    connections.spawn(async move {
                        serve_one(stream, served).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a command cannot be heard");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = is_over(&mut ended) => break,
        }
    }
    drop(listener);
    let rest = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, rest).await.is_err() {
        tracing::debug!("a command does not listen any more");
    }
}

async fn is_over(ended: &mut watch::Receiver<Option<StatusRecord>>) {
    // Without a sender it is over as well.
    drop(ended.wait_for(Option::is_some).await);
}

fn service(served: Served) -> PodServer<Served> {
    PodServer::new(served).max_decoding_message_size(MAX_REQUEST)
}

async fn serve_one(stream: UnixStream, served: Served) {
    let mut ended = served.ended.clone();
    let service = TowerToHyperService::new(service(served));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_CALLS)
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = is_over(&mut ended) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a command's connection broke");
    }
}

/// Passes on what comes from a stream of the guest, piece by piece, until its end or until nobody
/// wants it any more.
async fn pump<T>(mut from: impl AsyncRead + Unpin, to: To<T>, wrap: impl Fn(Vec<u8>) -> T) {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = to.closed() => return,
        };
        match read {
            Ok(0) => return,
            Ok(n) => {
                let piece = buffer.get(..n).unwrap_or_default().to_vec();
                if to.send(Ok(wrap(piece))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "a stream of the guest broke off");
                return;
            }
        }
    }
}

fn answers<T: Send + 'static>(from: mpsc::Receiver<Result<T, Status>>) -> Response<Answers<T>> {
    Response::new(Box::pin(ReceiverStream::new(from)))
}

#[tonic::async_trait]
impl Service for Served {
    async fn stop(
        &self,
        request: Request<wire::StopRequest>,
    ) -> Result<Response<wire::StopResponse>, Status> {
        let wire::StopRequest { grace_ms } = request.into_inner();
        self.stopper.stop(grace_ms.map(Duration::from_millis));
        Ok(Response::new(wire::StopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitRequest>,
    ) -> Result<Response<wire::WaitResponse>, Status> {
        let wire::WaitRequest {} = request.into_inner();
        let mut ended = self.ended.clone();
        is_over(&mut ended).await;
        let last = ended.borrow().clone();
        let last = last.ok_or_else(|| Status::unavailable("the pod's process is ending"))?;
        let status =
            serde_json::to_string(&last).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(wire::WaitResponse { status }))
    }

    async fn signal(
        &self,
        request: Request<wire::SignalRequest>,
    ) -> Result<Response<wire::SignalResponse>, Status> {
        let wire::SignalRequest { container, signal, all } = request.into_inner();
        self.access.signal(&container, signal, all).await.map_err(|error| refused(&error))?;
        Ok(Response::new(wire::SignalResponse {}))
    }

    type ExecStream = Answers<wire::ProcessOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<wire::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        exec::exec(self.access.clone(), request.into_inner()).await.map(answers)
    }

    type DebugStream = Answers<wire::ProcessOutput>;

    async fn debug(
        &self,
        request: Request<Streaming<wire::ExecRequest>>,
    ) -> Result<Response<Self::DebugStream>, Status> {
        exec::debug(self.access.clone(), request.into_inner()).await.map(answers)
    }

    type AttachStream = Answers<wire::ProcessOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<wire::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        attach::attach(self.clone(), request.into_inner()).await.map(answers)
    }

    async fn stats(
        &self,
        request: Request<wire::StatsRequest>,
    ) -> Result<Response<guest_wire::StatsResponse>, Status> {
        let wire::StatsRequest {} = request.into_inner();
        self.access.stats().await.map(Response::new).map_err(|error| refused(&error))
    }

    async fn list_processes(
        &self,
        request: Request<wire::ListProcessesRequest>,
    ) -> Result<Response<guest_wire::ListProcessesResponse>, Status> {
        let wire::ListProcessesRequest { container } = request.into_inner();
        let processes = self.access.processes(&container).await.map_err(|error| refused(&error))?;
        Ok(Response::new(guest_wire::ListProcessesResponse { processes }))
    }

    type KernelLogStream = Answers<guest_wire::KernelLogRecords>;

    async fn kernel_log(
        &self,
        request: Request<wire::KernelLogRequest>,
    ) -> Result<Response<Self::KernelLogStream>, Status> {
        kernel_log::kernel_log(&self.access, request.into_inner()).await.map(answers)
    }

    async fn pause(
        &self,
        request: Request<wire::PauseRequest>,
    ) -> Result<Response<wire::PauseResponse>, Status> {
        let wire::PauseRequest { containers } = request.into_inner();
        self.set_paused(containers, true).await?;
        Ok(Response::new(wire::PauseResponse {}))
    }

    async fn resume(
        &self,
        request: Request<wire::ResumeRequest>,
    ) -> Result<Response<wire::ResumeResponse>, Status> {
        let wire::ResumeRequest { containers } = request.into_inner();
        self.set_paused(containers, false).await?;
        Ok(Response::new(wire::ResumeResponse {}))
    }

    async fn attach_disk(
        &self,
        request: Request<wire::AttachDiskRequest>,
    ) -> Result<Response<wire::AttachDiskResponse>, Status> {
        disk::attach(&self.access, request.into_inner()).await.map(Response::new)
    }

    async fn detach_disk(
        &self,
        request: Request<wire::DetachDiskRequest>,
    ) -> Result<Response<wire::DetachDiskResponse>, Status> {
        disk::detach(&self.access, request.into_inner()).await.map(Response::new)
    }

    type CopyOutStream = Answers<wire::Data>;

    async fn copy_out(
        &self,
        request: Request<wire::CopyOutRequest>,
    ) -> Result<Response<Self::CopyOutStream>, Status> {
        copy::copy_out(&self.access, &request.into_inner()).map(answers)
    }

    async fn copy_in(
        &self,
        request: Request<Streaming<wire::CopyInRequest>>,
    ) -> Result<Response<wire::CopyInResponse>, Status> {
        copy::copy_in(&self.access, request.into_inner()).await.map(Response::new)
    }

    type PortForwardStream = Answers<wire::PortForwardAnswer>;

    async fn port_forward(
        &self,
        request: Request<Streaming<wire::PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        port_forward::port_forward(&self.access, request.into_inner()).await.map(answers)
    }

    async fn apply(
        &self,
        request: Request<wire::ApplyRequest>,
    ) -> Result<Response<wire::ApplyResponse>, Status> {
        let wire::ApplyRequest { manifest, source_name } = request.into_inner();
        let applied = self.applier.apply(manifest, source_name).await;
        let replaced = applied.map_err(|error| not_applied(&error))?;
        let concerned = replaced.is_some();
        let volumes = replaced.unwrap_or_default();
        Ok(Response::new(wire::ApplyResponse { concerned, volumes }))
    }
}

impl Served {
    /// The named containers, or all that run; of those, one that has ended meanwhile is no error.
    async fn set_paused(&self, containers: Vec<String>, paused: bool) -> Result<(), Status> {
        let all = containers.is_empty();
        // Also if none is named, and none runs: nothing can be done then.
        self.access.check_running().map_err(|error| refused(&error))?;
        let containers = if all { self.running() } else { containers };
        for container in containers {
            match self.access.set_paused(&container, paused).await {
                Ok(()) => {}
                Err(AccessError::Guest(GuestError::Refused {
                    code: Code::NotFound | Code::FailedPrecondition,
                    ..
                })) if all => {}
                Err(error) => return Err(refused(&error)),
            }
        }
        Ok(())
    }

    fn running(&self) -> Vec<String> {
        let status = self.status.borrow();
        let runs = status.containers.iter().filter(|container| {
            matches!(container.state, crate::pod::ContainerState::Running { .. })
        });
        runs.map(|container| container.name.clone()).collect()
    }
}

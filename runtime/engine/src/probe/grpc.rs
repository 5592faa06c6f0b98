//! gRPC's health check (`grpc.health.v1.Health/Check`), without TLS, as the kubelet makes it.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::{Answer, Fault, USER_AGENT};
use crate::channel;
use crate::pod::chain;

/// Longest answer in bytes: it is a number.
const MAX_ANSWER: usize = 1024;

/// Most bytes of headers and trailers.
const MAX_HEADERS: u32 = 16 * 1024;

/// Closes a connection when it is dropped. The tasks of a channel would keep it open until the
/// server has taken their last words, which a hostile one never does.
struct HangUp(OwnedFd);

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Err(error) = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both) {
            // It was closed already.
            tracing::trace!(%error, "a connection is not shut down");
        }
    }
}

/// Asks whether a service, or with an empty name the server, serves.
pub(super) async fn check<S>(stream: S, port: u16, service: &str) -> Result<Answer, Fault>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static,
{
    let failed = |error: &dyn std::error::Error| Fault::Server(format!("gRPC: {}", chain(error)));
    let ours = stream.as_fd().try_clone_to_owned().map_err(|error| failed(&error))?;
    let _hang_up = HangUp(ours);
    let endpoint = endpoint(port).map_err(|error| failed(&error))?;
    let channel = channel::over(stream, endpoint).await.map_err(|error| failed(&error))?;
    let mut client = HealthClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    let answer = client.check(HealthCheckRequest { service: service.to_owned() }).await;
    judge(answer.map(|answer| answer.into_inner().status))
}

fn endpoint(port: u16) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}:{port}", Ipv4Addr::LOCALHOST))?;
    Ok(endpoint.user_agent(USER_AGENT)?.http2_max_header_list_size(MAX_HEADERS))
}

/// What an answer means: a `ServingStatus`, or a status of gRPC.
fn judge(answer: Result<i32, Status>) -> Result<Answer, Fault> {
    use std::error::Error as _;
    let why = match answer {
        Ok(status) => match ServingStatus::try_from(status) {
            Ok(ServingStatus::Serving) => {
                return Ok(Answer { success: true, message: "service healthy".into() });
            }
            Ok(status) => format!("service unhealthy: {}", status.as_str_name()),
            Err(_) => "service unhealthy: ?".into(),
        },
        Err(status) if status.code() == Code::Unimplemented => {
            "this server does not implement the grpc health protocol".into()
        }
        // One that the server sent has no source.
        Err(status) => match status.source() {
            Some(source) => format!("gRPC: {}", chain(source)),
            None => format!("gRPC status {}: {}", i32::from(status.code()), status.message()),
        },
    };
    Err(Fault::Server(why))
}

//! A pod's process, seen from a command.

use std::io;

pub use husk_proto::agent as guest_messages;
pub use husk_proto::pod as messages;
use husk_proto::pod::pod_client::PodClient;
use tonic::transport::Channel;
pub use tonic::{Code, Status, Streaming};

use super::MAX_CALLS;
use super::record::Found;
use super::socket;
use crate::channel;

/// Why the process of a pod cannot be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is none.
    #[error("pod {name} does not run: it has {phase}")]
    NotRunning {
        /// The pod.
        name: String,
        /// Its phase.
        phase: String,
    },
    /// It does not listen.
    #[error("cannot reach the process {pid} that holds pod {name}")]
    Unreachable {
        /// The pod.
        name: String,
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not speak the protocol.
    #[error("cannot speak to the process {pid} that holds pod {name}")]
    Connect {
        /// The pod.
        name: String,
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It refused, or is gone.
    #[error("{}", text(.0))]
    Refused(Box<Status>),
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        ClientError::Refused(Box::new(status))
    }
}

/// What a person is told of a refusal.
fn text(status: &Status) -> String {
    use std::error::Error as _;
    if status.source().is_some() {
        return format!("the pod's process went away ({})", status.code());
    }
    match status.code() {
        tonic::Code::Unimplemented => {
            format!("the pod's process or guest is older and cannot do that ({})", status.message())
        }
        _ if status.message().is_empty() => status.code().to_string(),
        _ => status.message().to_owned(),
    }
}

/// The protocol's calls as methods.
pub type Client = PodClient<Channel>;

/// A connection to a pod's process.
///
/// # Errors
/// [`ClientError`].
pub async fn connect(found: &Found) -> Result<Client, ClientError> {
    let name = found.pod.full_name();
    let pid = found.pod.pid;
    if !found.held {
        return Err(ClientError::NotRunning { name, phase: found.status.phase.clone() });
    }
    let stream = match socket::connect(&found.dir).await {
        Ok(stream) => stream,
        Err(source) => return Err(ClientError::Unreachable { name, pid, source }),
    };
    let endpoint = channel::nameless()
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    match channel::over(stream, endpoint).await {
        Ok(channel) => Ok(PodClient::new(channel).max_decoding_message_size(MAX_ANSWER)),
        Err(source) => Err(ClientError::Connect { name, pid, source }),
    }
}

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

/// How much of a call, and of all calls, the pod's process may send ahead, in bytes: a call whose
/// answers are not taken does not hold up the others.
const CALL_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = CALL_WINDOW * MAX_CALLS;

//! The agent in a pod's guest, seen from the pod's process: waiting for it, its RPCs with typed
//! results, and the streams of its processes.
//!
//! Everything that comes from here is the guest's word: sizes are bounded, texts are cleaned
//! ([`clean`]), numbers are checked. An RPC has no time limit of its own, because a guest may be
//! slow for good reasons; what ends a wait is the end of the VM.

mod stdio;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use husk_proto::agent::agent_client::AgentClient;
use husk_proto::agent::{self as proto, create_container_response};
use husk_proto::ports;
use tokio::sync::Semaphore;
use tonic::Code;
use tonic::transport::Channel;

pub use kernel_log::KernelLog;
pub use stdio::{Output, Streams, Wanted};

use crate::channel;
use crate::vm::{Accept, Vm, VmError, VmExit};

/// Largest answer of the agent, in bytes. Far above any that it gives.
const MAX_ANSWER: usize = 1024 * 1024;

/// Longest text of the guest that goes into a message, in characters.
const MAX_TEXT: usize = 4096;

/// Most forwarded connections at once. The agent has 128 in all: the rest is for probes,
/// which must not fail because of them.
const MAX_FORWARDS: usize = 96;

/// How long the VM may take to be seen ended after the agent's connection broke.
const END_GRACE: Duration = Duration::from_secs(5);

/// What can go wrong with the agent.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The VM ended, and the agent with it.
    #[error("{0}")]
    Ended(Arc<VmExit>),
    /// Something about the VM failed.
    #[error("the VM failed")]
    Vm(#[source] VmError),
    /// The agent did not come in time.
    #[error(
        "the guest did not become ready within {} s; on a very slow host a longer limit can be \
         given with --start-timeout",
        limit.as_secs()
    )]
    NotReady {
        /// The time.
        limit: Duration,
    },
    /// The agent's connection broke although the VM lives on.
    #[error("the connection to the agent in the guest is lost, during {rpc}")]
    Lost {
        /// The request.
        rpc: &'static str,
        /// How.
        #[source]
        source: Box<tonic::Status>,
    },
    /// The connection could not be made one for gRPC.
    #[error("cannot speak to the agent in the guest")]
    Connect(#[source] tonic::transport::Error),
    /// The agent refused a request.
    #[error("the agent refused {rpc}: {message} ({code:?})")]
    Refused {
        /// The request.
        rpc: &'static str,
        /// The kind of refusal.
        code: Code,
        /// The agent's reason.
        message: String,
    },
    /// As many ports are forwarded as there can be.
    #[error("there are {MAX_FORWARDS} forwarded connections already")]
    TooManyForwards,
    /// The agent's answer makes no sense.
    #[error("the agent's answer to {rpc} makes no sense: {what}")]
    Nonsense {
        /// The request.
        rpc: &'static str,
        /// Why.
        what: &'static str,
    },
}

impl GuestError {
    /// Whether the whole guest is lost, and not only this request.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        match self {
            GuestError::Refused { .. } | GuestError::TooManyForwards => false,
            GuestError::Ended(_)
            | GuestError::Vm(_)
            | GuestError::NotReady { .. }
            | GuestError::Lost { .. }
            | GuestError::Connect(_)
            | GuestError::Nonsense { .. } => true,
        }
    }
}

/// Makes a text of the guest fit for a message: no control characters but line ends and tabs, and
/// not endless.
#[must_use]
pub fn clean(text: &str) -> String {
    let visible = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.chars().take(MAX_TEXT).map(visible).collect()
}

/// What a program's start came to, if not to a process: it cannot be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    /// 127 if the program does not exist, 126 if it cannot be executed.
    pub exit_code: u8,
    /// Why, as runc words it.
    pub message: String,
}

/// What the guest told of itself when its pod was set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    /// `uname -r` there.
    pub kernel_release: String,
    /// From the guest kernel's start to the agent's first instruction.
    pub init_ns: u64,
    /// From the guest kernel's start to the agent's readiness.
    pub ready_ns: u64,
}

/// A guest whose agent is connected.
#[derive(Debug, Clone)]
pub struct Guest {
    vm: Vm,
    client: AgentClient<Channel>,
    next_port: Arc<AtomicU32>,
    /// Places for forwarded connections.
    forwards: Arc<Semaphore>,
}

impl Guest {
    /// Registers interest in the agent's connection. To be done before [`Vm::boot`].
    #[must_use]
    pub fn expect(vm: &Vm) -> Accept {
        vm.accept(ports::CONTROL)
    }

    /// Waits for the agent, which connects when it is ready.
    ///
    /// # Errors
    /// [`GuestError::Ended`] as soon as the VM ends; [`GuestError::NotReady`] after `limit`;
    /// [`GuestError::Connect`].
    pub async fn connect(vm: Vm, agent: Accept, limit: Duration) -> Result<Guest, GuestError> {
        let stream = match tokio::time::timeout(limit, agent.connected()).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(VmError::Ended(exit))) => return Err(GuestError::Ended(exit)),
            Ok(Err(error)) => return Err(GuestError::Vm(error)),
            Err(_) => return Err(GuestError::NotReady { limit }),
        };
        let channel = channel::over(stream, channel::nameless()).await;
        let client = AgentClient::new(channel.map_err(GuestError::Connect)?)
            .max_decoding_message_size(MAX_ANSWER);
        let next_port = Arc::new(AtomicU32::new(ports::FIRST_STREAM));
        let forwards = Arc::new(Semaphore::new(MAX_FORWARDS));
        Ok(Guest { vm, client, next_port, forwards })
    }

    /// The guest's VM.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// A host port that no stream of this guest had before. After 2^32 - 2^16 streams they repeat.
    fn fresh_port(&self) -> u32 {
        let next = |port: u32| Some(port.checked_add(1).unwrap_or(ports::FIRST_STREAM));
        // The closure never refuses, so both arms hold the previous value.
        match self.next_port.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(port) | Err(port) => port,
        }
    }

    /// Sorts out what a failed RPC means. The end of the VM breaks the connection first and is
    /// told a moment later: it is the better reason, so it is waited for.
    async fn failed(&self, rpc: &'static str, status: tonic::Status) -> GuestError {
        use std::error::Error as _;
        // A status that the agent sent has no source; one that tonic made of a broken connection
        // has.
        if status.source().is_none() && status.code() != Code::Unavailable {
            return GuestError::Refused {
                rpc,
                code: status.code(),
                message: clean(status.message()),
            };
        }
        match tokio::time::timeout(END_GRACE, self.vm.exited()).await {
            Ok(exit) => GuestError::Ended(exit),
            Err(_) => GuestError::Lost { rpc, source: Box::new(status) },
        }
    }
}

/// Makes the request `$rpc` by the generated method `$method`.
macro_rules! call {
    ($guest:expr, $method:ident, $rpc:expr, $request:expr) => {
        // A clone of the client is a handle of the same connection.
        match $guest.client.clone().$method($request).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err($guest.failed($rpc, status).await),
        }
    };
}

// Here, because they use the macro.
mod check;
mod control;
mod kernel_log;
mod process;
mod tunnel;

pub use process::{ProcessEnd, ProcessExit};
pub use tunnel::{Loopback, Tunnel};

impl Guest {
    /// Makes the pod's shared world. Once, and first.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn setup_pod(
        &self,
        request: proto::SetupPodRequest,
    ) -> Result<GuestInfo, GuestError> {
        let proto::SetupPodResponse { kernel_release, init_ns, ready_ns } =
            call!(self, setup_pod, "SetupPod", request)?;
        Ok(GuestInfo { kernel_release: clean(&kernel_release), init_ns, ready_ns })
    }

    /// Makes the guest's network what it is told to be.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn update_network(
        &self,
        request: proto::UpdateNetworkRequest,
    ) -> Result<(), GuestError> {
        let proto::UpdateNetworkResponse {} =
            call!(self, update_network, "UpdateNetwork", request)?;
        Ok(())
    }

    /// Makes a container up to the start of its program, with these disks as block devices. Returns the process's ID in the guest.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn create_container(
        &self,
        id: &str,
        spec: Vec<u8>,
        rootfs: proto::Rootfs,
        devices: Vec<proto::BlockDevice>,
        stdio: proto::Stdio,
    ) -> Result<Result<u32, StartFailure>, GuestError> {
        use create_container_response::Result::{Failure, Pid};
        let request = proto::CreateContainerRequest {
            id: id.to_owned(),
            spec,
            rootfs: Some(rootfs),
            stdio: Some(stdio),
            devices,
        };
        let proto::CreateContainerResponse { result } =
            call!(self, create_container, "CreateContainer", request)?;
        match result {
            Some(Pid(pid)) => Ok(Ok(pid)),
            Some(Failure(failure)) => start_failure("CreateContainer", failure).map(Err),
            None => Err(GuestError::Nonsense { rpc: "CreateContainer", what: "it is empty" }),
        }
    }

    /// Sends a signal to a container's process, or to all of its processes. One that has ended
    /// gets none, and that is no error.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn signal(&self, container: &str, signal: u32, all: bool) -> Result<(), GuestError> {
        let request = proto::SignalProcessRequest {
            container_id: container.to_owned(),
            exec_id: String::new(),
            signal,
            all,
        };
        match call!(self, signal_process, "SignalProcess", request) {
            Ok(proto::SignalProcessResponse {})
            | Err(GuestError::Refused { code: Code::NotFound, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes a container that does not run.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn delete_container(&self, id: &str) -> Result<(), GuestError> {
        let request = proto::DeleteContainerRequest { id: id.to_owned() };
        let proto::DeleteContainerResponse {} =
            call!(self, delete_container, "DeleteContainer", request)?;
        Ok(())
    }

    /// What the guest, the agent and the containers use.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stats(&self) -> Result<proto::StatsResponse, GuestError> {
        call!(self, stats, "Stats", proto::StatsRequest {})
    }

    /// Has the agent end everything, sync the disks and power the VM off. Returns when the agent
    /// has answered; the VM ends a moment later.
    ///
    /// # Errors
    /// [`GuestError`]; that the VM has ended is none.
    pub async fn shutdown(&self) -> Result<(), GuestError> {
        match call!(self, shutdown, "Shutdown", proto::ShutdownRequest {}) {
            Ok(proto::ShutdownResponse {}) | Err(GuestError::Ended(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn start_failure(
    rpc: &'static str,
    proto::StartFailure { exit_code, message }: proto::StartFailure,
) -> Result<StartFailure, GuestError> {
    match u8::try_from(exit_code) {
        Ok(exit_code @ 1..) => Ok(StartFailure { exit_code, message: clean(&message) }),
        _ => Err(GuestError::Nonsense { rpc, what: "a failure's exit code is not 1 to 255" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_guest_lose_control_characters_and_excess() {
        assert_eq!(clean("a\x1b[31mb\r\n\tc"), "a\u{fffd}[31mb\u{fffd}\n\tc");
        assert_eq!(clean(&"x".repeat(10_000)).len(), MAX_TEXT);
    }

    #[test]
    fn a_start_failure_with_exit_code_0_is_nonsense() {
        for exit_code in [0, 256, u32::MAX] {
            let failure = proto::StartFailure { exit_code, message: String::new() };
            assert!(matches!(start_failure("X", failure), Err(GuestError::Nonsense { .. })));
        }
        let failure = proto::StartFailure { exit_code: 127, message: "no\0".into() };
        assert_eq!(
            start_failure("X", failure).ok(),
            Some(StartFailure { exit_code: 127, message: "no\u{fffd}".into() })
        );
    }
}

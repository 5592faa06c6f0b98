//! Probes and hooks as they are carried out: commands in containers by the agent's exec, and requests
//! by [`crate::probe`].

use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::actor::{Answer, chain};
use super::runtime::GuestRuntime;
use super::state::ProbeKind;
use crate::guest::{Guest, GuestError, Output, Streams, Tunnel, Wanted, clean};
use crate::oci;
use crate::probe::{self, Dialer, Question};
use crate::task::Task;
use crate::types::{Check, ContainerSpec, Hook};

/// Most bytes of a command's output that go into a message.
const MAX_OUTPUT: usize = 10 * 1024;

/// How long a network request of a hook may take, which has no limit of its own.
const HOOK_REQUEST_LIMIT: Duration = Duration::from_secs(3600);

/// How long the output of a command may stay open after its end, by what it left running.
const OUTPUT_GRACE: Duration = Duration::from_secs(1);

const SIGKILL: u32 = 9;

/// Connections within the pod's network, in which the pod's own address is the one that others
/// reach it by, as for the kubelet. In a pod without one, it is the loopback interface's.
struct Own<'a> {
    guest: &'a Guest,
    address: Option<IpAddr>,
}

impl Dialer for Own<'_> {
    type Stream = Tunnel;

    async fn dial(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<Tunnel, String>, GuestError> {
        self.guest.dial(address.or(self.address), port, limit).await
    }

    async fn knock(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<(), String>, GuestError> {
        self.guest.knock(address.or(self.address), port, limit).await
    }
}

impl GuestRuntime {
    /// Puts a probe of a container once.
    pub(super) async fn put_probe(
        &self,
        container: &ContainerSpec,
        kind: ProbeKind,
    ) -> Result<Answer, GuestError> {
        let Some(probe) = kind.of(&container.probes) else {
            return Ok(Answer::Unknown("the container has no such probe".into()));
        };
        let limit = Duration::from_secs(probe.timeout_s.max(1).into());
        match &probe.check {
            Check::Exec(command) => {
                let command = oci::probe_command(container, command);
                match tokio::time::timeout(limit, self.command(container, command)).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(Answer::Failure(format!("no answer in {} s", limit.as_secs()))),
                }
            }
            check => self.ask(container, check, limit, false).await,
        }
    }

    /// Runs a hook of a container to its end.
    pub(super) async fn run_hook(
        &self,
        container: &ContainerSpec,
        hook: &Hook,
    ) -> Result<Answer, GuestError> {
        match hook {
            Hook::Sleep(seconds) => {
                tokio::time::sleep(Duration::from_secs(*seconds)).await;
                Ok(Answer::Success)
            }
            Hook::Check(Check::Exec(command)) => self.command(container, command.clone()).await,
            Hook::Check(check) => self.ask(container, check, HOOK_REQUEST_LIMIT, true).await,
        }
    }

    /// Makes a request to a server of the pod.
    async fn ask(
        &self,
        container: &ContainerSpec,
        check: &Check,
        limit: Duration,
        any_status: bool,
    ) -> Result<Answer, GuestError> {
        let question = match check {
            Check::HttpGet(get) => Question::Http { get, any_status },
            Check::TcpSocket(socket) => Question::Tcp(socket),
            Check::Grpc { port, service } => Question::Grpc { port: *port, service },
            // Has been dealt with above.
            Check::Exec(command) => return self.command(container, command.clone()).await,
        };
        let dialer = Own { guest: self.guest(), address: self.address() };
        let probe::Answer { success, message } = probe::put(&dialer, question, limit).await?;
        if success {
            tracing::debug!(container = container.name, message, "a server answered a check");
            return Ok(Answer::Success);
        }
        Ok(Answer::Failure(message))
    }

    /// Runs a command in a container to its end. If this is dropped before, the command is killed.
    async fn command(
        &self,
        container: &ContainerSpec,
        command: Vec<String>,
    ) -> Result<Answer, GuestError> {
        let unknown = |what: String| Ok(Answer::Unknown(what));
        let config = match self.config(container) {
            Ok(config) => config,
            Err(failure) => return unknown(failure.message),
        };
        let Some(mut process) = config.process().clone() else {
            return unknown("the container has no process".into());
        };
        process.set_args(Some(command));
        process.set_terminal(Some(false));
        let process = match serde_json::to_vec(&process) {
            Ok(process) => process,
            Err(error) => return unknown(chain(&error)),
        };
        let guest = self.guest().clone();
        let id = self.next_check();
        let (stdio, streams) = guest.expect_streams(Wanted { stdin: false, tty: false });
        // From here on the command may run, even if the answer is not waited for.
        let mut killer = Killer::new(&guest, &container.name, &id);
        let started = guest.exec_process(&container.name, &id, process, stdio).await;
        if !matches!(started, Ok(Ok(_))) {
            killer.disarm();
        }
        let mut end = match started {
            Ok(Ok(end)) => end,
            // As the kubelet: a command that cannot be run is a failure.
            Ok(Err(failure)) => return Ok(Answer::Failure(failure.message)),
            Err(error) if error.is_fatal() => return Err(error),
            Err(error) => return unknown(chain(&error)),
        };
        let Streams { stdin: _, stdout, stderr } = streams;
        // Given up with this question: nobody tells any more that a silent command has ended.
        let output = Task::spawn(async move {
            let (stdout, stderr) = tokio::join!(read(Some(stdout)), read(stderr));
            [stdout, stderr].concat()
        });
        let exit = end.wait().await;
        killer.disarm();
        let exit = match exit {
            Ok(exit) => exit,
            Err(error) if error.is_fatal() => return Err(error),
            Err(error) => return unknown(chain(&error)),
        };
        if exit.exit_code == 0 {
            return Ok(Answer::Success);
        }
        let output = match tokio::time::timeout(OUTPUT_GRACE, output).await {
            Ok(Ok(output)) => output,
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
        let output = clean(String::from_utf8_lossy(&output).trim_end());
        Ok(Answer::Failure(format!("exit code {}: {output}", exit.exit_code)))
    }
}

/// Kills a command that nobody waits for any more.
struct Killer {
    target: Option<(Guest, String, String)>,
}

impl Killer {
    fn new(guest: &Guest, container: &str, exec: &str) -> Self {
        Killer { target: Some((guest.clone(), container.to_owned(), exec.to_owned())) }
    }

    fn disarm(&mut self) {
        self.target = None;
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        if let Some((guest, container, exec)) = self.target.take() {
            tokio::spawn(async move {
                match guest.signal_process(&container, Some(&exec), SIGKILL).await {
                    Ok(()) => tracing::debug!(container, exec, "killed: it took too long"),
                    // It has ended meanwhile.
                    Err(error) => tracing::debug!(container, exec, error = chain(&error)),
                }
            });
        }
    }
}

/// Reads a stream to its end, and keeps its beginning.
async fn read(output: Option<Output>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(output) = output else { return kept };
    if let Err(error) = keep_beginning(output, &mut kept).await {
        tracing::debug!(%error, "the output of a command broke off");
    }
    kept
}

async fn keep_beginning(
    mut from: impl AsyncRead + Unpin,
    kept: &mut Vec<u8>,
) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let room = MAX_OUTPUT.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

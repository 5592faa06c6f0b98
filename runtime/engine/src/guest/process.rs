//! Starting programs in the guest, and how they end.
//!
//! One call does both: the agent's answers to it are that the program runs, and at some time that it
//! has ended. The second is taken when it comes, whether or not anybody waits for it then: it also
//! says which of the outputs will never come.

use std::time::{Duration, SystemTime};

use husk_proto::agent as proto;
use husk_proto::agent::process_event::Event;
use tonic::Streaming;

use super::{Guest, GuestError, StartFailure, start_failure};
use crate::task::Task;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// 0 to 255; 128 + n if signal n ended it.
    pub exit_code: u8,
    /// The signal that ended it, or 0.
    pub signal: u8,
    /// Whether the kernel killed a process of the container for memory.
    pub oom_killed: bool,
    /// When, by the guest's clock.
    pub at: SystemTime,
}

/// The end of a process that has been started.
pub struct ProcessEnd {
    guest: Guest,
    container: String,
    /// `None` for the container's own process.
    exec: Option<String>,
    /// What its starter is told; `None` once it has been.
    coming: Option<Task<Result<ProcessExit, GuestError>>>,
}

impl std::fmt::Debug for ProcessEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ProcessEnd { guest: _, container, exec, coming } = self;
        f.debug_struct("ProcessEnd")
            .field("container", container)
            .field("exec", exec)
            .field("told", &coming.is_none())
            .finish()
    }
}

impl ProcessEnd {
    /// Waits for it. May be given up, and be called again, also after the end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn wait(&mut self) -> Result<ProcessExit, GuestError> {
        let exit = match &mut self.coming {
            Some(coming) => coming.await.unwrap_or_else(|_| {
                let (rpc, what) = (WAIT, "whoever listened to it was cut off");
                Err(GuestError::Nonsense { rpc, what })
            }),
            None => self.guest.wait_process(&self.container, self.exec.as_deref()).await,
        };
        self.coming = None;
        exit
    }
}

type Events = Streaming<proto::ProcessEvent>;

const START: &str = "StartContainer";
const EXEC: &str = "ExecProcess";
const WAIT: &str = "WaitProcess";

impl Guest {
    /// Starts the program of a created container. Returns what tells its end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn start_container(
        &self,
        id: &str,
    ) -> Result<Result<ProcessEnd, StartFailure>, GuestError> {
        let request = proto::StartContainerRequest { id: id.to_owned() };
        let events = call!(self, start_container, START, request)?;
        self.started(START, events, id, None).await
    }

    /// Runs one more process in a running container. Returns what tells its end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn exec_process(
        &self,
        container: &str,
        exec: &str,
        process: Vec<u8>,
        stdio: proto::Stdio,
    ) -> Result<Result<ProcessEnd, StartFailure>, GuestError> {
        let request = proto::ExecProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            process,
            stdio: Some(stdio),
        };
        let events = call!(self, exec_process, EXEC, request)?;
        self.started(EXEC, events, container, Some(exec)).await
    }

    /// Takes the first of the events that a process has, and has the last be listened for.
    async fn started(
        &self,
        rpc: &'static str,
        mut events: Events,
        container: &str,
        exec: Option<&str>,
    ) -> Result<Result<ProcessEnd, StartFailure>, GuestError> {
        match self.event(rpc, &mut events).await? {
            Event::Started(_) => {}
            Event::Failure(failure) => {
                self.no_more(rpc, &mut events).await?;
                return start_failure(rpc, failure).map(Err);
            }
            Event::Exited(_) => {
                return Err(GuestError::Nonsense { rpc, what: "an end without a start" });
            }
        }
        let guest = self.clone();
        let coming = Task::spawn(async move {
            match guest.event(rpc, &mut events).await? {
                Event::Exited(exit) => {
                    let exit = guest.exit(rpc, exit);
                    guest.no_more(rpc, &mut events).await?;
                    exit
                }
                Event::Started(_) | Event::Failure(_) => {
                    Err(GuestError::Nonsense { rpc, what: "a second start" })
                }
            }
        });
        Ok(Ok(ProcessEnd {
            guest: self.clone(),
            container: container.to_owned(),
            exec: exec.map(str::to_owned),
            coming: Some(coming),
        }))
    }

    async fn event(&self, rpc: &'static str, events: &mut Events) -> Result<Event, GuestError> {
        match events.message().await {
            Ok(Some(proto::ProcessEvent { event: Some(event) })) => Ok(event),
            Ok(Some(_)) => Err(GuestError::Nonsense { rpc, what: "an event is empty" }),
            Ok(None) => Err(GuestError::Nonsense { rpc, what: "it ends too early" }),
            Err(status) => Err(self.failed(rpc, status).await),
        }
    }

    /// Reads to the end of the answers, which comes with the last: to give them up before would cost
    /// the guest a message.
    async fn no_more(&self, rpc: &'static str, events: &mut Events) -> Result<(), GuestError> {
        match events.message().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(GuestError::Nonsense { rpc, what: "it goes on after the end" }),
            Err(status) => Err(self.failed(rpc, status).await),
        }
    }

    /// Waits for the end of a container's process, or of one that was started in it (`exec`).
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn wait_process(
        &self,
        container: &str,
        exec: Option<&str>,
    ) -> Result<ProcessExit, GuestError> {
        let request = proto::WaitProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
        };
        let exit = call!(self, wait_process, WAIT, request)?;
        self.exit(WAIT, exit)
    }

    /// Checks what is told of a process's end, and expects no output any more that will not come.
    fn exit(&self, rpc: &'static str, exit: proto::ProcessExit) -> Result<ProcessExit, GuestError> {
        let proto::ProcessExit { exit_code, signal, oom_killed, exited_at_ns, unused_ports } = exit;
        let nonsense = |what| GuestError::Nonsense { rpc, what };
        // Standard output and standard error.
        if unused_ports.len() > 2 {
            return Err(nonsense("more than two outputs without a connection"));
        }
        for port in unused_ports {
            self.vm().withdraw(port);
        }
        Ok(ProcessExit {
            exit_code: u8::try_from(exit_code).map_err(|_| nonsense("an exit code above 255"))?,
            signal: u8::try_from(signal).map_err(|_| nonsense("a signal above 255"))?,
            oom_killed,
            at: SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_nanos(exited_at_ns))
                .ok_or_else(|| nonsense("a time out of range"))?,
        })
    }
}

//! Starting programs in the guest, and how they end.
//!
//! Whoever starts a program waits for its end next. So that this costs no second journey to the
//! guest and back, the question for the end goes out right behind the request to start: the agent
//! answers it when there is an end to tell. The answer is taken when it comes, whether or not anybody
//! waits for it then: it also says which of the outputs will never come.

use std::pin::Pin;
use std::time::{Duration, SystemTime};

use husk_proto::agent::{self as proto, exec_process_response};

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

type Answer = Pin<Box<dyn Future<Output = Result<ProcessExit, GuestError>> + Send>>;

/// The end of a process that has been started.
pub struct ProcessEnd {
    guest: Guest,
    container: String,
    /// `None` for the container's own process.
    exec: Option<String>,
    /// To the question that went out with the start; `None` once it has been told.
    answer: Option<Answer>,
}

impl std::fmt::Debug for ProcessEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ProcessEnd { guest: _, container, exec, answer } = self;
        f.debug_struct("ProcessEnd")
            .field("container", container)
            .field("exec", exec)
            .field("told", &answer.is_none())
            .finish()
    }
}

impl ProcessEnd {
    fn new(guest: &Guest, container: &str, exec: Option<&str>) -> ProcessEnd {
        let (container, exec) = (container.to_owned(), exec.map(str::to_owned));
        let mut end = ProcessEnd { guest: guest.clone(), container, exec, answer: None };
        end.answer = Some(end.ask());
        end
    }

    fn ask(&self) -> Answer {
        let (guest, container, exec) =
            (self.guest.clone(), self.container.clone(), self.exec.clone());
        Box::pin(async move { guest.wait_process(&container, exec.as_deref()).await })
    }

    /// Waits for it. May be given up, and be called again, also after the end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn wait(&mut self) -> Result<ProcessExit, GuestError> {
        let answer = match self.answer.take() {
            Some(answer) => answer,
            None => self.ask(),
        };
        let exit = self.answer.insert(answer).await;
        self.answer = None;
        exit
    }

    /// Waits for the end that comes before, or while, `start` does: the two requests are made in
    /// this order, and at once.
    async fn behind<T>(
        mut self,
        start: impl Future<Output = Result<Result<T, StartFailure>, GuestError>>,
    ) -> Result<Result<(T, ProcessEnd), StartFailure>, GuestError> {
        let mut start = std::pin::pin!(start);
        let started = tokio::select! {
            biased;
            started = &mut start => started,
            end = self.wait() => {
                let started = start.await;
                self.answer = match end {
                    // It came before the process had its name: to be asked again.
                    Err(GuestError::Refused { .. }) => None,
                    end => Some(Box::pin(std::future::ready(end))),
                };
                started
            }
        };
        Ok(started?.map(|started| {
            self.answer = self.answer.take().map(go_on);
            (started, self)
        }))
    }
}

/// Has a question be asked to its end whether or not it is waited for.
fn go_on(answer: Answer) -> Answer {
    let task = Task::spawn(answer);
    Box::pin(async move {
        let cut_off = GuestError::Nonsense { rpc: "WaitProcess", what: "the call was cut off" };
        task.await.unwrap_or(Err(cut_off))
    })
}

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
        let start = async {
            let proto::StartContainerResponse { failure } =
                call!(self, start_container, "StartContainer", request)?;
            match failure {
                None => Ok(Ok(())),
                Some(failure) => start_failure("StartContainer", failure).map(Err),
            }
        };
        let started = ProcessEnd::new(self, id, None).behind(start).await?;
        Ok(started.map(|((), end)| end))
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
        use exec_process_response::Result::{Failure, Pid};
        let request = proto::ExecProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            process,
            stdio: Some(stdio),
        };
        let start = async {
            let proto::ExecProcessResponse { result } =
                call!(self, exec_process, "ExecProcess", request)?;
            match result {
                Some(Pid(_)) => Ok(Ok(())),
                Some(Failure(failure)) => start_failure("ExecProcess", failure).map(Err),
                None => Err(GuestError::Nonsense { rpc: "ExecProcess", what: "it is empty" }),
            }
        };
        let started = ProcessEnd::new(self, container, Some(exec)).behind(start).await?;
        Ok(started.map(|((), end)| end))
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
        let proto::WaitProcessResponse {
            exit_code,
            signal,
            oom_killed,
            exited_at_ns,
            unused_ports,
        } = call!(self, wait_process, "WaitProcess", request)?;
        let nonsense = |what| GuestError::Nonsense { rpc: "WaitProcess", what };
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

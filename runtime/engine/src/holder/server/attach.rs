//! Joining a container's first process: its output from now on, and its input.

use std::sync::Arc;
use std::time::Duration;

use husk_proto::pod as wire;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::exec::{exited, size, started, stderr, stdout};
use super::{QUEUE, Served, To, check_piece, refused};
use crate::pod::{ContainerState, ContainerStatus, Input, LogChunk, PodStatus, Stream, Terminated};

/// How long the last output may be on its way after the container was seen ended.
const REST: Duration = Duration::from_millis(500);

/// Joins the container that the first message names.
pub(super) async fn attach(
    served: Served,
    mut requests: Streaming<wire::AttachRequest>,
) -> Result<mpsc::Receiver<Result<wire::ProcessOutput, Status>>, Status> {
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(wire::attach_request::Message::Start(start)) = first else {
        return Err(Status::invalid_argument("the first message must be the start"));
    };
    let wire::AttachStart { container, stdin, size: window } = start;
    let spec = served.access.container(&container).map_err(|error| refused(&error))?;
    let (tty, once) = (spec.tty, spec.stdin_once);
    let tap = served.taps.of(&container);
    let tap = tap.ok_or_else(|| Status::not_found("the container has no output"))?;
    let run = running(&served.status.borrow(), &container).ok_or_else(|| {
        Status::failed_precondition(format!("container {container} does not run"))
    })?;
    let input = match stdin {
        false => None,
        true => Some(
            served.access.input(&container).map_err(|error| refused(&error))?.ok_or_else(|| {
                Status::failed_precondition(format!(
                    "container {container} has no standard input: its manifest does not say \
                     `stdin: true`"
                ))
            })?,
        ),
    };
    if let Some(window) = window.filter(|_| tty) {
        resize(&served, &container, window).await;
    }
    let (to, answers) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let output = show(tap, &to, (served.status.clone(), &container, run), tty);
        let feed = feed(&served, &container, input.as_ref(), requests);
        tokio::pin!(output, feed);
        let fed = tokio::select! {
            () = &mut output => Ok(()),
            fed = &mut feed => match fed {
                Ok(()) => {
                    output.await;
                    Ok(())
                }
                Err(refusal) => Err(refusal),
            },
        };
        if let Err(refusal) = fed {
            drop(to.send(Err(refusal)).await);
        }
        // As in Kubernetes: the input ends with the first one who leaves.
        if once && let Some(input) = &input {
            drop(input.send(Input::End).await);
        }
    });
    Ok(answers)
}

async fn resize(served: &Served, container: &str, window: wire::WindowSize) {
    if let Err(error) = served.access.resize(container, size(window)).await {
        tracing::debug!(container, %error, "a terminal keeps its size");
    }
}

fn of<'a>(status: &'a PodStatus, container: &str) -> Option<&'a ContainerStatus> {
    status.containers.iter().find(|status| status.name == container)
}

/// The number of the run that a container is in.
fn running(status: &PodStatus, container: &str) -> Option<u32> {
    let status = of(status, container)?;
    matches!(status.state, ContainerState::Running { .. }).then_some(status.restarts)
}

/// How a container's run ended: `Some` if it has, and inside what is known of it.
fn end_of(status: &PodStatus, container: &str, run: u32) -> Option<Option<Terminated>> {
    let status = of(status, container)?;
    if status.restarts > run {
        let known = status.restarts.checked_sub(1) == Some(run);
        return Some(status.last.clone().filter(|_| known));
    }
    match &status.state {
        ContainerState::Running { .. } => None,
        ContainerState::Waiting { .. } => Some(status.last.clone()),
        ContainerState::Terminated(end) => Some(Some(end.clone())),
    }
}

/// Shows what the container writes until this run of it has ended, or the command is gone, or too
/// slow.
async fn show(
    mut tap: broadcast::Receiver<Arc<LogChunk>>,
    to: &To<wire::ProcessOutput>,
    (mut status, container, run): (watch::Receiver<PodStatus>, &str, u32),
    tty: bool,
) {
    if to.send(Ok(started(tty))).await.is_err() {
        return;
    }
    let over = async {
        let over = status.wait_for(|status| end_of(status, container, run).is_some()).await;
        let end = over.ok().and_then(|status| end_of(&status, container, run)).flatten();
        // Its output came before, but on another way.
        tokio::time::sleep(REST).await;
        end
    };
    tokio::pin!(over);
    let mut open = if tty { 1 } else { 2 };
    let mut end = None;
    while open > 0 {
        let chunk = tokio::select! {
            biased;
            () = to.closed() => return,
            chunk = tap.recv() => chunk,
            known = &mut over => {
                end = Some(known);
                break;
            }
        };
        let answer = match chunk {
            Ok(chunk) if chunk.bytes.is_empty() => {
                open -= 1;
                continue;
            }
            Ok(chunk) => match chunk.stream {
                Stream::Stdout => Ok(stdout(chunk.bytes.clone())),
                Stream::Stderr => Ok(stderr(chunk.bytes.clone())),
            },
            Err(RecvError::Closed) => break,
            Err(RecvError::Lagged(_)) => Err(Status::resource_exhausted(
                "cut off: output came faster than it was taken; `husk logs` has all of it",
            )),
        };
        let last = answer.is_err();
        if to.send(answer).await.is_err() || last {
            return;
        }
    }
    let end = match end {
        Some(end) => end,
        None => over.await,
    };
    let last = match end {
        Some(end) => Ok(exited(end.exit_code, end.signal)),
        None => Err(Status::unavailable("nobody knows how the container ended")),
    };
    drop(to.send(last).await);
}

/// Does what the command says, until it says no more.
async fn feed(
    served: &Served,
    container: &str,
    input: Option<&mpsc::Sender<Input>>,
    mut requests: Streaming<wire::AttachRequest>,
) -> Result<(), Status> {
    use wire::attach_request::Message;
    use wire::input::Input as Said;
    while let Ok(Some(wire::AttachRequest { message })) = requests.message().await {
        let Some(Message::Input(wire::Input { input: Some(said) })) = message else { continue };
        match (said, input) {
            (Said::Stdin(bytes), Some(input)) => {
                check_piece("stdin", &bytes)?;
                drop(input.send(Input::Bytes(bytes)).await);
            }
            (Said::End(wire::EndOfInput {}), Some(input)) => drop(input.send(Input::End).await),
            (Said::Stdin(_) | Said::End(_), None) => {}
            (Said::Size(window), _) => resize(served, container, window).await,
            (Said::Signal(signal), _) => {
                if let Err(error) = served.access.signal(container, signal, false).await {
                    tracing::debug!(container, %error, "a signal was not delivered");
                }
            }
        }
    }
    Ok(())
}

//! A process in a container, or beside all of them, for a command.

use std::time::Duration;

use husk_proto::agent as guest_wire;
use husk_proto::pod as wire;
use husk_proto::pod::process_output::Output;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::{QUEUE, To, check_piece, pump, refused, refused_by_guest};
use crate::guest::StartFailure;
use crate::pod::{AccessError, ExecProcess, ExecRequest, ExecStreams, PodAccess};

/// SIGHUP: what a terminal sends that is closed.
const SIGHUP: u32 = 1;

/// How long the rest of the output may take after the process's end. The agent closes the streams
/// when all is delivered, so this is for a guest that is broken.
const EOF_GRACE: Duration = Duration::from_secs(15);

fn output(output: Output) -> wire::ProcessOutput {
    wire::ProcessOutput { output: Some(output) }
}

pub(super) fn stdout(bytes: Vec<u8>) -> wire::ProcessOutput {
    output(Output::Stdout(bytes))
}

pub(super) fn stderr(bytes: Vec<u8>) -> wire::ProcessOutput {
    output(Output::Stderr(bytes))
}

pub(super) fn started(tty: bool) -> wire::ProcessOutput {
    output(Output::Started(wire::Started { tty }))
}

pub(super) fn exited(exit_code: u8, signal: u8) -> wire::ProcessOutput {
    let (exit_code, signal) = (exit_code.into(), signal.into());
    output(Output::Exited(wire::Exited { exit_code, signal }))
}

pub(super) fn size(size: wire::WindowSize) -> (u32, u32) {
    let wire::WindowSize { width, height } = size;
    (width, height)
}

/// What becomes of a process that was asked for.
type Started = Result<Result<(ExecProcess, ExecStreams), StartFailure>, AccessError>;

/// What a command is answered.
type Answered = mpsc::Receiver<Result<wire::ProcessOutput, Status>>;

/// Starts in a container what the first message says.
pub(super) async fn exec(
    access: PodAccess,
    mut requests: Streaming<wire::ExecRequest>,
) -> Result<Answered, Status> {
    let request = first(&mut requests).await?;
    if request.args.is_empty() {
        return Err(Status::invalid_argument("args: there must be a program"));
    }
    let (tty, started) = (request.tty, access.exec(request).await);
    answer(started, requests, tty)
}

/// Starts beside the containers what the first message says.
pub(super) async fn debug(
    access: PodAccess,
    mut requests: Streaming<wire::ExecRequest>,
) -> Result<Answered, Status> {
    let request = first(&mut requests).await?;
    if !request.container.is_empty() {
        return Err(Status::invalid_argument("container: must be empty, it is beside all"));
    }
    let (tty, started) = (request.tty, access.debug(request).await);
    answer(started, requests, tty)
}

/// What the first message asks for.
async fn first(requests: &mut Streaming<wire::ExecRequest>) -> Result<ExecRequest, Status> {
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(wire::exec_request::Message::Start(start)) = first else {
        return Err(Status::invalid_argument("the first message must be the start"));
    };
    let wire::ExecStart { container, args, env, cwd, user, tty, stdin, size: window } = start;
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    Ok(ExecRequest {
        container,
        args,
        env,
        cwd: some(cwd),
        user: some(user),
        tty,
        stdin,
        size: window.map(size),
    })
}

/// Serves a process that was started, or tells why it was not.
fn answer(
    started: Started,
    requests: Streaming<wire::ExecRequest>,
    tty: bool,
) -> Result<Answered, Status> {
    let (to, answers) = mpsc::channel(QUEUE);
    match started.map_err(|error| refused(&error))? {
        Ok((process, streams)) => {
            tokio::spawn(serve(process, streams, requests, to, tty));
        }
        Err(StartFailure { exit_code, message }) => {
            let exit_code = exit_code.into();
            let failure = guest_wire::StartFailure { exit_code, message };
            // There is room for it.
            drop(to.try_send(Ok(output(Output::Failure(failure)))));
        }
    }
    Ok(answers)
}

/// Carries the streams of a process until its end, or until the command is gone.
async fn serve(
    process: ExecProcess,
    streams: ExecStreams,
    requests: Streaming<wire::ExecRequest>,
    to: To<wire::ProcessOutput>,
    tty: bool,
) {
    let ExecStreams { stdin, stdout: out, stderr: err } = streams;
    let mut pumps = JoinSet::new();
    let run = async {
        drop(to.send(Ok(started(tty))).await);
        pumps.spawn(pump(out, to.clone(), stdout));
        if let Some(err) = err {
            pumps.spawn(pump(err, to.clone(), stderr));
        }
        let process = &process;
        let feed = feed(process, stdin, requests);
        let wait = process.wait();
        tokio::pin!(feed, wait);
        // Input may end long before the process does.
        let exit = tokio::select! {
            exit = &mut wait => exit,
            fed = &mut feed => match fed {
                Ok(()) => wait.await,
                Err(refusal) => return Err(refusal),
            },
        };
        let rest = async { while pumps.join_next().await.is_some() {} };
        if tokio::time::timeout(EOF_GRACE, rest).await.is_err() {
            tracing::warn!("the guest does not close a stream of an exec");
        }
        match exit {
            Ok(exit) => Ok(exited(exit.exit_code, exit.signal)),
            Err(error) => Err(refused_by_guest(&error)),
        }
    };
    let last = tokio::select! {
        last = run => last,
        () = to.closed() => Err(Status::cancelled("the command is gone")),
    };
    if last.is_ok() {
        // Before the command is told, so that nothing is left then.
        process.finish().await;
        drop(to.send(last).await);
        return;
    }
    drop(to.send(last).await);
    // The command is gone, or sent what it must not. Its streams were closed by leaving them; a terminal also hangs up.
    if tty && let Err(error) = process.signal(SIGHUP).await {
        tracing::debug!(%error, "a process without a command has ended");
    }
}

/// Does what the command says, until it says no more.
async fn feed(
    process: &ExecProcess,
    mut stdin: Option<UnixStream>,
    mut requests: Streaming<wire::ExecRequest>,
) -> Result<(), Status> {
    use wire::exec_request::Message;
    use wire::input::Input;
    loop {
        let message = match requests.message().await {
            Ok(Some(wire::ExecRequest { message })) => message,
            // A command that is gone is seen by its answers' end.
            Ok(None) | Err(_) => break,
        };
        let Some(Message::Input(wire::Input { input: Some(input) })) = message else { continue };
        let done = match input {
            Input::Stdin(bytes) => {
                check_piece("stdin", &bytes)?;
                if let Some(to) = &mut stdin
                    && let Err(error) = to.write_all(&bytes).await
                {
                    // A program need not read its input to the end.
                    tracing::debug!(%error, "a process takes no input any more");
                    stdin = None;
                }
                Ok(())
            }
            Input::End(wire::EndOfInput {}) => {
                stdin = None;
                Ok(())
            }
            Input::Size(window) => process.resize(size(window)).await,
            Input::Signal(signal) => process.signal(signal).await,
        };
        if let Err(error) = done {
            tracing::debug!(%error, "a process did not get what it was sent");
        }
    }
    // The end of the requests is the end of the input.
    drop(stdin);
    Ok(())
}

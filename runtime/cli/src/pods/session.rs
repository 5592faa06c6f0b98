//! A process in a container and the terminal or pipes of a command, joined.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::Context;
use husk_engine::holder::client::Streaming;
use husk_engine::holder::client::messages::input::Input as Kind;
use husk_engine::holder::client::messages::process_output::Output;
use husk_engine::holder::client::messages::{
    EndOfInput, Exited, Input, ProcessOutput, Started, WindowSize,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::refusal;
use super::terminal::{self, DetachKeys, Raw};

/// How many pieces of input may wait for the pod's process.
pub(super) const QUEUE: usize = 4;

/// Largest piece of input, in bytes.
const PIECE: usize = 32 * 1024;

/// What a session is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session {
    /// Whether standard input is passed on.
    pub(super) stdin: bool,
    /// Whether the terminal is made raw, its size is followed, and the keys are looked for.
    pub(super) tty: bool,
    /// Whether ctrl-p ctrl-q leaves the process alone.
    pub(super) detach: bool,
    /// Whether signals are passed on to the process; else they end the command.
    pub(super) signals: bool,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The process exited with this code.
    Exited(u8),
    /// Its program could not be executed: the exit code, and why.
    NotExecuted(u8, String),
    /// The command left it.
    Left,
}

/// What comes of the standard input.
enum Typed {
    Input(Kind),
    Detach,
}

/// The terminal's size as a message.
pub(super) fn window() -> Option<WindowSize> {
    terminal::size().map(|(width, height)| WindowSize { width, height })
}

/// Joins the streams until the process has ended. `send` makes a message of an input.
pub(super) async fn join<T: Send + 'static>(
    session: Session,
    mut output: Streaming<ProcessOutput>,
    to: mpsc::Sender<T>,
    send: impl Fn(Input) -> T,
) -> anyhow::Result<End> {
    let _raw = match session.tty && session.stdin && terminal::is_ours() {
        true => Some(Raw::enter()?),
        false => None,
    };
    let mut typed = match session.stdin {
        true => read_stdin(session.detach && session.tty)?,
        // Stays silent.
        false => mpsc::channel(1).1,
    };
    let mut signals = Signals::new()?;
    let mut typing = session.stdin;
    loop {
        let input = tokio::select! {
            message = output.message() => {
                match message.map_err(refusal)? {
                    Some(message) => match show(message)? {
                        Some(end) => return Ok(end),
                        None => continue,
                    },
                    None => anyhow::bail!("the pod's process ended the conversation"),
                }
            }
            typed = typed.recv(), if typing => match typed {
                Some(Typed::Input(input)) => input,
                Some(Typed::Detach) => return Ok(End::Left),
                None => {
                    typing = false;
                    continue;
                }
            },
            number = signals.next() => match number {
                Got::Resized => match window() {
                    Some(window) if session.tty => Kind::Size(window),
                    _ => continue,
                },
                Got::Signal(number) if session.signals => Kind::Signal(number),
                Got::Signal(_) => return Ok(End::Left),
            },
        };
        // The input may be taken slowly: meanwhile output is shown all the same.
        let sent = to.send(send(Input { input: Some(input) }));
        tokio::pin!(sent);
        loop {
            tokio::select! {
                biased;
                sent = &mut sent => {
                    // The end of the process is on its way.
                    drop(sent);
                    break;
                }
                message = output.message() => match message.map_err(refusal)? {
                    Some(message) => if let Some(end) = show(message)? {
                        return Ok(end);
                    },
                    None => anyhow::bail!("the pod's process ended the conversation"),
                }
            }
        }
    }
}

/// Shows output. Returns the end, if it is that.
fn show(message: ProcessOutput) -> anyhow::Result<Option<End>> {
    let code = |code: u32| u8::try_from(code).unwrap_or(u8::MAX);
    match message.output {
        Some(Output::Stdout(bytes)) => {
            let mut out = std::io::stdout().lock();
            out.write_all(&bytes).and_then(|()| out.flush()).context("cannot write the output")?;
        }
        Some(Output::Stderr(bytes)) => {
            std::io::stderr().lock().write_all(&bytes).context("cannot write the output")?;
        }
        Some(Output::Exited(Exited { exit_code, signal: _ })) => {
            return Ok(Some(End::Exited(code(exit_code))));
        }
        Some(Output::Failure(failure)) => {
            return Ok(Some(End::NotExecuted(code(failure.exit_code), failure.message)));
        }
        Some(Output::Started(Started { tty: _ })) | None => {}
    }
    Ok(None)
}

/// A thread that reads the standard input: it may be held up for ever, and ends with the program.
fn read_stdin(detach: bool) -> anyhow::Result<mpsc::Receiver<Typed>> {
    let (to, typed) = mpsc::channel(QUEUE);
    let read = move || {
        let mut keys = DetachKeys::default();
        let mut buffer = vec![0; PIECE];
        loop {
            let bytes = match std::io::stdin().lock().read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => buffer.get(..n).unwrap_or_default(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot read the standard input");
                    break;
                }
            };
            let (bytes, left) = if detach { keys.filter(bytes) } else { (bytes.to_vec(), false) };
            let input = Typed::Input(Kind::Stdin(bytes));
            if to.blocking_send(input).is_err()
                || (left && to.blocking_send(Typed::Detach).is_err())
            {
                return;
            }
        }
        // If nobody listens any more, the process has ended.
        drop(to.blocking_send(Typed::Input(Kind::End(EndOfInput {}))));
    };
    std::thread::Builder::new()
        .name("input".into())
        .spawn(read)
        .context("cannot start a thread")?;
    Ok(typed)
}

/// What the kernel tells the command.
struct Signals {
    ends: Vec<(u32, tokio::signal::unix::Signal)>,
    resized: tokio::signal::unix::Signal,
}

enum Got {
    Signal(u32),
    Resized,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let context = "cannot watch for signals";
        let kinds = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
        ];
        let mut ends = Vec::new();
        for kind in kinds {
            let number = u32::try_from(kind.as_raw_value()).context(context)?;
            ends.push((number, signal(kind).context(context)?));
        }
        Ok(Signals { ends, resized: signal(SignalKind::window_change()).context(context)? })
    }

    async fn next(&mut self) -> Got {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.ends {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(Got::Signal(*number));
                }
            }
            self.resized.poll_recv(context).map(|_| Got::Resized)
        })
        .await
    }
}

/// How long the last messages to the pod's process may take after the command left.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(200);

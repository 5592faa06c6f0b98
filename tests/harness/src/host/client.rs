//! Runs a command in the test host as if it ran here: its input, output, signals and exit code.

use std::io::{IsTerminal, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGWINCH};

use super::instance::Instance;
use crate::wire::{
    Command, Frame, Kind, Operation, Outcome, STDIN_CHUNK, Size, receive, send, send_json,
};

/// After this many of the same signal the command is given up.
const IMPATIENCE: u32 = 3;

/// Where a command's standard input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// This process's.
    Forward,
    /// Nothing: at its end from the start.
    Empty,
}

/// The command was killed because it took too long.
#[derive(Debug)]
pub(crate) struct TimedOut(Duration);

impl TimedOut {
    /// As `timeout(1)` has it.
    pub(crate) const EXIT_CODE: u8 = 124;
}

impl std::fmt::Display for TimedOut {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "time-out after {} s", self.0.as_secs())
    }
}

impl std::error::Error for TimedOut {}

/// Runs `command`; its output goes to this process's standard output and error. A command that
/// takes longer than `timeout` is killed, which is an error.
///
/// # Errors
/// When the test host or the connection fails, or at the time-out.
pub(crate) fn run(
    instance: &Instance,
    command: Command,
    input: Input,
    timeout: Option<Duration>,
) -> Result<Outcome> {
    run_into(instance, command, input, timeout, &mut std::io::stdout(), &mut std::io::stderr())
}

/// As [`run`], with the output going elsewhere.
pub(crate) fn run_into(
    instance: &Instance,
    command: Command,
    input: Input,
    timeout: Option<Duration>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Result<Outcome> {
    let raw = command.terminal.map(|_| RawTerminal::enter()).transpose()?;
    let mut signals = Signals::register()?;
    let mut stream = instance.request(Operation::Exec(command))?;
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut may_send = input == Input::Forward;
    if !may_send {
        send(&mut stream, Kind::Stdin, b"").context("closing the input")?;
    }
    loop {
        let ready = wait(&stream, &signals, may_send, deadline)?;
        let Some(ready) = ready else {
            // The connection's end makes the agent kill all of it.
            return Err(TimedOut(timeout.unwrap_or_default()).into());
        };
        if ready.stream {
            let Some(frame) = receive(&mut stream)? else {
                bail!("the test host ended or lost the connection");
            };
            match deliver(frame, stdout, stderr)? {
                Delivered::Output => {}
                Delivered::InputTaken => may_send = true,
                Delivered::End(outcome) => {
                    drop(raw);
                    return Ok(outcome);
                }
            }
        }
        for signal in signals.take(&ready.signals)? {
            forward_signal(&mut stream, signal, &mut signals)?;
        }
        if ready.stdin {
            may_send = false;
            forward_input(&mut stream)?;
        }
    }
}

struct Ready {
    stream: bool,
    stdin: bool,
    signals: Vec<bool>,
}

/// Blocks until something is ready; `None` at the deadline.
fn wait(
    stream: &TcpStream,
    signals: &Signals,
    want_stdin: bool,
    deadline: Option<Instant>,
) -> Result<Option<Ready>> {
    let stdin = std::io::stdin();
    let mut fds = vec![PollFd::new(stream, PollFlags::IN)];
    fds.extend(signals.pipes.iter().map(|(_, pipe)| PollFd::new(pipe, PollFlags::IN)));
    if want_stdin {
        fds.push(PollFd::new(&stdin, PollFlags::IN));
    }
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(Timespec::try_from).transpose().context("time-out")?;
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
    let stream = ready.next().unwrap_or(false);
    let signal_flags: Vec<bool> = ready.by_ref().take(signals.pipes.len()).collect();
    Ok(Some(Ready { stream, stdin: ready.next().unwrap_or(false), signals: signal_flags }))
}

enum Delivered {
    Output,
    InputTaken,
    End(Outcome),
}

fn deliver(frame: Frame, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<Delivered> {
    let write = |to: &mut dyn Write| to.write_all(&frame.payload).and_then(|()| to.flush());
    match frame.kind {
        Kind::Stdout => write(stdout).context("writing standard output")?,
        Kind::Stderr => write(stderr).context("writing standard error")?,
        Kind::StdinTaken => return Ok(Delivered::InputTaken),
        Kind::Exit => return Ok(Delivered::End(frame.json()?)),
        Kind::Error => bail!("in the test host: {}", String::from_utf8_lossy(&frame.payload)),
        other => bail!("unexpected {other:?} frame"),
    }
    Ok(Delivered::Output)
}

fn forward_input(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; STDIN_CHUNK];
    // Not through std's buffer, which poll knows nothing of.
    let count = rustix::io::retry_on_intr(|| {
        rustix::io::read(rustix::stdio::stdin(), buffer.as_mut_slice())
    })
    .context("reading standard input")?;
    buffer.truncate(count);
    send(stream, Kind::Stdin, &buffer).context("forwarding standard input")
}

fn forward_signal(stream: &mut TcpStream, signal: i32, signals: &mut Signals) -> Result<()> {
    if signal == SIGWINCH {
        return match terminal_size() {
            Some(size) => send_json(stream, Kind::Resize, &size),
            None => Ok(()),
        };
    }
    signals.received += 1;
    if signals.received > IMPATIENCE {
        bail!("given up after {} signals", signals.received);
    }
    let number = if signals.received == IMPATIENCE { SIGKILL } else { signal };
    send_json(stream, Kind::Signal, &number)
}

/// The size of the terminal on standard input.
pub(crate) fn terminal_size() -> Option<Size> {
    let size = tcgetwinsize(rustix::stdio::stdin()).ok()?;
    Some(Size { rows: size.ws_row, columns: size.ws_col })
}

/// Signals as readable descriptors.
struct Signals {
    pipes: Vec<(i32, UnixStream)>,
    ids: Vec<signal_hook::SigId>,
    received: u32,
}

impl Signals {
    fn register() -> Result<Self> {
        let mut signals = Self { pipes: Vec::new(), ids: Vec::new(), received: 0 };
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH] {
            let (read, write) = UnixStream::pair().context("making a signal pipe")?;
            read.set_nonblocking(true).context("making a signal pipe non-blocking")?;
            let id = signal_hook::low_level::pipe::register(signal, write)
                .with_context(|| format!("handling signal {signal}"))?;
            signals.pipes.push((signal, read));
            signals.ids.push(id);
        }
        Ok(signals)
    }

    fn take(&mut self, ready: &[bool]) -> Result<Vec<i32>> {
        let mut taken = Vec::new();
        for ((signal, pipe), ready) in self.pipes.iter_mut().zip(ready) {
            if *ready {
                let mut buffer = [0; 64];
                pipe.read(&mut buffer).context("reading a signal pipe")?;
                taken.push(*signal);
            }
        }
        Ok(taken)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in &self.ids {
            signal_hook::low_level::unregister(*id);
        }
    }
}

/// The terminal on standard input in raw mode; as it was before on drop.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            bail!("standard input is not a terminal");
        }
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin).context("tcgetattr")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Drain, &raw).context("tcsetattr")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let stdin = rustix::stdio::stdin();
        if let Err(error) = tcsetattr(stdin, OptionalActions::Drain, &self.before) {
            eprintln!("husk-testhost: restoring the terminal: {error}");
        }
    }
}

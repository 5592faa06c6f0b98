//! A process's streams: pipes or a terminal on one side, a connection to the host for each on the
//! other.
//!
//! Back-pressure: a process's output is spliced from its pipe into the connection as far as the host
//! takes it, so that a reader that stops grows nobody's memory. What cannot be spliced, as a
//! terminal's, is read only after the host took what was read before: there is at most one buffer of
//! [`buffer::BYTES`] for each such stream, and none while a stream is idle.
//!
//! Input and terminals are connected before the process starts. An output that goes through a pipe is
//! connected when something is written to it: most processes write nothing to one of the two, and
//! many checks and hooks nothing at all.
//!
//! A process has ended for its client when all that it wrote was taken. What delays that is bounded:
//! a descendant that keeps the output open by [`DRAIN_LIMIT`], a host that does not read by
//! [`carry::READER_LIMIT`] more.

mod buffer;
mod carry;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::Stdio;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use carry::{Carried, Source, from_host_to_pipe, from_host_to_terminal, to_host};

pub(crate) use carry::Host;

use crate::sys;
use crate::transport::{ConnectError, Transport};

/// How long a process that has ended waits for the end of its output, which comes at once unless a
/// descendant of it lives on and holds its output open, or the host reads slowly.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Streams that could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("stdio: with a terminal, stderr_port must be 0, but it is {0}")]
    StderrOfTerminal(u32),
    #[error("stdio")]
    Connect(#[source] ConnectError),
    #[error("stdio: {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> StdioError {
    move |source| StdioError::Io { what, source: source.into() }
}

/// Connections and pipes that nothing flows through yet.
pub(crate) enum Ends {
    Pipes {
        input: Option<(UnixStream, pipe::Sender)>,
        /// With what is to be connected when there is something to read.
        outputs: Vec<(AsyncFd<OwnedFd>, Host)>,
    },
    Terminal {
        input: Option<UnixStream>,
        output: Option<UnixStream>,
    },
}

/// The ports of outputs that were never connected, because nothing came; 0 for none.
pub(crate) type UnusedPorts = [u32; 2];

/// Streams whose pipes are there and whose connections are not.
pub(crate) struct Unconnected {
    stdin_port: u32,
    input: Option<pipe::Sender>,
    /// Ports with the pipes that lead to them.
    outputs: Vec<(u32, AsyncFd<OwnedFd>)>,
    /// The port of a terminal's output, for a process that has one; then there are no pipes.
    terminal_output: Option<u32>,
}

/// Makes the pipes of the streams that `ports` names (0: none). Returns what the process is to have
/// as its standard input, output and error; with a terminal, that is replaced by it.
///
/// # Errors
/// [`StdioError`]; then nothing is left open.
pub(crate) fn prepare(
    ports: &Stdio,
    terminal: bool,
) -> Result<(Unconnected, [OwnedFd; 3]), StdioError> {
    let Stdio { stdin_port, stdout_port, stderr_port } = *ports;
    if terminal {
        if stderr_port != 0 {
            return Err(StdioError::StderrOfTerminal(stderr_port));
        }
        let (input, outputs, terminal_output) = (None, Vec::new(), Some(stdout_port));
        let streams = Unconnected { stdin_port, input, outputs, terminal_output };
        return Ok((streams, [null()?, null()?, null()?]));
    }
    let make_pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe"));
    let (input, child_input) = match stdin_port {
        0 => (None, null()?),
        _ => {
            let (read, write) = make_pipe()?;
            let write = pipe::Sender::from_owned_fd(write).map_err(failed("watch a pipe"))?;
            (Some(write), read)
        }
    };
    let mut outputs = Vec::new();
    let mut child_output = |port: u32| match port {
        0 => null(),
        port => {
            let (read, write) = make_pipe()?;
            rustix::io::ioctl_fionbio(&read, true).map_err(failed("watch a pipe"))?;
            let read = sys::watch(read).map_err(failed("watch a pipe"))?;
            outputs.push((port, read));
            Ok(write)
        }
    };
    let (child_output, child_error) = (child_output(stdout_port)?, child_output(stderr_port)?);
    let streams = Unconnected { stdin_port, input, outputs, terminal_output: None };
    Ok((streams, [child_input, child_output, child_error]))
}

impl Unconnected {
    /// Connects the streams to the host that have to be there before the process starts. To be
    /// waited for beside the making of the process, which takes as long.
    ///
    /// # Errors
    /// [`StdioError`]; then nothing is left open.
    pub(crate) async fn connect(self, transport: &Transport) -> Result<Ends, StdioError> {
        let Unconnected { stdin_port, input, outputs, terminal_output } = self;
        let connect = |port: u32| async move {
            match port {
                0 => Ok(None),
                port => transport.connect(port).await.map(Some).map_err(StdioError::Connect),
            }
        };
        if let Some(port) = terminal_output {
            let (input, output) = tokio::try_join!(connect(stdin_port), connect(port))?;
            return Ok(Ends::Terminal { input, output });
        }
        let stdin = connect(stdin_port).await?;
        Ok(Ends::Pipes { input: stdin.zip(input), outputs: later(outputs, transport) })
    }

    /// The streams of a process that has neither an input nor a terminal: nothing has to be connected
    /// yet.
    pub(crate) fn without_connections(self, transport: &Transport) -> Ends {
        Ends::Pipes { input: None, outputs: later(self.outputs, transport) }
    }
}

/// Outputs that are connected when there is something to carry.
fn later(
    outputs: Vec<(u32, AsyncFd<OwnedFd>)>,
    transport: &Transport,
) -> Vec<(AsyncFd<OwnedFd>, Host)> {
    let later = |port| Host::Later { transport: transport.clone(), port };
    outputs.into_iter().map(|(port, pipe)| (pipe, later(port))).collect()
}

fn null() -> Result<OwnedFd, StdioError> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open /dev/null"))
}

/// The flowing streams of a process. Dropping it stops them and closes the connections.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<Carried>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// True once only what is there already is to be delivered.
    closing: watch::Sender<bool>,
}

impl Relay {
    /// Lets the streams flow. `master` is the terminal's, for a process that has one.
    ///
    /// # Errors
    /// If the terminal cannot be watched.
    pub(crate) fn start(ends: Ends, master: Option<OwnedFd>) -> Result<Self, StdioError> {
        let mut relay = Self::default();
        match ends {
            Ends::Pipes { input, outputs } => {
                relay.input = input.map(|(socket, pipe)| {
                    tokio::spawn(
                        async move { log_end("stdin", from_host_to_pipe(socket, pipe).await) },
                    )
                });
                for (pipe, host) in outputs {
                    let source = Source::pipe(pipe);
                    let closing = relay.closing.subscribe();
                    relay.outputs.push(tokio::spawn(to_host(source, host, closing)));
                }
            }
            Ends::Terminal { input, output } => {
                let Some(master) = master else { return Ok(relay) };
                let flags = rustix::fs::fcntl_getfl(&master).map_err(failed("terminal"))?;
                rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)
                    .map_err(failed("terminal"))?;
                let master = Arc::new(sys::watch(master).map_err(failed("watch the terminal"))?);
                relay.input = input.map(|socket| {
                    let master = Arc::clone(&master);
                    tokio::spawn(async move {
                        log_end("stdin", from_host_to_terminal(socket, &master).await);
                    })
                });
                // Read even if nobody wants it: a terminal that is not read from stops its writers.
                let source = Source::terminal(Arc::clone(&master));
                let host = output.map_or(Host::Gone, Host::Connected);
                let closing = relay.closing.subscribe();
                relay.outputs.push(tokio::spawn(to_host(source, host, closing)));
                relay.terminal = Some(master);
            }
        }
        Ok(relay)
    }

    /// Sets the window size in characters. False if the process has no terminal.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<bool> {
        let Some(master) = &self.terminal else { return Ok(false) };
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(master.get_ref(), size)?;
        Ok(true)
    }

    /// For a process that has ended: waits until all of its output has been handed to the host.
    /// After [`DRAIN_LIMIT`] what is there by then is all. Returns whether the output came to its
    /// end, and the host took all; and what was never connected.
    pub(crate) async fn drain(mut self) -> (bool, UnusedPorts) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let outputs = std::mem::take(&mut self.outputs);
        let all = async {
            let (mut complete, mut unused) = (true, UnusedPorts::default());
            // There are two at most.
            let mut places = unused.iter_mut();
            for output in outputs {
                // One that was aborted is not complete.
                let carried = output.await.unwrap_or_default();
                complete &= carried.complete;
                if let (Some(port), Some(place)) = (carried.unused, places.next()) {
                    *place = port;
                }
            }
            (complete, unused)
        };
        let mut all = std::pin::pin!(all);
        match tokio::time::timeout(DRAIN_LIMIT, &mut all).await {
            Ok(drained) => drained,
            Err(_) => {
                self.closing.send_replace(true);
                all.await
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.input.iter().for_each(JoinHandle::abort);
        self.outputs.iter().for_each(JoinHandle::abort);
    }
}

fn log_end(stream: &str, result: io::Result<()>) {
    // A program that does not read its input to the end is nothing unusual.
    if let Err(error) = result
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        tracing::warn!(stream, %error, "stream ended early");
    }
}

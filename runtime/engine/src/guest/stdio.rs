//! The streams of a guest's process: one vsock connection each, expected before the process is
//! made.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use husk_proto::agent::Stdio;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;

use super::Guest;
use crate::vm::{Accept, VmError};

/// Which streams a process is to have. The others are `/dev/null` to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// A terminal: then there is no standard error, it comes out of the standard output.
    pub tty: bool,
}

/// The streams of a process, whose connections the agent has not made yet.
#[derive(Debug)]
pub struct Streams {
    /// Standard input: what is written there the process reads; closing it is the end of input.
    pub stdin: Option<Accept>,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Option<Output>,
}

/// What a process writes to one of its streams.
///
/// The agent connects when there is something to carry. If that never happens the end comes when the
/// process's end is known, which [`ProcessEnd`](super::ProcessEnd) sees to for as long as it is
/// kept.
pub struct Output(State);

enum State {
    Coming(Pin<Box<dyn Future<Output = Result<UnixStream, VmError>> + Send>>),
    Open(UnixStream),
    Ended,
}

impl Output {
    fn new(accept: Accept) -> Output {
        Output(State::Coming(Box::pin(accept.connected())))
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Coming(_) => "Output(coming)",
            State::Open(_) => "Output(open)",
            State::Ended => "Output(ended)",
        })
    }
}

impl AsyncRead for Output {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            self.0 = match &mut self.0 {
                State::Coming(connection) => match ready!(connection.as_mut().poll(context)) {
                    Ok(stream) => State::Open(stream),
                    Err(VmError::NoConnection { .. }) => State::Ended,
                    Err(error) => {
                        self.0 = State::Ended;
                        return Poll::Ready(Err(io::Error::other(error)));
                    }
                },
                State::Open(stream) => return Pin::new(stream).poll_read(context, buffer),
                State::Ended => return Poll::Ready(Ok(())),
            };
        }
    }
}

impl Guest {
    /// Chooses ports for the streams of a process and expects the agent's connections to them.
    #[must_use]
    pub fn expect_streams(&self, wanted: Wanted) -> (Stdio, Streams) {
        let expect = || {
            let port = self.fresh_port();
            (port, self.vm().accept(port))
        };
        let (stdout_port, stdout) = expect();
        let (stdin_port, stdin) = wanted.stdin.then(expect).unzip();
        let (stderr_port, stderr) = (!wanted.tty).then(expect).unzip();
        let stdio = Stdio {
            stdin_port: stdin_port.unwrap_or(0),
            stdout_port,
            stderr_port: stderr_port.unwrap_or(0),
        };
        let (stdout, stderr) = (Output::new(stdout), stderr.map(Output::new));
        (stdio, Streams { stdin, stdout, stderr })
    }
}

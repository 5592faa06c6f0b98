//! The streams of a guest's process: one vsock connection each, expected before the process is
//! made.

use husk_proto::agent::Stdio;

use super::Guest;
use crate::vm::Accept;

/// Which streams a process is to have. The others are `/dev/null` to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// A terminal: then there is no standard error, it comes out of the standard output.
    pub tty: bool,
}

/// The connections that the agent will make for a process, not made yet.
#[derive(Debug)]
pub struct Streams {
    /// Standard input: what is written there the process reads; closing it is the end of input.
    pub stdin: Option<Accept>,
    /// Standard output.
    pub stdout: Accept,
    /// Standard error.
    pub stderr: Option<Accept>,
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
        (stdio, Streams { stdin, stdout, stderr })
    }
}

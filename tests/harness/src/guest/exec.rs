//! Runs one command for one connection.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::wire::{Command, Frame, Kind, Outcome, Size, receive, send, send_json};

/// Each command has a control group of its own, so that nothing of it survives a client that went
/// away, however it detached itself.
const CGROUP_ROOT: &str = "/sys/fs/cgroup/husk-testhost";

/// Read at once from a command's output.
const OUTPUT_CHUNK: usize = 64 << 10;

/// What a command gets that does not set it itself.
const DEFAULT_ENV: [(&str, &str); 6] = [
    ("PATH", "/opt/husk/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"),
    ("HOME", "/root"),
    ("USER", "root"),
    ("LANG", "C.UTF-8"),
    ("TERM", "dumb"),
    ("HUSK_TEST_HOST", "1"),
];

/// Runs `command` and reports its output and outcome on `stream`.
///
/// # Errors
/// When the command cannot be set up, or the client is gone; what was started is killed then.
pub(super) fn run(stream: &mut TcpStream, command: &Command) -> Result<()> {
    let group = Cgroup::create()?;
    let mut running = match Running::start(command, &group)? {
        Ok(running) => running,
        Err(error) => {
            let code = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
            let name = command.argv.first().map_or("", String::as_str);
            let text = format!("husk-testhost: cannot run {name:?}: {error}\n");
            send(stream, Kind::Stderr, text.as_bytes()).context("reporting")?;
            return send_json(stream, Kind::Exit, &Outcome::Exited(code));
        }
    };
    let outcome = running.serve(stream);
    if outcome.is_err() {
        group.kill();
        // Reaped here; its status interests nobody any more.
        running.child.wait().context("waiting for the killed command")?;
    }
    send_json(stream, Kind::Exit, &outcome?)
}

struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn create() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("{CGROUP_ROOT}/run-{number}"));
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    fn procs(&self) -> io::Result<File> {
        File::options().write(true).open(self.path.join("cgroup.procs"))
    }

    fn kill(&self) {
        if let Err(error) = std::fs::write(self.path.join("cgroup.kill"), "1") {
            eprintln!("husk-testhost: killing {}: {error}", self.path.display());
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while something that the command left in the background lives: as with any shell,
        // that is its business. The empty group of a process that ends later costs nothing.
        match std::fs::remove_dir(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
            Err(error) => eprintln!("husk-testhost: removing {}: {error}", self.path.display()),
        }
    }
}

struct Running {
    child: Child,
    process_group: Pid,
    pidfd: OwnedFd,
    /// `None` once it was closed at the client's end of input.
    stdin: Option<File>,
    /// Taken from the client, not yet by the command.
    pending: Vec<u8>,
    /// `None` after their end.
    stdout: Option<File>,
    stderr: Option<File>,
    terminal: Option<File>,
}

impl Running {
    /// The inner error is the operating system's reason for not running the command itself.
    fn start(command: &Command, group: &Cgroup) -> Result<io::Result<Self>> {
        let Some((program, arguments)) = command.argv.split_first() else {
            bail!("no command given");
        };
        let mut builder = std::process::Command::new(program);
        builder.args(arguments).current_dir(&command.cwd).env_clear().envs(DEFAULT_ENV);
        builder.envs(command.env.iter().map(|(key, value)| (key, value)));

        let terminal = command.terminal.map(open_terminal).transpose()?;
        match &terminal {
            Some((_, peer)) => {
                let clone = || peer.try_clone().context("duplicating the terminal");
                builder.stdin(clone()?).stdout(clone()?).stderr(clone()?);
            }
            None => {
                builder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        let procs = group.procs().context("opening the control group")?;
        let wants_terminal = terminal.is_some();
        // SAFETY: between fork and exec only system calls are made; nothing allocates or locks.
        unsafe {
            builder.pre_exec(move || {
                rustix::io::write(&procs, b"0")?;
                // The agent is exempt from being killed for memory; what is tested is not.
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                let score = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
                rustix::io::write(&score, b"0")?;
                rustix::process::setsid()?;
                if wants_terminal {
                    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                }
                Ok(())
            });
        }
        let mut child = match builder.spawn() {
            Ok(child) => child,
            Err(error) => return Ok(Err(error)),
        };
        let process_group = Pid::from_child(&child);
        let pidfd = pidfd_open(process_group, PidfdFlags::empty()).context("pidfd_open")?;
        let (stdin, stdout, stderr, terminal) = match terminal {
            Some((controller, _)) => {
                let clone = || controller.try_clone().context("duplicating the terminal");
                (Some(clone()?), Some(clone()?), None, Some(controller))
            }
            None => (
                child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe))),
                child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe))),
                child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe))),
                None,
            ),
        };
        for file in [&stdin, &stdout, &stderr].into_iter().flatten() {
            ioctl_fionbio(file, true).context("making a pipe non-blocking")?;
        }
        Ok(Ok(Self {
            child,
            process_group,
            pidfd,
            stdin,
            pending: Vec::new(),
            stdout,
            stderr,
            terminal,
        }))
    }

    /// Carries data until the command ends. Everything that it wrote before has been sent then;
    /// what a process that it left behind may write later is not waited for.
    fn serve(&mut self, stream: &mut TcpStream) -> Result<Outcome> {
        loop {
            let (ended, from_client) = self.wait(stream)?;
            self.pump(stream)?;
            if ended {
                let status = self.child.wait().context("waiting for the command")?;
                // Written between the pump above and the end.
                self.pump(stream)?;
                return outcome_of(status);
            }
            if from_client {
                let Some(frame) = receive(stream)? else { bail!("the client went away") };
                self.obey(&frame)?;
            }
            self.feed(stream)?;
        }
    }

    /// Blocks until there is something to do; returns whether the command ended and whether the
    /// client sent something.
    fn wait(&self, stream: &TcpStream) -> Result<(bool, bool)> {
        let mut fds = vec![
            PollFd::new(&self.pidfd, PollFlags::IN),
            PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP),
        ];
        for output in [&self.stdout, &self.stderr].into_iter().flatten() {
            fds.push(PollFd::new(output, PollFlags::IN));
        }
        if let (Some(stdin), false) = (&self.stdin, self.pending.is_empty()) {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::OUT));
        }
        retry_interrupted(|| poll(&mut fds, None)).context("poll")?;
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((ready(0), ready(1)))
    }

    fn pump(&mut self, stream: &mut TcpStream) -> Result<()> {
        pump_one(&mut self.stdout, Kind::Stdout, stream)?;
        pump_one(&mut self.stderr, Kind::Stderr, stream)
    }

    fn obey(&mut self, frame: &Frame) -> Result<()> {
        match frame.kind {
            Kind::Stdin if frame.payload.is_empty() => match &self.terminal {
                // A terminal has no end of its own: end-of-transmission is typed.
                Some(_) => self.pending.push(4),
                None => self.stdin = None,
            },
            Kind::Stdin => self.pending.extend_from_slice(&frame.payload),
            Kind::Signal => {
                let number: i32 = frame.json()?;
                let signal = Signal::from_named_raw(number)
                    .with_context(|| format!("no signal {number}"))?;
                match kill_process_group(self.process_group, signal) {
                    // It ended just now.
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => return Err(error).context("signalling the command"),
                }
            }
            Kind::Resize => {
                if let Some(terminal) = &self.terminal {
                    resize(terminal, frame.json()?)?;
                }
            }
            other => bail!("unexpected {other:?} frame"),
        }
        Ok(())
    }

    /// Gives the command as much of its pending input as it takes.
    fn feed(&mut self, stream: &mut TcpStream) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match self.stdin.as_mut().map(|stdin| stdin.write(&self.pending)) {
            Some(Ok(count)) => {
                self.pending.drain(..count);
            }
            Some(Err(error)) if is_retry(&error) => return Ok(()),
            // The command does not read its input any more: swallow it, as a pipe's end would.
            Some(Err(_)) | None => {
                self.stdin = None;
                self.pending.clear();
            }
        }
        if self.pending.is_empty() {
            send(stream, Kind::StdinTaken, b"").context("asking for more input")?;
        }
        Ok(())
    }
}

fn open_terminal(size: Size) -> Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags).context("opening a terminal")?;
    grantpt(&controller).context("grantpt")?;
    unlockpt(&controller).context("unlockpt")?;
    let peer = ioctl_tiocgptpeer(&controller, flags).context("opening the terminal's peer")?;
    let controller = File::from(controller);
    resize(&controller, size)?;
    Ok((controller, peer))
}

fn resize(terminal: &File, size: Size) -> Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context("setting the terminal's size")
}

fn outcome_of(status: ExitStatus) -> Result<Outcome> {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(Outcome::Exited(code)),
        (None, Some(signal)) => Ok(Outcome::Signaled(signal)),
        (None, None) => bail!("the command ended with {status}"),
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn retry_interrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Sends what can be read now; forgets the source at its end.
fn pump_one(source: &mut Option<File>, kind: Kind, stream: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; OUTPUT_CHUNK];
    while let Some(file) = source {
        match file.read(&mut buffer) {
            Ok(0) => *source = None,
            Ok(count) => send(stream, kind, &buffer[..count]).context("sending output")?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // What a terminal says when its last user closed it.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                *source = None;
            }
            Err(error) => return Err(error).context("reading output"),
        }
    }
    Ok(())
}

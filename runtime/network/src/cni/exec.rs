//! One call of a plugin: a process that is given its input, and watched until its end.

use std::ffi::OsString;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::Limits;

/// Longest single wait of a poll.
const MAX_POLL: Duration = Duration::from_secs(3600);

/// Longest time that a plugin may be given: a month, which is for ever.
const MAX_TIME: Duration = Duration::from_secs(31 * 24 * 3600);

/// How much is read at once.
const CHUNK: usize = 16 * 1024;

/// A means of giving calls up, also those under way. Clones are the same.
#[derive(Debug, Clone)]
pub struct Stop(Arc<(UnixStream, UnixStream)>);

impl Stop {
    /// One that has not been used.
    ///
    /// # Errors
    /// If no descriptors are left.
    pub fn new() -> io::Result<Self> {
        UnixStream::pair().map(|pair| Stop(Arc::new(pair)))
    }

    /// What has an end when everything is given up.
    pub(crate) fn ends(&self) -> BorrowedFd<'_> {
        self.0.1.as_fd()
    }

    /// Gives everything up that is done with this.
    pub fn stop(&self) {
        // It can only have been shut down before.
        let _again = self.0.0.shutdown(Shutdown::Both);
    }
}

/// How a call ended.
pub(super) struct Outcome {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// Why a call did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExecError {
    #[error("it cannot be executed: {0}")]
    Spawn(io::Error),
    #[error("it cannot be watched: {0}")]
    Watch(io::Error),
    #[error("it did not end within {} s, and was killed", .0.as_secs_f64())]
    TimedOut(Duration),
    #[error("it wrote more than {0} bytes, and was killed")]
    TooMuch(usize),
    #[error("it was given up")]
    Stopped,
}

/// Runs a plugin, in a process group of its own that is killed if it goes too far. What it has
/// started lives on if it ends by itself, as the server of a plugin does.
pub(super) fn run(
    program: &Path,
    environment: &[(&str, OsString)],
    input: &[u8],
    limits: Limits,
    stop: &Stop,
) -> Result<Outcome, ExecError> {
    let mut child = Command::new(program)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ExecError::Spawn)?;
    let watched = Watch::new(&mut child, input, limits)
        .map_err(ExecError::Watch)
        .and_then(|watch| watch.until_the_end(stop));
    if watched.is_err() {
        kill_group(&child);
    }
    let status = child.wait().map_err(ExecError::Watch)?;
    let (stdout, stderr) = watched?;
    Ok(Outcome { status, stdout, stderr })
}

/// Kills a child that has not been waited for, and what belongs to its group.
fn kill_group(child: &Child) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    if let Err(errno) = kill_process_group(pid, Signal::KILL) {
        tracing::warn!(%errno, "cannot kill a CNI plugin");
    }
}

/// A pipe from a plugin, and what came out of it.
struct Output {
    pipe: Option<OwnedFd>,
    bytes: Vec<u8>,
}

impl Output {
    fn new(pipe: impl Into<OwnedFd>) -> io::Result<Self> {
        let pipe = pipe.into();
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Output { pipe: Some(pipe), bytes: Vec::new() })
    }

    /// Reads what is there.
    fn drain(&mut self, most: usize) -> Result<(), ExecError> {
        let mut chunk = [0; CHUNK];
        while let Some(pipe) = &self.pipe {
            match rustix::io::read(pipe, &mut chunk) {
                Ok(0) => self.pipe = None,
                Ok(length) => self.bytes.extend_from_slice(chunk.get(..length).unwrap_or_default()),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ExecError::Watch(errno.into())),
            }
            if self.bytes.len() > most {
                return Err(ExecError::TooMuch(most));
            }
        }
        Ok(())
    }
}

/// Everything of a plugin that has to be watched.
struct Watch<'a> {
    process: OwnedFd,
    stdin: Option<OwnedFd>,
    input: &'a [u8],
    stdout: Output,
    stderr: Output,
    limits: Limits,
    deadline: Instant,
}

impl<'a> Watch<'a> {
    fn new(child: &mut Child, input: &'a [u8], limits: Limits) -> io::Result<Self> {
        let missing = || io::Error::from(io::ErrorKind::NotConnected);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(missing)?;
        let stdin: OwnedFd = child.stdin.take().ok_or_else(missing)?.into();
        rustix::io::ioctl_fionbio(&stdin, true)?;
        let now = Instant::now();
        Ok(Watch {
            process: pidfd_open(pid, PidfdFlags::empty())?,
            stdin: Some(stdin),
            input,
            stdout: Output::new(child.stdout.take().ok_or_else(missing)?)?,
            stderr: Output::new(child.stderr.take().ok_or_else(missing)?)?,
            limits,
            deadline: now.checked_add(limits.time.min(MAX_TIME)).unwrap_or(now),
        })
    }

    fn until_the_end(mut self, stop: &Stop) -> Result<(Vec<u8>, Vec<u8>), ExecError> {
        loop {
            let ended = self.wait(stop.0.1.as_fd())?;
            self.feed()?;
            self.stdout.drain(self.limits.output)?;
            self.stderr.drain(self.limits.output)?;
            if ended {
                return Ok((self.stdout.bytes, self.stderr.bytes));
            }
        }
    }

    /// Waits until there is something to do; whether it is the end of the process.
    fn wait(&self, stop: BorrowedFd<'_>) -> Result<bool, ExecError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ExecError::TimedOut(self.limits.time));
        }
        let mut all = vec![
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::new(&self.process, PollFlags::IN),
        ];
        all.extend(self.stdin.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        for output in [&self.stdout, &self.stderr] {
            all.extend(output.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        }
        // It is waited again until the deadline.
        let left = left.min(MAX_POLL);
        let limit =
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut all, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ExecError::Watch(errno.into())),
        }
        let ready = |at: usize| all.get(at).is_some_and(|fd| !fd.revents().is_empty());
        if ready(0) {
            return Err(ExecError::Stopped);
        }
        Ok(ready(1))
    }

    /// Writes what the pipe takes. A plugin need not read.
    fn feed(&mut self) -> Result<(), ExecError> {
        while let Some(pipe) = &self.stdin {
            match rustix::io::write(pipe, self.input) {
                Ok(length) => self.input = self.input.get(length..).unwrap_or_default(),
                Err(Errno::PIPE) => self.input = &[],
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ExecError::Watch(errno.into())),
            }
            if self.input.is_empty() {
                self.stdin = None;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(directory: &Path, text: &str) -> std::path::PathBuf {
        let path = directory.join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn run_script(text: &str, input: &[u8], limits: Limits) -> Result<Outcome, ExecError> {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), text);
        let environment = [("CNI_COMMAND", OsString::from("ADD"))];
        run(&program, &environment, input, limits, &Stop::new().unwrap())
    }

    #[test]
    fn input_and_environment_go_in_and_both_outputs_come_out() {
        let input = vec![b'x'; 300_000];
        let limits = Limits::default();
        let done = run_script("echo $CNI_COMMAND >&2; cat; exit 3", &input, limits).unwrap();
        assert_eq!(done.status.code(), Some(3));
        assert_eq!((done.stdout, done.stderr), (input, b"ADD\n".to_vec()));
    }

    #[test]
    fn a_plugin_that_does_not_read_is_no_error() {
        let done = run_script("exec 0<&-; echo {}", &[b'x'; 300_000], Limits::default()).unwrap();
        assert_eq!(done.stdout, b"{}\n");
    }

    #[test]
    fn who_holds_its_pipes_does_not_keep_its_end() {
        let done = run_script("sleep 1000 & echo {}", b"", Limits::default()).unwrap();
        assert_eq!(done.stdout, b"{}\n");
    }

    #[test]
    fn one_that_hangs_is_killed_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let text = format!("sleep 1000 & echo $! > {}.new; mv {0}.new {0}; wait", pid.display());
        let program = script(directory.path(), &text);
        let limits = Limits { time: Duration::from_millis(500), ..Limits::default() };
        let mut ended = Err(ExecError::Stopped);
        // On a machine that is busy it may not have come so far.
        for _ in 0..20 {
            ended = run(&program, &[], b"", limits, &Stop::new().unwrap());
            if pid.exists() {
                break;
            }
        }
        assert!(matches!(ended, Err(ExecError::TimedOut(_))));
        let pid: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Gone, or dead and not yet reaped by whoever inherited it.
        while !(stat().is_empty() || stat().contains(") Z ")) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn one_that_writes_without_end_is_killed() {
        let limits = Limits { output: 100_000, ..Limits::default() };
        let ended = run_script("yes", b"", limits);
        assert!(matches!(ended, Err(ExecError::TooMuch(100_000))));
    }

    #[test]
    fn a_call_can_be_given_up_and_none_is_begun_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "sleep 1000");
        let stop = Stop::new().unwrap();
        std::thread::scope(|scope| {
            let call = scope.spawn(|| run(&program, &[], b"", Limits::default(), &stop));
            stop.stop();
            assert!(matches!(call.join().unwrap(), Err(ExecError::Stopped)));
        });
    }

    #[test]
    fn what_is_no_program_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let ended =
            run(&directory.path().join("x"), &[], b"", Limits::default(), &Stop::new().unwrap());
        assert!(matches!(ended, Err(ExecError::Spawn(_))));
    }
}

//! A process of a pod (its VMM, its file server): how it is started, watched and ended.
#![allow(unsafe_code)] // what must happen between fork and exec: see `prepare_child`

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

use super::{VmError, lock};

/// The descriptor at which the process finds its control socket (or what else it is given).
const GIVEN_FD: RawFd = 3;

/// How much of its standard error is kept, in bytes: its end.
const STDERR_TAIL: usize = 16 * 1024;

/// Stack of the thread that is the process's parent. It reads and waits, no more.
const THREAD_STACK: usize = 256 * 1024;

/// The variables of the environment that the process gets.
const KEPT_ENV: [&str; 1] = ["HUSK_LOG"];

/// Such a process. Killed when this is dropped.
#[derive(Debug)]
pub(super) struct PodProcess {
    name: &'static str,
    pid: u32,
    pidfd: OwnedFd,
    ended: oneshot::Receiver<ExitStatus>,
    /// What `ended` has told.
    status: Option<Option<ExitStatus>>,
    stderr: Arc<Mutex<Tail>>,
}

/// Starts `program` with `control` as its descriptor 3 and no other but the standard three. `name` is
/// for logs and threads, at most 15 bytes with `-parent`.
pub(super) async fn spawn(
    name: &'static str,
    program: &Path,
    control: OwnedFd,
) -> std::io::Result<PodProcess> {
    let (report, started) = oneshot::channel();
    let path = program.to_owned();
    // A thread of its own, because the parent-death signal is sent when the *thread* that forked
    // ends: it must live exactly as long as the process.
    std::thread::Builder::new()
        .name(format!("{name}-parent"))
        .stack_size(THREAD_STACK)
        .spawn(move || parent(name, &path, control, report))?;
    match started.await {
        Ok(started) => started,
        Err(_) => Err(std::io::Error::other("its parent thread panicked")),
    }
}

/// The thread that starts the process, keeps the end of what it writes, and reaps it.
fn parent(
    name: &'static str,
    program: &Path,
    control: OwnedFd,
    report: oneshot::Sender<std::io::Result<PodProcess>>,
) {
    let stderr = Arc::new(Mutex::new(Tail::default()));
    let (report_end, ended) = oneshot::channel();
    let started = start(program, control).map(|(child, pidfd)| {
        let pid = child.id();
        (child, PodProcess { name, pid, pidfd, ended, status: None, stderr: stderr.clone() })
    });
    let mut child = match started {
        Ok((child, process)) => {
            // If nobody listens any more, the process was dropped with the answer, and so killed.
            drop(report.send(Ok(process)));
            child
        }
        Err(source) => {
            drop(report.send(Err(source)));
            return;
        }
    };
    if let Some(pipe) = child.stderr.take() {
        keep_tail(name, pipe, &stderr);
    }
    match child.wait() {
        // If nobody listens any more, the process's end is known already.
        Ok(status) => drop(report_end.send(status)),
        Err(error) => tracing::warn!(%error, name, "cannot wait for a process"),
    }
}

fn start(program: &Path, control: OwnedFd) -> std::io::Result<(Child, OwnedFd)> {
    let control = occupy_fd_3(&control)?;
    let mut command = Command::new(program);
    command
        .arg("--control-fd")
        .arg(GIVEN_FD.to_string())
        .env_clear()
        .envs(KEPT_ENV.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Not in the terminal's foreground group: a Ctrl-C is for us, and we decide what it does.
        .process_group(0);
    give_as_fd_3(&mut command, control.as_raw_fd());
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.ok_or(rustix::io::Errno::SRCH).and_then(|pid| {
        // The child is not reaped before `wait`, so this is it and no other process.
        pidfd_open(pid, PidfdFlags::empty())
    });
    match pidfd {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(errno) => {
            child.kill()?;
            child.wait()?;
            Err(errno.into())
        }
    }
}

/// A duplicate of a descriptor that is to become a child's descriptor 3.
///
/// Either the duplicate is 3 here, or 3 is in use: what `Command` makes for itself cannot then be
/// at 3, where the child would overwrite it.
fn occupy_fd_3(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, GIVEN_FD)?)
}

/// What the child does between fork and exec: it arranges to die with its parent, and takes one
/// descriptor with it, as 3, and no other but the standard three. `given` comes from
/// [`occupy_fd_3`] and must be open until the command was spawned.
fn give_as_fd_3(command: &mut Command, given: RawFd) {
    // SAFETY: getpid cannot fail and has no preconditions.
    let parent = unsafe { libc::getpid() };
    let prepare = move || {
        let kill = libc::c_ulong::try_from(libc::SIGKILL).unwrap_or(9);
        // SAFETY: these are system calls on integers. They are async-signal-safe, as is required
        // between fork and exec; nothing here allocates or takes a lock.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, kill, 0, 0, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have died before the signal was asked for.
            if libc::getppid() != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            let kept = if given == GIVEN_FD {
                libc::fcntl(GIVEN_FD, libc::F_SETFD, 0)
            } else {
                libc::dup2(given, GIVEN_FD)
            };
            if kept < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // What we inherited ourselves need not be close-on-exec. (Not closed at once: `spawn`
            // still has to report a failing exec.)
            let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
            if libc::close_range(4, libc::c_uint::MAX, flags) != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only does what is allowed between fork and exec, see there. That `given`
    // is open is the caller's promise; if it were not, dup2 would fail, or pass another file.
    unsafe { command.pre_exec(prepare) };
}

/// What `husk-vmm --probe-kvm` found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Probe {
    /// Whether a guest ran as it should.
    pub ok: bool,
    /// What was done, or what failed.
    pub detail: String,
}

/// Largest answer of a probe, in bytes.
const MAX_PROBE: u64 = 64 * 1024;

/// Has the VMM prove that this open `/dev/kvm` runs guests, by running a few instructions in one.
/// Blocks for that long; the VMM bounds it.
///
/// # Errors
/// [`VmError::NoVmm`], [`VmError::Spawn`], [`VmError::Probe`].
pub fn probe_kvm(program: &Path, kvm: &OwnedFd) -> Result<Probe, VmError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => VmError::NoVmm { path: program.to_owned() },
        _ => VmError::Spawn { path: program.to_owned(), source },
    };
    let kvm = occupy_fd_3(kvm).map_err(failed)?;
    let mut command = Command::new(program);
    command
        .arg("--probe-kvm")
        .arg(GIVEN_FD.to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    give_as_fd_3(&mut command, kvm.as_raw_fd());
    let mut child = command.spawn().map_err(failed)?;
    let mut answer = Vec::new();
    let read = child.stdout.take().map(|out| out.take(MAX_PROBE).read_to_end(&mut answer));
    let status = child.wait().map_err(failed)?;
    let text = String::from_utf8_lossy(&answer).trim().to_owned();
    match (read, serde_json::from_str(&text)) {
        (Some(Ok(_)), Ok(probe)) => Ok(probe),
        _ => Err(VmError::Probe { status, text }),
    }
}

/// Reads to the end of the file and keeps the last of it.
fn keep_tail(name: &str, mut pipe: impl Read, tail: &Mutex<Tail>) {
    let mut buffer = [0; 4096];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                let text = String::from_utf8_lossy(bytes);
                tracing::debug!(target: "husk_vmm", "{name}: {}", text.trim_end());
                lock(tail).push(bytes);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, name, "cannot read what a process writes");
                return;
            }
        }
    }
}

/// The last [`STDERR_TAIL`] bytes of a stream.
#[derive(Debug, Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let excess = self.0.len().saturating_sub(STDERR_TAIL);
        self.0.drain(..excess);
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }
}

impl PodProcess {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the process's end; `None` if it cannot be learned. Can be asked again, and a wait can
    /// be given up.
    pub(super) async fn ended(&mut self) -> Option<ExitStatus> {
        if let Some(status) = self.status {
            return status;
        }
        let status = (&mut self.ended).await.ok();
        self.status = Some(status);
        status
    }

    /// The last that the process wrote to its standard error.
    pub(super) fn stderr_tail(&self) -> String {
        lock(&self.stderr).text()
    }

    /// Kills the process, if it still lives.
    pub(super) fn kill(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::warn!(%errno, name = self.name, "cannot kill a process"),
        }
    }
}

impl Drop for PodProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

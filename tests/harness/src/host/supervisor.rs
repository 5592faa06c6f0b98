//! The process that owns one QEMU.
//!
//! It holds the lock that says that the test host runs, writes down how to reach it, and ends it
//! when nobody used it for long. However it ends, SIGKILL included, QEMU ends with it.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal,
};

use super::instance::{Instance, StateDir};
use super::qemu::{Accelerator, Machine};
use crate::wire::{BOOT_MAGIC, PROTOCOL, TOKEN_LEN, TOKEN_OFFSET, TRANSFER_ALIGN};
use husk_harness::cache::files::{Lock, write_atomically};

/// Address space of the transfer disk in bytes; sparse.
const TRANSFER_SIZE: u64 = 16 << 30;
/// How often it is looked whether anybody uses the test host.
const IDLE_CHECK_S: i64 = 30;
/// Tries to find a free port: another process may take it between our look and QEMU's bind.
const PORT_TRIES: u32 = 5;
/// QEMU binds its ports within this time or fails.
const QEMU_START: Duration = Duration::from_millis(1500);

/// What `up` tells its supervisor.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    pub(crate) state: PathBuf,
    #[arg(long)]
    pub(crate) image: PathBuf,
    #[arg(long)]
    pub(crate) accelerator: Accelerator,
    #[arg(long)]
    pub(crate) cpus: u32,
    #[arg(long)]
    pub(crate) memory_mib: u32,
    /// Ends after this many minutes without use.
    #[arg(long)]
    pub(crate) idle_minutes: u64,
    /// Ends together with this process, which started it.
    #[arg(long)]
    pub(crate) die_with: Option<i32>,
}

/// Runs QEMU until it ends or has been idle for long.
///
/// # Errors
/// When QEMU cannot be started, or ends with a failure.
pub(crate) fn supervise(options: &Options) -> Result<()> {
    if let Some(parent) = options.die_with {
        set_parent_process_death_signal(Some(Signal::KILL)).context("PR_SET_PDEATHSIG")?;
        // It may have died before the line above.
        if getppid() != Pid::from_raw(parent) {
            bail!("the process that started this one is gone");
        }
    }
    // Out of the terminal's session: its Ctrl-C is for the command that runs in the test host.
    rustix::process::setsid().context("setsid")?;

    let state = StateDir::new(options.state.clone());
    let Some(_running) = Lock::try_exclusive(&state.running_lock())? else {
        bail!("a test host runs already in {}", state.path().display());
    };
    let token = random_token()?;
    let transfer_start = prepare_transfer_disk(&state.transfer_disk(), &token)?;
    let (mut qemu, host_port) = start_qemu(options, &state)?;
    let instance = Instance {
        protocol: PROTOCOL,
        supervisor: std::process::id(),
        host_port,
        token,
        transfer_start,
        accelerator: options.accelerator,
    };
    let written = serde_json::to_vec(&instance).context("encoding the instance");
    let written = written.and_then(|json| write_atomically(&state.instance_file(), &json));
    if let Err(error) = written {
        qemu.kill().context("killing QEMU")?;
        qemu.wait().context("waiting for QEMU")?;
        return Err(error);
    }
    watch(&mut qemu, &state, Duration::from_secs(options.idle_minutes.saturating_mul(60)))
}

fn random_token() -> Result<String> {
    let mut bytes = [0u8; TOKEN_LEN / 2];
    let count = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("getrandom")?;
    anyhow::ensure!(count == bytes.len(), "getrandom returned {count} bytes");
    Ok(hex::encode(bytes))
}

/// Puts this binary and the token where `testhost/bootstrap` and the agent look for them. Returns
/// where the space for pushed files begins.
fn prepare_transfer_disk(path: &Path, token: &str) -> Result<u64> {
    use std::os::unix::fs::OpenOptionsExt;
    let prepare = || -> std::io::Result<u64> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // It holds the token.
        let disk = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        disk.set_len(TRANSFER_SIZE)?;
        let harness = std::fs::read("/proc/self/exe")?;
        disk.write_all_at(format!("{BOOT_MAGIC} {}\n", harness.len()).as_bytes(), 0)?;
        disk.write_all_at(token.as_bytes(), TOKEN_OFFSET)?;
        disk.write_all_at(&harness, TRANSFER_ALIGN)?;
        Ok((TRANSFER_ALIGN + harness.len() as u64).next_multiple_of(TRANSFER_ALIGN))
    };
    prepare().with_context(|| format!("preparing {}", path.display()))
}

fn start_qemu(options: &Options, state: &StateDir) -> Result<(Child, u16)> {
    let image = super::image::Image { dir: options.image.clone() };
    for _ in 0..PORT_TRIES {
        let host_port = free_port()?;
        let machine = Machine {
            accelerator: options.accelerator,
            cpus: options.cpus,
            memory_mib: options.memory_mib,
            kernel: image.kernel(),
            root_disk: image.disk(),
            transfer_disk: state.transfer_disk(),
            console_log: state.console_log(),
            host_port,
        };
        let mut qemu = spawn(&machine, state)?;
        if !ends_within(&mut qemu, QEMU_START)? {
            return Ok((qemu, host_port));
        }
        let log = std::fs::read_to_string(state.qemu_log()).unwrap_or_default();
        if !log.contains("host forwarding rule") {
            bail!("QEMU ended at once:\n{log}");
        }
    }
    bail!("no free port for the test host in {PORT_TRIES} tries")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a port")?;
    Ok(listener.local_addr().context("looking for a port")?.port())
}

fn spawn(machine: &Machine, state: &StateDir) -> Result<Child> {
    let log = File::create(state.qemu_log()).context("creating QEMU's log")?;
    let mut command = machine.command()?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("duplicating the log")?)
        .stderr(log)
        // QEMU puts its overlay there.
        .env("TMPDIR", state.path());
    let supervisor = rustix::process::getpid();
    // SAFETY: between fork and exec only system calls are made; nothing allocates or locks.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(supervisor) {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
    command.spawn().context("starting qemu-system-x86_64")
}

fn ends_within(child: &mut Child, time: Duration) -> Result<bool> {
    wait_for_end(child, time)?;
    Ok(child.try_wait().context("waiting for QEMU")?.is_some())
}

/// Blocks until the child ends, at most for `time`.
fn wait_for_end(child: &Child, time: Duration) -> Result<()> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("pidfd_open")?;
    let timeout = Timespec::try_from(time).context("time-out")?;
    match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error).context("poll"),
    }
}

fn watch(qemu: &mut Child, state: &StateDir, idle_limit: Duration) -> Result<()> {
    loop {
        wait_for_end(qemu, Duration::from_secs(IDLE_CHECK_S.unsigned_abs()))?;
        if let Some(status) = qemu.try_wait().context("waiting for QEMU")? {
            if status.success() {
                return Ok(());
            }
            bail!("QEMU ended: {status}");
        }
        if idle_for(state)? > idle_limit {
            println!("not used for {} minutes: ending", idle_limit.as_secs() / 60);
            qemu.kill().context("killing QEMU")?;
            qemu.wait().context("waiting for QEMU")?;
            return Ok(());
        }
    }
}

/// Time since the last client; zero while there is one.
fn idle_for(state: &StateDir) -> Result<Duration> {
    let path = state.use_lock();
    let Some(_unused) = Lock::try_exclusive(&path)? else { return Ok(Duration::ZERO) };
    let last = std::fs::metadata(&path)
        .and_then(|metadata| metadata.modified())
        .with_context(|| format!("reading the time of {}", path.display()))?;
    // A clock that was set back counts as use.
    Ok(SystemTime::now().duration_since(last).unwrap_or(Duration::ZERO))
}

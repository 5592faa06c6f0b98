//! A test host that runs, or is made to.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::image::Image;
use super::qemu::{Accelerator, choose};
use crate::wire::{Kind, Operation, PROTOCOL, Request, receive, send_json};
use husk_harness::cache::files::{Lock, remove_tree};
use husk_harness::progress::{Step, say};

/// The agent answers within this time after QEMU's start, or something is broken. Generous: under
/// TCG it is 10 to 20 seconds on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const BOOT_POLL: Duration = Duration::from_millis(100);
const DOWN_TIMEOUT: Duration = Duration::from_secs(20);
/// The agent answers a greeting within this time unless the machine is badly overloaded.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A running test host that answers nothing for this long is stuck.
const STUCK_TIMEOUT: Duration = Duration::from_secs(180);
/// While it boots: QEMU holds connections that the guest does not answer yet.
const BOOT_HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Shown of a log when booting fails.
const LOG_TAIL_LINES: usize = 25;

const UNRESPONSIVE: &str = "the test host runs but does not answer; `husk-testhost down` ends it";

const OTHER_VERSION: &str =
    "the test host was started by another version of this program; `husk-testhost down` ends it";

/// The files of one test host.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
    /// Held by the supervisor as long as QEMU lives.
    pub(crate) fn running_lock(&self) -> PathBuf {
        self.0.join("running")
    }
    /// Held while somebody starts it.
    pub(crate) fn start_lock(&self) -> PathBuf {
        self.0.join("starting")
    }
    /// Held, shared, by each client; its time is that of the last use.
    pub(crate) fn use_lock(&self) -> PathBuf {
        self.0.join("used")
    }
    /// Held by the one client that writes to the transfer disk.
    pub(crate) fn push_lock(&self) -> PathBuf {
        self.0.join("pushing")
    }
    pub(crate) fn instance_file(&self) -> PathBuf {
        self.0.join("instance.json")
    }
    pub(crate) fn transfer_disk(&self) -> PathBuf {
        self.0.join("transfer.raw")
    }
    pub(crate) fn console_log(&self) -> PathBuf {
        self.0.join("console.log")
    }
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }
    pub(crate) fn supervisor_log(&self) -> PathBuf {
        self.0.join("supervisor.log")
    }
}

/// How to reach a running test host; written by its supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Instance {
    /// [`PROTOCOL`] of the program that started it: its agent in the test host is that program.
    pub(crate) protocol: u32,
    /// Process id.
    pub(crate) supervisor: u32,
    pub(crate) host_port: u16,
    pub(crate) token: String,
    /// Where the space for pushed files begins on the transfer disk, in bytes.
    pub(crate) transfer_start: u64,
    pub(crate) accelerator: Accelerator,
}

impl Instance {
    /// Opens a connection and makes the request.
    pub(crate) fn request(&self, operation: Operation) -> Result<TcpStream> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.host_port))
            .context("connecting to the test host")?;
        stream.set_nodelay(true).context("TCP_NODELAY")?;
        let request = Request { token: self.token.clone(), operation };
        send_json(&mut stream, Kind::Request, &request)?;
        Ok(stream)
    }

    fn hello(&self, timeout: Duration) -> Result<()> {
        let mut stream = self.request(Operation::Hello)?;
        stream.set_read_timeout(Some(timeout)).context("SO_RCVTIMEO")?;
        match receive(&mut stream)? {
            Some(frame) if frame.kind == Kind::Done => Ok(()),
            Some(frame) => bail!("{}", String::from_utf8_lossy(&frame.payload)),
            None => bail!("the connection was closed"),
        }
    }
}

/// What to boot.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BootOptions {
    /// Do not probe; use this accelerator.
    #[arg(long, env = "HUSK_TESTHOST_ACCEL")]
    pub(crate) accel: Option<Accelerator>,
    /// Virtual processors of the test host.
    #[arg(long, env = "HUSK_TESTHOST_CPUS", default_value_t = 2)]
    pub(crate) cpus: u32,
    /// Memory of the test host; taken only as it is touched.
    #[arg(long, env = "HUSK_TESTHOST_MEMORY_MIB", default_value_t = 6144)]
    pub(crate) memory_mib: u32,
    /// Ends the test host after this time without use.
    #[arg(long, default_value_t = 120)]
    pub(crate) idle_minutes: u64,
}

/// Use of a test host: while this lives it does not count as idle, and one that was booted for
/// this use alone ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) state: StateDir,
    pub(crate) instance: Instance,
    one_shot: Option<Child>,
    _use: Lock,
}

impl Lease {
    fn new(state: StateDir, instance: Instance, one_shot: Option<Child>) -> Result<Self> {
        let path = state.use_lock();
        let using = Lock::shared(&path)?;
        touch(&path)?;
        Ok(Self { state, instance, one_shot, _use: using })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let result = match &mut self.one_shot {
            Some(supervisor) => supervisor
                .kill()
                .and_then(|()| supervisor.wait().map(drop))
                .context("ending the test host")
                .and_then(|()| wait_until_free(&self.state))
                .and_then(|()| remove_tree(self.state.path())),
            None => touch(&self.state.use_lock()),
        };
        if let Err(error) = result {
            say(format_args!("{error:#}"));
        }
    }
}

fn touch(path: &Path) -> Result<()> {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_modified(SystemTime::now()))
        .with_context(|| format!("touching {}", path.display()))
}

fn is_running(state: &StateDir) -> Result<bool> {
    Ok(state.path().is_dir() && Lock::try_exclusive(&state.running_lock())?.is_none())
}

/// The running test host, if there is one.
pub(crate) fn find(state: &StateDir) -> Result<Option<Instance>> {
    if !is_running(state)? {
        return Ok(None);
    }
    let path = state.instance_file();
    match fs::read(&path) {
        Ok(json) => {
            let instance: Instance = serde_json::from_slice(&json).context(OTHER_VERSION)?;
            ensure!(instance.protocol == PROTOCOL, OTHER_VERSION);
            Ok(Some(instance))
        }
        // It starts just now.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Use of the test host that is kept running, if it runs.
pub(crate) fn existing(state: StateDir) -> Result<Option<Lease>> {
    let Some(instance) = find(&state)? else { return Ok(None) };
    let lease = Lease::new(state, instance, None)?;
    if lease.instance.hello(HELLO_TIMEOUT).is_err() {
        wait_for_answer(&lease)?;
    }
    Ok(Some(lease))
}

/// It may be booting still: whoever started it was interrupted.
fn wait_for_answer(lease: &Lease) -> Result<()> {
    let mut step = Step::new("the test host runs but does not answer yet");
    let started = Instant::now();
    loop {
        match lease.instance.hello(HELLO_TIMEOUT) {
            Ok(()) => break,
            Err(error) if started.elapsed() > STUCK_TIMEOUT => {
                return Err(error).context(UNRESPONSIVE);
            }
            Err(error) => step.detail(&format!("{error:#}")),
        }
        if find(&lease.state)?.is_none() {
            bail!("the test host ended");
        }
        std::thread::sleep(BOOT_POLL);
    }
    step.finish("answers");
    Ok(())
}

/// The test host that is kept running, started first if need be.
pub(crate) fn up(
    state: StateDir,
    options: &BootOptions,
    image: impl FnOnce() -> Result<Image>,
) -> Result<Lease> {
    let starting = Lock::exclusive(&state.start_lock(), "starts this test host")?;
    if let Some(lease) = existing(state.clone())? {
        return Ok(lease);
    }
    // Under the lock, so that it cannot be idle between its start and this use.
    let using = Lock::shared(&state.use_lock())?;
    touch(&state.use_lock())?;
    let (instance, child) = boot(&state, options, &image()?, false)?;
    // Its supervisor outlives this process on purpose; init reaps it.
    drop(child);
    drop(using);
    drop(starting);
    Lease::new(state, instance, None)
}

/// A test host for this use alone, in a directory of its own.
pub(crate) fn one_shot(base: &StateDir, options: &BootOptions, image: &Image) -> Result<Lease> {
    let name = base.path().file_name().context("state directory without a name")?;
    let mut prefix = name.to_os_string();
    prefix.push("-once-");
    remove_dead_one_shots(base, &prefix)?;
    let mut name = prefix;
    name.push(std::process::id().to_string());
    let state = StateDir::new(base.path().with_file_name(name));
    fs::create_dir_all(state.path())
        .with_context(|| format!("making {}", state.path().display()))?;
    File::create(state.use_lock()).context("creating the use lock")?;
    let (instance, child) = boot(&state, options, image, true)?;
    Lease::new(state, instance, Some(child))
}

/// Directories of one-shot test hosts whose owner was killed.
fn remove_dead_one_shots(base: &StateDir, prefix: &std::ffi::OsStr) -> Result<()> {
    let parent = base.path().parent().context("state directory without a parent")?;
    if !parent.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(parent).with_context(|| format!("reading {}", parent.display()))? {
        let entry = entry.context("reading the state directories")?;
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .zip(prefix.to_str())
            .and_then(|(name, prefix)| name.strip_prefix(prefix))
            .and_then(|pid| pid.parse::<i32>().ok())
            .and_then(Pid::from_raw)
        else {
            continue;
        };
        if rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

fn boot(
    state: &StateDir,
    options: &BootOptions,
    image: &Image,
    die_with_parent: bool,
) -> Result<(Instance, Child)> {
    let (accelerator, reason) = match options.accel {
        Some(accelerator) => (accelerator, "as asked for".to_owned()),
        None => choose(),
    };
    let mut step = Step::new(format!("booting Debian under QEMU with {accelerator} ({reason})"));
    remove_file(&state.instance_file())?;
    remove_file(&state.console_log())?;
    let log = File::create(state.supervisor_log()).context("creating the supervisor's log")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("supervise").arg("--state").arg(state.path()).arg("--image").arg(&image.dir);
    command.arg("--accelerator").arg(accelerator.to_string().to_lowercase());
    command.arg("--cpus").arg(options.cpus.to_string());
    command.arg("--memory-mib").arg(options.memory_mib.to_string());
    command.arg("--idle-minutes").arg(options.idle_minutes.to_string());
    if die_with_parent {
        command.arg("--die-with").arg(std::process::id().to_string());
    }
    let mut supervisor = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("duplicating the log")?)
        .stderr(log)
        .spawn()
        .context("starting the supervisor")?;
    match wait_for_agent(state, &mut supervisor, &mut step) {
        Ok(instance) => {
            step.finish("up");
            Ok((instance, supervisor))
        }
        Err(error) => {
            drop(step);
            // It may have ended by itself, which is then the reason.
            if supervisor.try_wait().context("waiting for the supervisor")?.is_none() {
                supervisor.kill().context("ending the supervisor")?;
                supervisor.wait().context("waiting for the supervisor")?;
            }
            for log in [state.supervisor_log(), state.qemu_log(), state.console_log()] {
                if let Ok(content) = fs::read(&log) {
                    let content = String::from_utf8_lossy(&content).into_owned();
                    say(format_args!("end of {}:\n{}", log.display(), tail(&content)));
                }
            }
            Err(error)
        }
    }
}

fn wait_for_agent(state: &StateDir, supervisor: &mut Child, step: &mut Step) -> Result<Instance> {
    let started = Instant::now();
    loop {
        if let Some(status) = supervisor.try_wait().context("waiting for the supervisor")? {
            bail!("the test host ended while it booted ({status})");
        }
        // QEMU takes connections from the start and closes them until the agent listens.
        if let Some(instance) = find(state)?
            && instance.hello(BOOT_HELLO_TIMEOUT).is_ok()
        {
            return Ok(instance);
        }
        if started.elapsed() > BOOT_TIMEOUT {
            bail!("the test host did not come up within {} s", BOOT_TIMEOUT.as_secs());
        }
        step.detail("waiting for its agent");
        std::thread::sleep(BOOT_POLL);
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.len().saturating_sub(LOG_TAIL_LINES);
    lines.get(start..).unwrap_or_default().join("\n")
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Ends the test host that is kept running. Returns whether there was one.
pub(crate) fn down(state: &StateDir) -> Result<bool> {
    if !is_running(state)? {
        return Ok(false);
    }
    // Not by `find`: one of another version must end too.
    let path = state.instance_file();
    let json = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let instance: serde_json::Value =
        serde_json::from_slice(&json).with_context(|| format!("parsing {}", path.display()))?;
    let pid = instance["supervisor"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(Pid::from_raw)
        .context("malformed process id of the supervisor")?;
    // The lock is held, so the process is the supervisor and no later one of the same number.
    match kill_process(pid, Signal::TERM) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error).context("ending the test host"),
    }
    wait_until_free(state)?;
    remove_tree(state.path())?;
    Ok(true)
}

fn wait_until_free(state: &StateDir) -> Result<()> {
    let started = Instant::now();
    while Lock::try_exclusive(&state.running_lock())?.is_none() {
        if started.elapsed() > DOWN_TIMEOUT {
            bail!("the test host's supervisor does not end");
        }
        std::thread::sleep(BOOT_POLL);
    }
    Ok(())
}

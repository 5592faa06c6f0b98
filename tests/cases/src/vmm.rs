//! A bare `husk-vmm`, driven as a pod's process drives it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_vmm_api::{
    Channel, Counters, DiskConfig, Event, Exit, FdIndex, Phase, Request, VmConfig, VsockConfig,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::place;

/// Nothing takes longer than this, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A VM to be started: a configuration and the descriptors that it refers to.
#[derive(Debug)]
pub struct Vm {
    /// The configuration; change it freely before the start.
    pub config: VmConfig,
    /// Descriptors, in the order of the configuration's indices.
    pub fds: Vec<OwnedFd>,
}

impl Vm {
    /// A VM with one vCPU and a vsock device that runs `kernel`.
    ///
    /// # Errors
    /// `/dev/kvm` cannot be opened.
    pub fn new(kernel: File, memory_mib: u32) -> Result<Vm> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
        let config = VmConfig {
            vcpus: 1,
            memory_mib,
            kvm: FdIndex(0),
            kernel: FdIndex(1),
            initramfs: None,
            cmdline: String::new(),
            console: None,
            serial_console: false,
            disks: Vec::new(),
            nics: Vec::new(),
            vsock: Some(VsockConfig { guest_cid: 3 }),
            fs: None,
        };
        Ok(Vm { config, fds: vec![kvm.into(), kernel.into()] })
    }

    /// A VM with husk's own kernel and agent.
    ///
    /// # Errors
    /// Something cannot be opened.
    pub fn with_agent(memory_mib: u32) -> Result<Vm> {
        let open = |path: std::path::PathBuf| {
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))
        };
        let mut vm = Vm::new(open(place::kernel())?, memory_mib)?;
        vm.config.initramfs = Some(vm.add(open(place::initramfs())?));
        Ok(vm)
    }

    /// Adds a descriptor; returns its index for the configuration.
    pub fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.fds.push(fd.into());
        FdIndex(u32::try_from(self.fds.len()).unwrap_or(u32::MAX) - 1)
    }

    /// Adds a disk.
    #[must_use]
    pub fn with_disk(mut self, serial: &str, image: File, read_only: bool) -> Vm {
        let fd = self.add(image);
        self.config.disks.push(DiskConfig { serial: serial.to_owned(), fd, read_only });
        self
    }

    /// Spawns `husk-vmm` and sends it the configuration.
    ///
    /// # Errors
    /// It cannot be spawned, or does not take the configuration.
    pub fn start(self) -> Result<Running> {
        let (ours, theirs) = Channel::pair()?;
        // The child's end must survive its exec.
        let theirs = theirs.into_fd();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let started = Instant::now();
        let child = Command::new(place::program("husk-vmm"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start husk-vmm")?;
        drop(theirs);
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        ours.send(&Request::Boot(Box::new(self.config)), &fds)?;
        Ok(Running { child, channel: ours, started, control: None, seen: Vec::new() })
    }

    /// Runs the VM to its end.
    ///
    /// # Errors
    /// It cannot be started, or does not end in its own words.
    pub fn run(self) -> Result<(Exit, ExitStatus)> {
        self.start()?.wait()
    }
}

/// A running VM. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    channel: Channel,
    /// When the process was spawned.
    pub started: Instant,
    control: Option<OwnedFd>,
    seen: Vec<Phase>,
}

impl Running {
    /// The VMM's process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The phases reported so far, in the order of their reports.
    #[must_use]
    pub fn phases(&self) -> &[Phase] {
        &self.seen
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(self.channel.send(request, fds)?)
    }

    /// Waits until the VM reports `wanted`.
    ///
    /// # Errors
    /// It ends first.
    pub fn wait_for(&mut self, wanted: Phase) -> Result<()> {
        while !self.seen.contains(&wanted) {
            if let Event::Exited(exit) = self.event()? {
                bail!("ended before {wanted:?}: {exit}");
            }
        }
        Ok(())
    }

    /// Waits for the agent's control connection.
    ///
    /// # Errors
    /// The VM ends first.
    pub fn wait_for_control(&mut self) -> Result<OwnedFd> {
        loop {
            if let Some(fd) = self.control.take() {
                return Ok(fd);
            }
            if let Event::Exited(exit) = self.event()? {
                bail!("ended before the agent connected: {exit}");
            }
        }
    }

    /// The VM's counters.
    ///
    /// # Errors
    /// It ends first.
    pub fn counters(&mut self) -> Result<Counters> {
        self.send(&Request::Counters, &[])?;
        loop {
            match self.event()? {
                Event::Counters(counters) => return Ok(*counters),
                Event::Exited(exit) => bail!("{exit}"),
                _ => {}
            }
        }
    }

    /// The next event.
    ///
    /// # Errors
    /// None comes, or the VMM closed its socket.
    pub fn event(&mut self) -> Result<Event> {
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into()?, tv_nsec: 0 };
        if poll(&mut fds, Some(&patience))? == 0 {
            bail!("husk-vmm has said nothing for {} s", PATIENCE.as_secs());
        }
        let mut received =
            self.channel.receive::<Event>()?.context("husk-vmm has closed its control socket")?;
        match received.message {
            Event::VsockAccepted { port: husk_proto::ports::CONTROL, fd, .. } => {
                self.control = Some(received.take_fd(fd)?);
            }
            Event::Phase { phase, .. } => self.seen.push(phase),
            _ => {}
        }
        Ok(received.message)
    }

    /// Waits for the VM's end: what it reported, and the process's exit status.
    ///
    /// # Errors
    /// The VMM goes without a word.
    pub fn wait(mut self) -> Result<(Exit, ExitStatus)> {
        loop {
            if let Event::Exited(exit) = self.event()? {
                let status = self.child.wait()?;
                return Ok((exit, status));
            }
        }
    }

    /// Kills the VMM (SIGKILL) and reaps it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("cannot end husk-vmm: {error}");
        }
    }
}

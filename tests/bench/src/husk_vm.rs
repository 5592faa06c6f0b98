//! A bare `husk-vmm`, driven as a pod's process drives it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_vmm_api::{Channel, Counters, Event, FdIndex, Phase, Request, VmConfig, VsockConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Setup;

/// Nothing takes longer than this, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A running VM. Killed when dropped.
pub(crate) struct HuskVm {
    child: Child,
    channel: Channel,
    /// The agent's control connection, once it came.
    pub(crate) control: Option<OwnedFd>,
}

impl HuskVm {
    /// Spawns the VMM and tells it to boot. Everything that a pod's process would have open already
    /// is opened before the clock starts.
    pub(crate) fn start(setup: &Setup, memory_mib: u32) -> Result<(HuskVm, Instant)> {
        let open = |path: &std::path::Path| {
            File::open(path).with_context(|| format!("cannot open {}", path.display()))
        };
        let (kernel, initramfs) = (open(&setup.kernel)?, open(&setup.initramfs)?);
        let kvm = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
        let (ours, theirs) = Channel::pair()?;
        // The child's end must survive its exec.
        let theirs = theirs.into_fd();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let config = VmConfig {
            vcpus: 1,
            memory_mib,
            kvm: FdIndex(0),
            kernel: FdIndex(1),
            initramfs: Some(FdIndex(2)),
            cmdline: String::new(),
            console: None,
            serial_console: false,
            disks: Vec::new(),
            vsock: Some(VsockConfig { guest_cid: 3 }),
        };
        let started = Instant::now();
        let child = Command::new(&setup.vmm)
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", setup.vmm.display()))?;
        drop(theirs);
        let fds = [kvm.as_fd(), kernel.as_fd(), initramfs.as_fd()];
        ours.send(&Request::Boot(Box::new(config)), &fds)?;
        Ok((HuskVm { child, channel: ours, control: None }, started))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the VM reports `wanted`.
    pub(crate) fn wait_for(&mut self, wanted: Phase) -> Result<()> {
        loop {
            match self.event()? {
                Event::Phase { phase, .. } if phase == wanted => return Ok(()),
                Event::Exited(exit) => bail!("{exit}"),
                _ => {}
            }
        }
    }

    /// Waits for the agent's connection.
    pub(crate) fn wait_for_control(&mut self) -> Result<OwnedFd> {
        loop {
            if let Some(fd) = self.control.take() {
                return Ok(fd);
            }
            if let Event::Exited(exit) = self.event()? {
                bail!("{exit}");
            }
        }
    }

    /// The VM's counters.
    pub(crate) fn counters(&mut self) -> Result<Counters> {
        self.channel.send(&Request::Counters, &[])?;
        loop {
            match self.event()? {
                Event::Counters(counters) => return Ok(*counters),
                Event::Exited(exit) => bail!("{exit}"),
                _ => {}
            }
        }
    }

    fn event(&mut self) -> Result<Event> {
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into()?, tv_nsec: 0 };
        if poll(&mut fds, Some(&patience))? == 0 {
            bail!("husk-vmm has said nothing for {} s", PATIENCE.as_secs());
        }
        let mut received =
            self.channel.receive::<Event>()?.context("husk-vmm has closed its control socket")?;
        if let Event::VsockAccepted { port: husk_proto::ports::CONTROL, fd, .. } = received.message
        {
            self.control = Some(received.take_fd(fd)?);
        }
        Ok(received.message)
    }
}

impl Drop for HuskVm {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("husk-bench: cannot end husk-vmm: {error}");
        }
    }
}

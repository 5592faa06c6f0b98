//! The control loop: the main thread of `husk-vmm`. It listens to the pod's process and to the VM's
//! own reports, and ends the process with the VM.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use husk_vmm_api::{Channel, ChannelError, Counters, Event, Exit, FdIndex, Phase, Request};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::builder::{self, BuildError, Machine};
use super::report::{self, Ending, Reports, VmEvent};
use crate::devices::virtio::vsock::{HostBusy, HostSink};

/// Lines of the guest's log that an error report carries.
const LOG_TAIL_LINES: usize = 40;

/// Why a VM cannot be run on.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("cannot build the VM")]
    Build(#[from] BuildError),
    #[error("the control socket failed")]
    Channel(#[from] ChannelError),
    #[error("the first message was not `boot`")]
    NotBoot,
    #[error("cannot wait for events")]
    Poll(#[source] io::Error),
}

/// What goes to the pod's process from other threads of the VMM.
struct Host(Arc<Channel>);

impl HostSink for Host {
    fn accepted(&mut self, port: u32, guest_port: u32, fd: OwnedFd) -> Result<(), HostBusy> {
        let event = Event::VsockAccepted { port, guest_port, fd: FdIndex(0) };
        self.0.try_send(&event, &[fd.as_fd()]).map_err(|error| {
            tracing::warn!(%error, port, "the pod's process takes no connection");
            HostBusy
        })
    }

    fn connected(&mut self, id: u32) {
        self.answer(&Event::VsockConnected { id });
    }

    fn refused(&mut self, id: u32, reason: &str) {
        self.answer(&Event::VsockRefused { id, reason: reason.to_owned() });
    }
}

impl Host {
    /// Never blocks, since it is called on the device's thread. A pod's process that lets its queue
    /// run full loses the answer; it sees the connection's own socket come to life or close.
    fn answer(&self, event: &Event) {
        if let Err(error) = self.0.try_send(event, &[]) {
            tracing::warn!(%error, ?event, "the pod's process takes no answer");
        }
    }
}

/// Sends an event. When the pod's process is gone there is nobody to tell, and the loop ends anyway.
fn tell(channel: &Channel, event: &Event) {
    if let Err(error) = channel.send(event, &[]) {
        tracing::debug!(%error, ?event, "nobody hears this event");
    }
}

/// Runs one VM as told over `control`. Returns its outcome when it has ended; by then the pod's
/// process has been told. The caller ends the process, and with it the vCPU threads: that is the
/// fastest way to give everything back.
#[must_use]
pub fn run(control: OwnedFd) -> Exit {
    let started = report::monotonic_ns();
    let channel = Arc::new(Channel::from_fd(control));
    tell(&channel, &Event::Phase { phase: Phase::VmmStarted, at_ns: started });
    let mut phases = BTreeMap::from([(Phase::VmmStarted, started)]);
    let mut log = None;
    let exit = run_to_end(&channel, &mut phases, &mut log).unwrap_or_else(|error| Exit::Error {
        message: chain(&error),
        log_tail: log.map(|l: Arc<_>| tail(&l)).unwrap_or_default(),
    });
    tell(&channel, &Event::Exited(exit.clone()));
    exit
}

type ConsoleLog = Arc<crate::devices::console_log::ConsoleLog>;

fn tail(log: &ConsoleLog) -> String {
    log.tail_lines(LOG_TAIL_LINES)
}

fn run_to_end(
    channel: &Arc<Channel>,
    phases: &mut BTreeMap<Phase, u64>,
    log: &mut Option<ConsoleLog>,
) -> Result<Exit, RunError> {
    let Some(mut boot) = channel.receive::<Request>()? else { return Ok(Exit::Stopped) };
    let config = match &boot.message {
        Request::Boot(config) => config.clone(),
        _ => return Err(RunError::NotBoot),
    };
    let (reporter, reports) = report::channel().map_err(RunError::Poll)?;
    let sink = Box::new(Host(channel.clone()));
    let built = builder::build(&config, &mut boot, sink, reporter);
    // Phases of a build that failed are told too: they say how far it came.
    forward(channel, phases, &reports);
    let mut machine = built?;
    *log = Some(machine.console.clone());
    drop(boot);
    machine.run()?;
    loop {
        let [requested, reported] = wait([channel.as_fd(), reports.as_fd()])?;
        if reported && let Some(ending) = forward(channel, phases, &reports) {
            return Ok(outcome(ending, &machine.console));
        }
        if requested && handle_request(channel, phases, &mut machine)? {
            return Ok(Exit::Stopped);
        }
    }
}

/// Waits until something can be read; says from which.
fn wait<const N: usize>(sources: [BorrowedFd<'_>; N]) -> Result<[bool; N], RunError> {
    let mut fds = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(RunError::Poll(errno.into())),
    }
    Ok(fds.map(|fd| !fd.revents().is_empty()))
}

/// Passes the VM's reports on; returns its end, if it has come.
fn forward(
    channel: &Channel,
    phases: &mut BTreeMap<Phase, u64>,
    reports: &Reports,
) -> Option<Ending> {
    let mut end = None;
    for event in reports.drain() {
        match event {
            VmEvent::Phase { phase, at_ns } => {
                phases.insert(phase, at_ns);
                tell(channel, &Event::Phase { phase, at_ns });
            }
            VmEvent::FileServerLost { reason } => tell(channel, &Event::FileServerLost { reason }),
            VmEvent::Ended(ending) => end = Some(ending),
        }
    }
    end
}

/// Handles one request. True if the VM is to stop: by request, or because the pod's process is gone.
fn handle_request(
    channel: &Channel,
    phases: &BTreeMap<Phase, u64>,
    machine: &mut Machine,
) -> Result<bool, RunError> {
    let mut received = match channel.receive::<Request>() {
        Ok(Some(received)) => received,
        Ok(None) => return Ok(true),
        // The parent's mistake, not the guest's: say so and run on.
        Err(error @ (ChannelError::Malformed { .. } | ChannelError::TooLarge { .. })) => {
            tracing::error!(error = chain(&error), "ignored a control message");
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    match received.message.clone() {
        Request::Stop => return Ok(true),
        Request::Boot(_) => tracing::error!("ignored a second `boot`"),
        Request::Counters => {
            tell(channel, &Event::Counters(Box::new(counters(phases, machine))));
        }
        Request::VsockConnect { id, port, fd } => {
            let refused = match (received.take_fd(fd), &machine.vsock) {
                (Ok(stream), Some(vsock)) => {
                    vsock.connect(id, port, stream).err().map(|e| e.to_string())
                }
                (Ok(_), None) => Some("the VM has no vsock device".to_owned()),
                (Err(error), _) => Some(error.to_string()),
            };
            if let Some(reason) = refused {
                tell(channel, &Event::VsockRefused { id, reason });
            }
        }
        Request::AddDisk { id, disk } => {
            let answer = match machine.add_disk(&disk, &mut received) {
                Ok(device) => Event::DiskAdded { id, device },
                Err(error) => Event::DiskRefused { id, reason: chain(&error) },
            };
            tell(channel, &answer);
        }
        Request::RemoveDisk { id, serial } => {
            let answer = match machine.remove_disk(&serial) {
                Ok(()) => Event::DiskRemoved { id },
                Err(error) => Event::DiskRefused { id, reason: chain(&error) },
            };
            tell(channel, &answer);
        }
    }
    Ok(false)
}

fn counters(phases: &BTreeMap<Phase, u64>, machine: &Machine) -> Counters {
    Counters {
        exits: machine.exits().snapshot(),
        devices: machine.counters().map(|(name, c)| (name.clone(), c.snapshot())).collect(),
        phases_ns: phases.clone(),
        io_exits_at_agent_ready: machine.exits().at_agent_ready(),
    }
}

fn outcome(ending: Ending, log: &ConsoleLog) -> Exit {
    match ending {
        Ending::PowerOff => Exit::PowerOff,
        Ending::Reboot => Exit::Reboot,
        Ending::Panic => Exit::Panic { log_tail: tail(log) },
        Ending::TripleFault => Exit::TripleFault { log_tail: tail(log) },
        Ending::Failure(message) => Exit::Error { message, log_tail: tail(log) },
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

//! The task behind a [`Vm`](super::Vm): it owns the control socket and the VMM's process, sends
//! requests, hands out what events bring, and decides how the VM ended.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::ExitStatus;
use std::sync::Arc;

use husk_vmm_api::{Channel, ChannelError, Event, Exit, Received, Request};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::process::PodProcess;
use super::{Command, EXIT_GRACE, Shared, VmError, VmExit, borrow, lock};

/// [`Channel`] in the form that tokio watches.
#[derive(Debug)]
struct Pollable(Channel);

impl AsRawFd for Pollable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// The VMM's control socket.
#[derive(Debug)]
struct Control(AsyncFd<Pollable>);

/// Turns "would block" into the form by which tokio knows it; everything else is passed through.
fn would_block<T>(result: Result<T, ChannelError>) -> std::io::Result<Result<T, ChannelError>> {
    match result {
        Err(ChannelError::Send(Errno::AGAIN) | ChannelError::Receive(Errno::AGAIN)) => {
            Err(std::io::ErrorKind::WouldBlock.into())
        }
        other => Ok(other),
    }
}

impl Control {
    fn new(channel: Channel) -> Result<Self, VmError> {
        rustix::io::ioctl_fionbio(&channel, true).map_err(|errno| VmError::Watch(errno.into()))?;
        #[allow(unsafe_code)]
        // SAFETY: the channel owns its descriptor, which is the same and open as long as the
        // channel lives; `AsyncFd` owns the channel, and nothing here takes it out or replaces it.
        let registered = unsafe { AsyncFd::register(Pollable(channel)) };
        registered.map(Control).map_err(|error| VmError::Watch(error.into()))
    }

    async fn send(&self, request: &Request, fds: &[OwnedFd]) -> Result<(), VmError> {
        let send = |control: &Pollable| would_block(control.0.try_send(request, &borrow(fds)));
        Ok(self.0.async_io(Interest::WRITABLE, send).await.map_err(VmError::Watch)??)
    }

    /// The next event; `None` at the end of the file.
    async fn receive(&self) -> Result<Option<Received<Event>>, VmError> {
        let receive = |control: &Pollable| would_block(control.0.receive());
        Ok(self.0.async_io(Interest::READABLE, receive).await.map_err(VmError::Watch)??)
    }

    /// What lies in the socket already; `None` if there is nothing (more).
    fn receive_now(&self) -> Option<Received<Event>> {
        self.0.get_ref().0.receive().ok().flatten()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Driver {
    control: Control,
    process: PodProcess,
    shared: Arc<Shared>,
    exit: watch::Sender<Option<Arc<VmExit>>>,
}

/// Why the driver's loop ended.
enum End {
    /// The VMM told how the VM ended.
    Told(Exit),
    /// The process is gone.
    ProcessEnded(Option<ExitStatus>),
    /// The control socket is closed or broken.
    Silent,
    /// It was told to stop and did not answer in time, or every handle is gone.
    Kill,
}

impl Driver {
    pub(super) fn new(
        control: Channel,
        process: PodProcess,
        shared: Arc<Shared>,
        exit: watch::Sender<Option<Arc<VmExit>>>,
    ) -> Result<Self, VmError> {
        Ok(Driver { control: Control::new(control)?, process, shared, exit })
    }

    /// Runs until the VM has ended and its process is reaped. The end is published as soon as it
    /// is known: the kernel may take tens of milliseconds more to take the VM apart.
    pub(super) async fn run(mut self, commands: mpsc::UnboundedReceiver<Command>) {
        let end = self.serve(commands).await;
        let exit = match end {
            End::Told(exit) => {
                self.publish(VmExit::Reported(exit));
                self.reap().await;
                return;
            }
            End::ProcessEnded(status) => self.epilogue(status),
            End::Silent => {
                let status = self.reap().await;
                self.epilogue(status)
            }
            End::Kill => {
                self.process.kill();
                self.process.ended().await;
                VmExit::Reported(Exit::Stopped)
            }
        };
        self.publish(exit);
    }

    async fn serve(&mut self, mut commands: mpsc::UnboundedReceiver<Command>) -> End {
        let mut stopping = None;
        loop {
            let stop_limit = async {
                match stopping {
                    Some(limit) => tokio::time::sleep_until(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                received = self.control.receive() => match received {
                    Ok(Some(received)) => {
                        if let Some(exit) = handle(&self.shared, received) {
                            return End::Told(exit);
                        }
                    }
                    Ok(None) => return End::Silent,
                    Err(error @ VmError::Control(ChannelError::Receive(_)) | error @ VmError::Watch(_)) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "the VMM is lost");
                        return End::Silent;
                    }
                    // The channel can be used on, but what it said is lost.
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "unknown event");
                    }
                },
                status = self.process.ended() => return End::ProcessEnded(status),
                command = commands.recv() => {
                    let Some((request, fds)) = command else { return End::Kill };
                    if request == Request::Stop && stopping.is_none() {
                        stopping = Some(tokio::time::Instant::now() + EXIT_GRACE);
                    }
                    // A VMM that takes no messages must not keep us from what else happens. It
                    // reads all the time; when its queue is full it hangs, and only Stop matters.
                    let sent = tokio::time::timeout(EXIT_GRACE, self.control.send(&request, &fds));
                    match sent.await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(
                            error = &error as &dyn std::error::Error,
                            "a request did not reach the VMM",
                        ),
                        Err(_) => return End::Kill,
                    }
                }
                () = stop_limit => return End::Kill,
            }
        }
    }

    /// How a VM ended whose process is gone: what the process said last counts, else its status.
    fn epilogue(&self, status: Option<ExitStatus>) -> VmExit {
        while let Some(received) = self.control.receive_now() {
            if let Some(exit) = handle(&self.shared, received) {
                return VmExit::Reported(exit);
            }
        }
        VmExit::Died { status, stderr_tail: self.process.stderr_tail() }
    }

    /// Waits for a process that is about to exit; kills it if it does not.
    async fn reap(&mut self) -> Option<ExitStatus> {
        match tokio::time::timeout(EXIT_GRACE, self.process.ended()).await {
            Ok(status) => status,
            Err(_) => {
                self.process.kill();
                self.process.ended().await
            }
        }
    }

    fn publish(&self, exit: VmExit) {
        // Who waits for the guest learns of its end by `exited`.
        lock(&self.shared.accepts).clear();
        lock(&self.shared.counters).clear();
        lock(&self.shared.disks).clear();
        self.exit.send_replace(Some(Arc::new(exit)));
    }
}

/// Does what an event says; returns the exit if that is what it was.
fn handle(shared: &Shared, mut received: Received<Event>) -> Option<Exit> {
    match received.message.clone() {
        Event::Phase { phase, at_ns } => {
            let mut phases = lock(&shared.phases);
            if !phases.iter().any(|(known, _)| *known == phase) {
                phases.push((phase, at_ns));
            }
        }
        Event::VsockAccepted { port, guest_port, fd } => {
            let waiter = lock(&shared.accepts).remove(&port);
            let stream = received.take_fd(fd).map_err(VmError::from).and_then(into_stream);
            match (waiter, stream) {
                (Some(waiter), Ok(stream)) => {
                    // Interest was withdrawn: the connection is closed.
                    drop(waiter.send(Some(stream)));
                }
                (None, _) => {
                    tracing::debug!(port, guest_port, "nobody expects this connection: closed");
                }
                (Some(_), Err(error)) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    port,
                    "a connection of the guest is lost",
                ),
            }
        }
        Event::Counters(counters) => {
            if let Some(waiter) = lock(&shared.counters).pop_front() {
                // Whoever asked may have stopped waiting.
                drop(waiter.send(*counters));
            }
        }
        Event::DiskAdded { id, device } => lock(&shared.disks).answered(id, Ok(Some(device))),
        Event::DiskRemoved { id } => lock(&shared.disks).answered(id, Ok(None)),
        Event::DiskRefused { id, reason } => lock(&shared.disks).answered(id, Err(reason)),
        Event::FileServerLost { reason } => shared.files.lost(reason),
        Event::VsockConnected { id } => tracing::debug!(id, "an answer to nothing"),
        Event::VsockRefused { id, reason } => tracing::debug!(id, reason, "an answer to nothing"),
        Event::Exited(exit) => return Some(exit),
    }
    None
}

fn into_stream(fd: OwnedFd) -> Result<UnixStream, VmError> {
    let stream = StdUnixStream::from(fd);
    stream.set_nonblocking(true).map_err(VmError::Watch)?;
    UnixStream::from_std(stream).map_err(VmError::Watch)
}

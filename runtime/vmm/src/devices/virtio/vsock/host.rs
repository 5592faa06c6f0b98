//! What joins the device to the host's process: [`HostSink`] for what the guest does,
//! [`VsockHandle`] for what the host wants.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most requests of the host's that wait for the device, and so for the guest to bring it up.
pub const MAX_WAITING_CONNECTS: usize = 64;

/// Takes what the device has for the host's process. Called on the device's thread: an
/// implementation that blocks stops every connection of the guest.
pub trait HostSink: Send {
    /// The guest connected from its port `guest_port` to the host's port `port`; `socket`, a
    /// connected `AF_UNIX` stream, is the host's end.
    ///
    /// # Errors
    /// The host does not take it, and the guest's connect fails.
    fn accepted(&mut self, port: u32, guest_port: u32, socket: OwnedFd) -> Result<(), HostBusy>;

    /// The connection that was asked for with `id` stands.
    fn connected(&mut self, id: u32);

    /// The connection that was asked for with `id` does not come about; its socket is closed.
    fn refused(&mut self, id: u32, reason: &str);
}

/// The host takes no connection now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host takes no connection now")]
pub struct HostBusy;

/// Why [`VsockHandle::connect`] did not take a request.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The guest has not brought its vsock device up, or is far behind.
    #[error("{MAX_WAITING_CONNECTS} connections wait for the guest already")]
    Full,
    /// The device is gone, and its VM with it.
    #[error("the vsock device is gone")]
    Gone,
}

/// Asks the device for connections to the guest's ports. Clones ask the same device.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    requests: SyncSender<Connect>,
    doorbell: Arc<EventFd>,
}

impl VsockHandle {
    /// Joins `socket`, a connected `AF_UNIX` stream, to a new connection to the guest's `port`.
    /// Does not block: [`HostSink::connected`] or [`HostSink::refused`] answers with `id`. Requests
    /// made before the guest has brought the device up wait for it.
    ///
    /// # Errors
    /// [`ConnectError`]; the socket is closed then, and the sink is not called.
    pub fn connect(&self, id: u32, port: u32, socket: OwnedFd) -> Result<(), ConnectError> {
        self.requests.try_send(Connect { id, port, socket }).map_err(|error| match error {
            TrySendError::Full(_) => ConnectError::Full,
            TrySendError::Disconnected(_) => ConnectError::Gone,
        })?;
        ring(&self.doorbell);
        Ok(())
    }
}

/// A request of the host's.
#[derive(Debug)]
pub(super) struct Connect {
    pub(super) id: u32,
    pub(super) port: u32,
    pub(super) socket: OwnedFd,
}

/// The device's end of both ways. Outlives the worker, which is made anew at each activation.
pub(super) struct HostLink {
    pub(super) sink: Box<dyn HostSink>,
    requests: Receiver<Connect>,
}

impl HostLink {
    /// A link to `sink`, with the handle by which the host asks and the eventfd that it signals.
    ///
    /// # Errors
    /// No eventfd could be had.
    pub(super) fn new(sink: Box<dyn HostSink>) -> io::Result<(Self, VsockHandle, Arc<EventFd>)> {
        let doorbell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, requests) = sync_channel(MAX_WAITING_CONNECTS);
        let handle = VsockHandle { requests: sender, doorbell: doorbell.clone() };
        Ok((HostLink { sink, requests }, handle, doorbell))
    }

    /// The next request, if one waits.
    pub(super) fn next_request(&self) -> Option<Connect> {
        // Also when there are no handles: nobody asks any more, and what stands goes on.
        self.requests.try_recv().ok()
    }
}

impl fmt::Debug for HostLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostLink").finish_non_exhaustive()
    }
}

impl Drop for HostLink {
    /// No request goes without an answer.
    fn drop(&mut self) {
        while let Some(Connect { id, .. }) = self.next_request() {
            self.sink.refused(id, "the VM is gone");
        }
    }
}

/// Signals an eventfd.
pub(super) fn ring(doorbell: &EventFd) {
    if let Err(error) = doorbell.write(1) {
        // Only a full counter, and then it is signalled already.
        tracing::warn!(%error, "cannot signal the vsock device");
    }
}

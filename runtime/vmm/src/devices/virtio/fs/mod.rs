//! The file-system device (virtio 1.2, section 5.11): directories of the host, in the guest.
//!
//! Its queues are served by another process, `husk-fs`, to which they are handed over with the guest's
//! memory ([`frontend`]); its interrupts come back by an eventfd that this device's worker passes on
//! (docs/adr/0019). When that process is gone, the worker answers every request with an error
//! ([`orphan`]), so that nothing in the guest waits for ever, and reports the loss.

mod frontend;
mod handler;
pub mod orphan;
pub mod protocol;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::frontend::Frontend;
use self::handler::FsHandler;
use super::worker::Worker;
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice, Wiring};

/// Virtio device ID of the file-system device.
pub const DEVICE_ID: u32 = 26;

/// Entries of the queue for requests that go before all others, and of the one for the rest (virtio
/// 1.2, 5.11.2). Linux makes no request of more pages than a queue has entries: 1 MiB needs 258.
const QUEUE_SIZES: &[u16] = &[128, 512];

/// Longest tag (virtio 1.2, 5.11.4).
const TAG_LEN: usize = husk_vmm_api::MAX_TAG_LEN;

/// Length of the configuration space: the tag, and the number of queues for requests.
const CONFIG_LEN: usize = TAG_LEN + 4;

/// The connection to the server, between activations; `None` once it is lost.
type Connection = Arc<Mutex<Option<Frontend>>>;

/// The file-system device.
#[derive(Debug)]
pub struct Fs {
    config: [u8; CONFIG_LEN],
    connection: Connection,
    worker: Option<Worker>,
}

impl Fs {
    /// A device that the guest mounts as `tag`, served by whoever has the other end of `socket`. The
    /// server need not be there yet.
    #[must_use]
    pub fn new(tag: &str, socket: OwnedFd) -> Self {
        let mut config = [0; CONFIG_LEN];
        let queues = 1_u32.to_le_bytes();
        let bytes = tag.bytes().chain(std::iter::repeat(0)).take(TAG_LEN).chain(queues);
        for (to, from) in config.iter_mut().zip(bytes) {
            *to = from;
        }
        let connection = Arc::new(Mutex::new(Some(Frontend::new(socket))));
        Fs { config, connection, worker: None }
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        "fs"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |what| move |source| ActivateError::Host { what, source };
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (call, begin) = (event(), event());
        let call = call.map_err(failed("an eventfd for interrupts"))?;
        let begin = begin.map_err(failed("an eventfd for the worker's begin"))?;
        begin.write(1).map_err(failed("the worker to begin"))?;
        let Activation { memory, queues, interrupt, features, reporter } = activation;
        // The kicks are the server's, as long as there is one.
        let wiring =
            Wiring { kicks: Vec::new(), interrupt: interrupt.clone(), reporter: reporter.clone() };
        let connection = self.connection.clone();
        let handler = FsHandler::new(handler::Parts {
            connection,
            memory,
            queues,
            interrupt,
            features,
            reporter,
            call,
            begin,
        });
        self.worker = Some(Worker::spawn("fs", wiring, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests;

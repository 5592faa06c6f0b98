//! virtio 1.2 devices over the MMIO transport (virtio 1.2, section 4.2).
//!
//! The transport ([`mmio`]) owns queues, features and status, and gates every register write by the
//! status; a device knows none of that. When the driver sets `DRIVER_OK` the transport moves memory,
//! queues and interrupt into the device ([`Activation`]); the device's worker thread owns them from
//! then on, until [`VirtioDevice::reset`] takes them back by joining it.
//!
//! To add a device: a module here with one type that implements [`VirtioDevice`] (`rng` is the
//! exemplar to read first), and one line in `machine::builder`, where the devices are made.
//!
//! What a device builds on: [`chain`] (descriptor chains that are completed exactly once) and
//! [`worker`] (the thread that serves the queues).

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod timer;
pub mod vsock;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::chain::Virtqueue;
use self::mmio::register;
use self::mmio::window::Window;
use crate::GuestMemory;
use crate::counters::DeviceCounters;
use crate::devices::Line;
use crate::machine::report::Reporter;

/// `VIRTIO_F_VERSION_1`: the device is not a legacy one (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`: a descriptor may refer to a table of descriptors (section 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: notifications are suppressed by `used_event` and `avail_event` (section 6).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// The ring features that every device here can offer: [`chain`] does the work for all of them.
pub const RING_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX;

/// A device behind the transport.
pub trait VirtioDevice: Send {
    /// The virtio device ID (virtio 1.2, section 5), e.g. 4 for entropy.
    fn device_id(&self) -> u32;

    /// Name for logs, counters and threads, e.g. `rng` or `blk:scratch`.
    fn name(&self) -> &str;

    /// The most entries that each queue may have; its length is the number of queues.
    fn queue_max_sizes(&self) -> &'static [u16];

    /// How many of the queues, from the first on, a driver that negotiated `features` has to enable.
    fn queues_in_use(&self, features: u64) -> usize {
        let _ = features;
        self.queue_max_sizes().len()
    }

    /// Device feature bits on offer, without `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;

    /// The device's configuration space as it is now; reads past its end are zeros. Little-endian,
    /// as the guest sees it.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Starts the device: its worker owns what `activation` holds from here on.
    ///
    /// # Errors
    /// The host could not provide what the device needs; the transport sets `NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device and joins its worker, so that it can be activated anew. Must be bounded: the
    /// worker is told by an eventfd. Does nothing when not active.
    fn reset(&mut self);
}

/// What a device works with, from `DRIVER_OK` to its reset.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The device's queues, [`VirtioDevice::queues_in_use`] of them, all enabled and valid, in the
    /// order of [`VirtioDevice::queue_max_sizes`], each with the eventfd by which the guest kicks it.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the guest.
    pub interrupt: Interrupt,
    /// The features that driver and device agreed on.
    pub features: u64,
    /// Where the worker reports that the host let it down.
    pub reporter: Reporter,
}

/// What a [`worker::Worker`] needs beside its handler; made by [`Activation::split`].
#[derive(Debug)]
pub struct Wiring {
    /// The eventfds by which the guest kicks the queues, in the queues' order.
    pub kicks: Vec<EventFd>,
    /// How to tell the guest that it broke the protocol.
    pub interrupt: Interrupt,
    /// Where to report that the host failed.
    pub reporter: Reporter,
}

impl Activation {
    /// Splits into the queues (for the device's handler) and the rest (for its worker).
    ///
    /// # Errors
    /// [`ActivateError::QueueNotReady`] if there are not exactly `N` queues.
    pub fn split<const N: usize>(self) -> Result<([Virtqueue; N], Wiring), ActivateError> {
        let (virtqueues, wiring) = self.split_all();
        let virtqueues = virtqueues
            .try_into()
            .map_err(|got: Vec<Virtqueue>| ActivateError::QueueNotReady { queue: got.len() })?;
        Ok((virtqueues, wiring))
    }

    /// As [`Activation::split`], for a device whose number of queues is configured.
    #[must_use]
    pub fn split_all(self) -> (Vec<Virtqueue>, Wiring) {
        let Activation { memory, queues, interrupt, features, reporter } = self;
        let (virtqueues, kicks) = queues
            .into_iter()
            .map(|ActiveQueue { queue, kick }| {
                (Virtqueue::new(memory.clone(), queue, interrupt.clone(), features), kick)
            })
            .unzip();
        (virtqueues, Wiring { kicks, interrupt, reporter })
    }
}

/// One queue of an active device.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings.
    pub queue: Queue,
    /// Signalled when the driver notifies the queue.
    pub kick: EventFd,
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// An eventfd, epoll instance or duplicate of a descriptor could not be had.
    #[error("cannot get {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The driver did not enable a queue that the device needs.
    #[error("queue {queue} is not enabled")]
    QueueNotReady {
        /// Its index.
        queue: usize,
    },
}

/// `InterruptStatus` bit: a used buffer notification (virtio 1.2, 4.2.2).
pub const INTERRUPT_USED_RING: u32 = 1 << 0;
/// `InterruptStatus` bit: a configuration change notification (virtio 1.2, 4.2.2).
pub const INTERRUPT_CONFIG: u32 = 1 << 1;

/// `Status` bits (virtio 1.2, 2.1).
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// A device's interrupt line to the guest, and its way to say that it needs a reset.
///
/// Shared between the transport and the device's worker.
#[derive(Debug, Clone)]
pub struct Interrupt {
    inner: Arc<InterruptInner>,
}

#[derive(Debug)]
struct InterruptInner {
    /// Of its registers `InterruptStatus`, `Status` (to which workers may only add
    /// `DEVICE_NEEDS_RESET`) and `ConfigGeneration` change here.
    window: Window,
    line: Arc<dyn Line>,
    counters: Arc<DeviceCounters>,
}

impl Interrupt {
    /// An interrupt that signals `line`, with its registers in `window`.
    #[must_use]
    pub fn new(window: Window, line: Arc<dyn Line>, counters: Arc<DeviceCounters>) -> Self {
        Interrupt { inner: Arc::new(InterruptInner { window, line, counters }) }
    }

    /// Tells the driver that used buffers are there. Call it only when the queue's
    /// `needs_notification` says so.
    pub fn signal_used(&self) {
        self.signal(INTERRUPT_USED_RING);
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.inner.window.count_up(register::CONFIG_GENERATION);
        self.signal(INTERRUPT_CONFIG);
    }

    /// The guest broke the protocol: sets `DEVICE_NEEDS_RESET` and tells the driver. The worker then
    /// stops touching the queues (virtio 1.2, 2.1.2).
    pub fn signal_needs_reset(&self) {
        self.inner.window.add_bits(register::STATUS, status::DEVICE_NEEDS_RESET);
        self.signal(INTERRUPT_CONFIG);
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<DeviceCounters> {
        &self.inner.counters
    }

    /// `Status` as the driver reads it.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.inner.window.get(register::STATUS)
    }

    /// The transport's: the driver has seen these events. That buffers were used stays said, see
    /// [`MmioTransport::USED_RING_ACK`](mmio::MmioTransport::USED_RING_ACK).
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.inner.window.take_bits(register::INTERRUPT_STATUS, bits & !INTERRUPT_USED_RING);
    }

    /// The transport's: the driver set `Status` bits. Bits are only ever added, so that a worker's
    /// `DEVICE_NEEDS_RESET` at the same time is not lost.
    pub(crate) fn add_status(&self, bits: u32) {
        self.inner.window.add_bits(register::STATUS, bits);
    }

    /// The transport's: the device was reset. Its worker must be joined already.
    pub(crate) fn clear(&self) {
        self.inner.window.set(register::INTERRUPT_STATUS, 0);
        self.inner.window.set(register::STATUS, 0);
    }

    /// `InterruptStatus` as the driver reads it.
    #[cfg(test)]
    pub(crate) fn pending(&self) -> u32 {
        self.inner.window.get(register::INTERRUPT_STATUS)
    }

    fn signal(&self, bit: u32) {
        self.inner.window.add_bits(register::INTERRUPT_STATUS, bit);
        self.inner.counters.count_interrupt();
        self.inner.line.raise();
    }
}

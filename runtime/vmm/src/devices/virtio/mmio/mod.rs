//! The virtio-mmio transport (virtio 1.2, section 4.2), version 2.
//!
//! It owns what every device has in common: the registers, the features, the queues' set-up, and the
//! status machine ([`status`]), by which each write is gated: what the driver may not write now, or
//! may not write at all, changes nothing. When the driver sets `DRIVER_OK`, queues that were checked
//! move into the device; a register write can no longer reach them.
//!
//! A device that comes while the guest runs has its transport in a [`slot`].
//!
//! Not for: the devices' work (their workers do it), or wiring to KVM (`machine` does it, with
//! [`MmioTransport::queue_kicks`]).

mod queue;
pub mod slot;
pub mod status;
pub mod window;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::queue::{QueueSetup, set_high, set_low};
use self::status::Transition;
use self::window::Window;
use super::status::DRIVER_OK;
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_VERSION_1, INTERRUPT_USED_RING,
    Interrupt, VirtioDevice,
};
use crate::GuestMemory;
use crate::counters::DeviceCounters;
use crate::devices::{BusDevice, Line};
use crate::machine::report::Reporter;

/// Length of a device's MMIO window in bytes.
pub const WINDOW_LEN: u64 = 0x1000;

/// Register offsets (virtio 1.2, 4.2.2).
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// `MagicValue`: "virt".
const MAGIC: u32 = 0x7472_6976;
/// `Version`: not the legacy interface.
const VERSION: u32 = 2;
/// `VendorID`: "husk".
const VENDOR: u32 = u32::from_le_bytes(*b"husk");

/// Refused accesses that are logged per device, so that a guest cannot fill the host's log.
const MAX_LOGGED_REFUSALS: u32 = 16;

/// One device's MMIO window.
pub struct MmioTransport {
    memory: GuestMemory,
    device: Box<dyn VirtioDevice>,
    window: Window,
    interrupt: Interrupt,
    reporter: Reporter,
    queues: Vec<QueueSetup>,
    kicks: Vec<EventFd>,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    driver_features: u64,
    /// The driver asked for a feature beyond bit 63. There is none, so `FEATURES_OK` will fail.
    unknown_features: bool,
    /// Whether the device has a worker: from a `DRIVER_OK` that succeeded to the next reset.
    active: bool,
    logged_refusals: u32,
}

impl MmioTransport {
    /// Offset of `QueueNotify`, where the ioeventfds of [`MmioTransport::queue_kicks`] go.
    pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

    /// Offset of `InterruptACK`, and the value by which a driver says that it has seen that buffers were
    /// used. `InterruptStatus` goes on saying so, which makes a driver look at its queues at every
    /// interrupt and costs nothing; so the value means nothing: register it as an ioeventfd that
    /// nobody reads, and no interrupt leaves the guest for this process.
    pub const USED_RING_ACK: (u64, u32) = (register::INTERRUPT_ACK, INTERRUPT_USED_RING);

    /// A transport in front of `device`, which is seen in `window` and interrupts by `line`. A
    /// failure of the host while the device works is reported to `reporter`.
    ///
    /// # Errors
    /// The host has no eventfd left.
    pub fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        reporter: Reporter,
        (window, line): (Window, Arc<dyn Line>),
    ) -> io::Result<Self> {
        let event_fd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let sizes = device.queue_max_sizes();
        let kicks = sizes.iter().map(|_| event_fd()).collect::<Result<_, _>>()?;
        let interrupt = Interrupt::new(window.clone(), line, Arc::new(DeviceCounters::default()));
        let transport = MmioTransport {
            memory,
            queues: sizes.iter().map(|size| QueueSetup::new(*size)).collect(),
            kicks,
            interrupt,
            reporter,
            device,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            driver_features: 0,
            unknown_features: false,
            active: false,
            logged_refusals: 0,
            window,
        };
        transport.show_identity();
        transport.show_selected();
        Ok(transport)
    }

    /// Shows what never changes.
    fn show_identity(&self) {
        let window = &self.window;
        window.set(register::MAGIC_VALUE, MAGIC);
        window.set(register::VERSION, VERSION);
        window.set(register::DEVICE_ID, self.device.device_id());
        window.set(register::VENDOR_ID, VENDOR);
        // There is no shared memory region: length and base are -1 (virtio 1.2, 4.2.2).
        for offset in (register::SHM_LEN_LOW..=register::SHM_BASE_HIGH).step_by(4) {
            window.set(offset, u32::MAX);
        }
        window.put(register::CONFIG, self.device.config());
    }

    /// Shows what depends on the driver's selections, after a write.
    fn show_selected(&self) {
        let queue = self.selected_queue();
        let features = half(self.offered_features(), self.device_features_sel);
        self.window.set(register::DEVICE_FEATURES, features);
        self.window.set(register::QUEUE_SIZE_MAX, queue.map_or(0, |queue| queue.max_size().into()));
        self.window.set(register::QUEUE_READY, queue.is_some_and(QueueSetup::is_ready).into());
    }

    /// The eventfd of each queue, in the queues' order. To be registered as ioeventfd at
    /// [`MmioTransport::QUEUE_NOTIFY`] in this device's window, 4 bytes long, each with its index as
    /// datamatch.
    #[must_use]
    pub fn queue_kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<DeviceCounters> {
        self.interrupt.counters().clone()
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.device.name()
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    /// Whether the driver may have the features that it asked for (virtio 1.2, 2.2 and 6.1).
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & F_VERSION_1 != 0
            && !self.unknown_features
    }

    fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SIZE
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            _ => self.refuse("write", offset, &"no such writable register"),
        }
    }

    fn write_features(&mut self, value: u32) {
        if !status::can_negotiate(self.interrupt.status()) {
            return self.refuse("write", register::DRIVER_FEATURES, &"features are not negotiated");
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => self.unknown_features |= value != 0,
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if !status::can_set_up_queues(self.interrupt.status()) {
            return self.refuse("write", offset, &"queues are not being set up");
        }
        let selected = usize::try_from(self.queue_sel).ok();
        let Some(queue) = selected.and_then(|index| self.queues.get_mut(index)) else {
            return self.refuse("write", offset, &"no such queue");
        };
        // An enabled queue was checked as it is; it must be disabled before it can be changed.
        if queue.is_ready() && offset != register::QUEUE_READY {
            return self.refuse("write", offset, &"the queue is enabled");
        }
        let result = match offset {
            register::QUEUE_SIZE => queue.set_size(value),
            register::QUEUE_READY if value == 0 => {
                queue.disable();
                Ok(())
            }
            register::QUEUE_READY => queue.enable(&self.memory),
            _ => {
                match offset {
                    register::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
                    register::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
                    register::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
                    register::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
                    register::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
                    _ => set_high(&mut queue.device, value),
                }
                Ok(())
            }
        };
        if let Err(error) = result {
            self.refuse("write", offset, &error);
        }
    }

    /// `QueueNotify`, where no ioeventfd caught it.
    fn notify(&mut self, value: u32) {
        let kick = usize::try_from(value).ok().and_then(|index| self.kicks.get(index));
        match kick {
            None => self.refuse("write", register::QUEUE_NOTIFY, &"no such queue"),
            Some(_) if !self.active => {
                self.refuse("write", register::QUEUE_NOTIFY, &"the device is not live");
            }
            Some(kick) => {
                if let Err(error) = kick.write(1) {
                    // Only a full counter: the worker has been told.
                    tracing::debug!(device = self.device.name(), %error, "cannot signal a kick");
                }
            }
        }
    }

    fn write_status(&mut self, value: u32) {
        let acceptable = self.features_acceptable();
        match status::transition(self.interrupt.status(), value, acceptable) {
            Transition::Same => {}
            Transition::Reset => self.reset(),
            Transition::Add(bits) => self.interrupt.add_status(bits),
            Transition::Activate => {
                self.interrupt.add_status(DRIVER_OK);
                if let Err(error) = self.activate() {
                    let device = self.device.name();
                    let error: &dyn std::error::Error = &error;
                    tracing::error!(device, error, "cannot activate a device");
                    self.interrupt.signal_needs_reset();
                }
            }
            Transition::Refuse(why) => self.refuse("write", register::STATUS, &why),
        }
    }

    /// Moves the queues into the device.
    fn activate(&mut self) -> Result<(), ActivateError> {
        let features = self.driver_features;
        let mut queues = Vec::with_capacity(self.queues.len());
        let in_use = self.device.queues_in_use(features);
        for (index, (setup, kick)) in self.queues.iter().zip(&self.kicks).take(in_use).enumerate() {
            let queue = setup
                .queue(features & F_EVENT_IDX != 0)
                .ok_or(ActivateError::QueueNotReady { queue: index })?;
            let kick = kick
                .try_clone()
                .map_err(|source| ActivateError::Host { what: "a queue's eventfd", source })?;
            queues.push(ActiveQueue { queue, kick });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features,
            reporter: self.reporter.clone(),
        })?;
        self.active = true;
        Ok(())
    }

    /// Everything as it was in the beginning (virtio 1.2, 2.1.2, 2.4). Waits for the worker.
    fn reset(&mut self) {
        // Also when not active: a failed activation may have left something half made.
        self.device.reset();
        self.active = false;
        // After the worker is gone, or it could still set DEVICE_NEEDS_RESET or an interrupt.
        self.interrupt.clear();
        self.driver_features = 0;
        self.unknown_features = false;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size());
        }
        for kick in &self.kicks {
            // A kick that nobody took must not be the next activation's first. Nothing to read is
            // the usual case.
            match kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(device = self.device.name(), %error, "cannot clear a kick");
                }
            }
        }
    }

    /// The guest did what it may not. That changes nothing, and is worth a line to whoever debugs a
    /// driver.
    fn refuse(&mut self, access: &str, offset: u64, why: &dyn std::fmt::Display) {
        if self.logged_refusals < MAX_LOGGED_REFUSALS {
            self.logged_refusals = self.logged_refusals.saturating_add(1);
            let device = self.device.name();
            let status = self.interrupt.status();
            tracing::debug!(device, access, offset, status, %why, "refused a register access");
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            return self.refuse("write", offset, &"configuration space is read-only");
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return self.refuse("write", offset, &"not 4 bytes long");
        };
        if !offset.is_multiple_of(4) {
            return self.refuse("write", offset, &"not aligned");
        }
        self.write_register(offset, u32::from_le_bytes(data));
        self.show_selected();
    }
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.name())
            .field("status", &self.interrupt.status())
            .field("queues", &self.queues)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

/// The 32 bits of a 64-bit set that a selector register selects; none beyond.
fn half(bits: u64, selector: u32) -> u32 {
    let shifted = match selector {
        0 => bits & 0xffff_ffff,
        1 => bits >> 32,
        _ => 0,
    };
    u32::try_from(shifted).unwrap_or(0)
}

#[cfg(test)]
mod tests;

//! Places for devices that come and go while the guest runs (docs/adr/0023).
//!
//! A driver that looks at a place without a device finds a placeholder: a device with the ID 0, which
//! it leaves alone (virtio 1.2, 4.2.3.1.1). The guest is told elsewhere when to look again.

use super::window::Window;
use super::{MAGIC, MmioTransport, VERSION, register};
use crate::devices::BusDevice;

/// A place on the bus, with or without a device.
#[derive(Debug)]
pub struct Slot {
    window: Window,
    occupant: Option<MmioTransport>,
}

impl Slot {
    /// An empty place that is seen in `window`.
    #[must_use]
    pub fn new(window: Window) -> Slot {
        show_placeholder(&window);
        Slot { window, occupant: None }
    }

    /// Whether no device is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.occupant.is_none()
    }

    /// Puts a device there, whose transport was made with this place's window. One that is there
    /// already ends.
    pub fn fill(&mut self, transport: MmioTransport) {
        self.occupant = Some(transport);
    }

    /// Takes the device away: its worker is joined, and what it held is closed. Blocks for as long as
    /// the host takes for the request that the worker is at.
    pub fn clear(&mut self) {
        if let Some(mut transport) = self.occupant.take() {
            transport.reset();
        }
        show_placeholder(&self.window);
    }
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Without a device there is nothing that a write could change.
        if let Some(transport) = &mut self.occupant {
            transport.write(offset, data);
        }
    }
}

fn show_placeholder(window: &Window) {
    window.clear();
    window.set(register::MAGIC_VALUE, MAGIC);
    window.set(register::VERSION, VERSION);
}

/// A device whose driver does not see it yet: it takes it for a placeholder.
#[derive(Debug)]
pub struct Hidden {
    window: Window,
    device_id: u32,
}

impl Hidden {
    /// Hides the device behind `transport`, which works nevertheless.
    #[must_use]
    pub fn new(transport: &MmioTransport) -> Hidden {
        let (window, device_id) = (transport.window.clone(), transport.device.device_id());
        window.set(register::DEVICE_ID, 0);
        Hidden { window, device_id }
    }

    /// Shows it, to a driver that looks again.
    pub fn show(&self) {
        self.window.set(register::DEVICE_ID, self.device_id);
    }
}

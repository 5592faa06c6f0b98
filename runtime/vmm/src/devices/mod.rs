//! Devices: what the guest sees at I/O ports and in MMIO windows.

pub mod bus;
pub mod console_log;
pub mod ioapic;
pub mod rate_limit;
pub mod reset;
pub mod serial;
pub mod signal;
pub mod virtio;

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A device's interrupt line.
pub trait Line: Debug + Send + Sync {
    /// Signals an edge. Does not block.
    fn raise(&self);
}

/// A line that somebody in the host watches.
impl Line for EventFd {
    fn raise(&self) {
        match self.write(1) {
            Ok(()) => {}
            // 2^64 - 2 edges that nobody has seen: it is up.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::warn!(%error, "cannot signal an interrupt line"),
        }
    }
}

/// A device that answers to accesses in one range of addresses (MMIO or ports).
///
/// Called on a vCPU's thread, so it must not block.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the range's start. Bytes
    /// that the device does not set stay zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the range's start.
    fn write(&mut self, offset: u64, data: &[u8]);
}

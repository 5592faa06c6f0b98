//! Devices: what the guest sees at I/O ports and in MMIO windows.

pub mod bus;
pub mod console_log;
pub mod reset;
pub mod serial;
pub mod signal;
pub mod virtio;

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

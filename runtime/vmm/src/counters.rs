//! What the VM counts: cheap atomics, read when somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};

use husk_vmm_api::DeviceCounts;

/// Counts of one virtio device, shared between its worker and the control loop.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    bytes_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
}

impl DeviceCounters {
    /// The guest notified a queue.
    pub fn count_kick(&self) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
    }

    /// The device interrupted the guest.
    pub fn count_interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// The device wrote so many bytes into guest memory.
    pub fn count_to_guest(&self, bytes: u64) {
        self.bytes_to_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The device read so many bytes from guest memory.
    pub fn count_from_guest(&self, bytes: u64) {
        self.bytes_from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The counts now.
    #[must_use]
    pub fn snapshot(&self) -> DeviceCounts {
        DeviceCounts {
            kicks: self.kicks.load(Ordering::Relaxed),
            interrupts: self.interrupts.load(Ordering::Relaxed),
            bytes_to_guest: self.bytes_to_guest.load(Ordering::Relaxed),
            bytes_from_guest: self.bytes_from_guest.load(Ordering::Relaxed),
        }
    }
}

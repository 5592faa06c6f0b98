//! What the driver says about a queue before the device is live, and the checks when it is enabled.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;

/// A queue as the driver sets it up (virtio 1.2, 4.2.3.2). Plain numbers: they mean something only
/// once [`QueueSetup::enable`] has checked them all together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueSetup {
    max_size: u16,
    /// Entries (`QueueNum`).
    pub(super) size: u16,
    /// Guest-physical address of the descriptor area.
    pub(super) desc: u64,
    /// Guest-physical address of the driver area (available ring).
    pub(super) driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub(super) device: u64,
    ready: bool,
}

/// Why a queue cannot be set up so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueError {
    #[error("queue size {size} is not a power of two up to {max}")]
    Size { size: u32, max: u16 },
    #[error("{area} at {address:#x} is not aligned to {align}")]
    Alignment { area: &'static str, address: u64, align: u64 },
    #[error("{area} at {address:#x} of {len} bytes is not in guest memory")]
    OutsideMemory { area: &'static str, address: u64, len: u64 },
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        QueueSetup { max_size, size: max_size, desc: 0, driver: 0, device: 0, ready: false }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<(), QueueError> {
        let refused = QueueError::Size { size, max: self.max_size };
        let size = u16::try_from(size).map_err(|_| refused)?;
        if !size.is_power_of_two() || size > self.max_size {
            return Err(refused);
        }
        self.size = size;
        Ok(())
    }

    /// `QueueReady` = 1: checks that the three areas are aligned and in guest memory (virtio 1.2,
    /// 2.7). Guest memory does not shrink, so that this stays true.
    pub(super) fn enable(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let size = u64::from(self.size);
        // With `used_event` and `avail_event` at the rings' ends, negotiated or not.
        let areas = [
            ("descriptor area", self.desc, 16, size.saturating_mul(16)),
            ("driver area", self.driver, 2, size.saturating_mul(2).saturating_add(6)),
            ("device area", self.device, 4, size.saturating_mul(8).saturating_add(6)),
        ];
        for (area, address, align, len) in areas {
            if !address.is_multiple_of(align) {
                return Err(QueueError::Alignment { area, address, align });
            }
            // Address 0 is what an area has that the driver never set.
            let inside = address != 0
                && usize::try_from(len).is_ok_and(|len| {
                    GuestMemoryBackend::check_range(memory, GuestAddress(address), len)
                });
            if !inside {
                return Err(QueueError::OutsideMemory { area, address, len });
            }
        }
        self.ready = true;
        Ok(())
    }

    /// `QueueReady` = 0.
    pub(super) fn disable(&mut self) {
        self.ready = false;
    }

    /// The rings for the device, if the queue is enabled.
    pub(super) fn queue(&self, event_idx: bool) -> Option<Queue> {
        if !self.ready {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }
}

/// Sets the lower half of an address.
pub(super) fn set_low(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff_0000_0000) | u64::from(value);
}

/// Sets the upper half of an address.
pub(super) fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

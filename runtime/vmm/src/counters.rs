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
    packets_to_guest: AtomicU64,
    packets_from_guest: AtomicU64,
    drops_to_guest: AtomicU64,
    drops_from_guest: AtomicU64,
    bytes_released: AtomicU64,
}

impl DeviceCounters {
    /// The guest notified a queue so many times.
    pub fn count_kicks(&self, kicks: u64) {
        self.kicks.fetch_add(kicks, Ordering::Relaxed);
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

    /// The guest received a packet.
    pub fn count_packet_to_guest(&self) {
        self.packets_to_guest.fetch_add(1, Ordering::Relaxed);
    }

    /// The guest transmitted a packet.
    pub fn count_packet_from_guest(&self) {
        self.packets_from_guest.fetch_add(1, Ordering::Relaxed);
    }

    /// A packet for the guest was dropped.
    pub fn count_drop_to_guest(&self) {
        self.drops_to_guest.fetch_add(1, Ordering::Relaxed);
    }

    /// A packet of the guest was dropped.
    pub fn count_drop_from_guest(&self) {
        self.drops_from_guest.fetch_add(1, Ordering::Relaxed);
    }

    /// The guest gave so many bytes of its memory back.
    pub fn count_released(&self, bytes: u64) {
        self.bytes_released.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The counts now.
    #[must_use]
    pub fn snapshot(&self) -> DeviceCounts {
        DeviceCounts {
            kicks: self.kicks.load(Ordering::Relaxed),
            interrupts: self.interrupts.load(Ordering::Relaxed),
            bytes_to_guest: self.bytes_to_guest.load(Ordering::Relaxed),
            bytes_from_guest: self.bytes_from_guest.load(Ordering::Relaxed),
            packets_to_guest: self.packets_to_guest.load(Ordering::Relaxed),
            packets_from_guest: self.packets_from_guest.load(Ordering::Relaxed),
            drops_to_guest: self.drops_to_guest.load(Ordering::Relaxed),
            drops_from_guest: self.drops_from_guest.load(Ordering::Relaxed),
            bytes_released: self.bytes_released.load(Ordering::Relaxed),
        }
    }
}

/// The reasons for which a vCPU leaves the guest and reaches the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Interrupted,
    Other,
}

impl ExitKind {
    const ALL: [(ExitKind, &'static str); 6] = [
        (ExitKind::IoIn, "io_in"),
        (ExitKind::IoOut, "io_out"),
        (ExitKind::MmioRead, "mmio_read"),
        (ExitKind::MmioWrite, "mmio_write"),
        (ExitKind::Interrupted, "interrupted"),
        (ExitKind::Other, "other"),
    ];
}

/// Exits of all vCPUs, by kind.
#[derive(Debug, Default)]
pub struct ExitCounters {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
    /// I/O and MMIO exits when the agent was ready; 0 before.
    at_agent_ready: AtomicU64,
}

impl ExitCounters {
    /// Counts one exit.
    pub fn count(&self, kind: ExitKind) {
        self.of(kind).fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps the sum of I/O and MMIO exits as of now, the first time it is called.
    pub fn mark_agent_ready(&self) {
        let sum = [ExitKind::IoIn, ExitKind::IoOut, ExitKind::MmioRead, ExitKind::MmioWrite]
            .iter()
            .fold(0_u64, |sum, kind| sum.saturating_add(self.of(*kind).load(Ordering::Relaxed)));
        // Fails when it was marked before; the first mark stays.
        self.at_agent_ready.compare_exchange(0, sum, Ordering::Relaxed, Ordering::Relaxed).ok();
    }

    /// I/O and MMIO exits up to agent-ready, once that was reached.
    #[must_use]
    pub fn at_agent_ready(&self) -> Option<u64> {
        Some(self.at_agent_ready.load(Ordering::Relaxed)).filter(|n| *n > 0)
    }

    /// All counts by name.
    #[must_use]
    pub fn snapshot(&self) -> std::collections::BTreeMap<String, u64> {
        ExitKind::ALL
            .iter()
            .map(|(kind, name)| ((*name).to_owned(), self.of(*kind).load(Ordering::Relaxed)))
            .collect()
    }

    fn of(&self, kind: ExitKind) -> &AtomicU64 {
        match kind {
            ExitKind::IoIn => &self.io_in,
            ExitKind::IoOut => &self.io_out,
            ExitKind::MmioRead => &self.mmio_read,
            ExitKind::MmioWrite => &self.mmio_write,
            ExitKind::Interrupted => &self.interrupted,
            ExitKind::Other => &self.other,
        }
    }
}

//! A driver for tests: lays out rings in guest memory and plays the guest's side of a queue.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chain::Virtqueue;
use super::mmio::window::Window;
use super::{Activation, ActiveQueue, F_EVENT_IDX, Interrupt};
use crate::GuestMemory;
use crate::counters::DeviceCounters;

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

/// Size of the memory that [`memory`] makes, in bytes.
pub(crate) const MEMORY_LEN: u64 = 4 << 20;

/// Where [`Driver::alloc`] starts; the rings of up to 15 queues of 256 entries lie below.
const HEAP: u64 = 0x20_0000;

/// Guest memory for a test: [`MEMORY_LEN`] bytes at 0, in two adjacent regions, so that buffers can
/// span them.
pub(crate) fn memory() -> GuestMemory {
    let half = MEMORY_LEN as usize / 2 + 0x8000;
    GuestMemory::from_ranges(&[
        (GuestAddress(0), half),
        (GuestAddress(half as u64), MEMORY_LEN as usize - half),
    ])
    .unwrap()
}

/// An interrupt line that a test can look at.
pub(crate) fn interrupt_line() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

/// An interrupt whose line nobody reads.
pub(crate) fn interrupt() -> Interrupt {
    Interrupt::new(Window::alone().unwrap(), interrupt_line(), Arc::new(DeviceCounters::default()))
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Buffer {
    /// The device reads it.
    Out(u64, u32),
    /// The device writes it.
    In(u64, u32),
}

/// The driver's side of one queue.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) kick: EventFd,
    next_avail: u16,
    next_used: u16,
    next_desc: u16,
    heap: u64,
}

impl Driver {
    /// Rings for queue number `index` (0 to 14) with `size` (up to 256) entries.
    pub(crate) fn new(memory: &GuestMemory, index: u64, size: u16) -> Self {
        let base = 0x1_0000 * (index + 1);
        Driver {
            memory: memory.clone(),
            size,
            desc: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            next_avail: 0,
            next_used: 0,
            next_desc: 0,
            heap: HEAP + 0x2_0000 * index,
        }
    }

    /// The device's side, as the transport would make it.
    pub(crate) fn queue(&self, features: u64) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// The device's side, as a device's handler gets it.
    pub(crate) fn virtqueue(&self, interrupt: &Interrupt, features: u64) -> Virtqueue {
        Virtqueue::new(self.memory.clone(), self.queue(features), interrupt.clone(), features)
    }

    /// The device's side, as [`Activation`] has it.
    pub(crate) fn active_queue(&self, features: u64) -> ActiveQueue {
        ActiveQueue { queue: self.queue(features), kick: self.kick.try_clone().unwrap() }
    }

    /// `len` bytes of guest memory for a buffer, 16-byte aligned and never reused.
    pub(crate) fn alloc(&mut self, len: u32) -> u64 {
        let address = self.heap;
        self.heap += u64::from(len).next_multiple_of(16);
        assert!(self.heap <= MEMORY_LEN);
        address
    }

    /// Guest memory that holds `bytes`.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> u64 {
        let address = self.alloc(bytes.len() as u32);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        address
    }

    /// Writes a descriptor as it is, right or wrong.
    pub(crate) fn write_desc(&self, table: u64, index: u16, desc: (u64, u32, u16, u16)) {
        let at = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_obj(desc.0.to_le(), at).unwrap();
        self.memory.write_obj(desc.1.to_le(), GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(desc.2.to_le(), GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(desc.3.to_le(), GuestAddress(at.0 + 14)).unwrap();
    }

    fn write_chain(&self, table: u64, first: u16, wrap: u16, buffers: &[Buffer]) {
        for (i, buffer) in buffers.iter().enumerate() {
            let (address, len, mut flags) = match *buffer {
                Buffer::Out(address, len) => (address, len, 0),
                Buffer::In(address, len) => (address, len, F_WRITE),
            };
            if i + 1 < buffers.len() {
                flags |= F_NEXT;
            }
            let index = (first + i as u16) % wrap;
            self.write_desc(table, index, (address, len, flags, (index + 1) % wrap));
        }
    }

    /// Makes a chain of `buffers` available and returns its head. Descriptors are taken round robin:
    /// at most `size` may be out at once.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        self.write_chain(self.desc, head, self.size, buffers);
        self.next_desc = (head + buffers.len() as u16) % self.size;
        self.make_available(head);
        head
    }

    /// As [`Driver::add`], by an indirect table.
    pub(crate) fn add_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let len = 16 * buffers.len() as u32;
        let table = self.alloc(len);
        self.write_chain(table, 0, u16::MAX, buffers);
        let head = self.next_desc;
        self.write_desc(self.desc, head, (table, len, F_INDIRECT, 0));
        self.next_desc = (head + 1) % self.size;
        self.make_available(head);
        head
    }

    /// Puts `head` into the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.set_avail_idx(self.next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index as it is, right or wrong.
    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.next_avail = index;
        self.memory
            .store(index.to_le(), GuestAddress(self.avail + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    /// The available ring's flags.
    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags.to_le(), GuestAddress(self.avail)).unwrap();
    }

    /// `used_event`: interrupt me when the used index passes this.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index.to_le(), GuestAddress(at)).unwrap();
    }

    /// `avail_event`, where the device says when to kick it.
    pub(crate) fn avail_event(&self) -> u16 {
        let at = self.used + 4 + 8 * u64::from(self.size);
        u16::from_le(self.memory.read_obj(GuestAddress(at)).unwrap())
    }

    /// The used ring's flags.
    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(self.used)).unwrap())
    }

    /// How many chains the device has completed so far, modulo 2^16.
    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le(
            self.memory
                .load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::SeqCst)
                .unwrap(),
        )
    }

    /// The next completed chain: its head and the length that the device reports.
    pub(crate) fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.next_used {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u32::from_le(head) as u16, u32::from_le(len)))
    }

    /// Kicks the device and waits until it completes a chain.
    pub(crate) fn kick_and_wait(&mut self) -> (u16, u32) {
        self.kick.write(1).unwrap();
        self.wait_used()
    }

    /// Waits until the device completes a chain.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let mut used = None;
        wait_until(|| {
            used = self.pop_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// Bytes of guest memory.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// An activation with the queues of `drivers`.
pub(crate) fn activation(drivers: &[&Driver], interrupt: &Interrupt, features: u64) -> Activation {
    Activation {
        memory: drivers[0].memory.clone(),
        queues: drivers.iter().map(|driver| driver.active_queue(features)).collect(),
        interrupt: interrupt.clone(),
        features,
        reporter: crate::machine::report::channel().unwrap().0,
    }
}

/// Waits until `done`; panics after a time that no loaded machine needs.
pub(crate) fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing happened in 60 s");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether an eventfd is signalled, without reading it.
pub(crate) fn is_signalled(event: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one valid pollfd for the whole call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

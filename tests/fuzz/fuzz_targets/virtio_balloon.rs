//! Balloon requests in hostile rings: memory goes back within the guest's, each chain is given back
//! once, and what is not guest memory is a fault.
//!
//! The input becomes guest memory from address 0 on: descriptor table, available ring, used ring at
//! the fixed places below, and everything else.
#![no_main]

use std::sync::Arc;

use husk_vmm::GuestMemory;
use husk_vmm::counters::DeviceCounters;
use husk_vmm::devices::virtio::balloon::Releaser;
use husk_vmm::devices::virtio::chain::Virtqueue;
use husk_vmm::devices::virtio::mmio::window::Window;
use husk_vmm::devices::virtio::{Interrupt, RING_FEATURES};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MEMORY_LEN: usize = 0x1_0000;
const QUEUE_SIZE: u16 = 16;
const DESC: u64 = 0;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x200;

fn queue() -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(DESC)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    queue
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let fitting = &bytes[..bytes.len().min(MEMORY_LEN)];
    memory.write_slice(fitting, GuestAddress(0)).unwrap();

    let interrupt = Interrupt::new(
        Window::alone().unwrap(),
        Arc::new(EventFd::new(0).unwrap()),
        Arc::new(DeviceCounters::default()),
    );
    let features = if choice & 1 != 0 { RING_FEATURES } else { 0 };
    let mut releaser = Releaser::new(memory.clone(), interrupt.clone());
    let mut queue = Virtqueue::new(memory, queue(), interrupt, features);

    // Reports may be of the rings themselves, which are then zeros: an end of our own.
    for _ in 0..64 {
        let Ok(Some(chain)) = queue.pop_or_arm() else { break };
        let answer =
            if choice & 2 != 0 { releaser.report(chain) } else { releaser.inflate(chain) };
        if answer.is_err() {
            break;
        }
    }
});

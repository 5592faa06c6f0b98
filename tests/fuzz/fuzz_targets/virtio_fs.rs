//! The two things of a file-system device that our own code reads: the header of a file server's
//! reply, and requests in hostile rings that nobody serves any more.
//!
//! The input begins with a header; the rest becomes guest memory from address 0 on: descriptor table,
//! available ring, used ring at the fixed places below, and everything else.
#![no_main]

use std::sync::Arc;

use husk_vmm::GuestMemory;
use husk_vmm::counters::DeviceCounters;
use husk_vmm::devices::virtio::fs::orphan::Orphan;
use husk_vmm::devices::virtio::fs::protocol::{HEADER_LEN, Request};
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
    let Some((header, bytes)) = data.split_first_chunk::<HEADER_LEN>() else { return };
    let is_reply = Request::GetVringBase(0).check_reply(*header).is_ok();
    assert!(!is_reply || header[8..] == 8_u32.to_ne_bytes());

    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(&bytes[..bytes.len().min(MEMORY_LEN)], GuestAddress(0)).unwrap();
    let interrupt = Interrupt::new(
        Window::alone().unwrap(),
        Arc::new(EventFd::new(0).unwrap()),
        Arc::new(DeviceCounters::default()),
    );
    let features = if header[0] & 1 != 0 { RING_FEATURES } else { 0 };
    let Ok(mut orphan) = Orphan::adopt(memory, queue(), interrupt, features) else { return };
    // Answers may be written into the rings, which makes new requests: an end of our own.
    for _ in 0..4 {
        if orphan.serve().is_err() {
            break;
        }
    }
});

//! Block requests in hostile rings: parsed within limits, executed within the disk, each chain given
//! back once.
//!
//! The input becomes guest memory from address 0 on: descriptor table, available ring, used ring at
//! the fixed places below, and everything else.
#![no_main]

use std::fs::File;
use std::sync::Arc;

use husk_vmm::GuestMemory;
use husk_vmm::counters::DeviceCounters;
use husk_vmm::devices::virtio::blk::Disk;
use husk_vmm::devices::virtio::blk::request::{Operation, Request, SECTOR_LEN};
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
const DISK_LEN: u64 = 64 * 1024;

fn queue() -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(DESC)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    queue
}

fn disk_file() -> File {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(DISK_LEN).unwrap();
    file
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let fitting = &bytes[..bytes.len().min(MEMORY_LEN)];
    memory.write_slice(fitting, GuestAddress(0)).unwrap();

    let file = disk_file();
    let disk = Disk::new("fuzz", file.try_clone().unwrap(), choice & 1 != 0).unwrap();
    let interrupt = Interrupt::new(
        Window::alone().unwrap(),
        Arc::new(EventFd::new(0).unwrap()),
        Arc::new(DeviceCounters::default()),
    );
    let features = if choice & 2 != 0 { RING_FEATURES } else { 0 };
    let mut queue = Virtqueue::new(memory, queue(), interrupt, features);

    // The disk's reads may write into the rings, which makes new chains: an end of our own.
    for _ in 0..64 {
        let Ok(Some(chain)) = queue.pop_or_arm() else { break };
        let Ok(request) = Request::parse(&chain) else { break };
        assert!(request.status_offset < chain.writable().len());
        if let Ok(Operation::Read { len, .. } | Operation::Write { len, .. }) = &request.operation {
            assert!(len.is_multiple_of(SECTOR_LEN));
        }
        let written = match &request.operation {
            Ok(operation) => disk.execute(operation, &chain).unwrap_or(0),
            Err(_) => 0,
        };
        assert!(written <= request.status_offset);
        chain.writable().write_at(request.status_offset, &[0]).unwrap();
        chain.complete(written).unwrap();
    }
    assert_eq!(file.metadata().unwrap().len(), DISK_LEN);
});

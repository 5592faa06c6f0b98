//! A queue pair in hostile rings: frames out of any chains, frames into any buffers, within the
//! lengths that the driver gave, and control commands.
//!
//! The first byte chooses the features; the rest becomes guest memory from address 0 on: three queues
//! (receive, transmit, control) at the fixed places below, and everything else.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use husk_vmm::GuestMemory;
use husk_vmm::counters::DeviceCounters;
use husk_vmm::devices::virtio::chain::Virtqueue;
use husk_vmm::devices::virtio::mmio::window::Window;
use husk_vmm::devices::virtio::net::{Command, HEADER_LEN, MAX_FRAME_LEN, Pair, Received};
use husk_vmm::devices::virtio::{Interrupt, RING_FEATURES};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MEMORY_LEN: usize = 0x1_0000;
const QUEUE_SIZE: u16 = 16;
const QUEUES: [u64; 3] = [0, 0x400, 0x800];
/// Lengths of the frames that the host sends, again and again.
const HOST_FRAMES: [usize; 4] = [60, 1514, 9014, 60_000];

fn queue(base: u64, features: u64, memory: &GuestMemory, interrupt: &Interrupt) -> Virtqueue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(base + 0x100)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(base + 0x200)).unwrap();
    queue.set_event_idx(features & husk_vmm::devices::virtio::F_EVENT_IDX != 0);
    queue.set_ready(true);
    Virtqueue::new(memory.clone(), queue, interrupt.clone(), features)
}

/// Sockets that keep frames apart stand for the tap.
fn host() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let fitting = &bytes[..bytes.len().min(MEMORY_LEN)];
    memory.write_slice(fitting, GuestAddress(0)).unwrap();
    let counters = Arc::new(DeviceCounters::default());
    let interrupt = Interrupt::new(
        Window::alone().unwrap(),
        Arc::new(EventFd::new(0).unwrap()),
        counters.clone(),
    );
    let features = if choice & 1 != 0 { RING_FEATURES } else { 0 };
    let [rx, tx, mut control] = QUEUES.map(|base| queue(base, features, &memory, &interrupt));
    let mut pair = Pair::new(rx, tx, choice & 2 != 0, counters.clone());
    let (near, far) = host();

    let now = Instant::now();
    // Receiving may write into the rings, which makes new chains: an end of our own.
    for round in 0..8 {
        if pair.transmit(near.as_fd(), now).is_err() {
            break;
        }
        let mut frame = vec![0; 2 * MAX_FRAME_LEN as usize];
        while let Ok((len, _)) = recv(&far, frame.as_mut_slice(), RecvFlags::empty()) {
            assert!((HEADER_LEN as usize..=MAX_FRAME_LEN as usize).contains(&len));
        }
        let len = HOST_FRAMES[round % HOST_FRAMES.len()];
        // Refused where the guest has left many of them.
        let _ = send(&far, &vec![0xa5; len], SendFlags::empty());
        match pair.receive(near.as_fd(), now) {
            Ok(received) => assert!(!matches!(received, Received::Gone(_))),
            Err(_) => break,
        }
    }
    for _ in 0..8 {
        let Ok(Some(chain)) = control.pop_or_arm() else { break };
        let Ok(Command::SetPairs(_) | Command::Unknown) = Command::parse(&chain) else { break };
        chain.writable().write_at(0, &[0]).unwrap();
        chain.complete(1).unwrap();
    }
    let counts = counters.snapshot();
    assert!(counts.packets_to_guest <= 8);
});

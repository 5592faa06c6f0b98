//! The guest's driver of virtio-fs: one request at a time.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use husk_vmm::GuestMemory;
use husk_vmm::counters::DeviceCounters;
use husk_vmm::devices::virtio::fs::Fs;
use husk_vmm::devices::virtio::mmio::window::Window;
use husk_vmm::devices::virtio::{
    Activation, ActiveQueue, F_VERSION_1, Interrupt, RING_FEATURES, VirtioDevice,
};
use husk_vmm::machine::report::{self, Reports, VmEvent};
use husk_vmm::memory::{self, Sharing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Nothing takes longer than this, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(120);

const QUEUE_SIZE: u16 = 16;
/// Where the rings of the queue for requests are; those of the other are below.
const RINGS: u64 = 0x2_0000;
const AVAILABLE: u64 = RINGS + 0x1000;
const USED: u64 = RINGS + 0x2000;
/// Where requests and replies are.
const OUT: u64 = 0x10_0000;
const IN: u64 = 0x40_0000;

const INIT: u32 = 26;
const IN_HEADER_LEN: u32 = 40;
const OUT_HEADER_LEN: u32 = 16;

/// What comes of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    Reply(Reply),
    /// Given back without one.
    Silence,
    /// The server is gone.
    Lost,
}

#[derive(Debug)]
pub(crate) struct Reply {
    /// 0, or a negative error number.
    pub(crate) error: i32,
    pub(crate) body: Vec<u8>,
}

/// A name as requests have it.
pub(crate) fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

pub(crate) struct Guest {
    _fs: Fs,
    memory: GuestMemory,
    kick: EventFd,
    reports: Reports,
    requests: u16,
    is_lost: bool,
}

fn queue(rings: u64) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(rings)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(rings + 0x1000)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(rings + 0x2000)).unwrap();
    queue.set_ready(true);
    queue
}

impl Guest {
    pub(crate) fn new(socket: OwnedFd) -> Guest {
        let memory = memory::map(48, Sharing::Shared).unwrap();
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let counters = Arc::new(DeviceCounters::default());
        let interrupt = Interrupt::new(Window::alone().unwrap(), line, counters);
        let (reporter, reports) = report::channel().unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let high = EventFd::new(EFD_NONBLOCK).unwrap();
        let queues = vec![
            ActiveQueue { queue: queue(0x1_0000), kick: high },
            ActiveQueue { queue: queue(RINGS), kick: kick.try_clone().unwrap() },
        ];
        let mut fs = Fs::new("husk", socket);
        // Without EVENT_IDX: every kick counts.
        let features = F_VERSION_1 | RING_FEATURES & (1 << 28);
        let memory_of_device = memory.clone();
        let activation =
            Activation { memory: memory_of_device, queues, interrupt, features, reporter };
        fs.activate(activation).unwrap();
        Guest { _fs: fs, memory, kick, reports, requests: 0, is_lost: false }
    }

    /// The first request of every session.
    pub(crate) fn hello(&mut self) {
        // That it knows of mounts below others, as Linux does.
        const SUBMOUNTS: u32 = 1 << 27;
        let body: Vec<u8> =
            [7_u32, 31, 0, SUBMOUNTS].iter().flat_map(|n| n.to_le_bytes()).collect();
        let reply = self.ask(INIT, 0, &body).unwrap();
        assert_eq!(reply[..4], 7_u32.to_le_bytes());
    }

    /// A request of root that the server has to answer.
    pub(crate) fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        match self.send(opcode, node, body, 64 * 1024, None) {
            Outcome::Reply(Reply { error: 0, body }) => Ok(body),
            Outcome::Reply(Reply { error, .. }) => Err(error),
            other => panic!("request {opcode}: {other:?}"),
        }
    }

    /// Any request, with so much room for its reply. `claimed` is the length that it says it has, if not
    /// the true one.
    pub(crate) fn send(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: u32,
        claimed: Option<u32>,
    ) -> Outcome {
        let len = IN_HEADER_LEN + u32::try_from(body.len()).unwrap();
        let unique = u64::from(self.requests) + 1;
        let header = [
            [claimed.unwrap_or(len), opcode].map(u32::to_le_bytes).concat(),
            [unique, node].map(u64::to_le_bytes).concat(),
            vec![0; 16],
        ];
        self.memory.write_slice(&header.concat(), GuestAddress(OUT)).unwrap();
        self.memory.write_slice(body, GuestAddress(OUT + u64::from(IN_HEADER_LEN))).unwrap();
        self.memory.write_slice(&[0; 16], GuestAddress(IN)).unwrap();
        self.publish(len, room);
        let written = self.wait();
        let lost = |event: &VmEvent| matches!(event, VmEvent::FileServerLost { .. });
        self.is_lost |= self.reports.drain().iter().any(lost);
        if self.is_lost {
            return Outcome::Lost;
        }
        if written < OUT_HEADER_LEN {
            return Outcome::Silence;
        }
        let mut bytes = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(IN)).unwrap();
        assert_eq!(bytes[8..16], unique.to_le_bytes(), "the reply is another request's");
        let error = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
        Outcome::Reply(Reply { error, body: bytes.split_off(16) })
    }

    /// Makes the request available, and kicks.
    fn publish(&mut self, len: u32, room: u32) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let flags = if room > 0 { NEXT } else { 0 };
        self.describe(0, OUT, len, flags, 1);
        self.describe(1, IN, room, WRITE, 0);
        // Every chain begins with the same descriptor.
        let slot = AVAILABLE + 4 + 2 * u64::from(self.requests % QUEUE_SIZE);
        self.memory.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.requests += 1;
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.store(self.requests.to_le(), index, Ordering::SeqCst).unwrap();
        self.kick.write(1).unwrap();
    }

    fn describe(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = RINGS + 16 * index;
        self.memory.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags.to_le(), GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next.to_le(), GuestAddress(at + 14)).unwrap();
    }

    /// Waits until the request is given back; how much of the reply's room is written.
    fn wait(&self) -> u32 {
        let start = Instant::now();
        let used = || -> u16 {
            u16::from_le(self.memory.load(GuestAddress(USED + 2), Ordering::SeqCst).unwrap())
        };
        while used() != self.requests {
            assert!(start.elapsed() < PATIENCE, "request {} is not given back", self.requests);
            std::thread::sleep(Duration::from_micros(50));
        }
        let slot = USED + 4 + 8 * u64::from((self.requests - 1) % QUEUE_SIZE);
        u32::from_le(self.memory.read_obj(GuestAddress(slot + 4)).unwrap())
    }
}

/// Random numbers, the same in every run (xorshift64).
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// What follows a request's header: small and large numbers, and names.
    pub(crate) fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        for _ in 0..self.below(8) {
            match self.below(5) {
                0 => body.extend(self.next().to_le_bytes()),
                1 => body.extend(self.below(8).to_le_bytes()),
                2 => body.extend(u64::MAX.to_le_bytes()),
                3 => {
                    body.extend(name(["file", "sub", "..", "0", "user.x"][self.below(5) as usize]))
                }
                _ => body.extend([0; 8]),
            }
        }
        body
    }
}

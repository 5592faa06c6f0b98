use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use husk_vmm_api::TokenBucketConfig;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::super::status::DEVICE_NEEDS_RESET;
use super::super::testing::{Buffer, Driver, activation, interrupt, memory, wait_until};
use super::super::{F_VERSION_1, Interrupt};
use super::*;

const HEADER: usize = HEADER_LEN as usize;
const OK: u8 = 0;
const ERR: u8 = 1;

/// What the tests see of a queue of the tap.
#[derive(Debug, Default)]
struct Seen {
    offloads: Mutex<Vec<u32>>,
    detached: AtomicBool,
}

/// A queue of a tap that is a socket.
#[derive(Debug)]
struct FakeTap {
    near: OwnedFd,
    seen: Arc<Seen>,
    /// As a tap of a kernel before 6.2.
    old: bool,
}

impl AsFd for FakeTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }
}

impl Backend for FakeTap {
    fn negotiate(&self, offloads: u32) -> io::Result<()> {
        if self.old && offloads & libc::TUN_F_USO4 != 0 {
            return Err(Errno::INVAL.into());
        }
        self.seen.offloads.lock().unwrap().push(offloads);
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.seen.detached.store(!attached, Ordering::SeqCst);
        Ok(())
    }
}

struct Far {
    socket: OwnedFd,
    seen: Arc<Seen>,
}

impl Far {
    fn send(&self, len: usize) {
        send(&self.socket, &vec![0; len], SendFlags::empty()).unwrap();
    }

    fn wait_frame(&self) -> usize {
        let mut bytes = vec![0; 2 * MAX_FRAME_LEN as usize];
        let mut len = 0;
        wait_until(|| match recv(&self.socket, bytes.as_mut_slice(), RecvFlags::empty()) {
            Ok((got, _)) => {
                len = got;
                true
            }
            Err(Errno::AGAIN) => false,
            Err(errno) => panic!("{errno}"),
        });
        len
    }
}

fn config() -> NicConfig {
    NicConfig {
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 9000,
        taps: Vec::new(),
        rx_limit: RateLimit::default(),
        tx_limit: RateLimit::default(),
    }
}

fn nic_of(config: &NicConfig, pairs: usize, old: bool) -> (Net, Vec<Far>) {
    let mut far = Vec::new();
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    for _ in 0..pairs {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (near, socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let seen = Arc::new(Seen::default());
        far.push(Far { socket, seen: seen.clone() });
        backends.push(Box::new(FakeTap { near, seen, old }));
    }
    (Net::with_backends(3, config, backends).unwrap(), far)
}

struct Rig {
    net: Net,
    far: Vec<Far>,
    queues: Vec<Driver>,
    interrupt: Interrupt,
}

fn rig_of(config: &NicConfig, pairs: usize) -> Rig {
    let (net, far) = nic_of(config, pairs, false);
    let features = net.features() | F_VERSION_1;
    active(net, far, features)
}

fn rig(pairs: usize) -> Rig {
    rig_of(&config(), pairs)
}

fn active(mut net: Net, far: Vec<Far>, features: u64) -> Rig {
    let (memory, interrupt) = (memory(), interrupt());
    let count = net.queues_in_use(features);
    let queues: Vec<Driver> =
        (0..count as u64).map(|index| Driver::new(&memory, index, 64)).collect();
    let all: Vec<&Driver> = queues.iter().collect();
    net.activate(activation(&all, &interrupt, features)).unwrap();
    Rig { net, far, queues, interrupt }
}

impl Rig {
    fn add_rx(&mut self, pair: usize) {
        let queue = &mut self.queues[2 * pair];
        let at = queue.alloc(2000);
        queue.add(&[Buffer::In(at, 2000)]);
    }

    fn add_tx(&mut self, pair: usize, len: usize) {
        let queue = &mut self.queues[2 * pair + 1];
        let at = queue.place(&vec![0; len]);
        queue.add(&[Buffer::Out(at, len as u32)]);
    }

    fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Sends a control command; returns the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let control = self.queues.last_mut().unwrap();
        let (at, ack) = (control.place(bytes), control.place(&[0xff]));
        let out = Buffer::Out(at, bytes.len() as u32);
        control.add(&[out, Buffer::In(ack, 1)]);
        assert_eq!(control.kick_and_wait().1, 1);
        control.bytes(ack, 1)[0]
    }
}

#[test]
fn the_configuration_space_is_laid_out_as_specified() {
    let (net, _far) = nic_of(&config(), 4, false);
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 9, 1, 0, 4, 0, 0x28, 0x23]);
    assert_eq!(net.name(), "net:3");
    assert_eq!(net.queue_max_sizes(), [256; 9]);
}

#[test]
fn features_follow_the_tap_and_the_number_of_pairs() {
    let (one, _far) = nic_of(&config(), 1, false);
    assert_eq!(one.features(), BASE_FEATURES | USO_FEATURES);
    assert_eq!(one.queue_max_sizes().len(), 2);
    let (old, far) = nic_of(&config(), 1, true);
    assert_eq!(old.features(), BASE_FEATURES);
    assert_eq!(*far[0].seen.offloads.lock().unwrap(), [0]);
    let (many, _far) = nic_of(&config(), 2, true);
    assert_eq!(many.features(), BASE_FEATURES | feature::CTRL_VQ | feature::MQ);
    assert_eq!(many.queues_in_use(feature::CTRL_VQ | feature::MQ), 5);
    assert_eq!(many.queues_in_use(feature::CTRL_VQ), 3);
    assert_eq!(many.queues_in_use(0), 2);
    assert!(matches!(Net::with_backends(0, &config(), Vec::new()), Err(TapError::None)));
}

#[test]
fn the_tap_gets_the_offloads_that_the_guest_can_take() {
    use feature::{CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6};
    for (features, offloads) in [
        (0, 0),
        (CSUM, 0),
        (GUEST_TSO4 | GUEST_USO4 | GUEST_USO6, 0),
        (GUEST_CSUM, 1),
        (GUEST_CSUM | GUEST_TSO4, 3),
        (GUEST_CSUM | GUEST_TSO6 | GUEST_ECN, 1 | 4 | 8),
        (GUEST_CSUM | GUEST_USO4, 1),
        (GUEST_CSUM | GUEST_USO4 | GUEST_USO6, 1 | 0x20 | 0x40),
    ] {
        assert_eq!(offloads_of(features), offloads, "{features:#x}");
        let (net, far) = nic_of(&config(), 1, false);
        let rig = active(net, far, features);
        assert_eq!(rig.far[0].seen.offloads.lock().unwrap().last(), Some(&offloads));
    }
}

#[test]
fn frames_go_both_ways() {
    let mut rig = rig(1);
    rig.add_tx(0, 100);
    rig.kick(1);
    assert_eq!(rig.far[0].wait_frame(), 100);
    assert_eq!(rig.queues[1].wait_used().1, 0);
    rig.add_rx(0);
    rig.kick(0);
    rig.far[0].send(700);
    assert_eq!(rig.queues[0].wait_used().1, 700);
}

#[test]
fn a_starved_guest_receives_again_when_it_adds_buffers() {
    let mut rig = rig(1);
    for _ in 0..3 {
        rig.far[0].send(64);
    }
    // However often it looks, there is no buffer.
    rig.kick(0);
    rig.add_tx(0, 100);
    rig.kick(1);
    rig.far[0].wait_frame();
    assert_eq!(rig.queues[0].used_idx(), 0);
    for _ in 0..3 {
        rig.add_rx(0);
        rig.kick(0);
        assert_eq!(rig.queues[0].wait_used().1, 64);
    }
}

#[test]
fn a_blocked_guest_transmits_again_when_the_host_takes_frames() {
    let mut rig = rig(1);
    for _ in 0..16 {
        rig.add_tx(0, 8000);
    }
    let queue = &mut rig.queues[1];
    let at = queue.place(&vec![0; 60_000]);
    for _ in 0..16 {
        queue.add(&[Buffer::Out(at, 60_000)]);
    }
    rig.kick(1);
    let lens: Vec<usize> = (0..32).map(|_| rig.far[0].wait_frame()).collect();
    assert_eq!(lens, [[8000; 16], [60_000; 16]].concat());
    wait_until(|| rig.queues[1].used_idx() == 32);
    assert_eq!(rig.interrupt.counters().snapshot().drops_from_guest, 0);
}

#[test]
fn a_limited_guest_goes_on_by_the_timer() {
    let limit = RateLimit {
        bytes: None,
        operations: Some(TokenBucketConfig { burst: 1, refill_per_second: 200 }),
    };
    let config = NicConfig { rx_limit: limit.clone(), tx_limit: limit, ..config() };
    let mut rig = rig_of(&config, 1);
    for _ in 0..10 {
        rig.add_tx(0, 60);
        rig.add_rx(0);
        rig.far[0].send(61);
    }
    rig.kick(1);
    for _ in 0..10 {
        assert_eq!(rig.far[0].wait_frame(), 60);
        assert_eq!(rig.queues[0].wait_used().1, 61);
    }
}

#[test]
fn only_pairs_in_use_receive() {
    let mut rig = rig(3);
    for pair in 0..3 {
        rig.add_rx(pair);
        rig.add_rx(pair);
        rig.kick(2 * pair);
        rig.far[pair].send(100 + pair);
    }
    assert_eq!(rig.queues[0].wait_used().1, 100);
    assert_eq!((rig.queues[2].used_idx(), rig.queues[4].used_idx()), (0, 0));

    assert_eq!(rig.command(&[4, 0, 2, 0]), OK);
    assert_eq!(rig.queues[2].wait_used().1, 101);
    let detached = |rig: &Rig| -> Vec<bool> {
        rig.far.iter().map(|far| far.seen.detached.load(Ordering::SeqCst)).collect()
    };
    assert_eq!(detached(&rig), [false, false, true]);

    assert_eq!(rig.command(&[4, 0, 3, 0]), OK);
    assert_eq!(rig.queues[4].wait_used().1, 102);
    assert_eq!(rig.command(&[4, 0, 1, 0]), OK);
    assert_eq!(detached(&rig), [false, true, true]);
    rig.far[1].send(200);
    rig.far[0].send(201);
    assert_eq!(rig.queues[0].wait_used().1, 201);
    assert_eq!(rig.queues[2].used_idx(), 1);
}

#[test]
fn all_pairs_transmit() {
    let mut rig = rig(4);
    assert_eq!(rig.command(&[4, 0, 4, 0]), OK);
    for pair in 0..4 {
        rig.add_tx(pair, 60 + pair);
        rig.kick(2 * pair + 1);
    }
    for pair in 0..4 {
        assert_eq!(rig.far[pair].wait_frame(), 60 + pair);
    }
}

#[test]
fn commands_that_lie_are_refused() {
    let mut rig = rig(2);
    let commands: [&[u8]; 9] = [
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4],
        &[7; 4000],
    ];
    for command in commands {
        assert_eq!(rig.command(command), ERR, "{command:?}");
    }
    assert_eq!(rig.command(&[4, 0, 2, 0]), OK);
}

#[test]
fn a_flood_of_commands_is_answered_slowly() {
    let mut rig = rig(2);
    let start = Instant::now();
    for count in (1..=2).cycle().take(12) {
        assert_eq!(rig.command(&[4, 0, count, 0]), OK);
    }
    // Eight at once, then eight a second.
    assert!(start.elapsed().as_millis() >= 400, "{:?}", start.elapsed());
}

#[test]
fn a_command_without_room_for_an_answer_needs_a_reset() {
    let mut rig = rig(2);
    let control = rig.queues.last_mut().unwrap();
    let at = control.place(&[4, 0, 1, 0]);
    control.add(&[Buffer::Out(at, 4)]);
    control.kick.write(1).unwrap();
    wait_until(|| rig.interrupt.status() == DEVICE_NEEDS_RESET);
    rig.net.reset();
    // And works again afterwards, with a driver that knows nothing of several pairs.
    let (net, far) = (rig.net, rig.far);
    let mut rig = active(net, far, BASE_FEATURES);
    assert_eq!(rig.queues.len(), 2);
    assert!(rig.far[1].seen.detached.load(Ordering::SeqCst));
    rig.add_tx(0, 60);
    rig.kick(1);
    assert_eq!(rig.far[0].wait_frame(), 60);
}

#[test]
fn a_host_that_goes_away_ends_nothing() {
    let mut rig = rig(1);
    let (other, _) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    rig.add_rx(0);
    rig.kick(0);
    rig.far[0].socket = other;
    for _ in 0..3 {
        rig.add_tx(0, 100);
        rig.kick(1);
        rig.queues[1].wait_used();
    }
    assert_eq!(rig.interrupt.status(), 0);
    assert_eq!(rig.interrupt.counters().snapshot().drops_from_guest, 3);
    rig.net.reset();
}

#[test]
fn a_malformed_chain_needs_a_reset_and_leaves_the_other_pairs() {
    let mut rig = rig(2);
    assert_eq!(rig.command(&[4, 0, 2, 0]), OK);
    let queue = &mut rig.queues[3];
    let at = queue.place(&[0; 64]);
    queue.add(&[Buffer::Out(at, 64), Buffer::In(at, 64)]);
    queue.kick.write(1).unwrap();
    wait_until(|| rig.interrupt.status() == DEVICE_NEEDS_RESET);
    rig.add_tx(0, HEADER + 60);
    rig.kick(1);
    assert_eq!(rig.far[0].wait_frame(), HEADER + 60);
}

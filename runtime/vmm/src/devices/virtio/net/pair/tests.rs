use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};

use husk_vmm_api::{RateLimit, TokenBucketConfig};
use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::super::super::testing::{Buffer, Driver, interrupt, memory};
use super::super::super::{Interrupt, RING_FEATURES};
use super::*;

const SIZE: u16 = 64;
const HEADER: usize = HEADER_LEN as usize;

/// A pair whose tap is a socket that keeps frames apart.
struct Rig {
    pair: Pair,
    rx: Driver,
    tx: Driver,
    near: OwnedFd,
    far: OwnedFd,
    interrupt: Interrupt,
}

fn rig_with(mergeable: bool, features: u64) -> Rig {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (memory, interrupt) = (memory(), interrupt());
    // Far apart: each has half a megabyte for its buffers.
    let (rx, tx) = (Driver::new(&memory, 4, SIZE), Driver::new(&memory, 8, SIZE));
    let pair = Pair::new(
        rx.virtqueue(&interrupt, features),
        tx.virtqueue(&interrupt, features),
        mergeable,
        interrupt.counters().clone(),
    );
    Rig { pair, rx, tx, near, far, interrupt }
}

fn rig() -> Rig {
    rig_with(true, RING_FEATURES)
}

/// A frame with a header of zeros, as the host makes it.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..len - HEADER).map(|i| (i % 251) as u8));
    frame
}

/// The same as the guest gets it.
fn received(len: usize, buffers: u16) -> Vec<u8> {
    let mut frame = frame(len);
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame
}

impl Rig {
    fn receive(&mut self) -> Received {
        self.pair.receive(self.near.as_fd(), Instant::now()).unwrap()
    }

    fn transmit(&mut self) -> Transmitted {
        self.pair.transmit(self.near.as_fd(), Instant::now()).unwrap()
    }

    fn host_sends(&self, frame: &[u8]) {
        send(&self.far, frame, SendFlags::empty()).unwrap();
    }

    fn host_gets(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 2 * MAX_FRAME_LEN as usize];
        match recv(&self.far, bytes.as_mut_slice(), RecvFlags::empty()) {
            Ok((len, _)) => Some(bytes[..len].to_vec()),
            Err(errno) => {
                assert_eq!(std::io::Error::from(errno).kind(), ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn add_rx(&mut self, len: u32) -> u64 {
        let at = self.rx.alloc(len);
        self.rx.add(&[Buffer::In(at, len)]);
        at
    }

    fn add_tx(&mut self, frame: &[u8]) -> u16 {
        let at = self.tx.place(frame);
        self.tx.add(&[Buffer::Out(at, frame.len() as u32)])
    }

    fn drops(&self) -> (u64, u64) {
        let counts = self.interrupt.counters().snapshot();
        (counts.drops_to_guest, counts.drops_from_guest)
    }
}

#[test]
fn a_frame_goes_into_one_buffer() {
    let mut rig = rig();
    let at = rig.add_rx(2000);
    rig.host_sends(&frame(1000));
    assert!(matches!(rig.receive(), Received::Starved));
    assert_eq!(rig.rx.pop_used().unwrap().1, 1000);
    assert_eq!(rig.rx.bytes(at, 1000), received(1000, 1));
    let counts = rig.interrupt.counters().snapshot();
    assert_eq!((counts.packets_to_guest, counts.bytes_to_guest, counts.interrupts), (1, 1000, 1));
}

#[test]
fn a_long_frame_is_spread_over_several_buffers() {
    let mut rig = rig();
    let places: Vec<u64> = (0..48).map(|_| rig.add_rx(1536)).collect();
    rig.host_sends(&frame(65_000));
    rig.host_sends(&frame(100));
    assert!(matches!(rig.receive(), Received::Idle));
    let expected = received(65_000, 43);
    for (at, part) in places.iter().zip(expected.chunks(1536)) {
        assert_eq!(rig.rx.pop_used().unwrap().1 as usize, part.len());
        assert_eq!(rig.rx.bytes(*at, part.len()), part);
    }
    assert_eq!(rig.rx.pop_used().unwrap().1, 100);
    assert_eq!(rig.rx.bytes(places[43], 100), received(100, 1));
    assert_eq!(rig.rx.pop_used(), None);
}

#[test]
fn without_buffers_nothing_is_taken_from_the_host() {
    let mut rig = rig();
    rig.host_sends(&frame(60));
    assert!(matches!(rig.receive(), Received::Starved));
    let at = rig.add_rx(100);
    assert!(matches!(rig.receive(), Received::Starved));
    assert_eq!(rig.rx.bytes(at, 60), received(60, 1));
    assert_eq!(rig.drops(), (0, 0));
}

#[test]
fn a_frame_that_is_longer_than_the_buffers_waits_for_more() {
    let mut rig = rig();
    let first = rig.add_rx(500);
    rig.host_sends(&frame(1200));
    rig.host_sends(&frame(50));
    assert!(matches!(rig.receive(), Received::Starved));
    let second = rig.add_rx(600);
    assert!(matches!(rig.receive(), Received::Starved));
    assert_eq!(rig.rx.used_idx(), 0);
    let (third, fourth) = (rig.add_rx(500), rig.add_rx(500));
    assert!(matches!(rig.receive(), Received::Starved));
    let whole =
        [rig.rx.bytes(first, 500), rig.rx.bytes(second, 600), rig.rx.bytes(third, 100)].concat();
    assert_eq!(whole, received(1200, 3));
    let lens: Vec<u32> = (0..4).map(|_| rig.rx.pop_used().unwrap().1).collect();
    assert_eq!(lens, [500, 600, 100, 50]);
    assert_eq!(rig.rx.bytes(fourth, 50), received(50, 1));
}

#[test]
fn a_frame_that_the_queue_can_never_hold_is_dropped() {
    let mut rig = rig();
    for _ in 0..SIZE {
        rig.add_rx(16);
    }
    rig.host_sends(&frame(16 * usize::from(SIZE) + 1));
    rig.host_sends(&frame(32));
    assert!(matches!(rig.receive(), Received::Idle));
    assert_eq!(rig.drops(), (1, 0));
    assert_eq!(rig.rx.used_idx(), 2);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_or_is_dropped() {
    let mut rig = rig_with(false, 0);
    let (first, second) = (rig.add_rx(1526), rig.add_rx(1526));
    rig.host_sends(&frame(1527));
    rig.host_sends(&frame(1526));
    rig.host_sends(&frame(20));
    assert!(matches!(rig.receive(), Received::Starved));
    assert_eq!(rig.rx.bytes(first, 1526), received(1526, 1));
    assert_eq!(rig.rx.bytes(second, 20), received(20, 1));
    assert_eq!(rig.drops(), (1, 0));
}

#[test]
fn what_is_no_frame_is_not_given_to_the_guest() {
    let mut rig = rig();
    rig.add_rx(200);
    rig.host_sends(&[0; HEADER - 1]);
    rig.host_sends(&frame(64));
    assert!(matches!(rig.receive(), Received::Starved));
    assert_eq!(rig.rx.pop_used().unwrap().1, 64);
    assert_eq!(rig.drops(), (1, 0));
}

#[test]
fn a_host_that_is_gone_is_told() {
    let mut rig = rig();
    rig.add_rx(200);
    let (other, _) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    rig.far = other;
    assert!(matches!(rig.receive(), Received::Gone(_)));
    rig.add_tx(&frame(64));
    assert_eq!(rig.transmit(), Transmitted::Idle);
    assert_eq!(rig.drops(), (0, 1));
}

#[test]
fn a_frame_arrives_however_its_header_is_split() {
    for split in 1..HEADER + 3 {
        let mut rig = rig();
        let frame = frame(100);
        let at = rig.tx.place(&frame);
        let (first, rest) = (split as u32, (100 - split) as u32);
        let head = rig.tx.add(&[Buffer::Out(at, first), Buffer::Out(at + split as u64, rest)]);
        assert_eq!(rig.transmit(), Transmitted::Idle);
        assert_eq!(rig.host_gets(), Some(frame));
        assert_eq!(rig.tx.pop_used(), Some((head, 0)));
    }
}

#[test]
fn num_buffers_is_told_however_the_header_is_split() {
    for split in 1..HEADER + 3 {
        let mut rig = rig();
        let at = rig.rx.alloc(200);
        let (first, rest) = (split as u32, (200 - split) as u32);
        rig.rx.add(&[Buffer::In(at, first), Buffer::In(at + split as u64, rest)]);
        rig.host_sends(&frame(70));
        assert!(matches!(rig.receive(), Received::Starved));
        assert_eq!(rig.rx.bytes(at, 70), received(70, 1));
    }
}

#[test]
fn frames_of_absurd_length_are_dropped() {
    let mut rig = rig();
    for len in [1, HEADER - 1, MAX_FRAME_LEN as usize + 1, 200_000] {
        rig.add_tx(&vec![7; len]);
    }
    let longest = rig.add_tx(&frame(MAX_FRAME_LEN as usize));
    assert_eq!(rig.transmit(), Transmitted::Idle);
    assert_eq!(rig.host_gets().unwrap().len(), MAX_FRAME_LEN as usize);
    assert_eq!(rig.host_gets(), None);
    assert_eq!(rig.drops(), (0, 4));
    assert_eq!(rig.tx.used_idx(), 5);
    assert_eq!((0..5).filter_map(|_| rig.tx.pop_used()).last(), Some((longest, 0)));
}

#[test]
fn a_writable_buffer_in_a_transmitted_frame_is_a_fault() {
    let mut rig = rig();
    let at = rig.tx.place(&frame(100));
    rig.tx.add(&[Buffer::Out(at, 100), Buffer::In(at, 1)]);
    let fault = rig.pair.transmit(rig.near.as_fd(), Instant::now()).unwrap_err();
    assert!(matches!(fault, GuestFault::Request(_)));
}

#[test]
fn a_host_that_takes_no_more_holds_the_guest_back_and_loses_nothing() {
    for features in [0, RING_FEATURES] {
        let mut rig = rig_with(true, features);
        let frames: Vec<Vec<u8>> =
            (0..20_u8).map(|i| [frame(20_000 - 1), vec![i]].concat()).collect();
        for frame in &frames {
            rig.add_tx(frame);
        }
        assert_eq!(rig.transmit(), Transmitted::Blocked);
        assert!((1..20).contains(&rig.tx.used_idx()));
        let mut got = Vec::new();
        while let Some(frame) = rig.host_gets() {
            got.push(frame);
            rig.transmit();
        }
        assert_eq!(rig.transmit(), Transmitted::Idle);
        assert!(got == frames, "{} frames", got.len());
        assert_eq!(rig.drops(), (0, 0));
    }
}

#[test]
fn a_turn_is_bounded() {
    let mut rig = rig_with(true, 0);
    let at = rig.tx.place(&frame(64));
    for _ in 0..SIZE {
        rig.tx.add(&[Buffer::Out(at, 64)]);
    }
    while rig.transmit() == Transmitted::Blocked {
        while rig.host_gets().is_some() {}
    }
    assert_eq!(rig.tx.used_idx(), SIZE);
}

#[test]
fn limits_hold_in_both_directions() {
    let limit = RateLimit {
        bytes: None,
        operations: Some(TokenBucketConfig { burst: 2, refill_per_second: 1 }),
    };
    let mut rig = rig();
    let now = Instant::now();
    let shared = || SharedLimit::new(&limit, now);
    rig.pair = rig.pair.limited(shared(), shared());
    for _ in 0..4 {
        rig.add_rx(100);
        rig.host_sends(&frame(60));
        rig.add_tx(&frame(61));
    }
    let second = Duration::from_secs(1);
    let received = rig.pair.receive(rig.near.as_fd(), now).unwrap();
    assert!(matches!(received, Received::Throttled(wait) if wait == second), "{received:?}");
    let transmitted = rig.pair.transmit(rig.near.as_fd(), now).unwrap();
    assert_eq!(transmitted, Transmitted::Throttled(second));
    assert_eq!((rig.rx.used_idx(), rig.tx.used_idx()), (2, 2));
    rig.pair.receive(rig.near.as_fd(), now + second).unwrap();
    rig.pair.transmit(rig.near.as_fd(), now + second).unwrap();
    assert_eq!((rig.rx.used_idx(), rig.tx.used_idx()), (3, 3));
}

proptest! {
    /// Frames of any length into buffers of any kind: each arrives whole or is counted as dropped.
    #[test]
    fn frames_arrive_whole_or_are_dropped(
        frames in prop::collection::vec(0..3000_usize, 1..20),
        buffers in prop::collection::vec(prop::collection::vec(1..900_u32, 1..4), 1..20),
        mergeable in any::<bool>(),
    ) {
        let mut rig = rig_with(mergeable, 0);
        let mut places = Vec::new();
        for lens in &buffers {
            let at: Vec<u64> = lens.iter().map(|len| rig.rx.alloc(*len)).collect();
            let chain: Vec<Buffer> =
                at.iter().zip(lens).map(|(at, len)| Buffer::In(*at, *len)).collect();
            // At most as many descriptors as the queue has: 19 chains of 3.
            rig.rx.add(&chain);
            places.push((at, lens));
        }
        for len in &frames {
            rig.host_sends(&frame(HEADER + len)[..]);
        }
        rig.receive();
        let mut chains = places.into_iter();
        let mut arrived = Vec::new();
        while let Some((_, first_len)) = rig.rx.pop_used() {
            let mut bytes = Vec::new();
            let mut read = |rig: &Rig, len: u32| {
                let (at, lens) = chains.next().unwrap();
                let all = at.iter().zip(lens).flat_map(|(at, len)| rig.rx.bytes(*at, *len as usize));
                bytes.extend(all.take(len as usize));
                bytes.clone()
            };
            let mut all = read(&rig, first_len);
            // As a driver: num_buffers says how many chains belong together. They are there at once.
            let mut header = all.clone();
            let mut chains_read = 1;
            while header.len() < HEADER || chains_read < u16::from_le_bytes([header[10], header[11]]) {
                let (_, len) = rig.rx.pop_used().expect("all buffers of a frame are there at once");
                all = read(&rig, len);
                header.clone_from(&all);
                chains_read += 1;
            }
            prop_assert_eq!(&all, &received(all.len(), chains_read));
            arrived.push(all.len() - HEADER);
        }
        let dropped = rig.drops().0 as usize;
        let mut rest = frames.iter();
        for len in &arrived {
            // In order, with drops between.
            prop_assert!(rest.any(|sent| sent == len));
        }
        prop_assert!(arrived.len() + dropped <= frames.len());
        if !mergeable {
            prop_assert!(frames.len() - arrived.len() - dropped == 0 || arrived.len() == buffers.len());
        }
    }

    /// Whatever the guest makes available to be sent: one frame at most for each chain, with its
    /// bytes, and each chain comes back.
    #[test]
    fn hostile_frames_are_sent_as_they_are_or_dropped(
        chains in prop::collection::vec(prop::collection::vec(0..400_u32, 1..6), 1..10),
    ) {
        let mut rig = rig_with(true, 0);
        let mut expected = Vec::new();
        for lens in &chains {
            let buffers: Vec<Buffer> = lens
                .iter()
                .map(|len| {
                    let bytes: Vec<u8> = (0..*len).map(|i| i as u8).collect();
                    Buffer::Out(rig.tx.place(&bytes), *len)
                })
                .collect();
            rig.tx.add(&buffers);
            let bytes: Vec<u8> = lens.iter().flat_map(|len| (0..*len).map(|i| i as u8)).collect();
            if bytes.len() >= HEADER {
                expected.push(bytes);
            }
        }
        let mut got = Vec::new();
        while rig.transmit() != Transmitted::Idle {
            got.extend(rig.host_gets());
        }
        while let Some(frame) = rig.host_gets() {
            got.push(frame);
        }
        prop_assert_eq!(got, expected);
        prop_assert_eq!(usize::from(rig.tx.used_idx()), chains.len());
    }

    /// Rings full of rubbish: loops, absurd lengths and addresses, wrong directions. A fault or not,
    /// but no frame that is too long, and no more chains given back than were there.
    #[test]
    fn hostile_rings_do_no_harm(
        descriptors in prop::collection::vec(
            (
                prop_oneof![4 => 0x28_0000..0x30_0000_u64, 1 => 0x5_0000..0xa_0000_u64, 1 => any::<u64>()],
                prop_oneof![4 => 0..3000_u32, 1 => any::<u32>()],
                prop_oneof![8 => 0..4_u16, 1 => any::<u16>()],
                prop_oneof![8 => 0..SIZE, 1 => any::<u16>()],
            ),
            usize::from(SIZE),
        ),
        heads in prop::collection::vec(prop_oneof![16 => 0..SIZE, 1 => any::<u16>()], 1..40),
        mergeable in any::<bool>(),
        features in prop_oneof![Just(0), Just(RING_FEATURES)],
    ) {
        let mut rig = rig_with(mergeable, features);
        for driver in [&mut rig.rx, &mut rig.tx] {
            for (index, descriptor) in (0..SIZE).zip(&descriptors) {
                driver.write_desc(driver.desc, index, *descriptor);
            }
            for head in &heads {
                driver.make_available(*head);
            }
        }
        for len in [60, 1514, 9000, 60_000] {
            rig.host_sends(&frame(len));
        }
        let now = Instant::now();
        let received = rig.pair.receive(rig.near.as_fd(), now);
        let transmitted = rig.pair.transmit(rig.near.as_fd(), now);
        // The rings may lie in what was written to: then anything may be in them.
        let untouched = descriptors.iter().all(|(address, ..)| *address >= 0x28_0000);
        if untouched && received.is_ok() && transmitted.is_ok() {
            prop_assert!(usize::from(rig.rx.used_idx()) <= heads.len());
            prop_assert!(usize::from(rig.tx.used_idx()) <= heads.len());
        }
        while let Some(sent) = rig.host_gets() {
            prop_assert!((HEADER..=MAX_FRAME_LEN as usize).contains(&sent.len()));
        }
    }
}

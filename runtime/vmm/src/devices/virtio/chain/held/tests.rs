use proptest::prelude::*;

use super::super::super::testing::{Buffer, Driver, interrupt, memory};
use super::super::super::{F_EVENT_IDX, Interrupt};
use super::*;

const SIZE: u16 = 8;

fn rig(features: u64) -> (Driver, BufferQueue, Interrupt) {
    let (memory, interrupt) = (memory(), interrupt());
    let driver = Driver::new(&memory, 0, SIZE);
    let queue = BufferQueue::new(driver.virtqueue(&interrupt, features));
    (driver, queue, interrupt)
}

fn add(driver: &mut Driver, lens: &[u32]) -> (u16, Vec<u64>) {
    let places: Vec<u64> = lens.iter().map(|len| driver.alloc(*len)).collect();
    let buffers: Vec<Buffer> =
        places.iter().zip(lens).map(|(at, len)| Buffer::In(*at, *len)).collect();
    (driver.add(&buffers), places)
}

#[test]
fn as_much_is_held_as_is_asked_for() {
    let (mut driver, mut queue, _) = rig(0);
    for _ in 0..4 {
        add(&mut driver, &[100]);
    }
    assert!(queue.hold(150).unwrap());
    assert_eq!(queue.len(), 200);
    assert!(!queue.hold(1000).unwrap());
    assert_eq!(queue.len(), 400);
    assert_eq!(queue.iovecs().len(), 4);
    assert_eq!(driver.used_idx(), 0);
}

#[test]
fn bytes_land_in_order_and_what_was_filled_is_given_back_at_once() {
    let (mut driver, mut queue, interrupt) = rig(0);
    let (first, places) = add(&mut driver, &[2, 3]);
    let (second, more) = add(&mut driver, &[10]);
    let (third, _) = add(&mut driver, &[7]);
    queue.hold(u64::MAX).unwrap();
    queue.write_at(1, b"abcdef");
    queue.write_at(21, b"zzzz");
    assert_eq!(
        (queue.chains_for(5), queue.chains_for(6), queue.chains_for(23)),
        (Some(1), Some(2), None)
    );
    queue.complete(7).unwrap();
    assert_eq!(driver.bytes(places[0], 2), b"\0a");
    assert_eq!(driver.bytes(places[1], 3), b"bcd");
    assert_eq!(driver.bytes(more[0], 3), b"ef\0");
    assert_eq!(driver.pop_used(), Some((first, 5)));
    assert_eq!(driver.pop_used(), Some((second, 2)));
    assert_eq!(driver.pop_used(), None);
    assert_eq!(queue.len(), 7);
    queue.complete(1).unwrap();
    assert_eq!(driver.pop_used(), Some((third, 1)));
    queue.notify().unwrap();
    queue.notify().unwrap();
    assert_eq!(interrupt.counters().snapshot().interrupts, 1);
    assert_eq!(interrupt.counters().snapshot().bytes_to_guest, 8);
}

#[test]
fn more_than_is_held_cannot_be_completed() {
    let (mut driver, mut queue, _) = rig(0);
    add(&mut driver, &[4]);
    queue.hold(4).unwrap();
    assert!(matches!(queue.complete(5), Err(GuestFault::Request(_))));
    assert_eq!(driver.used_idx(), 0);
}

#[test]
fn an_interrupt_within_a_batch_is_not_missed() {
    for wanted in 0..4 {
        let (mut driver, mut queue, interrupt) = rig(F_EVENT_IDX);
        for _ in 0..3 {
            add(&mut driver, &[1]);
        }
        driver.set_used_event(wanted);
        queue.hold(3).unwrap();
        queue.complete(3).unwrap();
        queue.notify().unwrap();
        let expected = u64::from(wanted < 3);
        assert_eq!(interrupt.counters().snapshot().interrupts, expected, "{wanted}");
    }
}

#[test]
fn a_driver_is_asked_to_notify_only_when_more_is_needed() {
    let (mut driver, mut queue, _) = rig(0);
    add(&mut driver, &[8]);
    queue.hold(8).unwrap();
    assert_eq!(driver.used_flags(), 1);
    assert!(!queue.hold(9).unwrap());
    assert_eq!(driver.used_flags(), 0);
}

#[test]
fn a_driver_that_repeats_its_buffers_is_not_followed_for_ever() {
    let (mut driver, mut queue, _) = rig(0);
    let (head, _) = add(&mut driver, &[1]);
    for _ in 1..3 * SIZE {
        driver.make_available(head);
        queue.hold(u64::MAX).unwrap();
    }
    assert!(queue.is_full());
    assert_eq!(queue.len(), u64::from(SIZE));
    assert!(queue.hold(u64::MAX).unwrap());
}

#[test]
fn chains_that_are_no_empty_buffers_are_faults() {
    let (mut driver, mut queue, _) = rig(0);
    let at = driver.alloc(8);
    driver.add(&[Buffer::Out(at, 4), Buffer::In(at, 4)]);
    assert!(matches!(queue.hold(1), Err(GuestFault::Request(_))));
    let (mut driver, mut queue, _) = rig(0);
    driver.add(&[Buffer::In(at, 0)]);
    assert!(matches!(queue.hold(1), Err(GuestFault::Request(_))));
}

proptest! {
    /// Whatever the buffers, in any order of filling and adding: each chain comes back once, in
    /// order, with as much as was put into it, and the bytes are where they belong.
    #[test]
    fn every_byte_finds_its_place(
        rounds in prop::collection::vec((prop::collection::vec(1..40_u32, 1..4), 0..60_u64), 1..40),
    ) {
        let (mut driver, mut queue, _) = rig(0);
        let (mut expected, mut next, mut places) = (Vec::new(), 0_u8, Vec::new());
        for (lens, fill) in rounds {
            // Descriptors are taken round robin: no more are out than there are.
            let out: usize = places.iter().map(|(_, _, lens): &(u16, Vec<u64>, Vec<u32>)| lens.len()).sum();
            if out + lens.len() <= usize::from(SIZE) {
                let (head, at) = add(&mut driver, &lens);
                places.push((head, at, lens));
            }
            queue.hold(u64::MAX).unwrap();
            let held: u32 = places.iter().flat_map(|(_, _, lens)| lens).sum();
            prop_assert_eq!(queue.len(), u64::from(held));
            let fill = fill.min(queue.len());
            if fill == 0 {
                continue;
            }
            let bytes: Vec<u8> = (0..fill).map(|i| next.wrapping_add(i as u8)).collect();
            next = next.wrapping_add(fill as u8);
            queue.write_at(0, &bytes);
            let count = usize::from(queue.chains_for(fill).unwrap());
            queue.complete(fill).unwrap();
            let mut got = Vec::new();
            for (head, at, lens) in places.drain(..count) {
                let (used, len) = driver.pop_used().unwrap();
                prop_assert_eq!(used, head);
                let whole = at.iter().zip(&lens).flat_map(|(at, len)| driver.bytes(*at, *len as usize));
                got.extend(whole.take(len as usize));
            }
            prop_assert_eq!(driver.pop_used(), None);
            prop_assert_eq!(&got, &bytes);
            expected.extend(bytes);
        }
    }
}

use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::super::testing::{
    Buffer, Driver, F_INDIRECT, F_NEXT, F_WRITE, MEMORY_LEN, interrupt, memory,
};
use super::super::{F_EVENT_IDX, RING_FEATURES};
use super::*;

const SIZE: u16 = 16;

fn pair(features: u64) -> (Driver, Virtqueue, Interrupt) {
    let memory = memory();
    let interrupt = interrupt();
    let driver = Driver::new(&memory, 0, SIZE);
    let queue = driver.virtqueue(&interrupt, features);
    (driver, queue, interrupt)
}

/// The fault that popping meets.
fn fault(queue: &mut Virtqueue) -> GuestFault {
    queue.pop_or_arm().map(|chain| chain.is_some()).unwrap_err()
}

#[test]
fn an_empty_queue_has_no_chain() {
    let (_driver, mut queue, _) = pair(0);
    assert!(queue.pop_or_arm().unwrap().is_none());
}

#[test]
fn readable_bytes_come_in_order_across_buffers() {
    let (mut driver, mut queue, _) = pair(0);
    let (a, b) = (driver.place(b"hello "), driver.place(b"world"));
    driver.add(&[Buffer::Out(a, 6), Buffer::Out(b, 5)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    let readable = chain.readable();
    assert_eq!(readable.len(), 11);
    let mut all = [0; 11];
    readable.read_at(0, &mut all).unwrap();
    assert_eq!(&all, b"hello world");
    let mut middle = [0; 4];
    readable.read_at(4, &mut middle).unwrap();
    assert_eq!(&middle, b"o wo");
    assert_eq!(readable.read_obj::<[u8; 2]>(9).unwrap(), *b"ld");
    assert!(chain.writable().is_empty());
}

#[test]
fn written_bytes_land_across_buffers() {
    let (mut driver, mut queue, _) = pair(0);
    let (a, b) = (driver.alloc(4), driver.alloc(4));
    let head = driver.add(&[Buffer::In(a, 4), Buffer::In(b, 4)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    chain.writable().write_at(2, b"xyz").unwrap();
    chain.complete(5).unwrap();
    assert_eq!(driver.bytes(a, 4), b"\0\0xy");
    assert_eq!(driver.bytes(b, 4), b"z\0\0\0");
    assert_eq!(driver.pop_used(), Some((head, 5)));
    assert_eq!(driver.pop_used(), None);
}

#[test]
fn an_access_past_the_end_is_a_fault_and_touches_nothing() {
    let (mut driver, mut queue, _) = pair(0);
    let (a, b) = (driver.place(b"abcd"), driver.alloc(4));
    driver.add(&[Buffer::Out(a, 4), Buffer::In(b, 4)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    let mut into = [9; 3];
    for offset in [2, 4, 5, u32::MAX] {
        assert!(matches!(
            chain.readable().read_at(offset, &mut into),
            Err(GuestFault::TooShort { have: 4, .. })
        ));
        assert!(chain.writable().write_at(offset, b"abc").is_err());
        assert!(chain.writable().slices(offset, 3, &mut Vec::new()).is_err());
    }
    assert_eq!(into, [9; 3]);
    assert_eq!(driver.bytes(b, 4), [0; 4]);
}

#[test]
fn a_buffer_that_spans_two_regions_is_whole() {
    let (mut driver, mut queue, _) = pair(0);
    let border = MEMORY_LEN / 2 + 0x8000;
    driver.memory.write_slice(b"01234567", GuestAddress(border - 3)).unwrap();
    driver.add(&[Buffer::Out(border - 3, 8)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    assert_eq!(chain.readable().read_obj::<[u8; 8]>(0).unwrap(), *b"01234567");
    let mut slices = Vec::new();
    chain.readable().slices(1, 7, &mut slices).unwrap();
    assert_eq!(slices.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [2, 5]);
}

#[test]
fn a_dropped_chain_is_completed_once_with_length_zero() {
    let (mut driver, mut queue, interrupt) = pair(0);
    let at = driver.alloc(8);
    let head = driver.add(&[Buffer::In(at, 8)]);
    drop(queue.pop_or_arm().unwrap().unwrap());
    assert_eq!(driver.pop_used(), Some((head, 0)));
    assert_eq!(driver.pop_used(), None);
    queue.notify().unwrap();
    assert_eq!(interrupt.counters().snapshot().interrupts, 1);
}

#[test]
fn a_device_cannot_claim_more_than_there_is() {
    let (mut driver, mut queue, _) = pair(0);
    let at = driver.alloc(8);
    let head = driver.add(&[Buffer::In(at, 8)]);
    queue.pop_or_arm().unwrap().unwrap().complete(u32::MAX).unwrap();
    assert_eq!(driver.pop_used(), Some((head, 8)));
}

#[test]
fn empty_buffers_are_passed_over() {
    let (mut driver, mut queue, _) = pair(0);
    let at = driver.place(b"ab");
    driver.add(&[Buffer::Out(at, 1), Buffer::Out(u64::MAX, 0), Buffer::Out(at + 1, 1)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    assert_eq!(chain.readable().read_obj::<[u8; 2]>(0).unwrap(), *b"ab");
}

#[test]
fn an_indirect_chain_reads_as_a_direct_one() {
    let (mut driver, mut queue, _) = pair(F_INDIRECT_DESC);
    let (a, b, c) = (driver.place(b"abc"), driver.place(b"def"), driver.alloc(6));
    let head = driver.add_indirect(&[Buffer::Out(a, 3), Buffer::Out(b, 3), Buffer::In(c, 6)]);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    let copy = chain.readable().read_obj::<[u8; 6]>(0).unwrap();
    chain.writable().write_at(0, &copy).unwrap();
    chain.complete(6).unwrap();
    assert_eq!(driver.bytes(c, 6), b"abcdef");
    assert_eq!(driver.pop_used(), Some((head, 6)));
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let (mut driver, mut queue, _) = pair(F_INDIRECT_DESC);
    let (a, b, table) = (driver.place(b"ab"), driver.place(b"cd"), driver.alloc(16));
    driver.write_desc(driver.desc, 0, (a, 2, F_NEXT, 1));
    driver.write_desc(driver.desc, 1, (table, 16, F_INDIRECT | F_WRITE, 0));
    driver.write_desc(table, 0, (b, 2, 0, 0));
    driver.make_available(0);
    let chain = queue.pop_or_arm().unwrap().unwrap();
    assert_eq!(chain.readable().read_obj::<[u8; 4]>(0).unwrap(), *b"abcd");
}

#[test]
fn an_indirect_table_may_be_longer_than_the_ring_but_not_than_the_cap() {
    let (mut driver, mut queue, _) = pair(F_INDIRECT_DESC);
    let at = driver.alloc(1);
    driver.add_indirect(&vec![Buffer::Out(at, 1); 100]);
    assert_eq!(queue.pop_or_arm().unwrap().unwrap().readable().len(), 100);
    driver.add_indirect(&vec![Buffer::Out(at, 1); MAX_CHAIN_DESCRIPTORS + 1]);
    assert!(matches!(fault(&mut queue), GuestFault::TooManyDescriptors { .. }));
}

#[test]
fn indirect_tables_are_refused_where_they_do_not_belong() {
    let table = 0x3_0000;
    let inner = (table + 0x100, 16, F_INDIRECT, 0);
    for (features, outer, inner, what) in [
        (0, (table, 16, F_INDIRECT, 0), (0x3_1000, 1, 0, 0), "not negotiated"),
        (F_INDIRECT_DESC, (table, 16, F_INDIRECT | F_NEXT, 1), (0x3_1000, 1, 0, 0), "with next"),
        (F_INDIRECT_DESC, (table, 17, F_INDIRECT, 0), (0x3_1000, 1, 0, 0), "odd length"),
        (F_INDIRECT_DESC, (table, 0, F_INDIRECT, 0), (0x3_1000, 1, 0, 0), "empty"),
        (F_INDIRECT_DESC, (table, 16, F_INDIRECT, 0), inner, "nested"),
    ] {
        let (mut driver, mut queue, _) = pair(features);
        driver.write_desc(driver.desc, 0, outer);
        driver.write_desc(table, 0, inner);
        driver.make_available(0);
        assert!(matches!(fault(&mut queue), GuestFault::Indirect { .. }), "{what}");
    }
}

#[test]
fn malformed_chains_are_faults() {
    type Descriptors = &'static [(u64, u32, u16, u16)];
    type Expected = fn(&GuestFault) -> bool;
    let cases: [(&str, Descriptors, Expected); 6] = [
        ("a loop", &[(0x3_0000, 1, F_NEXT, 0)], |f| {
            matches!(f, GuestFault::TooManyDescriptors { .. })
        }),
        ("next out of range", &[(0x3_0000, 1, F_NEXT, SIZE)], |f| {
            matches!(f, GuestFault::Next { next: SIZE, size: 16 })
        }),
        ("outside memory", &[(MEMORY_LEN - 1, 2, 0, 0)], |f| {
            matches!(f, GuestFault::Buffer { len: 2, .. })
        }),
        ("address overflow", &[(u64::MAX, 2, F_WRITE, 0)], |f| {
            matches!(f, GuestFault::Buffer { .. })
        }),
        (
            "readable after writable",
            &[(0x3_0000, 1, F_WRITE | F_NEXT, 1), (0x3_0000, 1, 0, 0)],
            |f| matches!(f, GuestFault::ReadableAfterWritable { .. }),
        ),
        ("table outside memory", &[(MEMORY_LEN, 16, F_INDIRECT, 0)], |f| {
            matches!(f, GuestFault::Table { address: MEMORY_LEN })
        }),
    ];
    for (what, descriptors, expected) in cases {
        let (mut driver, mut queue, _) = pair(F_INDIRECT_DESC);
        for (i, descriptor) in descriptors.iter().enumerate() {
            driver.write_desc(driver.desc, i as u16, *descriptor);
        }
        driver.make_available(0);
        let fault = fault(&mut queue);
        assert!(expected(&fault), "{what}: {fault:?}");
    }
}

#[test]
fn a_head_out_of_range_is_a_fault() {
    let (mut driver, mut queue, _) = pair(0);
    driver.make_available(SIZE);
    assert!(matches!(fault(&mut queue), GuestFault::Head { head: SIZE, size: SIZE }));
}

#[test]
fn an_index_that_jumps_is_a_fault() {
    let (mut driver, mut queue, _) = pair(0);
    driver.set_avail_idx(SIZE + 1);
    assert!(matches!(
        fault(&mut queue),
        GuestFault::Rings(virtio_queue::Error::InvalidAvailRingIndex)
    ));
}

#[test]
fn serving_stops_at_the_budget_and_goes_on() {
    let (mut driver, mut queue, _) = pair(0);
    let at = driver.alloc(1);
    let mut left = SERVE_BUDGET + 1;
    let mut served = 0;
    let mut rounds = 0;
    for _ in 0..SIZE {
        driver.add(&[Buffer::In(at, 1)]);
        left -= 1;
    }
    // The driver adds one for each that it gets, as fast as the device serves them.
    loop {
        let progress = queue
            .serve::<GuestFault>(Notify::AtEnd, |chain| {
                served += 1;
                chain.complete(1)?;
                if left > 0 {
                    left -= 1;
                    driver.add(&[Buffer::In(at, 1)]);
                }
                Ok(())
            })
            .unwrap();
        rounds += 1;
        if progress == Progress::Done {
            break;
        }
    }
    assert_eq!((served, rounds), (SERVE_BUDGET + 1, 2));
}

#[test]
fn without_event_idx_flags_say_who_wants_notifications() {
    let (mut driver, mut queue, interrupt) = pair(0);
    let at = driver.alloc(1);
    driver.set_avail_flags(AVAIL_F_NO_INTERRUPT);
    driver.add(&[Buffer::In(at, 1)]);
    let mut flags_while_serving = 0;
    let done = queue
        .serve::<GuestFault>(Notify::EachChain, |chain| {
            flags_while_serving = driver.used_flags();
            chain.complete(1)
        })
        .unwrap();
    assert_eq!(done, Progress::Done);
    assert_eq!(flags_while_serving, 1, "no kicks while serving");
    assert_eq!(driver.used_flags(), 0, "kicks wanted when idle");
    assert_eq!(interrupt.pending(), 0, "the driver wanted no interrupt");

    driver.set_avail_flags(0);
    driver.add(&[Buffer::In(at, 1)]);
    assert_eq!(
        queue.serve::<GuestFault>(Notify::AtEnd, |chain| chain.complete(1)).unwrap(),
        Progress::Done
    );
    assert_eq!(interrupt.pending(), super::super::INTERRUPT_USED_RING);
}

#[test]
fn with_event_idx_the_driver_is_interrupted_where_it_asked() {
    let (mut driver, mut queue, interrupt) = pair(F_EVENT_IDX);
    let at = driver.alloc(1);
    let interrupts = || interrupt.counters().snapshot().interrupts;
    driver.set_used_event(2);
    for (round, expected) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
        driver.add(&[Buffer::In(at, 1)]);
        assert_eq!(
            queue.serve::<GuestFault>(Notify::AtEnd, |chain| chain.complete(1)).unwrap(),
            Progress::Done
        );
        assert_eq!(interrupts(), expected, "after chain {round}");
        assert_eq!(driver.avail_event(), round, "kick wanted at the next chain");
    }
}

#[test]
fn nothing_completed_means_no_interrupt() {
    let (_driver, mut queue, interrupt) = pair(0);
    let done = queue.serve::<GuestFault>(Notify::AtEnd, |chain| chain.complete(0)).unwrap();
    assert_eq!(done, Progress::Done);
    assert_eq!(interrupt.counters().snapshot().interrupts, 0);
}

proptest! {
    /// Whatever lies in the tables: no panic, every chain handed out is in memory, is as long as its
    /// buffers, and comes back exactly once.
    #[test]
    fn hostile_descriptors_are_survived(
        table in prop::collection::vec(hostile_descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(hostile_descriptor(), 8),
        heads in prop::collection::vec(0..SIZE + 2, 1..20),
        jump in prop::option::of(any::<u16>()),
        negotiated in any::<bool>(),
    ) {
        let (mut driver, mut queue, _) = pair(if negotiated { RING_FEATURES } else { 0 });
        for (i, descriptor) in table.iter().enumerate() {
            driver.write_desc(driver.desc, i as u16, *descriptor);
        }
        for (i, descriptor) in indirect.iter().enumerate() {
            driver.write_desc(HOSTILE_TABLE, i as u16, *descriptor);
        }
        for head in &heads {
            driver.make_available(*head);
        }
        if let Some(index) = jump {
            driver.set_avail_idx(index);
        }
        let mut popped = Vec::new();
        while let Ok(Some(chain)) = queue.pop_or_arm() {
            prop_assert!(popped.len() <= usize::from(SIZE), "more chains than the ring holds");
            popped.push(chain.head);
            let (readable, writable) = (chain.readable(), chain.writable());
            prop_assert!(readable.len().checked_add(writable.len()).is_some());
            let mut slices = Vec::new();
            readable.slices(0, readable.len(), &mut slices).unwrap();
            writable.slices(0, writable.len(), &mut slices).unwrap();
            let bytes: usize = slices.iter().map(VolatileSlice::len).sum();
            prop_assert_eq!(bytes, (readable.len() + writable.len()) as usize);
            if chain.head % 2 == 0 {
                chain.complete(0).unwrap();
            }
        }
        prop_assert_eq!(usize::from(driver.used_idx()), popped.len());
        for head in popped {
            prop_assert_eq!(driver.pop_used(), Some((head, 0)));
        }
    }
}

const HOSTILE_TABLE: u64 = 0x3_0000;

fn hostile_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => 0x4_0000..0x5_0000_u64,
        2 => Just(HOSTILE_TABLE),
        1 => MEMORY_LEN - 64..MEMORY_LEN + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..300_u32, 2 => Just(64), 1 => Just(128), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0..4_u16, 2 => Just(F_INDIRECT), 1 => 0..8_u16, 1 => any::<u16>()];
    (address, len, flags, prop_oneof![8 => 0..SIZE, 1 => any::<u16>()])
}

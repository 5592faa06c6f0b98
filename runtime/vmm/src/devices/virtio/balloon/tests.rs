use proptest::prelude::*;
use vm_memory::Bytes;

use super::super::status::DEVICE_NEEDS_RESET;
use super::super::testing::{
    Buffer, Driver, MEMORY_LEN, activation, interrupt, memory, wait_until,
};
use super::*;

/// Where the tests' free memory lies: behind rings and buffers.
const FREE: u64 = 0x30_0000;
const FREE_LEN: usize = 0x10_0000;

struct Rig {
    balloon: Balloon,
    drivers: [Driver; 3],
    memory: GuestMemory,
    interrupt: Interrupt,
}

fn rig() -> Rig {
    let (memory, interrupt) = (memory(), interrupt());
    memory.write_slice(&[0xee; FREE_LEN], GuestAddress(FREE)).unwrap();
    let drivers = [0, 1, 2].map(|index| Driver::new(&memory, index, 64));
    let mut balloon = Balloon::new();
    let queues: Vec<&Driver> = drivers.iter().collect();
    balloon.activate(activation(&queues, &interrupt, balloon.features())).unwrap();
    Rig { balloon, drivers, memory, interrupt }
}

impl Rig {
    fn kick(&mut self, queue: usize, buffers: &[Buffer]) -> (u16, u32) {
        self.drivers[queue].add(buffers);
        self.drivers[queue].kick_and_wait()
    }

    fn pfns(&mut self, queue: usize, pfns: &[u32]) -> Buffer {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        Buffer::Out(self.drivers[queue].place(&bytes), bytes.len() as u32)
    }

    /// Which pages of the free memory are zeros; the others must be as they were.
    fn gone(&self) -> Vec<u64> {
        let mut bytes = vec![0; FREE_LEN];
        self.memory.read_slice(&mut bytes, GuestAddress(FREE)).unwrap();
        let pages = (FREE / BALLOON_PAGE..).zip(bytes.chunks(BALLOON_PAGE as usize));
        let all = |page: &[u8], is: u8| page.iter().all(|byte| *byte == is);
        pages
            .filter(|(_, page)| {
                assert!(all(page, 0) || all(page, 0xee));
                all(page, 0)
            })
            .map(|(pfn, _)| pfn)
            .collect()
    }

    fn released(&self) -> u64 {
        self.interrupt.counters().snapshot().bytes_released
    }
}

#[test]
fn reported_pages_are_given_back_and_no_others() {
    let mut rig = rig();
    let report = [Buffer::In(FREE + 0x1000, 0x3000), Buffer::In(FREE + 0x8000, 0x1000)];
    assert_eq!(rig.kick(REPORTING, &report).1, 0);
    let pfn = FREE / BALLOON_PAGE;
    assert_eq!(rig.gone(), [pfn + 1, pfn + 2, pfn + 3, pfn + 8]);
    assert_eq!(rig.released(), 0x4000);
}

#[test]
fn pages_in_the_balloon_are_given_back_and_can_be_taken_out() {
    let mut rig = rig();
    let pfn = (FREE / BALLOON_PAGE) as u32;
    let buffer = rig.pfns(INFLATE, &[pfn + 3, pfn + 4, pfn + 1, pfn + 7, pfn + 8]);
    rig.kick(INFLATE, &[buffer]);
    let expected: Vec<u64> = [1, 3, 4, 7, 8].iter().map(|n| u64::from(pfn) + n).collect();
    assert_eq!(rig.gone(), expected);
    assert_eq!(rig.released(), 5 * BALLOON_PAGE);
    let buffer = rig.pfns(DEFLATE, &[pfn + 3]);
    rig.kick(DEFLATE, &[buffer]);
    assert_eq!(rig.gone(), expected);
}

#[test]
fn a_driver_without_reporting_has_two_queues() {
    let balloon = Balloon::new();
    assert_eq!(balloon.queues_in_use(RING_FEATURES), 2);
    assert_eq!(balloon.queues_in_use(balloon.features()), 3);
    assert_eq!(balloon.config(), [0; 8]);
}

#[test]
fn what_is_not_memory_needs_a_reset_and_the_device_works_after_it() {
    let outside = (MEMORY_LEN / BALLOON_PAGE) as u32;
    for pfns in [&[outside][..], &[outside - 1, outside], &[u32::MAX]] {
        let mut rig = rig();
        let buffer = rig.pfns(INFLATE, pfns);
        rig.drivers[INFLATE].add(&[buffer]);
        rig.drivers[INFLATE].kick.write(1).unwrap();
        wait_until(|| rig.interrupt.status() & DEVICE_NEEDS_RESET != 0);
        assert!(rig.gone().is_empty());
        rig.balloon.reset();
        rig.interrupt.clear();
        let drivers = [3, 4, 5].map(|index| Driver::new(&rig.memory, index, 64));
        let queues: Vec<&Driver> = drivers.iter().collect();
        let features = rig.balloon.features();
        rig.balloon.activate(activation(&queues, &rig.interrupt, features)).unwrap();
        rig.drivers = drivers;
        rig.kick(REPORTING, &[Buffer::In(FREE, 0x1000)]);
        assert_eq!(rig.gone(), [FREE / BALLOON_PAGE]);
    }
}

#[test]
fn malformed_requests_need_a_reset() {
    let cases = [
        (REPORTING, Buffer::Out(FREE, 0x1000)),
        (INFLATE, Buffer::In(FREE, 0x1000)),
        (DEFLATE, Buffer::In(FREE, 0x1000)),
        (INFLATE, Buffer::Out(FREE, 6)),
        (INFLATE, Buffer::Out(FREE, (MAX_PFNS + 1) * PFN_LEN)),
    ];
    for (queue, buffer) in cases {
        let mut rig = rig();
        rig.drivers[queue].add(&[buffer]);
        rig.drivers[queue].kick.write(1).unwrap();
        wait_until(|| rig.interrupt.status() & DEVICE_NEEDS_RESET != 0);
        assert!(rig.gone().is_empty());
    }
}

#[test]
fn a_hundred_reports_are_served_by_one_kick() {
    let mut rig = rig();
    let driver = &mut rig.drivers[REPORTING];
    for round in 0..2 {
        for page in 0..50 {
            driver.add(&[Buffer::In(FREE + (round * 50 + page) * 0x1000, 0x1000)]);
        }
        driver.kick.write(1).unwrap();
        for _ in 0..50 {
            driver.wait_used();
        }
    }
    assert_eq!(rig.gone().len(), 100);
}

proptest! {
    /// Runs are the pages that were pushed, in their order.
    #[test]
    fn runs_lose_no_page(pfns in prop::collection::vec(0..20_u32, 0..60)) {
        let mut run = Run::default();
        let mut runs: Vec<Run> = pfns.iter().filter_map(|pfn| run.push(*pfn)).collect();
        runs.push(run);
        let pages: Vec<u64> =
            runs.iter().flat_map(|run| run.first..run.first + run.pages).collect();
        prop_assert_eq!(pages, pfns.iter().map(|pfn| u64::from(*pfn)).collect::<Vec<_>>());
    }

    /// Whatever a guest writes into its rings: answered once or a fault, and memory beside what it
    /// named is as it was.
    #[test]
    fn hostile_requests_do_no_harm(
        report in any::<bool>(),
        out in prop::collection::vec(any::<u8>(), 0..64),
        at in prop_oneof![4 => FREE..FREE + 0x8000, 1 => any::<u64>()],
        len in prop_oneof![4 => 0..0x4000_u32, 1 => any::<u32>()],
    ) {
        let (memory, interrupt) = (memory(), interrupt());
        memory.write_slice(&[0xee; FREE_LEN], GuestAddress(FREE)).unwrap();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut queue = driver.virtqueue(&interrupt, 0);
        let mut releaser = Releaser::new(memory.clone(), interrupt);
        let mut buffers = Vec::new();
        if !out.is_empty() {
            buffers.push(Buffer::Out(driver.place(&out), out.len() as u32));
        }
        buffers.push(Buffer::In(at, len));
        let head = driver.add(&buffers);
        let Ok(Some(chain)) = queue.pop_or_arm() else { return Ok(()) };
        let answer = if report { releaser.report(chain) } else { releaser.inflate(chain) };
        prop_assert_eq!(driver.pop_used(), Some((head, 0)));
        prop_assert_eq!(driver.pop_used(), None);
        let named = if report && answer.is_ok() { at..at + u64::from(len) } else { 0..0 };
        let mut bytes = vec![0; FREE_LEN];
        memory.read_slice(&mut bytes, GuestAddress(FREE)).unwrap();
        for (address, byte) in (FREE..).zip(bytes) {
            prop_assert!(byte == 0xee || (byte == 0 && (named.contains(&address) || !report)));
        }
    }
}

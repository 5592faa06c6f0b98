use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::super::status::DEVICE_NEEDS_RESET;
use super::super::testing::{Buffer, Driver, activation, interrupt, memory, wait_until};
use super::super::{F_INDIRECT_DESC, Interrupt};
use super::*;

const LEN: u64 = 64 * 1024;
const OK: u8 = request::STATUS_OK;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

struct Rig {
    blk: Blk,
    file: File,
    driver: Driver,
    interrupt: Interrupt,
}

fn rig(read_only: bool) -> Rig {
    let file = tempfile::tempfile().unwrap();
    let pattern: Vec<u8> = (0..LEN).map(|i| (i / 512) as u8).collect();
    file.write_all_at(&pattern, 0).unwrap();
    let mut blk = Blk::new("scratch", file.try_clone().unwrap(), read_only).unwrap();
    let (memory, interrupt) = (memory(), interrupt());
    let driver = Driver::new(&memory, 0, QUEUE_SIZE);
    blk.activate(activation(&[&driver], &interrupt, RING_FEATURES)).unwrap();
    Rig { blk, file, driver, interrupt }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

impl Rig {
    /// Does one request; returns its status, the bytes it read, and the length that the device
    /// reported.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, Vec<u8>, u32) {
        let head = self.driver.place(&header(kind, sector));
        let (data, into) = (self.driver.place(out), self.driver.alloc(room));
        let status = self.driver.place(&[0xff]);
        let buffers = [
            Buffer::Out(head, 16),
            Buffer::Out(data, out.len() as u32),
            Buffer::In(into, room),
            Buffer::In(status, 1),
        ];
        self.driver.add_indirect(&buffers);
        let (_, len) = self.driver.kick_and_wait();
        (self.driver.bytes(status, 1)[0], self.driver.bytes(into, room as usize), len)
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

#[test]
fn the_configuration_space_is_laid_out_as_specified() {
    let blk = rig(false).blk;
    let config = blk.config();
    assert_eq!(config.len(), CONFIG_LEN);
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), LEN / 512);
    assert_eq!(u32_at(8), SIZE_MAX);
    assert_eq!(u32_at(12), 254);
    assert_eq!(u32_at(20), 512);
    assert_eq!(config[24], 3);
    assert_eq!(u16::from_le_bytes(config[34..36].try_into().unwrap()), 1);
    assert_eq!(u32_at(36), MAX_RANGE_SECTORS);
    assert_eq!(u32_at(40), MAX_RANGES);
    assert_eq!(u32_at(44), 8);
    assert_eq!(u32_at(48), MAX_RANGE_SECTORS);
    assert_eq!(u32_at(52), MAX_RANGES);
    assert_eq!(config[56], 1);
    const { assert!(SIZE_MAX as u64 * SEG_MAX as u64 <= request::MAX_DATA_LEN as u64) };
}

#[test]
fn features_follow_the_access() {
    let writable = rig(false).blk.features();
    let read_only = rig(true).blk.features();
    let changes = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(writable & (changes | feature::RO), changes);
    assert_eq!(read_only & (changes | feature::RO), feature::RO);
}

#[test]
fn a_read_returns_the_sectors() {
    let mut rig = rig(true);
    let (status, data, len) = rig.request(IN, 3, &[], 1024);
    assert_eq!((status, len), (OK, 1025));
    assert_eq!(data, [[3; 512], [4; 512]].concat());
}

#[test]
fn a_write_changes_its_sectors_only() {
    let mut rig = rig(false);
    let mut expected = rig.contents();
    expected[5 * 512..6 * 512].fill(0xee);
    let (status, _, len) = rig.request(OUT, 5, &[0xee; 512], 0);
    assert_eq!((status, len), (OK, 1));
    assert_eq!(rig.contents(), expected);
    assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn an_access_past_the_end_returns_ioerr_and_changes_nothing() {
    let mut rig = rig(false);
    let before = rig.contents();
    for sector in [LEN / 512, LEN / 512 - 1, u64::MAX, u64::MAX / 512] {
        let (status, data, len) = rig.request(IN, sector, &[], 1024);
        assert_eq!((status, len), (IOERR, 0), "{sector}");
        assert_eq!(data, [0; 1024]);
        assert_eq!(rig.request(OUT, sector, &[1; 1024], 0).0, IOERR);
    }
    assert_eq!(rig.contents(), before);
    assert_eq!(rig.file.metadata().unwrap().len(), LEN);
}

#[test]
fn parts_of_sectors_return_ioerr() {
    let mut rig = rig(false);
    assert_eq!(rig.request(IN, 0, &[], 511).0, IOERR);
    assert_eq!(rig.request(OUT, 0, &[1; 513], 0).0, IOERR);
}

#[test]
fn an_unknown_request_is_unsupported() {
    assert_eq!(rig(false).request(77, 0, &[], 0).0, UNSUPP);
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let mut rig = rig(true);
    let before = rig.contents();
    let range = [&0_u64.to_le_bytes()[..], &1_u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(rig.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(rig.request(DISCARD, 0, &range, 0).0, IOERR);
    assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(rig.contents(), before);
}

#[test]
fn a_discard_past_the_end_does_nothing() {
    let mut rig = rig(false);
    let before = rig.contents();
    let range = [&127_u64.to_le_bytes()[..], &2_u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(rig.request(DISCARD, 0, &range, 0).0, IOERR);
    assert_eq!(rig.contents(), before);
}

#[test]
fn the_id_is_the_serial_padded_with_zeros() {
    let mut rig = rig(true);
    let (status, id, len) = rig.request(GET_ID, 0, &[], 20);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(&id, b"scratch\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.blk.name(), "blk:scratch");
}

#[test]
fn a_host_that_fails_is_an_ioerr_and_the_disk_goes_on() {
    let mut rig = rig(false);
    rig.file.set_len(512).unwrap();
    assert_eq!(rig.request(IN, 1, &[], 512).0, IOERR);
    assert_eq!(rig.request(IN, 0, &[], 512).0, OK);
    assert_eq!(rig.interrupt.status(), 0);
}

#[test]
fn a_full_queue_is_served_in_order() {
    let mut rig = rig(true);
    let head = rig.driver.place(&header(IN, 9));
    let (data, status) = (rig.driver.alloc(512), rig.driver.alloc(1));
    let buffers = [Buffer::Out(head, 16), Buffer::In(data, 512), Buffer::In(status, 1)];
    let heads: Vec<u16> = (0..QUEUE_SIZE / 3).map(|_| rig.driver.add(&buffers)).collect();
    rig.driver.kick.write(1).unwrap();
    for head in heads {
        assert_eq!(rig.driver.wait_used(), (head, 513));
    }
}

#[test]
fn a_request_without_a_status_byte_needs_a_reset() {
    let mut rig = rig(false);
    let head = rig.driver.place(&header(FLUSH, 0));
    rig.driver.add(&[Buffer::Out(head, 16)]);
    rig.driver.kick.write(1).unwrap();
    wait_until(|| rig.interrupt.status() == DEVICE_NEEDS_RESET);
    rig.blk.reset();
    let mut driver = Driver::new(&rig.driver.memory, 1, QUEUE_SIZE);
    let interrupt = interrupt();
    rig.blk.activate(activation(&[&driver], &interrupt, F_INDIRECT_DESC)).unwrap();
    let (head, room) = (driver.place(&header(FLUSH, 0)), driver.alloc(1));
    driver.add(&[Buffer::Out(head, 16), Buffer::In(room, 1)]);
    assert_eq!(driver.kick_and_wait().1, 1);
}

#[test]
fn host_failures_are_counted_and_only_the_first_is_logged() {
    let rig = rig(false);
    let mut service =
        Service { name: "x".into(), disk: rig.blk.disk.clone(), write_through: true, errors: 0 };
    let error = DiskError::Host { what: "test", source: std::io::Error::other("full") };
    service.note(&error);
    service.note(&error);
    assert_eq!(service.errors, 2);
}

proptest! {
    /// Any request in any shape: answered exactly once or a fault, and a read-only disk stays as it
    /// is, a writable one as long as it is.
    #[test]
    fn hostile_requests_do_no_harm(
        kind in prop_oneof![8 => 0..15_u32, 1 => any::<u32>()],
        sector in prop_oneof![4 => 0..130_u64, 1 => any::<u64>()],
        out in prop::collection::vec(any::<u8>(), 0..2000),
        room in 0..2000_u32,
        read_only in any::<bool>(),
        write_through in any::<bool>(),
    ) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        let disk = Arc::new(Disk::new("x", file.try_clone().unwrap(), read_only).unwrap());
        let mut service = Service { name: "x".into(), disk, write_through, errors: 0 };
        let mut driver = Driver::new(&memory(), 0, 16);
        let mut queue = driver.virtqueue(&interrupt(), 0);
        let bytes = [header(kind, sector), out].concat();
        let (from, to) = (driver.place(&bytes), driver.alloc(room.max(1)));
        let head = driver.add(&[Buffer::Out(from, bytes.len() as u32), Buffer::In(to, room)]);
        let chain = queue.pop_or_arm().unwrap().unwrap();
        let answer = service.answer(chain);
        prop_assert_eq!(answer.is_err(), room == 0);
        let (used, len) = driver.pop_used().unwrap();
        prop_assert_eq!(used, head);
        prop_assert!(len <= room);
        prop_assert_eq!(driver.pop_used(), None);
        prop_assert_eq!(file.metadata().unwrap().len(), LEN);
        prop_assert_eq!(service.errors, 0);
        if read_only {
            let mut after = vec![1; LEN as usize];
            file.read_exact_at(&mut after, 0).unwrap();
            prop_assert!(after.iter().all(|byte| *byte == 0));
        }
    }
}

//! Many bytes, unchanged.

use super::*;

/// Carries `len` bytes each way at the same time, with the guest's buffer `buf_alloc` bytes large,
/// and checks every byte.
fn carry(len: usize, buf_alloc: u32, chunk: usize) {
    let mut bench = Bench::new();
    bench.credit = Credit { buf_alloc, fwd_cnt: 0 };
    let (key, mut host) = bench.accepted(5000);
    let to_guest = pseudo_random(len, 1);
    let to_host = pseudo_random(len, 2);
    let (mut written, mut sent) = (0, 0);
    let (mut at_guest, mut at_host) = (Vec::new(), Vec::new());
    let mut known = Credit { buf_alloc: WINDOW, fwd_cnt: 0 };
    let mut buffer = vec![0; chunk];
    while at_guest.len() < len || at_host.len() < len {
        if written < len {
            match host.write(&to_guest[written..len.min(written + chunk)]) {
                Ok(count) => written += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        match host.read(&mut buffer) {
            Ok(count) => at_host.extend_from_slice(&buffer[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        let room = known.buf_alloc - (sent as u32).wrapping_sub(known.fwd_cnt);
        let count = (len - sent).min(room as usize).min(chunk);
        if count > 0 {
            bench.data(key, &to_host[sent..sent + count]);
            sent += count;
        }
        while let Some((header, data)) = bench.next() {
            known = Credit { buf_alloc: header.buf_alloc, fwd_cnt: header.fwd_cnt };
            at_guest.extend_from_slice(&data);
            assert!(data.len() <= buf_alloc as usize, "the guest's credit is kept");
            match header.op {
                op::RW => bench.credit.fwd_cnt = at_guest.len() as u32,
                op::CREDIT_REQUEST => bench.send(key, op::CREDIT_UPDATE),
                other => assert_eq!(other, op::CREDIT_UPDATE),
            }
        }
    }
    assert!(at_guest == to_guest, "bytes to the guest differ");
    assert!(at_host == to_host, "bytes to the host differ");
}

#[test]
fn ten_mebibytes_go_both_ways_unchanged() {
    carry(10 << 20, 256 * 1024, 60_000);
}

#[test]
fn small_credit_carries_every_byte() {
    carry(1 << 20, 1000, 7000);
}

//! How connections end: by halves, orderly, by a reset, by silence.

use super::*;

#[test]
fn the_guests_half_close_is_the_hosts_end_of_file() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    bench.data(key, b"last words");
    bench.shutdown(key, SEND);
    assert_eq!(read_to_eof(&mut host), b"last words");
    host.write_all(b"still heard").unwrap();
    assert_eq!(bench.next().unwrap().1, b"still heard");

    // The host ends as well: nothing is left, and the guest's RST ends it.
    drop(host);
    bench.expect(op::SHUTDOWN);
    while let Some((header, _)) = bench.next() {
        assert_eq!(header.op, op::SHUTDOWN);
    }
    bench.send(key, op::RST);
    bench.assert_empty();
}

#[test]
fn the_hosts_half_close_is_the_guests_end() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    host.write_all(b"all of it").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.next().unwrap().1, b"all of it");
    assert_eq!(bench.expect(op::SHUTDOWN).flags, shutdown_flags(SEND));
    bench.data(key, b"answer");
    assert_eq!(read_all_there(&mut host), b"answer");
    bench.expect_nothing();

    bench.shutdown(key, Directions::BOTH);
    assert_eq!(read_to_eof(&mut host), b"");
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn a_guest_that_receives_no_more_fails_the_hosts_writes() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    bench.shutdown(key, RECEIVE);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    bench.data(key, b"one way only");
    assert_eq!(read_all_there(&mut host), b"one way only");
    bench.expect_nothing();
}

#[test]
fn a_host_that_reads_no_more_has_the_guest_told() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    host.shutdown(Shutdown::Read).unwrap();
    bench.data(key, b"in vain");
    assert_eq!(bench.expect(op::SHUTDOWN).flags, shutdown_flags(RECEIVE));
    // What is on its way is taken and forgotten, however much it is.
    for _ in 0..10 {
        bench.data(key, &[0; MAX_PAYLOAD]);
    }
    while let Some((header, _)) = bench.next() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    host.write_all(b"one way only").unwrap();
    assert_eq!(bench.next().unwrap().1, b"one way only");
}

#[test]
fn a_host_that_goes_away_has_its_last_bytes_delivered_and_the_guest_told() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    bench.data(key, b"never read");
    host.write_all(&[1; 10_000]).unwrap();
    drop(host);
    let mut got = 0;
    let mut flags = 0;
    while let Some((header, data)) = bench.next() {
        match header.op {
            op::RW => got += data.len(),
            op::SHUTDOWN => {
                // The host's end is told only after its last byte.
                assert!(header.flags & shutdown_flags(SEND) == 0 || got == 10_000);
                flags |= header.flags;
            }
            other => panic!("unexpected operation {other}"),
        }
    }
    assert_eq!((got, flags), (10_000, shutdown_flags(Directions::BOTH)));
    bench.data(key, b"crossed the shutdown");
    bench.expect_nothing();

    bench.expire_after(CLOSE_TIMEOUT);
    bench.expect_reset(key);
    bench.assert_empty();
}

/// Has the guest send more than the host's socket holds, so that some is left in the multiplexer.
fn send_until_it_waits(bench: &mut Bench, key: Key) -> usize {
    let mut sent = 0;
    while bench.mux.connections.values().all(|c| c.pending_len() < MAX_PAYLOAD) {
        bench.data(key, &[5; MAX_PAYLOAD / 2]);
        sent += MAX_PAYLOAD / 2;
    }
    while let Some((header, _)) = bench.next() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    sent
}

/// Reads to the end while the multiplexer passes on what it has.
fn drain(bench: &mut Bench, host: &mut UnixStream) -> usize {
    let mut got = 0;
    let mut buffer = vec![0; 65536];
    loop {
        bench.poll();
        match host.read(&mut buffer) {
            Ok(0) => return got,
            Ok(len) => got += len,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

#[test]
fn the_reset_after_shutdown_says_that_the_host_has_the_last_byte() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    let sent = send_until_it_waits(&mut bench, key);
    bench.shutdown(key, Directions::BOTH);
    bench.expect_nothing();
    bench.expire_after(CLOSE_TIMEOUT * 2);
    bench.expect_nothing();
    assert_eq!(drain(&mut bench, &mut host), sent);
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn a_deadline_passes_once() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    let sent = send_until_it_waits(&mut bench, key);
    bench.shutdown(key, SEND);
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.expect(op::SHUTDOWN).flags, shutdown_flags(Directions::BOTH));
    assert!(bench.mux.next_deadline().is_some());
    bench.shutdown(key, Directions::BOTH);
    bench.expire_after(CLOSE_TIMEOUT);
    assert_eq!(bench.mux.next_deadline(), None);
    assert_eq!(drain(&mut bench, &mut host), sent);
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn a_guest_that_never_closes_costs_the_host_no_byte() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    let sent = send_until_it_waits(&mut bench, key);
    bench.shutdown(key, SEND);
    host.shutdown(Shutdown::Write).unwrap();
    bench.expect(op::SHUTDOWN);
    bench.expire_after(CLOSE_TIMEOUT);
    bench.expect_reset(key);
    assert_eq!(drain(&mut bench, &mut host), sent);
    bench.assert_empty();
}

#[test]
fn a_host_that_goes_away_ends_the_draining() {
    let mut bench = Bench::new();
    let (key, host) = bench.accepted(5000);
    send_until_it_waits(&mut bench, key);
    bench.shutdown(key, Directions::BOTH);
    bench.expect_nothing();
    drop(host);
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn a_guest_that_does_not_wait_for_the_host_loses_nothing() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    let sent = send_until_it_waits(&mut bench, key);
    bench.shutdown(key, Directions::BOTH);
    // Linux, after 8 s.
    bench.send(key, op::RST);
    // The guest may use the ports anew while the host is still reading.
    let (_, mut second) = bench.accepted(5000);
    assert_eq!(drain(&mut bench, &mut host), sent);
    bench.data(key, b"second");
    assert_eq!(read_all_there(&mut second), b"second");
    assert_eq!(bench.mux.connections.len(), 1);
}

#[test]
fn an_orderly_end_is_an_end_of_file_although_the_guest_left_bytes_unread() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    bench.data(key, b"goodbye");
    host.write_all(b"nobody reads this").unwrap();
    bench.shutdown(key, Directions::BOTH);
    assert_eq!(read_to_eof(&mut host), b"goodbye");
}

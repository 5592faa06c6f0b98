//! What is held for a side that does not take it, and how much of everything there may be.

use super::*;

#[test]
fn a_stopped_host_reader_bounds_what_is_held() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    // An obedient guest: it sends what the last credit allows.
    let mut forwarded = 0u32;
    let mut sent = 0u32;
    loop {
        let room = WINDOW - sent.wrapping_sub(forwarded);
        if room == 0 {
            break;
        }
        bench.data(key, &vec![1; room.min(10_000) as usize]);
        sent += room.min(10_000);
        assert!(bench.mux.connections.values().all(|c| c.pending_len() <= WINDOW as usize));
        while let Some((header, _)) = bench.next() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
    }
    assert_eq!(bench.mux.connections.values().next().unwrap().pending_len(), WINDOW as usize);

    // The reader goes on: so does the guest.
    let got = read_all_there(&mut host).len();
    assert!(got > 0);
    let header = bench.expect(op::CREDIT_UPDATE);
    assert!(header.fwd_cnt.wrapping_sub(forwarded) > 0);

    // A disobedient one.
    let room = WINDOW - sent.wrapping_sub(header.fwd_cnt);
    for _ in 0..room.div_ceil(MAX_PAYLOAD as u32) + 4 {
        bench.data(key, &[0; MAX_PAYLOAD]);
    }
    while let Some((header, _)) = bench.next() {
        assert_eq!(header.op, op::RST);
    }
    bench.assert_empty();
}

#[test]
fn a_guest_that_stops_reading_is_asked_once_and_leaves_nothing_to_do() {
    let mut bench = Bench::new();
    bench.credit = Credit { buf_alloc: 100, fwd_cnt: 0 };
    let (key, mut host) = bench.accepted(5000);
    let written = write_until_full(&mut host, 1 << 20);
    assert!(written < 1 << 20, "back-pressure reaches the host's writer");
    assert_eq!(bench.next().unwrap().1.len(), 100);
    bench.expect(op::CREDIT_REQUEST);
    bench.expect_nothing();
    assert!(bench.mux.ready.is_empty());
    assert!(bench.mux.sockets.ready().unwrap().is_empty(), "no busy polling");
    // 'Still none' is no reason to ask again.
    bench.send(key, op::CREDIT_UPDATE);
    bench.expect_nothing();

    // Even when the host hangs up, which epoll cannot be kept from saying.
    drop(host);
    assert_eq!(bench.expect(op::SHUTDOWN).flags, shutdown_flags(RECEIVE));
    bench.expect_nothing();
    assert!(bench.mux.sockets.ready().unwrap().is_empty(), "no busy polling");

    bench.credit = Credit { buf_alloc: 1 << 20, fwd_cnt: 100 };
    bench.send(key, op::CREDIT_UPDATE);
    let mut got = 100;
    while let Some((header, data)) = bench.next() {
        got += data.len();
        assert!(header.op == op::RW || got == written);
    }
    assert_eq!(got, written);
}

#[test]
fn a_busy_connection_does_not_starve_the_others() {
    let mut bench = Bench::new();
    let (_, mut loud) = bench.accepted(5000);
    let (quiet_key, mut quiet) = bench.accepted(5001);
    write_until_full(&mut loud, 1 << 20);
    assert_eq!(bench.next().unwrap().0.op, op::RW);
    quiet.write_all(b"me too").unwrap();
    let mut turns = 0;
    loop {
        let (header, data) = bench.next().expect("data");
        if header.dst_port == quiet_key.guest_port {
            assert_eq!(data, b"me too");
            break;
        }
        write_until_full(&mut loud, 1 << 20);
        turns += data.len();
        assert!(turns <= MAX_PAYLOAD, "at most one turn of the other");
    }
}

#[test]
fn the_guest_cannot_take_all_connections() {
    let mut bench = Bench::new();
    let most = (MAX_CONNECTIONS - RESERVED_FOR_HOST) as u32;
    let mut hosts: Vec<_> = (0..most).map(|port| bench.accepted(port).1).collect();
    let key = Key { guest_port: most, host_port: 1024 };
    bench.send(key, op::REQUEST);
    bench.expect_reset(key);

    hosts.extend((0..RESERVED_FOR_HOST as u32).map(|id| bench.connect(id, 52)));
    assert!(bench.sink.refused.is_empty());
    hosts.push(bench.connect(77, 52));
    assert_eq!(bench.sink.refused.len(), 1);
    assert_eq!(bench.mux.connections.len(), MAX_CONNECTIONS);

    bench.mux.close(&mut bench.sink);
    assert_eq!(bench.sink.refused.len(), 1 + RESERVED_FOR_HOST);
    for host in &mut hosts {
        assert_eq!(read_to_eof(host), b"");
    }
}

#[test]
fn waiting_resets_are_bounded() {
    let mut bench = Bench::new();
    let mut taken = 0;
    while bench.mux.accepts_packets() {
        bench.send(Key { guest_port: taken, host_port: 1 }, op::RW);
        taken += 1;
    }
    assert_eq!(taken as usize, MAX_WAITING_RESETS);
    bench.expect(op::RST);
    assert!(bench.mux.accepts_packets());
}

//! Connections that open, are refused, or break the protocol.

use super::*;

#[test]
fn the_guest_connects_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let (key, mut host) = bench.accepted(5000);
    bench.data(key, b"ping");
    assert_eq!(read_all_there(&mut host), b"ping");
    host.write_all(b"pong").unwrap();
    let (header, data) = bench.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt, &data[..]), (op::RW, 4, &b"pong"[..]));
    bench.expect_nothing();
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let mut host = bench.connect(9, 52);
    host.write_all(b"early").unwrap();
    let request = bench.expect(op::REQUEST);
    assert_eq!((request.dst_port, request.buf_alloc), (52, WINDOW));
    bench.expect_nothing();
    assert!(bench.sink.connected.is_empty());

    let key = Key { guest_port: 52, host_port: request.src_port };
    bench.send(key, op::RESPONSE);
    assert_eq!(bench.sink.connected, [9]);
    assert_eq!(bench.next().unwrap().1, b"early");
    bench.data(key, b"answer");
    assert_eq!(read_all_there(&mut host), b"answer");
    // No time-out any more.
    bench.expire_after(CONNECT_TIMEOUT * 2);
    bench.expect_nothing();
    assert!(bench.sink.refused.is_empty());
}

#[test]
fn connections_to_one_port_have_host_ports_of_their_own() {
    let mut bench = Bench::new();
    let _hosts: Vec<_> = (0..3).map(|id| bench.connect(id, 52)).collect();
    let mut ports: Vec<_> = (0..3).map(|_| bench.expect(op::REQUEST).src_port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 3);
}

#[test]
fn a_reset_refuses_the_hosts_connect_and_closes_its_socket() {
    let mut bench = Bench::new();
    let mut host = bench.connect(3, 52);
    let request = bench.expect(op::REQUEST);
    bench.send(Key { guest_port: 52, host_port: request.src_port }, op::RST);
    assert_eq!(bench.sink.refused.len(), 1);
    assert_eq!(bench.sink.refused[0].0, 3);
    assert_eq!(read_to_eof(&mut host), b"");
    bench.assert_empty();
}

#[test]
fn a_connect_that_is_not_answered_is_refused_and_reset() {
    let mut bench = Bench::new();
    let _known = bench.connect(1, 52);
    let request = bench.expect(op::REQUEST);
    let _unknown = bench.connect(2, 53);
    bench.expire_after(CONNECT_TIMEOUT - Duration::from_millis(1));
    assert!(bench.sink.refused.is_empty());
    bench.expire_after(Duration::from_millis(1));
    let mut refused: Vec<_> = bench.sink.refused.iter().map(|(id, _)| *id).collect();
    refused.sort_unstable();
    assert_eq!(refused, [1, 2]);
    // Of the second the guest has never heard.
    bench.expect_reset(Key { guest_port: 52, host_port: request.src_port });
    bench.assert_empty();
    assert_eq!(bench.mux.next_deadline(), None);
}

#[test]
fn impossible_connects_are_refused() {
    let mut bench = Bench::new();
    drop(bench.connect(1, u32::MAX));
    let file = std::fs::File::open("/dev/null").unwrap();
    let request = Connect { id: 2, port: 52, socket: file.into() };
    bench.mux.connect(request, &mut bench.sink, bench.now);
    assert_eq!(bench.sink.refused.len(), 2);
    bench.assert_empty();
}

#[test]
fn a_busy_host_refuses_the_guest() {
    let mut bench = Bench::new();
    bench.sink.busy = true;
    let key = Key { guest_port: 5000, host_port: 1024 };
    bench.send(key, op::REQUEST);
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn unknown_connections_are_reset_and_resets_are_not() {
    let mut bench = Bench::new();
    let key = Key { guest_port: 1, host_port: 2 };
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
        bench.send(key, op);
        bench.expect_reset(key);
    }
    bench.send(key, op::RST);
    bench.assert_empty();
}

#[test]
fn violations_end_the_connection_with_a_reset() {
    let violations: [fn(&mut Bench, Key); 5] = [
        |bench, key| bench.send(key, op::REQUEST),
        |bench, key| bench.send(key, op::RESPONSE),
        |bench, key| bench.send(key, 77),
        |bench, key| bench.send_with(key, op::CREDIT_UPDATE, 0, b"unexpected"),
        |bench, key| {
            bench.shutdown(key, SEND);
            bench.data(key, b"after my own end");
        },
    ];
    for violate in violations {
        let mut bench = Bench::new();
        let (key, mut host) = bench.accepted(5000);
        violate(&mut bench, key);
        assert_eq!(read_to_eof(&mut host), b"");
        bench.expect_reset(key);
        bench.assert_empty();
    }
}

#[test]
fn data_before_the_response_refuses_the_hosts_connect() {
    let mut bench = Bench::new();
    let _host = bench.connect(4, 52);
    let key = Key { guest_port: 52, host_port: bench.expect(op::REQUEST).src_port };
    bench.data(key, b"too early");
    assert_eq!(bench.sink.refused.len(), 1);
    bench.expect_reset(key);
    bench.assert_empty();
}

#[test]
fn a_malformed_packet_refuses_the_hosts_connect() {
    let mut bench = Bench::new();
    let _host = bench.connect(4, 52);
    let key = Key { guest_port: 52, host_port: bench.expect(op::REQUEST).src_port };
    bench.send(key, 99);
    assert_eq!(bench.sink.refused.len(), 1);
    bench.expect_reset(key);
    bench.assert_empty();
}

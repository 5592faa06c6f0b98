use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::credit::WINDOW;
use super::super::host::HostBusy;
use super::super::packet::{Credit, HOST_CID, shutdown_flags};
use super::*;

const GUEST: u64 = 42;
const ROOM: usize = 4096 - 44;
const SEND: Directions = Directions { send: true, receive: false };
const RECEIVE: Directions = Directions { send: false, receive: true };

#[derive(Debug, Default)]
struct Sink {
    busy: bool,
    accepted: Vec<(u32, u32, UnixStream)>,
    connected: Vec<u32>,
    refused: Vec<(u32, String)>,
}

impl HostSink for Sink {
    fn accepted(&mut self, port: u32, guest_port: u32, socket: OwnedFd) -> Result<(), HostBusy> {
        if self.busy {
            return Err(HostBusy);
        }
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true).unwrap();
        self.accepted.push((port, guest_port, socket));
        Ok(())
    }

    fn connected(&mut self, id: u32) {
        self.connected.push(id);
    }

    fn refused(&mut self, id: u32, reason: &str) {
        self.refused.push((id, reason.to_owned()));
    }
}

/// Plays the guest's kernel and the host's process around a multiplexer.
struct Bench {
    mux: Mux,
    sink: Sink,
    now: Instant,
    /// What the guest says in its packets.
    credit: Credit,
}

type Given = (Header, Vec<u8>);

impl Bench {
    fn new() -> Self {
        Bench {
            mux: Mux::new(GUEST).unwrap(),
            sink: Sink::default(),
            now: Instant::now(),
            credit: Credit { buf_alloc: 1 << 20, fwd_cnt: 0 },
        }
    }

    fn send_with(&mut self, key: Key, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: key.guest_port,
            dst_port: key.host_port,
            len: payload.len() as u32,
            kind: 1,
            op,
            flags,
            buf_alloc: self.credit.buf_alloc,
            fwd_cnt: self.credit.fwd_cnt,
        };
        let bytes = [&header.encode()[..], payload].concat();
        self.mux.receive(&bytes, &mut self.sink, self.now);
    }

    fn send(&mut self, key: Key, op: u16) {
        self.send_with(key, op, 0, &[]);
    }

    fn data(&mut self, key: Key, payload: &[u8]) {
        self.send_with(key, op::RW, 0, payload);
    }

    fn shutdown(&mut self, key: Key, directions: Directions) {
        self.send_with(key, op::SHUTDOWN, shutdown_flags(directions), &[]);
    }

    fn poll(&mut self) {
        self.mux.poll_sockets(&mut self.sink, self.now).unwrap();
    }

    /// The next packet for the guest, as far as the sockets have one now.
    fn next(&mut self) -> Option<Given> {
        self.poll();
        if !self.mux.stage(&mut self.sink, self.now) {
            return None;
        }
        let (header, data) = self.mux.take(ROOM).expect("what was staged");
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST, 1));
        assert_eq!(header.len as usize, data.len());
        Some((header, data.to_vec()))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, data) = self.next().expect("a packet");
        assert_eq!((header.op, data.len()), (op, 0));
        header
    }

    fn expect_nothing(&mut self) {
        assert_eq!(self.next(), None);
    }

    fn expect_reset(&mut self, key: Key) {
        let header = self.expect(op::RST);
        assert_eq!((header.dst_port, header.src_port), (key.guest_port, key.host_port));
    }

    /// A connection that the guest made, and the host's end of it.
    fn accepted(&mut self, guest_port: u32) -> (Key, UnixStream) {
        let key = Key { guest_port, host_port: 1024 };
        self.send(key, op::REQUEST);
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.dst_port, response.src_port), (guest_port, 1024));
        assert_eq!((response.buf_alloc, response.fwd_cnt), (WINDOW, 0));
        let (port, from, socket) = self.sink.accepted.pop().unwrap();
        assert_eq!((port, from), (1024, guest_port));
        (key, socket)
    }

    fn connect(&mut self, id: u32, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let request = Connect { id, port, socket: theirs.into() };
        self.mux.connect(request, &mut self.sink, self.now);
        ours
    }

    fn expire_after(&mut self, time: Duration) {
        self.now += time;
        self.mux.expire(&mut self.sink, self.now);
    }

    fn assert_empty(&mut self) {
        self.expect_nothing();
        assert!(self.mux.connections.is_empty());
        assert!(self.mux.by_key.is_empty());
        assert!(self.mux.ready.is_empty());
    }
}

fn read_all_there(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bytes,
        other => panic!("expected an open stream: {other:?}"),
    }
}

fn read_to_eof(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).expect("an orderly end");
    bytes
}

/// Writes until the socket takes no more, for at most `limit` bytes.
fn write_until_full(socket: &mut UnixStream, limit: usize) -> usize {
    let block = [7; 4096];
    let mut total = 0;
    while total < limit {
        match socket.write(&block) {
            Ok(written) => total += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    total
}

fn pseudo_random(len: usize, mut seed: u64) -> Vec<u8> {
    let mut step = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    };
    (0..len).map(|_| step()).collect()
}

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

/// A step of a hostile guest, or of its host.
#[derive(Debug, Clone)]
enum Step {
    Packet { guest_port: u32, host_port: u32, op: u16, flags: u32, len: usize, claim: Option<u32> },
    Raw(Vec<u8>),
    Credit { buf_alloc: u32, fwd_cnt: u32 },
    HostConnects { port: u32 },
    HostWrites(usize),
    HostReads(usize),
    HostCloses(usize),
    HostHalfCloses(usize),
    Take(usize),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let packet = (0..4u32, 0..3u32, 0..9u16, 0..4u32, 0..3000usize, any::<Option<u32>>(), 0..8u8)
        .prop_map(|(guest_port, host_port, op, flags, len, claim, lie)| Step::Packet {
            guest_port,
            // Also ports of connections that the host made.
            host_port: if host_port == 2 { FIRST_HOST_PORT } else { host_port },
            op,
            flags,
            len: if op == op::RW { len * 20 } else { 0 },
            claim: claim.filter(|_| lie == 0),
        });
    prop_oneof![
        8 => packet,
        1 => proptest::collection::vec(any::<u8>(), 0..80).prop_map(Step::Raw),
        1 => (0..200_000u32, any::<u32>()).prop_map(|(buf_alloc, fwd_cnt)| Step::Credit { buf_alloc, fwd_cnt }),
        1 => (0..4u32).prop_map(|port| Step::HostConnects { port }),
        2 => any::<usize>().prop_map(Step::HostWrites),
        2 => any::<usize>().prop_map(Step::HostReads),
        1 => any::<usize>().prop_map(Step::HostCloses),
        1 => any::<usize>().prop_map(Step::HostHalfCloses),
        4 => (1..5000usize).prop_map(Step::Take),
        1 => (0..40u64).prop_map(Step::Time),
    ]
}

fn pick(hosts: &mut [UnixStream], index: usize) -> Option<&mut UnixStream> {
    let len = hosts.len();
    hosts.get_mut(index.checked_rem(len)?)
}

fn apply(bench: &mut Bench, hosts: &mut Vec<UnixStream>, step: &Step) {
    match *step {
        Step::Packet { guest_port, host_port, op, flags, len, claim } => {
            let header = Header {
                src_cid: GUEST,
                dst_cid: HOST_CID,
                src_port: guest_port,
                dst_port: host_port,
                len: claim.unwrap_or(len as u32),
                kind: 1,
                op,
                flags,
                buf_alloc: bench.credit.buf_alloc,
                fwd_cnt: bench.credit.fwd_cnt,
            };
            let bytes = [&header.encode()[..], &vec![9; len]].concat();
            bench.mux.receive(&bytes, &mut bench.sink, bench.now);
        }
        Step::Raw(ref bytes) => bench.mux.receive(bytes, &mut bench.sink, bench.now),
        Step::Credit { buf_alloc, fwd_cnt } => bench.credit = Credit { buf_alloc, fwd_cnt },
        Step::HostConnects { port } => hosts.push(bench.connect(port, port)),
        // Sockets may be shut or closed already: any outcome will do.
        Step::HostWrites(index) => {
            let _ = pick(hosts, index).map(|host| host.write(&[3; 3000]));
        }
        Step::HostReads(index) => {
            let _ = pick(hosts, index).map(|host| host.read(&mut [0; 3000]));
        }
        Step::HostCloses(index) => {
            if !hosts.is_empty() {
                hosts.swap_remove(index % hosts.len());
            }
        }
        Step::HostHalfCloses(index) => {
            let _ = pick(hosts, index).map(|host| host.shutdown(Shutdown::Write));
        }
        Step::Take(room) => {
            bench.poll();
            if bench.mux.stage(&mut bench.sink, bench.now) {
                let (header, data) = bench.mux.take(room).expect("what was staged");
                assert!(data.len() <= room && header.len as usize == data.len());
            }
        }
        Step::Time(seconds) => bench.expire_after(Duration::from_secs(seconds)),
    }
    hosts.extend(bench.sink.accepted.drain(..).map(|(_, _, socket)| socket));
}

fn assert_consistent(mux: &Mux) {
    assert!(mux.connections.len() <= MAX_CONNECTIONS);
    assert!(mux.resets.len() <= MAX_WAITING_RESETS + MAX_CONNECTIONS);
    for (key, id) in &mux.by_key {
        assert_eq!(mux.connections[id].key, *key);
        assert_ne!(mux.connections[id].state(), State::Closed);
    }
    for (id, connection) in &mux.connections {
        assert!(connection.pending_len() <= WINDOW as usize);
        let known = mux.by_key.get(&connection.key) == Some(id);
        assert!(known || (connection.state() == State::Closed && connection.has_pending()));
        let listed = mux.ready.iter().filter(|other| *other == id).count();
        assert_eq!(listed, usize::from(connection.queued));
    }
    assert!(mux.ready.iter().all(|id| mux.connections.contains_key(id)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_sequence_of_packets_breaks_or_leaks(steps in proptest::collection::vec(step(), 0..200)) {
        let mut bench = Bench::new();
        let mut hosts = Vec::new();
        let mut asked = 0;
        for step in &steps {
            if bench.mux.accepts_packets() {
                asked += usize::from(matches!(step, Step::HostConnects { .. }));
                apply(&mut bench, &mut hosts, step);
            }
            assert_consistent(&bench.mux);
        }

        // The host's process goes away, the guest resets what it knows: nothing is left.
        drop(hosts);
        bench.credit = Credit { buf_alloc: u32::MAX, fwd_cnt: 0 };
        bench.poll();
        let keys: Vec<_> = bench.mux.by_key.keys().copied().collect();
        for key in keys {
            bench.send(key, op::RST);
        }
        for _ in 0..10 {
            bench.poll();
        }
        while bench.next().is_some() {}
        bench.assert_empty();
        // Every request of the host's was answered exactly once.
        prop_assert_eq!(bench.sink.connected.len() + bench.sink.refused.len(), asked);
    }
}

//! A bench around a multiplexer, and what its tests need by subject.

mod bounds;
mod carrying;
mod closing;
mod opening;
mod sequences;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

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

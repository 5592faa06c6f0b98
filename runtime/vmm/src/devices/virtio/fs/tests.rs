//! The device against a back-end of vhost-user that the tests play.

use std::collections::BTreeMap;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::status::DEVICE_NEEDS_RESET;
use super::super::testing::{Buffer, Driver, activation, interrupt, wait_until};
use super::super::{F_VERSION_1, INTERRUPT_USED_RING, Interrupt};
use super::protocol::{F_PROTOCOL_FEATURES, HEADER_LEN, PROTOCOL_F_REPLY_ACK};
use super::*;
use crate::GuestMemory;
use crate::machine::report::{self, Reports, VmEvent};
use crate::memory::{self, Sharing};

const OFFERED: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | RING_FEATURES;
const REPLY: u32 = 1 | 1 << 2;

/// A request as it arrives.
struct Message {
    code: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    wants_reply: bool,
}

impl Message {
    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.payload[at..at + 8].try_into().unwrap())
    }
}

/// The back-end's side of the socket.
struct Server(UnixStream);

impl Server {
    /// `None` when the front-end is gone.
    fn receive(&mut self) -> Option<Message> {
        let mut header = [0; HEADER_LEN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut header)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let got = recvmsg(&self.0, &mut iov, &mut ancillary, flags).ok()?;
        if got.bytes < HEADER_LEN {
            return None;
        }
        let fds = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                _ => Vec::new(),
            })
            .collect();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        std::io::Read::read_exact(&mut self.0, &mut payload).ok()?;
        Some(Message { code: word(0), payload, fds, wants_reply: word(4) & 8 != 0 })
    }

    fn send(&mut self, words: [u32; 3], payload: &[u8]) {
        let header = words.map(u32::to_ne_bytes).concat();
        self.0.write_all(&[&header, payload].concat()).unwrap();
    }

    fn reply(&mut self, code: u32, number: u64) {
        self.send([code, REPLY, 8], &number.to_ne_bytes());
    }
}

/// What a queue's server was told of it.
#[derive(Debug, Default)]
struct Told {
    size: u16,
    /// Descriptor, device and driver area.
    areas: (u64, u64, u64),
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    stopped: bool,
}

/// Everything that a server was told in a session.
#[derive(Debug, Default)]
struct Session {
    codes: Vec<u32>,
    features: u64,
    memory: Vec<(u64, u64, u64, u64, std::fs::File)>,
    queues: BTreeMap<u32, Told>,
}

impl Session {
    fn take(&mut self, message: Message) -> u64 {
        self.codes.push(message.code);
        let index = if message.payload.is_empty() { 0 } else { message.u32(0) };
        match message.code {
            1 => return OFFERED,
            2 => self.features = message.u64(0),
            3 => assert!(message.payload.is_empty()),
            5 => {
                for (index, fd) in (0..message.u32(0) as usize).zip(message.fds) {
                    let at = |field: usize| {
                        let at = 8 + index * 32 + field * 8;
                        u64::from_ne_bytes(message.payload[at..at + 8].try_into().unwrap())
                    };
                    self.memory.push((at(0), at(1), at(2), at(3), fd.into()));
                }
            }
            8 => self.queue(index).size = message.u32(4) as u16,
            9 => {
                let areas = (message.u64(8), message.u64(16), message.u64(24));
                self.queue(index).areas = areas;
            }
            10 => assert_eq!(message.u32(4), 0),
            11 => {
                self.queue(index).stopped = true;
                return message.u64(0);
            }
            12 => self.queue(index).kick = message.fds.into_iter().next(),
            13 => self.queue(index).call = message.fds.into_iter().next(),
            15 => return PROTOCOL_F_REPLY_ACK | 1,
            16 => assert_eq!(message.u64(0), PROTOCOL_F_REPLY_ACK),
            18 => self.queue(index).enabled = message.u32(4) == 1,
            code => panic!("request {code}"),
        }
        0
    }

    fn queue(&mut self, index: u32) -> &mut Told {
        self.queues.entry(index).or_default()
    }
}

/// Serves the protocol until `done` says so, or the front-end is gone.
fn serve(server: &mut Server, mut done: impl FnMut(&Session) -> bool) -> Session {
    let mut session = Session::default();
    while !done(&session) {
        let Some(message) = server.receive() else { break };
        let (code, answers) = (message.code, message.wants_reply);
        let number = session.take(message);
        if answers || [1, 11, 15].contains(&code) {
            server.reply(code, number);
        }
    }
    session
}

fn is_started(session: &Session) -> bool {
    session.queues.len() == 2 && session.queues.values().all(|queue| queue.enabled)
}

struct Rig {
    fs: Fs,
    memory: GuestMemory,
    high: Driver,
    requests: Driver,
    interrupt: Interrupt,
    reports: Reports,
}

/// An active device and its server's end of the socket.
fn rig() -> (Rig, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let memory = memory::map(48, Sharing::Shared).unwrap();
    let mut rig = Rig {
        fs: Fs::new("husk", ours.into()),
        high: Driver::new(&memory, 0, 64),
        requests: Driver::new(&memory, 1, 128),
        memory,
        interrupt: interrupt(),
        reports: report::channel().unwrap().1,
    };
    rig.activate();
    (rig, Server(theirs))
}

impl Rig {
    fn activate(&mut self) {
        let (reporter, reports) = report::channel().unwrap();
        let drivers = [&self.high, &self.requests];
        let activation = activation(&drivers, &self.interrupt, RING_FEATURES);
        self.fs.activate(Activation { reporter, ..activation }).unwrap();
        self.reports = reports;
    }

    /// Makes a FUSE request available, with room for a reply of `room` bytes; where that is.
    fn request(&mut self, unique: u64, room: u32) -> u64 {
        let words = [40_u32, 3].map(u32::to_ne_bytes).concat();
        let header = [&words, &unique.to_ne_bytes()[..], &[0; 24]].concat();
        let (out, into) = (self.requests.place(&header), self.requests.alloc(room.max(1)));
        let mut buffers = vec![Buffer::Out(out, 40)];
        if room > 0 {
            buffers.push(Buffer::In(into, room));
        }
        self.requests.add(&buffers);
        into
    }

    fn reply(&self, at: u64) -> (u32, i32, u64) {
        let bytes = self.requests.bytes(at, 16);
        let word = |at: usize| bytes[at..at + 4].try_into().unwrap();
        let unique = u64::from_ne_bytes(bytes[8..].try_into().unwrap());
        (u32::from_ne_bytes(word(0)), i32::from_ne_bytes(word(4)), unique)
    }

    /// Waits until the loss of the server is reported; why.
    fn lost(&self) -> String {
        let mut told = None;
        wait_until(|| {
            told = self.reports.drain().into_iter().next();
            told.is_some()
        });
        match told {
            Some(VmEvent::FileServerLost { reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    /// That requests are answered although nobody serves them.
    fn assert_orphaned(&mut self, unique: u64) {
        let at = self.request(unique, 16);
        assert_eq!(self.requests.kick_and_wait().1, 16);
        assert_eq!(self.reply(at), (16, -libc::ENOTCONN, unique));
    }
}

fn in_background(mut server: Server) -> JoinHandle<(Server, Session)> {
    std::thread::spawn(move || {
        let session = serve(&mut server, is_started);
        (server, session)
    })
}

#[test]
fn the_server_gets_guest_memory_and_every_queue() {
    let (rig, server) = rig();
    let (_server, session) = in_background(server).join().unwrap();
    assert_eq!(session.features, F_VERSION_1 | F_PROTOCOL_FEATURES | RING_FEATURES);
    let [(address, len, user_address, offset, file)] = session.memory.as_slice() else {
        panic!("{:?}", session.memory);
    };
    assert_eq!((*address, *len, *user_address, *offset), (0, 48 << 20, 0, 0));
    rig.memory.write_slice(b"guest", GuestAddress(0x1234)).unwrap();
    let mut seen = [0; 5];
    file.read_exact_at(&mut seen, 0x1234).unwrap();
    assert_eq!(&seen, b"guest");
    for (index, driver) in [(0, &rig.high), (1, &rig.requests)] {
        let told = &session.queues[&index];
        assert_eq!(
            (told.size, told.areas),
            (driver.size, (driver.desc, driver.used, driver.avail))
        );
    }
}

#[test]
fn kicks_reach_the_server_and_its_calls_the_guest() {
    let (rig, server) = rig();
    let (_server, session) = in_background(server).join().unwrap();
    rig.requests.kick.write(1).unwrap();
    let mut count = [0; 8];
    let requests = &session.queues[&1];
    rustix::io::read(requests.kick.as_ref().unwrap(), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    assert_eq!(rig.interrupt.pending(), 0);
    for queue in [0, 1] {
        let before = rig.interrupt.counters().snapshot().interrupts;
        let call = session.queues[&queue].call.as_ref().unwrap();
        rustix::io::write(call, &1_u64.to_ne_bytes()).unwrap();
        wait_until(|| rig.interrupt.counters().snapshot().interrupts == before + 1);
    }
    assert_eq!(rig.interrupt.pending(), INTERRUPT_USED_RING);
}

#[test]
fn a_reset_takes_the_queues_back_and_the_next_activation_hands_them_over() {
    let (mut rig, server) = rig();
    let (mut server, first) = in_background(server).join().unwrap();
    assert!(first.codes.starts_with(&[3, 1, 15, 16, 2, 5]));
    let stopping = std::thread::spawn(move || {
        let stopped = |session: &Session| {
            session.queues.len() == 2 && session.queues.values().all(|queue| queue.stopped)
        };
        let session = serve(&mut server, stopped);
        (server, session)
    });
    rig.fs.reset();
    let (server, stopped) = stopping.join().unwrap();
    assert_eq!(stopped.codes, [11, 11]);
    rig.activate();
    let (_server, second) = in_background(server).join().unwrap();
    assert!(second.codes.starts_with(&[2, 5]), "{:?}", second.codes);
    assert!(is_started(&second));
}

#[test]
fn what_a_dead_server_has_not_answered_fails_and_so_does_what_comes_later() {
    let (mut rig, server) = rig();
    let (server, _session) = in_background(server).join().unwrap();
    let answered = rig.request(1, 16);
    let (pending, later) = (rig.request(2, 200), rig.request(3, 16));
    let without_reply = rig.request(4, 0);
    // The server answers the first, and dies before it can say so.
    let mut queue: Queue = rig.requests.queue(RING_FEATURES);
    queue.iter(&rig.memory).unwrap().next().unwrap();
    rig.memory.write_slice(&[0xaa; 16], GuestAddress(answered)).unwrap();
    queue.add_used(&rig.memory, 0, 16).unwrap();
    drop(server);

    assert!(rig.lost().contains("closed its connection"));
    let used: Vec<u32> = (0..4).map(|_| rig.requests.wait_used().1).collect();
    assert_eq!(used, [16, 16, 16, 0]);
    assert_eq!(rig.requests.bytes(answered, 16), [0xaa; 16], "an answer that was given stays");
    assert_eq!(rig.reply(pending), (16, -libc::ENOTCONN, 2));
    assert_eq!(rig.reply(later), (16, -libc::ENOTCONN, 3));
    assert_eq!(rig.requests.bytes(without_reply, 1), [0]);
    assert!(rig.interrupt.pending() & INTERRUPT_USED_RING != 0);
    rig.assert_orphaned(5);
    // FORGET, on the other queue.
    let at = rig.high.place(&[0; 48]);
    rig.high.add(&[Buffer::Out(at, 48)]);
    assert_eq!(rig.high.kick_and_wait().1, 0);
    assert_eq!(rig.interrupt.status() & DEVICE_NEEDS_RESET, 0);
}

#[test]
fn a_device_whose_server_is_gone_can_be_reset_and_still_answers() {
    let (mut rig, server) = rig();
    drop(server);
    rig.lost();
    rig.assert_orphaned(1);
    rig.fs.reset();
    rig.requests = Driver::new(&rig.memory, 2, 128);
    rig.high = Driver::new(&rig.memory, 3, 64);
    rig.activate();
    rig.assert_orphaned(2);
}

#[test]
fn a_guest_that_breaks_an_orphaned_ring_only_needs_a_reset() {
    let (mut rig, server) = rig();
    drop(server);
    rig.lost();
    rig.requests.set_avail_idx(5000);
    rig.requests.kick.write(1).unwrap();
    wait_until(|| rig.interrupt.status() & DEVICE_NEEDS_RESET != 0);
}

#[test]
fn a_server_that_lies_is_given_up() {
    type Lie = fn(&mut Server, &Message);
    let cases: [(Lie, &str); 5] = [
        (|server, _| server.send([1, REPLY, 4096], &[0; 4096]), "has a length of 4096"),
        (|server, _| server.send([7, REPLY, 8], &[0; 8]), "is no reply to request 1"),
        (|server, _| server.send([1, 1, 8], &[0; 8]), "is no reply to request 1"),
        (|server, _| server.reply(1, F_VERSION_1), "lacks features"),
        (|server, _| server.0.shutdown(std::net::Shutdown::Both).unwrap(), "closed"),
    ];
    for (lie, expected) in cases {
        let (mut rig, mut server) = rig();
        // SET_OWNER has no reply; then it is asked for its features.
        assert_eq!(server.receive().unwrap().code, 3);
        let asked = server.receive().unwrap();
        assert_eq!(asked.code, 1);
        lie(&mut server, &asked);
        let reason = rig.lost();
        assert!(reason.contains(expected), "{reason}");
        rig.assert_orphaned(1);
    }
}

#[test]
fn a_server_that_speaks_unasked_is_given_up() {
    let (mut rig, server) = rig();
    let (mut server, _session) = in_background(server).join().unwrap();
    server.reply(2, 0);
    assert!(rig.lost().contains("unasked"));
    rig.assert_orphaned(1);
    // It is told.
    assert!(server.receive().is_none());
}

#[test]
fn a_server_that_refuses_is_given_up_by_the_requests_name() {
    let (mut rig, mut server) = rig();
    loop {
        let message = server.receive().unwrap();
        match message.code {
            1 => server.reply(1, OFFERED),
            15 => server.reply(15, PROTOCOL_F_REPLY_ACK),
            5 => break server.reply(5, 1),
            code if message.wants_reply => server.reply(code, 0),
            _ => {}
        }
    }
    assert!(rig.lost().contains("refuses request 5"));
    rig.assert_orphaned(1);
}

#[test]
fn the_configuration_space_names_the_tag_and_one_queue() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let fs = Fs::new("husk", ours.into());
    assert_eq!(&fs.config()[..5], b"husk\0");
    assert_eq!(fs.config()[TAG_LEN..], 1_u32.to_le_bytes());
    assert_eq!(fs.config().len(), 40);
}

#[test]
fn memory_that_is_private_is_shared_with_nobody() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let memory = super::super::testing::memory();
    let (high, requests) = (Driver::new(&memory, 0, 64), Driver::new(&memory, 1, 128));
    let (mut fs, interrupt) = (Fs::new("husk", ours.into()), interrupt());
    let (reporter, reports) = report::channel().unwrap();
    let activation = activation(&[&high, &requests], &interrupt, RING_FEATURES);
    fs.activate(Activation { reporter, ..activation }).unwrap();
    let mut server = Server(theirs);
    let session = serve(&mut server, |_| false);
    assert!(session.memory.is_empty() && session.queues.is_empty());
    wait_until(|| !reports.drain().is_empty());
}

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Buffer, Driver, activation, interrupt, memory, wait_until};
use super::super::{F_EVENT_IDX, Interrupt, status};
use super::mux::MAX_WAITING_RESETS;
use super::packet::{HOST_CID, Header, op};
use super::*;

const GUEST: u64 = 42;
const RX_BUFFER: u32 = 4096;
const RX_BUFFERS: u16 = 16;

#[derive(Debug, Default)]
struct Seen {
    accepted: Vec<(u32, u32, UnixStream)>,
    connected: Vec<u32>,
    refused: Vec<u32>,
}

#[derive(Debug, Clone, Default)]
struct Sink(Arc<Mutex<Seen>>);

impl HostSink for Sink {
    fn accepted(&mut self, port: u32, guest_port: u32, socket: OwnedFd) -> Result<(), HostBusy> {
        self.0.lock().unwrap().accepted.push((port, guest_port, socket.into()));
        Ok(())
    }

    fn connected(&mut self, id: u32) {
        self.0.lock().unwrap().connected.push(id);
    }

    fn refused(&mut self, id: u32, _reason: &str) {
        self.0.lock().unwrap().refused.push(id);
    }
}

/// The guest's driver of one activation.
struct Guest {
    rx: Driver,
    tx: Driver,
    event: Driver,
    interrupt: Interrupt,
    /// Addresses of the receive buffers in the order in which they are out.
    buffers: std::collections::VecDeque<u64>,
    tx_buffer: u64,
    received: u32,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        // Indices apart, for room on each one's heap.
        let rx = Driver::new(&memory, 0, 128);
        let mut tx = Driver::new(&memory, 4, 128);
        let event = Driver::new(&memory, 8, 16);
        let tx_buffer = tx.alloc(MAX_PACKET as u32);
        Guest {
            rx,
            tx,
            event,
            interrupt: interrupt(),
            buffers: std::collections::VecDeque::new(),
            tx_buffer,
            received: 0,
        }
    }

    fn activate(&self, device: &mut Vsock) {
        let drivers = [&self.rx, &self.tx, &self.event];
        device.activate(activation(&drivers, &self.interrupt, RING_FEATURES)).unwrap();
    }

    fn add_buffers(&mut self) {
        for _ in 0..RX_BUFFERS {
            let at = self.rx.alloc(RX_BUFFER);
            self.rx.add(&[Buffer::In(at, 44), Buffer::In(at + 44, RX_BUFFER - 44)]);
            self.buffers.push_back(at);
        }
        self.rx.kick.write(1).unwrap();
    }

    /// Sends without waiting for the device.
    fn post(&mut self, ports: (u32, u32), op: u16, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            len: payload.len() as u32,
            kind: 1,
            op,
            flags: 3,
            buf_alloc: 65536,
            fwd_cnt: self.received,
        };
        let at = self.tx_buffer;
        self.tx.memory.write_slice(&header.encode(), GuestAddress(at)).unwrap();
        self.tx.memory.write_slice(payload, GuestAddress(at + 44)).unwrap();
        let mut buffers = vec![Buffer::Out(at, 44)];
        if !payload.is_empty() {
            buffers.push(Buffer::Out(at + 44, payload.len() as u32));
        }
        self.tx.add(&buffers);
        self.tx.kick.write(1).unwrap();
    }

    fn send(&mut self, ports: (u32, u32), op: u16, payload: &[u8]) {
        self.post(ports, op, payload);
        self.tx.wait_used();
    }

    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (_, len) = self.rx.pop_used()?;
        let at = self.buffers.pop_front().unwrap();
        let bytes = self.rx.bytes(at, len as usize);
        self.rx.add(&[Buffer::In(at, 44), Buffer::In(at + 44, RX_BUFFER - 44)]);
        self.buffers.push_back(at);
        self.rx.kick.write(1).unwrap();
        let (header, payload) = Header::parse(&bytes).unwrap();
        assert_eq!(header.len as usize, payload.len());
        self.received = self.received.wrapping_add(header.len);
        Some((header, payload.to_vec()))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut packet = None;
        wait_until(|| {
            packet = self.try_receive();
            packet.is_some()
        });
        packet.unwrap()
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op);
        header
    }
}

fn device() -> (Vsock, VsockHandle, Sink) {
    let sink = Sink::default();
    let (device, handle) = Vsock::new(GUEST, Box::new(sink.clone())).unwrap();
    (device, handle, sink)
}

fn accepted(guest: &mut Guest, sink: &Sink, port: u32) -> UnixStream {
    guest.send((port, 1024), op::REQUEST, &[]);
    guest.expect(op::RESPONSE);
    sink.0.lock().unwrap().accepted.pop().unwrap().2
}

#[test]
fn the_driver_sees_a_vsock_device_with_its_context_id() {
    let (device, _handle, _sink) = device();
    assert_eq!(device.device_id(), 19);
    assert_eq!(device.queue_max_sizes().len(), 3);
    assert_eq!(device.config(), GUEST.to_le_bytes());
}

#[test]
fn an_echo_through_the_queues_returns_every_byte() {
    const LEN: usize = 1 << 20;
    let (mut device, _handle, sink) = device();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let mut host = accepted(&mut guest, &sink, 5000);
    let echo = std::thread::spawn(move || {
        let mut buffer = vec![0; 30_000];
        loop {
            match host.read(&mut buffer).unwrap() {
                0 => break,
                len => host.write_all(&buffer[..len]).unwrap(),
            }
        }
    });
    let sent: Vec<u8> = (0..LEN).map(|i| (i * 31 / 7) as u8).collect();
    let mut got = Vec::new();
    let (mut at, mut known) = (0, (128 * 1024_u32, 0));
    while got.len() < LEN {
        let room = known.0 - (at as u32).wrapping_sub(known.1);
        let len = (LEN - at).min(room as usize).min(50_000);
        // The guest's own buffer is not exceeded either: the echo waits in the host meanwhile.
        if len > 0 {
            guest.send((5000, 1024), op::RW, &sent[at..at + len]);
            at += len;
        } else if got.len() < at {
            let (header, data) = guest.receive();
            known = (header.buf_alloc, header.fwd_cnt);
            got.extend_from_slice(&data);
            match header.op {
                op::RW => {}
                op::CREDIT_UPDATE => continue,
                other => assert_eq!(other, op::CREDIT_REQUEST),
            }
            guest.send((5000, 1024), op::CREDIT_UPDATE, &[]);
        }
        while let Some((header, data)) = guest.try_receive() {
            known = (header.buf_alloc, header.fwd_cnt);
            got.extend_from_slice(&data);
            guest.send((5000, 1024), op::CREDIT_UPDATE, &[]);
        }
    }
    assert!(got == sent, "bytes differ");
    guest.send((5000, 1024), op::SHUTDOWN, &[]);
    while guest.receive().0.op != op::RST {}
    echo.join().unwrap();
    let counts = guest.interrupt.counters().snapshot();
    assert!(counts.bytes_from_guest >= LEN as u64 && counts.bytes_to_guest >= LEN as u64);
}

#[test]
fn a_connect_before_the_guest_is_there_waits_for_it() {
    let (mut device, handle, sink) = device();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    handle.connect(7, 52, theirs.into()).unwrap();
    ours.write_all(b"hello").unwrap();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 52);
    guest.send((52, request.src_port), op::RESPONSE, &[]);
    assert_eq!(guest.receive().1, b"hello");
    assert_eq!(sink.0.lock().unwrap().connected, [7]);
}

#[test]
fn waiting_connects_are_bounded_and_answered_when_the_device_goes() {
    let (device, handle, sink) = device();
    for id in 0..MAX_WAITING_CONNECTS as u32 {
        handle.connect(id, 52, UnixStream::pair().unwrap().1.into()).unwrap();
    }
    let over = handle.connect(1000, 52, UnixStream::pair().unwrap().1.into());
    assert!(matches!(over, Err(ConnectError::Full)));
    drop(device);
    assert_eq!(sink.0.lock().unwrap().refused.len(), MAX_WAITING_CONNECTS);
    let gone = handle.connect(1001, 52, UnixStream::pair().unwrap().1.into());
    assert!(matches!(gone, Err(ConnectError::Gone)));
}

#[test]
fn a_reset_ends_all_connections_and_the_device_works_after_it() {
    let (mut device, handle, sink) = device();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let mut first = accepted(&mut guest, &sink, 5000);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    handle.connect(8, 52, theirs.into()).unwrap();
    guest.expect(op::REQUEST);

    device.reset();
    assert_eq!(first.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(ours.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(sink.0.lock().unwrap().refused, [8]);
    device.reset();

    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let mut second = accepted(&mut guest, &sink, 5000);
    guest.send((5000, 1024), op::RW, b"again");
    let mut got = [0; 5];
    second.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"again");
}

#[test]
fn receive_buffers_without_room_need_a_reset() {
    for buffer in [Buffer::In(0x30_0000, 44), Buffer::Out(0x30_0000, 4096)] {
        let (mut device, _handle, _sink) = device();
        let mut guest = Guest::new();
        guest.activate(&mut device);
        guest.rx.add(&[buffer]);
        guest.rx.kick.write(1).unwrap();
        guest.post((5000, 1024), op::REQUEST, &[]);
        wait_until(|| guest.interrupt.status() & status::DEVICE_NEEDS_RESET != 0);
        device.reset();
    }
}

#[test]
fn packets_wait_while_too_many_resets_do() {
    let (mut device, _handle, _sink) = device();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    let mut port = 0;
    for _ in 0..MAX_WAITING_RESETS {
        guest.send((port, 1), op::RW, &[]);
        port += 1;
    }
    // No receive buffers: no more packets are taken.
    guest.post((port, 1), op::RW, &[]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.tx.pop_used(), None);
    guest.add_buffers();
    guest.tx.wait_used();
    for port in 0..=port {
        let reset = guest.expect(op::RST);
        assert_eq!(reset.dst_port, port);
    }
}

#[test]
fn a_chain_too_short_for_a_header_is_returned_and_forgotten() {
    let (mut device, _handle, sink) = device();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let at = guest.tx_buffer;
    guest.tx.add(&[Buffer::Out(at, 43)]);
    guest.tx.kick_and_wait();
    guest.tx.add(&[Buffer::In(at, 4096)]);
    guest.tx.kick_and_wait();
    let _host = accepted(&mut guest, &sink, 5000);
    assert_eq!(guest.interrupt.status(), 0);
}

#[test]
fn packets_that_were_taken_are_told_of_with_others_or_in_the_end() {
    let (device, _handle, sink) = device();
    let mut guest = Guest::new();
    guest.add_buffers();
    let drivers = [&guest.rx, &guest.tx, &guest.event];
    // Without event indices every chance to interrupt is taken.
    let features = RING_FEATURES & !F_EVENT_IDX;
    let (queues, _wiring) = activation(&drivers, &guest.interrupt, features).split().unwrap();
    let mut handler = device.handler(queues).unwrap();
    let interrupts = guest.interrupt.clone();
    let interrupts = || interrupts.counters().snapshot().interrupts;
    let start = Instant::now();
    let mut pump = |at| {
        handler.tx_waits = true;
        assert_eq!(handler.pump(at).unwrap(), Progress::Done);
        handler.tell
    };

    // The answer to the first is the guest's next packet: one interrupt for both.
    guest.post((5000, 1024), op::REQUEST, &[]);
    assert_eq!((pump(start), interrupts()), (None, 1));
    let _host = sink.0.lock().unwrap().accepted.pop().unwrap();
    guest.expect(op::RESPONSE);

    // Nothing to say to the second: it is told of when its time is over.
    let due = start + UNTOLD_LIMIT;
    guest.post((5000, 1024), op::RW, b"a");
    assert_eq!((pump(start), interrupts()), (Some(due), 1));
    assert_eq!((pump(due - Duration::from_nanos(1)), interrupts()), (Some(due), 1));
    assert_eq!((pump(due), interrupts()), (None, 2));
    assert_eq!((pump(due + UNTOLD_LIMIT), interrupts()), (None, 2));

    // Many are told of at once.
    for count in 1..=MAX_UNTOLD {
        assert_eq!(interrupts(), 2);
        guest.post((5000, 1024), op::RW, b"a");
        assert_eq!(pump(due).is_none(), count == MAX_UNTOLD);
    }
    assert_eq!(interrupts(), 3);
}

#[test]
fn a_packet_that_nothing_follows_is_told_of_all_the_same() {
    let (mut device, _handle, sink) = device();
    let mut guest = Guest::new();
    guest.activate(&mut device);
    guest.add_buffers();
    let _host = accepted(&mut guest, &sink, 5000);
    let before = guest.interrupt.counters().snapshot().interrupts;
    guest.tx.set_used_event(guest.tx.used_idx());
    guest.send((5000, 1024), op::RW, b"a");
    wait_until(|| guest.interrupt.counters().snapshot().interrupts > before);
}

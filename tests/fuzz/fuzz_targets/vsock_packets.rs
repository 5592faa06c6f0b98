//! A guest's vsock packets, with a host's process that reads, writes and goes away: nothing panics,
//! and what is held stays bounded.
//!
//! The input is a list of steps, each a byte that says which and the bytes that it takes.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use husk_vmm::devices::virtio::vsock::{HostBusy, HostSink, Mux};
use libfuzzer_sys::fuzz_target;

const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;
const STREAM: u16 = 1;
/// Bytes of a packet's header that the input chooses: ports, length, operation, flags, credit.
const CHOSEN: usize = 1 + 1 + 2 + 1 + 1 + 4 + 4;

#[derive(Default)]
struct Host(Vec<UnixStream>);

impl HostSink for Host {
    fn accepted(&mut self, port: u32, _guest_port: u32, socket: OwnedFd) -> Result<(), HostBusy> {
        if port == 7 {
            return Err(HostBusy);
        }
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true).unwrap();
        self.0.push(socket);
        Ok(())
    }

    fn connected(&mut self, _id: u32) {}

    fn refused(&mut self, _id: u32, _reason: &str) {}
}

/// A packet whose addresses mostly fit, of the bytes at the front of `input`.
fn packet(chosen: &[u8; CHOSEN], raw: bool) -> Vec<u8> {
    let [from, to, len @ .., a, b, c, d, e, f, g, h] = *chosen;
    let [len_low, len_high, operation, flags] = len;
    let len = u16::from_le_bytes([len_low, len_high]);
    let mut bytes = Vec::new();
    let source = if raw { u64::from(flags) } else { GUEST_CID };
    bytes.extend_from_slice(&source.to_le_bytes());
    bytes.extend_from_slice(&HOST_CID.to_le_bytes());
    bytes.extend_from_slice(&u32::from(from % 8).to_le_bytes());
    bytes.extend_from_slice(&u32::from(to % 8).to_le_bytes());
    // Only data has a length, unless it is to be wrong.
    let said = if operation % 9 == 5 || raw { u32::from(len) } else { 0 };
    bytes.extend_from_slice(&said.to_le_bytes());
    bytes.extend_from_slice(&STREAM.to_le_bytes());
    bytes.extend_from_slice(&u16::from(operation % 9).to_le_bytes());
    bytes.extend_from_slice(&u32::from(flags).to_le_bytes());
    bytes.extend_from_slice(&[a, b, c, d, e, f, g, h]);
    let held = if raw { usize::from(len / 2) } else { usize::from(len) };
    bytes.resize(bytes.len() + held, 0xa5);
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut mux = Mux::new(GUEST_CID).unwrap();
    let mut host = Host::default();
    let mut now = Instant::now();
    let mut input = data;
    while let Some((step, rest)) = input.split_first() {
        input = rest;
        let which = usize::from(step >> 4);
        // Any outcome of the host's calls will do: its sockets may be full, shut or closed.
        match step % 16 {
            0..=6 => {
                let Some((chosen, rest)) = input.split_first_chunk() else { break };
                input = rest;
                if mux.accepts_packets() {
                    mux.receive(&packet(chosen, step % 16 == 6), &mut host, now);
                }
            }
            7 => {
                let raw = &input[..input.len().min(60)];
                if mux.accepts_packets() {
                    mux.receive(raw, &mut host, now);
                }
            }
            8 | 9 => {
                mux.poll_sockets(&mut host, now).unwrap();
                if mux.stage(&mut host, now) {
                    let room = 1 + which * 500;
                    let (_, data) = mux.take(room).expect("what was staged");
                    assert!(data.len() <= room);
                }
            }
            10 => {
                now += Duration::from_secs(which as u64 * 4);
                mux.expire(&mut host, now);
            }
            11 => drop(host.0.get_mut(which).map(|socket| socket.write(&[7; 5000]))),
            12 => drop(host.0.get_mut(which).map(|socket| socket.read(&mut [0; 5000]))),
            13 => drop(host.0.get_mut(which).map(|socket| socket.shutdown(Shutdown::Write))),
            14 => drop(host.0.get_mut(which).map(|socket| socket.shutdown(Shutdown::Read))),
            _ => {
                if which < host.0.len() {
                    host.0.swap_remove(which);
                }
            }
        }
    }
    // The host's process goes away: it ends, whatever the guest did.
    host.0.clear();
    for _ in 0..100_000 {
        mux.poll_sockets(&mut host, now).unwrap();
        if !mux.stage(&mut host, now) {
            return;
        }
        mux.take(4096).expect("what was staged");
    }
    panic!("the multiplexer never runs out of packets");
});

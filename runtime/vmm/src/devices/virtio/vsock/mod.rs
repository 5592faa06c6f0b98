//! The vsock device (virtio 1.2, section 5.10): stream connections between the guest and the host's
//! process, implemented here and not in the host's kernel.
//!
//! Each connection of the guest is joined to one end of an `AF_UNIX` stream socket pair; the other
//! end is the host process's, which got it by [`HostSink::accepted`] or gave it by
//! [`VsockHandle::connect`]. So the host's side is an ordinary socket: its end of file, half-close
//! and back-pressure are the guest's and the other way round.
//!
//! - `packet`: a guest's bytes become a checked packet, or a fault (pure);
//! - `state`: the life of a connection, one enum and one transition (pure, with its diagram);
//! - `credit`: flow control (pure);
//! - `connection`: one socket, what waits for it, and what is owed to the guest;
//! - `mux`: all connections, without queues or threads;
//! - here: the device, and the worker that joins the multiplexer to the queues.
//!
//! What a guest can do wrong costs it the connection (`RST`), or, where it breaks the queues
//! themselves, its device (`DEVICE_NEEDS_RESET`).

mod connection;
mod credit;
mod host;
mod mux;
mod packet;
mod sockets;
mod state;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

pub use self::host::{ConnectError, HostBusy, HostSink, MAX_WAITING_CONNECTS, VsockHandle};
use self::host::{HostLink, ring};
pub use self::mux::Mux;
pub use self::packet::Header;
use self::packet::{HEADER_LEN, MAX_PAYLOAD};
use super::chain::{Chain, GuestFault, Progress, SERVE_BUDGET, Virtqueue};
use super::timer::Timer;
use super::worker::{Handler, Poller, Readiness, Worker, WorkerError, as_fd};
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice};

/// Virtio device ID of the vsock device.
pub const DEVICE_ID: u32 = 19;

/// Entries of the receive, transmit and event queues (virtio 1.2, 5.10.2). Linux fills the receive
/// queue with buffers of 4 KiB at boot: 128 hold twice what it lets one connection have in flight,
/// and cost the guest half of what the usual 256 do.
const QUEUE_SIZES: &[u16] = &[128, 128, 16];

const RX: usize = 0;
const TX: usize = 1;

/// Longest packet that is copied from the guest.
const MAX_PACKET: usize = HEADER_LEN.saturating_add(MAX_PAYLOAD);

/// How many packets of the guest are taken before it is told that their buffers are free again. It
/// has nothing to do with them but to free them, and an interrupt for it costs more than most packets:
/// so it is told with the next packet that it gets, of several at once, or after a while. Linux takes
/// up to 18 descriptors for a packet, so that at least this many fit into the queue.
const MAX_UNTOLD: u16 = 6;

/// How long it is not told; its memory is held for so long.
const UNTOLD_LIMIT: Duration = Duration::from_millis(20);

const SOCKETS: u32 = 0;
const DOORBELL: u32 = 1;
const TIMER: u32 = 2;

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    /// `struct virtio_vsock_config` (virtio 1.2, 5.10.4).
    config: [u8; 8],
    link: Arc<Mutex<HostLink>>,
    doorbell: Arc<EventFd>,
    worker: Option<Worker>,
}

impl Vsock {
    /// A device for the guest with the context ID `guest_cid` (at least 3 and less than 2^32 - 1,
    /// virtio 1.2, 5.10.4), and the handle by which connections to the guest are asked for. `sink`
    /// hears from the device's thread until the device is dropped.
    ///
    /// # Errors
    /// No eventfd could be had.
    pub fn new(guest_cid: u64, sink: Box<dyn HostSink>) -> io::Result<(Self, VsockHandle)> {
        let (link, handle, doorbell) = HostLink::new(sink)?;
        let device = Vsock {
            guest_cid,
            config: guest_cid.to_le_bytes(),
            link: Arc::new(Mutex::new(link)),
            doorbell,
            worker: None,
        };
        Ok((device, handle))
    }

    /// What serves the queues.
    fn handler(&self, [rx, tx, event]: [Virtqueue; 3]) -> Result<VsockHandler, ActivateError> {
        let failed = |what| move |source| ActivateError::Host { what, source };
        Ok(VsockHandler {
            rx,
            tx,
            _event: event,
            mux: Mux::new(self.guest_cid).map_err(failed("an epoll instance"))?,
            link: self.link.clone(),
            doorbell: self.doorbell.clone(),
            timer: Timer::new().map_err(failed("a timer"))?,
            tx_waits: false,
            tell: None,
            packet: vec![0; MAX_PACKET].into_boxed_slice(),
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (queues, wiring) = activation.split()?;
        let handler = self.handler(queues)?;
        self.worker = Some(Worker::spawn("vsock", wiring, handler)?);
        // For what was asked before the guest was there.
        ring(&self.doorbell);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The worker's side of an active device.
struct VsockHandler {
    rx: Virtqueue,
    tx: Virtqueue,
    /// Carries transport resets, which only a restored snapshot has.
    _event: Virtqueue,
    mux: Mux,
    link: Arc<Mutex<HostLink>>,
    doorbell: Arc<EventFd>,
    timer: Timer,
    /// Packets may wait in the transmit queue.
    tx_waits: bool,
    /// When the guest is to be told at the latest that its packets were taken.
    tell: Option<Instant>,
    /// The guest's packet, copied once, so that it cannot change while it is looked at.
    packet: Box<[u8]>,
}

impl Handler for VsockHandler {
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.mux.as_fd(), SOCKETS, Readiness::READ)?;
        poller.add(as_fd(&self.doorbell), DOORBELL, Readiness::READ)?;
        poller.add(self.timer.as_fd(), TIMER, Readiness::READ)
    }

    fn kicked(&mut self, queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        match queue {
            TX => self.tx_waits = true,
            // The receive queue has room: that is for `pump` to find.
            RX => {}
            _ => return Ok(Progress::Done),
        }
        self.pump(Instant::now())
    }

    fn ready(
        &mut self,
        token: u32,
        _readiness: Readiness,
        _poller: &Poller,
    ) -> Result<(), WorkerError> {
        let now = Instant::now();
        match token {
            SOCKETS => {
                let mut link = lock(&self.link);
                self.mux.poll_sockets(link.sink.as_mut(), now).map_err(host("poll sockets"))?;
            }
            DOORBELL => self.take_requests(now)?,
            _ => {
                // Only to make it silent: what is due is found by the clock.
                self.timer.acknowledge()?;
                self.mux.expire(lock(&self.link).sink.as_mut(), now);
            }
        }
        if self.pump(now)? == Progress::More {
            ring(&self.doorbell);
        }
        Ok(())
    }
}

impl VsockHandler {
    /// Moves packets both ways, up to a budget each, so that no side keeps the worker from the other
    /// or from its stop.
    fn pump(&mut self, now: Instant) -> Result<Progress, WorkerError> {
        let link = self.link.clone();
        let mut link = lock(&link);
        self.take_packets(&mut link, now)?;
        let progress = self.give_packets(&mut link, now)?;
        self.notify(now)?;
        self.arm_timer(now)?;
        // With too many resets waiting, the receive queue's next kick goes on.
        if self.tx_waits && self.mux.accepts_packets() {
            return Ok(Progress::More);
        }
        Ok(progress)
    }

    /// The guest's packets, out of the transmit queue.
    fn take_packets(&mut self, link: &mut HostLink, now: Instant) -> Result<(), GuestFault> {
        if !self.tx_waits {
            return Ok(());
        }
        self.tx.disable_notification()?;
        for _ in 0..SERVE_BUDGET {
            if !self.mux.accepts_packets() {
                break;
            }
            let Some(chain) = self.tx.pop_or_arm()? else {
                self.tx_waits = false;
                break;
            };
            let readable = chain.readable();
            let len = usize::try_from(readable.len()).unwrap_or(MAX_PACKET).min(MAX_PACKET);
            let packet = self.packet.get_mut(..len).unwrap_or_default();
            readable.read_at(0, packet)?;
            chain.complete(0)?;
            self.mux.receive(packet, link.sink.as_mut(), now);
        }
        Ok(())
    }

    /// The multiplexer's packets, into the receive queue's buffers.
    fn give_packets(&mut self, link: &mut HostLink, now: Instant) -> Result<Progress, GuestFault> {
        self.rx.disable_notification()?;
        let mut progress = Progress::More;
        for _ in 0..SERVE_BUDGET {
            if !self.mux.stage(link.sink.as_mut(), now) {
                progress = Progress::Done;
                break;
            }
            let Some(chain) = self.rx.pop_or_arm()? else {
                // What is staged waits for the kick; sockets are not read meanwhile.
                progress = Progress::Done;
                break;
            };
            fill(chain, &mut self.mux)?;
        }
        Ok(progress)
    }

    /// Tells the guest what it got, and of the packets taken from it when it is time.
    fn notify(&mut self, now: Instant) -> Result<(), GuestFault> {
        let untold = self.tx.untold();
        if untold == 0 {
            return self.rx.notify();
        }
        let limit = now.checked_add(UNTOLD_LIMIT).unwrap_or(now);
        let due = *self.tell.get_or_insert(limit) <= now;
        if due || untold >= MAX_UNTOLD || self.rx.untold() > 0 {
            self.tell = None;
            return self.rx.notify_with(&mut self.tx);
        }
        Ok(())
    }

    /// What the host asks for.
    fn take_requests(&mut self, now: Instant) -> Result<(), WorkerError> {
        // First the doorbell, then the requests: one that comes in between rings again.
        match self.doorbell.read() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(source) => return Err(WorkerError::Host { what: "read an eventfd", source }),
        }
        let mut link = lock(&self.link);
        for _ in 0..MAX_WAITING_CONNECTS {
            let Some(request) = link.next_request() else { break };
            self.mux.connect(request, link.sink.as_mut(), now);
        }
        Ok(())
    }

    fn arm_timer(&mut self, now: Instant) -> Result<(), WorkerError> {
        match self.mux.next_deadline().into_iter().chain(self.tell).min() {
            Some(deadline) => self.timer.arm(deadline, now),
            None => Ok(()),
        }
    }
}

impl Drop for VsockHandler {
    fn drop(&mut self) {
        self.mux.close(lock(&self.link).sink.as_mut());
    }
}

/// Puts the multiplexer's next packet into a buffer of the guest's.
fn fill(chain: Chain<'_>, mux: &mut Mux) -> Result<(), GuestFault> {
    if !chain.readable().is_empty() {
        return Err(GuestFault::Request("a vsock receive buffer is readable"));
    }
    let writable = chain.writable();
    let have = usize::try_from(writable.len()).unwrap_or(MAX_PACKET);
    let Some(room) = have.checked_sub(HEADER_LEN).filter(|room| *room > 0) else {
        return Err(GuestFault::Request("a vsock receive buffer has no room for a byte"));
    };
    // Not there only if what was staged is gone: the buffer then goes back empty.
    let Some((header, data)) = mux.take(room) else { return Ok(()) };
    writable.write_at(0, &header.encode())?;
    let header_len = u32::try_from(HEADER_LEN).unwrap_or(u32::MAX);
    writable.write_at(header_len, data)?;
    chain.complete(header_len.saturating_add(header.len))
}

/// A panic elsewhere does not make the link's parts inconsistent.
fn lock(link: &Mutex<HostLink>) -> MutexGuard<'_, HostLink> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::Host { what, source }
}

#[cfg(test)]
mod tests;

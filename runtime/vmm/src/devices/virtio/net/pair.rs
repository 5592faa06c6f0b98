//! One queue pair: frames from the guest's queue to the host's and back, without threads.
//!
//! A frame is one system call, straight between guest memory and the tap. What the guest transmits is
//! never looked at: the host's kernel checks header and frame, and what it refuses is dropped. What
//! the guest receives is read into the buffers that it has made available, as many as a frame may
//! need, and those that were filled are given back; with `VIRTIO_NET_F_MRG_RXBUF` that may be several.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::chain::{
    BufferQueue, Chain, GuestFault, IoVec, MAX_CHAIN_DESCRIPTORS, SERVE_BUDGET, Virtqueue,
};
use super::{HEADER_LEN, NUM_BUFFERS_OFFSET, tap};
use crate::counters::DeviceCounters;
use crate::devices::rate_limit::RateLimiter;

/// Longest frame, with the header: an IPv6 packet of 64 KiB payload (segmentation offload) behind an
/// Ethernet header with a VLAN tag.
pub const MAX_FRAME_LEN: u32 = HEADER_LEN + 14 + 4 + 40 + 65_535;

/// Limits that several queue pairs share; or none.
#[derive(Debug, Clone, Default)]
pub struct SharedLimit(Option<Arc<Mutex<RateLimiter>>>);

impl SharedLimit {
    /// Limits as configured.
    #[must_use]
    pub fn new(limit: &husk_vmm_api::RateLimit, now: Instant) -> Self {
        let unlimited = limit.bytes.is_none() && limit.operations.is_none();
        SharedLimit((!unlimited).then(|| Arc::new(Mutex::new(RateLimiter::new(limit, now)))))
    }

    fn with<T>(&self, each: impl FnOnce(&mut RateLimiter) -> T) -> Option<T> {
        // A panic elsewhere leaves numbers behind, each of which is right.
        self.0.as_ref().map(|limit| each(&mut limit.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn wait(&self, now: Instant) -> Option<Duration> {
        self.with(|limit| limit.wait(now)).flatten()
    }

    fn charge(&self, bytes: u64, now: Instant) {
        self.with(|limit| limit.charge(bytes, now));
    }
}

/// How far frames for the guest were received.
#[derive(Debug)]
pub enum Received {
    /// The host has no more.
    Idle,
    /// The guest has no buffers; a kick comes with the next ones.
    Starved,
    /// The limit is reached; go on after this time.
    Throttled(Duration),
    /// The budget is used up.
    More,
    /// The host's queue is gone: detached, or its tap deleted.
    Gone(io::Error),
}

/// How far the guest's frames were transmitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmitted {
    /// There are no more; a kick comes with the next one.
    Idle,
    /// The host takes no more; go on when its descriptor is writable.
    Blocked,
    /// The limit is reached; go on after this time.
    Throttled(Duration),
    /// The budget is used up.
    More,
}

/// A frame that did not fit into the buffers that the guest had provided.
#[derive(Debug, Clone, Copy)]
struct Partial {
    /// Its length.
    len: u64,
    /// How much of it is in the guest's buffers; the rest is in the overflow.
    placed: u64,
}

/// The queues of one pair, and what is between them and the host.
pub struct Pair {
    rx: BufferQueue,
    tx: Virtqueue,
    /// Whether a frame may be spread over several receive buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// Where the end of a frame goes for which the guest has too few buffers.
    overflow: Box<[u8]>,
    partial: Option<Partial>,
    rx_limit: SharedLimit,
    tx_limit: SharedLimit,
    counters: Arc<DeviceCounters>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("mergeable", &self.mergeable)
            .field("partial", &self.partial)
            .finish_non_exhaustive()
    }
}

impl Pair {
    /// A pair without limits.
    #[must_use]
    pub fn new(
        rx: Virtqueue,
        tx: Virtqueue,
        mergeable: bool,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        let overflow = vec![0; usize::try_from(MAX_FRAME_LEN).unwrap_or(0)];
        Pair {
            rx: BufferQueue::new(rx),
            tx,
            mergeable,
            overflow: overflow.into_boxed_slice(),
            partial: None,
            rx_limit: SharedLimit::default(),
            tx_limit: SharedLimit::default(),
            counters,
        }
    }

    /// Limits the pair, together with others.
    #[must_use]
    pub fn limited(self, rx_limit: SharedLimit, tx_limit: SharedLimit) -> Self {
        Pair { rx_limit, tx_limit, ..self }
    }

    /// Moves frames from `host` to the guest, up to a budget.
    ///
    /// # Errors
    /// The guest's fault.
    pub fn receive(&mut self, host: BorrowedFd<'_>, now: Instant) -> Result<Received, GuestFault> {
        let received = self.receive_frames(host, now)?;
        self.rx.notify()?;
        Ok(received)
    }

    fn receive_frames(
        &mut self,
        host: BorrowedFd<'_>,
        now: Instant,
    ) -> Result<Received, GuestFault> {
        for _ in 0..SERVE_BUDGET {
            if let Some(wait) = self.rx_limit.wait(now) {
                return Ok(Received::Throttled(wait));
            }
            if !self.make_room()? {
                return Ok(Received::Starved);
            }
            match self.read(host) {
                Ok((0, _)) => return Ok(Received::Gone(io::ErrorKind::UnexpectedEof.into())),
                Ok((len, room)) => {
                    self.rx_limit.charge(len.saturating_sub(u64::from(HEADER_LEN)), now);
                    self.deliver(len, room)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Idle);
                }
                Err(error) => return Ok(Received::Gone(error)),
            }
        }
        Ok(Received::More)
    }

    /// Whether there is a buffer to read into. If not, the guest was asked to notify.
    fn make_room(&mut self) -> Result<bool, GuestFault> {
        if let Some(partial) = self.partial {
            let as_much_as_there_will_be = self.rx.hold(partial.len)?;
            if self.rx.len() >= partial.len {
                self.place_rest(partial)?;
            } else if as_much_as_there_will_be {
                // All of the queue's buffers are too short for it.
                self.counters.count_drop_to_guest();
            } else {
                return Ok(false);
            }
            self.partial = None;
        }
        let wanted = if self.mergeable { u64::from(MAX_FRAME_LEN) } else { 1 };
        self.rx.hold(wanted)?;
        Ok(!self.rx.is_empty())
    }

    /// Reads one frame; returns its length, and how much room the guest's buffers had for it.
    fn read(&mut self, host: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
        let all = if self.mergeable { self.rx.iovecs() } else { self.rx.first_chain() };
        // One is kept for the overflow.
        let most = all.len().min(MAX_CHAIN_DESCRIPTORS.saturating_sub(1));
        let pieces = all.get(..most).unwrap_or_default();
        let room = pieces.iter().fold(0_u64, |sum, piece| sum.saturating_add(len_of(piece)));
        let read = if room >= u64::from(MAX_FRAME_LEN) {
            tap::read(host, pieces)?
        } else {
            let mut pieces: Vec<IoVec<'_>> = pieces.iter().map(IoVec::again).collect();
            pieces.push(IoVec::of(&mut self.overflow));
            tap::read(host, &pieces)?
        };
        Ok((u64::try_from(read).unwrap_or(u64::MAX), room))
    }

    /// Gives a frame to the guest that was read into its buffers, with room for `room` bytes.
    fn deliver(&mut self, len: u64, room: u64) -> Result<(), GuestFault> {
        let is_frame = (u64::from(HEADER_LEN)..=u64::from(MAX_FRAME_LEN)).contains(&len);
        if is_frame && len <= room {
            return self.finish(len);
        }
        if is_frame && self.mergeable {
            self.partial = Some(Partial { len, placed: room });
        } else {
            self.counters.count_drop_to_guest();
        }
        Ok(())
    }

    /// Brings the end of a frame from the overflow into the guest's buffers.
    fn place_rest(&mut self, partial: Partial) -> Result<(), GuestFault> {
        let rest = usize::try_from(partial.len.saturating_sub(partial.placed)).unwrap_or(0);
        self.rx.write_at(partial.placed, self.overflow.get(..rest).unwrap_or_default());
        self.finish(partial.len)
    }

    /// Gives the buffers back that hold a frame of `len` bytes.
    fn finish(&mut self, len: u64) -> Result<(), GuestFault> {
        let buffers = if self.mergeable { self.rx.chains_for(len).unwrap_or(1) } else { 1 };
        // The host leaves it out: it knows nothing of the guest's buffers (5.1.6.4).
        self.rx.write_at(NUM_BUFFERS_OFFSET, &buffers.to_le_bytes());
        self.counters.count_packet_to_guest();
        self.rx.complete(len)
    }

    /// Moves frames from the guest to `host`, up to a budget.
    ///
    /// # Errors
    /// The guest's fault.
    pub fn transmit(
        &mut self,
        host: BorrowedFd<'_>,
        now: Instant,
    ) -> Result<Transmitted, GuestFault> {
        self.tx.disable_notification()?;
        let mut progress = Transmitted::More;
        for _ in 0..SERVE_BUDGET {
            if let Some(wait) = self.tx_limit.wait(now) {
                progress = Transmitted::Throttled(wait);
                break;
            }
            let Some(chain) = self.tx.pop_or_arm()? else {
                progress = Transmitted::Idle;
                break;
            };
            match send(&chain, host)? {
                Sent::Whole(len) => {
                    self.tx_limit.charge(len.saturating_sub(HEADER_LEN).into(), now);
                    self.counters.count_packet_from_guest();
                    chain.complete(0)?;
                }
                Sent::Dropped => {
                    self.tx_limit.charge(0, now);
                    self.counters.count_drop_from_guest();
                    chain.complete(0)?;
                }
                Sent::Not => {
                    chain.put_back();
                    progress = Transmitted::Blocked;
                    break;
                }
            }
        }
        self.tx.notify()?;
        Ok(progress)
    }
}

fn len_of(piece: &IoVec<'_>) -> u64 {
    u64::try_from(piece.len()).unwrap_or(u64::MAX)
}

/// What became of a frame of the guest.
enum Sent {
    /// The host has it; its length with the header.
    Whole(u32),
    /// It is none, or the host does not want it: malformed, its tap down or gone, no memory.
    Dropped,
    /// The host takes none now.
    Not,
}

fn send(chain: &Chain<'_>, host: BorrowedFd<'_>) -> Result<Sent, GuestFault> {
    if !chain.writable().is_empty() {
        return Err(GuestFault::Request("a transmitted frame has a writable buffer"));
    }
    let readable = chain.readable();
    let len = readable.len();
    if !(HEADER_LEN..=MAX_FRAME_LEN).contains(&len) {
        return Ok(Sent::Dropped);
    }
    let mut pieces = Vec::new();
    readable.iovecs(&mut pieces)?;
    if pieces.len() > MAX_CHAIN_DESCRIPTORS {
        return Ok(Sent::Dropped);
    }
    loop {
        return match tap::write(host, &pieces) {
            Ok(_) => Ok(Sent::Whole(len)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Not),
            Err(error) => {
                tracing::trace!(%error, len, "the host refused a frame");
                Ok(Sent::Dropped)
            }
        };
    }
}

#[cfg(test)]
mod tests;

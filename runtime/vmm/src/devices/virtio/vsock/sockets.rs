//! The host sockets of all connections in one epoll instance, edge-triggered.
//!
//! Why edges: a socket whose peer is gone reports a hang-up for as long as it is watched, and one
//! that nobody may read from now (the guest has no room) stays readable. Level-triggered, each would
//! turn the worker into a busy loop, or need its watch changed at each turn. An edge says it once;
//! the connection remembers it until the socket answers `EAGAIN`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

/// Most events that [`Sockets::ready`] returns at once; the others wait for the next call.
const MAX_EVENTS: usize = 64;

/// A connection's number; never reused while the device is active, so that a stale event finds
/// nothing.
pub(super) type ConnectionId = u64;

/// What epoll says of a connection's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Readiness {
    pub(super) id: ConnectionId,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) hung_up: bool,
}

/// The epoll instance. Itself pollable: readable while [`Sockets::ready`] has something.
#[derive(Debug)]
pub(super) struct Sockets {
    epoll: OwnedFd,
}

impl Sockets {
    /// # Errors
    /// No epoll instance could be had.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Sockets { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Watches `socket`.
    ///
    /// # Errors
    /// The host refused (no memory, too many watches).
    pub(super) fn add(&self, socket: BorrowedFd<'_>, id: ConnectionId) -> io::Result<()> {
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(id), edges)?;
        Ok(())
    }

    /// Stops watching `socket`. Closing it would not do if another process holds the same socket.
    pub(super) fn remove(&self, socket: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, socket) {
            tracing::warn!(%error, "cannot stop watching a vsock socket");
        }
    }

    /// What happened since the last call; does not wait.
    ///
    /// # Errors
    /// The host's fault.
    pub(super) fn ready(&self) -> io::Result<Vec<Readiness>> {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, spare, Some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let readiness = |event: &epoll::Event| {
            let flags = event.flags;
            Readiness {
                id: event.data.u64(),
                readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: flags.contains(EventFlags::OUT),
                hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            }
        };
        Ok(events.iter().map(readiness).collect())
    }
}

impl AsFd for Sockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

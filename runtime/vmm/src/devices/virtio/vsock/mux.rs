//! The multiplexer: all connections of the guest, without queues or threads.
//!
//! Packets of the guest's go in by [`Mux::receive`]; packets for the guest come out by
//! [`Mux::stage`] and [`Mux::take`]. What the guest can make it hold is bounded by
//! [`MAX_CONNECTIONS`], the window of each, and [`MAX_WAITING_RESETS`].
//!
//! Fairness: connections that have something for the guest stand in a list, each once, and have their
//! turn in order: one packet without data, or one read of at most [`MAX_PAYLOAD`] bytes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::connection::{Connection, HostDeaf, Key, Origin, ReadOutcome};
use super::host::{Connect, HostSink};
use super::packet::{Header, MAX_PAYLOAD, Op, Packet, PacketError, op};
use super::sockets::{ConnectionId, Readiness, Sockets};
use super::state::{Action, Directions, Event, State};

/// Most connections at once, those included that are over but whose last bytes the host has not
/// read. With the window of each this bounds what a guest can make the VMM hold for it at 64 MiB (a
/// ring buffer's growth may double it); an idle connection holds no buffer.
pub(super) const MAX_CONNECTIONS: usize = 512;

/// Of [`MAX_CONNECTIONS`], how many the guest cannot take, so that the host can still connect.
const RESERVED_FOR_HOST: usize = 64;

/// `RST` packets that may wait for room in the receive queue. When so many do, packets of the
/// guest's stay where they are until it makes room (virtio 1.2, 5.10.6.1.2).
pub(super) const MAX_WAITING_RESETS: usize = 256;

/// How long the guest may take to answer `REQUEST`. The answer is its kernel's alone, but a guest in
/// a nested, emulated machine takes seconds for what takes others milliseconds.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the guest may take to answer `SHUTDOWN` of both directions; its programs may be reading
/// what they have, and lose nothing if it comes to an end without them.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// `VMADDR_PORT_ANY`, on which nobody listens.
const PORT_ANY: u32 = u32::MAX;

/// The first of the host's own ports for connections to the guest: above those that people choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Data that was read from a socket and not put into the guest's buffers yet.
#[derive(Debug)]
struct Staged {
    id: ConnectionId,
    range: Range<usize>,
}

/// See the module. Public for the fuzzer; [`Vsock`](super::Vsock) is what joins it to queues.
#[derive(Debug)]
pub struct Mux {
    guest_cid: u64,
    sockets: Sockets,
    connections: HashMap<ConnectionId, Connection>,
    /// The connections that the guest knows; one that is over but not read to its end is not here.
    by_key: HashMap<Key, ConnectionId>,
    /// Connections that may have something for the guest; each at most once.
    ready: VecDeque<ConnectionId>,
    resets: VecDeque<Header>,
    staged: Option<Staged>,
    staging: Box<[u8]>,
    next_id: ConnectionId,
    next_host_port: u32,
    /// No deadline is before this.
    next_deadline: Option<Instant>,
}

impl Mux {
    /// A multiplexer without connections, for the guest at `guest_cid`.
    ///
    /// # Errors
    /// No epoll instance could be had.
    pub fn new(guest_cid: u64) -> io::Result<Self> {
        Ok(Mux {
            guest_cid,
            sockets: Sockets::new()?,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            staged: None,
            staging: vec![0; MAX_PAYLOAD].into_boxed_slice(),
            next_id: 0,
            next_host_port: FIRST_HOST_PORT,
            next_deadline: None,
        })
    }

    /// Whether another packet of the guest's may be taken in.
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < MAX_WAITING_RESETS
    }

    /// Takes in a packet of the guest's, header and payload.
    pub fn receive(&mut self, bytes: &[u8], sink: &mut dyn HostSink, now: Instant) {
        let Packet { key, credit, op } = match Packet::parse(bytes, self.guest_cid) {
            Ok(packet) => packet,
            Err(error) => return self.refuse(&error, sink),
        };
        let Some(&id) = self.by_key.get(&key) else {
            match op {
                Op::Request => self.accept(key, credit, sink),
                // Never a RST for a RST.
                Op::Reset => {}
                _ => self.push_reset(key),
            }
            return;
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.update_credit(credit);
        match op {
            Op::Request => self.advance(id, Event::Request, sink, now),
            Op::Response => self.advance(id, Event::Response, sink, now),
            Op::Reset => self.advance(id, Event::Reset, sink, now),
            Op::Shutdown(directions) => {
                self.advance(id, Event::GuestShut(directions), sink, now);
            }
            Op::Data(data) => self.data(id, data, sink, now),
            Op::CreditUpdate => self.advance(id, Event::Credit, sink, now),
            Op::CreditRequest => {
                connection.owe_credit_update();
                self.advance(id, Event::Credit, sink, now);
            }
        }
    }

    /// Makes the connection that the host asks for.
    pub(super) fn connect(&mut self, request: Connect, sink: &mut dyn HostSink, now: Instant) {
        let Connect { id: request, port, socket } = request;
        if self.connections.len() >= MAX_CONNECTIONS {
            return sink.refused(request, "the guest has too many connections");
        }
        if port == PORT_ANY {
            return sink.refused(request, "nobody can listen on port 2^32 - 1");
        }
        if !matches!(rustix::net::sockopt::socket_type(&socket), Ok(SocketType::STREAM)) {
            return sink.refused(request, "the descriptor is no stream socket");
        }
        let key = Key { guest_port: port, host_port: self.free_host_port(port) };
        let deadline = now.checked_add(CONNECT_TIMEOUT).unwrap_or(now);
        let connection = Connection::connecting(key, request, socket, deadline);
        match self.insert(connection) {
            Ok(_) => self.note_deadline(deadline),
            Err(error) => sink.refused(request, &format!("cannot watch the socket: {error}")),
        }
    }

    /// Takes in what the host did at its sockets. Call it when [`Mux::as_fd`] is readable.
    ///
    /// # Errors
    /// The host's fault.
    pub fn poll_sockets(&mut self, sink: &mut dyn HostSink, now: Instant) -> io::Result<()> {
        for Readiness { id, readable, writable, hung_up } in self.sockets.ready()? {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.note_readiness(readable, writable, hung_up);
            let flushed = connection.flush();
            self.after_flush(id, flushed, sink, now);
        }
        Ok(())
    }

    /// Until when [`Mux::expire`] has nothing to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Ends what the guest did not answer in time.
    pub fn expire(&mut self, sink: &mut dyn HostSink, now: Instant) {
        if self.next_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let late = |connection: &Connection| connection.deadline.is_some_and(|at| at <= now);
        let expired: Vec<_> =
            self.connections.iter().filter(|(_, c)| late(c)).map(|(id, _)| *id).collect();
        for id in expired {
            // Once: a deadline that stays in the past would have the timer ring without end.
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.deadline = None;
            }
            self.advance(id, Event::Expired, sink, now);
        }
        self.next_deadline = self.connections.values().filter_map(|c| c.deadline).min();
    }

    /// Finds the next packet for the guest; `false` if there is none. After `true`, [`Mux::take`] has
    /// it.
    pub fn stage(&mut self, sink: &mut dyn HostSink, now: Instant) -> bool {
        loop {
            if !self.resets.is_empty() || self.staged_is_wanted() {
                return true;
            }
            self.staged = None;
            let Some(&id) = self.ready.front() else { return false };
            let Some(connection) = self.connections.get_mut(&id) else {
                self.ready.pop_front();
                continue;
            };
            if connection.owes_control() {
                return true;
            }
            self.ready.pop_front();
            connection.queued = false;
            match connection.read(&mut self.staging) {
                ReadOutcome::Data(len) => self.staged = Some(Staged { id, range: 0..len }),
                ReadOutcome::Later => {}
                ReadOutcome::Shut(directions) => {
                    self.advance(id, Event::HostShut(directions), sink, now);
                }
            }
        }
    }

    /// The next packet for a buffer of the guest's with room for `room` bytes of payload, at least
    /// one. `None` if [`Mux::stage`] did not just say that there is one.
    pub fn take(&mut self, room: usize) -> Option<(Header, &[u8])> {
        if let Some(reset) = self.resets.pop_front() {
            return Some((reset, &[]));
        }
        if let Some(Staged { id, range }) = self.staged.take() {
            let connection = self.connections.get_mut(&id)?;
            let end = range.end.min(range.start.saturating_add(room));
            let data = self.staging.get(range.start..end)?;
            let header = connection.data_header(self.guest_cid, u32::try_from(data.len()).ok()?);
            if end < range.end {
                self.staged = Some(Staged { id, range: end..range.end });
            } else if !connection.queued && connection.wants_turn() {
                connection.queued = true;
                self.ready.push_back(id);
            }
            return Some((header, data));
        }
        let id = self.ready.pop_front()?;
        let connection = self.connections.get_mut(&id)?;
        connection.queued = false;
        let header = connection.next_control(self.guest_cid);
        self.enqueue(id);
        header.map(|header| (header, &[][..]))
    }

    /// Ends all connections: the device is being reset. The host's ends see the end of the stream.
    pub(super) fn close(&mut self, sink: &mut dyn HostSink) {
        for (_, connection) in self.connections.drain() {
            if let (State::Connecting, Origin::Host(request)) =
                (connection.state(), connection.origin)
            {
                sink.refused(request, "the guest reset its vsock device");
            }
            connection.close();
        }
    }

    /// Whether the guest still wants what is staged.
    fn staged_is_wanted(&self) -> bool {
        self.staged.as_ref().is_some_and(|staged| {
            self.connections.get(&staged.id).is_some_and(Connection::carries_to_guest)
        })
    }

    /// Answers a packet that is none.
    fn refuse(&mut self, error: &PacketError, sink: &mut dyn HostSink) {
        tracing::debug!(%error, "dropped a vsock packet");
        let PacketError::Answerable { reset, key, .. } = *error else { return };
        if let Some(id) = key.and_then(|key| self.by_key.get(&key).copied()) {
            self.abort(id, sink);
        } else if let Some(reset) = reset {
            self.resets.push_back(reset);
        }
    }

    /// The guest connects to the host.
    fn accept(&mut self, key: Key, credit: super::packet::Credit, sink: &mut dyn HostSink) {
        if self.connections.len() >= MAX_CONNECTIONS.saturating_sub(RESERVED_FOR_HOST) {
            tracing::debug!(?key, "the guest has too many connections");
            return self.push_reset(key);
        }
        let (ours, theirs) = match socket_pair() {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!(%error, "cannot make a socket pair for a vsock connection");
                return self.push_reset(key);
            }
        };
        let id = match self.insert(Connection::accepted(key, ours, credit)) {
            Ok(id) => id,
            Err(error) => {
                tracing::warn!(%error, "cannot watch the socket of a vsock connection");
                return self.push_reset(key);
            }
        };
        if let Err(error) = sink.accepted(key.host_port, key.guest_port, theirs) {
            tracing::debug!(%error, ?key, "refused a vsock connection");
            self.forget(id);
            self.push_reset(key);
        }
    }

    /// The guest sent data.
    fn data(&mut self, id: ConnectionId, data: &[u8], sink: &mut dyn HostSink, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if !connection.admit(len) {
            tracing::debug!(key = ?connection.key, len, "the guest sent more than it had credit for");
            return self.abort(id, sink);
        }
        let action = step(connection, Event::Data, sink);
        match action {
            Action::Deliver => {
                let delivered = connection.deliver(data);
                self.after_flush(id, delivered, sink, now);
            }
            Action::Discard => {
                connection.discard(len);
                self.enqueue(id);
            }
            _ => self.act(id, action, sink, now),
        }
    }

    /// Bytes went to the host, or turned out not to.
    fn after_flush(
        &mut self,
        id: ConnectionId,
        flushed: Result<(), HostDeaf>,
        sink: &mut dyn HostSink,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let deaf = flushed.is_err() || connection.hung_up();
        if deaf {
            connection.drop_pending();
        }
        match connection.state() {
            State::Closed | State::Draining if connection.has_pending() => {}
            State::Closed => self.finish(id),
            State::Draining => self.advance(id, Event::Drained, sink, now),
            _ => {
                if deaf {
                    let directions = Directions { send: false, receive: true };
                    self.advance(id, Event::HostShut(directions), sink, now);
                }
                self.enqueue(id);
            }
        }
    }

    /// Moves a connection on.
    fn advance(&mut self, id: ConnectionId, event: Event, sink: &mut dyn HostSink, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let action = step(connection, event, sink);
        self.act(id, action, sink, now);
    }

    /// Does what a transition asks for.
    fn act(&mut self, id: ConnectionId, action: Action, sink: &mut dyn HostSink, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match action {
            Action::None | Action::Deliver | Action::Discard => self.enqueue(id),
            Action::Connected => {
                if let Origin::Host(request) = connection.origin {
                    sink.connected(request);
                }
                // What the host did meanwhile.
                let flushed = connection.flush();
                self.after_flush(id, flushed, sink, now);
            }
            Action::TellShutdown(_) => {
                if connection.state() == State::Closing && connection.deadline.is_none() {
                    let deadline = now.checked_add(CLOSE_TIMEOUT).unwrap_or(now);
                    connection.deadline = Some(deadline);
                    self.note_deadline(deadline);
                }
                self.enqueue(id);
            }
            Action::Drain if connection.has_pending() => self.enqueue(id),
            Action::Drain => self.advance(id, Event::Drained, sink, now),
            Action::ResetAfterShutdown => {
                let key = connection.key;
                self.push_reset(key);
                self.detach(id);
            }
            Action::Finish => self.detach(id),
            Action::Abort => self.abort(id, sink),
        }
    }

    /// Closes a connection at once and tells the guest.
    fn abort(&mut self, id: ConnectionId, sink: &mut dyn HostSink) {
        let Some(connection) = self.forget(id) else { return };
        // After `step` the state is `Closed` and the host has been told.
        if let (State::Connecting, Origin::Host(request)) = (connection.state(), connection.origin)
        {
            sink.refused(request, "the guest broke the protocol");
        }
        if connection.known_to_guest() {
            self.push_reset(connection.key);
        }
    }

    /// The guest knows the connection no more; it stays until the host has read what is left.
    fn detach(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.deadline = None;
        let pending = connection.has_pending();
        self.by_key.remove(&connection.key);
        if !pending {
            self.finish(id);
        }
    }

    /// Closes a connection that ended in order.
    fn finish(&mut self, id: ConnectionId) {
        if let Some(connection) = self.forget(id) {
            connection.close();
        }
    }

    /// Takes a connection out of every list but the ready one, in which an ID that is gone is passed
    /// over.
    fn forget(&mut self, id: ConnectionId) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        self.sockets.remove(connection.as_fd());
        if self.by_key.get(&connection.key) == Some(&id) {
            self.by_key.remove(&connection.key);
        }
        if connection.queued {
            self.ready.retain(|other| *other != id);
        }
        Some(connection)
    }

    fn insert(&mut self, connection: Connection) -> io::Result<ConnectionId> {
        let id = self.next_id;
        self.sockets.add(connection.as_fd(), id)?;
        self.next_id = id.wrapping_add(1);
        self.by_key.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.enqueue(id);
        Ok(id)
    }

    /// Puts a connection into the ready list if there is something to be done for it.
    fn enqueue(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.queued && connection.wants_turn() {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    fn push_reset(&mut self, key: Key) {
        self.resets.push_back(Header::to_guest(self.guest_cid, key, op::RST));
    }

    /// A port of the host's that has no connection to the guest's port `guest_port`.
    fn free_host_port(&mut self, guest_port: u32) -> u32 {
        // At most MAX_CONNECTIONS are taken.
        loop {
            let host_port = self.next_host_port;
            self.next_host_port = match host_port.wrapping_add(1) {
                PORT_ANY => FIRST_HOST_PORT,
                next => next,
            };
            if !self.by_key.contains_key(&Key { guest_port, host_port }) {
                return host_port;
            }
        }
    }

    fn note_deadline(&mut self, deadline: Instant) {
        self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
    }
}

impl AsFd for Mux {
    /// Readable when a host socket has something for [`Mux::poll_sockets`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sockets.as_fd()
    }
}

/// Moves a connection's state on, and tells the host if its connect came to nothing.
fn step(connection: &mut Connection, event: Event, sink: &mut dyn HostSink) -> Action {
    let was = connection.state();
    let action = connection.step(event);
    if let (State::Connecting, State::Closed, Origin::Host(request)) =
        (was, connection.state(), connection.origin)
    {
        sink.refused(request, refusal(event));
    }
    action
}

/// Why a connection of the host's did not come about.
fn refusal(event: Event) -> &'static str {
    match event {
        Event::Reset => "the guest refused: nobody listens on the port",
        Event::Expired => "the guest did not answer in time",
        _ => "the guest broke the protocol",
    }
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
#[path = "mux_tests/mod.rs"]
mod tests;

//! One connection: a host socket joined to a pair of ports, with what waits to go each way.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::credit::{ReceiveWindow, SendCredit};
use super::packet::{Credit, Header, op, shutdown_flags};
use super::state::{Action, Directions, Event, State, transition};

/// Most reads by which [`Connection::close`] empties a socket: more than a socket's buffer holds.
const MAX_DISCARD_READS: usize = 256;

/// A connection's name: its two ports. The context IDs are always the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// Who began a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Guest,
    /// The host, whose request has this ID.
    Host(u32),
}

/// Packets without data that are owed to the guest.
#[derive(Debug, Clone, Copy, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// All that the host has shut; `None` when the guest knows.
    shutdown: Option<Directions>,
}

/// What came of reading the host's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    /// So many bytes, at least one.
    Data(usize),
    /// Nothing now; epoll will tell.
    Later,
    /// The host has shut these directions.
    Shut(Directions),
}

/// The host does not read any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostDeaf;

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) origin: Origin,
    state: State,
    socket: OwnedFd,
    /// Edge-triggered readiness: set by epoll, cleared by `EAGAIN`.
    readable: bool,
    writable: bool,
    /// The host's end is closed, or shut both ways.
    hung_up: bool,
    /// Bytes from the guest that the socket did not take yet; at most the window.
    to_host: VecDeque<u8>,
    window: ReceiveWindow,
    credit: SendCredit,
    owed: Owed,
    /// Whether the socket's write side was shut.
    write_shut: bool,
    /// Whether it stands in the multiplexer's ready list.
    pub(super) queued: bool,
    /// Until when the guest has to answer; `None` when no answer is awaited.
    pub(super) deadline: Option<Instant>,
}

impl Connection {
    /// A connection to which the guest said `REQUEST` and the host yes: `RESPONSE` is owed.
    pub(super) fn accepted(key: Key, socket: OwnedFd, guest: Credit) -> Self {
        let state = State::Open { guest: Directions::default(), host: Directions::default() };
        let owed = Owed { response: true, ..Owed::default() };
        Self::new(key, Origin::Guest, state, socket, guest, owed)
    }

    /// A connection of the host's: `REQUEST` is owed, and an answer expected until `deadline`.
    pub(super) fn connecting(key: Key, id: u32, socket: OwnedFd, deadline: Instant) -> Self {
        let no_credit = Credit { buf_alloc: 0, fwd_cnt: 0 };
        let owed = Owed { request: true, ..Owed::default() };
        let mut connection =
            Self::new(key, Origin::Host(id), State::Connecting, socket, no_credit, owed);
        connection.deadline = Some(deadline);
        connection
    }

    fn new(
        key: Key,
        origin: Origin,
        state: State,
        socket: OwnedFd,
        guest: Credit,
        owed: Owed,
    ) -> Self {
        Connection {
            key,
            origin,
            state,
            socket,
            readable: false,
            writable: true,
            hung_up: false,
            to_host: VecDeque::new(),
            window: ReceiveWindow::default(),
            credit: SendCredit::new(guest),
            owed,
            write_shut: false,
            queued: false,
            deadline: None,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Whether the guest has been told of this connection: a `RST` means something to it.
    pub(super) fn known_to_guest(&self) -> bool {
        !self.owed.request
    }

    /// Moves on, and does what concerns the connection alone. What concerns others (the list of
    /// connections, the host's process) is for the caller.
    pub(super) fn step(&mut self, event: Event) -> Action {
        let (state, action) = transition(self.state, event);
        self.state = state;
        match action {
            Action::Connected => self.deadline = None,
            Action::TellShutdown(directions) => self.owed.shutdown = Some(directions),
            Action::None
            | Action::Deliver
            | Action::Discard
            | Action::Drain
            | Action::ResetAfterShutdown
            | Action::Finish
            | Action::Abort => {}
        }
        if matches!(event, Event::GuestShut(Directions { receive: true, .. })) {
            // The host's next write fails with EPIPE, as on a pipe.
            self.shut(Shutdown::Read);
        }
        self.shut_write_when_drained();
        action
    }

    /// What the guest says of its buffer, in every packet.
    pub(super) fn update_credit(&mut self, guest: Credit) {
        self.credit.update(guest);
    }

    /// The guest wants to know of our buffer.
    pub(super) fn owe_credit_update(&mut self) {
        self.owed.credit_update = true;
    }

    /// Takes note of `len` bytes from the guest; `false` if it had no credit for them.
    #[must_use]
    pub(super) fn admit(&mut self, len: u32) -> bool {
        self.window.receive(len)
    }

    /// Passes admitted bytes to the host, or keeps them until it takes them.
    pub(super) fn deliver(&mut self, mut data: &[u8]) -> Result<(), HostDeaf> {
        if self.to_host.is_empty() && self.writable {
            let written = self.write(data)?;
            data = data.get(written..).unwrap_or_default();
        }
        self.to_host.extend(data);
        Ok(())
    }

    /// Lets admitted bytes go.
    pub(super) fn discard(&mut self, len: u32) {
        self.window.forward(len);
    }

    /// Passes on what waits for the host, as far as it takes it.
    pub(super) fn flush(&mut self) -> Result<(), HostDeaf> {
        while self.writable && !self.to_host.is_empty() {
            let (front, _) = self.to_host.as_slices();
            let written = send(self.socket.as_fd(), front)?;
            self.took(written, front.len());
            self.to_host.drain(..written);
        }
        if self.to_host.is_empty() {
            // A connection that was slow once does not hold its buffer for ever.
            self.to_host = VecDeque::new();
        }
        self.shut_write_when_drained();
        Ok(())
    }

    fn write(&mut self, mut data: &[u8]) -> Result<usize, HostDeaf> {
        let mut total: usize = 0;
        while self.writable && !data.is_empty() {
            let written = send(self.socket.as_fd(), data)?;
            self.took(written, data.len());
            total = total.saturating_add(written);
            data = data.get(written..).unwrap_or_default();
        }
        Ok(total)
    }

    /// The socket took `written` of `offered` bytes.
    fn took(&mut self, written: usize, offered: usize) {
        // At most the window: it fits.
        self.window.forward(u32::try_from(written).unwrap_or(u32::MAX));
        if written == 0 && offered > 0 {
            self.writable = false;
        }
    }

    /// The host reads no more: what waits for it is dropped, and the guest's credit for it returned.
    pub(super) fn drop_pending(&mut self) {
        self.window.forward(u32::try_from(self.to_host.len()).unwrap_or(u32::MAX));
        self.to_host = VecDeque::new();
    }

    /// Whether bytes of the guest's wait for the host.
    pub(super) fn has_pending(&self) -> bool {
        !self.to_host.is_empty()
    }

    #[cfg(test)]
    pub(super) fn pending_len(&self) -> usize {
        self.to_host.len()
    }

    /// epoll's word on the socket.
    pub(super) fn note_readiness(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
    }

    /// Whether the host's end is closed, or shut both ways.
    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether bytes may go from the host to the guest.
    pub(super) fn carries_to_guest(&self) -> bool {
        match self.state {
            State::Open { guest, host } => !guest.receive && !host.send,
            State::Connecting | State::Closing | State::Draining | State::Closed => false,
        }
    }

    /// Whether the guest is owed a packet without data.
    pub(super) fn owes_control(&self) -> bool {
        let Owed { request, response, credit_update, credit_request, shutdown } = self.owed;
        self.state != State::Closed
            && (request || response || credit_update || credit_request || shutdown.is_some())
    }

    /// Whether there may be something to send to the guest. Finds on the way whether the guest has
    /// to be told or asked something.
    pub(super) fn wants_turn(&mut self) -> bool {
        let open = matches!(self.state, State::Open { .. });
        if open && self.window.update_due() {
            self.owed.credit_update = true;
        }
        let has_data = self.readable && self.carries_to_guest();
        if has_data && self.credit.ask() {
            self.owed.credit_request = true;
        }
        self.owes_control() || (has_data && self.credit.available() > 0)
    }

    /// Reads from the host as much as the guest has room for, `buffer.len()` at most.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> ReadOutcome {
        if !self.readable || !self.carries_to_guest() {
            return ReadOutcome::Later;
        }
        let room = usize::try_from(self.credit.available()).unwrap_or(usize::MAX);
        let len = buffer.len().min(room);
        let Some(buffer) = buffer.get_mut(..len).filter(|buffer| !buffer.is_empty()) else {
            return ReadOutcome::Later;
        };
        let read = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT)
        });
        match read {
            Ok((0, _)) if self.hung_up => ReadOutcome::Shut(Directions::BOTH),
            Ok((0, _)) => {
                self.readable = false;
                ReadOutcome::Shut(Directions { send: true, receive: false })
            }
            Ok((len, _)) => {
                self.credit.consume(u32::try_from(len).unwrap_or(u32::MAX));
                ReadOutcome::Data(len)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                ReadOutcome::Later
            }
            // Closed with bytes of ours unread.
            Err(Errno::CONNRESET) => ReadOutcome::Shut(Directions::BOTH),
            Err(error) => {
                tracing::warn!(%error, key = ?self.key, "cannot read from a vsock socket");
                ReadOutcome::Shut(Directions::BOTH)
            }
        }
    }

    /// The next packet without data that is owed to the guest.
    pub(super) fn next_control(&mut self, guest_cid: u64) -> Option<Header> {
        if !self.owes_control() {
            return None;
        }
        let mut flags = 0;
        let op = if std::mem::take(&mut self.owed.request) {
            op::REQUEST
        } else if std::mem::take(&mut self.owed.response) {
            op::RESPONSE
        } else if let Some(directions) = self.owed.shutdown.take() {
            flags = shutdown_flags(directions);
            op::SHUTDOWN
        } else if std::mem::take(&mut self.owed.credit_request) {
            op::CREDIT_REQUEST
        } else {
            op::CREDIT_UPDATE
        };
        Some(Header { flags, ..self.header(guest_cid, op, 0) })
    }

    /// A header for `len` bytes of data to the guest.
    pub(super) fn data_header(&mut self, guest_cid: u64, len: u32) -> Header {
        self.header(guest_cid, op::RW, len)
    }

    fn header(&mut self, guest_cid: u64, op: u16, len: u32) -> Header {
        // Every packet is a credit update.
        self.owed.credit_update = false;
        let Credit { buf_alloc, fwd_cnt } = self.window.tell();
        Header { len, buf_alloc, fwd_cnt, ..Header::to_guest(guest_cid, self.key, op) }
    }

    /// Closes the socket of a connection that ended in good order, so that the host reads an end of
    /// file: an `AF_UNIX` socket that is closed with bytes unread gives its peer `ECONNRESET`.
    pub(super) fn close(self) {
        self.shut(Shutdown::Both);
        let mut bin = [0; 4096];
        for _ in 0..MAX_DISCARD_READS {
            match rustix::net::recv(&self.socket, &mut bin, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }

    /// The guest sends no more and the host has it all: tell the host so.
    fn shut_write_when_drained(&mut self) {
        let guest_is_done =
            matches!(self.state, State::Open { guest: Directions { send: true, .. }, .. })
                || self.state == State::Closing;
        if guest_is_done && self.to_host.is_empty() && !self.write_shut {
            self.write_shut = true;
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&self, how: Shutdown) {
        if let Err(error) = rustix::net::shutdown(&self.socket, how) {
            // The host's end is gone: the same, only earlier.
            tracing::trace!(%error, key = ?self.key, "cannot shut down a vsock socket");
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends what the socket takes without waiting; 0 when it takes nothing now.
fn send(socket: BorrowedFd<'_>, data: &[u8]) -> Result<usize, HostDeaf> {
    // NOSIGNAL: no process dies of SIGPIPE because a pod closed a connection.
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::io::retry_on_intr(|| rustix::net::send(socket, data, flags)) {
        Ok(written) => Ok(written),
        Err(Errno::AGAIN) => Ok(0),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(HostDeaf),
        Err(error) => {
            tracing::warn!(%error, "cannot write to a vsock socket");
            Err(HostDeaf)
        }
    }
}

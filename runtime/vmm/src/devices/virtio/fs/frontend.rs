//! The connection to the file server: a front-end of vhost-user, each of whose requests is answered
//! in time or ends the connection.
//!
//! The server is not trusted. Of what it sends, only replies of one fixed length are read, and only
//! when one is due; descriptors that it sends are dropped by the kernel.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, recv, sendmsg,
    shutdown,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::super::F_VERSION_1;
use super::protocol::{
    Expected, F_PROTOCOL_FEATURES, HEADER_LEN, MAX_REGIONS, Malformed, PROTOCOL_F_REPLY_ACK,
    Region, Request, Rings,
};
use crate::GuestMemory;

/// How long the server may take to take up its work. It is started together with the VM, and on a
/// loaded host a process takes its time.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);

/// How long the server may take to stop, after the request that it works on.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The server is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrontendError {
    /// It is gone.
    #[error("the file server closed its connection")]
    Closed,
    /// It does not answer.
    #[error("the file server did not answer request {request} in {} s", limit.as_secs())]
    Timeout {
        /// The request.
        request: u32,
        /// How long was waited.
        limit: Duration,
    },
    /// It answers something else.
    #[error("the file server answers what was not asked")]
    Malformed(#[from] Malformed),
    /// It refuses.
    #[error("the file server refuses request {request} ({code})")]
    Refused {
        /// The request.
        request: u32,
        /// What it says.
        code: u64,
    },
    /// It lacks features.
    #[error("the file server lacks features {lacking:#x}")]
    Features {
        /// Which.
        lacking: u64,
    },
    /// It sent something without being asked.
    #[error("the file server sent a message unasked")]
    Unasked,
    /// Guest memory cannot be shared with it.
    #[error("guest memory is not in a file")]
    PrivateMemory,
    /// The socket failed.
    #[error("the connection to the file server failed")]
    Socket(#[source] Errno),
}

/// A queue as the server gets it.
#[derive(Debug)]
pub(super) struct SharedQueue<'a> {
    /// The rings, checked by the transport.
    pub(super) queue: &'a Queue,
    /// Signalled by the guest.
    pub(super) kick: BorrowedFd<'a>,
}

/// The connection. Requests are made one at a time.
#[derive(Debug)]
pub(super) struct Frontend {
    socket: OwnedFd,
    /// Features and acknowledgements are agreed on.
    is_introduced: bool,
    acknowledges: bool,
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Frontend {
    /// A connection over a stream socket.
    #[must_use]
    pub(super) fn new(socket: OwnedFd) -> Self {
        Frontend { socket, is_introduced: false, acknowledges: false }
    }

    /// Hands guest memory and all queues over to the server, which serves them from then on and says
    /// so by `call`.
    ///
    /// # Errors
    /// [`FrontendError`]: nobody serves the queues.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        queues: &[SharedQueue<'_>],
        call: BorrowedFd<'_>,
    ) -> Result<(), FrontendError> {
        let mut talk = Talk { frontend: self, limit: START_LIMIT, end: deadline(START_LIMIT) };
        let wanted = features | F_VERSION_1 | F_PROTOCOL_FEATURES;
        talk.introduce(wanted)?;
        talk.tell(&Request::SetFeatures(wanted))?;
        talk.tell(&Request::SetMemTable(regions(memory)?))?;
        for (index, SharedQueue { queue, kick }) in (0_u32..).zip(queues) {
            talk.tell(&Request::SetVringNum(index, queue.size()))?;
            talk.tell(&Request::SetVringBase(index, 0))?;
            let rings = Rings {
                descriptors: queue.desc_table(),
                available: queue.avail_ring(),
                used: queue.used_ring(),
            };
            talk.tell(&Request::SetVringAddr(index, rings))?;
            talk.tell(&Request::SetVringCall(index, call.as_raw_fd()))?;
            talk.tell(&Request::SetVringKick(index, kick.as_raw_fd()))?;
            talk.tell(&Request::SetVringEnable(index, true))?;
        }
        Ok(())
    }

    /// Takes the queues back: afterwards the server touches them no more.
    ///
    /// # Errors
    /// [`FrontendError`].
    pub(super) fn stop(&mut self, queues: u32) -> Result<(), FrontendError> {
        let mut talk = Talk { frontend: self, limit: STOP_LIMIT, end: deadline(STOP_LIMIT) };
        (0..queues).try_for_each(|queue| talk.ask(&Request::GetVringBase(queue)).map(drop))
    }

    /// What it means that the socket is readable while nothing was asked.
    #[must_use]
    pub(super) fn unasked(&self) -> Option<FrontendError> {
        match recv(&self.socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT | RecvFlags::PEEK) {
            Ok((_, 0)) => Some(FrontendError::Closed),
            Ok(_) => Some(FrontendError::Unasked),
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(errno) => Some(of_socket(errno)),
        }
    }

    /// Ends the connection, which tells the server to end.
    pub(super) fn close(&self) {
        match shutdown(&self.socket, Shutdown::Both) {
            Ok(()) | Err(Errno::NOTCONN) => {}
            Err(error) => tracing::debug!(%error, "cannot shut the file server's socket down"),
        }
    }
}

fn deadline(limit: Duration) -> Option<Instant> {
    Instant::now().checked_add(limit)
}

fn of_socket(errno: Errno) -> FrontendError {
    match errno {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => FrontendError::Closed,
        errno => FrontendError::Socket(errno),
    }
}

/// Guest memory as the server maps it.
fn regions(memory: &GuestMemory) -> Result<Vec<Region>, FrontendError> {
    let regions: Option<Vec<Region>> = memory
        .iter()
        .map(|region| {
            let file = region.file_offset()?;
            Some(Region {
                address: region.start_addr().0,
                len: region.len(),
                offset: file.start(),
                fd: file.file().as_raw_fd(),
            })
        })
        .collect();
    regions.filter(|regions| regions.len() <= MAX_REGIONS).ok_or(FrontendError::PrivateMemory)
}

/// Several requests that have to be done together in time.
struct Talk<'a> {
    frontend: &'a mut Frontend,
    limit: Duration,
    end: Option<Instant>,
}

impl Talk<'_> {
    /// Agrees on the protocol's features, once for each connection.
    fn introduce(&mut self, wanted: u64) -> Result<(), FrontendError> {
        if self.frontend.is_introduced {
            return Ok(());
        }
        self.tell(&Request::SetOwner)?;
        let offered = self.ask(&Request::GetFeatures)?;
        let lacking = wanted & !offered;
        if lacking != 0 {
            return Err(FrontendError::Features { lacking });
        }
        let offered = self.ask(&Request::GetProtocolFeatures)?;
        if offered & PROTOCOL_F_REPLY_ACK == 0 {
            return Err(FrontendError::Features { lacking: PROTOCOL_F_REPLY_ACK });
        }
        self.tell(&Request::SetProtocolFeatures(PROTOCOL_F_REPLY_ACK))?;
        self.frontend.acknowledges = true;
        self.frontend.is_introduced = true;
        Ok(())
    }

    /// Makes a request that says something.
    fn tell(&mut self, request: &Request) -> Result<(), FrontendError> {
        self.send(request)?;
        if !self.frontend.acknowledges {
            return Ok(());
        }
        match self.reply(request)? {
            0 => Ok(()),
            code => Err(FrontendError::Refused { request: request.code(), code }),
        }
    }

    /// Makes a request that has an answer: a number, or the two halves of a queue's state.
    fn ask(&mut self, request: &Request) -> Result<u64, FrontendError> {
        self.send(request)?;
        self.reply(request)
    }

    fn send(&mut self, request: &Request) -> Result<(), FrontendError> {
        let (bytes, fds) = request.encode(self.frontend.acknowledges);
        // SAFETY: the descriptors belong to guest memory and to eventfds that the caller borrows for
        // the whole of `start`.
        let fds: Vec<BorrowedFd<'_>> =
            fds.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(FrontendError::Socket(Errno::INVAL));
        }
        loop {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.frontend.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                // A message is far shorter than the room that a socket says it has.
                Ok(_) => return Err(FrontendError::Socket(Errno::MSGSIZE)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, request)?,
                Err(errno) => return Err(of_socket(errno)),
            }
        }
    }

    fn reply(&mut self, request: &Request) -> Result<u64, FrontendError> {
        let mut header = [0; HEADER_LEN];
        self.receive(&mut header, request)?;
        request.check_reply(header)?;
        let mut payload = [0; Expected::LEN];
        self.receive(&mut payload, request)?;
        Ok(u64::from_ne_bytes(payload))
    }

    /// Fills `bytes`.
    fn receive(&mut self, bytes: &mut [u8], request: &Request) -> Result<(), FrontendError> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match recv(&self.frontend.socket, rest, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(FrontendError::Closed),
                Ok((_, got)) => done = done.saturating_add(got),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, request)?,
                Err(errno) => return Err(of_socket(errno)),
            }
        }
        Ok(())
    }

    /// Waits until the socket can be used, or time is up.
    fn wait(&self, events: PollFlags, request: &Request) -> Result<(), FrontendError> {
        let timeout = FrontendError::Timeout { request: request.code(), limit: self.limit };
        let left = self.end.map(|end| end.saturating_duration_since(Instant::now()));
        let Some(left) = left.filter(|left| !left.is_zero()) else { return Err(timeout) };
        let left = Timespec::try_from(left).map_err(|_| FrontendError::Socket(Errno::INVAL))?;
        match poll(&mut [PollFd::new(&self.frontend.socket, events)], Some(&left)) {
            Ok(0) => Err(timeout),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(FrontendError::Socket(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_server_that_is_silent_or_stops_half_way_is_not_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut frontend = Frontend::new(ours.into());
        for said in [&[][..], &1_u32.to_ne_bytes()] {
            std::io::Write::write_all(&mut theirs, said).unwrap();
            let limit = Duration::from_millis(20);
            let mut talk = Talk { frontend: &mut frontend, limit, end: deadline(limit) };
            let error = talk.ask(&Request::GetFeatures).unwrap_err();
            assert!(matches!(error, FrontendError::Timeout { request: 1, .. }), "{error}");
        }
    }

    #[test]
    fn a_server_that_reads_nothing_is_not_waited_for() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut frontend = Frontend::new(ours.into());
        let limit = Duration::from_millis(200);
        let mut talk = Talk { frontend: &mut frontend, limit, end: deadline(limit) };
        let error = loop {
            if let Err(error) = talk.send(&Request::SetOwner) {
                break error;
            }
        };
        assert!(matches!(error, FrontendError::Timeout { request: 3, .. }), "{error}");
    }
}

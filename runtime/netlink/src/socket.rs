//! The socket: one request at a time, answered before the next.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

use crate::wire::{self, Malformed, Message, Reply, flags};

/// `NLMSG_ERROR`, which is also the acknowledgement, and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Size of a buffer that no datagram of a dump exceeds: the kernel makes them of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Most objects that are taken from one dump: far more than an interface's routes.
const MAX_OBJECTS: usize = 1 << 20;

/// How often a dump that was interrupted by a change is asked for again.
const MAX_DUMPS: usize = 16;

/// How long the kernel may take to answer. It does so in the request itself.
const ANSWER_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket cannot be used.
    #[error("cannot {0} a netlink socket")]
    Socket(&'static str, #[source] Errno),
    /// The kernel refused it.
    #[error("{0}")]
    Refused(Errno),
    /// The answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// What was asked for changes faster than it can be told, or there is too much of it.
    #[error("the kernel's tables are too large, or change too fast, to be read")]
    TooMuch,
}

impl NetlinkError {
    /// Whether the kernel refused the request for this reason.
    #[must_use]
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, NetlinkError::Refused(refused) if *refused == errno)
    }

    /// `Ok` if the kernel refused the request for one of these reasons.
    ///
    /// # Errors
    /// Any other failure.
    pub fn tolerate(result: Result<(), Self>, fine: &[Errno]) -> Result<(), Self> {
        match result {
            Err(NetlinkError::Refused(errno)) if fine.contains(&errno) => Ok(()),
            other => other,
        }
    }
}

/// A socket to the network namespace in which it was opened, wherever it is used. Blocks for
/// moments.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket to the network namespace of this thread.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open() -> Result<Self, NetlinkError> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is 0.
            None,
        )
        .map_err(|errno| NetlinkError::Socket("open", errno))?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))
            .map_err(|errno| NetlinkError::Socket("bind", errno))?;
        set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER_LIMIT))
            .map_err(|errno| NetlinkError::Socket("set up", errno))?;
        Ok(Socket { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Makes a request that changes something, and waits for its acknowledgement.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] with the kernel's reason, and others.
    pub fn request(&mut self, message: &Message) -> Result<(), NetlinkError> {
        self.send(message)?;
        loop {
            let outcome = self.receive(|reply| match reply.kind {
                ERROR => Ok(Some(outcome(reply.body)?)),
                _ => Ok(None),
            })?;
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    /// Asks for objects, and reads each by `read`, which is given the fixed part and the attributes
    /// together; what it has no use for is `None`.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn dump<T>(
        &mut self,
        message: &Message,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..MAX_DUMPS {
            if let Some(objects) = self.dump_once(message, &read)? {
                return Ok(objects);
            }
        }
        Err(NetlinkError::TooMuch)
    }

    /// `None` if the objects changed meanwhile.
    fn dump_once<T>(
        &mut self,
        message: &Message,
        read: &impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NetlinkError> {
        self.send(message)?;
        let mut objects = Vec::new();
        let mut interrupted = false;
        loop {
            let end = self.receive(|reply| {
                interrupted |= reply.flags & flags::DUMP_INTERRUPTED != 0;
                match reply.kind {
                    DONE => Ok(Some(Ok(()))),
                    ERROR => Ok(Some(outcome(reply.body)?)),
                    _ => {
                        objects.extend(read(reply.body));
                        Ok(None)
                    }
                }
            })?;
            if let Some(end) = end {
                end?;
                return Ok((!interrupted).then_some(objects));
            }
            if objects.len() > MAX_OBJECTS {
                return Err(NetlinkError::TooMuch);
            }
        }
    }

    fn send(&mut self, message: &Message) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.bytes(self.sequence);
        // Without an address it goes to the kernel.
        let sent = send(&self.fd, &bytes, SendFlags::empty());
        sent.map(drop).map_err(|errno| NetlinkError::Socket("write to", errno))
    }

    /// Reads one datagram, and gives its messages to `take` until that has an answer.
    fn receive<T>(
        &mut self,
        mut take: impl FnMut(Reply<'_>) -> Result<Option<T>, Malformed>,
    ) -> Result<Option<T>, NetlinkError> {
        let length = loop {
            match recv(&self.fd, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                Ok((_, length)) => break length,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(NetlinkError::Socket("read from", errno)),
            }
        };
        let datagram = self.buffer.get(..length).ok_or(Malformed)?;
        for reply in wire::messages(datagram) {
            let reply = reply?;
            // What is left of a request that was given up.
            if reply.sequence != self.sequence {
                continue;
            }
            if let Some(answer) = take(reply)? {
                return Ok(Some(answer));
            }
        }
        Ok(None)
    }
}

/// What an acknowledgement says: a negative error number, or zero.
fn outcome(body: &[u8]) -> Result<Result<(), NetlinkError>, Malformed> {
    let code = wire::u32_at(body, 0).ok_or(Malformed)?.cast_signed();
    match code {
        0 => Ok(Ok(())),
        code => {
            let errno = code.checked_neg().ok_or(Malformed)?;
            Ok(Err(NetlinkError::Refused(Errno::from_raw_os_error(errno))))
        }
    }
}

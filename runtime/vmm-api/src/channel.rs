//! [`Channel`]: messages with descriptors over a `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::FdIndex;

/// Longest message, in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;

/// Most descriptors with one message (Linux allows 253: `SCM_MAX_FD`).
pub const MAX_FDS: usize = 128;

/// What can go wrong on a [`Channel`].
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A socket could not be made.
    #[error("cannot make a control socket")]
    Create(#[source] Errno),
    /// The peer did not take the message, or is gone.
    #[error("cannot send on the control socket")]
    Send(#[source] Errno),
    /// Nothing could be received.
    #[error("cannot receive on the control socket")]
    Receive(#[source] Errno),
    /// The message is longer than [`MAX_MESSAGE_LEN`] or has more than [`MAX_FDS`] descriptors.
    #[error("control message too large: {len} bytes, {fds} descriptors")]
    TooLarge {
        /// Its length in bytes; of a received message, what arrived of it.
        len: usize,
        /// Its descriptors.
        fds: usize,
    },
    /// The message is not of the expected form.
    #[error("malformed control message {text:?}")]
    Malformed {
        /// Its beginning.
        text: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A message refers to a descriptor that did not come with it, or refers to one twice.
    #[error("control message refers to descriptor {index}, which did not come with it")]
    NoSuchFd {
        /// The reference.
        index: u32,
    },
}

/// A received message and the descriptors that came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    fds: Vec<Option<OwnedFd>>,
}

impl<T> Received<T> {
    /// Takes the descriptor to which the message refers by `index`.
    ///
    /// # Errors
    /// [`ChannelError::NoSuchFd`] if there is none, or it was taken already.
    pub fn take_fd(&mut self, index: FdIndex) -> Result<OwnedFd, ChannelError> {
        usize::try_from(index.0)
            .ok()
            .and_then(|i| self.fds.get_mut(i))
            .and_then(Option::take)
            .ok_or(ChannelError::NoSuchFd { index: index.0 })
    }
}

/// One end of a control socket. Messages keep their boundaries and their order.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Makes a connected pair: one end for each process. Both are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Create`].
    pub fn pair() -> Result<(Channel, Channel), ChannelError> {
        let (a, b) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(ChannelError::Create)?;
        Ok((Channel { socket: a }, Channel { socket: b }))
    }

    /// Takes over a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn from_fd(socket: OwnedFd) -> Self {
        Channel { socket }
    }

    /// Gives up the socket.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message. Blocks while the peer's queue is full, unless the socket is non-blocking.
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`]; [`ChannelError::Send`], with `EAGAIN` if it would block and with
    /// `EPIPE` if the peer is gone.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_with(message, fds, SendFlags::NOSIGNAL)
    }

    /// As [`Channel::send`], but never blocks: `EAGAIN` if the peer's queue is full.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn try_send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_with(message, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message)
            .map_err(|source| ChannelError::Malformed { text: String::new(), source })?;
        if bytes.len() > MAX_MESSAGE_LEN || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge { len: bytes.len(), fds: fds.len() });
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLarge { len: bytes.len(), fds: fds.len() });
        }
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Send(errno)),
            }
        }
    }

    /// Receives one message; `None` when the peer has closed its end. Blocks until there is one,
    /// unless the socket is non-blocking.
    ///
    /// # Errors
    /// [`ChannelError::Receive`], with `EAGAIN` if it would block; [`ChannelError::TooLarge`] and
    /// [`ChannelError::Malformed`], after which the channel can be used on.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE_LEN];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => break got,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(ChannelError::Receive(errno)),
            }
        };
        let fds: Vec<Option<OwnedFd>> = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.map(Some).collect(),
                _ => Vec::new(),
            })
            .collect();
        if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ChannelError::TooLarge { len: got.bytes, fds: fds.len() });
        }
        // No message is empty, so an empty packet is the end of the file.
        if got.bytes == 0 {
            return Ok(None);
        }
        let text = bytes.get(..got.bytes).unwrap_or_default();
        let message = serde_json::from_slice(text).map_err(|source| ChannelError::Malformed {
            text: String::from_utf8_lossy(text).chars().take(120).collect(),
            source,
        })?;
        Ok(Some(Received { message, fds }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;
    use crate::{Event, Exit, Request};

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let sent = Request::VsockConnect { id: 7, port: 1024, fd: FdIndex(0) };
        a.send(&sent, &[far.as_fd()]).unwrap();
        drop(far);
        let mut got = b.receive::<Request>().unwrap().unwrap();
        assert_eq!(got.message, sent);
        let mut arrived: std::fs::File = got.take_fd(FdIndex(0)).unwrap().into();
        arrived.write_all(b"hello").unwrap();
        drop(arrived);
        let mut text = String::new();
        near.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_descriptor_is_given_out_once() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&Request::Stop, &[b.as_fd()]).unwrap();
        let mut got = b.receive::<Request>().unwrap().unwrap();
        got.take_fd(FdIndex(0)).unwrap();
        assert!(matches!(got.take_fd(FdIndex(0)), Err(ChannelError::NoSuchFd { index: 0 })));
        assert!(got.take_fd(FdIndex(u32::MAX)).is_err());
    }

    #[test]
    fn a_closed_peer_is_the_end() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&Event::Exited(Exit::Reboot), &[]).unwrap();
        drop(a);
        assert_eq!(b.receive::<Event>().unwrap().unwrap().message, Event::Exited(Exit::Reboot));
        assert!(b.receive::<Event>().unwrap().is_none());
        assert!(matches!(b.send(&Request::Stop, &[]), Err(ChannelError::Send(Errno::PIPE))));
    }

    #[test]
    fn an_unknown_field_is_refused_and_the_channel_lives_on() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&serde_json::json!({"vsock_connect": {"id": 1, "port": 2, "fd": 0, "x": 1}}), &[])
            .unwrap();
        a.send(&Request::Stop, &[]).unwrap();
        let refused = b.receive::<Request>().unwrap_err();
        assert!(matches!(&refused, ChannelError::Malformed { text, .. } if text.contains("\"x\"")));
        assert_eq!(b.receive::<Request>().unwrap().unwrap().message, Request::Stop);
    }

    #[test]
    fn a_message_over_the_limit_is_refused() {
        let (a, _b) = Channel::pair().unwrap();
        let refused = a.send(&"x".repeat(MAX_MESSAGE_LEN), &[]).unwrap_err();
        assert!(matches!(refused, ChannelError::TooLarge { .. }));
    }

    #[test]
    fn try_send_does_not_wait_for_a_peer_that_does_not_read() {
        let (a, _b) = Channel::pair().unwrap();
        let full = (0..100_000).find_map(|_| a.try_send(&Request::Counters, &[]).err());
        assert!(matches!(full, Some(ChannelError::Send(Errno::AGAIN))));
    }
}

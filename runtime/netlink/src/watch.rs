//! Notifications that something changed, in the network namespace in which the socket was opened.
//!
//! What changed is not read from them: a notification can be lost, and then the state has to be read
//! as a whole anyway. So that is what is done after any of them, and there is nothing to get wrong.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::NetlinkError;

/// `RTMGRP_*`: interfaces, neighbours, addresses and routes of both families.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// Most notifications that are taken at once; the rest makes the socket readable again.
const MAX_TAKEN: usize = 1024;

/// A socket that is readable when interfaces, addresses, routes or neighbours have changed since
/// [`Changes::take`].
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Watches the network namespace of this thread.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open() -> Result<Self, NetlinkError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .map_err(|errno| NetlinkError::Socket("open", errno))?;
        bind(&fd, &SocketAddrNetlink::new(0, GROUPS))
            .map_err(|errno| NetlinkError::Socket("bind", errno))?;
        Ok(Changes(fd))
    }

    /// Takes what has come. True if anything has, or has been lost.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn take(&self) -> Result<bool, NetlinkError> {
        // Of a datagram that does not fit the rest is thrown away: all of it would be.
        let mut buffer = [0; 16];
        let mut any = false;
        for _ in 0..MAX_TAKEN {
            match recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty()) {
                // ENOBUFS: more came than there was room for.
                Ok(_) | Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(any),
                Err(errno) => return Err(NetlinkError::Socket("read from", errno)),
            }
        }
        Ok(any)
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

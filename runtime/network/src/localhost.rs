//! `localhost` of a pod's network namespace.
//!
//! Kubelets' runtimes forward a port by entering the namespace and connecting to `localhost` there.
//! The pod's servers are in the guest, so these connections are taken, on whatever port
//! (`lookup`), for whoever carries them there (docs/adr/0022).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsFd;

use crate::lookup::{self, Lookup};
use crate::netns::{Netns, NetnsError};

/// Why connections cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LocalhostError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Nobody can listen in it.
    #[error("cannot listen on the loopback interface of the pod's network namespace")]
    Listen(#[source] io::Error),
    /// Connections cannot be led to who listens.
    #[error("cannot have the kernel lead connections to it; that needs Linux 5.9 with BPF")]
    Redirect(#[source] io::Error),
}

/// All TCP connections to the loopback addresses of a namespace. A connection's own address is the
/// one that was meant. They are left alone again when this is dropped, and with this process.
#[derive(Debug)]
pub struct Localhost {
    /// Where they arrive, one for each family of addresses that there is; they do not block.
    pub listeners: Vec<TcpListener>,
    redirection: Redirection,
}

/// What makes connections arrive; they do as long as this lives.
#[derive(Debug)]
pub struct Redirection {
    _lookup: Lookup,
}

impl Localhost {
    /// Takes them.
    ///
    /// # Errors
    /// [`LocalhostError`].
    pub fn take(netns: &Netns) -> Result<Self, LocalhostError> {
        // A socket is of the namespace that it was made in, wherever it is used.
        let listen = || {
            let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            v4.set_nonblocking(true)?;
            let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0));
            let v6 = v6.and_then(|v6| v6.set_nonblocking(true).map(|()| v6));
            io::Result::Ok((v4, v6))
        };
        let (v4, v6) = netns.enter(listen)?.map_err(LocalhostError::Listen)?;
        let v6 = v6.inspect_err(|error| tracing::debug!(%error, "no IPv6 in the namespace")).ok();
        let lookup = lookup::redirect(netns.as_fd(), v4.as_fd(), v6.as_ref().map(AsFd::as_fd));
        let redirection = Redirection { _lookup: lookup.map_err(LocalhostError::Redirect)? };
        Ok(Localhost { listeners: [v4].into_iter().chain(v6).collect(), redirection })
    }

    /// Its parts.
    #[must_use]
    pub fn into_parts(self) -> (Vec<TcpListener>, Redirection) {
        (self.listeners, self.redirection)
    }
}

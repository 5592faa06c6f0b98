//! Connections to servers in the pod's network, made by the agent and carried here (docs/adr/0017).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use husk_proto::agent::dial_response::Result as Wire;
use husk_proto::agent::{self as proto, Connected};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;

use super::{Guest, GuestError, clean};
use crate::task::Task;

/// Longest time-out that the agent takes, in ms.
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;

/// How long a server on the loopback interface may take to accept a forwarded connection. It refuses
/// at once; one whose queue is full is waited for.
const FORWARD_LIMIT: Duration = Duration::from_secs(60);

/// Which loopback address of the guest is tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loopback {
    /// 127.0.0.1
    V4,
    /// ::1
    V6,
}

impl Loopback {
    fn both(self) -> [IpAddr; 2] {
        let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
        match self {
            Loopback::V4 => [v4, v6],
            Loopback::V6 => [v6, v4],
        }
    }
}

/// A connection to a server in the pod's network.
///
/// What is shut down for writing ends there too, and the other way round. Dropping it ends the
/// connection at once, also in the guest: who wants all that was written to arrive shuts it down,
/// reads to the end, and [finishes](Tunnel::finish) it.
#[derive(Debug)]
pub struct Tunnel {
    stream: UnixStream,
    /// The agent carries bytes as long as its call is not given up.
    call: Option<Task<Result<Result<(), String>, GuestError>>>,
    /// Its place among the forwarded ones.
    place: Option<OwnedSemaphorePermit>,
}

impl Tunnel {
    /// Waits until the server has got all that was written, as far as it takes it: for one that was
    /// shut down for writing and read to its end.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn finish(self) -> Result<(), GuestError> {
        let Tunnel { stream, call, place: _counted } = self;
        let Some(call) = call else { return Ok(()) };
        let answer = call.await;
        drop(stream);
        match answer {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(CUT_OFF),
        }
    }
}

/// Of a call whose task is gone.
const CUT_OFF: GuestError = GuestError::Nonsense { rpc: "Dial", what: "the call was cut off" };

impl Guest {
    /// Connects to a server from within the pod's network; `None` is the pod's own address. Or says
    /// why the server does not accept, after `limit` at the latest.
    ///
    /// # Errors
    /// [`GuestError`]; `Refused` with the code `ResourceExhausted` if there are too many already.
    pub async fn dial(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<Tunnel, String>, GuestError> {
        let (stream_port, accept) = self.expect_stream();
        let (guest, request) = (self.clone(), request(address, port, stream_port, limit));
        let mut call = Task::spawn(async move { guest.request_dial(request).await });
        let mut connected = pin!(accept.connected());
        let answer = tokio::select! {
            biased;
            stream = &mut connected => {
                let stream = stream.map_err(GuestError::Vm)?;
                return Ok(Ok(Tunnel { stream, call: Some(call), place: None }));
            }
            answer = &mut call => answer,
        };
        match answer {
            Ok(Ok(Err(why))) => Ok(Err(why)),
            Ok(Err(error)) => Err(error),
            // It came, it was at its end at once, and word of that was faster.
            Ok(Ok(Ok(()))) => {
                let stream = connected.await.map_err(GuestError::Vm)?;
                Ok(Ok(Tunnel { stream, call: None, place: None }))
            }
            Err(_) => Err(CUT_OFF),
        }
    }

    /// Connects to a server in the guest, on one loopback address or else on the other: it may
    /// listen on either, or on all addresses. Or says why it does not accept.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::TooManyForwards`] if there are.
    pub async fn forward(
        &self,
        port: u16,
        first: Loopback,
    ) -> Result<Result<Tunnel, String>, GuestError> {
        let place = self.forwards.clone().try_acquire_owned();
        let place = place.map_err(|_| GuestError::TooManyForwards)?;
        let mut refusals = Vec::new();
        for address in first.both() {
            match self.dial(Some(address), port, FORWARD_LIMIT).await? {
                Ok(tunnel) => return Ok(Ok(Tunnel { place: Some(place), ..tunnel })),
                Err(why) => refusals.push(why),
            }
        }
        Ok(Err(refusals.join("; ")))
    }

    /// Sees whether a server accepts, as [`Guest::dial`], or why not.
    ///
    /// # Errors
    /// As [`Guest::dial`].
    pub async fn knock(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<(), String>, GuestError> {
        self.request_dial(request(address, port, 0, limit)).await
    }

    async fn request_dial(
        &self,
        request: proto::DialRequest,
    ) -> Result<Result<(), String>, GuestError> {
        let proto::DialResponse { result } = call!(self, dial, "Dial", request)?;
        match result {
            Some(Wire::Connected(Connected {})) => Ok(Ok(())),
            Some(Wire::Failure(why)) => Ok(Err(clean(&why))),
            None => Err(GuestError::Nonsense { rpc: "Dial", what: "it is empty" }),
        }
    }
}

fn request(
    address: Option<IpAddr>,
    port: u16,
    stream_port: u32,
    limit: Duration,
) -> proto::DialRequest {
    let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).clamp(1, MAX_TIMEOUT_MS);
    // The protocol's word for the pod's own address is none at all.
    let host = address.map(|address| address.to_string()).unwrap_or_default();
    proto::DialRequest { host, port: port.into(), stream_port, timeout_ms }
}

impl AsFd for Tunnel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

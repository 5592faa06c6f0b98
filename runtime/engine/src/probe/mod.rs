//! Questions to servers of a pod: TCP, HTTP, HTTPS, gRPC's health check. They are put by the pod's
//! process, which speaks with the server through a tunnel that the agent makes in the pod's network
//! (docs/adr/0017). Host names are those of the host's resolver, as for the kubelet.
//!
//! What it is not for: when a question is put and what follows from the answer
//! ([`crate::pod`]), and commands in containers.
//!
//! The servers are the containers', so that whatever they answer is hostile: it is read within bounds
//! of time ([`put`]) and of size ([`bounded`]), and of the connection nothing outlives the question.

mod bounded;
mod grpc;
mod http;
mod resolve;
mod tls;
pub(crate) mod url;

use std::future::Future;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::guest::{GuestError, clean};
use crate::types::{HttpGet, TcpSocket};
use bounded::Bounded;

/// Most bytes of an answer that are told, as in the kubelet.
const MAX_MESSAGE: usize = 10 * 1024;

/// Name and version, as the kubelet tells its own.
const USER_AGENT: &str = concat!("kube-probe/husk-", env!("CARGO_PKG_VERSION"));

/// Least time that an address of several is given, as in Go.
const LEAST_SHARE: Duration = Duration::from_secs(2);

/// What makes connections within the pod's network: its guest, or what stands for it in a test.
pub(crate) trait Dialer: Sync {
    /// A connection; nothing of it is left when it is dropped.
    type Stream: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static;

    /// Connects to a server; `None` is the pod's own address. Or says why it does not accept, after
    /// `limit` at the latest.
    fn dial(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> impl Future<Output = Result<Result<Self::Stream, String>, GuestError>> + Send;

    /// The same, only to see whether it accepts.
    fn knock(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> impl Future<Output = Result<Result<(), String>, GuestError>> + Send;
}

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question<'a> {
    /// A request whose status is 200 to 399; or, with `any_status`, that has any answer.
    Http { get: &'a HttpGet, any_status: bool },
    /// A server that accepts.
    Tcp(&'a TcpSocket),
    /// A service, or with an empty name a server, that is `SERVING`.
    Grpc { port: u16, service: &'a str },
}

/// What came of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) success: bool,
    /// What was answered, or why nothing was.
    pub(crate) message: String,
}

/// Why there is no answer.
#[derive(Debug)]
enum Fault {
    /// The server gives none, or not one that could be used.
    Server(String),
    /// The guest, or its agent.
    Guest(GuestError),
}

impl From<GuestError> for Fault {
    fn from(error: GuestError) -> Self {
        Fault::Guest(error)
    }
}

/// A server of which it is not known yet where it is, and until when it can be asked.
#[derive(Debug)]
struct Route<'a, D> {
    dialer: &'a D,
    addresses: Vec<Option<IpAddr>>,
    deadline: Instant,
}

impl<'a, D: Dialer> Route<'a, D> {
    async fn to(dialer: &'a D, host: &str, deadline: Instant) -> Result<Self, Fault> {
        let addresses = resolve::resolve(host).await.map_err(Fault::Server)?;
        Ok(Route { dialer, addresses, deadline })
    }

    /// Connects to the first of the addresses that accepts.
    async fn dial(&self, port: u16) -> Result<Bounded<D::Stream>, Fault> {
        self.first(|address, limit| self.dialer.dial(address, port, limit)).await.map(Bounded::new)
    }

    async fn knock(&self, port: u16) -> Result<(), Fault> {
        self.first(|address, limit| self.dialer.knock(address, port, limit)).await
    }

    /// Tries the addresses one after another, each with its share of the time that is left.
    async fn first<T, F>(&self, attempt: impl Fn(Option<IpAddr>, Duration) -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<Result<T, String>, GuestError>>,
    {
        let mut why = None;
        let mut left = u32::try_from(self.addresses.len()).unwrap_or(u32::MAX);
        for address in &self.addresses {
            let time = self.deadline.saturating_duration_since(Instant::now());
            let share = time.checked_div(left).unwrap_or(time).max(LEAST_SHARE).min(time);
            left = left.saturating_sub(1);
            match attempt(*address, share).await? {
                Ok(connected) => return Ok(connected),
                // As in Go, the first reason is the one that is told.
                Err(reason) => why = why.or(Some(reason)),
            }
        }
        Err(Fault::Server(why.unwrap_or_else(|| "there is no address to connect to".into())))
    }
}

/// Puts a question and waits for the answer, or for the time to be over.
///
/// # Errors
/// [`GuestError`]: the question could not be put. That a server gives no answer is an answer.
pub(crate) async fn put<D: Dialer>(
    dialer: &D,
    question: Question<'_>,
    limit: Duration,
) -> Result<Answer, GuestError> {
    let deadline = Instant::now().checked_add(limit).unwrap_or_else(Instant::now);
    let ask = async {
        match question {
            Question::Http { get, any_status } => {
                let route = Route::to(dialer, &get.host, deadline).await?;
                http::get(&route, get, any_status).await
            }
            Question::Tcp(TcpSocket { host, port }) => {
                Route::to(dialer, host, deadline).await?.knock(*port).await?;
                Ok(Answer { success: true, message: String::new() })
            }
            Question::Grpc { port, service } => {
                let route = Route::to(dialer, "", deadline).await?;
                grpc::check(route.dial(port).await?, port, service).await
            }
        }
    };
    let answered = tokio::time::timeout_at(deadline, ask)
        .await
        .unwrap_or_else(|_| Err(Fault::Server(format!("no answer in {limit:?}"))));
    match answered {
        Ok(Answer { success, message }) => Ok(Answer { success, message: clean(&message) }),
        Err(Fault::Server(why)) => Ok(Answer { success: false, message: clean(&why) }),
        Err(Fault::Guest(error)) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

//! Connections to servers, made from within the pod's network namespace, which is the guest's, and
//! carried to the host.
//!
//! What flows is nothing that the agent would look at: who asks on the host speaks HTTP, TLS or gRPC
//! with the server itself (see docs/adr/0017). Nothing is read before what was read has been taken, so
//! that an end that stops reading grows nobody's memory: a connection has two buffers of [`BUFFER`]
//! bytes, and there are at most [`MAX_CONNECTIONS`], which is 4 MiB.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::DialRequest;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};

use crate::transport::{ConnectError, Transport};

/// Most connections at once, those included that are only tried.
const MAX_CONNECTIONS: usize = 128;

/// How much of each direction is in the agent.
const BUFFER: usize = 16 * 1024;

/// Longest time that a server can be given to accept.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// A connection that cannot be asked for, or not be carried to the host. That a server does not
/// accept is none of these.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("host: {0:?} must be an address or empty")]
    Host(String),
    #[error("port: {0} must be 1 to 65535")]
    Port(u32),
    #[error("timeout_ms: {0} must be 1 to 86400000")]
    Timeout(u64),
    #[error("there are {MAX_CONNECTIONS} connections already")]
    TooMany,
    #[error("the guest shuts down")]
    Ending,
    #[error("stream_port")]
    Connect(#[source] ConnectError),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> DialError {
    move |source| DialError::Io { what, source }
}

/// What makes the connections. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    transport: Transport,
    free: Arc<Semaphore>,
    /// True once there are to be no connections any more.
    ending: watch::Sender<bool>,
}

impl Dialer {
    pub(crate) fn new(transport: Transport) -> Self {
        let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Self { transport, free, ending: watch::Sender::new(false) }
    }

    /// Ends all connections, and refuses more.
    pub(crate) fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Connects to a server, or says why it does not accept. If the request names a port of the
    /// host, the connection is carried there, and this returns when it is over; dropping this ends
    /// it.
    ///
    /// # Errors
    /// [`DialError`].
    pub(crate) async fn dial(&self, request: DialRequest) -> Result<Result<(), String>, DialError> {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            biased;
            // The sender is in `self`.
            _ = ending.wait_for(|ending| *ending) => Err(DialError::Ending),
            dialled = self.connect_and_carry(request) => dialled,
        }
    }

    async fn connect_and_carry(
        &self,
        request: DialRequest,
    ) -> Result<Result<(), String>, DialError> {
        let DialRequest { host, port, stream_port, timeout_ms } = request;
        let address = address(&host, port)?;
        let limit = Duration::from_millis(timeout_ms);
        if limit.is_zero() || limit > MAX_TIMEOUT {
            return Err(DialError::Timeout(timeout_ms));
        }
        let _counted = self.free.try_acquire().map_err(|_| DialError::TooMany)?;
        let server = match tokio::time::timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(server)) => server,
            Ok(Err(error)) => return Ok(Err(format!("connect to {address}: {error}"))),
            Err(_) => return Ok(Err(format!("connect to {address}: no answer in {limit:?}"))),
        };
        if stream_port != 0 {
            let server = as_stream(server).map_err(failed("take a connection"))?;
            let host = self.transport.connect(stream_port).await.map_err(DialError::Connect)?;
            carry(server, host).await;
        }
        Ok(Ok(()))
    }
}

/// Where a server is. The pod's own address is the loopback's, as long as it has no other.
fn address(host: &str, port: u32) -> Result<SocketAddr, DialError> {
    let port = match u16::try_from(port) {
        Ok(port @ 1..) => port,
        _ => return Err(DialError::Port(port)),
    };
    let ip = match host {
        "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        text => text.parse().map_err(|_| DialError::Host(text.to_owned()))?,
    };
    Ok(SocketAddr::new(ip, port))
}

/// A TCP connection as the transport has those to the host: handled as if it were a Unix one, so
/// that both ends are carried by the same code. What is called on it is the same for both families.
fn as_stream(server: TcpStream) -> io::Result<UnixStream> {
    // Whoever wrote a piece did not want it to wait for the next.
    server.set_nodelay(true)?;
    UnixStream::from_std(OwnedFd::from(server.into_std()?).into())
}

/// Carries bytes both ways until both ends have said that this was all, or one is broken.
async fn carry(mut server: UnixStream, mut host: UnixStream) {
    let (from_server, to_server) = server.split();
    let (from_host, to_host) = host.split();
    let up = async {
        if let Err(error) = one_way(from_host, to_server).await {
            // What it answered may be there to read, and then its end.
            tracing::debug!(%error, "a server takes no more");
        }
        Ok::<_, io::Error>(())
    };
    if let Err(error) = tokio::try_join!(up, one_way(from_server, to_host)) {
        tracing::debug!(%error, "a connection broke off");
    }
}

/// Carries bytes until their end, and tells that end.
async fn one_way(from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BUFFER, from);
    tokio::io::copy_buf(&mut from, &mut to).await?;
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, UnixListener};

    const LIMIT_MS: u64 = 60_000;
    const PORT: u32 = 5000;

    /// A host that listens on [`PORT`].
    struct Host {
        _directory: tempfile::TempDir,
        listener: UnixListener,
        dialer: Dialer,
    }

    impl Host {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join(PORT.to_string())).unwrap();
            let dialer = Dialer::new(Transport::Unix(directory.path().to_owned()));
            Host { _directory: directory, listener, dialer }
        }

        /// Dials in the background.
        fn dial(&self, port: u16) -> tokio::task::JoinHandle<Result<(), String>> {
            let dialer = self.dialer.clone();
            tokio::spawn(async move { dialer.dial(request(port, PORT)).await.unwrap() })
        }

        async fn accept(&self) -> UnixStream {
            self.listener.accept().await.unwrap().0
        }
    }

    fn request(port: u16, stream_port: u32) -> DialRequest {
        let host = String::new();
        DialRequest { host, port: port.into(), stream_port, timeout_ms: LIMIT_MS }
    }

    async fn server() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    #[test]
    fn only_addresses_are_reached() {
        assert_eq!(address("", 80).unwrap().to_string(), "127.0.0.1:80");
        assert_eq!(address("::1", 65535).unwrap().to_string(), "[::1]:65535");
        for host in ["example.com", "localhost", "127.0.0.1:80", "[::1]", "fe80::1%lo", "\0"] {
            assert!(matches!(address(host, 1), Err(DialError::Host(text)) if text == host));
        }
        for port in [0, 65536, u32::MAX] {
            assert!(matches!(address("", port), Err(DialError::Port(number)) if number == port));
        }
    }

    #[tokio::test]
    async fn what_cannot_be_asked_is_told_apart_from_a_server_that_does_not_accept() {
        let host = Host::new();
        for timeout_ms in [0, 86_400_001, u64::MAX] {
            let refused = host.dialer.dial(DialRequest { timeout_ms, ..request(1, 0) }).await;
            assert!(matches!(refused, Err(DialError::Timeout(ms)) if ms == timeout_ms));
        }
        let (listener, port) = server().await;
        assert_eq!(host.dialer.dial(request(port, 0)).await.unwrap(), Ok(()));
        drop(listener);
        for stream_port in [0, PORT] {
            let why = host.dialer.dial(request(port, stream_port)).await.unwrap().unwrap_err();
            assert!(why.contains("refused"), "{why}");
        }
        let (_listener, port) = server().await;
        let nobody = host.dialer.dial(request(port, PORT + 1)).await;
        assert!(matches!(nobody, Err(DialError::Connect(_))), "{nobody:?}");
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_each_end_is_told() {
        let host = Host::new();
        let (listener, port) = server().await;
        let dialled = host.dial(port);
        let (mut server, _) = listener.accept().await.unwrap();
        let mut client = host.accept().await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question");
        // The other way is still open.
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        text.clear();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "answer");
        assert_eq!(dialled.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_server_that_has_said_all_still_listens() {
        let host = Host::new();
        let (listener, port) = server().await;
        let dialled = host.dial(port);
        let (mut server, _) = listener.accept().await.unwrap();
        let mut client = host.accept().await;
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        client.write_all(b"answer").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "answer");
        assert_eq!(dialled.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_server_that_reads_nothing_is_heard_to_its_end() {
        let host = Host::new();
        let (listener, port) = server().await;
        let dialled = host.dial(port);
        let (mut server, _) = listener.accept().await.unwrap();
        let mut client = host.accept().await;
        server.write_all(b"no").await.unwrap();
        server.shutdown().await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        drop(server);
        // Until the agent's own write fails, and it closes.
        while client.write_all(&[0; 1024]).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(text, "no");
        assert_eq!(dialled.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn there_are_only_so_many_and_a_call_given_up_makes_room() {
        let host = Host::new();
        let (listener, port) = server().await;
        let mut held = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let dialled = host.dial(port);
            held.push((dialled, host.accept().await, listener.accept().await.unwrap()));
        }
        let refused = host.dialer.dial(request(port, 0)).await;
        assert!(matches!(refused, Err(DialError::TooMany)), "{refused:?}");
        let (call, mut client, (mut server, _)) = held.pop().unwrap();
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(host.dialer.dial(request(port, 0)).await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn the_end_is_that_of_all_connections() {
        let host = Host::new();
        let (listener, port) = server().await;
        let dialer = host.dialer.clone();
        let dialled = tokio::spawn(async move { dialer.dial(request(port, PORT)).await });
        let mut client = host.accept().await;
        let _server = listener.accept().await.unwrap();
        host.dialer.end();
        assert!(matches!(dialled.await.unwrap(), Err(DialError::Ending)));
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert!(matches!(host.dialer.dial(request(port, 0)).await, Err(DialError::Ending)));
    }
}

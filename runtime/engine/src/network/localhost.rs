//! Connections to `localhost` of the pod's network namespace, carried to the guest's servers
//! (docs/adr/0022).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use husk_network::localhost::Localhost;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::guest::{Guest, Loopback, Tunnel};
use crate::task::Task;

/// Most connections at once; more wait to be accepted. Less than what can be forwarded to a guest, so
/// that `husk port-forward` has places left.
const MAX_CONNECTIONS: usize = 64;

/// How much of each direction of a connection is here.
const BUFFER: usize = 32 * 1024;

/// Pause after a connection could not be accepted, e.g. for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Carries connections for as long as the task is kept, and ends them with it.
///
/// # Errors
/// If its sockets cannot be watched.
pub(crate) fn serve(localhost: Localhost, guest: Guest) -> io::Result<Task<()>> {
    let (listeners, redirection) = localhost.into_parts();
    let listeners = listeners.into_iter().map(TcpListener::from_std);
    let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
    Ok(Task::spawn(async move {
        let _redirection = redirection;
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut serving = JoinSet::new();
        for listener in listeners {
            serving.spawn(accept(listener, guest.clone(), places.clone()));
        }
        while serving.join_next().await.is_some() {}
    }))
}

/// Accepts connections, for ever.
async fn accept(listener: TcpListener, guest: Guest, places: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, accepted) = next => match accepted {
                Ok((client, _)) => {
                    let guest = guest.clone();
                    connections.spawn(async move {
                        forward(client, &guest).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection to the pod's localhost is not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection to its end. One that the guest does not take, or that breaks off, is reset.
async fn forward(mut client: TcpStream, guest: &Guest) {
    if let Err(error) = carry(&mut client, guest).await {
        tracing::debug!(%error, "a connection to the pod's localhost ends");
        if let Err(error) = client.set_zero_linger() {
            tracing::debug!(%error, "it is closed instead of reset");
        }
    }
}

async fn carry(client: &mut TcpStream, guest: &Guest) -> io::Result<()> {
    // The address that was meant, not that of the listener.
    let meant = client.local_addr()?;
    let first = if meant.is_ipv4() { Loopback::V4 } else { Loopback::V6 };
    let server = guest.forward(meant.port(), first).await.map_err(io::Error::other)?;
    let server = server.map_err(|why| refused(meant, &why))?;
    // Whoever wrote a piece did not want it to wait for the next.
    client.set_nodelay(true)?;
    let (from_client, to_client) = tokio::io::split(client);
    let (from_server, to_server) = tokio::io::split(server);
    let (to_server, from_server) =
        tokio::try_join!(up(from_client, to_server), down(from_server, to_client))?;
    from_server.unsplit(to_server).finish().await.map_err(io::Error::other)
}

fn refused(meant: SocketAddr, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, format!("{meant}: {why}"))
}

/// What the client says, until its end, or until the server takes no more: what that answered may
/// still be on its way.
async fn up(
    mut from: ReadHalf<&mut TcpStream>,
    mut to: WriteHalf<Tunnel>,
) -> io::Result<WriteHalf<Tunnel>> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        let taken = match read {
            0 => to.shutdown().await,
            n => to.write_all(buffer.get(..n).unwrap_or_default()).await,
        };
        if let Err(error) = &taken {
            tracing::debug!(%error, "a server takes no more");
        }
        if read == 0 || taken.is_err() {
            return Ok(to);
        }
    }
}

/// What the server says, to its end.
async fn down(
    mut from: ReadHalf<Tunnel>,
    mut to: WriteHalf<&mut TcpStream>,
) -> io::Result<ReadHalf<Tunnel>> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => {
                to.shutdown().await?;
                return Ok(from);
            }
            n => to.write_all(buffer.get(..n).unwrap_or_default()).await?,
        }
    }
}

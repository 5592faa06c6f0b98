//! `husk port-forward`: ports here that lead to servers in a pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::MAX_CALLS;
use husk_engine::holder::client::messages::port_forward_answer::Answer;
use husk_engine::holder::client::messages::port_forward_request::Message;
use husk_engine::holder::client::messages::{
    EndOfOutput, PortForwardAnswer, PortForwardRequest, PortForwardStart, WaitRequest,
};
use husk_engine::holder::client::{Client, ClientError, Status, Streaming};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use super::{Pods, block_on, connect};
use crate::args::Global;

/// How many pieces wait to be sent to the pod.
const QUEUE: usize = 4;

/// Largest piece, in bytes.
const PIECE: usize = 32 * 1024;

/// Most connections at once; more wait to be accepted. Each is a call to the pod's process, and one
/// more call waits for the pod's end.
const MAX_CONNECTIONS: usize = MAX_CALLS as usize - 1;

/// Pause after a connection could not be accepted, e.g. for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Forward ports here to servers in a pod
///
/// Connections to the local ports reach the servers that listen in the pod, also those that listen on
/// its loopback interface only (127.0.0.1 or ::1), and also of a pod without a network. It goes on
/// until Ctrl-C, or until the pod ends. A connection that the pod's server does not accept is reset,
/// and said so; the others go on.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk port-forward web 8080:80           port 8080 here to port 80 of the pod\n  \
    husk port-forward web 5432 6379         the same ports here and there\n  \
    husk port-forward web :80               any free port here\n  \
    husk port-forward --address 0.0.0.0 web 8080:80\n\n\
    Exit code: 0 after Ctrl-C; 125 if the pod ends, or a port cannot be listened at.")]
pub(crate) struct PortForwardArgs {
    /// Addresses to listen at, separated by commas; localhost is 127.0.0.1 and ::1
    #[arg(long, value_name = "ADDRESSES", value_delimiter = ',', default_value = "localhost")]
    address: Vec<Address>,
    /// The pod
    #[arg(value_name = "POD")]
    pod: String,
    /// Ports: REMOTE, LOCAL:REMOTE, or :REMOTE for any free port here
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    ports: Vec<Ports>,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    /// On both loopback addresses, or on that which there is.
    Localhost,
    Ip(IpAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "localhost" => Ok(Address::Localhost),
            ip => {
                let refused = |_| format!("{ip:?} is neither an IP address nor localhost");
                ip.parse().map(Address::Ip).map_err(refused)
            }
        }
    }
}

/// A port here (0 for a free one) and one of the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| -> Result<u16, String> {
            text.parse().map_err(|_| format!("{text:?} is no port (1 to 65535)"))
        };
        let (local, remote) = match text.split_once(':') {
            None => (port(text)?, port(text)?),
            Some(("", remote)) => (0, port(remote)?),
            Some((local, remote)) => (port(local)?, port(remote)?),
        };
        match remote {
            0 => Err("the pod's port must be 1 to 65535".into()),
            remote => Ok(Ports { local, remote }),
        }
    }
}

pub(crate) fn run(global: &Global, args: &PortForwardArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    block_on(async {
        let client = connect(found).await?;
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut listening = JoinSet::new();
        for ports in &args.ports {
            for (listener, local) in listen(&args.address, ports.local).await? {
                println!("Forwarding from {local} -> {}", ports.remote);
                let ports = Ports { local: local.port(), ..*ports };
                listening.spawn(accept(listener, ports, client.clone(), places.clone()));
            }
        }
        let mut waiting = client;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted.context("cannot hear Ctrl-C")?,
            ended = waiting.wait(WaitRequest {}) => match ended {
                Ok(_) => anyhow::bail!("pod {} has ended", found.pod.full_name()),
                Err(status) => return Err(super::refusal(status)),
            },
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Listens at a port of all addresses; if any port will do, at the same of all.
async fn listen(
    addresses: &[Address],
    mut port: u16,
) -> anyhow::Result<Vec<(TcpListener, SocketAddr)>> {
    let mut listeners: Vec<(TcpListener, SocketAddr)> = Vec::new();
    for address in addresses {
        let ips: &[IpAddr] = match address {
            Address::Localhost => &[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            Address::Ip(ip) => &[*ip],
        };
        let mut outcome = Ok(());
        let before = listeners.len();
        for ip in ips {
            let place = SocketAddr::new(*ip, port);
            let bound = async {
                let listener = TcpListener::bind(place).await?;
                let local = listener.local_addr()?;
                io::Result::Ok((listener, local))
            };
            match bound.await {
                Ok((listener, local)) => {
                    port = local.port();
                    listeners.push((listener, local));
                }
                Err(error) => outcome = Err(error).context(format!("cannot listen at {place}")),
            }
        }
        // One of the loopback addresses is enough: hosts without IPv6 do not have the other.
        if listeners.len() == before {
            outcome?;
        }
    }
    Ok(listeners)
}

/// Accepts connections, for ever.
async fn accept(listener: TcpListener, ports: Ports, client: Client, places: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => {
                    println!("Handling connection for {}", ports.local);
                    let client = client.clone();
                    connections.spawn(async move {
                        let Ports { local, remote } = ports;
                        if let Err(status) = forward(stream, remote, client).await {
                            let error = ClientError::from(status);
                            eprintln!("husk: cannot forward {local} -> {remote}: {error}");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection to its end. One that the pod does not take, or that breaks off, is reset.
async fn forward(mut stream: TcpStream, port: u16, mut client: Client) -> Result<(), Status> {
    let (to, requests) = mpsc::channel(QUEUE);
    let start = Message::Start(PortForwardStart { port: port.into() });
    let carried = async {
        let first = to.send(PortForwardRequest { message: Some(start) });
        // It has room.
        drop(first.await);
        let answers = client.port_forward(ReceiverStream::new(requests)).await?.into_inner();
        // Whoever wrote a piece did not want it to wait for the next.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection is slower than it could be");
        }
        let (from_here, to_here) = stream.split();
        tokio::try_join!(up(from_here, to), down(answers, to_here)).map(drop)
    };
    let carried = carried.await;
    if carried.is_err()
        && let Err(error) = stream.set_zero_linger()
    {
        tracing::debug!(%error, "a connection is closed instead of reset");
    }
    carried
}

/// What is said here, to its end.
async fn up(mut from: ReadHalf<'_>, to: mpsc::Sender<PortForwardRequest>) -> Result<(), Status> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = from.read(&mut buffer).await.map_err(broken)?;
        let data = buffer.get(..read).unwrap_or_default().to_vec();
        let message = Some(Message::Data(data));
        // If it is not taken any more, the answers say why.
        if read == 0 || to.send(PortForwardRequest { message }).await.is_err() {
            return Ok(());
        }
    }
}

/// What the server says, to the end of the call.
async fn down(
    mut answers: Streaming<PortForwardAnswer>,
    mut to: WriteHalf<'_>,
) -> Result<(), Status> {
    while let Some(PortForwardAnswer { answer }) = answers.message().await? {
        match answer {
            Some(Answer::Data(data)) => to.write_all(&data).await.map_err(broken)?,
            Some(Answer::End(EndOfOutput {})) => to.shutdown().await.map_err(broken)?,
            None => {}
        }
    }
    Ok(())
}

/// The end of this side's connection.
fn broken(error: io::Error) -> Status {
    Status::aborted(format!("the connection here broke off: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_for_kubectl() {
        for (text, local, remote) in [
            ("80", 80, 80),
            ("8080:80", 8080, 80),
            (":80", 0, 80),
            ("0:80", 0, 80),
            ("65535:1", 65535, 1),
        ] {
            assert_eq!(text.parse(), Ok(Ports { local, remote }), "{text}");
        }
        for text in ["", ":", "0", "80:", "80:0", "65536", "a:80", "-1", "1:2:3", "http"] {
            assert!(text.parse::<Ports>().is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_are_literal_or_localhost() {
        assert_eq!("localhost".parse(), Ok(Address::Localhost));
        assert_eq!("::".parse(), Ok(Address::Ip(Ipv6Addr::UNSPECIFIED.into())));
        assert!("example.com".parse::<Address>().is_err());
    }

    #[tokio::test]
    async fn a_free_port_is_the_same_of_all_addresses() {
        let two = [Address::Ip([127, 0, 0, 1].into()), Address::Ip([127, 0, 0, 2].into())];
        let listeners = listen(&two, 0).await.expect("two listeners");
        let ports: Vec<u16> = listeners.iter().map(|(_, local)| local.port()).collect();
        let &[port, other] = ports.as_slice() else { panic!("{ports:?}") };
        assert_eq!(port, other);
        // It is taken now.
        let error = listen(&two, port).await.expect_err("a listener");
        assert!(error.to_string().contains("cannot listen at 127.0.0.1:"), "{error}");
    }
}

//! A connection to a server in the guest, for a command.

use std::io;

use husk_proto::pod as wire;
use husk_proto::pod::port_forward_answer::Answer;
use husk_proto::pod::port_forward_request::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use super::refusal::status;
use super::{PIECE, QUEUE, To, check_piece, refused, refused_by_guest};
use crate::guest::{Loopback, Tunnel};
use crate::pod::PodAccess;

type Answered = mpsc::Receiver<Result<wire::PortForwardAnswer, Status>>;

/// Connects to the port that the first message names.
pub(super) async fn port_forward(
    access: &PodAccess,
    mut requests: Streaming<wire::PortForwardRequest>,
) -> Result<Answered, Status> {
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(Message::Start(wire::PortForwardStart { port })) = first else {
        return Err(Status::invalid_argument("the first message must be the start"));
    };
    let port = match u16::try_from(port) {
        Ok(port @ 1..) => port,
        _ => return Err(Status::invalid_argument(format!("port: {port} must be 1 to 65535"))),
    };
    let tunnel = access.forward(port, Loopback::V4).await.map_err(|error| refused(&error))?;
    let tunnel = tunnel.map_err(|why| status(Code::FailedPrecondition, &why))?;
    let (to, answers) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        tokio::select! {
            carried = carry(tunnel, requests, &to) => if let Err(broken) = carried {
                // Whoever is gone need not be told.
                drop(to.send(Err(broken)).await);
            },
            // The connection ends in the guest, too.
            () = to.closed() => {}
        }
    });
    Ok(answers)
}

/// Carries bytes both ways until both sides have said all.
async fn carry(
    tunnel: Tunnel,
    requests: Streaming<wire::PortForwardRequest>,
    to: &To<wire::PortForwardAnswer>,
) -> Result<(), Status> {
    let (from_server, to_server) = tokio::io::split(tunnel);
    let (from_server, to_server) =
        tokio::try_join!(down(from_server, to), up(requests, to_server))?;
    let finished = from_server.unsplit(to_server).finish().await;
    finished.map_err(|error| refused_by_guest(&error))
}

/// What the server says.
async fn down(
    mut from: ReadHalf<Tunnel>,
    to: &To<wire::PortForwardAnswer>,
) -> Result<ReadHalf<Tunnel>, Status> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = from.read(&mut buffer).await.map_err(|error| broken(&error))?;
        let answer = match read {
            0 => Answer::End(wire::EndOfOutput {}),
            n => Answer::Data(buffer.get(..n).unwrap_or_default().to_vec()),
        };
        let sent = to.send(Ok(wire::PortForwardAnswer { answer: Some(answer) })).await;
        if read == 0 || sent.is_err() {
            return Ok(from);
        }
    }
}

/// What the client says, until its end, or until the server takes no more: what that answered may
/// still be on its way.
async fn up(
    mut requests: Streaming<wire::PortForwardRequest>,
    mut to: WriteHalf<Tunnel>,
) -> Result<WriteHalf<Tunnel>, Status> {
    while let Some(wire::PortForwardRequest { message }) = requests.message().await? {
        let Some(Message::Data(data)) = message else { continue };
        check_piece("data", &data)?;
        if let Err(error) = to.write_all(&data).await {
            tracing::debug!(%error, "a server takes no more");
            return Ok(to);
        }
    }
    if let Err(error) = to.shutdown().await {
        tracing::debug!(%error, "a server takes no end");
    }
    Ok(to)
}

fn broken(error: &io::Error) -> Status {
    status(Code::Aborted, &format!("the connection broke off: {error}"))
}

//! Archives into containers and out of them. They are only passed on: made and read by the agent on
//! one side and by the command on the other.

use husk_proto::pod as wire;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{QUEUE, check_piece, pump, refused, refused_by_guest};
use crate::guest::GuestError;
use crate::pod::{Copy, PodAccess};

type Pieces = mpsc::Receiver<Result<wire::Data, Status>>;

pub(super) fn copy_out(
    access: &PodAccess,
    request: &wire::CopyOutRequest,
) -> Result<Pieces, Status> {
    let wire::CopyOutRequest { container, path } = request;
    let Copy { stream, request } =
        access.copy_out(container, path).map_err(|error| refused(&error))?;
    let (to, answers) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let carry = async {
            match stream.connected().await {
                Ok(from) => {
                    pump(from, to.clone(), |data| wire::Data { data }).await;
                    Ok(())
                }
                Err(error) => Err(GuestError::Vm(error)),
            }
        };
        let done = both(carry, async { request.run().await.map(drop) });
        tokio::select! {
            done = done => if let Err(error) = done {
                drop(to.send(Err(refused_by_guest(&error))).await);
            },
            // The connection closes, and the agent gives up.
            () = to.closed() => {}
        }
    });
    Ok(answers)
}

/// Waits for the carrying and the request. The request fails without anything to carry, and then
/// its reason counts.
async fn both(
    carry: impl Future<Output = Result<(), GuestError>>,
    request: impl Future<Output = Result<(), GuestError>>,
) -> Result<(), GuestError> {
    tokio::pin!(carry, request);
    tokio::select! {
        biased;
        done = &mut request => {
            done?;
            carry.await
        }
        carried = &mut carry => {
            carried?;
            request.await
        }
    }
}

pub(super) async fn copy_in(
    access: &PodAccess,
    mut requests: Streaming<wire::CopyInRequest>,
) -> Result<wire::CopyInResponse, Status> {
    use wire::copy_in_request::Message;
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(Message::Start(wire::CopyInStart { container, path })) = first else {
        return Err(Status::invalid_argument("the first message must be the start"));
    };
    let Copy { stream, request } =
        access.copy_in(&container, &path).map_err(|error| refused(&error))?;
    let carry = async {
        let mut to =
            stream.connected().await.map_err(|error| refused_by_guest(&GuestError::Vm(error)))?;
        while let Some(wire::CopyInRequest { message }) = requests.message().await? {
            let Some(Message::Data(data)) = message else { continue };
            check_piece("data", &data)?;
            if let Err(error) = to.write_all(&data).await {
                // The agent says why.
                tracing::debug!(%error, "an archive is not taken any more");
                return Ok(());
            }
        }
        if let Err(error) = to.shutdown().await {
            tracing::debug!(%error, "an archive's end is not taken");
        }
        Ok::<_, Status>(())
    };
    let run = async { request.run().await.map_err(|error| refused_by_guest(&error)) };
    tokio::pin!(carry, run);
    let bytes = tokio::select! {
        biased;
        done = &mut run => done?,
        // A command that is gone ends the archive early: the agent sees that, or its last block.
        carried = &mut carry => {
            carried?;
            run.await?
        }
    };
    Ok(wire::CopyInResponse { bytes })
}

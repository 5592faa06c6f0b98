//! The log of the guest's kernel for a command.

use husk_proto::agent::{KernelLogRecord, KernelLogRecords};
use husk_proto::pod as wire;
use tokio::sync::mpsc::{self, error::TrySendError};
use tonic::Status;

use super::{To, refused, refused_by_guest};
use crate::pod::PodAccess;

/// How many pieces of the log, of 64 KiB at most, wait for a command: more than the whole log of a
/// guest of ours has. The guest is not held up by a command that does not read, because that would
/// hold up all that it answers.
const QUEUE: usize = 64;

type Pieces = mpsc::Receiver<Result<KernelLogRecords, Status>>;

pub(super) async fn kernel_log(
    access: &PodAccess,
    request: wire::KernelLogRequest,
) -> Result<Pieces, Status> {
    let wire::KernelLogRequest { follow } = request;
    let mut log = access.kernel_log(follow).await.map_err(|error| refused(&error))?;
    let (to, pieces) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut missed = 0;
        let last = loop {
            let piece = tokio::select! {
                piece = log.next() => piece,
                () = to.closed() => return,
            };
            match piece {
                Ok(Some(records)) => missed = offer(&to, records, missed),
                Ok(None) if missed == 0 => return,
                Ok(None) => {
                    let text = format!("the last {missed} records were not taken in time");
                    break Status::resource_exhausted(text);
                }
                Err(error) => break refused_by_guest(&error),
            }
        };
        drop(log);
        // Whoever is gone need not be told.
        drop(to.send(Err(last)).await);
    });
    Ok(pieces)
}

/// Gives the command a piece, if it has room for it, with what it missed before counted as lost.
/// Returns how many records it has missed since.
fn offer(to: &To<KernelLogRecords>, mut records: Vec<KernelLogRecord>, missed: u64) -> u64 {
    if let Some(first) = records.first_mut() {
        first.lost = first.lost.saturating_add(missed);
    }
    let told =
        |all: u64, record: &KernelLogRecord| all.saturating_add(record.lost.saturating_add(1));
    let count = records.iter().fold(0, told);
    match to.try_send(Ok(KernelLogRecords { records })) {
        Ok(()) => 0,
        Err(TrySendError::Full(_)) => count,
        // Seen by who calls.
        Err(TrySendError::Closed(_)) => 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_slow_command_misses_is_counted() {
        let (to, mut pieces) = mpsc::channel(2);
        let piece = |lost: &[u64]| {
            let record = |lost: &u64| KernelLogRecord { lost: *lost, ..Default::default() };
            lost.iter().map(record).collect::<Vec<_>>()
        };
        let mut missed = 0;
        for lost in [&[0, 0][..], &[5], &[0, 0, 2], &[1], &[0]] {
            missed = offer(&to, piece(lost), missed);
        }
        // Three and two that were overwritten, one and one, and one.
        assert_eq!(missed, 8);
        assert_eq!(pieces.recv().await.unwrap().unwrap().records, piece(&[0, 0]));
        assert_eq!(offer(&to, piece(&[4, 1]), missed), 0);
        assert_eq!(pieces.recv().await.unwrap().unwrap().records, piece(&[5]));
        assert_eq!(pieces.recv().await.unwrap().unwrap().records, piece(&[12, 1]));
        drop(pieces);
        assert_eq!(offer(&to, piece(&[0]), 0), 0);
    }
}

//! The log of the guest's kernel, as its agent tells it.

use husk_proto::agent as proto;
use tonic::Streaming;

use super::{Guest, GuestError, MAX_TEXT};

const RPC: &str = "KernelLog";

/// Largest piece of the log, in bytes, and most records in it. Above any that the agent sends.
const MAX_PIECE: usize = 64 * 1024;
const MAX_PIECE_RECORDS: usize = 1024;

/// Most records of a log that is not followed. Above what any kernel keeps.
const MAX_RECORDS: usize = 1 << 17;

/// A log that is being told. It has to be read as it comes, because what is not read holds up all
/// other answers of the agent.
#[derive(Debug)]
pub struct KernelLog {
    guest: Guest,
    pieces: Streaming<proto::KernelLogRecords>,
    /// How many more records are taken; `None` for a log that is followed.
    left: Option<usize>,
}

impl Guest {
    /// Asks for the log of the guest's kernel from the oldest record that is left; `follow`: also for
    /// what comes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn kernel_log(&self, follow: bool) -> Result<KernelLog, GuestError> {
        let mut client = self.client.clone().max_decoding_message_size(MAX_PIECE);
        match client.kernel_log(proto::KernelLogRequest { follow }).await {
            Ok(pieces) => Ok(KernelLog {
                guest: self.clone(),
                pieces: pieces.into_inner(),
                left: (!follow).then_some(MAX_RECORDS),
            }),
            Err(status) => Err(self.failed(RPC, status).await),
        }
    }
}

impl KernelLog {
    /// The next records; `None` at the log's end. Their texts are bounded, but not cleaned: they have
    /// lines, and are escaped where they are shown.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn next(&mut self) -> Result<Option<Vec<proto::KernelLogRecord>>, GuestError> {
        if self.left == Some(0) {
            return Ok(None);
        }
        let piece = match self.pieces.message().await {
            Ok(piece) => piece,
            Err(status) => return Err(self.guest.failed(RPC, status).await),
        };
        let Some(proto::KernelLogRecords { mut records }) = piece else { return Ok(None) };
        if records.is_empty() || records.len() > MAX_PIECE_RECORDS {
            let what = "a piece of it has no records, or too many";
            return Err(GuestError::Nonsense { rpc: RPC, what });
        }
        self.left = self.left.map(|left| left.saturating_sub(records.len()));
        for record in &mut records {
            if let Some((end, _)) = record.text.char_indices().nth(MAX_TEXT) {
                record.text.truncate(end);
            }
        }
        Ok(Some(records))
    }
}

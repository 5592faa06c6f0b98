//! A bounded pipe from an async download to a blocking reader.

use std::io::{self, Read};

use reqwest::Response;
use tokio::sync::mpsc;

/// What goes through the pipe. Its closing without [`Piece::End`] is a failure, never the end.
enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// A pipe that holds at most `depth` pieces.
pub(super) fn pipe(depth: usize) -> (PipeSender, PipeReader) {
    let (sender, receiver) = mpsc::channel(depth);
    (PipeSender { sender }, PipeReader { receiver, piece: io::Cursor::default(), ended: false })
}

pub(super) struct PipeSender {
    sender: mpsc::Sender<Piece>,
}

impl PipeSender {
    /// Passes a whole body on. Stops without an error when the reader is gone: that one knows why.
    pub(super) async fn send_body(self, mut response: Response) -> Result<(), reqwest::Error> {
        while let Some(bytes) = response.chunk().await? {
            if self.sender.send(Piece::Bytes(bytes.into())).await.is_err() {
                return Ok(());
            }
        }
        // As above, if it fails.
        self.sender.send(Piece::End).await.ok();
        Ok(())
    }
}

/// Must not be read on an async task: it blocks.
pub(super) struct PipeReader {
    receiver: mpsc::Receiver<Piece>,
    piece: io::Cursor<Vec<u8>>,
    ended: bool,
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || self.ended || buffer.is_empty() {
                return Ok(read);
            }
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.piece = io::Cursor::new(bytes),
                Some(Piece::End) => self.ended = true,
                None => {
                    let reason = "the download was interrupted";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
                }
            }
        }
    }
}

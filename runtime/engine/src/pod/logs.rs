//! What the containers write: from the guest's streams to whoever reads it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, watch};

/// Largest piece that is passed on, in bytes.
const CHUNK: usize = 32 * 1024;

/// How many pieces may wait for the reader before the writers are held up.
pub(super) const QUEUE: usize = 64;

/// How long a stream may stay silent after its process has ended before it is given up. The agent
/// closes it when all output is delivered, so this is for a guest that is broken.
pub(super) const EOF_GRACE: Duration = Duration::from_secs(10);

/// A stream of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Something that a container wrote: not necessarily whole lines, and any bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// The container's name.
    pub container: Arc<str>,
    /// How often the container was started again before this run of it: its first run is 0.
    pub run: u32,
    /// Where it wrote.
    pub stream: Stream,
    /// What it wrote; empty when the stream has ended.
    pub bytes: Vec<u8>,
}

/// Reads a stream to its end and passes everything on; a slow reader holds up the writer. `ended`
/// becomes true when the process has ended.
///
/// When nobody reads (any more), the output is thrown away, so that the process goes on.
pub(super) async fn pump(
    mut from: impl AsyncRead + Unpin,
    (container, run): (Arc<str>, u32),
    stream: Stream,
    to: mpsc::Sender<LogChunk>,
    mut ended: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let abandoned = async {
            // The sender lives as long as the process may; if it is gone, so is the process.
            ended.wait_for(|ended| *ended).await.map(drop).unwrap_or_default();
            tokio::time::sleep(EOF_GRACE).await;
        };
        let read = tokio::select! {
            biased;
            read = from.read(&mut buffer) => read,
            () = abandoned => {
                tracing::warn!(%container, ?stream, "the guest does not close a stream");
                break;
            }
        };
        let bytes = match read {
            Ok(0) => break,
            Ok(n) => buffer.get(..n).unwrap_or_default().to_vec(),
            Err(error) => {
                tracing::debug!(%container, ?stream, %error, "a stream broke off");
                break;
            }
        };
        // Nobody listens: thrown away.
        drop(to.send(LogChunk { container: container.clone(), run, stream, bytes }).await);
    }
    drop(to.send(LogChunk { container, run, stream, bytes: Vec::new() }).await);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn parts() -> (mpsc::Sender<LogChunk>, mpsc::Receiver<LogChunk>, watch::Sender<bool>) {
        let (to, logs) = mpsc::channel(QUEUE);
        (to, logs, watch::channel(false).0)
    }

    #[tokio::test]
    async fn every_byte_arrives_and_then_the_end() {
        let (to, mut logs, ended) = parts();
        let (mut guest, host) = tokio::io::duplex(1000);
        let pump = tokio::spawn(pump(host, ("c".into(), 0), Stream::Stdout, to, ended.subscribe()));
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        tokio::spawn(async move { guest.write_all(&sent).await.unwrap() });
        let mut got = Vec::new();
        while let Some(chunk) = logs.recv().await {
            if chunk.bytes.is_empty() {
                break;
            }
            got.extend(chunk.bytes);
        }
        assert_eq!(got, expected);
        pump.await.unwrap();
    }

    #[tokio::test]
    async fn without_a_reader_the_writer_goes_on() {
        let (to, logs, ended) = parts();
        drop(logs);
        let (mut guest, host) = tokio::io::duplex(10);
        let pump = tokio::spawn(pump(host, ("c".into(), 0), Stream::Stderr, to, ended.subscribe()));
        guest.write_all(&[7; 100_000]).await.unwrap();
        drop(guest);
        pump.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_never_closed_is_given_up_after_the_process() {
        let (to, mut logs, ended) = parts();
        let (mut guest, host) = tokio::io::duplex(1000);
        let pump = tokio::spawn(pump(host, ("c".into(), 0), Stream::Stdout, to, ended.subscribe()));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        guest.write_all(b"late").await.unwrap();
        assert_eq!(logs.recv().await.unwrap().bytes, b"late");
        ended.send_replace(true);
        pump.await.unwrap();
        assert!(logs.recv().await.unwrap().bytes.is_empty());
    }
}

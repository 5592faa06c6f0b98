//! What a container leaves behind as its message: what it wrote to its file, or else the end of its
//! output, within the kubelet's bounds.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use crate::guest::clean;

/// Most bytes of the file, from its end.
pub(super) const MAX_FILE: u32 = 4096;

/// Most bytes and lines of the output, from its end.
const MAX_OUTPUT: usize = 2048;
const MAX_LINES: usize = 80;

/// The end of what a container wrote, to both of its streams.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = bytes.get(bytes.len().saturating_sub(MAX_OUTPUT)..).unwrap_or_default();
        let over = kept.len().saturating_add(new.len()).saturating_sub(MAX_OUTPUT);
        let over = over.min(kept.len());
        kept.drain(..over);
        kept.extend_from_slice(new);
    }

    /// The last lines of it, as a text.
    pub(super) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept);
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let last = lines.get(lines.len().saturating_sub(MAX_LINES)..).unwrap_or_default();
        clean(&last.concat())
    }
}

/// Reads a stream, and keeps its end.
pub(super) struct Tee<R> {
    from: R,
    tail: Option<Tail>,
}

impl<R> Tee<R> {
    /// Without a tail nothing is kept.
    pub(super) fn new(from: R, tail: Option<Tail>) -> Self {
        Tee { from, tail }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Tee<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.from).poll_read(cx, buf);
        if let Some(tail) = &self.tail {
            tail.add(buf.filled().get(before..).unwrap_or_default());
        }
        polled
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn the_end_of_both_streams_is_kept_and_nothing_is_lost() {
        let tail = Tail::default();
        let long = vec![b'x'; 10_000];
        let mut read = Vec::new();
        Tee::new(long.as_slice(), Some(tail.clone())).read_to_end(&mut read).await.unwrap();
        Tee::new(&b"the end\n"[..], Some(tail.clone())).read_to_end(&mut read).await.unwrap();
        assert_eq!(read.len(), 10_008);
        let text = tail.text();
        assert_eq!(text.len(), MAX_OUTPUT);
        assert!(text.starts_with("xxx") && text.ends_with("xthe end\n"));
    }

    #[test]
    fn only_the_last_lines_count() {
        let tail = Tail::default();
        (0..100).for_each(|n| tail.add(format!("{n}\n").as_bytes()));
        let text = tail.text();
        assert_eq!((text.lines().count(), text.lines().next()), (MAX_LINES, Some("20")));
    }
}

//! A connection from which only so much is read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that are read from one connection, whatever they are: handshakes, heads, the sizes
/// between chunks, HTTP/2's pings. An honest server needs a tenth of it.
const MAX_BYTES: usize = 256 * 1024;

/// A server that sends without end.
#[derive(Debug, thiserror::Error)]
#[error("the server sends more than {MAX_BYTES} bytes")]
struct TooMuch;

/// See the module.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    stream: S,
    left: usize,
}

impl<S> Bounded<S> {
    pub(super) fn new(stream: S) -> Self {
        Bounded { stream, left: MAX_BYTES }
    }
}

impl<S: AsFd> AsFd for Bounded<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Bounded { stream, left } = &mut *self;
        if *left == 0 {
            return Poll::Ready(Err(io::Error::other(TooMuch)));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(stream).poll_read(context, buffer))?;
        // The last piece may be more than was left: it is in the buffer, which is bounded too.
        *left = left.saturating_sub(buffer.filled().len().saturating_sub(before));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn what_is_read_has_an_end_and_what_is_short_does_not_notice() {
        let mut bytes = Vec::new();
        let error = Bounded::new(tokio::io::repeat(1)).read_to_end(&mut bytes).await.unwrap_err();
        assert_eq!(error.to_string(), "the server sends more than 262144 bytes");
        assert!(bytes.len() >= MAX_BYTES, "{}", bytes.len());
        bytes.clear();
        Bounded::new(&b"short"[..]).read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, b"short");
    }
}

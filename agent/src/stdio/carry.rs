//! Carries the bytes of one stream from end to end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::buffer::Buffer;

/// What is delivered after that: the most that a pipe can hold (/proc/sys/fs/pipe-max-size, which
/// an ordinary process cannot exceed), so that nothing is lost that was written before the end.
const LAST_BYTES: usize = 1 << 20;

/// How long a host that takes nothing may then keep a process from having ended.
const READER_LIMIT: Duration = Duration::from_secs(60);

/// Where a process's output comes from.
pub(super) enum Source {
    Pipe(pipe::Receiver),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Source {
    /// Waits until there is something to read, or the end.
    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.readable().await,
            // The readiness is kept until a read says that there is nothing.
            Self::Terminal(master) => master.readable().await.map(|mut g| g.retain_ready()),
        }
    }

    /// Reads what is there. 0 is the end.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.try_read(buffer),
            Self::Terminal(master) => {
                let read =
                    master.try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?));
                match read {
                    // What Linux says when the last process has closed the terminal.
                    Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
                    result => result,
                }
            }
        }
    }
}

/// Carries output to the host until its end; the connection is then shut down for writing, which
/// tells the host that this was all. Without a connection, or after it broke, output is read and
/// dropped: a client that goes away must not stop or kill the program.
///
/// Once `closing` is true it ends with what there is to read then. Returns whether it came to the
/// end of the stream, and the host took all.
pub(super) async fn to_host(
    source: Source,
    mut socket: Option<UnixStream>,
    mut closing: watch::Receiver<bool>,
) -> bool {
    let mut complete = false;
    let mut left = LAST_BYTES;
    'stream: loop {
        let last = tokio::select! {
            biased;
            readable = source.readable() => {
                if readable.is_err() {
                    break 'stream;
                }
                *closing.borrow()
            }
            () = closed(&mut closing) => true,
        };
        let mut buffer = Buffer::take();
        loop {
            let bytes = match source.try_read(&mut buffer) {
                Ok(0) => {
                    complete = true;
                    break 'stream;
                }
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && last => break 'stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "output cannot be read any more");
                    break 'stream;
                }
            };
            if *closing.borrow() {
                left = left.saturating_sub(bytes.len());
            }
            if let Some(connection) = &mut socket {
                if let Err(error) = deliver(connection, bytes, &mut closing).await {
                    tracing::info!(%error, "nobody takes the output any more");
                    socket = None;
                }
            } else {
                tokio::task::yield_now().await;
            }
            if left == 0 {
                break 'stream;
            }
        }
    }
    if let Some(mut connection) = socket
        && let Err(error) = connection.shutdown().await
    {
        tracing::info!(%error, "the output's end could not be told");
    }
    complete
}

/// Writes all of `bytes`, however long the host takes; but once `closing` is true, only as long as
/// it takes some within [`READER_LIMIT`].
async fn deliver(
    connection: &mut UnixStream,
    mut bytes: &[u8],
    closing: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = tokio::select! {
            biased;
            written = connection.write(bytes) => written?,
            () = closed(closing) => {
                tokio::time::timeout(READER_LIMIT, connection.write(bytes)).await??
            }
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// Returns once `closing` is true. A relay that is dropped aborts those who wait for this.
async fn closed(closing: &mut watch::Receiver<bool>) {
    if closing.wait_for(|closing| *closing).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Carries the host's input to a pipe; its end closes the pipe.
pub(super) async fn from_host_to_pipe(
    socket: UnixStream,
    mut pipe: pipe::Sender,
) -> io::Result<()> {
    loop {
        socket.readable().await?;
        let mut buffer = Buffer::take();
        match socket.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => pipe.write_all(buffer.get(..count).unwrap_or_default()).await?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Carries the host's input to a terminal, which stays open at its end.
pub(super) async fn from_host_to_terminal(
    socket: UnixStream,
    master: &AsyncFd<OwnedFd>,
) -> io::Result<()> {
    loop {
        socket.readable().await?;
        let mut buffer = Buffer::take();
        let mut rest = match socket.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e),
        };
        while !rest.is_empty() {
            let written = master
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd.as_fd(), rest)?))
                .await?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

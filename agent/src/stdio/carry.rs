//! Carries the bytes of one stream from end to end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::buffer::Buffer;
use crate::transport::Transport;

/// What is delivered after that: the most that a pipe can hold (/proc/sys/fs/pipe-max-size, which
/// an ordinary process cannot exceed), so that nothing is lost that was written before the end.
const LAST_BYTES: usize = 1 << 20;

/// The most that is moved at once, before others have their turn.
const MAX_SPLICE: usize = 64 * 1024;

/// How long a host that takes nothing may then keep a process from having ended.
const READER_LIMIT: Duration = Duration::from_secs(60);

/// Where a process's output comes from.
pub(super) struct Source {
    fd: Arc<AsyncFd<OwnedFd>>,
    is_terminal: bool,
}

/// Where a process's output goes.
pub(crate) enum Host {
    Connected(UnixStream),
    /// To a port that is connected when there is something to carry.
    Later {
        transport: Transport,
        port: u32,
    },
    /// Nobody takes it (any more).
    Gone,
}

/// What became of an output.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Carried {
    /// Whether it came to the end of the stream, and the host took all.
    pub(super) complete: bool,
    /// The port that was not connected, because nothing came.
    pub(super) unused: Option<u32>,
}

/// What came of one step.
enum Moved {
    Bytes(usize),
    /// There is nothing more now.
    Nothing,
    /// There will never be more.
    End,
}

/// Why a step failed.
enum Trouble {
    /// The process's end: nothing more can be read.
    Source(io::Error),
    /// The host's end: nobody takes anything more.
    Host(io::Error),
}

impl Source {
    /// The end of a pipe that the process writes to.
    pub(super) fn pipe(fd: AsyncFd<OwnedFd>) -> Self {
        Source { fd: Arc::new(fd), is_terminal: false }
    }

    /// The master of the process's terminal.
    pub(super) fn terminal(fd: Arc<AsyncFd<OwnedFd>>) -> Self {
        Source { fd, is_terminal: true }
    }

    /// Waits until there is something to read, or the end.
    async fn readable(&self) -> io::Result<()> {
        // The readiness is kept until something says that there is nothing.
        self.fd.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there. 0 is the end.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fd.try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?));
        match read {
            // What Linux says when the last process has closed the terminal.
            Err(e) if self.is_terminal && e.raw_os_error() == Some(libc::EIO) => Ok(0),
            result => result,
        }
    }

    /// Moves what is there on to the host, or away if there is no connection any more.
    async fn step(
        &self,
        host: &mut Host,
        closing: &mut watch::Receiver<bool>,
    ) -> Result<Moved, Trouble> {
        if let Host::Later { transport, port } = host {
            match self.peek().map_err(Trouble::Source)? {
                Moved::Bytes(_) => {}
                nothing => return Ok(nothing),
            }
            let connected = transport.connect(*port).await;
            *host = Host::Connected(connected.map_err(|error| Trouble::Host(error.into()))?);
        }
        match host {
            Host::Connected(connection) if !self.is_terminal => {
                self.splice(connection, closing).await
            }
            Host::Connected(connection) => self.copy(Some(connection), closing).await,
            Host::Later { .. } | Host::Gone => self.copy(None, closing).await,
        }
    }

    /// Looks at a pipe, and moves nothing: there are bytes (how many is not counted), nothing, or
    /// the end.
    fn peek(&self) -> io::Result<Moved> {
        loop {
            let mut pipe = [PollFd::new(self.fd.get_ref(), PollFlags::IN)];
            match rustix::event::poll(&mut pipe, Some(&Timespec::default())) {
                // The end of a child, for instance, also if nothing had to be waited for.
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            let [pipe] = pipe.map(|fd| fd.revents());
            if pipe.contains(PollFlags::IN) {
                return Ok(Moved::Bytes(0));
            }
            if !pipe.is_empty() {
                return Ok(Moved::End);
            }
            self.forget_readiness();
            return Ok(Moved::Nothing);
        }
    }

    /// Has [`Self::readable`] wait for more.
    fn forget_readiness(&self) {
        let empty = |_: &OwnedFd| Err(io::ErrorKind::WouldBlock.into());
        let _cleared: io::Result<()> = self.fd.try_io(Interest::READABLE, empty);
    }

    /// By the kernel, from the pipe into the connection: the bytes never come here.
    async fn splice(
        &self,
        connection: &UnixStream,
        closing: &mut watch::Receiver<bool>,
    ) -> Result<Moved, Trouble> {
        loop {
            let pipe = self.fd.get_ref();
            let flags = SpliceFlags::NONBLOCK;
            match rustix::pipe::splice(pipe, None, connection, None, MAX_SPLICE, flags) {
                Ok(0) => return Ok(Moved::End),
                Ok(count) => return Ok(Moved::Bytes(count)),
                Err(Errno::INTR) => {}
                // One of the two would block; the error does not say which.
                Err(Errno::AGAIN) => match would_block(pipe, connection).map_err(Trouble::Host)? {
                    Some(Side::Pipe) => {
                        self.forget_readiness();
                        return Ok(Moved::Nothing);
                    }
                    Some(Side::Connection) => {
                        room(connection, closing).await.map_err(Trouble::Host)?;
                    }
                    // Neither any more, or that is not known.
                    None => tokio::task::coop::consume_budget().await,
                },
                Err(error) => return Err(Trouble::Host(error.into())),
            }
        }
    }

    /// By a buffer: a terminal cannot be spliced, and what nobody takes must go somewhere.
    async fn copy(
        &self,
        connection: Option<&mut UnixStream>,
        closing: &mut watch::Receiver<bool>,
    ) -> Result<Moved, Trouble> {
        let mut buffer = Buffer::take();
        let bytes = match self.try_read(&mut buffer) {
            Ok(0) => return Ok(Moved::End),
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Moved::Nothing),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Moved::Bytes(0)),
            Err(error) => return Err(Trouble::Source(error)),
        };
        if let Some(connection) = connection {
            deliver(connection, bytes, closing).await.map_err(Trouble::Host)?;
        }
        Ok(Moved::Bytes(bytes.len()))
    }
}

/// Which of the two keeps bytes from moving on.
enum Side {
    Pipe,
    Connection,
}

fn would_block(pipe: &OwnedFd, connection: &UnixStream) -> io::Result<Option<Side>> {
    let mut both = [PollFd::new(pipe, PollFlags::IN), PollFd::new(connection, PollFlags::OUT)];
    match rustix::event::poll(&mut both, Some(&Timespec::default())) {
        // The end of a child, for instance, also if nothing had to be waited for.
        Err(Errno::INTR) => return Ok(None),
        polled => polled?,
    };
    // An end or an error counts as ready: the next try will say it.
    let [pipe, connection] = both.map(|fd| !fd.revents().is_empty());
    Ok(match (pipe, connection) {
        (false, _) => Some(Side::Pipe),
        (true, false) => Some(Side::Connection),
        (true, true) => None,
    })
}

/// Waits until the host has taken something, however long it takes; but once `closing` is true, no
/// longer than [`READER_LIMIT`].
async fn room(connection: &UnixStream, closing: &mut watch::Receiver<bool>) -> io::Result<()> {
    let full = || Err(io::ErrorKind::WouldBlock.into());
    let _cleared: io::Result<()> = connection.try_io(Interest::WRITABLE, full);
    tokio::select! {
        biased;
        writable = connection.writable() => writable,
        () = closed(closing) => tokio::time::timeout(READER_LIMIT, connection.writable()).await?,
    }
}

/// Carries output to the host until its end; the connection is then shut down for writing, which
/// tells the host that this was all. Without a connection, or after it broke, output is read and
/// dropped: a client that goes away must not stop or kill the program.
///
/// Once `closing` is true it ends with what there is to read then.
pub(super) async fn to_host(
    source: Source,
    mut host: Host,
    mut closing: watch::Receiver<bool>,
) -> Carried {
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
        loop {
            match source.step(&mut host, &mut closing).await {
                Ok(Moved::Bytes(count)) => {
                    if *closing.borrow() {
                        left = left.saturating_sub(count);
                    }
                }
                Ok(Moved::Nothing) if last => break 'stream,
                Ok(Moved::Nothing) => break,
                Ok(Moved::End) => {
                    complete = true;
                    break 'stream;
                }
                Err(Trouble::Host(error)) => {
                    tracing::info!(%error, "nobody takes the output any more");
                    host = Host::Gone;
                }
                Err(Trouble::Source(error)) => {
                    tracing::warn!(%error, "output cannot be read any more");
                    break 'stream;
                }
            }
            if left == 0 {
                break 'stream;
            }
            // A process that never stops writing must not keep the others from their turn.
            tokio::task::coop::consume_budget().await;
        }
    }
    let unused = match host {
        Host::Connected(mut connection) => {
            if let Err(error) = connection.shutdown().await {
                tracing::info!(%error, "the output's end could not be told");
            }
            None
        }
        Host::Later { port, .. } => Some(port),
        Host::Gone => None,
    };
    Carried { complete, unused }
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

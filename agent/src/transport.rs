//! Connections to the host: vsock in a VM, Unix sockets where the agent is tested without one.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;

use crate::sys;

/// How to reach the pod's process.
#[derive(Debug, Clone)]
pub(crate) enum Transport {
    /// Port of the host, context ID 2.
    Vsock,
    /// The socket `<directory>/<port>`. For tests only.
    Unix(PathBuf),
}

/// A connection that was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connect to port {port} of the host")]
    Io {
        port: u32,
        #[source]
        source: io::Error,
    },
    #[error("connect to port {port} of the host: no answer in {limit:?}")]
    Timeout { port: u32, limit: Duration },
}

impl From<ConnectError> for io::Error {
    fn from(error: ConnectError) -> Self {
        io::Error::other(error)
    }
}

/// How long the host may take to accept. It is a process on a machine that may be overloaded, and
/// without it the agent has no purpose.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

impl Transport {
    /// Connects to a port.
    ///
    /// A vsock stream is handled as if it were a Unix one: the only calls made on it (read, write,
    /// shutdown, poll, SO_ERROR) are the same for every family of stream sockets.
    ///
    /// # Errors
    /// [`ConnectError`], after [`CONNECT_LIMIT`] at the latest.
    pub(crate) async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let limit = CONNECT_LIMIT;
        tokio::time::timeout(limit, self.attempt(port))
            .await
            .map_err(|_| ConnectError::Timeout { port, limit })?
            .map_err(|source| ConnectError::Io { port, source })
    }

    async fn attempt(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Vsock => {
                let seconds = CONNECT_LIMIT.as_secs().try_into().unwrap_or(i64::MAX);
                let socket = sys::vsock_connect(port, seconds)?;
                let stream = UnixStream::from_std(socket.into())?;
                stream.writable().await?;
                match stream.take_error()? {
                    Some(error) => Err(error),
                    None => Ok(stream),
                }
            }
            Self::Unix(directory) => UnixStream::connect(directory.join(port.to_string())).await,
        }
    }
}

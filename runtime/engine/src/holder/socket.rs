//! The socket of a pod's process, whatever the length of its path: a socket's address holds 107
//! bytes, so it is named by way of its opened directory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use tokio::net::{UnixListener, UnixStream};

use super::record::RecordDir;

/// A path to the socket that is short, and lives as long as the file with it.
fn short(dir: &RecordDir) -> io::Result<(File, PathBuf)> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let file = File::options().read(true).custom_flags(flags).open(dir.path())?;
    let name = RecordDir::socket_name();
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", file.as_raw_fd()));
    Ok((file, path))
}

/// Listens at the pod's socket, which must not exist yet.
///
/// # Errors
/// As bind(2).
pub(super) fn listen(dir: &RecordDir) -> io::Result<UnixListener> {
    let (_open, path) = short(dir)?;
    UnixListener::bind(path)
}

/// Connects to the pod's process.
///
/// # Errors
/// As connect(2): that nobody listens is `NotFound` or `ConnectionRefused`.
pub(super) async fn connect(dir: &RecordDir) -> io::Result<UnixStream> {
    let (_open, path) = short(dir)?;
    UnixStream::connect(path).await
}

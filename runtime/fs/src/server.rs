//! The server itself: the library's passthrough file system behind one connection of vhost-user.
//!
//! How it is set up, and why:
//! - Inodes are remembered by file handle (`name_to_handle_at`) wherever the host's file system has
//!   them: what the guest has seen costs memory here, and no descriptor.
//! - The host changes files behind the guest's back. So the guest forgets attributes and names after
//!   [`TIMEOUT`], reads a file's content anew when it opens it (close-to-open, as NFS), and writes at
//!   once (no write-back cache).
//! - Locks are the guest's: all containers of a pod are in one kernel, which sees the locks of each.
//!   The host and other pods do not, nor do they see theirs.
//! - Requests are worked off by one thread, in their order. The VMM relies on the order when this
//!   process dies: what is not answered is then known (`devices::virtio::fs::orphan`).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use vhost_016::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory_017::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::sandbox::Proc;

/// How long the guest may take a name or an attribute for granted.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Descriptors that are not the guest's: its memory, the rings' eventfds, the mounts', `/proc`, and
/// those that are open only for the time of a request.
const RESERVED_FILES: u64 = 512;

/// Nothing can be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The limit on open files leaves none to the guest.
    #[error("{open_files} files can be open, which is too few; raise the limit (RLIMIT_NOFILE)")]
    TooFewFiles {
        /// The limit.
        open_files: u64,
    },
    /// The file system.
    #[error("cannot serve the shares")]
    FileSystem(#[source] std::io::Error),
    /// The back-end.
    #[error("cannot make the server: {0}")]
    Backend(virtiofsd::vhost_user::Error),
    /// The daemon.
    #[error("the connection to the VMM failed: {0}")]
    Daemon(DaemonError),
}

/// Serves the connection that waits in `listener`, to its end.
pub(crate) fn run(listener: OwnedFd, proc: Proc, open_files: u64) -> Result<(), ServerError> {
    let guest_fd_limit = open_files
        .checked_sub(RESERVED_FILES)
        .filter(|left| *left >= RESERVED_FILES)
        .ok_or(ServerError::TooFewFiles { open_files })?;
    let fs =
        PassthroughFs::new(configuration(proc, guest_fd_limit)).map_err(ServerError::FileSystem)?;
    // No pool of threads: see above.
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(0)
        .build(fs)
        .map_err(ServerError::Backend)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("husk-fs".to_owned(), Arc::new(backend), memory)
        .map_err(ServerError::Daemon)?;
    let mut listener = Listener::from(UnixListener::from(listener));
    daemon.start(&mut listener).map_err(ServerError::Daemon)?;
    drop(listener);
    match daemon.wait() {
        Ok(()) => Ok(()),
        // The VM is gone.
        Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        Err(error) => Err(ServerError::Daemon(error)),
    }
}

fn configuration(proc: Proc, guest_fd_limit: u64) -> Config {
    Config {
        entry_timeout: TIMEOUT,
        attr_timeout: TIMEOUT,
        cache_policy: CachePolicy::Auto,
        root_dir: "/".to_owned(),
        proc_sfd_rawfd: Some(proc.descriptors),
        proc_mountinfo_rawfd: Some(proc.mountinfo),
        // Each share is a mount of its own: by this the guest tells their inodes apart.
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Prefer,
        xattr: true,
        readdirplus: true,
        allow_direct_io: true,
        writeback: false,
        guest_fd_limit,
        ..Config::default()
    }
}

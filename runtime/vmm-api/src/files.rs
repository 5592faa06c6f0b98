//! What a pod's process tells `husk-fs`.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Most shares of a VM.
pub const MAX_SHARES: usize = 96;

// All of them go with one message, beside the socket.
const _: () = assert!(MAX_SHARES < crate::MAX_FDS);

/// Everything that a file server serves. The first message to it, and the only one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeFiles {
    /// A listening Unix stream socket to which the VMM's end is connected already, and nobody else
    /// can be: that one connection is served, by vhost-user.
    pub listener: FdIndex,
    /// What is shared, at most [`MAX_SHARES`]. Each is an entry of the file system's root, by its
    /// position in decimal.
    pub shares: Vec<SharedPath>,
}

/// A file or directory of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedPath {
    /// Opened with `O_PATH`. Of a directory everything below it is shared, with what is mounted there.
    pub fd: FdIndex,
    /// Whether nobody may write, whatever the guest tries.
    pub read_only: bool,
}

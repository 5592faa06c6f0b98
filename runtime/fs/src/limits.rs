//! What this process may use of the host at most, whatever the guest does.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most open descriptors. Files that the guest knows need none where the file system has file
/// handles; where it has not (some overlays), each needs one, and beyond this the guest gets ENFILE.
const MAX_OPEN_FILES: u64 = 262_144;

/// Most memory of its own, in bytes; the guest's does not count. What it knows of a file takes about
/// 500 bytes, so this is enough for eight million of them.
const MAX_MEMORY: u64 = 4 << 30;

/// A limit cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot limit {what} to {limit}")]
pub(crate) struct LimitError {
    what: &'static str,
    limit: u64,
    #[source]
    source: Errno,
}

/// Sets the limits. Returns how many descriptors can be open.
pub(crate) fn set() -> Result<u64, LimitError> {
    // A dump would hold the guest's memory.
    limit("core dumps", Resource::Core, 0)?;
    limit("memory", Resource::Data, MAX_MEMORY)?;
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    match limit("open files", Resource::Nofile, MAX_OPEN_FILES) {
        Ok(()) => Ok(MAX_OPEN_FILES),
        // Without the right to more than it was given.
        Err(_) if hard < MAX_OPEN_FILES => {
            limit("open files", Resource::Nofile, hard).map(|()| hard)
        }
        Err(error) => Err(error),
    }
}

fn limit(what: &'static str, resource: Resource, limit: u64) -> Result<(), LimitError> {
    let both = Rlimit { current: Some(limit), maximum: Some(limit) };
    setrlimit(resource, both).map_err(|source| LimitError { what, limit, source })
}

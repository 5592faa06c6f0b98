//! What errors become on the wire: a code that says whose fault it is, and the chain of causes.

use std::error::Error;

use tonic::{Code, Status};

use crate::added::AddedError;
use crate::cgroup::{CgroupError, UpdateError};
use crate::container::ContainerError;
use crate::container::copy::CopyError;
use crate::dial::DialError;
use crate::net::NetError;
use crate::pod::PodError;
use crate::storage::StorageError;
use crate::{chain, shorten};

/// Longest text of a status, in bytes. It repeats what the client sent, and travels in headers, of
/// which a client takes 16 KiB; escaped there, a byte can become three.
const MAX_TEXT: usize = 3072;

/// A status, whose text is shortened if need be.
fn status(code: Code, text: &str) -> Status {
    Status::new(code, shorten(text, MAX_TEXT))
}

/// The status of a pod that was not set up.
pub(super) fn pod_status(error: &PodError) -> Status {
    let code = if error.is_invalid() { Code::InvalidArgument } else { Code::Internal };
    status(code, &chain(error))
}

/// The status of a volume that was not updated.
pub(super) fn volume_status(error: &StorageError) -> Status {
    let code = match error {
        StorageError::NoFiles(_) => Code::NotFound,
        StorageError::Io { .. } | StorageError::NoDisk { .. } => Code::Internal,
        _ => Code::InvalidArgument,
    };
    status(code, &chain(error))
}

/// The status of a file system that was not added, or not taken away.
pub(super) fn added_status(error: &AddedError) -> Status {
    use AddedError as E;
    let code = match error {
        E::Container(error) => return container_status(error),
        E::Storage(error) => return volume_status(error),
        E::Path(_) | E::Unset(_) => Code::InvalidArgument,
        E::Exists(_) => Code::AlreadyExists,
        E::NotAdded(_) => Code::NotFound,
        E::Mount { .. } | E::InUse { .. } | E::Changing(_) => Code::FailedPrecondition,
        E::Io { .. } => Code::Internal,
    };
    status(code, &chain(error))
}

/// The status of a request about a container that failed.
pub(super) fn container_status(error: &ContainerError) -> Status {
    use ContainerError as E;
    let code = match error {
        E::Name { .. } | E::Rootfs(_) | E::Value { .. } | E::Path(_) | E::Spec(_) => {
            Code::InvalidArgument
        }
        E::Disk { path: _, source: StorageError::Serial { .. } } => Code::InvalidArgument,
        E::NoContainer(_) | E::NoProcess { .. } | E::Ended { .. } | E::NoFile { .. } => {
            Code::NotFound
        }
        E::Exists(_) | E::ExecExists { .. } => Code::AlreadyExists,
        E::Busy(_) | E::Refused(..) | E::NoPod(_) | E::NoTerminal { .. } => {
            Code::FailedPrecondition
        }
        E::Stdio(crate::stdio::StdioError::StderrOfTerminal(_)) => Code::InvalidArgument,
        E::Cgroup(CgroupError::Exists(_)) => Code::AlreadyExists,
        E::Cgroup(e) | E::Update(UpdateError::Cgroup(e)) if e.is_invalid() => Code::InvalidArgument,
        E::Update(UpdateError::Spec(_) | UpdateError::InUse { .. }) => Code::InvalidArgument,
        E::Cgroup(_) | E::Update(UpdateError::Cgroup(_)) => Code::Internal,
        E::NotFrozen(_) | E::Read { .. } | E::Disk { .. } => Code::Internal,
        E::Stdio(_) | E::Step(_) | E::Reported(_) | E::Died | E::Unfollowed | E::OutOfMemory => {
            Code::Internal
        }
    };
    status(code, &chain(error as &dyn Error))
}

/// The status of an archive that was not carried.
pub(super) fn copy_status(error: &CopyError) -> Status {
    let code = match error {
        CopyError::Container(error) => return container_status(error),
        CopyError::Path(_) => Code::InvalidArgument,
        CopyError::NotFound { .. } => Code::NotFound,
        CopyError::NotADirectory(_) => Code::FailedPrecondition,
        CopyError::Failed(_) | CopyError::Killed => Code::Internal,
    };
    status(code, &chain(error))
}

/// The status of a network that was not updated.
pub(super) fn network_status(error: &NetError) -> Status {
    let code = match error {
        NetError::Field(_) => Code::InvalidArgument,
        NetError::NoInterface { .. } | NetError::NameTaken { .. } => Code::FailedPrecondition,
        NetError::Kernel { .. } | NetError::Read(_) => Code::Internal,
    };
    status(code, &chain(error))
}

/// The status of a connection that could not be asked for.
pub(super) fn dial_status(error: &DialError) -> Status {
    let code = match error {
        DialError::Host(_) | DialError::Port(_) | DialError::Timeout(_) => Code::InvalidArgument,
        DialError::TooMany => Code::ResourceExhausted,
        DialError::Ending => Code::FailedPrecondition,
        DialError::Connect(_) | DialError::Io { .. } => Code::Internal,
    };
    status(code, &chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_say_whose_fault_it_is() {
        let code = |e: ContainerError| container_status(&e).code();
        assert_eq!(code(ContainerError::NoContainer("a".into())), Code::NotFound);
        assert_eq!(code(ContainerError::Exists("a".into())), Code::AlreadyExists);
        assert_eq!(code(ContainerError::NoPod("is not set up")), Code::FailedPrecondition);
        assert_eq!(code(ContainerError::Died), Code::Internal);
        let name = crate::container::check_name("id", "/").unwrap_err();
        assert_eq!(code(name), Code::InvalidArgument);
    }

    #[test]
    fn an_endless_text_does_not_become_a_header() {
        let name = crate::container::check_name("id", &"/".repeat(1 << 20)).unwrap_err();
        assert!(container_status(&name).message().len() <= MAX_TEXT);
    }
}

//! What a command is told of a refusal.

use tonic::{Code, Status};

use crate::guest::GuestError;
use crate::holder::apply::ApplyError;
use crate::pod::{AccessError, DiskError};
use crate::vm::VmError;

/// Longest text of a status, in bytes. It repeats what the command or the guest said, and travels in
/// headers, of which a command takes 16 KiB; escaped there, a byte can become three.
const MAX_TEXT: usize = 3072;

/// Largest piece of a stream that a client sends, in bytes: see pod.proto.
const MAX_PIECE: usize = 64 * 1024;

/// A status; of a text that is too long the middle is left out, because a field is named at its
/// beginning, and the reason at its end.
pub(super) fn status(code: Code, text: &str) -> Status {
    const MARK: &str = " [...] ";
    if text.len() <= MAX_TEXT {
        return Status::new(code, text);
    }
    let half = (MAX_TEXT - MARK.len()) / 2;
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    let start = (0..=half).rev().find(is_boundary).and_then(|at| text.get(..at));
    let mut tail = text.len().saturating_sub(half)..=text.len();
    let end = tail.find(is_boundary).and_then(|at| text.get(at..));
    Status::new(code, [start.unwrap_or_default(), end.unwrap_or_default()].join(MARK))
}

/// Of what cannot be done with the pod.
pub(super) fn refused(error: &AccessError) -> Status {
    let code = match error {
        AccessError::NotRunning | AccessError::Task(_) => Code::Unavailable,
        AccessError::NoContainer { .. } => Code::NotFound,
        AccessError::NoDebugging => Code::FailedPrecondition,
        AccessError::Describe(_) => Code::InvalidArgument,
        AccessError::Disk(error) => return disk_refused(error),
        AccessError::Guest(error) => return refused_by_guest(error),
    };
    status(code, &error.to_string())
}

/// Of a disk that cannot be attached or detached.
fn disk_refused(error: &DiskError) -> Status {
    let code = match error {
        DiskError::Name { .. } | DiskError::MountPath { .. } => Code::InvalidArgument,
        DiskError::Exists { .. } => Code::AlreadyExists,
        DiskError::NotAttached { .. } => Code::NotFound,
        DiskError::Changing { .. } | DiskError::Host(_) | DiskError::Vm(VmError::Disk { .. }) => {
            Code::FailedPrecondition
        }
        DiskError::Vm(_) => Code::Unavailable,
    };
    status(code, &crate::holder::chain(error))
}

/// Of documents that the pod does not take over.
pub(super) fn not_applied(error: &ApplyError) -> Status {
    let code = match error {
        ApplyError::Manifest(_) | ApplyError::SourceName { .. } => Code::InvalidArgument,
        ApplyError::Read { .. } | ApplyError::NotInManifest { .. } => Code::FailedPrecondition,
        ApplyError::Access(error) => return refused(error),
        ApplyError::Task(_) => Code::Unavailable,
    };
    status(code, &crate::holder::chain(error))
}

/// Of what the guest does not do.
pub(super) fn refused_by_guest(error: &GuestError) -> Status {
    match error {
        GuestError::Refused { code, message, rpc: _ } => status(*code, message),
        GuestError::TooManyForwards => status(Code::ResourceExhausted, &error.to_string()),
        error => status(Code::Unavailable, &crate::holder::chain(error)),
    }
}

/// Refuses a piece of a stream that is larger than the protocol says.
pub(super) fn check_piece(field: &str, bytes: &[u8]) -> Result<(), Status> {
    match bytes.len() {
        ..=MAX_PIECE => Ok(()),
        length => {
            let text = format!("{field}: {length} bytes; must be at most {MAX_PIECE} in a message");
            Err(Status::invalid_argument(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_text_the_middle_is_left_out_between_characters() {
        for prefix in ["", "a", "ab"] {
            let long = format!("{prefix}field \"{}\" is wrong", "\u{20ac}".repeat(1 << 20));
            let short = status(Code::NotFound, &long);
            assert!(short.message().len() <= MAX_TEXT, "{}", short.message().len());
            assert!(short.message().ends_with("\" is wrong"), "{short}");
        }
        assert_eq!(status(Code::NotFound, "short").message(), "short");
    }
}

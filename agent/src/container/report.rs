//! What a new process says to the agent over its report pipe.
//!
//! One message before the program starts ([`Report::Ready`], or why not), then either one more if
//! exec failed, or the end of the pipe, which exec closes. A message is at most one PIPE_BUF, which
//! the kernel writes as a whole.

use super::lookup::StartFailure;

/// Longest message in bytes: PIPE_BUF of Linux.
pub(crate) const MAX_BYTES: usize = 4096;

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// Only the program remains to be started. The number is that of the descriptor of the
    /// terminal's master in the process, if it has a terminal.
    Ready(Option<i32>),
    /// The program cannot be executed.
    Failure(StartFailure),
    /// Something else failed.
    Error(String),
}

const READY: u8 = b'R';
const READY_WITH_TERMINAL: u8 = b'T';
const FAILURE: u8 = b'F';
const ERROR: u8 = b'E';

impl Report {
    /// As bytes; a text that is too long is shortened.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Beside two bytes of the message's own.
        let cut = |text| crate::shorten(text, MAX_BYTES.saturating_sub(2));
        match self {
            Self::Ready(None) => vec![READY],
            Self::Ready(Some(fd)) => [&[READY_WITH_TERMINAL][..], &fd.to_le_bytes()].concat(),
            Self::Failure(failure) => {
                [&[FAILURE, failure.exit_code][..], cut(&failure.message).as_bytes()].concat()
            }
            Self::Error(message) => [&[ERROR][..], cut(message).as_bytes()].concat(),
        }
    }

    /// From bytes; None if they are no message.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes {
            [READY] => Some(Self::Ready(None)),
            [READY_WITH_TERMINAL, fd @ ..] => {
                Some(Self::Ready(Some(i32::from_le_bytes(fd.try_into().ok()?))))
            }
            [FAILURE, exit_code, message @ ..] => {
                Some(Self::Failure(StartFailure { exit_code: *exit_code, message: text(message) }))
            }
            [ERROR, message @ ..] => Some(Self::Error(text(message))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_message_survives_the_pipe(code in any::<u8>(), text in "[a-z /]{0,200}", fd in any::<i32>()) {
            for report in [
                Report::Ready(None),
                Report::Ready(Some(fd)),
                Report::Failure(StartFailure { exit_code: code, message: text.clone() }),
                Report::Error(text.clone()),
            ] {
                prop_assert_eq!(Report::decode(&report.encode()), Some(report));
            }
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(report) = Report::decode(&bytes) {
                prop_assert!(report.encode().len() <= MAX_BYTES);
            }
        }
    }

    #[test]
    fn a_long_text_is_cut_to_what_the_pipe_takes_at_once() {
        let failure = StartFailure { exit_code: 127, message: "\u{e4}".repeat(10_000) };
        for report in [Report::Error("x".repeat(10_000)), Report::Failure(failure)] {
            let length = report.encode().len();
            assert!((MAX_BYTES - 8..=MAX_BYTES).contains(&length), "{length}");
        }
    }
}

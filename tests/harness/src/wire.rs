//! What the harness on this machine and its agent in the test host say to each other.
//!
//! One TCP connection per operation: a [`Request`] as the first frame, then frames both ways until
//! the agent sends [`Kind::Exit`], [`Kind::Done`] or [`Kind::Error`]. A frame is one byte of kind, a
//! little-endian 32-bit length and the payload.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Raised when this file changes: a running test host has the agent that it was booted with.
pub(crate) const PROTOCOL: u32 = 1;

/// The agent's TCP port in the test host.
pub(crate) const GUEST_PORT: u16 = 7001;

/// Longest payload of a frame. File lists are the longest thing that is sent in one.
pub(crate) const MAX_PAYLOAD: usize = 4 << 20;

/// Standard input is sent in pieces of at most this size, each only after the last was taken, so
/// that a signal never queues behind input that the command does not read.
pub(crate) const STDIN_CHUNK: usize = 64 << 10;

/// Files on the transfer disk start at multiples of this: what direct I/O asks for.
pub(crate) const TRANSFER_ALIGN: u64 = 4096;

/// Name of the header at the start of the transfer disk, read by `testhost/bootstrap`.
pub(crate) const BOOT_MAGIC: &str = "HUSKBOOT";

/// Where the token lies on the transfer disk, in bytes from its start.
pub(crate) const TOKEN_OFFSET: u64 = 512;

/// Length of the token in hexadecimal digits.
pub(crate) const TOKEN_LEN: usize = 32;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// To the agent: JSON of a [`Request`].
    Request = 1,
    /// To the agent: bytes for the command's standard input; empty at its end.
    Stdin = 2,
    /// To the agent: JSON of a signal number for the command's process group.
    Signal = 3,
    /// To the agent: JSON of the terminal's new [`Size`].
    Resize = 4,
    /// To the agent: the files that it asked for lie on the transfer disk.
    Written = 5,
    /// From the agent: bytes of the command's standard output.
    Stdout = 16,
    /// From the agent: bytes of the command's standard error.
    Stderr = 17,
    /// From the agent: the last piece of standard input has been taken.
    StdinTaken = 18,
    /// From the agent: JSON of the command's [`Outcome`].
    Exit = 19,
    /// From the agent: JSON of the indices of the files that must be sent.
    Need = 20,
    /// From the agent: the operation is complete.
    Done = 21,
    /// From the agent: the operation failed; a message.
    Error = 22,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [
            Request, Stdin, Signal, Resize, Written, Stdout, Stderr, StdinTaken, Exit, Need, Done,
            Error,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// The first frame of a connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// Shared secret: any user of this machine can connect to the forwarded port.
    pub(crate) token: String,
    pub(crate) operation: Operation,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum Operation {
    /// Answer with `Done`: the test host is up.
    Hello,
    /// Run a command.
    Exec(Command),
    /// Take files from the transfer disk.
    Push(Vec<PushedFile>),
}

/// A command to run in the test host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Command {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: String,
    /// A terminal of this size instead of pipes.
    pub(crate) terminal: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// A file to be brought into the test host. Taken as present when size, time and mode agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PushedFile {
    /// Absolute path in the test host.
    pub(crate) destination: String,
    pub(crate) mode: u32,
    pub(crate) content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum Content {
    Regular {
        /// Bytes.
        size: u64,
        mtime_s: i64,
        mtime_ns: i64,
    },
    Symlink {
        target: String,
    },
}

impl PushedFile {
    /// Bytes that this file takes on the transfer disk.
    pub(crate) fn size(&self) -> u64 {
        match self.content {
            Content::Regular { size, .. } => size,
            Content::Symlink { .. } => 0,
        }
    }
}

/// Where the chosen files lie on the transfer disk, in bytes from its start, and the end of the
/// last one. Both sides compute it instead of sending it.
pub(crate) fn transfer_layout<'a>(
    start: u64,
    files: impl Iterator<Item = &'a PushedFile>,
) -> Result<(Vec<u64>, u64)> {
    let mut offset = start;
    let mut offsets = Vec::new();
    for file in files {
        offsets.push(offset);
        offset = offset
            .checked_add(file.size())
            .and_then(|end| end.checked_next_multiple_of(TRANSFER_ALIGN))
            .context("the files' sizes overflow")?;
    }
    Ok((offsets, offset))
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Exited(i32),
    Signaled(i32),
}

impl Outcome {
    /// The exit code that a shell would report.
    pub(crate) fn code(self) -> i32 {
        match self {
            Outcome::Exited(code) => code,
            Outcome::Signaled(signal) => signal.saturating_add(128),
        }
    }
}

/// A frame as it was received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The payload as JSON of a `T`.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.payload)
            .with_context(|| format!("malformed {:?} frame", self.kind))
    }
}

/// Sends one frame.
pub(crate) fn send(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too long"))?;
    // One write: each would be a packet and an interrupt in the test host.
    let mut bytes = Vec::with_capacity(payload.len() + 5);
    bytes.push(kind as u8);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes)
}

/// Sends one frame with a JSON payload.
pub(crate) fn send_json(to: &mut impl Write, kind: Kind, value: &impl Serialize) -> Result<()> {
    let payload = serde_json::to_vec(value).context("encoding a frame")?;
    send(to, kind, &payload).with_context(|| format!("sending a {kind:?} frame"))
}

/// Receives one frame; `None` when the peer closed the connection between frames.
pub(crate) fn receive(from: &mut impl Read) -> Result<Option<Frame>> {
    let mut header = [0u8; 5];
    let mut filled = 0;
    while filled < header.len() {
        match from.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => bail!("connection closed within a frame"),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("receiving a frame"),
        }
    }
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    let kind = Kind::from_byte(kind).with_context(|| format!("unknown frame kind {kind}"))?;
    ensure!(length <= MAX_PAYLOAD, "{kind:?} frame of {length} bytes; at most {MAX_PAYLOAD}");
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).context("receiving a frame's payload")?;
    Ok(Some(Frame { kind, payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regular(size: u64) -> PushedFile {
        PushedFile {
            destination: "/opt/husk/bin/x".into(),
            mode: 0o755,
            content: Content::Regular { size, mtime_s: 0, mtime_ns: 0 },
        }
    }

    #[test]
    fn frames_survive_the_way() {
        let mut bytes = Vec::new();
        send(&mut bytes, Kind::Stdout, b"hello").unwrap();
        send(&mut bytes, Kind::Stdin, b"").unwrap();
        let mut reader = bytes.as_slice();
        let first = receive(&mut reader).unwrap().unwrap();
        assert_eq!(first, Frame { kind: Kind::Stdout, payload: b"hello".to_vec() });
        assert_eq!(receive(&mut reader).unwrap().unwrap().payload, b"");
        assert!(receive(&mut reader).unwrap().is_none());
    }

    #[test]
    fn malformed_frames_are_errors() {
        assert!(receive(&mut [16u8, 1, 0].as_slice()).is_err(), "cut in the header");
        assert!(receive(&mut [16u8, 9, 0, 0, 0, 1].as_slice()).is_err(), "cut in the payload");
        assert!(receive(&mut [99u8, 0, 0, 0, 0].as_slice()).is_err(), "unknown kind");
        assert!(receive(&mut [16u8, 255, 255, 255, 255].as_slice()).is_err(), "too long");
        assert!(send(&mut Vec::new(), Kind::Stdout, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn transferred_files_start_on_aligned_offsets() {
        let files = [regular(1), regular(4096), regular(0), regular(5000)];
        let (offsets, end) = transfer_layout(4096, files.iter()).unwrap();
        assert_eq!(offsets, [4096, 8192, 12288, 12288]);
        assert_eq!(end, 20480);
        assert!(transfer_layout(4096, [regular(u64::MAX)].iter()).is_err());
    }

    #[test]
    fn a_signal_is_reported_as_shells_do() {
        assert_eq!(Outcome::Exited(7).code(), 7);
        assert_eq!(Outcome::Signaled(9).code(), 137);
    }
}

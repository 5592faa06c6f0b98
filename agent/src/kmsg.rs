//! The kernel's log, read record by record from `/dev/kmsg`, whose form the kernel's
//! `Documentation/ABI/testing/dev-kmsg` describes.

use std::io;
use std::os::fd::OwnedFd;

use husk_proto::agent::{KernelLogRecord, KernelLogRecords};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use crate::sys;

const DEVICE: &str = "/dev/kmsg";

/// Longest record as the device gives it, in bytes (CONSOLE_EXT_LOG_MAX, now PRINTK_MESSAGE_MAX,
/// which is less).
const MAX_RECORD: usize = 8192;

/// Most records of a piece, and the bytes of text after which it ends.
const MAX_PIECE_RECORDS: usize = 256;
const MAX_PIECE_BYTES: usize = 32 * 1024;

/// Most records of a log that is not followed: more than any kernel keeps, because one that is
/// written as fast as it is read has no end.
const MAX_RECORDS: usize = 65_536;

/// The log from the oldest record that is left. With `follow` it goes on until `over` is true, or
/// gone.
///
/// # Errors
/// If there is no log that can be read.
pub(crate) fn stream(
    follow: bool,
    over: watch::Receiver<bool>,
) -> io::Result<impl Stream<Item = io::Result<KernelLogRecords>> + Send + use<>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = sys::watch(rustix::fs::open(DEVICE, flags, Mode::empty())?)?;
    // What waits here is all that waits for a client that is slow.
    let (to, from) = mpsc::channel(1);
    tokio::spawn(async move {
        if let Err(error) = carry(&device, follow, over, &to).await {
            // Nobody may listen any more.
            let _gone = to.send(Err(error)).await;
        }
    });
    Ok(ReceiverStream::new(from))
}

async fn carry(
    device: &AsyncFd<OwnedFd>,
    mut follow: bool,
    mut over: watch::Receiver<bool>,
    to: &mpsc::Sender<io::Result<KernelLogRecords>>,
) -> io::Result<()> {
    let mut reader = Reader::new();
    let mut left = MAX_RECORDS;
    loop {
        let records = match reader.read(device.get_ref()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !follow {
                    return Ok(());
                }
                let more = device.async_io(Interest::READABLE, |device| reader.read(device));
                tokio::select! {
                    biased;
                    records = more => records?,
                    () = is_over(&mut over) => {
                        // What there is now is the end of it.
                        (follow, left) = (false, MAX_RECORDS);
                        continue;
                    }
                    () = to.closed() => return Ok(()),
                }
            }
            records => records?,
        };
        left = left.saturating_sub(records.len());
        let piece = KernelLogRecords { records };
        if !piece.records.is_empty() && to.send(Ok(piece)).await.is_err() {
            return Ok(());
        }
        if !follow && left == 0 {
            return Ok(());
        }
        // Whoever writes the log without a pause must not have the agent's only thread.
        tokio::task::yield_now().await;
    }
}

async fn is_over(over: &mut watch::Receiver<bool>) {
    // Without a sender it is over as well.
    let _gone = over.wait_for(|over| *over).await.is_err();
}

/// Reads records from the device, of which each read gives one.
struct Reader {
    buffer: Vec<u8>,
    /// The number of the next record, if none is lost.
    next: u64,
}

impl Reader {
    fn new() -> Self {
        Reader { buffer: vec![0; MAX_RECORD], next: 0 }
    }

    /// The records that are there, as many as fit into a piece; there may be none of them that could
    /// be read. `WouldBlock` if there are none at all.
    fn read(&mut self, device: &OwnedFd) -> io::Result<Vec<KernelLogRecord>> {
        let mut records = Vec::new();
        let mut bytes = 0_usize;
        for turn in 0..MAX_PIECE_RECORDS {
            match rustix::io::read(device, &mut self.buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    let record = parse(self.buffer.get(..count).unwrap_or_default());
                    // One that cannot be understood counts as lost when the next one comes.
                    let Some(record) = record.map(|record| self.number(record)) else { continue };
                    bytes = bytes.saturating_add(record.text.len());
                    records.push(record);
                    if bytes >= MAX_PIECE_BYTES {
                        break;
                    }
                }
                // EPIPE: what was to be read next is overwritten, and the next read gives the oldest
                // one that is left. EINVAL: one that is too large was passed over.
                Err(Errno::PIPE | Errno::INVAL | Errno::INTR) => {}
                Err(Errno::AGAIN) if turn > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(records)
    }

    fn number(&mut self, (sequence, record): (u64, KernelLogRecord)) -> KernelLogRecord {
        let lost = sequence.saturating_sub(self.next);
        self.next = sequence.saturating_add(1);
        KernelLogRecord { lost, ..record }
    }
}

/// A record and its number, of which each record has one more than the one before. In the device's
/// form:
///
/// ```text
/// priority,number,µs since the start,flags[,more];text
///  KEY=value
/// ```
///
/// Flags say how a line was put together, and the pairs of which device it speaks: neither is of
/// interest here.
fn parse(record: &[u8]) -> Option<(u64, KernelLogRecord)> {
    let mut parts = record.splitn(2, |byte| *byte == b';');
    let (head, body) = (parts.next()?, parts.next()?);
    let mut fields = std::str::from_utf8(head).ok()?.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence: u64 = fields.next()?.parse().ok()?;
    let at_us: u64 = fields.next()?.parse().ok()?;
    let text = unescape(body.split(|byte| *byte == b'\n').next()?);
    let record = KernelLogRecord {
        lost: 0,
        level: priority & 7,
        facility: priority >> 3,
        at_us,
        text: String::from_utf8_lossy(&text).into_owned(),
    };
    Some((sequence, record))
}

/// Undoes what the device does to a text: a byte that is neither printable ASCII nor a space, and
/// the backslash itself, is `\x` and two hexadecimal digits there.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    while let [first, tail @ ..] = text {
        let (byte, rest) = match text {
            [b'\\', b'x', high, low, rest @ ..] => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, rest),
                _ => (*first, tail),
            },
            _ => (*first, tail),
        };
        bytes.push(byte);
        text = rest;
    }
    bytes
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(level: u32, facility: u32, at_us: u64, text: &str) -> KernelLogRecord {
        KernelLogRecord { lost: 0, level, facility, at_us, text: text.into() }
    }

    /// A record as the kernel writes it (msg_add_ext_text).
    fn written(priority: u32, sequence: u64, at_us: u64, text: &[u8]) -> Vec<u8> {
        let mut all = format!("{priority},{sequence},{at_us},-;").into_bytes();
        for byte in text {
            if (b' '..127).contains(byte) && *byte != b'\\' {
                all.push(*byte);
            } else {
                all.extend(format!("\\x{byte:02x}").bytes());
            }
        }
        all.push(b'\n');
        all
    }

    #[test]
    fn a_record_is_understood_whatever_the_kernel_adds_to_it() {
        let first = b"5,0,0,-;Linux version 6.12.48 (x@y)\n";
        assert_eq!(parse(first), Some((0, record(5, 0, 0, "Linux version 6.12.48 (x@y)"))));
        let device = b"6,339,5140900,-,caller=T1;NET: a; b,c\n SUBSYSTEM=pci\n DEVICE=+pci:0000\n";
        assert_eq!(parse(device), Some((339, record(6, 0, 5_140_900, "NET: a; b,c"))));
        let agent = b"30,7,1,c;husk-agent: a\\x0ab \\x5cx41 \\xc3\\xa4 \\x1b[0m \\xff\n";
        assert_eq!(
            parse(agent),
            Some((7, record(6, 3, 1, "husk-agent: a\nb \\x41 \u{e4} \x1b[0m \u{fffd}")))
        );
        assert_eq!(parse(b"6,1,2;"), Some((1, record(6, 0, 2, ""))));
    }

    #[test]
    fn what_is_no_record_is_none() {
        for bytes in
            [&b""[..], b";", b"6,1;x", b"x,1,2,-;x", b"6,-1,2,-;x", b"6,1,2,- x\n", b"\xff"]
        {
            assert_eq!(parse(bytes), None, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(unescape(b"\\x4 \\xg0 \\ \\"), b"\\x4 \\xg0 \\ \\");
    }

    #[test]
    fn what_was_overwritten_is_counted_by_the_numbers() {
        let mut reader = Reader::new();
        let mut lost = |sequence| reader.number((sequence, record(6, 0, 0, "x"))).lost;
        assert_eq!(
            [lost(3), lost(4), lost(10), lost(10), lost(u64::MAX)],
            [3, 0, 5, 0, u64::MAX - 11]
        );
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes: Vec<u8>) {
            let with_head = [b"6,1,2,-;", &bytes[..]].concat();
            prop_assert!(parse(&with_head).is_some());
            if let Some((_, record)) = parse(&bytes) {
                prop_assert!(record.level <= 7);
            }
        }

        #[test]
        fn what_the_kernel_escaped_comes_back(
            level in 0_u32..8, facility in 0_u32..24, sequence: u64, at_us: u64, text: String,
        ) {
            let bytes = written(facility << 3 | level, sequence, at_us, text.as_bytes());
            let expected = record(level, facility, at_us, &text);
            prop_assert_eq!(parse(&bytes), Some((sequence, expected)));
        }
    }
}

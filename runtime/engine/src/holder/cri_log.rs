//! The CRI's log format, as kubelets and log shippers read it: one line of text for each line of
//! output,
//!
//! ```text
//! 2026-01-02T15:04:05.123456789Z stdout F the line
//! ```
//!
//! with `P` instead of `F` for a piece of a line that goes on (or that the stream's end cut off).
//! The content of all pieces, with a line feed after each `F`, is exactly what was written. Pure:
//! bytes in, bytes out.

use std::collections::HashMap;
use std::time::SystemTime;

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::pod::Stream;

/// Longest content of one line of a log; longer output is written in pieces. As in containerd.
pub const MAX_CONTENT: usize = 16 * 1024;

/// Longest line of a log that is read: the content and what is in front of it.
pub const MAX_LINE: usize = MAX_CONTENT + 64;

/// RFC 3339 with exactly nine digits behind the point.
const TIMESTAMP: &[BorrowedFormatItem<'_>] = format_description!(
    version = 2,
    "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:9]Z"
);

/// A time as the log has it.
#[must_use]
pub fn timestamp(time: SystemTime) -> String {
    // Only years beyond 9999 cannot be written.
    OffsetDateTime::from(time)
        .format(TIMESTAMP)
        .unwrap_or_else(|_| "9999-12-31T23:59:59.999999999Z".into())
}

/// Puts the pieces of a container's output together to lines of the log.
#[derive(Debug, Default)]
pub struct Splitter {
    partial: HashMap<Stream, Vec<u8>>,
}

impl Splitter {
    /// What is to be written for a piece of output that came at this time; for an empty piece, which
    /// says that the stream has ended, what was left of it.
    pub fn feed(&mut self, stream: Stream, bytes: &[u8], at: &str) -> Vec<u8> {
        let partial = self.partial.entry(stream).or_default();
        let mut out = Vec::with_capacity(bytes.len().saturating_add(64));
        if bytes.is_empty() {
            flush(partial, stream, at, b'P', &mut out);
            return out;
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (mut rest, complete) = match piece.strip_suffix(b"\n") {
                Some(rest) => (rest, true),
                None => (piece, false),
            };
            while let Some((head, tail)) =
                rest.split_at_checked(MAX_CONTENT.saturating_sub(partial.len()))
                && !tail.is_empty()
            {
                partial.extend_from_slice(head);
                flush(partial, stream, at, b'P', &mut out);
                rest = tail;
            }
            partial.extend_from_slice(rest);
            if complete {
                line(partial, stream, at, b'F', &mut out);
                partial.clear();
            }
        }
        out
    }

    /// What was left of all streams.
    pub fn finish(&mut self, at: &str) -> Vec<u8> {
        let mut out = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            out.extend(self.feed(stream, b"", at));
        }
        out
    }
}

fn flush(partial: &mut Vec<u8>, stream: Stream, at: &str, tag: u8, out: &mut Vec<u8>) {
    if !partial.is_empty() {
        line(partial, stream, at, tag, out);
        partial.clear();
    }
}

fn line(content: &[u8], stream: Stream, at: &str, tag: u8, out: &mut Vec<u8>) {
    out.extend_from_slice(at.as_bytes());
    out.extend_from_slice(match stream {
        Stream::Stdout => b" stdout ",
        Stream::Stderr => b" stderr ",
    });
    out.push(tag);
    out.push(b' ');
    out.extend_from_slice(content);
    out.push(b'\n');
}

/// One line of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLine<'a> {
    /// When it was written.
    pub at: &'a str,
    /// Where.
    pub stream: Stream,
    /// Whether the line of output goes on in the next line of this stream.
    pub partial: bool,
    /// What was written, without the line feed.
    pub content: &'a [u8],
}

impl<'a> LogLine<'a> {
    /// Understands a line of a log, without its line feed; `None` if it is none.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let at = std::str::from_utf8(parts.next()?).ok().filter(|at| !at.is_empty())?;
        let stream = match parts.next()? {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        // Tags are separated by colons; the first says this.
        let partial = match parts.next()?.split(|byte| *byte == b':').next()? {
            b"F" => false,
            b"P" => true,
            _ => return None,
        };
        Some(LogLine { at, stream, partial, content: parts.next()? })
    }

    /// What was written: with a line feed unless the line goes on.
    pub fn output(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let end: &[u8] = if self.partial { b"" } else { b"\n" };
        [self.content, end].into_iter()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const AT: &str = "2026-01-02T15:04:05.123456789Z";

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn times_have_nine_digits() {
        let at = SystemTime::UNIX_EPOCH + Duration::new(1_767_366_245, 120);
        assert_eq!(timestamp(at), "2026-01-02T15:04:05.000000120Z");
    }

    #[test]
    fn lines_are_complete_and_the_end_is_partial() {
        let mut splitter = Splitter::default();
        let out = splitter.feed(Stream::Stdout, b"one\n\ntw", AT);
        assert_eq!(text(out), format!("{AT} stdout F one\n{AT} stdout F \n"));
        let out = splitter.feed(Stream::Stderr, b"err\n", AT);
        assert_eq!(text(out), format!("{AT} stderr F err\n"));
        assert_eq!(text(splitter.feed(Stream::Stdout, b"o", AT)), "");
        let end = splitter.feed(Stream::Stdout, b"", AT);
        assert_eq!(text(end), format!("{AT} stdout P two\n"));
        assert_eq!(splitter.finish(AT), b"");
    }

    #[test]
    fn a_long_line_is_written_in_pieces_of_16_kib() {
        let mut splitter = Splitter::default();
        let mut long = vec![b'x'; MAX_CONTENT * 2];
        long.push(b'\n');
        let out = splitter.feed(Stream::Stdout, &long, AT);
        let lines: Vec<LogLine<'_>> = out
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| LogLine::parse(line).unwrap())
            .collect();
        let shapes: Vec<_> = lines.iter().map(|line| (line.partial, line.content.len())).collect();
        assert_eq!(shapes, [(true, MAX_CONTENT), (false, MAX_CONTENT)]);
    }

    #[test]
    fn what_is_no_line_of_a_log_is_none() {
        for line in ["", "x", "t stdout F", "t stdin F x", "t stdout X x", " stdout F x"] {
            assert_eq!(LogLine::parse(line.as_bytes()), None, "{line:?}");
        }
        assert!(LogLine::parse(b"t stdout F ").unwrap().content.is_empty());
        assert!(LogLine::parse(b"t stderr P:x a b").unwrap().partial);
    }

    proptest! {
        #[test]
        fn every_byte_comes_back(
            // Runs of a byte, so that long lines need not be made byte by byte.
            runs in proptest::collection::vec(
                (any::<bool>(), prop_oneof![Just(b'\n'), any::<u8>()], 0..40_000_usize),
                0..8,
            )
        ) {
            let pieces: Vec<(bool, Vec<u8>)> = runs
                .into_iter()
                .map(|(stderr, byte, len)| {
                    (stderr, vec![byte; if byte == b'\n' { len % 4 } else { len }])
                })
                .collect();
            let mut splitter = Splitter::default();
            let mut log = Vec::new();
            let mut written = [Vec::new(), Vec::new()];
            for (stderr, piece) in &pieces {
                let stream = if *stderr { Stream::Stderr } else { Stream::Stdout };
                written[usize::from(*stderr)].extend_from_slice(piece);
                log.extend(splitter.feed(stream, piece, AT));
            }
            log.extend(splitter.finish(AT));
            let mut read = [Vec::new(), Vec::new()];
            for line in log.split_inclusive(|byte| *byte == b'\n') {
                prop_assert!(line.len() <= MAX_LINE);
                let line = LogLine::parse(line.strip_suffix(b"\n").unwrap()).unwrap();
                let of = &mut read[usize::from(line.stream == Stream::Stderr)];
                line.output().for_each(|part| of.extend_from_slice(part));
            }
            prop_assert_eq!(read, written);
        }

        #[test]
        fn parsing_never_panics(line in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _parsed = LogLine::parse(&line);
        }
    }
}

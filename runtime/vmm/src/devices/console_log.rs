//! What the guest says on its console: the last of it for error reports, all of it (up to a cap) for
//! a file or a pipe.
//!
//! Shared by the console devices. The guest waits for its console's output to be taken, so nothing
//! here waits for a reader: what a full pipe does not take is lost, and the loss is noted in it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes kept for [`ConsoleLog::tail_lines`].
pub const TAIL_LEN: usize = 16 * 1024;

/// Bytes written to the file at once. A pipe that is ready takes this much without waiting
/// (`PIPE_BUF`).
const CHUNK_LEN: usize = 4096;

/// The guest's console output.
#[derive(Debug)]
pub struct ConsoleLog {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    tail: VecDeque<u8>,
    /// Whether `tail` has lost its beginning.
    wrapped: bool,
    copy: Option<Sink>,
}

/// The copy in a file or a pipe.
#[derive(Debug)]
struct Sink {
    file: File,
    cap: u64,
    written: u64,
    /// Bytes that a full pipe did not take since the last ones that it took.
    lost: u64,
}

impl ConsoleLog {
    /// An empty log. At most `cap` bytes of it, and a line that says where it was cut, go to `copy`
    /// (a file, or a pipe, whose reader may be as slow as it likes).
    #[must_use]
    pub fn new(copy: Option<File>, cap: u64) -> Self {
        let copy = copy.map(|file| Sink { file, cap, written: 0, lost: 0 });
        let tail = VecDeque::new();
        ConsoleLog { inner: Mutex::new(Inner { tail, wrapped: false, copy }) }
    }

    /// Appends what the guest wrote. Does not wait for a pipe's reader.
    pub fn write(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.keep(bytes);
        let Some(copy) = &mut inner.copy else { return };
        match copy.append(bytes) {
            Ok(true) => {}
            Ok(false) => inner.copy = None,
            Err(error) => {
                // Disk full, or the reader is gone: the guest has no use for knowing.
                tracing::warn!(%error, "the guest's console is no longer copied");
                inner.copy = None;
            }
        }
    }

    /// The last `lines` lines, joined by newlines, without control characters: they are the guest's,
    /// and may end up on a terminal.
    #[must_use]
    pub fn tail_lines(&self, lines: usize) -> String {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = inner.tail.iter().copied().collect();
        let text: String = String::from_utf8_lossy(&bytes)
            .chars()
            .filter(|c| *c != '\r')
            .map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c })
            .collect();
        let all: Vec<&str> = text.trim_end_matches('\n').split('\n').collect();
        // The first line is half a line once the beginning is lost.
        let whole = match all.as_slice() {
            [_, rest @ ..] if inner.wrapped && !rest.is_empty() => rest,
            all => all,
        };
        whole.get(whole.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }
}

impl Inner {
    fn keep(&mut self, bytes: &[u8]) {
        let newest = bytes.get(bytes.len().saturating_sub(TAIL_LEN)..).unwrap_or_default();
        self.tail.extend(newest);
        let surplus = self.tail.len().saturating_sub(TAIL_LEN);
        self.wrapped |= surplus > 0 || newest.len() < bytes.len();
        self.tail.drain(..surplus);
    }
}

impl Sink {
    /// Whether there will be more.
    fn append(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let left = usize::try_from(self.cap.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let fitting = bytes.get(..left).unwrap_or(bytes);
        for chunk in fitting.chunks(CHUNK_LEN) {
            if !self.is_ready()? {
                self.lost = self.lost.saturating_add(length(chunk));
                continue;
            }
            if self.lost > 0 {
                let note = format!("\n[husk: {} bytes of the console were lost]\n", self.lost);
                self.file.write_all(note.as_bytes())?;
                self.lost = 0;
                // The note may have filled the pipe.
                if !self.is_ready()? {
                    self.lost = length(chunk);
                    continue;
                }
            }
            self.file.write_all(chunk)?;
        }
        self.written = self.written.saturating_add(length(fitting));
        if fitting.len() == bytes.len() {
            return Ok(true);
        }
        if self.is_ready()? {
            let note = format!("\n[husk: the console's log ends here, after {} bytes]\n", self.cap);
            self.file.write_all(note.as_bytes())?;
        }
        Ok(false)
    }

    /// Whether the file takes [`CHUNK_LEN`] bytes without waiting for anyone. A regular file always
    /// does. Asked anew each time rather than made non-blocking, because that would change the
    /// descriptor for the process that gave it to us.
    fn is_ready(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&at_once)))?;
        Ok(ready > 0)
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn log_to_file(cap: u64) -> (ConsoleLog, File) {
        let file = tempfile::tempfile().unwrap();
        (ConsoleLog::new(Some(file.try_clone().unwrap()), cap), file)
    }

    fn contents(mut file: File) -> String {
        use std::io::Seek;
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_tail_has_the_last_lines() {
        let log = ConsoleLog::new(None, 0);
        assert_eq!(log.tail_lines(3), "");
        log.write(b"one\r\ntwo\r\nthr");
        log.write(b"ee\r\nfour\r\n");
        assert_eq!(log.tail_lines(2), "three\nfour");
        assert_eq!(log.tail_lines(9), "one\ntwo\nthree\nfour");
        log.write(b"no newline");
        assert_eq!(log.tail_lines(1), "no newline");
        assert_eq!(log.tail_lines(0), "");
    }

    #[test]
    fn the_tail_is_bounded_and_begins_with_a_whole_line() {
        let log = ConsoleLog::new(None, 0);
        for i in 0..10_000 {
            log.write(format!("line {i}\n").as_bytes());
        }
        let tail = log.tail_lines(usize::MAX);
        assert!(tail.len() <= TAIL_LEN);
        assert!(tail.len() > TAIL_LEN - 32);
        assert!(tail.ends_with("line 9999"));
        assert!(tail.lines().all(|line| line.starts_with("line ")));
        log.write(&vec![b'x'; 3 * TAIL_LEN]);
        assert_eq!(log.tail_lines(1).len(), TAIL_LEN);
    }

    #[test]
    fn the_tail_is_safe_to_print() {
        let log = ConsoleLog::new(None, 0);
        log.write(b"\x1b[2Jgone\x07\xff\tend\n");
        assert_eq!(log.tail_lines(1), "\u{fffd}[2Jgone\u{fffd}\u{fffd}\tend");
    }

    #[test]
    fn everything_is_copied_to_the_file() {
        let (log, file) = log_to_file(1000);
        log.write(b"hello ");
        log.write(b"world\n");
        assert_eq!(contents(file), "hello world\n");
    }

    #[test]
    fn the_copy_is_cut_at_its_cap_and_says_so_once() {
        let (log, file) = log_to_file(8);
        log.write(b"12345");
        log.write(b"67890");
        log.write(b"more");
        assert_eq!(
            contents(file),
            "12345678\n[husk: the console's log ends here, after 8 bytes]\n"
        );
        assert_eq!(log.tail_lines(1), "1234567890more");
    }

    #[test]
    fn a_full_pipe_does_not_block_and_the_loss_is_noted() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (mut reader, writer): (File, OwnedFd) = (reader.into(), writer);
        let log = ConsoleLog::new(Some(File::from(writer)), 1 << 30);
        // More than any pipe holds by default.
        for _ in 0..100 {
            log.write(&[b'a'; CHUNK_LEN]);
        }
        let mut got = vec![0; 16 * CHUNK_LEN];
        reader.read_exact(&mut got).unwrap();
        log.write(b"after\n");
        drop(log);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with("after\n"), "{rest:?}");
        assert!(rest.contains("bytes of the console were lost]\n"));
        assert!(got.len() + rest.len() < 100 * CHUNK_LEN);
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_copy_only() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let log = ConsoleLog::new(Some(File::from(writer)), 100);
        log.write(b"lost\n");
        log.write(b"kept\n");
        assert_eq!(log.tail_lines(2), "lost\nkept");
    }
}

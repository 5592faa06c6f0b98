//! Showing what containers write: whole lines, each with the name of who wrote it.

use std::collections::HashMap;
use std::io::{ErrorKind, IsTerminal, Write};

use husk_engine::pod::{LogChunk, Stream};

/// A line longer than this is shown in pieces, in bytes.
const MAX_LINE: usize = 64 * 1024;

/// Colours of names (ANSI foreground codes), in turn.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 31];

/// Someone's output: its prefix and the line that is not complete yet.
#[derive(Debug)]
struct Source {
    prefix: Vec<u8>,
    partial: Vec<u8>,
}

/// Puts lines together and prefixes them. Pure: bytes in, bytes out.
#[derive(Debug)]
pub(super) struct Lines {
    /// Whether prefixes name the pod as well.
    with_pod: bool,
    /// Width to which prefixes are filled.
    width: usize,
    colours: bool,
    names: Vec<String>,
    sources: HashMap<(String, Stream), Source>,
}

impl Lines {
    /// For these containers: (pod, container).
    pub(super) fn new(containers: &[(String, String)], with_pod: bool, colours: bool) -> Self {
        let mut lines =
            Lines { with_pod, width: 0, colours, names: Vec::new(), sources: HashMap::new() };
        lines.names = containers.iter().map(|(pod, name)| lines.label(pod, name)).collect();
        lines.width = lines.names.iter().map(String::len).max().unwrap_or(0);
        lines
    }

    fn label(&self, pod: &str, container: &str) -> String {
        if self.with_pod { format!("{pod}/{container}") } else { container.to_owned() }
    }

    fn prefix(&self, label: &str) -> Vec<u8> {
        let position = self.names.iter().position(|name| name == label).unwrap_or(0);
        let colour = COLOURS.get(position % COLOURS.len()).filter(|_| self.colours);
        match colour {
            Some(colour) => format!("\x1b[{colour}m{label:<width$} |\x1b[0m ", width = self.width),
            None => format!("{label:<width$} | ", width = self.width),
        }
        .into_bytes()
    }

    /// What is to be written for a chunk: complete lines. At the end of a stream the last line is
    /// completed.
    pub(super) fn feed(&mut self, pod: &str, chunk: &LogChunk) -> Vec<u8> {
        let label = self.label(pod, &chunk.container);
        let prefix = self.prefix(&label);
        let source = self
            .sources
            .entry((label, chunk.stream))
            .or_insert_with(|| Source { prefix, partial: Vec::new() });
        let mut out = Vec::with_capacity(chunk.bytes.len() + 64);
        if chunk.bytes.is_empty() {
            source.end_line(&mut out);
            return out;
        }
        for piece in chunk.bytes.split_inclusive(|byte| *byte == b'\n') {
            match piece.strip_suffix(b"\n") {
                Some(rest) => {
                    source.partial.extend_from_slice(rest);
                    source.line(&mut out);
                }
                None => source.partial.extend_from_slice(piece),
            }
            if source.partial.len() > MAX_LINE {
                source.line(&mut out);
            }
        }
        out
    }

    /// Completes every line.
    pub(super) fn finish(&mut self) -> Vec<(Stream, Vec<u8>)> {
        let mut rest = Vec::new();
        for ((_, stream), source) in &mut self.sources {
            let mut out = Vec::new();
            source.end_line(&mut out);
            if !out.is_empty() {
                rest.push((*stream, out));
            }
        }
        rest
    }
}

impl Source {
    fn line(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.append(&mut self.partial);
        out.push(b'\n');
    }

    fn end_line(&mut self, out: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.line(out);
        }
    }
}

/// Where lines go.
#[derive(Debug)]
pub(super) struct Printer {
    lines: Lines,
    /// Everything to standard error, because standard output is for results.
    all_to_stderr: bool,
    broken: bool,
}

impl Printer {
    pub(super) fn new(
        containers: &[(String, String)],
        with_pod: bool,
        all_to_stderr: bool,
    ) -> Self {
        let terminal =
            std::io::stderr().is_terminal() && (all_to_stderr || std::io::stdout().is_terminal());
        let colours = terminal && std::env::var_os("NO_COLOR").is_none();
        Printer { lines: Lines::new(containers, with_pod, colours), all_to_stderr, broken: false }
    }

    /// Writes what is complete. Blocks while the terminal or pipe takes nothing.
    pub(super) fn print(&mut self, pod: &str, chunk: &LogChunk) {
        let out = self.lines.feed(pod, chunk);
        self.write(chunk.stream, &out);
    }

    /// Writes what is left.
    pub(super) fn finish(mut self) {
        for (stream, out) in self.lines.finish() {
            self.write(stream, &out);
        }
    }

    fn write(&mut self, stream: Stream, out: &[u8]) {
        if self.broken || out.is_empty() {
            return;
        }
        let written = if stream == Stream::Stdout && !self.all_to_stderr {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(out).and_then(|()| stdout.flush())
        } else {
            std::io::stderr().lock().write_all(out)
        };
        if let Err(error) = written {
            // Whoever read has gone (`| head`): the pods go on, unheard.
            self.broken = true;
            if error.kind() != ErrorKind::BrokenPipe {
                tracing::warn!(%error, "cannot write the containers' output");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(container: &str, stream: Stream, bytes: &[u8]) -> LogChunk {
        LogChunk { container: container.into(), run: 0, stream, bytes: bytes.to_vec() }
    }

    fn lines() -> Lines {
        Lines::new(&[("p".into(), "web".into()), ("p".into(), "client".into())], false, false)
    }

    #[test]
    fn lines_are_prefixed_and_aligned() {
        let mut lines = lines();
        assert_eq!(
            lines.feed("p", &chunk("web", Stream::Stdout, b"a\nb\n")),
            b"web    | a\nweb    | b\n"
        );
        assert_eq!(lines.feed("p", &chunk("client", Stream::Stdout, b"\n")), b"client | \n");
    }

    #[test]
    fn a_line_in_pieces_is_one_line_per_stream() {
        let mut lines = lines();
        assert!(lines.feed("p", &chunk("web", Stream::Stdout, b"out")).is_empty());
        assert!(lines.feed("p", &chunk("web", Stream::Stderr, b"err")).is_empty());
        assert_eq!(lines.feed("p", &chunk("web", Stream::Stdout, b"put\nx")), b"web    | output\n");
        assert_eq!(lines.feed("p", &chunk("web", Stream::Stderr, b"or\n")), b"web    | error\n");
        assert_eq!(lines.feed("p", &chunk("web", Stream::Stdout, b"")), b"web    | x\n");
        assert!(lines.feed("p", &chunk("web", Stream::Stdout, b"")).is_empty());
    }

    #[test]
    fn an_endless_line_does_not_fill_memory() {
        let mut lines = lines();
        let mut written = 0;
        for _ in 0..100 {
            written += lines.feed("p", &chunk("web", Stream::Stdout, &[b'x'; 10_000])).len();
        }
        assert!(written > 900_000, "{written}");
    }

    #[test]
    fn what_is_left_is_completed_at_the_end() {
        let mut lines = Lines::new(&[("p".into(), "c".into())], true, false);
        assert!(lines.feed("p", &chunk("c", Stream::Stderr, b"last")).is_empty());
        assert_eq!(lines.finish(), [(Stream::Stderr, b"p/c | last\n".to_vec())]);
        assert!(lines.finish().is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_pass_unchanged() {
        let mut lines = Lines::new(&[("p".into(), "c".into())], false, false);
        assert_eq!(lines.feed("p", &chunk("c", Stream::Stdout, b"\xff\x00\n")), b"c | \xff\x00\n");
    }
}

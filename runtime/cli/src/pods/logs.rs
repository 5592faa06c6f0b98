//! `husk logs`: what containers have written.
//!
//! Read from the log files alone: a pod that has ended, or hangs, tells as much as one that runs,
//! and whoever reads slowly holds nobody up.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::cri_log::{LogLine, MAX_LINE};
use husk_engine::holder::record::{Found, Records};
use husk_engine::holder::rotate::Reader;
use husk_engine::pod::Stream;

use super::follow::{Lines, Watcher};
use super::{Pods, container, time};
use crate::args::Global;

/// Show what a container has written
///
/// Its standard output comes on standard output, its standard error on standard error. Of each
/// container the logs of the latest run and of the one before are kept, in the CRI's log format, in
/// files that are rotated by size (see `husk run --help`).
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk logs web\n  \
    husk logs -f --tail 10 -c nginx web\n  \
    husk logs --since 10m --timestamps web\n  \
    husk logs -p web                 why it was started again")]
pub(crate) struct LogsArgs {
    /// Go on with what is written, also over restarts, until the pod has ended
    #[arg(short, long)]
    follow: bool,
    /// Only what was written since: a duration (10m, 1h30m) or a time (2026-01-02T15:04:05Z)
    #[arg(long, value_name = "TIME", value_parser = time::since)]
    since: Option<SystemTime>,
    /// Only so many lines from the end, before what follows
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Of the run before the latest one
    #[arg(short, long, conflicts_with = "follow")]
    previous: bool,
    /// Of this container [default: the first one]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// Begin each line with the time at which it was written
    #[arg(long)]
    timestamps: bool,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
}

pub(crate) fn run(global: &Global, args: &LogsArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let name = container(found, args.container.as_deref())?;
    match show(&pods.records, found, name, args) {
        // Whoever read has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        result => result.map(|()| ExitCode::SUCCESS),
    }
}

pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// How often a container was started again.
fn restarts(found: &Found, name: &str) -> u32 {
    let status = found.status.containers.iter().find(|status| status.name == name);
    status.map_or(0, |status| status.restarts)
}

fn show(records: &Records, found: &Found, name: &str, args: &LogsArgs) -> anyhow::Result<()> {
    let latest = restarts(found, name);
    let mut run = match args.previous {
        false => latest,
        true => latest.checked_sub(1).with_context(|| {
            format!("container {name} was not started again: it has no previous log")
        })?,
    };
    // Before the first look, so that nothing is missed.
    let watcher = match args.follow {
        true => Some(Watcher::of(&[found.dir.path(), &found.dir.container(name)])?),
        false => None,
    };
    let mut printer = Printer { timestamps: args.timestamps, since: args.since, open: false };
    let mut log = Log::new(Reader::from_start(found.dir.log(name, run)));
    let mut tail = args.tail.map(|lines| Tail { lines, kept: VecDeque::new(), complete: 0 });
    log.read_on(|line| match &mut tail {
        Some(tail) => {
            tail.keep(line);
            Ok(())
        }
        None => printer.print(line),
    })?;
    for line in tail.into_iter().flat_map(|tail| tail.kept) {
        printer.print(&line)?;
    }
    let Some(watcher) = watcher else { return printer.finish() };
    loop {
        std::io::stdout().flush()?;
        watcher.changed()?;
        // Whether the pod has ended is looked at when nothing more is written.
        if log.read_on(|line| printer.print(line))? {
            continue;
        }
        if found.dir.log(name, run.saturating_add(1)).exists() {
            log.read_on(|line| printer.print(line))?;
            run = run.saturating_add(1);
            log = Log::new(Reader::from_start(found.dir.log(name, run)));
            log.read_on(|line| printer.print(line))?;
            continue;
        }
        let ended = records.look_again(&found.dir)?.is_none_or(|found| !found.held);
        if ended {
            // What came between the last look and the end.
            log.read_on(|line| printer.print(line))?;
            return printer.finish();
        }
    }
}

/// A log that is read line by line.
struct Log {
    reader: Reader,
    lines: Lines,
}

impl Log {
    fn new(reader: Reader) -> Self {
        Log { reader, lines: Lines::new(MAX_LINE) }
    }

    /// Hands out the lines that there are now; whether there were any.
    fn read_on(
        &mut self,
        mut each: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        let mut buffer = vec![0; 64 * 1024];
        let mut any = false;
        loop {
            let n = self.reader.read(&mut buffer).context("cannot read the log")?;
            if self.reader.take_lost() {
                eprintln!("husk: a part of the log was dropped before it was read");
            }
            if n == 0 {
                return Ok(any);
            }
            any = true;
            self.lines.feed(buffer.get(..n).unwrap_or_default(), &mut each)?;
        }
    }
}

/// The last lines of a log: lines of output, which may be several of the log.
struct Tail {
    lines: usize,
    kept: VecDeque<Vec<u8>>,
    /// How many of them end a line of output.
    complete: usize,
}

impl Tail {
    fn keep(&mut self, line: &[u8]) {
        let ends = |line: &[u8]| LogLine::parse(line).is_none_or(|line| !line.partial);
        self.complete = self.complete.saturating_add(usize::from(ends(line)));
        self.kept.push_back(line.to_vec());
        // An incomplete line at the end is one more.
        let open = usize::from(!ends(line));
        while self.complete.saturating_add(open) > self.lines
            && let Some(first) = self.kept.pop_front()
        {
            self.complete = self.complete.saturating_sub(usize::from(ends(&first)));
            if self.kept.is_empty() {
                break;
            }
        }
    }
}

/// Shows lines of a log as what was written.
struct Printer {
    timestamps: bool,
    since: Option<SystemTime>,
    /// Whether the last line was a part of one.
    open: bool,
}

impl Printer {
    fn print(&mut self, line: &[u8]) -> anyhow::Result<()> {
        let Some(line) = LogLine::parse(line) else {
            tracing::debug!("a line of the log is none");
            return Ok(());
        };
        if let Some(since) = self.since
            && time::parse(line.at).is_some_and(|at| at < since)
        {
            return Ok(());
        }
        match line.stream {
            Stream::Stdout => self.write(std::io::stdout().lock(), &line),
            Stream::Stderr => self.write(std::io::stderr().lock(), &line),
        }
    }

    fn write(&mut self, mut to: impl Write, line: &LogLine<'_>) -> anyhow::Result<()> {
        if self.timestamps && !self.open {
            write!(to, "{} ", line.at)?;
        }
        for part in line.output() {
            to.write_all(part)?;
        }
        self.open = line.partial;
        Ok(())
    }

    fn finish(&self) -> anyhow::Result<()> {
        Ok(std::io::stdout().flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(lines: usize, log: &[&str]) -> Vec<String> {
        let mut tail = Tail { lines, kept: VecDeque::new(), complete: 0 };
        log.iter().for_each(|line| tail.keep(line.as_bytes()));
        tail.kept.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    #[test]
    fn the_tail_counts_lines_of_output() {
        let log = ["t stdout F 1", "t stdout P 2a", "t stdout F 2b", "t stdout F 3"];
        assert_eq!(kept(1, &log), log[3..]);
        assert_eq!(kept(2, &log), log[1..]);
        assert_eq!(kept(9, &log), log);
        assert!(kept(0, &log).is_empty());
        let open = ["t stdout F 1", "t stdout P 2"];
        assert_eq!(kept(1, &open), open[1..]);
    }
}

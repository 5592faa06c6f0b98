//! `husk console`: what the guest's kernel says.
//!
//! The guest is asked, because only it has all of its log: its kernel is started to be quiet, which
//! is quick. What it cannot tell any more is on its console, which the VMM has written to a file.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::client::guest_messages::{KernelLogRecord, KernelLogRecords};
use husk_engine::holder::client::messages::KernelLogRequest;
use husk_engine::holder::client::{Code, Streaming};
use husk_engine::holder::record::{Found, Records};
use husk_engine::holder::rotate::Reader;
use tokio::time::timeout;

use super::escape::escape;
use super::follow::{Lines, Watcher};
use super::logs::is_broken_pipe;
use super::{Pods, block_on, connect, refusal};
use crate::args::Global;

/// Show the log of a pod's guest kernel
///
/// The guest is asked for it: all that its kernel has kept, with what the agent in it says, each line
/// with the seconds since the kernel's start. A guest that has ended, is not up yet or does not answer
/// cannot be asked: then it is what it wrote to its console, which is warnings and worse, so often
/// nothing. That stays with the pod until `husk rm`.
#[derive(Debug, Args)]
#[command(after_long_help = "Control characters, and bytes that are no text, are shown as \\xNN.")]
pub(crate) struct ConsoleArgs {
    /// Go on with what is written until the pod has ended
    #[arg(short, long)]
    follow: bool,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
}

/// How long a guest may take to begin to tell its log, and for each further piece of one that is not
/// followed.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// Longest line of the console's log that is shown as one, in bytes.
const MAX_LINE: usize = 64 * 1024;

pub(crate) fn run(global: &Global, args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    match show(&pods.records, found, args.follow) {
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

fn show(records: &Records, found: &Found, follow: bool) -> anyhow::Result<()> {
    // Before the first look, so that nothing is missed.
    let watcher = match follow {
        true => Some(Watcher::of(&[found.dir.path()])?),
        false => None,
    };
    let mut console = Console::new(found.dir.console());
    let (mut held, mut ask, mut explained) = (found.held, true, false);
    loop {
        if held && ask {
            match block_on(told(found, follow))? {
                Told::All { .. } if !follow => return Ok(()),
                // What comes after that, the guest could only say on its console.
                Told::All { last_us } => {
                    (ask, explained, console.after_us) = (false, true, Some(last_us));
                }
                Told::Part { last_us, why } => {
                    eprintln!("husk: the guest tells no more ({why:#}): its console goes on");
                    (ask, explained, console.after_us) = (false, true, Some(last_us));
                }
                Told::Nothing { why, not_yet } => {
                    ask = not_yet;
                    if !explained {
                        explain(&format!("the guest cannot be asked ({why:#})"));
                    }
                    explained = true;
                }
            }
        } else if !explained {
            explain(&format!("pod {} has ended", found.pod.full_name()));
            explained = true;
        }
        console.show()?;
        let Some(watcher) = watcher.as_ref().filter(|_| held) else { return console.finish() };
        watcher.changed()?;
        held = records.look_again(&found.dir)?.is_some_and(|found| found.held);
    }
}

/// Says why there is not more.
fn explain(why: &str) {
    eprintln!("husk: {why}: this is what its kernel wrote to its console, warnings and worse");
}

/// What came of asking the guest for its log.
enum Told {
    /// All, or with `follow` all up to the guest's end; up to this time, in µs since its start.
    All { last_us: u64 },
    /// A part.
    Part { last_us: u64, why: anyhow::Error },
    /// Nothing.
    Nothing { why: anyhow::Error, not_yet: bool },
}

/// Has the guest tell its log, and shows it. Fails if it cannot be shown.
async fn told(found: &Found, follow: bool) -> anyhow::Result<Told> {
    let silent = || anyhow::anyhow!("no answer in {} s", ANSWER_LIMIT.as_secs());
    let begin = async {
        let nothing = |why, not_yet| Told::Nothing { why, not_yet };
        let mut pod = connect(found).await.map_err(|why| nothing(why, false))?;
        let asked = pod.kernel_log(KernelLogRequest { follow }).await;
        let mut log = asked
            .map_err(|status| {
                let not_yet = status.code() == Code::Unavailable;
                nothing(refusal(status), not_yet)
            })?
            .into_inner();
        let first = next(&mut log).await.map_err(|why| nothing(why, false))?;
        Ok((log, first))
    };
    let (mut log, mut piece) = match timeout(ANSWER_LIMIT, begin).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(told)) => return Ok(told),
        Err(_) => return Ok(Told::Nothing { why: silent(), not_yet: false }),
    };
    let mut last_us = 0;
    while let Some(records) = piece {
        last_us = records.last().map_or(last_us, |record| record.at_us);
        print(&records)?;
        let next = match follow {
            true => next(&mut log).await,
            false => timeout(ANSWER_LIMIT, next(&mut log)).await.unwrap_or_else(|_| Err(silent())),
        };
        piece = match next {
            Ok(piece) => piece,
            Err(why) => return Ok(Told::Part { last_us, why }),
        };
    }
    Ok(Told::All { last_us })
}

async fn next(
    log: &mut Streaming<KernelLogRecords>,
) -> anyhow::Result<Option<Vec<KernelLogRecord>>> {
    Ok(log.message().await.map_err(refusal)?.map(|KernelLogRecords { records }| records))
}

/// Shows records as the kernel does on a console.
fn print(records: &[KernelLogRecord]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for KernelLogRecord { lost, level: _, facility: _, at_us, text } in records {
        if *lost > 0 {
            out.flush()?;
            eprintln!("husk: {lost} records of the log were overwritten before they were read");
        }
        for line in text.split('\n') {
            let (s, us) = (at_us / 1_000_000, at_us % 1_000_000);
            writeln!(out, "[{s:5}.{us:06}] {}", escape(line.as_bytes()))?;
        }
    }
    Ok(out.flush()?)
}

/// What the guest wrote to its console.
struct Console {
    reader: Reader,
    lines: Lines,
    /// Only what comes after this time, in µs since the kernel's start.
    after_us: Option<u64>,
    /// Whether the last line came after that: those that follow it and have no time do as well.
    shows: bool,
}

impl Console {
    fn new(path: PathBuf) -> Self {
        let (reader, lines) = (Reader::from_start(path), Lines::new(MAX_LINE));
        Console { reader, lines, after_us: None, shows: false }
    }

    /// Shows the lines that are complete now.
    fn show(&mut self) -> anyhow::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = self.reader.read(&mut buffer).context("cannot read the console's log")?;
            let bytes = buffer.get(..n).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(std::io::stdout().flush()?);
            }
            let (after_us, shows) = (self.after_us, &mut self.shows);
            self.lines.feed(bytes, |line| show_line(line, after_us, shows))?;
        }
    }

    /// Shows what is there of a last line.
    fn finish(mut self) -> anyhow::Result<()> {
        let (after_us, shows) = (self.after_us, &mut self.shows);
        self.lines.finish(|line| show_line(line, after_us, shows))?;
        Ok(std::io::stdout().flush()?)
    }
}

fn show_line(line: &[u8], after_us: Option<u64>, shows: &mut bool) -> anyhow::Result<()> {
    if comes_after(line, after_us, shows) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        writeln!(std::io::stdout().lock(), "{}", escape(line))?;
    }
    Ok(())
}

/// Whether a line of the console was written after a time; `before` is what was said of the line
/// before it.
fn comes_after(line: &[u8], after_us: Option<u64>, before: &mut bool) -> bool {
    let Some(after_us) = after_us else { return true };
    if let Some(at_us) = time_of(line) {
        *before = at_us > after_us;
    }
    *before
}

/// The time at the beginning of a line, in µs: `[    1.650695] text`.
fn time_of(line: &[u8]) -> Option<u64> {
    let stamp = line.strip_prefix(b"[")?.split(|byte| *byte == b']').next()?;
    let (s, us) = std::str::from_utf8(stamp).ok()?.split_once('.')?;
    if us.len() != 6 {
        return None;
    }
    let s: u64 = s.trim_start().parse().ok()?;
    s.checked_mul(1_000_000)?.checked_add(us.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_the_kernel_writes_them() {
        assert_eq!(time_of(b"[    1.650695] text"), Some(1_650_695));
        assert_eq!(time_of(b"[12345.000001] [x] \xff"), Some(12_345_000_001));
        for none in
            [&b""[..], b"text", b"[husk: 1.2 bytes]", b"[ 1.5] x", b"[99999999999999.000000]"]
        {
            assert_eq!(time_of(none), None, "{:?}", String::from_utf8_lossy(none));
        }
    }

    #[test]
    fn of_the_console_only_what_the_guest_could_not_tell_is_shown() {
        let lines = ["half a line", "[    1.000000] old", " more", "[    2.000001] new", " trace"];
        let shown = |after_us| {
            let mut shows = false;
            lines.map(|line| comes_after(line.as_bytes(), after_us, &mut shows))
        };
        assert_eq!(shown(None), [true; 5]);
        assert_eq!(shown(Some(2_000_000)), [false, false, false, true, true]);
    }
}

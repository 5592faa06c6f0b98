//! `husk events`: what happens to pods.

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::events::{self, PodEvent};
use husk_engine::holder::rotate::Reader;

use super::follow::{Lines, Watcher};
use super::logs::is_broken_pipe;
use super::{Pods, time};
use crate::args::{Global, Output};

/// Show what happens to pods, as it happens
///
/// Pods: Pending, Running, Succeeded, Failed, Removed. Containers: Started, Exited, OOMKilled,
/// BackOff.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk events\n  \
    husk events --since 1h --no-follow web\n  \
    husk events --output json | jq -r 'select(.event == \"OOMKilled\") | .name'")]
pub(crate) struct EventsArgs {
    /// Also what has happened since: a duration (10m, 1h30m) or a time (2026-01-02T15:04:05Z)
    #[arg(long, value_name = "TIME", value_parser = time::since)]
    since: Option<SystemTime>,
    /// End with what has happened up to now
    #[arg(long)]
    no_follow: bool,
    /// How to show them: json is one object in a line
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Only of these pods [default: all]
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

/// Longest line that is read, in bytes.
const MAX_LINE: usize = 64 * 1024;

pub(crate) fn run(global: &Global, args: &EventsArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let mut uids = Vec::new();
    for name in &args.pods {
        uids.push(pods.find(name)?.pod.uid.clone());
    }
    let path = events::path(&pods.records);
    let watcher = match args.no_follow {
        true => None,
        false => {
            let directory = path.parent().context("the events lie nowhere")?;
            make(directory)?;
            Some(Watcher::of(&[directory])?)
        }
    };
    let reader = match args.since.is_none() && watcher.is_some() {
        true => Reader::from_end(path)?,
        false => Reader::from_start(path),
    };
    match show(reader, watcher.as_ref(), args, &uids) {
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

/// Nothing has happened yet where no pod has run.
fn make(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot create {}", directory.display()))
}

fn show(
    mut reader: Reader,
    watcher: Option<&Watcher>,
    args: &EventsArgs,
    uids: &[String],
) -> anyhow::Result<()> {
    let mut lines = Lines::new(MAX_LINE);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = reader.read(&mut buffer).context("cannot read the events")?;
        if n > 0 {
            lines.feed(buffer.get(..n).unwrap_or_default(), |line| print(line, args, uids))?;
            continue;
        }
        std::io::stdout().flush()?;
        let Some(watcher) = watcher else { return Ok(()) };
        watcher.changed()?;
    }
}

fn print(line: &[u8], args: &EventsArgs, uids: &[String]) -> anyhow::Result<()> {
    let Ok(event) = serde_json::from_slice::<PodEvent>(line) else {
        tracing::debug!("a line of the events is none");
        return Ok(());
    };
    if !uids.is_empty() && !uids.contains(&event.uid) {
        return Ok(());
    }
    if let Some(since) = args.since
        && time::parse(&event.time).is_some_and(|at| at < since)
    {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    if args.output == Output::Json {
        serde_json::to_writer(&mut out, &event)?;
        writeln!(out)?;
        return Ok(());
    }
    let what = match &event.container {
        Some(container) => format!("{}/{} {container}", event.namespace, event.name),
        None => format!("{}/{}", event.namespace, event.name),
    };
    let code = event.exit_code.map(|code| format!(" ({code})")).unwrap_or_default();
    let message = event.message.replace(char::is_control, " ");
    let line = format!("{} {what} {}{code} {message}", event.time, event.event);
    writeln!(out, "{}", line.trim_end())?;
    Ok(())
}

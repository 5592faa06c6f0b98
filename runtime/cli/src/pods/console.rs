//! `husk console`: what the guest's kernel said.

use std::io::{Read, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::rotate::Reader;

use super::Pods;
use super::follow::Watcher;
use super::logs::is_broken_pipe;
use crate::args::Global;

/// Show the log of a pod's guest kernel
///
/// It is what the virtual machine wrote to its console: warnings and worse of the kernel and of the
/// agent in it, so usually nothing. It stays with the pod until `husk rm`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Go on with what is written until the pod has ended
    #[arg(short, long)]
    follow: bool,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
}

pub(crate) fn run(global: &Global, args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let watcher = match args.follow {
        true => Some(Watcher::of(&[found.dir.path()])?),
        false => None,
    };
    let mut log = Reader::from_start(found.dir.console());
    let shown = loop {
        if let Err(error) = copy(&mut log) {
            break Err(error);
        }
        let Some(watcher) = &watcher else { break Ok(()) };
        if !pods.records.look_again(&found.dir)?.is_some_and(|found| found.held) {
            break copy(&mut log);
        }
        watcher.changed()?;
    };
    match shown {
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

/// Shows what there is, as text: the guest could write anything, and this is somebody's terminal.
fn copy(log: &mut Reader) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut out = std::io::stdout().lock();
    loop {
        let n = log.read(&mut buffer).context("cannot read the console's log")?;
        let bytes = buffer.get_mut(..n).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(out.flush()?);
        }
        for byte in &mut *bytes {
            if byte.is_ascii_control() && !b"\n\t".contains(byte) {
                *byte = b' ';
            }
        }
        out.write_all(bytes)?;
    }
}

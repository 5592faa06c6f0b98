//! `husk rm`: removes pods that have ended.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::events;
use husk_engine::holder::record::{Found, Records};
use husk_engine::network::{self, NetworkError};
use rustix::process::{Pid, Signal, kill_process};

use super::{EXIT_SOME_FAILED, Pods, for_each, stop, wait_released};
use crate::args::Global;

/// How long a pod may take to end after it was killed, before its process is.
const KILL_LIMIT: Duration = Duration::from_secs(90);

/// How long whoever else takes a pod's network back may take: the process that was killed, or another
/// husk that found it dead.
const NETWORK_LIMIT: Duration = Duration::from_secs(30);

/// How long a process may take to be gone after SIGKILL.
const GONE_LIMIT: Duration = Duration::from_secs(30);

/// Remove pods that have ended, with their logs
///
/// What is left of a pod whose process was killed is removed as well.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code: 0 if all are removed, else 1.\n\n\
    Examples:\n  \
    husk rm web\n  \
    husk rm -f web         kill it first, if it runs\n  \
    husk rm --all          all that have ended")]
pub(crate) struct RmArgs {
    /// Pods
    #[arg(required_unless_present_any = ["all", "broken"], value_name = "POD")]
    pods: Vec<String>,
    /// Kill pods that run; their process too, if it does not answer
    #[arg(short, long)]
    force: bool,
    /// Remove all pods that have ended
    #[arg(short, long, conflicts_with = "pods")]
    all: bool,
    /// Remove records that cannot be read
    #[arg(long)]
    broken: bool,
}

pub(crate) fn run(global: &Global, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let config = global.config()?;
    let (records, state_dir) = (Records::new(config.records_dir()), config.state_dir);
    let mut code = ExitCode::SUCCESS;
    if args.broken {
        for broken in records.list()?.1 {
            match records.remove_broken(&broken) {
                Ok(()) => println!("{}", broken.path.display()),
                Err(error) => {
                    eprintln!("husk: {error}");
                    code = ExitCode::from(EXIT_SOME_FAILED);
                }
            }
        }
    }
    let pods = Pods::read(global)?;
    let ended: Vec<String> = match args.all {
        true => pods.all().iter().filter(|pod| !pod.held).map(|pod| pod.pod.uid.clone()).collect(),
        false => Vec::new(),
    };
    let names = if args.all { &ended } else { &args.pods };
    let failed = for_each(names, |name| {
        remove(&records, pods.find(name)?, args.force, &state_dir)?;
        println!("{name}");
        Ok(())
    });
    Ok(if code == ExitCode::SUCCESS { failed } else { code })
}

fn remove(records: &Records, found: &Found, force: bool, state_dir: &Path) -> anyhow::Result<()> {
    if found.held && force {
        end(found)?;
    }
    let runs = found.held && !force;
    let patience = if runs { Duration::ZERO } else { NETWORK_LIMIT };
    match network::take_back(state_dir, &found.pod.uid, patience) {
        Ok(()) => {}
        // What follows says so.
        Err(NetworkError::Held(_)) if runs => {}
        Err(error) => {
            let error = anyhow::Error::from(error).context("the pod's network is left");
            if !force {
                return Err(error);
            }
            eprintln!("husk: {error:#}; it is tried again with the next pod's start");
        }
    }
    records.remove(found)?;
    husk_engine::pod::sweep_dead(&found.pod.run_dir.join("pods"))?;
    let event = events::of_pod(&found.pod, "Removed", "");
    if let Err(error) = events::append(records, &[event]) {
        tracing::warn!(%error, "an event is lost");
    }
    Ok(())
}

/// Ends a pod, whatever its process thinks of it.
fn end(found: &Found) -> anyhow::Result<()> {
    match stop::ask(found, Some(0)) {
        Ok(()) => {
            if wait_released(found, Some(KILL_LIMIT))? {
                return Ok(());
            }
            eprintln!("husk: the pod does not end: its process {} is killed", found.pod.pid);
        }
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "the pod's process does not answer");
            // It may have been about to end.
            if wait_released(found, Some(Duration::from_secs(2)))? {
                return Ok(());
            }
        }
    }
    // As long as the lock is held, the process is this and no other.
    let pid = i32::try_from(found.pod.pid).ok().and_then(Pid::from_raw);
    kill_process(pid.context("the record names no process")?, Signal::KILL)
        .context("cannot kill the pod's process")?;
    anyhow::ensure!(
        wait_released(found, Some(GONE_LIMIT))?,
        "the process {} is not gone although it was killed",
        found.pod.pid
    );
    Ok(())
}

//! `husk kill`: sends signals.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::SignalRequest;
use husk_engine::holder::record::Found;
use husk_engine::holder::status::StateRecord;
use husk_engine::oci::signal;

use super::{Pods, block_on, connect, for_each, stop, wait_released};
use crate::args::Global;

/// Kill pods, or send a signal to their containers
///
/// Without -s and -c the pods are ended at once, as by `husk stop --time 0`. With one of them, the
/// signal goes to the first process of the container, or of each container that runs; what then
/// happens is as the pod's restartPolicy says.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk kill web\n  \
    husk kill -s HUP -c nginx web")]
pub(crate) struct KillArgs {
    /// Pods
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    /// A name or number, e.g. HUP, SIGUSR1, 15
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal)]
    signal: Option<u32>,
    /// Only this container [default: all that run]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
}

fn signal(text: &str) -> Result<u32, String> {
    signal::parse(text)
        .ok_or_else(|| format!("{text:?} is no signal: e.g. TERM, SIGHUP, 9, RTMIN+3"))
}

/// SIGKILL.
const KILL: u32 = 9;

pub(crate) fn run(global: &Global, args: &KillArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    Ok(for_each(&args.pods, |name| {
        let found = pods.find(name)?;
        if args.signal.is_none() && args.container.is_none() {
            anyhow::ensure!(found.held, "it has ended");
            stop::ask(found, Some(0))?;
            wait_released(found, None)?;
        } else {
            block_on(send(found, args.container.as_deref(), args.signal.unwrap_or(KILL)))?;
        }
        println!("{name}");
        Ok(())
    }))
}

async fn send(found: &Found, container: Option<&str>, signal: u32) -> anyhow::Result<()> {
    let containers: Vec<&str> = match container {
        Some(container) => vec![super::container(found, Some(container))?],
        None => found
            .status
            .containers
            .iter()
            .filter(|container| matches!(container.state, StateRecord::Running { .. }))
            .map(|container| container.name.as_str())
            .collect(),
    };
    let mut pod = connect(found).await?;
    anyhow::ensure!(!containers.is_empty(), "none of its containers runs");
    for container in containers {
        let request = SignalRequest { container: container.to_owned(), signal, all: false };
        pod.signal(request).await.map_err(super::refusal)?;
    }
    Ok(())
}

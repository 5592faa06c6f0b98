//! `husk pause` and `husk unpause`.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::{PauseRequest, ResumeRequest};

use super::{Pods, block_on, connect, container, for_each};
use crate::args::Global;

/// Stop all processes of pods where they are
///
/// The containers' processes stand still until `husk unpause`; the virtual machine keeps its memory.
#[derive(Debug, Args)]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    which: Which,
}

/// Let the processes of paused pods go on
#[derive(Debug, Args)]
pub(crate) struct UnpauseArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
struct Which {
    /// Pods
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    /// Only this container [default: all that run]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
}

pub(crate) fn pause(global: &Global, args: &PauseArgs) -> anyhow::Result<ExitCode> {
    set(global, &args.which, true)
}

pub(crate) fn unpause(global: &Global, args: &UnpauseArgs) -> anyhow::Result<ExitCode> {
    set(global, &args.which, false)
}

fn set(global: &Global, which: &Which, paused: bool) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    Ok(for_each(&which.pods, |name| {
        let found = pods.find(name)?;
        let containers = match which.container.as_deref() {
            Some(named) => vec![container(found, Some(named))?.to_owned()],
            None => Vec::new(),
        };
        block_on(async {
            let mut pod = connect(found).await?;
            if paused {
                pod.pause(PauseRequest { containers }).await.map_err(super::refusal)?;
            } else {
                pod.resume(ResumeRequest { containers }).await.map_err(super::refusal)?;
            }
            Ok(())
        })?;
        println!("{name}");
        Ok(())
    }))
}

//! `husk wait`: waits for the end of pods.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::WaitRequest;
use husk_engine::holder::record::{Found, Records};
use husk_engine::holder::status::StatusRecord;

use super::{EXIT_SOME_FAILED, Pods, block_on, connect, phase, wait_released};
use crate::EXIT_HUSK_FAILED;
use crate::args::Global;

/// Wait until pods have ended
///
/// Prints each pod with its phase when it has ended and nothing of its virtual machine is left.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code, as of `husk run`:\n  \
    0    every pod Succeeded\n  \
    N    the only pod Failed: the exit code of its first container that failed\n  \
    1    one of several pods Failed\n  \
    125  a pod failed as a whole: VM lost, its process killed, ...; or there is no such pod")]
pub(crate) struct WaitArgs {
    /// Pods
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

pub(crate) fn run(global: &Global, args: &WaitArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = args.pods.iter().map(|name| pods.find(name)).collect::<Result<Vec<_>, _>>()?;
    let mut codes = Vec::new();
    for (name, found) in args.pods.iter().zip(found) {
        let status = last_status(&pods.records, found)?;
        println!("{name} {}", phase(&status));
        codes.push(status.exit_code().unwrap_or(EXIT_HUSK_FAILED));
    }
    Ok(ExitCode::from(match codes.as_slice() {
        [only] => *only,
        all if all.contains(&EXIT_HUSK_FAILED) => EXIT_HUSK_FAILED,
        all if all.iter().any(|code| *code != 0) => EXIT_SOME_FAILED,
        _ => 0,
    }))
}

/// The status at a pod's end, which is waited for.
fn last_status(records: &Records, found: &Found) -> anyhow::Result<StatusRecord> {
    let mut told = None;
    if found.held {
        // Of a pod in the foreground no record is left; of one whose process is killed no answer.
        let answer = block_on(async {
            let mut pod = connect(found).await?;
            let answer = pod.wait(WaitRequest {}).await.map_err(super::refusal)?;
            Ok(serde_json::from_str::<StatusRecord>(&answer.into_inner().status)?)
        });
        told = answer
            .inspect_err(|error| tracing::debug!("the pod's process did not tell: {error:#}"))
            .ok();
        wait_released(found, None)?;
    }
    match (told, records.look_again(&found.dir)?) {
        (Some(status), _) => Ok(status),
        (None, Some(found)) => Ok(found.status),
        (None, None) => anyhow::bail!("pod {} was removed", found.pod.full_name()),
    }
}

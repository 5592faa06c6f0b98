//! `husk stop`: ends pods.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::StopRequest;
use husk_engine::holder::record::Found;

use super::{Pods, block_on, connect, for_each, wait_released};
use crate::args::Global;

/// Stop pods
///
/// Every container gets its stop signal, and SIGKILL when its time is over; sidecars follow the
/// others. Returns when nothing of the pod's virtual machine is left. The pod and its logs stay
/// listed until `husk rm`, unless it runs in the foreground. Stopping a pod that has ended does
/// nothing.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Exit code: 0 if all have ended, else 1 (125 for one that is not there).\n\n\
    Examples:\n  \
    husk stop web\n  \
    husk stop --time 2 web db"
)]
pub(crate) struct StopArgs {
    /// Pods
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    /// How long containers may take, instead of the pod's terminationGracePeriodSeconds; 0 kills
    #[arg(short, long, value_name = "SECONDS")]
    time: Option<u64>,
}

pub(crate) fn run(global: &Global, args: &StopArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    // All are told before one is waited for.
    let mut told = Vec::new();
    for name in &args.pods {
        told.push(pods.find(name)?);
    }
    let grace_ms = args.time.map(|seconds| seconds.saturating_mul(1000));
    let asked: Vec<_> = told.iter().map(|found| ask(found, grace_ms)).collect();
    let mut results = told.into_iter().zip(asked);
    Ok(for_each(&args.pods, |name| {
        let Some((found, asked)) = results.next() else { return Ok(()) };
        asked?;
        wait_released(found, None)?;
        println!("{name}");
        Ok(())
    }))
}

/// Tells a pod to end, unless it has ended.
pub(super) fn ask(found: &Found, grace_ms: Option<u64>) -> anyhow::Result<()> {
    if !found.held {
        return Ok(());
    }
    block_on(async {
        let mut pod = connect(found).await?;
        pod.stop(StopRequest { grace_ms }).await.map_err(super::refusal)?;
        Ok(())
    })
}

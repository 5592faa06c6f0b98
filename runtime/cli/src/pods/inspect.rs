//! `husk inspect`: everything that is known of pods.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::record::{Found, PodRecord};
use husk_engine::holder::status::StatusRecord;
use serde::Serialize;

use super::Pods;
use crate::args::Global;

/// Show everything that is known of pods, as JSON
///
/// A pod is named by `name`, `namespace/name`, or the beginning of its uid (4 characters at least).
/// The result is an array with one object for each pod: what it is, its status with how its
/// containers ended, and where its files are.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk inspect web\n  \
    husk inspect web | jq '.[0].status.containers[].state'")]
pub(crate) struct InspectArgs {
    /// Pods
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Inspected<'a> {
    pod: &'a PodRecord,
    status: &'a StatusRecord,
    /// Whether a process holds it.
    running: bool,
    directory: &'a Path,
    manifest: std::path::PathBuf,
    console: std::path::PathBuf,
}

pub(crate) fn run(global: &Global, args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let all = args.pods.iter().map(|name| pods.find(name)).collect::<Result<Vec<_>, _>>()?;
    let all: Vec<Inspected<'_>> = all
        .into_iter()
        .map(|Found { dir, pod, status, held }| Inspected {
            pod,
            status,
            running: *held,
            directory: dir.path(),
            manifest: dir.manifest(),
            console: dir.console(),
        })
        .collect();
    println!("{}", serde_json::to_string_pretty(&all)?);
    Ok(ExitCode::SUCCESS)
}

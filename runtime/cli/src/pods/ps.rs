//! `husk ps`: the list of pods.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use husk_engine::holder::record::Found;
use husk_engine::holder::status::StatusRecord;
use serde::Serialize;

use super::{Pods, phase, time};
use crate::args::Global;

/// List pods
///
/// Those that run, in the foreground or in the background; with -a also those in the background
/// that have ended and were not removed.
#[derive(Debug, Args)]
#[command(after_long_help = "Columns:\n  \
    READY     containers that are ready, of all that are to run beside each other\n  \
    STATUS    Pending, Running, Succeeded or Failed, with the reason; HolderLost: the process that\n            \
              held the pod was killed\n  \
    RESTARTS  how often its containers were started again\n\n\
    Examples:\n  \
    husk ps\n  \
    husk ps -a --output wide\n  \
    husk ps -a --output json | jq -r '.[] | select(.phase == \"Failed\") | .uid'")]
pub(crate) struct PsArgs {
    /// Also list pods that have ended
    #[arg(short, long)]
    all: bool,
    /// How to show them
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    /// Show only the uids
    #[arg(long, conflicts_with = "output")]
    uids: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Format {
    /// A table
    #[default]
    Text,
    /// A table with address, uid, process, size and images
    Wide,
    /// An array of objects
    Json,
}

/// A pod as `--output json` lists it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
    /// Whether a process holds it.
    running: bool,
    background: bool,
    pid: u32,
    created_at: &'a str,
    vcpus: u32,
    memory_mib: u32,
    #[serde(flatten)]
    status: &'a StatusRecord,
}

pub(crate) fn run(global: &Global, args: &PsArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let shown: Vec<&Found> = pods.all().iter().filter(|pod| args.all || pod.held).collect();
    if args.uids {
        shown.iter().for_each(|found| println!("{}", found.pod.uid));
    } else if args.output == Format::Json {
        let all: Vec<Listed<'_>> = shown.into_iter().map(listed).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        println!("{}", table(&shown, args.output == Format::Wide));
    }
    Ok(ExitCode::SUCCESS)
}

fn listed(found: &Found) -> Listed<'_> {
    let Found { dir: _, pod, status, held } = found;
    Listed {
        namespace: &pod.namespace,
        name: &pod.name,
        uid: &pod.uid,
        running: *held,
        background: pod.background,
        pid: pod.pid,
        created_at: &pod.created_at,
        vcpus: pod.vcpus,
        memory_mib: pod.memory_mib,
        status,
    }
}

fn table(pods: &[&Found], wide: bool) -> Table {
    let mut table = Table::new();
    let mut header = vec!["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE"];
    if wide {
        header.extend(["IP", "UID", "PID", "CPUS", "MEMORY", "IMAGES"]);
    }
    table.load_style(presets::NOTHING).set_header(header);
    for found in pods {
        let pod = &found.pod;
        let mut row = vec![
            pod.namespace.clone(),
            pod.name.clone(),
            ready(&found.status),
            phase(&found.status),
            restarts(&found.status).to_string(),
            time::age(&pod.created_at),
        ];
        if wide {
            let images: Vec<&str> = pod.containers.iter().map(|c| c.image.as_str()).collect();
            let pid = if found.held { pod.pid.to_string() } else { String::new() };
            // Without a network, or not any more, it has none.
            let ip = found.status.pod_ips.first().filter(|_| found.held);
            let ip = ip.map(ToString::to_string).unwrap_or_default();
            row.extend([ip, pod.uid.clone(), pid, pod.vcpus.to_string()]);
            row.extend([format!("{} MiB", pod.memory_mib), images.join(", ")]);
        }
        table.add_row(row);
    }
    table
}

fn ready(status: &StatusRecord) -> String {
    let beside = status.containers.iter().filter(|container| container.kind != "init");
    let ready = beside.clone().filter(|container| container.ready);
    format!("{}/{}", ready.count(), beside.count())
}

fn restarts(status: &StatusRecord) -> u32 {
    status.containers.iter().fold(0, |sum, container| sum.saturating_add(container.restarts))
}

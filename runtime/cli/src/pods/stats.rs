//! `husk stats`: what pods use.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use husk_engine::holder::client::guest_messages::{ContainerStats, InterfaceStats, StatsResponse};
use husk_engine::holder::client::messages::StatsRequest;
use husk_engine::holder::record::Found;
use serde::Serialize;

use super::{Pods, block_on, connect, refusal};
use crate::args::{Global, Output};

/// Show what pods and their containers use
///
/// A live table of the pods that run, read from the guests' kernels: CPU as part of one CPU, memory
/// of each container beside its limit, and what was read from and written to disks and the network.
/// The network belongs to the pod, so it stands in the pod's own line, with the memory of the guest
/// as a whole. Ends with Ctrl-C.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk stats\n  \
    husk stats --no-stream web\n  \
    husk stats --output json --interval 10 web >> web.stats")]
pub(crate) struct StatsArgs {
    /// Show one sample and end
    #[arg(long)]
    no_stream: bool,
    /// How to show them: json is one object for each pod and sample in a line
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Seconds between samples
    #[arg(long, value_name = "SECONDS", default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Pods [default: all that run]
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

/// A sample of a pod.
struct Sample {
    namespace: String,
    name: String,
    uid: String,
    stats: StatsResponse,
}

/// A sample as `--output json` shows it. Sizes in bytes, times in microseconds; counters count from
/// the start of the container.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonPod<'a> {
    at_ns: u64,
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
    memory_total: u64,
    memory_available: u64,
    agent_rss: u64,
    containers: Vec<JsonContainer<'a>>,
    interfaces: Vec<JsonInterface<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonContainer<'a> {
    name: &'a str,
    /// Part of one CPU since the sample before; null in the first one.
    cpu: Option<f64>,
    cpu_usage_us: u64,
    memory: u64,
    memory_peak: u64,
    memory_limit: Option<u64>,
    memory_inactive_file: u64,
    pids: u64,
    pids_limit: Option<u64>,
    oom_kills: u64,
    io_read_bytes: u64,
    io_write_bytes: u64,
    io_read_ops: u64,
    io_write_ops: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonInterface<'a> {
    name: &'a str,
    rx_bytes: u64,
    rx_packets: u64,
    rx_errors: u64,
    rx_dropped: u64,
    tx_bytes: u64,
    tx_packets: u64,
    tx_errors: u64,
    tx_dropped: u64,
}

pub(crate) fn run(global: &Global, args: &StatsArgs) -> anyhow::Result<ExitCode> {
    let interval = Duration::from_secs(args.interval);
    let mut before = sample_all(global, args)?;
    loop {
        std::thread::sleep(interval);
        let now = sample_all(global, args)?;
        if args.output == Output::Json {
            let mut out = std::io::stdout().lock();
            for sample in &now {
                serde_json::to_writer(&mut out, &json(sample, find(&before, sample)))?;
                writeln!(out)?;
            }
        } else {
            if !args.no_stream && std::io::stdout().is_terminal() {
                // Home, and clear what is below (ECMA-48 CUP, ED).
                print!("\x1b[H\x1b[J");
            }
            println!("{}", table(&now, &before));
        }
        if args.no_stream {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

fn sample_all(global: &Global, args: &StatsArgs) -> anyhow::Result<Vec<Sample>> {
    let pods = Pods::read(global)?;
    let named = !args.pods.is_empty();
    let wanted: Vec<&Found> = match named {
        true => args.pods.iter().map(|name| pods.find(name)).collect::<Result<_, _>>()?,
        false => pods.all().iter().filter(|pod| pod.held).collect(),
    };
    block_on(async {
        let mut samples = Vec::new();
        for found in wanted {
            match sample(found).await {
                Ok(sample) => samples.push(sample),
                // It may begin or end just now.
                Err(error) if !named => tracing::debug!("no statistics of a pod: {error:#}"),
                Err(error) => return Err(error),
            }
        }
        Ok(samples)
    })
}

async fn sample(found: &Found) -> anyhow::Result<Sample> {
    let mut pod = connect(found).await?;
    let stats = pod.stats(StatsRequest {}).await.map_err(refusal)?.into_inner();
    Ok(Sample {
        namespace: found.pod.namespace.clone(),
        name: found.pod.name.clone(),
        uid: found.pod.uid.clone(),
        stats,
    })
}

fn find<'a>(samples: &'a [Sample], of: &Sample) -> Option<&'a Sample> {
    samples.iter().find(|sample| sample.uid == of.uid)
}

/// Part of one CPU that a container used between two samples.
fn cpu(now: &Sample, before: Option<&Sample>, container: &ContainerStats) -> Option<f64> {
    let before = before?;
    let known = before.stats.containers.iter().find(|known| known.id == container.id)?;
    // A container that was started again counts from 0.
    let used = container.cpu_usage_us.checked_sub(known.cpu_usage_us)?;
    let passed = now.stats.at_ns.checked_sub(before.stats.at_ns).filter(|ns| *ns > 0)?;
    // Precise enough: both are differences of a few seconds.
    #[allow(clippy::cast_precision_loss)]
    Some(used as f64 * 1000.0 / passed as f64)
}

fn json<'a>(now: &'a Sample, before: Option<&Sample>) -> JsonPod<'a> {
    let containers = now.stats.containers.iter().map(|container| JsonContainer {
        name: &container.id,
        cpu: cpu(now, before, container),
        cpu_usage_us: container.cpu_usage_us,
        memory: container.memory_current,
        memory_peak: container.memory_peak,
        memory_limit: container.memory_limit,
        memory_inactive_file: container.memory_inactive_file,
        pids: container.pids,
        pids_limit: container.pids_limit,
        oom_kills: container.oom_kills,
        io_read_bytes: container.io_read_bytes,
        io_write_bytes: container.io_write_bytes,
        io_read_ops: container.io_read_ops,
        io_write_ops: container.io_write_ops,
    });
    let interfaces = now.stats.interfaces.iter().map(|interface| {
        let InterfaceStats {
            name,
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        } = interface;
        JsonInterface {
            name,
            rx_bytes: *rx_bytes,
            rx_packets: *rx_packets,
            rx_errors: *rx_errors,
            rx_dropped: *rx_dropped,
            tx_bytes: *tx_bytes,
            tx_packets: *tx_packets,
            tx_errors: *tx_errors,
            tx_dropped: *tx_dropped,
        }
    });
    JsonPod {
        at_ns: now.stats.at_ns,
        namespace: &now.namespace,
        name: &now.name,
        uid: &now.uid,
        memory_total: now.stats.memory_total,
        memory_available: now.stats.memory_available,
        agent_rss: now.stats.agent_rss,
        containers: containers.collect(),
        interfaces: interfaces.collect(),
    }
}

/// A size in the largest unit of which there is at least one.
fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    for (name, unit) in UNITS {
        if bytes >= unit {
            let tenths = (bytes % unit).saturating_mul(10) / unit;
            return format!("{}.{tenths}{name}", bytes / unit);
        }
    }
    format!("{bytes}B")
}

fn table(now: &[Sample], before: &[Sample]) -> Table {
    let mut table = Table::new();
    let header = [
        "POD",
        "CONTAINER",
        "CPU %",
        "MEMORY",
        "LIMIT",
        "DISK R",
        "DISK W",
        "NET IN",
        "NET OUT",
        "PIDS",
    ];
    table.load_style(presets::NOTHING).set_header(header);
    for sample in now {
        let pod = format!("{}/{}", sample.namespace, sample.name);
        let stats = &sample.stats;
        let used = stats.memory_total.saturating_sub(stats.memory_available);
        let own = |count: fn(&InterfaceStats) -> u64| {
            let others = stats.interfaces.iter().filter(|interface| interface.name != "lo");
            size(others.fold(0, |sum, interface| sum.saturating_add(count(interface))))
        };
        let none = String::new;
        table.add_row([
            pod.clone(),
            none(),
            none(),
            size(used),
            size(stats.memory_total),
            none(),
            none(),
            own(|interface| interface.rx_bytes),
            own(|interface| interface.tx_bytes),
            none(),
        ]);
        for container in &stats.containers {
            let cpu = cpu(sample, find(before, sample), container);
            table.add_row([
                pod.clone(),
                container.id.clone(),
                cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{:.1}", cpu * 100.0)),
                size(container.memory_current),
                container.memory_limit.map_or_else(|| "-".to_owned(), size),
                size(container.io_read_bytes),
                size(container.io_write_bytes),
                none(),
                none(),
                container.pids.to_string(),
            ]);
        }
    }
    for column in 2..header.len() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ns: u64, cpu_usage_us: u64) -> Sample {
        let container = ContainerStats { id: "c".into(), cpu_usage_us, ..Default::default() };
        let stats = StatsResponse { at_ns, containers: vec![container], ..Default::default() };
        Sample { namespace: "n".into(), name: "p".into(), uid: "u".into(), stats }
    }

    #[test]
    fn cpu_is_a_part_of_the_time_between_samples() {
        let (before, now) = (sample(1_000_000_000, 500), sample(3_000_000_000, 1_000_500));
        let part = |now: &Sample, before: Option<&Sample>| {
            now.stats.containers.first().and_then(|container| cpu(now, before, container))
        };
        assert_eq!(part(&now, Some(&before)), Some(0.5));
        assert_eq!(part(&now, None), None);
        assert_eq!(part(&before, Some(&now)), None, "started again");
    }

    #[test]
    fn sizes_have_units() {
        let sizes = [0, 1023, 1536, 5 << 20, u64::MAX].map(size);
        assert_eq!(sizes, ["0B", "1023B", "1.5KiB", "5.0MiB", "17179869183.9GiB"]);
    }
}

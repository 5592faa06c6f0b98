//! `husk top`: the processes of a pod.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use comfy_table::{Table, presets};
use husk_engine::holder::client::guest_messages::ProcessInfo;
use husk_engine::holder::client::messages::ListProcessesRequest;
use husk_engine::holder::status::StateRecord;

use super::{Pods, block_on, connect, container, refusal, time};
use crate::args::Global;

/// Show the processes of a pod's containers
#[derive(Debug, Args)]
#[command(after_long_help = "Columns:\n  \
    PID, PPID  as the guest numbers them\n  \
    UID        the user, as the guest numbers them\n  \
    S          state: R runs, S sleeps, D waits for a disk, T is stopped, Z is a zombie\n  \
    CPU        time used\n  \
    RSS        resident memory in KiB\n  \
    AGE        since it was started")]
pub(crate) struct TopArgs {
    /// Only of this container [default: all that run]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
}

pub(crate) fn run(global: &Global, args: &TopArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let containers: Vec<&str> = match args.container.as_deref() {
        Some(named) => vec![container(found, Some(named))?],
        None => found
            .status
            .containers
            .iter()
            .filter(|container| matches!(container.state, StateRecord::Running { .. }))
            .map(|container| container.name.as_str())
            .collect(),
    };
    let mut table = Table::new();
    let header = ["CONTAINER", "PID", "PPID", "UID", "S", "CPU", "RSS", "AGE", "COMMAND"];
    table.load_style(presets::NOTHING).set_header(header);
    block_on(async {
        let mut pod = connect(found).await?;
        for name in containers {
            let request = ListProcessesRequest { container: name.to_owned() };
            let answer = pod.list_processes(request).await.map_err(refusal)?;
            for process in answer.into_inner().processes {
                table.add_row(row(name, process));
            }
        }
        Ok(())
    })?;
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn row(container: &str, process: ProcessInfo) -> [String; 9] {
    let ProcessInfo { pid, ppid, uid, state, cpu_us, rss, started_at_ns, command } = process;
    let started = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(started_at_ns));
    let age = started.and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default();
    let cpu = Duration::from_micros(cpu_us).as_secs();
    [
        container.to_owned(),
        pid.to_string(),
        ppid.to_string(),
        uid.to_string(),
        state,
        format!("{}:{:02}", cpu / 60, cpu % 60),
        (rss / 1024).to_string(),
        time::human(age),
        command.replace(char::is_control, " "),
    ]
}

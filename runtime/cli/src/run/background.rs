//! `husk run --detach`: a process for each pod that holds it, apart from the terminal.
//!
//! That process is husk itself, started again as `husk hold`, in a session of its own. It gets the
//! manifest on its standard input, and says on its standard output, once, what became of the start.
//! From then on it writes to the log in the pod's record only.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::Held;
use husk_engine::holder::status::StatusRecord;
use husk_engine::manifest;
use husk_engine::pod::{ContainerState, ContainerStatus, PodPhase, PodStatus};
use husk_engine::types::PodSpec;
use serde::{Deserialize, Serialize};

use super::{
    MAX_MANIFEST, Source, hold_options, on_event_loop, pod_options, store_images, watch_signals,
};
use crate::EXIT_HUSK_FAILED;
use crate::args::{Global, Output, RunArgs};
use crate::progress::{Most, Reporter};

/// Hold one pod of the manifest on standard input, for `husk run --detach`
#[derive(Debug, Args)]
pub(crate) struct HoldArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Which pod
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pod: String,
    /// Whether other processes show the progress of their pods on the same terminal
    #[arg(long)]
    beside_others: bool,
}

/// What the process says of the start.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Launched {
    namespace: String,
    name: String,
    uid: String,
    phase: String,
    /// Why its containers never ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Starts a process for each pod, and waits until all run.
pub(super) fn launch(
    global: &Global,
    args: &RunArgs,
    pods: &[(PodSpec, Arc<Source>)],
) -> anyhow::Result<ExitCode> {
    let children: Vec<_> =
        pods.iter().map(|(pod, source)| spawn(global, args, pod, source, pods.len() > 1)).collect();
    let mut failed = false;
    for ((pod, _), child) in pods.iter().zip(children) {
        let name = format!("{}/{}", pod.metadata.namespace, pod.metadata.name);
        match child.and_then(listen) {
            Ok(Launched { error: Some(error), .. }) => {
                eprintln!("husk: pod {name}: {error}");
                failed = true;
            }
            Ok(launched) if args.output == Output::Json => {
                println!("{}", serde_json::to_string(&launched)?);
            }
            Ok(_) => println!("{}", pod.metadata.name),
            Err(error) => {
                eprintln!("husk: pod {name}: {error:#}");
                failed = true;
            }
        }
    }
    Ok(ExitCode::from(if failed { EXIT_HUSK_FAILED } else { 0 }))
}

fn spawn(
    global: &Global,
    args: &RunArgs,
    pod: &PodSpec,
    source: &Source,
    beside_others: bool,
) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot tell where husk itself lies")?;
    let mut command = Command::new(program);
    command.args(global.repeated()?).arg("hold").args(args.repeated());
    command.arg("--pod").arg(format!("{}/{}", pod.metadata.namespace, pod.metadata.name));
    command.args(beside_others.then_some("--beside-others"));
    command.arg("-").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start the process that holds the pod")?;
    let mut stdin = child.stdin.take().context("it has no standard input")?;
    stdin.write_all(source.text.as_bytes()).context("it does not take the manifest")?;
    Ok(child)
}

/// Waits for what the process says.
fn listen(mut child: Child) -> anyhow::Result<Launched> {
    let stdout = child.stdout.take().context("it has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout.take(MAX_MANIFEST)).read_line(&mut line).context("cannot hear it")?;
    if line.is_empty() {
        let status = child.wait().context("cannot wait for it")?;
        anyhow::bail!("the process that was to hold it ended without a word ({status})");
    }
    // It lives on, or ends by itself: nobody waits for it.
    serde_json::from_str(&line).with_context(|| format!("it said {line:?}"))
}

/// Holds a pod until its end.
pub(crate) fn hold(global: &Global, args: &HoldArgs) -> anyhow::Result<ExitCode> {
    // Apart from the terminal: nothing that happens to it reaches this process.
    rustix::process::setsid().context("cannot begin a session")?;
    let mut text = String::new();
    std::io::stdin().lock().take(MAX_MANIFEST).read_to_string(&mut text)?;
    let mut spec = manifest::parse(&text, "manifest")?
        .into_iter()
        .find(|spec| args.pod == format!("{}/{}", spec.metadata.namespace, spec.metadata.name))
        .with_context(|| format!("there is no pod {} in the manifest", args.pod))?;
    spec.network = args.run.network.0.clone();
    let options = pod_options(global, &args.run, false)?;
    let progress = progress(global, args.beside_others);
    let images = store_images(&options.config, progress.clone())?;
    let (namespace, name) = (spec.metadata.namespace.clone(), spec.metadata.name.clone());
    std::env::set_current_dir("/").context("cannot leave the directory")?;
    on_event_loop(async move {
        let hold = hold_options(&args.run, true);
        let started = Held::start(spec, text, images, options, hold, None).await;
        let mut launched =
            Launched { namespace, name, uid: String::new(), phase: String::new(), error: None };
        let mut held = match started {
            Ok(held) => held,
            Err(error) => {
                launched.error = Some(format!("{:#}", anyhow::Error::from(error)));
                say(&launched)?;
                return Ok(ExitCode::from(EXIT_HUSK_FAILED));
            }
        };
        let log = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(held.dir().holder_log())
            .context("cannot open the log of the process")?;
        rustix::stdio::dup2_stderr(&log)?;
        let interrupts = tokio::spawn(watch_signals(vec![held.stopper()])?);
        let status = started_or_over(&mut held).await;
        // Whoever reads the terminal or pipe to its end waits for this process no longer.
        progress.close();
        launched.uid = held.spec().metadata.uid.clone().unwrap_or_default();
        launched.phase = status.phase.as_str().to_owned();
        let record = StatusRecord::of(&status);
        if record.is_final() && !record.ever_ran() {
            launched.error = Some(why(&record));
            // Nothing of it is worth keeping: why it failed is told now.
            held.discard();
            held.wait().await;
            say(&launched)?;
            return Ok(ExitCode::from(EXIT_HUSK_FAILED));
        }
        say(&launched)?;
        let report = held.wait().await;
        interrupts.abort();
        tracing::info!(phase = report.status.phase.as_str(), "the pod has ended");
        Ok(ExitCode::SUCCESS)
    })
}

/// Shows the progress of pulls where the command does that started this process, as long as it waits.
fn progress(global: &Global, beside_others: bool) -> Arc<Reporter> {
    let most = match (global.quiet, beside_others) {
        (true, _) => Most::Nothing,
        // Bars would be drawn over each other.
        (false, true) => Most::Lines,
        (false, false) => Most::Bars,
    };
    let command = rustix::process::getppid();
    Reporter::on_this_stderr(most, move || rustix::process::getppid() == command)
}

/// Waits until each of the pod's containers was started or could not be, or the pod has ended.
async fn started_or_over(held: &mut Held) -> PodStatus {
    let mut statuses = held.watch();
    let tried = |container: &ContainerStatus| {
        container.last.is_some() || !matches!(container.state, ContainerState::Waiting { .. })
    };
    // One that could not be started ends the pod, unless others run, or it is tried again.
    let goes_on = |container: &ContainerStatus| match &container.state {
        ContainerState::Waiting { .. } | ContainerState::Running { .. } => true,
        ContainerState::Terminated(end) => end.started_at.is_some(),
    };
    let started = |status: &PodStatus| match status.phase {
        PodPhase::Pending => false,
        PodPhase::Running => {
            status.containers.iter().all(tried) && status.containers.iter().any(goes_on)
        }
        PodPhase::Succeeded | PodPhase::Failed => true,
    };
    match statuses.wait_for(started).await {
        Ok(status) => status.clone(),
        // The pod's task is gone; its last status stays.
        Err(_) => held.watch().borrow().clone(),
    }
}

/// Why no container ever ran: the pod's own reason, or what its containers say.
fn why(status: &StatusRecord) -> String {
    use husk_engine::holder::status::StateRecord;
    let text = |reason: &str, message: &str| match message {
        "" => reason.to_owned(),
        message => format!("{reason}: {message}"),
    };
    if !status.reason.is_empty() {
        return text(&status.reason, &status.message);
    }
    let failures: Vec<String> = status
        .containers
        .iter()
        .filter_map(|container| match &container.state {
            StateRecord::Terminated(end) => {
                Some(format!("container {}: {}", container.name, text(&end.reason, &end.message)))
            }
            _ => None,
        })
        .collect();
    failures.join("; ")
}

/// Tells the command that started this process, and lets go of it.
fn say(launched: &Launched) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(launched)?;
    line.push('\n');
    // A command that was killed meanwhile is no reason to end the pod.
    if let Err(error) = std::io::stdout().lock().write_all(line.as_bytes()) {
        tracing::warn!(%error, "nobody waits for the pod's start any more");
    }
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

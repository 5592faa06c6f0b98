//! `husk run`: pods in the foreground, and on their way to the background.

pub(crate) mod background;
mod logs;
mod report;

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use husk_engine::holder::rotate::Rotation;
use husk_engine::holder::{Held, HoldOptions};
use husk_engine::manifest;
use husk_engine::paths::Config;
use husk_engine::pod::{Images, LogChunk, PodOptions, PodReport, Stopper};
use husk_engine::types::PodSpec;
use husk_image::Store;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use self::logs::Printer;
use crate::args::{Global, Output, RunArgs};
use crate::images::StoreImages;
use crate::progress::Reporter;

/// Largest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = manifest::MAX_LEN as u64;

/// How many pieces of output may wait for the terminal before containers are held up.
const LOG_QUEUE: usize = 64;

/// A manifest, and how messages call it.
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
}

/// Runs the pods of the manifests.
pub(crate) fn run(global: &Global, args: RunArgs) -> anyhow::Result<ExitCode> {
    let pods = read_all(&args)?;
    if args.detach {
        return background::launch(global, &args, &pods);
    }
    let options = pod_options(global, &args, args.output == Output::Json)?;
    let images = store_images(&options.config, Reporter::on_stderr(global.quiet))?;
    let hold = hold_options(&args, false);
    let reports = on_event_loop(run_pods(pods, images, options, hold, args.output))?;
    show(&reports, &args, global)?;
    let reports: Vec<PodReport> = reports.into_iter().map(|(_, report)| report).collect();
    Ok(ExitCode::from(report::exit_code(&reports)))
}

fn pod_options(global: &Global, args: &RunArgs, measure: bool) -> anyhow::Result<PodOptions> {
    let mut config = global.config()?;
    config.scratch_bytes = args.disk_size << 30;
    let start_timeout = args.start_timeout();
    let debug_image = args.debug_image.clone();
    Ok(PodOptions { config, start_timeout, measure, debug_image, console_log: None })
}

fn hold_options(args: &RunArgs, background: bool) -> HoldOptions {
    let rotation = Rotation { max_bytes: args.log_max_size << 20, max_files: args.log_max_files };
    HoldOptions { background, replace: args.replace, rotation }
}

fn store_images(config: &Config, progress: Arc<Reporter>) -> anyhow::Result<Arc<dyn Images>> {
    let images = config.images_dir();
    let store = Store::open(&images).with_context(|| {
        format!(
            "cannot use the image store in {}; run as root, or choose a directory of your own with \
             --state-dir",
            images.display()
        )
    })?;
    Ok(Arc::new(StoreImages::new(store, progress)))
}

/// One thread serves everything: it only ever passes things on.
fn on_event_loop<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make an event loop")?;
    runtime.block_on(work)
}

fn show(
    reports: &[(Arc<PodSpec>, PodReport)],
    args: &RunArgs,
    global: &Global,
) -> anyhow::Result<()> {
    let host_kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    for (spec, report) in reports {
        if args.output == Output::Json {
            println!("{}", report::json(&spec.metadata, report, &host_kernel)?);
        } else if !args.no_summary && !global.quiet {
            eprint!("{}", report::text(&spec.metadata, report, &host_kernel));
        } else if !report.status.reason.is_empty() {
            // What failed is said in any case.
            let (name, message) = (&spec.metadata.name, &report.status.message);
            eprintln!("husk: pod {name}: {}: {message}", report.status.reason);
        }
    }
    Ok(())
}

/// The pods of all manifests. No two may have the same name.
fn read_all(args: &RunArgs) -> anyhow::Result<Vec<(PodSpec, Arc<Source>)>> {
    let mut specs: Vec<(PodSpec, Arc<Source>)> = Vec::new();
    for file in &args.files {
        let source = Arc::new(read(file)?);
        let name = &source.name;
        for mut spec in manifest::parse(&source.text, name)? {
            spec.network = args.network.0.clone();
            let same = |(other, _): &(PodSpec, Arc<Source>)| {
                other.metadata.name == spec.metadata.name
                    && other.metadata.namespace == spec.metadata.namespace
            };
            anyhow::ensure!(
                !specs.iter().any(same),
                "{name}: a pod named {}/{} is in these manifests already; give it another name",
                spec.metadata.namespace,
                spec.metadata.name
            );
            specs.push((spec, source.clone()));
        }
    }
    Ok(specs)
}

/// Reads a manifest from a file, or from standard input (`-`).
pub(crate) fn read(file: &Path) -> anyhow::Result<Source> {
    let stdin = file == Path::new("-");
    let name = if stdin { "standard input".to_owned() } else { file.display().to_string() };
    let mut bytes = Vec::new();
    let read = if stdin {
        std::io::stdin().lock().take(MAX_MANIFEST + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file)
            .and_then(|file| file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("cannot read the manifest {name}"))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8 text"))?;
    Ok(Source { name, text })
}

async fn run_pods(
    pods: Vec<(PodSpec, Arc<Source>)>,
    images: Arc<dyn Images>,
    options: PodOptions,
    hold: HoldOptions,
    output: Output,
) -> anyhow::Result<Vec<(Arc<PodSpec>, PodReport)>> {
    let with_pod = pods.len() > 1;
    let containers: Vec<(String, String)> = pods
        .iter()
        .flat_map(|(pod, _)| {
            pod.all_containers().map(|c| (pod.metadata.name.clone(), c.name.clone()))
        })
        .collect();
    let printer = Printer::new(&containers, with_pod, output == Output::Json);
    let (logs, writer) = start_writer(printer)?;

    let mut held = Vec::new();
    for (spec, source) in pods {
        let (terminal, from) = mpsc::channel(LOG_QUEUE);
        tokio::spawn(forward(spec.metadata.name.clone(), from, logs.clone()));
        let (text, terminal) = (source.text.clone(), Some(terminal));
        let start =
            Held::start(spec, text, images.clone(), options.clone(), hold.clone(), terminal);
        held.push(start.await?);
    }
    let pods = held;
    drop(logs);
    let stoppers: Vec<Stopper> = pods.iter().map(Held::stopper).collect();
    let interrupts = tokio::spawn(watch_signals(stoppers)?);

    let mut reports = Vec::new();
    for pod in pods {
        let spec = pod.spec();
        reports.push((spec, pod.wait().await));
    }
    interrupts.abort();
    // The pods are gone, and so are all who write: this only writes the rest.
    tokio::task::spawn_blocking(move || writer.join())
        .await
        .context("cannot wait for the output")?
        .map_err(|_| anyhow::anyhow!("the output's thread panicked"))?;
    Ok(reports)
}

/// What a pod's container wrote, with the pod's name.
type Logs = mpsc::Sender<(Arc<str>, Arc<LogChunk>)>;

/// A thread that writes what containers write: it may be held up by the terminal, and nothing else
/// is then.
fn start_writer(mut printer: Printer) -> anyhow::Result<(Logs, std::thread::JoinHandle<()>)> {
    let (logs, mut queue) = mpsc::channel::<(Arc<str>, Arc<LogChunk>)>(LOG_QUEUE);
    let thread = std::thread::Builder::new().name("output".into()).spawn(move || {
        while let Some((pod, chunk)) = queue.blocking_recv() {
            printer.print(&pod, &chunk);
        }
        printer.finish();
    });
    Ok((logs, thread.context("cannot start a thread")?))
}

async fn forward(pod: String, mut from: mpsc::Receiver<Arc<LogChunk>>, to: Logs) {
    let pod: Arc<str> = pod.into();
    while let Some(chunk) = from.recv().await {
        if to.send((pod.clone(), chunk)).await.is_err() {
            return;
        }
    }
}

/// Whether SIGHUP is ignored, as `nohup` has it: then it stays so.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1 (proc_pid_status(5)).
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 != 0)
}

/// Ctrl-C, or a request to end: once stops the pods, twice kills them. Tells so.
fn watch_signals(stoppers: Vec<Stopper>) -> anyhow::Result<impl Future<Output = ()>> {
    let context = "cannot watch for signals";
    let mut interrupt = signal(SignalKind::interrupt()).context(context)?;
    let mut terminate = signal(SignalKind::terminate()).context(context)?;
    let mut hangup = match hangup_is_ignored() {
        true => None,
        false => Some(signal(SignalKind::hangup()).context(context)?),
    };
    Ok(async move {
        let mut told = false;
        loop {
            let hung_up = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hung_up => {}
            }
            let grace = if told {
                eprintln!("husk: killing the containers");
                Some(Duration::ZERO)
            } else {
                eprintln!("husk: stopping the containers; once more kills them");
                None
            };
            told = true;
            for pod in &stoppers {
                pod.stop(grace);
            }
        }
    })
}

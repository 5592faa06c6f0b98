//! `husk apply`: running pods take over changed ConfigMaps and Secrets.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::{ApplyRequest, ApplyResponse};
use husk_engine::holder::record::Found;
use husk_engine::manifest;

use super::{EXIT_SOME_FAILED, Pods, block_on, connect, refusal};
use crate::args::Global;
use crate::run::{Source, read};

/// Have running pods take over changed ConfigMaps and Secrets
///
/// FILE holds ConfigMaps and Secrets as they shall be from now on. Every running pod of their
/// namespace that refers to one of them takes it over: the files of its configMap, secret and
/// projected volumes are replaced, all of a volume at once. Programs see the new files when they open
/// them, or when they watch the volume (inotify), as in Kubernetes. Environment variables follow when
/// a container is started again; a file that is mounted by subPath stays what it is.
///
/// FILE can also hold the documents of Pods that run: their labels and annotations are taken over, and
/// the files of downwardAPI volumes follow. Nothing else of a Pod can change while it runs.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code:\n  \
    0    every pod that is concerned took it over\n  \
    1    one did not, or none is concerned\n  \
    125  a file is wrong, and none was applied; or there is no such pod\n\n\
    Examples:\n  \
    husk apply config.yaml\n  \
    husk apply --pod web --pod api config.yaml\n  \
    kubectl create configmap web --from-file=site.conf --dry-run=client -o yaml | husk apply -")]
pub(crate) struct ApplyArgs {
    /// Only this pod; can be repeated [default: all that run]
    #[arg(long = "pod", value_name = "POD")]
    pods: Vec<String>,
    /// ConfigMaps, Secrets and Pods as YAML or JSON, one file after the other; - for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(crate) fn run(global: &Global, args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let sources = args.files.iter().map(|file| {
        let source = read(file)?;
        manifest::check_applicable(&source.text, &source.name)?;
        Ok(source)
    });
    let sources: Vec<Source> = sources.collect::<anyhow::Result<_>>()?;
    let pods = Pods::read(global)?;
    let chosen: Vec<&Found> = if args.pods.is_empty() {
        pods.all().iter().filter(|found| found.held).collect()
    } else {
        args.pods.iter().map(|name| pods.find(name)).collect::<Result<_, _>>()?
    };
    let mut all_well = true;
    for source in &sources {
        all_well &= block_on(async { Ok(apply_to_all(&chosen, source).await) })?;
    }
    Ok(ExitCode::from(if all_well { 0 } else { EXIT_SOME_FAILED }))
}

/// Applies one file; whether it concerns a pod, and every one that it concerns took it over.
async fn apply_to_all(chosen: &[&Found], source: &Source) -> bool {
    let (mut concerned, mut failed) = (false, false);
    for found in chosen {
        let name = found.pod.full_name();
        match apply(found, source).await {
            Ok(ApplyResponse { concerned: false, volumes: _ }) => {}
            Ok(ApplyResponse { concerned: true, volumes }) => {
                concerned = true;
                println!("{name}: {}", outcome(&volumes));
            }
            Err(error) => {
                failed = true;
                eprintln!("husk: {name}: {error:#}");
            }
        }
    }
    if !concerned && !failed {
        eprintln!("husk: no running pod uses anything of {}", source.name);
    }
    concerned && !failed
}

async fn apply(found: &Found, source: &Source) -> anyhow::Result<ApplyResponse> {
    let mut pod = connect(found).await?;
    let request = ApplyRequest { manifest: source.text.clone(), source_name: source.name.clone() };
    Ok(pod.apply(request).await.map_err(refusal)?.into_inner())
}

/// What became of a pod.
fn outcome(volumes: &[String]) -> String {
    match volumes {
        [] => "no files changed".to_owned(),
        [volume] => format!("volume {volume} updated"),
        volumes => format!("volumes {} updated", volumes.join(", ")),
    }
}

//! Commands for pods that run, or have run: one file each. Here is what they share.

pub(crate) mod apply;
pub(crate) mod attach;
pub(crate) mod completion;
pub(crate) mod console;
pub(crate) mod cp;
pub(crate) mod debug;
pub(crate) mod disk;
mod escape;
pub(crate) mod events;
pub(crate) mod exec;
mod follow;
pub(crate) mod inspect;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod pause;
pub(crate) mod port_forward;
pub(crate) mod ps;
pub(crate) mod rm;
mod session;
pub(crate) mod stats;
pub(crate) mod stop;
mod terminal;
mod time;
pub(crate) mod top;
pub(crate) mod wait;

use std::time::Duration;

use anyhow::Context;
use husk_engine::holder::client::{self, Client, ClientError, Status};
use husk_engine::holder::names;
use husk_engine::holder::record::{Found, Records};
use husk_engine::holder::status::StatusRecord;

use crate::args::Global;

/// Exit code if something could not be done for some of several pods.
const EXIT_SOME_FAILED: u8 = 1;

/// The pods of a state directory, as they are now.
pub(crate) struct Pods {
    records: Records,
    found: Vec<Found>,
}

impl Pods {
    /// Reads the records. What is broken is told, and how to get rid of it.
    pub(crate) fn read(global: &Global) -> anyhow::Result<Pods> {
        let records = Records::new(global.config()?.records_dir());
        let (found, broken) = records.list()?;
        for broken in broken {
            tracing::warn!(
                error = &broken.error as &dyn std::error::Error,
                "a pod's record cannot be read; `husk rm --broken` removes it"
            );
        }
        Ok(Pods { records, found })
    }

    pub(crate) fn all(&self) -> &[Found] {
        &self.found
    }

    pub(crate) fn find(&self, name: &str) -> anyhow::Result<&Found> {
        Ok(names::resolve(&self.found, name)?)
    }
}

/// The container that is meant: the one that is named, or the pod's only one, or its first one
/// proper, and then it is said which.
pub(crate) fn container<'a>(found: &'a Found, named: Option<&'a str>) -> anyhow::Result<&'a str> {
    let known = || found.pod.containers.iter().map(|container| container.name.as_str());
    if let Some(named) = named {
        anyhow::ensure!(
            known().any(|name| name == named),
            "pod {} has no container {named:?}; it has {}",
            found.pod.full_name(),
            known().collect::<Vec<_>>().join(", ")
        );
        return Ok(named);
    }
    let is_main = |name: &str| {
        let statuses = &found.status.containers;
        statuses.iter().find(|status| status.name == name).is_none_or(|s| s.kind == "main")
    };
    let mains: Vec<&str> = known().filter(|name| is_main(name)).collect();
    let first = *mains.first().context("the pod has no containers")?;
    if mains.len() > 1 {
        eprintln!("husk: container {first} of {}; -c chooses another", mains.join(", "));
    }
    Ok(first)
}

/// Runs what a command does on an event loop.
pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make an event loop")?
        .block_on(work)
}

/// A connection to the process that holds a pod.
pub(crate) async fn connect(found: &Found) -> anyhow::Result<Client> {
    Ok(client::connect(found).await?)
}

/// What a pod's process refused, as an error for people.
pub(crate) fn refusal(status: Status) -> anyhow::Error {
    ClientError::from(status).into()
}

/// Does something for each of several pods; what fails for some is told, and counts in the end.
pub(crate) fn for_each(
    names: &[String],
    mut act: impl FnMut(&str) -> anyhow::Result<()>,
) -> std::process::ExitCode {
    let mut failed = false;
    for name in names {
        if let Err(error) = act(name) {
            eprintln!("husk: {name}: {error:#}");
            failed = true;
        }
    }
    std::process::ExitCode::from(if failed { EXIT_SOME_FAILED } else { 0 })
}

/// Waits until nobody holds a pod any more: what it held is given back then. False if the time is
/// over before.
pub(crate) fn wait_released(found: &Found, limit: Option<Duration>) -> anyhow::Result<bool> {
    let file = match std::fs::File::open(found.dir.lock_file()) {
        Ok(file) => file,
        // Removed with its record.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error).context("cannot open the pod's lock"),
    };
    // On a thread of its own, because a lock can be waited for but not with a limit.
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .spawn(move || {
            // Whoever waited may have given up.
            drop(done.send(file.lock_shared()));
        })
        .context("cannot start a thread")?;
    match limit {
        None => waited.recv().context("the waiting thread is gone")??,
        Some(limit) => match waited.recv_timeout(limit) {
            Ok(locked) => locked?,
            Err(_) => return Ok(false),
        },
    }
    Ok(true)
}

/// The phase in words, with its reason.
pub(crate) fn phase(status: &StatusRecord) -> String {
    if status.reason.is_empty() {
        status.phase.clone()
    } else {
        format!("{} ({})", status.phase, status.reason)
    }
}

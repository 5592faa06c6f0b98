//! The process that holds a pod, in the foreground or in the background, as others see it: what it
//! keeps on disk ([`record`]), the logs that it writes ([`cri_log`], [`rotate`]), the commands that
//! it serves, and the other side of all that, for commands.
//!
//! One [`Held`] is one pod. Above it is a door's own business: where the process comes from, and
//! what it prints. What it is not for: what happens to the pod; that is [`crate::pod`].

mod apply;
pub mod client;
pub mod cri_log;
pub mod events;
pub mod names;
mod output;
pub mod record;
pub mod rotate;
mod server;
mod socket;
pub mod status;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use self::apply::Applier;
use self::output::{LogFiles, Taps};
use self::record::{OwnRecord, PodRecord, RecordDir, RecordError, Records};
use self::rotate::Rotation;
use self::server::Served;
use self::status::StatusRecord;
use crate::pod::{
    Images, LogChunk, Pod, PodHandle, PodOptions, PodReport, PodStatus, Stopper, new_uid,
};
use crate::types::PodSpec;

pub(crate) use crate::pod::chain;

/// Most calls at once on a command's connection.
pub const MAX_CALLS: u32 = 64;

/// How a pod is held.
#[derive(Debug, Clone)]
pub struct HoldOptions {
    /// Whether its record stays when it has ended, and its name is its own.
    pub background: bool,
    /// Whether a pod of this name that has ended is removed first.
    pub replace: bool,
    /// Size and number of log files, for each run of a container.
    pub rotation: Rotation,
}

/// Why a pod cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Its record cannot be made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its socket cannot be made.
    #[error("cannot listen at the socket in {}", path.display())]
    Listen {
        /// The directory.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program is ending.
    #[error("an internal task was cut off")]
    Task(#[from] tokio::task::JoinError),
}

/// A pod that this process holds. Dropping it kills the pod, and leaves a record of one that was
/// abandoned.
#[derive(Debug)]
pub struct Held {
    pod: PodHandle,
    record: Arc<OwnRecord>,
    background: bool,
    records: Records,
    who: PodRecord,
    output: JoinHandle<()>,
    statuses: JoinHandle<StatusRecord>,
    server: JoinHandle<()>,
    ended: watch::Sender<Option<StatusRecord>>,
}

impl Held {
    /// Makes the pod's record, listens for commands, and starts the pod. Must be called in a tokio
    /// runtime with I/O and time. `terminal` gets what the containers write, and may hold them up.
    ///
    /// # Errors
    /// [`HoldError`]. What goes wrong with the pod itself is told by its status.
    pub async fn start(
        mut spec: PodSpec,
        manifest: String,
        images: Arc<dyn Images>,
        mut options: PodOptions,
        hold: HoldOptions,
        terminal: Option<mpsc::Sender<Arc<LogChunk>>>,
    ) -> Result<Held, HoldError> {
        let uid = spec.metadata.uid.get_or_insert_with(new_uid).clone();
        let records = Records::new(options.config.records_dir());
        let who = PodRecord::new(&spec, &uid, &options.config.run_dir, hold.background);
        let first = StatusRecord { phase: "Pending".to_owned(), ..StatusRecord::default() };
        let record = {
            let (records, who) = (records.clone(), who.clone());
            let create = move || records.create(&who, &manifest, &first, hold.replace);
            Arc::new(tokio::task::spawn_blocking(create).await??)
        };
        let dir = record.dir().clone();
        let listener = socket::listen(&dir)
            .map_err(|source| HoldError::Listen { path: dir.path().to_owned(), source })?;
        options.console_log = Some(dir.console());

        let mut pod = Pod::start(spec, images, options);
        let taps = Taps::new(pod.spec().all_containers().map(|container| &*container.name));
        let files = LogFiles::new(dir, hold.rotation);
        // It is taken here, once.
        let logs = pod.take_logs().unwrap_or_else(|| mpsc::channel(1).1);
        let output = tokio::spawn(output::distribute(logs, files, taps.clone(), terminal));
        let statuses =
            tokio::spawn(keep_status(record.clone(), (records.clone(), who.clone()), pod.watch()));
        let (ended, ending) = watch::channel(None);
        let metadata = &pod.spec().metadata;
        let name = (metadata.namespace.clone(), metadata.name.clone());
        let served = Served {
            applier: Applier::new(pod.access(), record.dir().manifest(), name),
            access: pod.access(),
            stopper: pod.stopper(),
            status: pod.watch(),
            taps,
            ended: ending,
        };
        let server = tokio::spawn(server::serve(listener, served));
        let background = hold.background;
        Ok(Held { pod, record, background, records, who, output, statuses, server, ended })
    }

    /// What is run.
    #[must_use]
    pub fn spec(&self) -> Arc<PodSpec> {
        self.pod.shared_spec()
    }

    /// Where the record's files are.
    #[must_use]
    pub fn dir(&self) -> &RecordDir {
        self.record.dir()
    }

    /// Tells of every change of the status.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<PodStatus> {
        self.pod.watch()
    }

    /// A means of ending the pod.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.pod.stopper()
    }

    /// Has the record removed at the pod's end, although the pod is in the background: for one that
    /// never ran, whose failure was told otherwise.
    pub fn discard(&mut self) {
        self.background = false;
    }

    /// Waits until the pod has ended, everything that it held is given back, its record is complete
    /// (and in the foreground removed), and those who waited for it know.
    pub async fn wait(self) -> PodReport {
        let Held { pod, record, background, records, who, output, statuses, server, ended } = self;
        let report = pod.wait().await;
        if let Err(error) = output.await {
            tracing::error!(%error, "the output was cut off");
        }
        let last = StatusRecord::of(&report.status).with_guest(report.guest.as_ref());
        let known = statuses.await.unwrap_or_else(|error| {
            tracing::error!(%error, "the changes of status were not all written");
            StatusRecord::default()
        });
        let write = {
            let (record, last) = (record.clone(), last.clone());
            move || write_status(&record, (&records, &who), &known, &last)
        };
        if let Err(error) = tokio::task::spawn_blocking(write).await {
            tracing::error!(%error, "the last status was not written");
        }
        ended.send_replace(Some(last));
        if let Err(error) = server.await {
            tracing::error!(%error, "the service of commands was cut off");
        }
        let socket = record.dir().path().join(RecordDir::socket_name());
        if let Err(error) = std::fs::remove_file(socket) {
            tracing::warn!(%error, "the pod's socket cannot be removed");
        }
        // The lock goes with the last owner of the record: this.
        match Arc::into_inner(record) {
            Some(record) if !background => {
                if let Err(error) = record.remove() {
                    tracing::warn!(error = chain(&error), "the pod's record stays");
                }
            }
            _ => {}
        }
        report
    }
}

/// Writes each status that comes, and the events that lie between, until the final one. Returns the
/// last that it wrote.
async fn keep_status(
    record: Arc<OwnRecord>,
    (records, who): (Records, PodRecord),
    mut statuses: watch::Receiver<PodStatus>,
) -> StatusRecord {
    let mut known = StatusRecord::default();
    loop {
        let status = statuses.borrow_and_update().clone();
        let last = status.phase.is_final();
        let next = StatusRecord::of(&status);
        let write = {
            let (record, records, who) = (record.clone(), records.clone(), who.clone());
            let (known, next) = (known, next.clone());
            move || write_status(&record, (&records, &who), &known, &next)
        };
        if let Err(error) = tokio::task::spawn_blocking(write).await {
            tracing::error!(%error, "a status was not written");
        }
        known = next;
        if last || statuses.changed().await.is_err() {
            return known;
        }
    }
}

fn write_status(
    record: &OwnRecord,
    (records, who): (&Records, &PodRecord),
    known: &StatusRecord,
    next: &StatusRecord,
) {
    if let Err(error) = record.write_status(next) {
        tracing::warn!(error = chain(&error), "a status is lost");
    }
    if let Err(error) = events::append(records, &events::between(who, known, next)) {
        tracing::warn!(%error, "events are lost");
    }
}

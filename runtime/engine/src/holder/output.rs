//! What the containers write: to their log files, to those who are attached, and to the terminal of
//! a pod in the foreground.
//!
//! The log files take everything: a container waits for them as it would for a disk. Those who are
//! attached take what they can: one who is too slow is cut off. The terminal in the foreground may
//! hold up the containers, as a pipe does.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{broadcast, mpsc};

use super::cri_log::{Splitter, timestamp};
use super::record::RecordDir;
use super::rotate::{self, Rotation, Writer};
use crate::pod::LogChunk;

/// How many pieces may wait for a log file before the containers wait.
const FILE_QUEUE: usize = 64;

/// How many pieces one who is attached may be behind.
const ATTACHED_QUEUE: usize = 64;

/// For those who attach: what each container writes from now on.
#[derive(Debug, Clone)]
pub(super) struct Taps(Arc<HashMap<String, broadcast::Sender<Arc<LogChunk>>>>);

impl Taps {
    pub(super) fn new<'a>(containers: impl Iterator<Item = &'a str>) -> Self {
        let tap = |name: &str| (name.to_owned(), broadcast::Sender::new(ATTACHED_QUEUE));
        Taps(Arc::new(containers.map(tap).collect()))
    }

    pub(super) fn of(&self, container: &str) -> Option<broadcast::Receiver<Arc<LogChunk>>> {
        self.0.get(container).map(broadcast::Sender::subscribe)
    }

    fn tell(&self, chunk: &Arc<LogChunk>) {
        if let Some(tap) = self.0.get(&*chunk.container) {
            // Nobody may be attached.
            drop(tap.send(chunk.clone()));
        }
    }
}

/// Passes on everything that the containers write, until all of them have ended. `terminal` gets
/// it as well. Returns when the log files are complete.
pub(super) async fn distribute(
    mut from: mpsc::Receiver<LogChunk>,
    files: LogFiles,
    taps: Taps,
    terminal: Option<mpsc::Sender<Arc<LogChunk>>>,
) {
    let (to_files, queue) = mpsc::channel(FILE_QUEUE);
    let thread = std::thread::Builder::new()
        .name("husk-logs".into())
        .spawn(move || write_all(files, queue))
        .map_err(|error| tracing::error!(%error, "no thread for the logs: they are not written"));
    while let Some(chunk) = from.recv().await {
        let chunk = Arc::new(chunk);
        taps.tell(&chunk);
        // Without a thread or a terminal nobody listens.
        drop(to_files.send((chunk.clone(), SystemTime::now())).await);
        if let Some(terminal) = &terminal {
            drop(terminal.send(chunk).await);
        }
    }
    drop(to_files);
    if let Ok(thread) = thread {
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the thread of the logs was cut off");
        }
    }
}

fn write_all(mut files: LogFiles, mut queue: mpsc::Receiver<(Arc<LogChunk>, SystemTime)>) {
    while let Some((chunk, at)) = queue.blocking_recv() {
        files.write(&chunk, at);
    }
    files.finish();
}

/// The log files of a pod's containers.
#[derive(Debug)]
pub(super) struct LogFiles {
    dir: RecordDir,
    rotation: Rotation,
    by_container: HashMap<Arc<str>, Log>,
}

/// The log of a container's run.
#[derive(Debug)]
struct Log {
    run: u32,
    splitter: Splitter,
    /// `None` when the file could not be opened.
    writer: Option<Writer>,
    /// Whether it was told that something is lost.
    complained: bool,
}

impl LogFiles {
    pub(super) fn new(dir: RecordDir, rotation: Rotation) -> Self {
        LogFiles { dir, rotation, by_container: HashMap::new() }
    }

    /// Writes a piece of output. What cannot be written is lost, and told once for each run.
    pub(super) fn write(&mut self, chunk: &LogChunk, at: SystemTime) {
        let known = self.by_container.get(&chunk.container).map(|log| log.run);
        if known != Some(chunk.run) {
            if known.is_some_and(|run| run > chunk.run) {
                // The last words of a run whose successor has spoken: its log is closed.
                return;
            }
            let log = self.open(&chunk.container, chunk.run);
            self.by_container.insert(chunk.container.clone(), log);
        }
        if let Some(log) = self.by_container.get_mut(&chunk.container) {
            let lines = log.splitter.feed(chunk.stream, &chunk.bytes, &timestamp(at));
            log.append(&lines, &chunk.container);
        }
    }

    /// Begins the log of a container's new run. Its run before that stays, older ones go.
    fn open(&self, container: &str, run: u32) -> Log {
        if let Some(old) = run.checked_sub(2)
            && let Err(error) = rotate::remove(&self.dir.log(container, old))
        {
            tracing::warn!(container, run = old, %error, "an old log cannot be removed");
        }
        let path = self.dir.log(container, run);
        let writer = Writer::open(path, self.rotation)
            .inspect_err(|error| tracing::warn!(container, run, %error, "no log can be written"));
        let complained = writer.is_err();
        Log { run, splitter: Splitter::default(), writer: writer.ok(), complained }
    }

    fn finish(&mut self) {
        let at = timestamp(SystemTime::now());
        for (container, log) in &mut self.by_container {
            let rest = log.splitter.finish(&at);
            log.append(&rest, container);
        }
    }
}

impl Log {
    fn append(&mut self, lines: &[u8], container: &str) {
        let Some(writer) = &mut self.writer else { return };
        if lines.is_empty() {
            return;
        }
        if let Err(error) = writer.write(lines)
            && !self.complained
        {
            self.complained = true;
            tracing::warn!(container, run = self.run, %error, "a part of the log is lost");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::cri_log::LogLine;
    use super::super::record::Records;
    use super::super::record::tests::record;
    use super::super::status::StatusRecord;
    use super::*;
    use crate::pod::Stream;

    fn chunk(run: u32, bytes: &[u8]) -> LogChunk {
        LogChunk { container: "main".into(), run, stream: Stream::Stdout, bytes: bytes.to_vec() }
    }

    fn contents(path: &std::path::Path) -> Vec<u8> {
        let log = std::fs::read(path).unwrap();
        let lines = log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.flat_map(|line| LogLine::parse(line).unwrap().output().flatten()).copied().collect()
    }

    #[tokio::test]
    async fn each_run_has_a_log_and_only_two_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("pods"));
        let status = StatusRecord::default();
        let own = records.create(&record("p", "u", true), "", &status, false).unwrap();
        let files = LogFiles::new(own.dir().clone(), Rotation::default());
        let taps = Taps::new(["main"].into_iter());
        let mut tap = taps.of("main").unwrap();
        let (to, from) = mpsc::channel(1);
        let (terminal, mut shown) = mpsc::channel(100);
        let distributing = tokio::spawn(distribute(from, files, taps, Some(terminal)));
        for run in 0..3 {
            to.send(chunk(run, format!("run {run}\nrest").as_bytes())).await.unwrap();
            to.send(chunk(run, b"")).await.unwrap();
        }
        drop(to);
        distributing.await.unwrap();
        assert!(!own.dir().log("main", 0).exists());
        assert_eq!(contents(&own.dir().log("main", 1)), b"run 1\nrest");
        assert_eq!(contents(&own.dir().log("main", 2)), b"run 2\nrest");
        assert_eq!(tap.recv().await.unwrap().bytes, b"run 0\nrest");
        assert_eq!(shown.recv().await.unwrap().bytes, b"run 0\nrest");
    }
}

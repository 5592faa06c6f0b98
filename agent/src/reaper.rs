//! Reaps every process that ends: the agent's own children, and the orphans that the kernel gives
//! to PID 1.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use rustix::process::WaitOptions;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::lock;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// The end of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reaped {
    pub(crate) how: How,
    pub(crate) at: SystemTime,
}

/// Who wants to know of whose end, by process ID.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    watchers: Arc<Mutex<HashMap<u32, oneshot::Sender<Reaped>>>>,
}

impl Reaper {
    /// Will tell of the end of a child.
    ///
    /// To be called right after the clone, without an `.await` in between: on the agent's single
    /// thread the child then cannot be reaped before.
    pub(crate) fn watch(&self, pid: u32) -> oneshot::Receiver<Reaped> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.watchers).insert(pid, sender);
        receiver
    }

    /// Reaps for ever.
    ///
    /// # Errors
    /// If the handler of SIGCHLD cannot be installed.
    pub(crate) async fn run(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap_all();
            // The signal is noticed even if it came since the last look: the stream remembers one.
            if children.recv().await.is_none() {
                return Err(io::Error::other("the stream of SIGCHLD ended"));
            }
        }
    }

    /// Reaps all that has ended so far.
    fn reap_all(&self) {
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                Err(rustix::io::Errno::INTR) => continue,
                // Nothing more has ended, or there is no child.
                Ok(None) | Err(_) => return,
            };
            let how = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => How::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
                (None, Some(signal)) => How::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
                (None, None) => continue,
            };
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            if let Some(watcher) = lock(&self.watchers).remove(&pid) {
                // Nobody needs to listen any more.
                let _not_awaited = watcher.send(Reaped { how, at: SystemTime::now() });
            }
        }
    }
}

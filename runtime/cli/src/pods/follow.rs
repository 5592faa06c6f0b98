//! Waiting for files to grow: told by the kernel (inotify), with a look around from time to time for
//! what it does not tell, as that the process that wrote them was killed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// How long to wait at most before looking around.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// Waits for changes of the files in some directories.
pub(super) struct Watcher {
    inotify: OwnedFd,
}

impl Watcher {
    /// Of these directories. Changes are told from now on.
    pub(super) fn of(directories: &[&Path]) -> anyhow::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context("cannot watch files")?;
        let flags = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        for directory in directories {
            inotify::add_watch(&inotify, *directory, flags)
                .with_context(|| format!("cannot watch {}", directory.display()))?;
        }
        Ok(Watcher { inotify })
    }

    /// Waits for a change, or for the time to look around: false.
    pub(super) fn changed(&self) -> anyhow::Result<bool> {
        let limit = Timespec::try_from(LOOK_AROUND).context("cannot wait")?;
        let mut fds = [PollFd::new(&self.inotify, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(false),
            Ok(_) => {}
            Err(error) => return Err(error).context("cannot wait for changes of files"),
        }
        // Which they were is found out by reading.
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(&self.inotify, &mut buffer) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for changes of files"),
            }
        }
    }
}

/// Lines of a stream that is read piece by piece. One that is longer than a bound is cut.
pub(super) struct Lines {
    partial: Vec<u8>,
    max: usize,
}

impl Lines {
    pub(super) fn new(max: usize) -> Self {
        Lines { partial: Vec::new(), max }
    }

    /// Hands out each line that is complete now, without its line feed.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (rest, complete) = match piece.strip_suffix(b"\n") {
                Some(rest) => (rest, true),
                None => (piece, false),
            };
            self.partial.extend_from_slice(rest);
            if complete || self.partial.len() >= self.max {
                each(&self.partial)?;
                self.partial.clear();
            }
        }
        Ok(())
    }

    /// Hands out what has not become a line by the end, if there is something.
    pub(super) fn finish(
        self,
        mut each: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.partial.is_empty() { Ok(()) } else { each(&self.partial) }
    }
}

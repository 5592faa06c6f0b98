//! A `husk-fs` of a test's own, started as a pod's process starts it.

use std::fs::DirBuilder;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use husk_vmm_api::{Channel, FdIndex, ServeFiles, SharedPath};
use rustix::fs::{Mode, OFlags};

use crate::place;

/// A running file server. Killed when dropped.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
}

impl FileServer {
    /// Starts one that serves these paths, each read-only or not. Also returns the VMM's end of the
    /// socket between them.
    ///
    /// # Errors
    /// A path cannot be opened, or the server not be started.
    pub fn start(shares: &[(&Path, bool)]) -> Result<(FileServer, OwnedFd)> {
        let dir = tempfile::tempdir()?;
        let private = dir.path().join("private");
        DirBuilder::new().mode(0o700).create(&private)?;
        let path = private.join("fs");
        let listener = UnixListener::bind(&path)?;
        let connected = UnixStream::connect(&path)?;

        let mut fds: Vec<OwnedFd> = vec![listener.into()];
        let mut described = Vec::new();
        for (path, read_only) in shares {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let opened = rustix::fs::open(*path, flags, Mode::empty());
            described
                .push(SharedPath { fd: FdIndex(fds.len().try_into()?), read_only: *read_only });
            fds.push(opened.with_context(|| path.display().to_string())?);
        }
        let (ours, theirs) = Channel::pair()?;
        // The child's end must survive its exec.
        let theirs = theirs.into_fd();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let child = Command::new(place::program("husk-fs"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start husk-fs")?;
        drop(theirs);
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        ours.send(&ServeFiles { listener: FdIndex(0), shares: described }, &borrowed)?;
        Ok((FileServer { child }, connected.into()))
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    /// It is gone.
    pub fn open_files(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// Kills it (SIGKILL) and reaps it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("cannot end husk-fs: {error}");
        }
    }
}

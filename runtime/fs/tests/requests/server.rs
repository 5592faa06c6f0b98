//! A `husk-fs`, started as a pod's process starts it: `$HUSK_FS_BIN`, or the one that was just built.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use husk_vmm_api::{Channel, FdIndex, ServeFiles, SharedPath};
use rustix::fs::{Mode, OFlags};

/// Killed when dropped.
pub(crate) struct Server(Child);

impl Server {
    /// Serves these paths, each read-only or not. Also returns the VMM's end of the socket.
    pub(crate) fn start(shares: &[(&Path, bool)]) -> (Server, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("fs")).unwrap();
        let connected = UnixStream::connect(dir.path().join("fs")).unwrap();
        let mut fds: Vec<OwnedFd> = vec![listener.into()];
        let mut described = Vec::new();
        for (path, read_only) in shares {
            let fd = FdIndex(u32::try_from(fds.len()).unwrap());
            described.push(SharedPath { fd, read_only: *read_only });
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            fds.push(rustix::fs::open(*path, flags, Mode::empty()).unwrap());
        }
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = theirs.into_fd();
        // The child's end must survive its exec.
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let program = std::env::var_os("HUSK_FS_BIN");
        let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_husk-fs").into());
        let child = Command::new(program)
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .env("HUSK_LOG", "off")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let message = ServeFiles { listener: FdIndex(0), shares: described };
        ours.send(&message, &borrowed).unwrap();
        (Server(child), connected.into())
    }

    /// The most memory that it ever had of its own, without the guest's; 0 when it is gone.
    pub(crate) fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()));
        let status = status.unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        field("VmHWM:").saturating_sub(field("RssShmem:"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

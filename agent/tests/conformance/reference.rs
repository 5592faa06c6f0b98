//! runc and crun: the same `config.json` in a bundle of its own.

use std::fs;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::Value;

use crate::case::Reference;
use crate::guest;

/// Only ends what hangs, in seconds.
const LIMIT: &str = "120";

/// A container of another runtime, removed when dropped.
pub(crate) struct Bundle {
    program: PathBuf,
    directory: tempfile::TempDir,
    id: String,
}

impl Reference {
    /// Where its program is, if it is in PATH.
    pub(crate) fn find(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|d| d.join(self.name())).find(|p| p.exists())
    }
}

impl Bundle {
    /// A bundle with the same root and volume as a guest's.
    pub(crate) fn new(program: PathBuf) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::tempdir().unwrap();
        // Another user than root, in a user namespace, must reach it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = directory.path().join("bundle/rootfs");
        fs::create_dir_all(&root).unwrap();
        guest::make_layer(&root);
        guest::make_layer(&directory.path().join("layer"));
        let volume = directory.path().join("volume");
        fs::create_dir(&volume).unwrap();
        // As the guest's: see `guest::setup_request`.
        std::os::unix::fs::chown(&volume, None, Some(guest::FS_GROUP)).unwrap();
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();
        fs::write(volume.join("file"), "volume\n").unwrap();
        Self { program, directory, id: format!("husk-conformance-{}-{count}", std::process::id()) }
    }

    pub(crate) fn volume(&self) -> PathBuf {
        self.directory.path().join("volume")
    }

    /// The image's files, outside of the container that runs with them.
    pub(crate) fn layer(&self) -> PathBuf {
        self.path("layer")
    }

    pub(crate) fn cgroup(&self) -> String {
        format!("/{}", self.id)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg(LIMIT).arg(&self.program).arg("--root").arg(self.path("state"));
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a container to its end: its output, what the runtime had to say, and the exit code.
    pub(crate) fn run(&self, config: &Value) -> (String, String, i32) {
        let bundle = self.path("bundle");
        fs::write(bundle.join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
        let mut command = self.command(&["run", "--bundle"]);
        let output = command.arg(&bundle).arg(&self.id).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (text(output.stdout), text(output.stderr), output.status.code().unwrap_or(-1))
    }

    /// Runs a container with a terminal to its end: what the terminal showed.
    pub(crate) fn run_on_terminal(&self, config: &Value) -> (String, String) {
        let bundle = self.path("bundle");
        fs::write(bundle.join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
        let socket = self.path("console");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = self.command(&["run", "--detach", "--console-socket"]);
        command.arg(&socket).arg("--bundle").arg(&bundle).arg(&self.id);
        let errors = self.path("errors");
        let mut process = command
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        let shown = accept_terminal(&listener, &mut process).map(read_terminal);
        process.wait().unwrap();
        (shown.unwrap_or_default(), fs::read_to_string(errors).unwrap())
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // A container that ran to its end in the foreground is gone already.
        let _gone = self.command(&["delete", "--force", &self.id]).output();
    }
}

/// The terminal's master, which the runtime sends; none if it ends without.
fn accept_terminal(listener: &UnixListener, runtime: &mut std::process::Child) -> Option<OwnedFd> {
    listener.set_nonblocking(true).unwrap();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                if runtime.try_wait().unwrap().is_some_and(|status| !status.success()) {
                    return None;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(e) => panic!("{e}"),
        }
    };
    stream.set_nonblocking(false).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 4096];
    let mut slices = [IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(&stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

/// Everything that a terminal shows until its last process ends.
fn read_terminal(master: OwnedFd) -> String {
    let mut shown = Vec::new();
    let mut buffer = [0; 4096];
    let mut master = fs::File::from(master);
    // The end of a terminal is an error (EIO).
    while let Ok(count) = master.read(&mut buffer) {
        if count == 0 {
            break;
        }
        shown.extend(&buffer[..count]);
    }
    String::from_utf8_lossy(&shown).into_owned()
}

/// The runtime's own namespaces, as `/proc/PID/ns` names them.
pub(crate) fn namespaces(process: &Path) -> Vec<String> {
    ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"]
        .iter()
        .map(|kind| {
            let link = fs::read_link(process.join("ns").join(kind)).unwrap();
            link.to_string_lossy().into_owned()
        })
        .collect()
}

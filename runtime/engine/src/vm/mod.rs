//! A pod's virtual machine, seen from the pod's process: the `husk-vmm` child and the protocol
//! with it.
//!
//! [`Vm`] is the handle. Behind it are a thread that is the parent of the VMM's process
//! ([`process`]) and a task that turns the VMM's events into what the handle offers ([`driver`]).
//! However the VM ends, also by a SIGKILL of its process, [`Vm::exited`] says so and why. A VM that
//! shares files of the host has a second process, which serves them ([`files`]).

pub mod assets;
mod disks;
mod driver;
mod files;
pub mod kvm;
mod process;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_vmm_api::{
    Channel, ChannelError, Counters, DiskConfig, Exit, FdIndex, FsConfig, MAX_SHARES, NicConfig,
    Phase, VmConfig, VsockConfig,
};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

pub use files::{FileServer, Share};
pub use husk_vmm_api::{MAX_MTU, MAX_NICS, MAX_QUEUE_PAIRS, RateLimit, TokenBucketConfig};
pub use process::{Probe, probe_kvm};

/// How long a VMM that was asked to stop, or that closed its control socket, may take to exit
/// before it is killed.
const EXIT_GRACE: Duration = Duration::from_secs(5);

/// By what the guest mounts the file system of the shares.
pub const FS_TAG: &str = "husk";

/// The guest's context ID. vsock lives in the VMM, so it has no meaning outside of one VM.
const GUEST_CID: u64 = 3;

/// Why something could not be done with a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The VMM's executable is not there.
    #[error(
        "the VMM {path} does not exist; install husk-vmm beside husk, or name it with --vmm or \
         HUSK_VMM"
    )]
    NoVmm {
        /// Where it was expected.
        path: PathBuf,
    },
    /// The VMM's process could not be started.
    #[error("cannot start the VMM {path}")]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The control socket failed.
    #[error("the control socket of the VMM failed")]
    Control(#[from] ChannelError),
    /// The control socket could not be watched.
    #[error("cannot watch the control socket of the VMM")]
    Watch(#[source] std::io::Error),
    /// The VMM did not answer a probe of KVM.
    #[error("the VMM gave no answer to the probe of KVM ({status}): {text:?}")]
    Probe {
        /// How its process ended.
        status: ExitStatus,
        /// What it said.
        text: String,
    },
    /// The file server's executable is not there.
    #[error(
        "the file server {path} does not exist; install husk-fs beside husk, or name it with \
         --file-server or HUSK_FS"
    )]
    NoFileServer {
        /// Where it was expected.
        path: PathBuf,
    },
    /// The file server's process could not be started.
    #[error("cannot start the file server {path}")]
    SpawnFileServer {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file server and the VMM could not be connected.
    #[error("cannot make the file server's socket in {dir}")]
    FileServerSocket {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There are more shares than a VM can have.
    #[error("{shares} shares; a VM can have {MAX_SHARES}")]
    TooManyShares {
        /// How many.
        shares: usize,
    },
    /// The VM has ended.
    #[error("the VM has ended: {0}")]
    Ended(Arc<VmExit>),
    /// A disk could not be added to the running VM, or taken away from it.
    #[error("the VM refuses to add or remove disk {serial}: {reason}")]
    Disk {
        /// By what the guest knows it, or would.
        serial: String,
        /// What the VMM said.
        reason: String,
    },
    /// A connection that was waited for is not coming.
    #[error("the guest does not connect to port {port}")]
    NoConnection {
        /// The host's port.
        port: u32,
    },
}

/// A disk of a VM: an open image.
#[derive(Debug)]
pub struct Disk {
    /// By what the guest knows it.
    pub serial: String,
    /// The image, opened with the access that `read_only` says.
    pub image: OwnedFd,
    /// Whether the guest may write.
    pub read_only: bool,
}

/// A NIC of a VM: the descriptors of its tap.
#[derive(Debug)]
pub struct Nic {
    /// The guest's address, unique in the VM: by it the guest knows the NIC.
    pub mac: [u8; 6],
    /// Longest payload of a frame, in bytes: 68 to 9000.
    pub mtu: u16,
    /// The tap's queues, one for each queue pair of the NIC (1 to 8), opened with
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` where there are several. More
    /// of them than vCPUs are of no use to the guest.
    pub taps: Vec<OwnedFd>,
    /// Limits of what the guest receives.
    pub rx_limit: RateLimit,
    /// Limits of what the guest transmits.
    pub tx_limit: RateLimit,
}

/// What a VM is made from.
#[derive(Debug)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// `/dev/kvm`, open.
    pub kvm: OwnedFd,
    /// The guest kernel, open.
    pub kernel: OwnedFd,
    /// The initial RAM file system, open.
    pub initramfs: OwnedFd,
    /// Where the guest kernel's log goes.
    pub console: OwnedFd,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its NICs, in the order in which the guest finds them.
    pub nics: Vec<Nic>,
    /// What it shares with the host. Share number N is the entry `N` of the root directory of the
    /// file system [`FS_TAG`] (virtio-fs), which the VM has only if there are shares.
    pub shares: Vec<Share>,
    /// Who serves them.
    pub file_server: FileServer,
}

impl VmSpec {
    /// The message that describes it, and the descriptors to which that refers. `files` is connected
    /// to the file server.
    fn into_boot(self, files: Option<OwnedFd>) -> (Box<VmConfig>, Vec<OwnedFd>) {
        let mut fds = Vec::new();
        let mut refer = |fd: OwnedFd| {
            fds.push(fd);
            // At most MAX_DISKS, MAX_NICS * MAX_QUEUE_PAIRS and 5 of them.
            FdIndex(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
        };
        let config = VmConfig {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            kvm: refer(self.kvm),
            kernel: refer(self.kernel),
            initramfs: Some(refer(self.initramfs)),
            cmdline: String::new(),
            console: Some(refer(self.console)),
            serial_console: false,
            disks: self
                .disks
                .into_iter()
                .map(|disk| DiskConfig {
                    serial: disk.serial,
                    fd: refer(disk.image),
                    read_only: disk.read_only,
                })
                .collect(),
            nics: self
                .nics
                .into_iter()
                .map(|nic| NicConfig {
                    mac: nic.mac,
                    mtu: nic.mtu,
                    taps: nic.taps.into_iter().map(&mut refer).collect(),
                    rx_limit: nic.rx_limit,
                    tx_limit: nic.tx_limit,
                })
                .collect(),
            vsock: Some(VsockConfig { guest_cid: GUEST_CID }),
            fs: files.map(|socket| FsConfig { tag: FS_TAG.to_owned(), socket: refer(socket) }),
        };
        (Box::new(config), fds)
    }
}

/// How a VM ended, as far as the pod's process can know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// As the VMM told.
    Reported(Exit),
    /// The VMM's process ended without a word.
    Died {
        /// How it ended; `None` if it could not be learned.
        status: Option<ExitStatus>,
        /// The last that it wrote to its standard error.
        stderr_tail: String,
    },
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            VmExit::Reported(exit) => exit.fmt(f),
            VmExit::Died { status, stderr_tail } => {
                match status {
                    Some(status) => {
                        write!(f, "the VMM's process ended without a report ({status})")?
                    }
                    None => f.write_str("the VMM's process ended without a report")?,
                }
                if !stderr_tail.is_empty() {
                    write!(f, "; the last that it wrote:\n{stderr_tail}")?;
                }
                Ok(())
            }
        }
    }
}

/// What the handle and the driver share. Locks are held for moments, never across an await.
#[derive(Debug, Default)]
struct Shared {
    /// Who waits for the guest to connect to which host port.
    /// Who waits for which port; told `None` if no connection will come.
    accepts: Mutex<HashMap<u32, oneshot::Sender<Option<UnixStream>>>>,
    /// Who waits for counters, first come first served.
    counters: Mutex<VecDeque<oneshot::Sender<Counters>>>,
    /// Who waits for the answer to which change of disks.
    disks: Mutex<disks::Waiting>,
    /// When which phase was reached, in ns of `CLOCK_MONOTONIC`; each phase once.
    phases: Mutex<Vec<(Phase, u64)>>,
    /// What becomes of the file server.
    files: files::Fate,
}

/// A lock whose holder panicked is still good here: every critical section is one operation of a
/// collection.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells how the VM ended.
type VmExited = watch::Receiver<Option<Arc<VmExit>>>;

/// A request to the VMM and the descriptors that go with it.
type Command = (husk_vmm_api::Request, Vec<OwnedFd>);

/// The handle of a VM. When the last clone is dropped, the VMM is killed.
#[derive(Debug, Clone)]
pub struct Vm {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    exit: VmExited,
    pid: u32,
}

impl Vm {
    /// Starts the VMM's process; it waits for [`Vm::boot`]. Does not block.
    ///
    /// The process is this process's child: it is killed when this process ends, however that
    /// happens. It has nothing from here but its end of the control socket.
    ///
    /// # Errors
    /// [`VmError::NoVmm`], [`VmError::Spawn`], [`VmError::Control`], [`VmError::Watch`].
    pub async fn spawn(program: &Path) -> Result<Vm, VmError> {
        let (ours, theirs) = Channel::pair()?;
        let spawned = process::spawn("vmm", program, theirs.into_fd()).await;
        let process = spawned.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => VmError::NoVmm { path: program.to_owned() },
            _ => VmError::Spawn { path: program.to_owned(), source },
        })?;
        Vm::drive(ours, process)
    }

    /// Takes over a VMM of which this is the control socket.
    fn drive(control: Channel, process: process::PodProcess) -> Result<Vm, VmError> {
        let shared = Arc::new(Shared::default());
        let (commands, queue) = mpsc::unbounded_channel();
        let (exit, exited) = watch::channel(None);
        let pid = process.pid();
        let driver = driver::Driver::new(control, process, shared.clone(), exit)?;
        tokio::spawn(driver.run(queue));
        Ok(Vm { shared, commands, exit: exited, pid })
    }

    /// The VMM's process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has the VMM build the VM and run it, and starts the file server if there are shares. Does not
    /// wait for any of it: what comes of it is told by [`Vm::accept`], [`Vm::exited`] and
    /// [`Vm::file_server_lost`].
    ///
    /// # Errors
    /// The file server cannot be started.
    pub async fn boot(&self, mut spec: VmSpec) -> Result<(), VmError> {
        let shares = std::mem::take(&mut spec.shares);
        let files = match shares.is_empty() {
            true => None,
            false => Some(files::start(self, &spec.file_server, shares).await?),
        };
        let (config, fds) = spec.into_boot(files);
        self.send(husk_vmm_api::Request::Boot(config), fds);
        Ok(())
    }

    /// Waits until the file server is of no use any more while the VM runs; says why. The guest gets
    /// errors for what it asks of the shares. For ever if there are no shares.
    pub async fn file_server_lost(&self) -> Arc<str> {
        self.shared.files.wait_lost().await
    }

    /// A command to a driver that is gone is one to a VM that is gone: `exited` has said so.
    fn send(&self, request: husk_vmm_api::Request, fds: Vec<OwnedFd>) {
        if self.commands.send((request, fds)).is_err() {
            tracing::debug!("the VM is gone already");
        }
    }

    /// Registers interest in the guest's next connection to a port of the host. Connections to
    /// ports without interest are closed.
    #[must_use]
    pub fn accept(&self, port: u32) -> Accept {
        let (sender, connection) = oneshot::channel();
        lock(&self.shared.accepts).insert(port, sender);
        Accept { port, connection, vm: self.clone() }
    }

    /// Ends the wait for a connection of the guest to a port: it is known that none will come.
    pub(crate) fn withdraw(&self, port: u32) {
        let waiter = lock(&self.shared.accepts).remove(&port);
        // Who has stopped waiting need not be told.
        drop(waiter.map(|waiter| waiter.send(None)));
    }

    /// When which phase of the start was reached, in ns of `CLOCK_MONOTONIC`.
    #[must_use]
    pub fn phases(&self) -> Vec<(Phase, u64)> {
        lock(&self.shared.phases).clone()
    }

    /// What the VM did so far.
    ///
    /// # Errors
    /// [`VmError::Ended`].
    pub async fn counters(&self) -> Result<Counters, VmError> {
        let (sender, answer) = oneshot::channel();
        lock(&self.shared.counters).push_back(sender);
        self.send(husk_vmm_api::Request::Counters, Vec::new());
        tokio::select! {
            exit = self.exited() => Err(VmError::Ended(exit)),
            Ok(counters) = answer => Ok(counters),
        }
    }

    /// Waits for the end of the VM and says how it came.
    pub async fn exited(&self) -> Arc<VmExit> {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        // Without a driver (its runtime is shutting down) nothing more can be learned.
        ended.unwrap_or_else(|| Arc::new(VmExit::Died { status: None, stderr_tail: String::new() }))
    }

    /// Waits until nothing of the VM is left: its processes are reaped, and with them its memory, its
    /// locks on layers, and its hold on what it shares. That is some time after [`Vm::exited`].
    pub async fn gone(&self) {
        // The driver drops its end only when the process is reaped. (If the end was dropped
        // already, that is what was to be waited for.)
        drop(self.exit.clone().wait_for(|_| false).await);
        // What is shared is in use until its server is gone.
        self.shared.files.wait_gone().await;
    }

    /// Ends the VM now, without telling the guest: asks the VMM, and kills its process if it does
    /// not follow within five seconds.
    pub async fn kill(&self) -> Arc<VmExit> {
        self.send(husk_vmm_api::Request::Stop, Vec::new());
        self.exited().await
    }
}

/// The next connection of the guest to one port. Dropping it withdraws the interest.
#[derive(Debug)]
pub struct Accept {
    port: u32,
    connection: oneshot::Receiver<Option<UnixStream>>,
    vm: Vm,
}

impl Accept {
    /// Waits for the connection, without a limit: as long as the VM lives it can come.
    ///
    /// # Errors
    /// [`VmError::Ended`]; [`VmError::NoConnection`] if none will come.
    pub async fn connected(mut self) -> Result<UnixStream, VmError> {
        let vm = self.vm.clone();
        tokio::select! {
            // A connection that has come is good even if the VM has ended since: it holds what
            // the guest had sent.
            biased;
            Ok(stream) = &mut self.connection => {
                stream.ok_or(VmError::NoConnection { port: self.port })
            }
            exit = vm.exited() => Err(VmError::Ended(exit)),
        }
    }
}

impl Drop for Accept {
    fn drop(&mut self) {
        // Whoever registered the port anew has replaced the entry; that one is not closed.
        self.connection.close();
        let mut accepts = lock(&self.vm.shared.accepts);
        if accepts.get(&self.port).is_some_and(oneshot::Sender::is_closed) {
            accepts.remove(&self.port);
        }
    }
}

/// Borrows every descriptor of a command.
fn borrow(fds: &[OwnedFd]) -> Vec<std::os::fd::BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(crate) mod tests;

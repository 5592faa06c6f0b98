//! The start of a pod, up to a guest that is ready for containers: one linear recipe.
//!
//! Order matters for speed. The VMM's process is started first, so that it loads while images are
//! resolved; the VM is booted as soon as its disks are known, because there is no hotplug; and
//! nothing is polled: the agent connects when it is ready.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use husk_network::join;
use husk_network::pod::{Attached, NetworkError};
use husk_proto::agent as proto;
use husk_vmm_api::{MAX_MTU, MAX_QUEUE_PAIRS, MIN_MTU, RateLimit};
use tokio::sync::mpsc;

use super::actor::chain;
use super::changes::Changes;
use super::images::{self, ImageError, Images, ResolvedImage};
use super::logs::LogChunk;
use super::rundir::{RunDir, RunDirError};
use super::runtime::GuestRuntime;
use super::state::Failure;
use super::timeline::Timeline;
use super::undo::Undo;
use super::{PodOptions, SharedFindings};
use crate::guest::{Guest, GuestError};
use crate::network::{self, Attaching, GuestNetwork};
use crate::paths::Config;
use crate::storage::{self, Layer, Layout, StorageError};
use crate::types::{PodSpec, Rootfs};
use crate::vm::assets::{self, AssetError};
use crate::vm::kvm::{self, KvmError};
use crate::vm::{Disk, FileServer, Nic, Share, Vm, VmError, VmSpec};

/// Seconds more that a guest may take for each GiB of its memory.
const START_TIMEOUT_PER_GIB: Duration = Duration::from_secs(1);

/// Name of the guest kernel's log in the pod's directory.
const CONSOLE_LOG: &str = "console.log";

/// Why a pod did not come to the start of its containers.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest's kernel or initramfs cannot be used.
    #[error(transparent)]
    Asset(#[from] AssetError),
    /// An image is not there.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The disks cannot be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The pod's directory cannot be made.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The VMM cannot be started.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// It gets no network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// An interface of its network is not for a virtual machine.
    #[error(
        "the interface {name:?} of the pod's network has an MTU of {mtu}; it can be 68 to {MAX_MTU}"
    )]
    Mtu {
        /// Which.
        name: String,
        /// Its MTU.
        mtu: u32,
    },
    /// The guest did not become ready.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A thread panicked or the program is ending.
    #[error("an internal task was cut off")]
    Task(#[from] tokio::task::JoinError),
}

impl PrepareError {
    /// What the pod's status says of it.
    pub(super) fn failure(&self, spec: &PodSpec) -> Failure {
        let (reason, containers) = match self {
            PrepareError::Kvm(_) => ("KvmUnavailable", Vec::new()),
            PrepareError::Asset(_) => ("GuestFilesUnusable", Vec::new()),
            PrepareError::Image(error) => (error.reason, users(spec, &error.reference)),
            PrepareError::Storage(_) => ("StorageError", Vec::new()),
            PrepareError::RunDir(_) => ("RunDirError", Vec::new()),
            PrepareError::Network(_) | PrepareError::Mtu { .. } => ("NetworkError", Vec::new()),
            PrepareError::Vm(_) | PrepareError::Guest(_) => ("VmStartError", Vec::new()),
            PrepareError::Task(_) => ("InternalError", Vec::new()),
        };
        Failure { reason, message: chain(self), containers }
    }
}

/// The positions of the containers that use an image.
fn users(spec: &PodSpec, wanted: &str) -> Vec<usize> {
    let uses = |rootfs: &Rootfs| {
        let Rootfs::Image { reference, pull_policy: _ } = rootfs;
        reference == wanted
    };
    let containers = spec.all_containers().enumerate();
    containers.filter(|(_, container)| uses(&container.rootfs)).map(|(index, _)| index).collect()
}

/// What the start needs.
pub(super) struct Inputs<'a> {
    pub(super) spec: &'a Arc<PodSpec>,
    pub(super) images: &'a dyn Images,
    pub(super) options: &'a PodOptions,
    pub(super) undo: &'a mut Undo,
    pub(super) timeline: &'a Timeline,
    pub(super) findings: &'a SharedFindings,
    pub(super) logs: mpsc::Sender<LogChunk>,
}

/// A pod whose guest is ready for containers.
pub(super) struct Prepared {
    pub(super) runtime: GuestRuntime,
    /// Its addresses, its own one first.
    pub(super) addresses: Vec<IpAddr>,
}

/// What is opened on the host before anything is started, so that what lacks is told at once.
struct HostFiles {
    kvm: OwnedFd,
    kernel: OwnedFd,
    initramfs: OwnedFd,
    console: OwnedFd,
    shares: Vec<Share>,
    run_dir: RunDir,
}

fn open_host_files(
    config: &Config,
    spec: &PodSpec,
    uid: &str,
    console: Option<PathBuf>,
) -> Result<HostFiles, PrepareError> {
    let kvm = kvm::open(&config.kvm)?;
    let kernel = assets::open_kernel(&config.kernel)?.into();
    let initramfs = assets::open_initramfs(&config.initramfs)?.into();
    let run_dir = RunDir::create(&config.pods_dir(), uid)?;
    let console = match console {
        None => run_dir.create_file(CONSOLE_LOG)?,
        Some(path) => File::create_new(&path).map_err(|source| RunDirError::Io {
            step: "create",
            path,
            source,
        })?,
    };
    let console = console.into();
    // Last, because it can make something.
    let shares = storage::host_path::open_shares(spec)?;
    Ok(HostFiles { kvm, kernel, initramfs, console, shares, run_dir })
}

/// See the module.
pub(super) async fn prepare(inputs: Inputs<'_>) -> Result<Prepared, PrepareError> {
    let Inputs { spec, images, options, undo, timeline, findings, logs } = inputs;
    let config = &options.config;

    let uid = spec.metadata.uid.clone().unwrap_or_else(new_uid);
    let files = {
        let (config, uid, console) = (config.clone(), uid.clone(), options.console_log.clone());
        let spec = spec.clone();
        let open = move || open_host_files(&config, &spec, &uid, console);
        tokio::task::spawn_blocking(open).await??
    };
    let HostFiles { kvm, kernel, initramfs, console, shares, run_dir } = files;
    let file_server =
        FileServer { program: config.file_server.clone(), dir: run_dir.path().to_owned() };
    undo.push("pod directory", move || async move { drop(run_dir) });
    network::sweep_in_background(&config.state_dir);

    let attaching = match network::attach(spec, &uid, &config.state_dir, queue_pairs(spec))? {
        Some((attaching, take_back)) => {
            undo.push("network", move || take_back.run());
            Some(attaching)
        }
        None => None,
    };
    // At the same time: the VMM's process, the images, and the network.
    let spawn = timeline.during("VMM spawned", Vm::spawn(&config.vmm));
    let resolve = timeline
        .during("images", images::resolve_all(images, spec, options.debug_image.as_deref()));
    let attach = attached(attaching, timeline);
    let (vm, images, attached) = tokio::join!(spawn, resolve, attach);
    let vm = vm?;
    undo.push("VM", {
        let (vm, findings) = (vm.clone(), findings.clone());
        move || async move {
            findings.update(|findings| findings.phases = vm.phases());
            vm.kill().await;
            // Who sees the pod ended may remove its image: the VMM holds locks on the layers.
            vm.gone().await;
        }
    });
    let images = images?;
    let (nics, addresses, network) = match attached?.map(GuestNetwork::of) {
        Some((nics, addresses, network)) => (nics, addresses, Some(network)),
        None => (Vec::new(), Vec::new(), None),
    };

    let layers: BTreeMap<String, Vec<Layer>> =
        images.iter().map(|(name, image)| (name.clone(), image.layers.clone())).collect();
    let layout = storage::layout(spec, &uid, &layers, config.scratch_bytes)?;
    let disks = timeline.during("disks", open_disks(config, layout.clone())).await?;

    let agent = Guest::expect(&vm);
    vm.boot(VmSpec {
        vcpus: spec.vm.vcpus,
        memory_mib: spec.vm.memory_mib,
        kvm,
        kernel,
        initramfs,
        console,
        disks,
        nics: nics.into_iter().map(nic).collect::<Result<_, _>>()?,
        shares,
        file_server,
    })
    .await?;
    let limit = start_limit(options.start_timeout, spec.vm.memory_mib);
    let guest = timeline.during("boot", Guest::connect(vm, agent, limit)).await?;
    let request = setup_request(spec, &layout, &addresses).await?;
    let setup = async {
        let info = guest.setup_pod(request).await?;
        if let Some(network) = &network {
            network.tell(&guest).await?;
        }
        Ok::<_, GuestError>(info)
    };
    let setup = timeline.during("pod set up", setup);
    let info = match tokio::time::timeout(limit, setup).await {
        Ok(info) => info?,
        Err(_) => return Err(GuestError::NotReady { limit }.into()),
    };
    findings.update(|findings| findings.guest = Some(info));
    if let Some(network) = network {
        let upkeep = network.keep(&guest);
        undo.push("upkeep of the network", move || upkeep.end());
    }

    let images: BTreeMap<String, ResolvedImage> = images;
    let runtime = GuestRuntime::new(super::runtime::Parts {
        guest,
        spec: spec.clone(),
        changes: Changes::new(spec.clone()),
        uid,
        node_name: node_name(),
        host_ips: if addresses.is_empty() { Vec::new() } else { network::host_addresses() },
        pod_ips: addresses.clone(),
        images,
        layout,
        logs,
        inputs: super::input::Inputs::default(),
        starts: Mutex::default(),
        disks: Default::default(),
        checks: AtomicU64::default(),
        timeline: timeline.clone(),
        findings: findings.clone(),
        measure: options.measure,
    });
    Ok(Prepared { runtime, addresses })
}

async fn open_disks(config: &Config, layout: Layout) -> Result<Vec<Disk>, PrepareError> {
    let config = config.clone();
    Ok(tokio::task::spawn_blocking(move || layout.open(&config)).await??)
}

/// Memory takes time to be set up: the larger the guest, the longer it may take.
fn start_limit(base: Duration, memory_mib: u32) -> Duration {
    base.saturating_add(START_TIMEOUT_PER_GIB.saturating_mul(memory_mib / 1024))
}

/// Waits for the network of a pod that gets one.
async fn attached(
    attaching: Option<Attaching>,
    timeline: &Timeline,
) -> Result<Option<Attached>, PrepareError> {
    match attaching {
        Some(attaching) => Ok(Some(timeline.during("network", attaching.done()).await??)),
        None => Ok(None),
    }
}

/// How many pairs of queues each interface has: one for each CPU, as far as the VMM has them.
fn queue_pairs(spec: &PodSpec) -> usize {
    usize::try_from(spec.vm.vcpus).unwrap_or(MAX_QUEUE_PAIRS).clamp(1, MAX_QUEUE_PAIRS)
}

/// An interface as the VMM gets it. The guest is told its MTU later, and can be told another one then:
/// what the device says is the most that it can ever be.
fn nic(nic: join::Nic) -> Result<Nic, PrepareError> {
    let join::Nic { name, mac, mtu, taps } = nic;
    match u16::try_from(mtu) {
        Ok(mtu) if (MIN_MTU..=MAX_MTU).contains(&mtu) => {
            let (rx_limit, tx_limit) = (RateLimit::default(), RateLimit::default());
            Ok(Nic { mac, mtu: MAX_MTU, taps, rx_limit, tx_limit })
        }
        _ => Err(PrepareError::Mtu { name, mtu }),
    }
}

async fn setup_request(
    spec: &Arc<PodSpec>,
    layout: &Layout,
    addresses: &[IpAddr],
) -> Result<proto::SetupPodRequest, PrepareError> {
    let resolv_conf = {
        let spec = spec.clone();
        tokio::task::spawn_blocking(move || network::resolv_conf(&spec)).await?
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(proto::SetupPodRequest {
        hostname: spec.hostname.clone(),
        filesystems: layout.filesystems.clone(),
        volumes: layout.volumes.clone(),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        shm_size: 0,
        hosts: Some(network::hosts(spec, addresses)),
        resolv_conf,
    })
}

/// Name of this host.
fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A random UUID (RFC 9562, version 4), of which the uid of a pod can be made.
#[must_use]
pub fn new_uid() -> String {
    let mut bytes = [0; 16];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    if let Err(errno) = filled {
        // The kernel's generator cannot fail once it is initialised; the time will do for a name.
        tracing::warn!(%errno, "no random numbers");
        let now = super::timeline::monotonic_ns();
        bytes = (u128::from(now) << 64 | u128::from(std::process::id())).to_be_bytes();
    }
    let number = u128::from_be_bytes(bytes);
    let number = number & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{number:032x}");
    let part = |from, to| hex.get(from..to).unwrap_or_default();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_random_uuids() {
        let (one, other) = (new_uid(), new_uid());
        assert_ne!(one, other);
        assert_eq!(one.len(), 36);
        assert_eq!(one.get(14..15), Some("4"));
        assert!(matches!(one.get(19..20), Some("8" | "9" | "a" | "b")));
    }

    #[test]
    fn larger_guests_may_take_longer() {
        let base = Duration::from_secs(60);
        assert_eq!(start_limit(base, 128), base);
        assert_eq!(start_limit(base, 16 * 1024), Duration::from_secs(76));
        assert_eq!(start_limit(Duration::MAX, u32::MAX), Duration::MAX);
    }
}

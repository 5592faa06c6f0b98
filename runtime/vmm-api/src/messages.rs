//! The messages themselves: plain structs, unknown fields refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Position of a descriptor among those sent with the same message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// Most virtual CPUs that a VM may have.
pub const MAX_VCPUS: u32 = 64;

/// Least guest memory with which the guest kernel and the agent start, in MiB.
pub const MIN_MEMORY_MIB: u32 = 48;

/// Most guest memory, in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// Most disks that a VM may have.
pub const MAX_DISKS: usize = 38;

/// Most disks that can be added to a running VM at the same time. There may be fewer: together with
/// those that it was started with they are at most [`MAX_DISKS`].
pub const MAX_HOT_DISKS: usize = 8;

/// Longest virtio-blk serial, in bytes (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const MAX_SERIAL_LEN: usize = 20;

/// Longest tag of a file-system device, in bytes (virtio 1.2, 5.11.4).
pub const MAX_TAG_LEN: usize = 36;

/// Most NICs that a VM may have.
pub const MAX_NICS: usize = 8;

/// Most queue pairs that a NIC may have.
pub const MAX_QUEUE_PAIRS: usize = 8;

// A boot takes all of them along, beside /dev/kvm, kernel, initramfs, console and the file server's
// socket.
const _: () = assert!(MAX_DISKS + MAX_NICS * MAX_QUEUE_PAIRS + 5 <= crate::MAX_FDS);

/// Least MTU of a NIC, in bytes (RFC 791).
pub const MIN_MTU: u16 = 68;

/// Most MTU of a NIC, in bytes.
pub const MAX_MTU: u16 = 9000;

/// The context ID by which the guest reaches the host (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

/// Everything that a VM is made from. Sent once, as [`Request::Boot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Number of virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// `/dev/kvm`, opened read-write.
    pub kvm: FdIndex,
    /// The guest kernel: an uncompressed ELF `vmlinux`, opened read-only.
    pub kernel: FdIndex,
    /// The initial RAM file system (cpio), opened read-only.
    pub initramfs: Option<FdIndex>,
    /// Appended to the kernel command line that the VMM builds.
    pub cmdline: String,
    /// Where the guest kernel's log goes (a file or a pipe), at most
    /// [`VmConfig::CONSOLE_LOG_CAP`] bytes of it.
    pub console: Option<FdIndex>,
    /// Also emulate a 16550 serial port at 0x3f8 as the console. Slow; for debugging the kernel's
    /// first steps.
    pub serial_console: bool,
    /// virtio-blk disks, in the order in which the guest finds them (`vda`, `vdb`, ...).
    pub disks: Vec<DiskConfig>,
    /// virtio-net NICs, in the order in which the guest finds them (`eth0`, `eth1`, ...).
    pub nics: Vec<NicConfig>,
    /// The guest's vsock device, if it has one.
    pub vsock: Option<VsockConfig>,
    /// The guest's file-system device, if it has one. The VMM then shares guest memory with the
    /// process that serves it.
    pub fs: Option<FsConfig>,
}

impl VmConfig {
    /// Most bytes of the guest's console that are written to [`VmConfig::console`].
    pub const CONSOLE_LOG_CAP: u64 = 4 * 1024 * 1024;
}

/// One virtio-blk disk. Raw images and block devices only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// By what the guest knows the disk (`/sys/block/*/serial`): 1 to [`MAX_SERIAL_LEN`] bytes of
    /// printable ASCII, unique in the VM.
    pub serial: String,
    /// The image, opened with the access that `read_only` says.
    pub fd: FdIndex,
    /// Whether the guest may write.
    pub read_only: bool,
}

/// One virtio-net NIC.
///
/// Its taps are made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` where there
/// is more than one of them. What the guest negotiates, the VMM sets by `TUNSETOFFLOAD`,
/// `TUNSETVNETHDRSZ` and `TUNSETQUEUE`, and it makes the descriptors non-blocking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The guest's address: unicast, not zero, unique in the VM. By it the guest knows the NIC.
    pub mac: [u8; 6],
    /// Longest payload of a frame, in bytes: [`MIN_MTU`] to [`MAX_MTU`].
    pub mtu: u16,
    /// One descriptor of the tap for each queue pair: 1 to [`MAX_QUEUE_PAIRS`].
    pub taps: Vec<FdIndex>,
    /// Limits of what the guest receives, for all queue pairs together.
    pub rx_limit: RateLimit,
    /// Limits of what the guest transmits, for all queue pairs together.
    pub tx_limit: RateLimit,
}

/// Limits of one direction of a device. The default is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Of bytes.
    pub bytes: Option<TokenBucketConfig>,
    /// Of operations: of a NIC, packets (with segmentation offload up to 64 KiB each).
    pub operations: Option<TokenBucketConfig>,
}

/// A token bucket, full at the start. A transfer needs one token to begin and takes as many as it is
/// large, if need be on credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Most tokens in it, at least 1.
    pub burst: u64,
    /// Tokens that it gets each second, at least 1.
    pub refill_per_second: u64,
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, at least 3 and less than 2^32 - 1.
    pub guest_cid: u64,
}

/// The file-system device (virtio-fs), whose requests another process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// By what the guest mounts it: 1 to [`MAX_TAG_LEN`] bytes of printable ASCII.
    pub tag: String,
    /// A stream socket that is connected to a back-end of vhost-user.
    pub socket: FdIndex,
}

/// From the pod's process to the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Request {
    /// Build the VM and run it. The first message, and only once.
    Boot(Box<VmConfig>),
    /// Connect `fd` (one end of a stream socket pair) to a port on which the guest listens.
    /// Answered by [`Event::VsockConnected`] or [`Event::VsockRefused`].
    VsockConnect {
        /// Chosen by the sender, comes back in the answer.
        id: u32,
        /// The guest's port.
        port: u32,
        /// The stream socket to join to the connection.
        fd: FdIndex,
    },
    /// Add a disk to the running VM. Answered by [`Event::DiskAdded`] or [`Event::DiskRefused`].
    AddDisk {
        /// Chosen by the sender, comes back in the answer.
        id: u32,
        /// The disk.
        disk: DiskConfig,
    },
    /// Take a disk away that was added to the running VM, and of which the guest has let go. Answered
    /// by [`Event::DiskRemoved`], when its descriptor is closed, or [`Event::DiskRefused`].
    RemoveDisk {
        /// Chosen by the sender, comes back in the answer.
        id: u32,
        /// By what the guest knows the disk.
        serial: String,
    },
    /// Ask for [`Event::Counters`].
    Counters,
    /// Stop the VM now, without telling the guest. Answered by [`Event::Exited`] with
    /// [`Exit::Stopped`].
    Stop,
}

/// From the VMM to the pod's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Event {
    /// A step of the start was completed.
    Phase {
        /// Which one.
        phase: Phase,
        /// When, in ns of `CLOCK_MONOTONIC`.
        at_ns: u64,
    },
    /// The guest connected to a port of the host. The descriptor is this side's end.
    VsockAccepted {
        /// The host port to which the guest connected.
        port: u32,
        /// The guest's own port.
        guest_port: u32,
        /// A connected stream socket.
        fd: FdIndex,
    },
    /// A [`Request::VsockConnect`] succeeded.
    VsockConnected {
        /// The request's.
        id: u32,
    },
    /// A [`Request::VsockConnect`] failed; its descriptor is closed.
    VsockRefused {
        /// The request's.
        id: u32,
        /// Why.
        reason: String,
    },
    /// A [`Request::AddDisk`] succeeded. The guest's driver finds the disk when it is told to look.
    DiskAdded {
        /// The request's.
        id: u32,
        /// Number of the device among those on the guest's command line: its driver calls the place
        /// `virtio-mmio.DEVICE`.
        device: u32,
    },
    /// A [`Request::RemoveDisk`] succeeded.
    DiskRemoved {
        /// The request's.
        id: u32,
    },
    /// A [`Request::AddDisk`] or [`Request::RemoveDisk`] failed, and changed nothing.
    DiskRefused {
        /// The request's.
        id: u32,
        /// Why.
        reason: String,
    },
    /// The process that serves the file-system device is gone or of no use. The VM runs on; what the
    /// guest asks of the device fails with `ENOTCONN`. Told once at most.
    FileServerLost {
        /// Why, as seen from the VMM.
        reason: String,
    },
    /// The answer to [`Request::Counters`].
    Counters(Box<Counters>),
    /// The VM is gone. Always the last message.
    Exited(Exit),
}

/// The steps of a start, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// `husk-vmm`'s `main` was reached.
    VmmStarted,
    /// `/dev/kvm` answered and the VM exists.
    Kvm,
    /// Guest memory is mapped and registered.
    Memory,
    /// Kernel, initramfs and boot structures lie in guest memory.
    Load,
    /// The devices are made and wired to KVM.
    Devices,
    /// The boot CPU was told to run (the guest's first instruction).
    FirstInstruction,
    /// PID 1 of the guest runs: the agent's first instruction.
    Init,
    /// The agent is ready for requests.
    AgentReady,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "outcome")]
pub enum Exit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest rebooted itself.
    Reboot,
    /// The guest's kernel panicked.
    Panic {
        /// The last lines of its log.
        log_tail: String,
    },
    /// The guest's CPU shut down after a triple fault.
    TripleFault {
        /// The last lines of its log.
        log_tail: String,
    },
    /// [`Request::Stop`], or the control socket was closed.
    Stopped,
    /// husk or the host failed: the VM could not be built, or not be run on.
    Error {
        /// What failed, with its causes.
        message: String,
        /// The last lines of the guest's log, empty if it never ran.
        log_tail: String,
    },
}

impl Exit {
    /// The process's exit code for this outcome, for when the event is lost.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self {
            Exit::PowerOff | Exit::Stopped => 0,
            Exit::Error { .. } => 1,
            Exit::Reboot => 10,
            Exit::Panic { .. } => 11,
            Exit::TripleFault { .. } => 12,
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tail = match self {
            Exit::PowerOff => return f.write_str("the guest powered off"),
            Exit::Reboot => return f.write_str("the guest rebooted"),
            Exit::Stopped => return f.write_str("the VM was stopped"),
            Exit::Panic { log_tail } => {
                f.write_str("the guest kernel panicked")?;
                log_tail
            }
            Exit::TripleFault { log_tail } => {
                f.write_str("the guest's CPU stopped with a triple fault")?;
                log_tail
            }
            Exit::Error { message, log_tail } => {
                write!(f, "the VMM failed: {message}")?;
                log_tail
            }
        };
        if !tail.is_empty() {
            write!(f, "; the guest's last log lines:\n{tail}")?;
        }
        Ok(())
    }
}

/// What a VM did so far. All counts are since the VM's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// vCPU exits to user space by kind: `io_in`, `io_out`, `mmio_read`, `mmio_write`, `hlt`,
    /// `interrupted`, ...
    pub exits: BTreeMap<String, u64>,
    /// Per device, by its name (`rng`, `balloon`, `console`, `vsock`, `blk:SERIAL`,
    /// `net:POSITION`; `fs`, whose kicks and bytes its server does not tell).
    pub devices: BTreeMap<String, DeviceCounts>,
    /// When each phase was reached, in ns of `CLOCK_MONOTONIC`.
    pub phases_ns: BTreeMap<Phase, u64>,
    /// I/O and MMIO exits up to [`Phase::AgentReady`].
    pub io_exits_at_agent_ready: Option<u64>,
}

/// What one virtio device did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCounts {
    /// Queue notifications from the guest.
    pub kicks: u64,
    /// Interrupts to the guest.
    pub interrupts: u64,
    /// Bytes from the device to the guest. Of a NIC with a header of 12 bytes for each packet.
    pub bytes_to_guest: u64,
    /// Bytes from the guest to the device. Of a NIC with a header of 12 bytes for each packet.
    pub bytes_from_guest: u64,
    /// Packets that the guest received. Only NICs have packets.
    pub packets_to_guest: u64,
    /// Packets that the guest transmitted.
    pub packets_from_guest: u64,
    /// Packets for the guest for which its buffers were too short.
    pub drops_to_guest: u64,
    /// Packets of the guest that are malformed, or that the host refused.
    pub drops_from_guest: u64,
    /// Bytes of memory that the guest gave back. Only the balloon takes them.
    pub bytes_released: u64,
}

//! The gRPC protocols: between a pod's process and the agent in its guest ([`agent`]), and between
//! `husk` commands and a pod's process ([`pod`]).
//!
//! What it is for: the generated messages, clients and servers of `agent.proto` and `pod.proto`, and
//! the constants ([`ports`], [`guest`]) on which host and guest must agree. What it is not for:
//! logic.
#![forbid(unsafe_code)]

/// Version 1 of the agent's protocol.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod agent {
    tonic::include_proto!("husk.agent.v1");
}

/// Version 1 of the protocol of a pod's process.
#[cfg(feature = "pod")]
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod pod {
    tonic::include_proto!("husk.pod.v1");
}

/// vsock ports of the host (context ID 2) to which the agent connects.
pub mod ports {
    /// The control connection. The agent connects, and then *serves* gRPC (HTTP/2) on it: its
    /// arrival is what says that the agent is ready, and nobody polls.
    pub const CONTROL: u32 = 1024;

    /// First port for stdio streams. The pod's process chooses a port per stream, names it in the
    /// request, and the agent connects to it.
    pub const FIRST_STREAM: u32 = 0x1_0000;
}

/// Paths and names inside the guest.
pub mod guest {
    /// Where the file systems of `SetupPodRequest.filesystems` are mounted: `FILESYSTEMS/<name>`.
    pub const FILESYSTEMS: &str = "/run/husk/fs";

    /// Where the volumes of `SetupPodRequest.volumes` are found: `VOLUMES/<name>`.
    pub const VOLUMES: &str = "/run/husk/volumes";

    /// Where containers live: `CONTAINERS/<id>/rootfs` is a container's root.
    pub const CONTAINERS: &str = "/run/husk/containers";

    /// A file in a container's directory, `CONTAINERS/<id>/TERMINATION_LOG`: the agent makes it
    /// empty and writable for everybody, the container's configuration can bind it where the
    /// container is to leave its last words, and `ReadFile` finds it there after the end, too.
    pub const TERMINATION_LOG: &str = "termination-log";

    /// The pod's shared memory (`/dev/shm` of its containers).
    pub const SHM: &str = "/run/husk/shm";

    /// Files that the agent writes in `SetupPod` and that containers bind over their own:
    /// `ETC/hostname`, `ETC/hosts` and `ETC/resolv.conf`.
    pub const ETC: &str = "/run/husk/etc";

    /// I/O port to which the agent writes one of [`signal`], for what the VMM alone can know or do.
    pub const SIGNAL_PORT: u16 = 0x0600;

    /// Bytes written to [`SIGNAL_PORT`].
    pub mod signal {
        /// The agent's first instruction.
        pub const INIT: u8 = 0x01;
        /// The agent is ready for requests.
        pub const READY: u8 = 0x02;
        /// Power the VM off, now.
        pub const POWER_OFF: u8 = 0x10;
        /// The guest wants a reboot: the VM ends, and that is reported as a reboot.
        pub const REBOOT: u8 = 0x11;
    }
}

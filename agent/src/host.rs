//! What is on the other side of the VM's border; or, where the agent is tested without a VM, what
//! stands for it.

use std::path::{Path, PathBuf};

use husk_proto::guest;
use rustix::fs::{Mode, OFlags};

use crate::sys;
use crate::transport::Transport;

/// The environment variable that makes the agent run outside a VM, for tests: a directory with a
/// Unix socket `<port>` for each port of the host, a directory `disk-<serial>` for each disk that is not
/// a real one, and a directory `shares` for what the host shares.
/// The kernel passes nothing of that name to a guest's init unless it is told to.
const TEST_DIRECTORY: &str = "HUSK_AGENT_TEST_DIR";

/// The host, as the agent sees it.
#[derive(Debug, Clone)]
pub(crate) enum Host {
    /// The VMM: vsock, virtio disks, the signal port.
    Vm,
    /// A directory.
    Test(PathBuf),
}

impl Host {
    /// The host of this process, by its environment.
    pub(crate) fn of_environment() -> Self {
        let Some(directory) = std::env::var_os(TEST_DIRECTORY) else { return Self::Vm };
        // By descriptor, because the agent leaves the root in which the path is valid. It is kept
        // for the life of the process.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(Path::new(&directory), flags, Mode::empty()) {
            Ok(fd) => {
                use std::os::fd::IntoRawFd;
                Self::Test(PathBuf::from(format!("/proc/self/fd/{}", fd.into_raw_fd())))
            }
            Err(_) => Self::Test(PathBuf::from(directory)),
        }
    }

    /// How the host is reached.
    pub(crate) fn transport(&self) -> Transport {
        match self {
            Self::Vm => Transport::Vsock,
            Self::Test(directory) => Transport::Unix(directory.clone()),
        }
    }

    /// Tells the VMM what it alone can know or do: one of [`guest::signal`].
    pub(crate) fn signal(&self, value: u8) {
        match self {
            // Under another VMM there may be no such port; then nobody listens, and that is all.
            Self::Vm => {
                let _told = sys::write_port(guest::SIGNAL_PORT, value);
            }
            Self::Test(_) => {}
        }
    }

    /// Ends the VM. Returns in a test only.
    pub(crate) fn power_off(&self) {
        self.signal(guest::signal::POWER_OFF);
        if matches!(self, Self::Vm) {
            // Under another VMM.
            let _impossible = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        }
    }
}

//! `/dev/kvm`: opening it, with errors that say what to do.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The device.
pub const DEVICE: &str = "/dev/kvm";

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KvmError {
    /// There is no such device.
    #[error(
        "{path} does not exist: KVM is not available on this host. Load its module (`modprobe \
         kvm_intel` or `modprobe kvm_amd`); if that fails, enable virtualization (VT-x or AMD-V) in \
         the firmware, or, if this host is a virtual machine, nested virtualization on its host"
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// It may not be opened by this user.
    #[error(
        "no permission to open {path}. Run as root, or become a member of the device's group \
         (`usermod -aG kvm USER`, then log in again)"
    )]
    Permission {
        /// The device.
        path: PathBuf,
    },
    /// It exists but no driver answers.
    #[error(
        "{path} exists but nothing stands behind it. Load the module (`modprobe kvm_intel` or \
         `modprobe kvm_amd`); `dmesg | grep kvm` says why it does not load"
    )]
    NoDriver {
        /// The device.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot open {path}")]
    Open {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Opens `/dev/kvm` (or what stands for it) for reading and writing.
///
/// # Errors
/// [`KvmError`].
pub fn open(path: &Path) -> Result<OwnedFd, KvmError> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let path = path.to_owned();
        match errno {
            Errno::NOENT => KvmError::Missing { path },
            Errno::ACCESS | Errno::PERM => KvmError::Permission { path },
            Errno::NODEV | Errno::NXIO => KvmError::NoDriver { path },
            source => KvmError::Open { path, source },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_load() {
        let path = PathBuf::from("/nonexistent/kvm");
        let error = open(&path).expect_err("there is none");
        assert_eq!(error, KvmError::Missing { path });
        assert!(error.to_string().contains("modprobe kvm_intel"));
    }

    #[test]
    fn a_device_that_is_none_is_told_as_what_it_is() {
        let path = PathBuf::from("/");
        assert_eq!(
            open(&path).expect_err("a directory"),
            KvmError::Open { path, source: Errno::ISDIR }
        );
    }
}

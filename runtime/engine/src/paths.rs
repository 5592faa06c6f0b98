//! Where things lie on the host: the engine's configuration.

use std::path::{Path, PathBuf};

/// What the engine needs to know of its host. Plain data; nothing is looked at before it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What outlives pods: images, templates of disks; and the pods' scratch disks, which have no
    /// name and so vanish with the pod. A disk-backed file system.
    pub state_dir: PathBuf,
    /// Where a running pod's directory is made: short-lived, small.
    pub run_dir: PathBuf,
    /// The guest kernel: an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initial RAM file system, which holds the agent: an uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// KVM's device: `/dev/kvm` ([`crate::vm::kvm::DEVICE`]), except in tests.
    pub kvm: PathBuf,
    /// The VMM's executable, `husk-vmm`.
    pub vmm: PathBuf,
    /// The file server's executable, `husk-fs`, for pods that share files with the host.
    pub file_server: PathBuf,
    /// Size of each pod's scratch disk in bytes; it is sparse.
    pub scratch_bytes: u64,
}

impl Config {
    /// Where images are kept.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.state_dir.join("images")
    }

    /// Where prepared empty file systems are kept.
    #[must_use]
    pub fn templates_dir(&self) -> PathBuf {
        self.state_dir.join("templates")
    }

    /// Where the pods' writable disks are made.
    #[must_use]
    pub fn scratch_dir(&self) -> PathBuf {
        self.state_dir.join("scratch")
    }

    /// Where the records of pods are kept.
    #[must_use]
    pub fn records_dir(&self) -> PathBuf {
        self.state_dir.join("pods")
    }

    /// Where the directories of running pods are.
    #[must_use]
    pub fn pods_dir(&self) -> PathBuf {
        self.run_dir.join("pods")
    }
}

/// Names of what belongs to husk beside its executables.
pub mod names {
    /// The VMM.
    pub const VMM: &str = "husk-vmm";
    /// The file server.
    pub const FILE_SERVER: &str = "husk-fs";
    /// The guest kernel.
    pub const KERNEL: &str = "vmlinux";
    /// The guest's initial RAM file system.
    pub const INITRAMFS: &str = "initramfs.cpio";
}

/// Where a file of this name is expected for an executable that lies in `bin`: the first that
/// exists of `bin/../share/husk/NAME`, `bin/../share/NAME` and `bin/NAME`; the first of them if
/// none does, so that an error can name it.
#[must_use]
pub fn shared_file(bin: &Path, name: &str) -> PathBuf {
    let prefix = bin.parent().unwrap_or(bin);
    let places =
        [prefix.join("share/husk").join(name), prefix.join("share").join(name), bin.join(name)];
    places.iter().find(|place| place.exists()).unwrap_or(&places[0]).clone()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_file_is_found_beside_the_executable_or_in_share() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("bin");
        std::fs::create_dir_all(root.path().join("share/husk")).unwrap();
        std::fs::create_dir(&bin).unwrap();
        let installed = root.path().join("share/husk/vmlinux");
        assert_eq!(shared_file(&bin, "vmlinux"), installed, "named although it does not exist");
        std::fs::write(bin.join("vmlinux"), "").unwrap();
        assert_eq!(shared_file(&bin, "vmlinux"), bin.join("vmlinux"));
        std::fs::write(root.path().join("share/vmlinux"), "").unwrap();
        assert_eq!(shared_file(&bin, "vmlinux"), root.path().join("share/vmlinux"));
        std::fs::write(&installed, "").unwrap();
        assert_eq!(shared_file(&bin, "vmlinux"), installed);
    }
}

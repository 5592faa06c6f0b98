//! Where the binaries under test lie.

use std::path::PathBuf;

/// The product tree: `$HUSK_TREE`, or where the test host has it.
#[must_use]
pub fn tree() -> PathBuf {
    std::env::var_os("HUSK_TREE").map_or_else(|| PathBuf::from("/opt/husk"), PathBuf::from)
}

/// A program of the tree.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    tree().join("bin").join(name)
}

/// The guest kernel.
#[must_use]
pub fn kernel() -> PathBuf {
    tree().join("share/vmlinux")
}

/// The guest's initramfs.
#[must_use]
pub fn initramfs() -> PathBuf {
    tree().join("share/initramfs.cpio")
}

//! What the tests in microVMs share: driving the built binaries as their users do.
//!
//! The tests themselves are in `tests/`, each with its host half and its guest half in one file. They
//! run where `/dev/kvm` is real: in the test host, or natively. Nothing here asserts anything about
//! time: the machine may be a hundred times slower than the author's.
//!
//! Not for: product code. It links none of it but the protocols.
#![deny(unsafe_code)]

pub mod background;
pub mod files;
pub mod initramfs;
pub mod kernel;
pub mod place;
pub mod pods;
pub mod registry;
pub mod tap;
pub mod vmm;

//! The virtual machine monitor of husk.
//!
//! What it is for: everything between `/dev/kvm` and the guest: memory, boot, vCPUs, devices. One
//! process (`husk-vmm`) runs one virtual machine; threads and eventfds, no async runtime. It gets
//! its configuration and every descriptor over one socket (`husk-vmm-api`) and opens no path.
//!
//! What it is not for: pods, containers, images, networks. It does not know what they are.
//!
//! The guest is hostile. On every path that its bytes reach (queues, registers, packets) nothing
//! panics, indexes, overflows, allocates or loops without a named bound; the lints below keep it so.
//! A guest's fault resets the device ([`devices::virtio`]); a host's fault ends the VM.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::panic
    )
)]

pub mod arch;
pub mod boot;
pub mod counters;
pub mod devices;
pub mod machine;
pub mod memory;

/// Guest memory: shared by reference between vCPUs and devices.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

//! A pod's network on the host's side.
//!
//! What it is for, from the bottom up:
//! - [`netns`]: the pod's network namespace, a path;
//! - [`cni`]: the plugins that put interfaces into it, and take them out again;
//! - [`join`](mod@join): the way of every such interface into the virtual machine, a tap, and what has
//!   to be told to the guest about it;
//! - [`follow`]: what changes later;
//! - [`localhost`]: the TCP connections to the namespace's loopback addresses, for the guest's servers;
//! - [`pod`]: all of it for one pod, with a record on disk, so that it is taken back after a crash.
//!
//! What it is not for: the virtual machine, which gets the taps as descriptors, and the guest, in
//! which the agent makes the interfaces look as they do here. Nothing is asynchronous: everything
//! blocks, plugins for as long as [`cni::Limits`] lets them, and is called from threads that may.
//!
//! To support another capability of CNI, see [`cni::Capabilities`]; another field of configurations,
//! `cni/config.rs`; another property of interfaces, `husk-netlink` and [`join`](mod@join).
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod cni;
pub mod follow;
pub mod join;
pub mod localhost;
mod lookup;
pub mod netns;
pub mod pod;
mod record;
mod sys;

pub use husk_netlink as netlink;

//! The engine: what happens to a pod, whatever door it came through.
//!
//! What it is for: the types of pods and containers ([`types`]), their making from Pod manifests
//! ([`manifest`]), the OCI configuration made from them ([`oci`]), and running them in microVMs.
//! What it is not for: the command line, containerd's and the kubelet's protocols (the doors), or
//! anything that happens inside the guest (the agent).
// Exceptions are in `vm`: what a child does between fork and exec, and a descriptor for tokio.
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

mod channel;
mod downward;
pub mod guest;
pub mod holder;
pub mod manifest;
pub mod network;
pub mod oci;
pub mod paths;
pub mod pod;
mod probe;
pub mod sizing;
pub mod storage;
mod task;
pub mod types;
pub mod vm;

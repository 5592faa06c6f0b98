//! The half that runs on this machine: builds the image, boots it, drives it.

pub(crate) mod client;
pub(crate) mod image;
pub(crate) mod instance;
pub(crate) mod push;
pub(crate) mod qemu;
pub(crate) mod suite;
pub(crate) mod supervisor;

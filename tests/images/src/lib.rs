//! Real container images for the tests: OCI image layouts made from Debian packages, and a registry
//! that serves them on loopback inside the test host.
//!
//! Not a builder for anybody's images: four recipes, and nothing to configure.

#![forbid(unsafe_code)]

pub mod archive;
pub mod layer;
pub mod layout;
pub mod recipe;
pub mod registry;

//! What the tools of the tests share: the cache outside of the checkout, progress, Debian packages.
//!
//! The test host itself is the binary `husk-testhost`. Not for the product, which installs from what
//! it is given and caches nothing here.

#![forbid(unsafe_code)]

pub mod cache;
pub mod debian;
pub mod progress;

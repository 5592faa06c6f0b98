//! Container images: imported, verified layer by layer, and kept as one read-only EROFS blob for each
//! layer, which all pods share.
//!
//! What it is for: [`Store`], which takes images in, knows them by reference and gives out their
//! configuration and layers. What it is not for: mounting anything, deciding how a container runs,
//! or printing. No image file ever touches the host as a file: a layer goes from its archive
//! straight into a blob ([`Limits`] bounds what a hostile one may cost).
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
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
        clippy::cast_possible_wrap
    )
)]

mod digest;
mod document;
mod erofs;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod import;
mod layer;
mod limits;
mod progress;
mod pull;
mod reference;
mod store;

pub use digest::{Digest, DigestError};
pub use document::{DocumentError, Platform, PlatformError};
pub use erofs::{TreeError, WriteError};
pub use husk_archive::tar::TarError;
pub use import::{ImportError, ImportOptions, Imported};
pub use layer::{LayerError, PathFault};
pub use limits::Limits;
pub use progress::{Event, NoProgress, Progress};
pub use pull::{Credentials, PullError, PullOptions};
pub use reference::{Reference, ReferenceError};
pub use store::{Collected, Image, ImageSummary, Layer, Store, StoreError};

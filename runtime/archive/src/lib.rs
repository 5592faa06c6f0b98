//! tar archives.
//!
//! What it is for: reading what anybody made ([`tar`]), making archives of files ([`pack`]), and
//! unpacking archives into a directory and nowhere else ([`unpack`]). Used on the host, for image
//! layers and for `husk cp`, and in the guest, which sees the other end of `husk cp`. What it is not
//! for: compression; and nothing here is asynchronous.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

pub mod pack;
pub mod tar;
pub mod unpack;
mod write;

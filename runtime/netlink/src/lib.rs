//! A small rtnetlink: what a pod's network needs of it, on the host and in the guest.
//!
//! What it is for: links, addresses, routes and neighbours as plain values that are read from one
//! kernel and set in another ([`link`], [`address`], [`route`], [`neighbour`]), and the redirection of
//! everything that arrives on one interface to another ([`redirect`]); notice of changes ([`watch`]). What it is not for: deciding
//! what of that is wanted.
//!
//! It is synchronous, because a socket belongs to the network namespace of the thread that opened
//! it, and small, because it is part of the agent, which lies in every pod's memory
//! (docs/adr/0020). [`wire`] has the format; a new kind of object is a module that builds messages
//! and reads attributes with it.
//!
//! The other side is a kernel. What it answers is nevertheless read as bytes from outside: nothing
//! here panics, and a reply that makes no sense is an error. (`husk-network` has the tests against a
//! kernel: it can make namespaces.)
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

pub mod address;
mod family;
pub mod link;
pub mod neighbour;
pub mod redirect;
pub mod route;
mod socket;
pub mod watch;
pub mod wire;

pub use socket::{NetlinkError, Socket};

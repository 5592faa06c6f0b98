//! The protocol between a pod's process (the parent) and its `husk-vmm` (the child).
//!
//! One `SOCK_SEQPACKET` Unix socket pair per virtual machine. Each packet is one JSON message;
//! descriptors travel beside it (`SCM_RIGHTS`) and a message refers to them by their position
//! ([`FdIndex`]). The VMM opens no path: whatever it uses arrives here.
//!
//! What it is for: the types of the messages ([`Request`], [`Event`]), their limits, and
//! [`Channel`], which carries them. What it is not for: starting the process, or interpreting what
//! the messages mean; those are the engine's and the VMM's.
//!
//! ```text
//!  pod process                                   husk-vmm
//!     │  Request::Boot(VmConfig) + fds              │
//!     │ ──────────────────────────────────────────▶ │  builds and runs the VM
//!     │ ◀────────────────────────── Event::Phase    │  (several)
//!     │ ◀───────────── Event::VsockAccepted + fd    │  the guest connected to a host port
//!     │  Request::VsockConnect + fd                 │
//!     │ ──────────────────────────────────────────▶ │
//!     │ ◀────────────────── Event::VsockConnected   │
//!     │ ◀────────────────────────── Event::Exited   │  the last message; then end of file
//! ```
//!
//! `husk-fs`, which serves a VM's file-system device, gets what it works on in the same way: one
//! [`ServeFiles`], and no answer.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

mod channel;
mod files;
mod messages;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_MESSAGE_LEN, Received};
pub use files::{MAX_SHARES, ServeFiles, SharedPath};
pub use messages::*;

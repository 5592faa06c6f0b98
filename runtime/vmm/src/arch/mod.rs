//! What depends on the processor architecture, and nothing else.
//!
//! To port husk: a module beside [`x86_64`] with the same items, exported here under the same names.

mod x86_64;

pub use x86_64::*;

//! A writer of EROFS file systems that needs no other file system: file data goes to the blob as
//! it comes, names and attributes are kept in memory and written behind it.

mod directory;
mod format;
#[cfg(test)]
pub(crate) mod reader;
mod tree;
mod writer;

pub(crate) use format::{BLOCK_SIZE, blob_size, encode_device};
pub(crate) use tree::{Metadata, NodeId, NodeKind, Tree, TreeLimits};
pub(crate) use writer::{BlobStats, BlobWriter};

pub use tree::TreeError;
pub use writer::WriteError;

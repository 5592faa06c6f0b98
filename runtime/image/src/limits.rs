//! Bounds on what an image may make this crate read, hold or write.

use crate::erofs::TreeLimits;

/// Bounds on hostile or broken images. The defaults are well above any real image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one manifest, index or image configuration (JSON).
    pub max_document_bytes: u64,
    /// Manifests in one index, and images in one archive.
    pub max_index_entries: usize,
    /// Layers of one image.
    pub max_layers: usize,
    /// Bytes of one layer, uncompressed.
    pub max_layer_bytes: u64,
    /// How many times larger than its compressed form a layer may be, once it is larger than
    /// [`Limits::bomb_free_bytes`].
    pub max_ratio: u64,
    /// See [`Limits::max_ratio`].
    pub bomb_free_bytes: u64,
    /// Files and directories of one layer. Each takes some 200 bytes of memory while the layer is
    /// converted.
    pub max_layer_entries: u32,
    /// Bytes of all names and symbolic links' targets in one layer; held in memory.
    pub max_layer_name_bytes: u64,
    /// Bytes of all extended attributes in one layer; held in memory.
    pub max_layer_xattr_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_document_bytes: 4 << 20,
            max_index_entries: 1024,
            max_layers: 127,
            max_layer_bytes: 64 << 30,
            max_ratio: 200,
            bomb_free_bytes: 1 << 30,
            max_layer_entries: 2_000_000,
            max_layer_name_bytes: 256 << 20,
            max_layer_xattr_bytes: 128 << 20,
        }
    }
}

impl Limits {
    pub(crate) fn tree(&self) -> TreeLimits {
        TreeLimits {
            max_entries: self.max_layer_entries,
            max_name_bytes: self.max_layer_name_bytes,
            max_xattr_bytes: self.max_layer_xattr_bytes,
        }
    }
}

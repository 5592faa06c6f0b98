//! What a long operation reports while it runs.

use crate::digest::Digest;

/// A step of an import or pull, or of one layer in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The image's layers are known; their events follow, from several layers at once.
    Layers {
        /// How many there are, those that the store has included.
        count: usize,
    },
    /// The layer is in the store already, and is not read.
    LayerExists {
        /// Which.
        diff_id: Digest,
    },
    /// Reading of a layer starts, or starts again after a failed download.
    LayerStarted {
        /// Which.
        diff_id: Digest,
        /// Its compressed bytes.
        size: u64,
    },
    /// So many of the layer's compressed bytes have been read and converted.
    LayerProgress {
        /// Which.
        diff_id: Digest,
        /// The total so far.
        bytes: u64,
    },
    /// The layer is in the store.
    LayerDone {
        /// Which.
        diff_id: Digest,
        /// Bytes of its blob.
        size: u64,
    },
}

/// Receives [`Event`]s. Called from several threads, often: it must not block.
pub trait Progress: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// For callers that want no events.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _event: Event) {}
}

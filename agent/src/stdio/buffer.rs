//! The buffers of streams that are flowing.
//!
//! A stream has one only while it has bytes in hand, so that a hundred idle streams weigh nothing.
//! But a stream that is busy takes and gives one back for each piece: the last one given back is
//! kept, so that it need not be made and cleared each time, which costs as much as the copying.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// The most that is in the agent for one stream: as much as a pipe holds.
pub(super) const BYTES: usize = 64 * 1024;

thread_local! {
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// A buffer of [`BYTES`], with whatever was in it before.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn take() -> Self {
        Buffer(SPARE.take().unwrap_or_else(|| vec![0; BYTES].into_boxed_slice()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Destructors of the thread may run after its variables are gone: then there is none to keep.
        let _gone = SPARE.try_with(|spare| spare.set(Some(std::mem::take(&mut self.0))));
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_buffer_is_kept_and_each_stream_has_its_own() {
        let (one, other) = (Buffer::take(), Buffer::take());
        let (first, second) = (one.as_ptr(), other.as_ptr());
        assert_ne!(first, second);
        drop(one);
        drop(other);
        let kept = Buffer::take();
        assert_eq!((kept.as_ptr(), kept.len()), (second, BYTES));
        assert_eq!(Buffer::take().len(), BYTES);
    }
}

//! The cache outside of the checkout.

pub mod files;
pub mod paths;

use sha2::{Digest, Sha256};

/// A key made from everything that a cached thing is made from.
#[derive(Debug, Default)]
pub struct Key(Sha256);

impl Key {
    /// An empty key.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part, with its length, so that no two lists of parts look alike.
    pub fn add(&mut self, part: impl AsRef<[u8]>) {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// 16 hexadecimal digits, for a directory's name.
    #[must_use]
    pub fn finish(self) -> String {
        let mut digits = hex::encode(self.0.finalize());
        digits.truncate(16);
        digits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[&str]) -> String {
        let mut key = Key::new();
        parts.iter().for_each(|part| key.add(part));
        key.finish()
    }

    #[test]
    fn a_key_depends_on_every_part_and_its_borders() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_eq!(key(&[]).len(), 16);
    }
}

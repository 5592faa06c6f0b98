//! SHA-256 digests as OCI writes them, and readers that compute them as bytes pass.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// Why a string is not a digest that this crate can verify.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    /// Another algorithm than SHA-256, the only one that registries must support.
    #[error("the digest {text:?} is not sha256, the only algorithm supported")]
    Algorithm {
        /// What was given.
        text: String,
    },
    /// Not 64 lower-case hexadecimal digits.
    #[error("the digest {text:?} is not sha256: and 64 lower-case hexadecimal digits")]
    Malformed {
        /// What was given.
        text: String,
    },
}

/// A SHA-256 digest. Displayed, parsed and serialised as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 hexadecimal digits alone, which are safe as a file name.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 16 bytes, marked as a UUID of version 8 (RFC 9562 section 5.8).
    pub(crate) fn to_uuid(self) -> [u8; 16] {
        let mut uuid = [0; 16];
        for (position, (to, from)) in uuid.iter_mut().zip(self.0).enumerate() {
            *to = match position {
                6 => (from & 0x0F) | 0x80,
                8 => (from & 0x3F) | 0x80,
                _ => from,
            };
        }
        uuid
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // What is quoted in an error may come from anywhere.
        let quoted = || text.chars().take(100).collect();
        let digits = text
            .strip_prefix("sha256:")
            .ok_or_else(|| DigestError::Algorithm { text: quoted() })?;
        let lower = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        if !lower || hex::decode_to_slice(digits, &mut bytes).is_err() {
            return Err(DigestError::Malformed { text: quoted() });
        }
        Ok(Self(bytes))
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A bound on a stream was exceeded. Travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeterError {
    #[error("more than the {max} bytes that {what} may have")]
    TooLong { max: u64, what: &'static str },
    #[error("{max_ratio} times more than the compressed bytes: taken for a decompression bomb")]
    Bomb { max_ratio: u64 },
}

/// A bound on how much more comes out of a decompressor than went in.
#[derive(Debug)]
pub(crate) struct RatioLimit {
    /// What went in so far.
    pub(crate) compressed: Rc<Cell<u64>>,
    pub(crate) max_ratio: u64,
    /// Below this many bytes any ratio is accepted.
    pub(crate) free_bytes: u64,
}

/// Counts, hashes and bounds what is read through it.
pub(crate) struct Meter<'a, R> {
    inner: R,
    hash: Sha256,
    count: Rc<Cell<u64>>,
    max: u64,
    what: &'static str,
    ratio: Option<RatioLimit>,
    on_bytes: Option<&'a dyn Fn(u64)>,
}

impl<'a, R: Read> Meter<'a, R> {
    /// Fails a read once more than `max` bytes came; `what` names the stream in the error.
    pub(crate) fn new(inner: R, max: u64, what: &'static str) -> Self {
        let count = Rc::new(Cell::new(0));
        Self { inner, hash: Sha256::new(), count, max, what, ratio: None, on_bytes: None }
    }

    pub(crate) fn with_ratio(mut self, ratio: RatioLimit) -> Self {
        self.ratio = Some(ratio);
        self
    }

    /// Calls `on_bytes` with the total after each read.
    pub(crate) fn with_callback(mut self, on_bytes: &'a dyn Fn(u64)) -> Self {
        self.on_bytes = Some(on_bytes);
        self
    }

    /// The number of bytes so far, as it changes.
    pub(crate) fn counter(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.count)
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.get()
    }

    /// Reads to the end, and returns the digest of everything.
    pub(crate) fn finish(&mut self) -> io::Result<Digest> {
        io::copy(self, &mut io::sink())?;
        Ok(Digest(self.hash.clone().finalize().into()))
    }
}

impl<R: Read> Read for Meter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..read).unwrap_or_default());
        let count = self.count.get().saturating_add(read as u64);
        self.count.set(count);
        if count > self.max {
            let (max, what) = (self.max, self.what);
            return Err(io::Error::other(MeterError::TooLong { max, what }));
        }
        if let Some(RatioLimit { compressed, max_ratio, free_bytes }) = &self.ratio
            && count > *free_bytes
            && count > compressed.get().saturating_mul(*max_ratio)
        {
            return Err(io::Error::other(MeterError::Bomb { max_ratio: *max_ratio }));
        }
        if let Some(on_bytes) = self.on_bytes {
            on_bytes(count);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_survives_text_and_refuses_anything_else() {
        let digest = Digest::of(b"abc");
        let text = digest.to_string();
        assert_eq!(text, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(text.parse(), Ok(digest));
        for bad in ["", "sha256:", "sha256:../../etc/passwd", &text.to_uppercase(), &text[..70]] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?}");
        }
        assert!(matches!("sha512:00".parse::<Digest>(), Err(DigestError::Algorithm { .. })));
    }

    #[test]
    fn meter_fails_after_its_limit_and_hashes_what_passed() {
        let mut exact = Meter::new(&b"abc"[..], 3, "it");
        assert_eq!(exact.finish().unwrap(), Digest::of(b"abc"));
        assert_eq!(exact.count(), 3);
        let error = Meter::new(&b"abcd"[..], 3, "it").finish().unwrap_err();
        assert_eq!(error.to_string(), "more than the 3 bytes that it may have");
    }
}

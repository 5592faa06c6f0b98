//! Names of images, completed as docker and containerd complete them.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::{ParseError, Reference as OciReference};

use crate::digest::{Digest, DigestError};

/// Longest reference that is looked at.
const MAX_LEN: usize = 1024;

/// Why a string is no reference.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The syntax is wrong.
    #[error("{text:?} is not an image reference")]
    Syntax {
        /// What was given.
        text: String,
        /// Why not.
        #[source]
        source: ParseError,
    },
    /// Longer than any reference.
    #[error("an image reference of {len} bytes is longer than {MAX_LEN}")]
    TooLong {
        /// How long it is.
        len: usize,
    },
    /// The digest in it cannot be verified.
    #[error("the digest in the image reference {text:?} cannot be used")]
    Digest {
        /// What was given.
        text: String,
        /// Why not.
        #[source]
        source: DigestError,
    },
}

/// A complete reference: `busybox` has become `docker.io/library/busybox:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(OciReference);

impl Reference {
    /// The registry's host and port, as in the reference.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Where the registry is: not the name in the reference for the default registry.
    pub(crate) fn registry_host(&self) -> &str {
        self.0.resolve_registry()
    }

    /// What `docker login` keeps the registry's credentials under.
    pub(crate) fn credentials_key(&self) -> String {
        let (name, host) = (self.0.registry(), self.0.resolve_registry());
        if name == host { name.to_owned() } else { format!("https://{host}/v1/") }
    }

    /// The repository in the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The digest, of a reference that pins one.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    /// The tag, if there is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.len() > MAX_LEN {
            return Err(ReferenceError::TooLong { len: text.len() });
        }
        let reference: OciReference = text
            .parse()
            .map_err(|source| ReferenceError::Syntax { text: text.to_owned(), source })?;
        if let Some(digest) = reference.digest() {
            digest
                .parse::<Digest>()
                .map_err(|source| ReferenceError::Digest { text: text.to_owned(), source })?;
        }
        Ok(Self(reference))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_completed() {
        for (given, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("someone/tool", "docker.io/someone/tool:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("127.0.0.1:5000/web", "127.0.0.1:5000/web:latest"),
            ("registry.example/husk/web:1", "registry.example/husk/web:1"),
        ] {
            assert_eq!(given.parse::<Reference>().unwrap().to_string(), full);
        }
        let digest = Digest::of(b"x");
        let pinned: Reference = format!("busybox@{digest}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("docker.io/library/busybox@{digest}"));
        assert_eq!(pinned.digest(), Some(digest));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in ["", "UPPER", "a b", "../x", "a@sha256:12", &"a".repeat(2000)] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }
}

//! Names of images, completed as docker and containerd complete them.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference as OciReference;

use crate::digest::{Digest, DigestError};

/// Longest reference that is looked at.
const MAX_LEN: usize = 1024;

/// Longest repository and longest tag (distribution-spec, "Pulling manifests").
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;

/// The registry of references that name none, the name that it once had, and where repositories of
/// a single component are in it.
const DEFAULT_REGISTRY: &str = "docker.io";
const LEGACY_REGISTRY: &str = "index.docker.io";
const OFFICIAL: &str = "library";

/// The tag of references that have neither tag nor digest.
const DEFAULT_TAG: &str = "latest";

/// Why a string is no reference.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The syntax is wrong.
    #[error("{text:?} is not an image reference: {reason}")]
    Syntax {
        /// What was given.
        text: String,
        /// Why not.
        reason: &'static str,
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
        let syntax = |reason| ReferenceError::Syntax { text: text.to_owned(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            digest
                .parse::<Digest>()
                .map_err(|source| ReferenceError::Digest { text: text.to_owned(), source })?;
        }
        // A colon before the last slash is that of a registry's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if !tag.is_none_or(is_tag) {
            return Err(syntax("the tag must be 1 to 128 letters, digits, _, . or -"));
        }
        let (registry, repository) = split_registry(name);
        if !is_registry(registry) {
            return Err(syntax("the registry is not a host name with or without a port"));
        }
        if !repository.split('/').all(is_component) {
            return Err(syntax(
                "the repository must be lowercase letters and digits, with single separators",
            ));
        }
        let registry = if registry == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { registry };
        let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
        let repository =
            if official { format!("{OFFICIAL}/{repository}") } else { repository.to_owned() };
        if repository.len() > MAX_REPOSITORY {
            return Err(syntax("the repository is longer than 255 bytes"));
        }
        let registry = registry.to_owned();
        Ok(Self(match (tag, digest) {
            (Some(tag), Some(digest)) => OciReference::with_tag_and_digest(
                registry,
                repository,
                tag.to_owned(),
                digest.to_owned(),
            ),
            (None, Some(digest)) => {
                OciReference::with_digest(registry, repository, digest.to_owned())
            }
            (tag, None) => {
                OciReference::with_tag(registry, repository, tag.unwrap_or(DEFAULT_TAG).to_owned())
            }
        }))
    }
}

// The grammar of github.com/distribution/reference, by hand: oci-spec parses it too, but by a
// regular expression that takes 40 ms to compile, which is as long as all else that `husk run` does
// on the host.

/// The registry and the repository of a name. What looks like a host name is one.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) => (first, rest),
        _ => (DEFAULT_REGISTRY, name),
    }
}

/// `HOST` or `HOST:PORT`.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(label)
        && port
            .is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Letters and digits in lower case, separated by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| plain(*byte));
    let bytes = text.as_bytes();
    ends(bytes.first())
        && ends(bytes.last())
        && bytes.split(|byte| plain(*byte)).all(|between| {
            matches!(between, b"" | b"." | b"_" | b"__") || between.iter().all(|byte| *byte == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
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

    proptest::proptest! {
        /// What this accepts, oci-spec understands in the same way.
        #[test]
        fn references_are_understood_as_by_oci_spec(
            text in "([a-zA-Z0-9.-]{0,6}(:[0-9a]{0,4})?/)?[a-z0-9._/-]{0,8}(:[a-zA-Z0-9_.-]{0,5})?",
        ) {
            let theirs = OciReference::try_from(text.as_str());
            match text.parse::<Reference>() {
                Ok(ours) => proptest::prop_assert_eq!(Some(ours.0), theirs.ok()),
                // It takes capital letters in a repository's first component, which no registry
                // does.
                Err(_) => proptest::prop_assert!(
                    theirs.is_err() || text.contains(|c: char| c.is_ascii_uppercase()),
                    "{} was refused", text
                ),
            }
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "UPPER",
            "a b",
            "../x",
            "a@sha256:12",
            &"a".repeat(2000),
            "a..b",
            "a___b",
            "-a",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:-x",
            "a.b:/c",
            ".b/c",
            "a:x:y",
            &"a".repeat(256),
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }
}

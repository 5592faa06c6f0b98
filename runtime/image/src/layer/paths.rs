//! Paths of a layer's entries, and the names in them that mean something else.

use husk_archive::tar::Entry;

/// Why a path has no place in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// It could lead out of the layer.
    #[error("it contains '..'")]
    ParentComponent,
    /// Longer than any Linux file system allows.
    #[error("a part of it is longer than 255 bytes")]
    ComponentTooLong,
    /// `.wh.` with nothing, `.` or `..` behind it, or inside the path.
    #[error("it contains a whiteout that names nothing")]
    BadWhiteout,
    /// The layer's root cannot be anything but a directory.
    #[error("it is the layer's root, which must be a directory")]
    Root,
}

const NAME_MAX: usize = 255;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_WHITEOUT: &[u8] = b".wh..wh..opq";
/// What AUFS kept for itself in layers; other runtimes skip it as well.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// Where an entry goes: the names from the layer's root down.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target<'entry> {
    Root,
    File {
        parents: Vec<&'entry [u8]>,
        name: &'entry [u8],
    },
    /// `name`, which lower layers may have, is gone.
    Whiteout {
        parents: Vec<&'entry [u8]>,
        name: &'entry [u8],
    },
    /// Everything that lower layers have in this directory is gone.
    Opaque {
        directory: Vec<&'entry [u8]>,
    },
    /// Of no meaning outside AUFS.
    Ignored,
}

/// Classifies an entry by its path.
pub(super) fn target(entry: &Entry) -> Result<Target<'_>, PathFault> {
    let mut parents = components(&entry.path)?;
    let Some(name) = parents.pop() else { return Ok(Target::Root) };
    if parents.iter().any(|part| part.starts_with(AUFS_PREFIX)) {
        return Ok(Target::Ignored);
    }
    if parents.iter().any(|part| part.starts_with(WHITEOUT_PREFIX)) {
        return Err(PathFault::BadWhiteout);
    }
    if name == OPAQUE_WHITEOUT {
        return Ok(Target::Opaque { directory: parents });
    }
    if name.starts_with(AUFS_PREFIX) {
        return Ok(Target::Ignored);
    }
    match name.strip_prefix(WHITEOUT_PREFIX) {
        None => Ok(Target::File { parents, name }),
        Some(b"" | b"." | b"..") => Err(PathFault::BadWhiteout),
        Some(name) => Ok(Target::Whiteout { parents, name }),
    }
}

/// The names of a path. An absolute path counts from the layer's root; `.` and doubled slashes
/// mean nothing.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathFault> {
    let mut parts = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(PathFault::ParentComponent),
            _ if part.len() > NAME_MAX => return Err(PathFault::ComponentTooLong),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_archive::tar::EntryKind;

    fn classify(path: &str) -> Result<String, PathFault> {
        let entry = Entry {
            offset: 0,
            kind: EntryKind::Regular,
            path: path.into(),
            link: Vec::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: 0,
            device: (0, 0),
            xattrs: Vec::new(),
        };
        let join = |parts: &[&[u8]]| String::from_utf8(parts.join(&b'/')).unwrap();
        target(&entry).map(|target| match target {
            Target::Root => "root".into(),
            Target::Ignored => "ignored".into(),
            Target::Opaque { directory } => format!("opaque {}", join(&directory)),
            Target::File { parents, name } => format!("file {} {}", join(&parents), join(&[name])),
            Target::Whiteout { parents, name } => {
                format!("gone {} {}", join(&parents), join(&[name]))
            }
        })
    }

    #[test]
    fn paths_are_taken_from_the_root() {
        for root in ["", "/", "./", ".", "//./"] {
            assert_eq!(classify(root).unwrap(), "root", "{root:?}");
        }
        for path in ["a/b/c", "/a/b/c", "./a//b/./c", "a/b/c/"] {
            assert_eq!(classify(path).unwrap(), "file a/b c", "{path:?}");
        }
    }

    #[test]
    fn parent_components_are_refused_wherever_they_are() {
        for path in ["..", "../a", "a/../b", "/a/..", "a/../../etc/passwd"] {
            assert_eq!(classify(path), Err(PathFault::ParentComponent), "{path:?}");
        }
        assert_eq!(classify("a/..b").unwrap(), "file a ..b");
        assert_eq!(classify(&"x".repeat(256)), Err(PathFault::ComponentTooLong));
    }

    #[test]
    fn whiteouts_are_told_from_files() {
        assert_eq!(classify("a/.wh.b").unwrap(), "gone a b");
        assert_eq!(classify("a/.wh..wh..opq").unwrap(), "opaque a");
        assert_eq!(classify(".wh..wh.plnk/1.2").unwrap(), "ignored");
        assert_eq!(classify(".wh..wh.aufs").unwrap(), "ignored");
        for path in [".wh.", "a/.wh..", "a/.wh...", "a/.wh.b/c", "a/.wh.b/.wh..wh..opq"] {
            assert_eq!(classify(path), Err(PathFault::BadWhiteout), "{path:?}");
        }
    }
}

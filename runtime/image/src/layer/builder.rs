//! Applies the entries of a layer's archive, in order, to a tree and a blob.

use std::collections::BTreeSet;
use std::io::{Read, Seek, Write};

use super::paths::{PathFault, Target, components, target};
use super::{LayerError, lossy};
use crate::erofs::{
    BlobStats, BlobWriter, Metadata, NodeId, NodeKind, Tree, TreeError, TreeLimits, encode_device,
};
use husk_archive::tar::{Entry, EntryData, EntryKind};

/// What overlayfs takes for "nothing of the lower layers shows through this directory".
const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";
/// Symbolic links that one path may lead through, as in Linux.
const MAX_SYMLINKS: u32 = 40;
/// Symbolic links that all paths of a layer together may lead through: each costs a walk.
const MAX_LAYER_SYMLINKS: u32 = 1_000_000;

/// Builds the blob of one layer.
pub(super) struct LayerBuilder<W> {
    tree: Tree,
    blob: BlobWriter<W>,
    opaque: BTreeSet<NodeId>,
    symlinks_followed: u32,
    /// Attributes that no Linux file system could hold.
    skipped_xattrs: u64,
}

impl<W: Write + Seek> LayerBuilder<W> {
    pub(super) fn new(blob: BlobWriter<W>, limits: TreeLimits) -> Self {
        let tree = Tree::new(limits);
        Self { tree, blob, opaque: BTreeSet::new(), symlinks_followed: 0, skipped_xattrs: 0 }
    }

    /// Applies one entry; `data` is what its file holds.
    pub(super) fn apply<R: Read>(
        &mut self,
        entry: &Entry,
        data: &mut EntryData<'_, R>,
    ) -> Result<(), LayerError> {
        let target =
            target(entry).map_err(|fault| LayerError::Path { path: lossy(&entry.path), fault })?;
        match target {
            Target::Root if entry.kind == EntryKind::Directory => {
                let metadata = self.metadata(entry)?;
                self.tree.set_metadata(NodeId::ROOT, metadata);
                Ok(())
            }
            Target::Root => {
                let path = lossy(&entry.path);
                Err(LayerError::Path { path, fault: PathFault::Root })
            }
            Target::Ignored => Ok(()),
            Target::Opaque { directory } => {
                let directory = self.make_directories(entry, &directory)?;
                self.opaque.insert(directory);
                Ok(())
            }
            Target::Whiteout { parents, name } => self.white_out(entry, &parents, name),
            Target::File { parents, name } => {
                let parent = self.make_directories(entry, &parents)?;
                self.put(entry, parent, name, data)
            }
        }
    }

    /// Writes what remains of the blob.
    pub(super) fn finish(mut self, uuid: [u8; 16]) -> Result<BlobStats, LayerError> {
        for &directory in &self.opaque {
            self.tree.set_xattr(directory, OPAQUE_XATTR, b"y").map_err(|source| {
                LayerError::Tree { path: "an opaque directory".into(), source }
            })?;
        }
        if self.skipped_xattrs > 0 {
            let count = self.skipped_xattrs;
            tracing::warn!(count, "left out extended attributes that Linux cannot hold");
        }
        self.blob
            .finish(&self.tree, uuid)
            .map_err(|source| LayerError::Write { path: "/".into(), source })
    }

    /// A whiteout hides what lower layers have, never what this layer has: then it only says that
    /// nothing from below is merged into it.
    fn white_out(
        &mut self,
        entry: &Entry,
        parents: &[&[u8]],
        name: &[u8],
    ) -> Result<(), LayerError> {
        let parent = self.make_directories(entry, parents)?;
        match self.tree.child(parent, name) {
            Some(existing) if self.tree.is_directory(existing) => {
                self.opaque.insert(existing);
            }
            Some(_) => {}
            None => {
                let metadata = Metadata::new(0, 0, 0, (0, 0));
                self.insert(entry, parent, name, metadata, NodeKind::CharDevice(0))?;
            }
        }
        Ok(())
    }

    fn put<R: Read>(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        data: &mut EntryData<'_, R>,
    ) -> Result<(), LayerError> {
        if entry.kind == EntryKind::HardLink {
            let target = self.link_target(entry)?;
            return self
                .tree
                .link(parent, name, target)
                .map_err(|source| LayerError::Tree { path: lossy(&entry.path), source });
        }
        let metadata = self.metadata(entry)?;
        let kind = match entry.kind {
            EntryKind::Directory => return self.put_directory(entry, parent, name, metadata),
            EntryKind::Regular => NodeKind::Regular(
                self.blob
                    .file_data(data, entry.size, metadata.xattr_size())
                    .map_err(|source| LayerError::Write { path: lossy(&entry.path), source })?,
            ),
            EntryKind::Symlink if entry.link.is_empty() => {
                return Err(link_error(entry, "it is empty"));
            }
            EntryKind::Symlink => NodeKind::Symlink(entry.link.as_slice().into()),
            EntryKind::CharDevice => NodeKind::CharDevice(device(entry)?),
            EntryKind::BlockDevice => NodeKind::BlockDevice(device(entry)?),
            EntryKind::Fifo => NodeKind::Fifo,
            // Returned above.
            EntryKind::HardLink => return Ok(()),
        };
        self.insert(entry, parent, name, metadata, kind).map(drop)
    }

    /// A directory that exists keeps what is in it.
    fn put_directory(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        metadata: Metadata,
    ) -> Result<(), LayerError> {
        let existing = self.tree.child(parent, name);
        if let Some(existing) = existing
            && self.tree.is_directory(existing)
        {
            self.tree.set_metadata(existing, metadata);
            return Ok(());
        }
        self.new_directory(entry, parent, name, metadata).map(drop)
    }

    /// Makes a directory, opaque if a whiteout of its name came before it.
    fn new_directory(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        metadata: Metadata,
    ) -> Result<NodeId, LayerError> {
        let replaces_whiteout = self
            .tree
            .child(parent, name)
            .is_some_and(|existing| self.tree.node(existing).kind.is_whiteout());
        let kind = NodeKind::Directory(Default::default());
        let directory = self.insert(entry, parent, name, metadata, kind)?;
        if replaces_whiteout {
            self.opaque.insert(directory);
        }
        Ok(directory)
    }

    fn insert(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &[u8],
        metadata: Metadata,
        kind: NodeKind,
    ) -> Result<NodeId, LayerError> {
        self.tree
            .insert(parent, name, metadata, kind)
            .map_err(|source| LayerError::Tree { path: lossy(&entry.path), source })
    }

    fn metadata(&mut self, entry: &Entry) -> Result<Metadata, LayerError> {
        let permissions = u16::try_from(entry.mode & 0o7777).unwrap_or_default();
        let mut metadata = Metadata::new(permissions, entry.uid, entry.gid, entry.mtime);
        for (name, value) in &entry.xattrs {
            let kept =
                self.tree.add_xattr(&mut metadata, name, value).map_err(|source: TreeError| {
                    LayerError::Tree { path: lossy(&entry.path), source }
                })?;
            if !kept {
                self.skipped_xattrs = self.skipped_xattrs.saturating_add(1);
            }
        }
        Ok(metadata)
    }

    /// The file that a hard link refers to: one that came before, in this layer.
    fn link_target(&mut self, entry: &Entry) -> Result<NodeId, LayerError> {
        let mut parents = components(&entry.link)
            .map_err(|fault| LayerError::Path { path: lossy(&entry.link), fault })?;
        let name = parents.pop().ok_or_else(|| link_error(entry, "it is the layer's root"))?;
        let missing = || link_error(entry, "no earlier entry of this layer has that name");
        let parent = self.walk(entry, &parents, Missing::Fail)?.ok_or_else(missing)?;
        let target = self.tree.child(parent, name).ok_or_else(missing)?;
        if self.tree.is_directory(target) {
            return Err(link_error(entry, "it is a directory"));
        }
        if self.tree.node(target).kind.is_whiteout() {
            return Err(missing());
        }
        Ok(target)
    }

    fn make_directories(&mut self, entry: &Entry, path: &[&[u8]]) -> Result<NodeId, LayerError> {
        match self.walk(entry, path, Missing::Make)? {
            Some(directory) => Ok(directory),
            // With `Make`, a walk that comes to no directory has failed.
            None => {
                Err(LayerError::NotADirectory { path: lossy(&entry.path), part: String::new() })
            }
        }
    }

    /// The directory at `path`. Symbolic links that this layer has on the way are followed inside
    /// it, as other runtimes do when they unpack it: a layer may have `lib -> usr/lib` and then
    /// `lib/x`.
    fn walk(
        &mut self,
        entry: &Entry,
        path: &[&[u8]],
        missing: Missing,
    ) -> Result<Option<NodeId>, LayerError> {
        let mut pending: Vec<Vec<u8>> = Vec::new();
        let mut given = path.iter();
        let mut trail = Vec::new();
        let mut current = NodeId::ROOT;
        let mut symlinks = 0u32;
        loop {
            let owned = pending.pop();
            let part = match (&owned, given.len()) {
                (Some(part), _) => part.as_slice(),
                (None, 0) => return Ok(Some(current)),
                (None, _) => given.next().copied().unwrap_or_default(),
            };
            // Only the targets of links have these: they stay inside the layer.
            match part {
                b"" | b"." => continue,
                b".." => {
                    current = trail.pop().unwrap_or(NodeId::ROOT);
                    continue;
                }
                _ => {}
            }
            let next = match self.tree.child(current, part) {
                None if missing == Missing::Fail => return Ok(None),
                None => self.new_directory(entry, current, part, Metadata::implied_directory())?,
                Some(next) => match &self.tree.node(next).kind {
                    NodeKind::Directory(_) => next,
                    NodeKind::Symlink(link) => {
                        symlinks = symlinks.saturating_add(1);
                        self.symlinks_followed = self.symlinks_followed.saturating_add(1);
                        if symlinks > MAX_SYMLINKS || self.symlinks_followed > MAX_LAYER_SYMLINKS {
                            return Err(LayerError::TooManySymlinks { path: lossy(&entry.path) });
                        }
                        if link.starts_with(b"/") {
                            trail.clear();
                            current = NodeId::ROOT;
                        }
                        let parts = link.split(|&byte| byte == b'/').rev();
                        pending.extend(parts.map(<[u8]>::to_vec));
                        continue;
                    }
                    kind if kind.is_whiteout() && missing == Missing::Make => {
                        self.new_directory(entry, current, part, Metadata::implied_directory())?
                    }
                    _ if missing == Missing::Fail => return Ok(None),
                    _ => {
                        let (path, part) = (lossy(&entry.path), lossy(part));
                        return Err(LayerError::NotADirectory { path, part });
                    }
                },
            };
            trail.push(current);
            current = next;
        }
    }
}

/// What to do about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Fail,
}

fn device(entry: &Entry) -> Result<u32, LayerError> {
    let (major, minor) = entry.device;
    encode_device(major, minor).ok_or_else(|| LayerError::Device {
        path: lossy(&entry.path),
        major,
        minor,
    })
}

fn link_error(entry: &Entry, reason: &'static str) -> LayerError {
    LayerError::Link { path: lossy(&entry.path), target: lossy(&entry.link), reason }
}

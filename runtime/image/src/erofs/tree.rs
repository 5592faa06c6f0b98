//! The files of one layer, in memory: names and attributes, and where the data is.
//!
//! Nodes are only ever added; one that is replaced stays allocated but unreachable, so that
//! replacing a directory of any size takes constant time and memory is bounded by
//! [`TreeLimits::max_entries`] whatever the order of a hostile archive's entries.

use std::collections::BTreeMap;

use super::format::{
    self, FileType, NAME_MAX, XATTR_BODY_MAX, Xattr, split_xattr_name, xattr_body_size,
};

/// Bounds on what a layer may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TreeLimits {
    pub(crate) max_entries: u32,
    pub(crate) max_name_bytes: u64,
    pub(crate) max_xattr_bytes: u64,
}

/// Why something cannot be added to a [`Tree`].
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// More files than the limit, those that were replaced included.
    #[error("the layer has more than {max} files")]
    TooManyEntries {
        /// The limit.
        max: u32,
    },
    /// The names and symbolic links' targets together exceed the limit.
    #[error("the names in the layer take more than {max} bytes")]
    TooManyNameBytes {
        /// The limit.
        max: u64,
    },
    /// The extended attributes of all files together exceed the limit.
    #[error("the extended attributes in the layer take more than {max} bytes")]
    TooManyXattrBytes {
        /// The limit.
        max: u64,
    },
    /// The attributes of one file do not fit behind its inode.
    #[error("the extended attributes of one file take {size} bytes, more than {max}")]
    XattrsTooLarge {
        /// What they would take.
        size: u32,
        /// What there is room for.
        max: u32,
    },
    /// An attribute's name or value is longer than Linux allows.
    #[error("the extended attribute {name:?} has a name or value that is too long")]
    XattrTooLong {
        /// The attribute's name.
        name: String,
    },
    /// The name of a directory entry is longer than Linux allows.
    #[error("a name of {len} bytes is longer than {NAME_MAX}")]
    NameTooLong {
        /// Its length.
        len: usize,
    },
}

/// A node's position in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Attributes that every file has.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    xattrs: Box<[Xattr]>,
}

impl Metadata {
    pub(crate) fn new(permissions: u16, uid: u32, gid: u32, mtime: (i64, u32)) -> Self {
        let (mtime, mtime_nsec) = mtime;
        Self {
            permissions: permissions & 0o7777,
            uid,
            gid,
            mtime,
            mtime_nsec,
            xattrs: Box::new([]),
        }
    }

    /// What a directory gets that the archive does not mention: 0755, root.
    pub(crate) fn implied_directory() -> Self {
        Self::new(0o755, 0, 0, (0, 0))
    }

    pub(crate) fn xattrs(&self) -> &[Xattr] {
        &self.xattrs
    }

    pub(crate) fn xattr_size(&self) -> u32 {
        xattr_body_size(&self.xattrs)
    }
}

/// Where the bytes of a regular file are.
#[derive(Debug)]
pub(crate) enum FileData {
    /// Here, to be written behind the inode. Also every empty file.
    Inline(Box<[u8]>),
    /// In the blob already.
    Blocks { first: u32, size: u64 },
}

#[derive(Debug)]
pub(crate) enum NodeKind {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    Regular(FileData),
    Symlink(Box<[u8]>),
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

impl NodeKind {
    pub(crate) fn file_type(&self) -> FileType {
        match self {
            Self::Directory(_) => FileType::Directory,
            Self::Regular(_) => FileType::Regular,
            Self::Symlink(_) => FileType::Symlink,
            Self::CharDevice(_) => FileType::CharDevice,
            Self::BlockDevice(_) => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
        }
    }

    /// What overlayfs takes for "this name is gone": a character device 0/0.
    pub(crate) fn is_whiteout(&self) -> bool {
        matches!(self, Self::CharDevice(0))
    }
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) metadata: Metadata,
    pub(crate) kind: NodeKind,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    limits: TreeLimits,
    name_bytes: u64,
    xattr_bytes: u64,
}

impl Tree {
    /// A tree with an empty root directory.
    pub(crate) fn new(limits: TreeLimits) -> Self {
        let root = Node {
            metadata: Metadata::implied_directory(),
            kind: NodeKind::Directory(BTreeMap::new()),
        };
        Self { nodes: vec![root], limits, name_bytes: 0, xattr_bytes: 0 }
    }

    // Ids are made by `insert` alone, and nodes are never removed.
    #[allow(clippy::indexing_slicing)]
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    #[allow(clippy::indexing_slicing)]
    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Nodes ever made, reachable or not.
    pub(crate) fn allocated(&self) -> usize {
        self.nodes.len()
    }

    /// The child of that name, if `parent` is a directory that has it.
    pub(crate) fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(parent).kind {
            NodeKind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    pub(crate) fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.node(id).kind, NodeKind::Directory(_))
    }

    /// Adds a file to the directory `parent`, in place of what had the name.
    pub(crate) fn insert(
        &mut self,
        parent: NodeId,
        name: &[u8],
        metadata: Metadata,
        kind: NodeKind,
    ) -> Result<NodeId, TreeError> {
        let id = u32::try_from(self.nodes.len())
            .ok()
            .filter(|&id| id < self.limits.max_entries)
            .ok_or(TreeError::TooManyEntries { max: self.limits.max_entries })?;
        if let NodeKind::Symlink(target) = &kind {
            self.count_name_bytes(target.len())?;
        }
        self.link(parent, name, NodeId(id))?;
        self.nodes.push(Node { metadata, kind });
        Ok(NodeId(id))
    }

    /// Gives `target` another name: a hard link. In place of what had the name.
    pub(crate) fn link(
        &mut self,
        parent: NodeId,
        name: &[u8],
        target: NodeId,
    ) -> Result<(), TreeError> {
        if name.len() > NAME_MAX {
            return Err(TreeError::NameTooLong { len: name.len() });
        }
        self.count_name_bytes(name.len())?;
        if let NodeKind::Directory(children) = &mut self.node_mut(parent).kind {
            children.insert(name.into(), target);
        }
        Ok(())
    }

    pub(crate) fn set_metadata(&mut self, id: NodeId, metadata: Metadata) {
        self.node_mut(id).metadata = metadata;
    }

    /// Sets one attribute of a node, in place of an older value.
    pub(crate) fn set_xattr(
        &mut self,
        id: NodeId,
        name: &[u8],
        value: &[u8],
    ) -> Result<(), TreeError> {
        let mut metadata = self.node(id).metadata.clone();
        self.add_xattr(&mut metadata, name, value)?;
        self.set_metadata(id, metadata);
        Ok(())
    }

    /// Adds an attribute to `metadata`. One in a namespace that the file system cannot hold is
    /// left out, as it would be on any Linux file system, and `false` is returned.
    pub(crate) fn add_xattr(
        &mut self,
        metadata: &mut Metadata,
        name: &[u8],
        value: &[u8],
    ) -> Result<bool, TreeError> {
        let Some((prefix, suffix)) = split_xattr_name(name) else { return Ok(false) };
        if name.len() > NAME_MAX || value.len() > usize::from(u16::MAX) {
            let name = String::from_utf8_lossy(name.get(..NAME_MAX).unwrap_or(name)).into_owned();
            return Err(TreeError::XattrTooLong { name });
        }
        let max = self.limits.max_xattr_bytes;
        self.xattr_bytes =
            self.xattr_bytes.saturating_add(name.len() as u64).saturating_add(value.len() as u64);
        if self.xattr_bytes > max {
            return Err(TreeError::TooManyXattrBytes { max });
        }
        let xattr = Xattr { prefix, suffix: suffix.into(), value: value.into() };
        let mut xattrs = std::mem::take(&mut metadata.xattrs).into_vec();
        // Sorted, so that the blob does not depend on the order in the archive.
        let key = |xattr: &Xattr| (xattr.prefix, xattr.suffix.clone());
        match xattrs.binary_search_by_key(&key(&xattr), key) {
            Ok(position) => {
                if let Some(slot) = xattrs.get_mut(position) {
                    *slot = xattr;
                }
            }
            Err(position) => xattrs.insert(position, xattr),
        }
        metadata.xattrs = xattrs.into();
        let size = format::xattr_body_size(&metadata.xattrs);
        if size > XATTR_BODY_MAX {
            return Err(TreeError::XattrsTooLarge { size, max: XATTR_BODY_MAX });
        }
        Ok(true)
    }

    fn count_name_bytes(&mut self, len: usize) -> Result<(), TreeError> {
        let max = self.limits.max_name_bytes;
        self.name_bytes = self.name_bytes.saturating_add(len as u64);
        if self.name_bytes > max { Err(TreeError::TooManyNameBytes { max }) } else { Ok(()) }
    }
}

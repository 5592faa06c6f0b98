//! The layout of a blob, and its writing.
//!
//! ```text
//! block 0           1 ..                     meta_block ..
//! ┌────────────┬─────────────────┬──────────┬─────────────────────────────────────────┐
//! │ superblock │ file data, as   │ large    │ inodes, each with its attributes and,   │
//! │ (last)     │ it arrived      │ others   │ if small, its data; parents come first  │
//! └────────────┴─────────────────┴──────────┴─────────────────────────────────────────┘
//! ```
//! Everything but the superblock is written front to back. Files above [`INLINE_MAX`] bytes start
//! on a block of their own, so that the guest can map them (and use DAX where there is any);
//! smaller ones lie behind their inodes, so that opening and reading one costs one block.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Bound;

use super::directory::{Dirent, directory_size, encode_directory};
use super::format::{
    BLOCK_SIZE, DataLayout, INODE_SIZE, INODE_SLOT, Inode, Superblock, encode_xattrs,
};
use super::tree::{FileData, Node, NodeId, NodeKind, Tree};

/// Largest file or directory that is stored behind its inode. Half a block: a larger one would
/// often leave the rest of the inode's block empty.
const INLINE_MAX: u64 = 2048;
/// How many bytes of small files are kept in memory for that; later ones get blocks of their own.
const INLINE_BUDGET: u64 = 64 << 20;
/// Number of the root's inode. Not 0: a C library takes an inode number of 0 for a deleted entry.
const ROOT_NID: u16 = 2;
const BLOCK: u64 = BLOCK_SIZE as u64;
const COPY_BUFFER: usize = 128 << 10;

/// Why a blob could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The blob's file did not take the bytes: a full disk, most likely.
    #[error("cannot write the blob")]
    Blob(#[source] io::Error),
    /// The data of a file could not be read.
    #[error("cannot read the file's data")]
    Source(#[source] io::Error),
    /// The data of a file ends early.
    #[error("the file's data ends {missing} bytes early")]
    SourceTruncated {
        /// How many bytes are missing.
        missing: u64,
    },
    /// More than 2^32 blocks.
    #[error("the blob would exceed the 16 TiB that EROFS can address")]
    TooLarge,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlobStats {
    /// Bytes of the blob.
    pub(crate) size: u64,
    pub(crate) inodes: u64,
}

/// Writes one EROFS file system. Nothing of it can be used before [`BlobWriter::finish`].
#[derive(Debug)]
pub(crate) struct BlobWriter<W> {
    out: W,
    /// Bytes written so far; a whole number of blocks between any two calls.
    position: u64,
    inline_budget: u64,
    buffer: Box<[u8]>,
}

impl<W: Write + Seek> BlobWriter<W> {
    /// Starts at the beginning of `out`, which is empty. Writes are large where that matters: a
    /// buffer around `out` is useful only for many tiny files.
    pub(crate) fn new(out: W) -> Result<Self, WriteError> {
        let buffer = vec![0; COPY_BUFFER].into_boxed_slice();
        let mut writer = Self { out, position: 0, inline_budget: INLINE_BUDGET, buffer };
        writer.put(&[0; BLOCK_SIZE as usize])?;
        Ok(writer)
    }

    /// Takes `size` bytes from `source` as the data of a file whose attributes will take
    /// `xattr_size` bytes.
    pub(crate) fn file_data(
        &mut self,
        source: &mut dyn Read,
        size: u64,
        xattr_size: u32,
    ) -> Result<FileData, WriteError> {
        if fits_inline(size, xattr_size) && size <= self.inline_budget {
            self.inline_budget = self.inline_budget.saturating_sub(size);
            let mut data = Vec::new();
            let read = source.take(size).read_to_end(&mut data).map_err(WriteError::Source)?;
            return match size.saturating_sub(read as u64) {
                0 => Ok(FileData::Inline(data.into())),
                missing => Err(WriteError::SourceTruncated { missing }),
            };
        }
        let first = self.current_block()?;
        self.reserve(size)?;
        let mut missing = size;
        while missing > 0 {
            let want = usize::try_from(missing).unwrap_or(usize::MAX).min(self.buffer.len());
            let part = self.buffer.get_mut(..want).unwrap_or_default();
            let read = match source.read(part) {
                Ok(0) => return Err(WriteError::SourceTruncated { missing }),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(WriteError::Source(error)),
            };
            let part = part.get(..read).unwrap_or_default();
            self.out.write_all(part).map_err(WriteError::Blob)?;
            self.position = self.position.saturating_add(part.len() as u64);
            missing = missing.saturating_sub(part.len() as u64);
        }
        self.pad_to_block()?;
        Ok(FileData::Blocks { first, size })
    }

    /// Writes everything but the file data, the superblock last, and flushes. The `uuid` is the
    /// file system's.
    pub(crate) fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<BlobStats, WriteError> {
        let plan = Plan::new(tree, self.position)?;
        for &id in &plan.order {
            if plan.place(id).layout != DataLayout::FlatPlain {
                continue;
            }
            match &tree.node(id).kind {
                NodeKind::Directory(_) => {
                    encode_directory(&plan.dirents(tree, id), |block| self.put(block))?;
                }
                NodeKind::Symlink(target) => self.put(target)?,
                // Written when it arrived, or there is none.
                _ => continue,
            }
            self.pad_to_block()?;
        }
        debug_assert_eq!(self.position, u64::from(plan.meta_block).saturating_mul(BLOCK));
        let meta_start = self.position;
        let mut record = Vec::new();
        for &id in &plan.order {
            let target = meta_start.saturating_add(plan.place(id).offset);
            self.pad_to(target)?;
            record.clear();
            plan.encode_node(tree, id, &mut record);
            self.put(&record)?;
        }
        // fsck.erofs 1.5 looks for attributes behind an inode that has none: even the last one
        // must have something behind it.
        self.put(&[0; 32])?;
        self.pad_to_block()?;
        let size = self.position;
        let superblock = Superblock {
            root_nid: ROOT_NID,
            inodes: plan.order.len() as u64,
            blocks: self.current_block()?,
            meta_block: plan.meta_block,
            uuid,
        };
        self.out.seek(SeekFrom::Start(0)).map_err(WriteError::Blob)?;
        self.out.write_all(&superblock.encode_block()).map_err(WriteError::Blob)?;
        self.out.flush().map_err(WriteError::Blob)?;
        Ok(BlobStats { size, inodes: superblock.inodes })
    }

    fn current_block(&self) -> Result<u32, WriteError> {
        block_number(self.position)
    }

    /// Fails unless `size` more bytes can be addressed.
    fn reserve(&self, size: u64) -> Result<(), WriteError> {
        let end = self.position.checked_add(size).ok_or(WriteError::TooLarge)?;
        block_number(end).map(drop)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.reserve(bytes.len() as u64)?;
        self.out.write_all(bytes).map_err(WriteError::Blob)?;
        self.position = self.position.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn pad_to_block(&mut self) -> Result<(), WriteError> {
        self.pad_to(self.position.checked_next_multiple_of(BLOCK).ok_or(WriteError::TooLarge)?)
    }

    /// Zeros up to the absolute position `target`, which is less than a block away.
    fn pad_to(&mut self, target: u64) -> Result<(), WriteError> {
        const ZEROS: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];
        while self.position < target {
            let want = target.saturating_sub(self.position).min(BLOCK);
            let zeros = ZEROS.get(..usize::try_from(want).unwrap_or(0)).unwrap_or_default();
            self.put(zeros)?;
        }
        Ok(())
    }
}

fn block_number(position: u64) -> Result<u32, WriteError> {
    // The last number is reserved: the kernel takes it for "no block".
    u32::try_from(position.div_ceil(BLOCK))
        .ok()
        .filter(|&block| block < u32::MAX)
        .ok_or(WriteError::TooLarge)
}

/// Whether data of this size can lie behind its inode: both must be in one block.
fn fits_inline(size: u64, xattr_size: u32) -> bool {
    let head = u64::from(INODE_SIZE).saturating_add(u64::from(xattr_size));
    size <= INLINE_MAX && head.saturating_add(size) <= BLOCK
}

/// Where a node's inode and data go.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Bytes from the start of the metadata; a multiple of [`INODE_SLOT`].
    offset: u64,
    layout: DataLayout,
    size: u64,
    /// Of the data, for [`DataLayout::FlatPlain`]; otherwise the device number or 0.
    block_or_device: u32,
    nlink: u32,
    parent: NodeId,
}

impl Place {
    const UNPLACED: Self = Self {
        offset: 0,
        layout: DataLayout::FlatInline,
        size: 0,
        block_or_device: 0,
        nlink: 0,
        parent: NodeId::ROOT,
    };

    fn nid(&self) -> u64 {
        self.offset / INODE_SLOT
    }
}

/// Decides every position before anything is written, since directories refer to inodes that come
/// later.
struct Plan {
    /// Reachable nodes in the order of their inodes: a directory, what is in it, its directories.
    order: Vec<NodeId>,
    /// By node id.
    places: Vec<Place>,
    meta_block: u32,
}

impl Plan {
    fn new(tree: &Tree, data_end: u64) -> Result<Self, WriteError> {
        let mut plan = Self {
            order: Vec::new(),
            places: vec![Place::UNPLACED; tree.allocated()],
            meta_block: 0,
        };
        plan.walk(tree);
        let order = std::mem::take(&mut plan.order);
        let mut data_end = data_end;
        for &id in &order {
            let (layout, size, block_or_device) = plan.place_data(tree, id, &mut data_end)?;
            let place = plan.place_mut(id);
            (place.layout, place.size) = (layout, size);
            place.block_or_device = block_or_device;
        }
        plan.meta_block = block_number(data_end)?;
        let mut offset = u64::from(ROOT_NID).saturating_mul(INODE_SLOT);
        for &id in &order {
            let node = tree.node(id);
            let place = plan.place_mut(id);
            let inline = if place.layout == DataLayout::FlatInline { place.size } else { 0 };
            let head = u64::from(INODE_SIZE).saturating_add(u64::from(node.metadata.xattr_size()));
            // Inline data must share the inode's block; without any, only the inode itself should.
            let together =
                if inline > 0 { head.saturating_add(inline) } else { u64::from(INODE_SIZE) };
            if (offset % BLOCK).saturating_add(together) > BLOCK {
                offset = offset.next_multiple_of(BLOCK);
            }
            place.offset = offset;
            offset = offset
                .checked_add(head.saturating_add(inline))
                .and_then(|end| end.checked_next_multiple_of(INODE_SLOT))
                .ok_or(WriteError::TooLarge)?;
        }
        plan.order = order;
        Ok(plan)
    }

    /// Finds the order, parents and link counts. A stack of its own: the depth is the archive's.
    fn walk(&mut self, tree: &Tree) {
        let mut pending = vec![NodeId::ROOT];
        self.place_mut(NodeId::ROOT).nlink = 2;
        while let Some(directory) = pending.pop() {
            self.order.push(directory);
            let NodeKind::Directory(children) = &tree.node(directory).kind else { continue };
            let first_pending = pending.len();
            for &child in children.values() {
                if tree.is_directory(child) {
                    let parent_place = self.place_mut(directory);
                    parent_place.nlink = parent_place.nlink.saturating_add(1);
                    let place = self.place_mut(child);
                    (place.nlink, place.parent) = (2, directory);
                    pending.push(child);
                } else {
                    let place = self.place_mut(child);
                    place.nlink = place.nlink.saturating_add(1);
                    if place.nlink == 1 {
                        self.order.push(child);
                    }
                }
            }
            pending.get_mut(first_pending..).unwrap_or_default().reverse();
        }
    }

    /// Layout, size, and block or device number of one node. Data that has no place yet (large
    /// directories) gets one at `data_end`.
    fn place_data(
        &self,
        tree: &Tree,
        id: NodeId,
        data_end: &mut u64,
    ) -> Result<(DataLayout, u64, u32), WriteError> {
        let node = tree.node(id);
        let inline = |size: u64| (DataLayout::FlatInline, size, 0);
        let size = match &node.kind {
            NodeKind::CharDevice(device) | NodeKind::BlockDevice(device) => {
                return Ok((DataLayout::FlatPlain, 0, *device));
            }
            NodeKind::Fifo => return Ok((DataLayout::FlatPlain, 0, 0)),
            NodeKind::Regular(FileData::Blocks { first, size }) => {
                return Ok((DataLayout::FlatPlain, *size, *first));
            }
            NodeKind::Regular(FileData::Inline(data)) if data.is_empty() => {
                return Ok((DataLayout::FlatPlain, 0, 0));
            }
            NodeKind::Regular(FileData::Inline(data)) => return Ok(inline(data.len() as u64)),
            NodeKind::Symlink(target) => target.len() as u64,
            NodeKind::Directory(children) => {
                // Where `.` and `..` stand among the names matters to how blocks fill up.
                let below = |bound: &[u8]| {
                    children.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(bound))).count()
                };
                let (dot, dot_dot) = (below(b"."), below(b".."));
                let lens = || children.keys().map(|name| name.len());
                directory_size(
                    lens()
                        .take(dot)
                        .chain([1])
                        .chain(lens().take(dot_dot).skip(dot))
                        .chain([2])
                        .chain(lens().skip(dot_dot)),
                )
            }
        };
        if fits_inline(size, node.metadata.xattr_size()) {
            return Ok(inline(size));
        }
        let first = block_number(*data_end)?;
        *data_end = data_end
            .checked_add(size)
            .and_then(|end| end.checked_next_multiple_of(BLOCK))
            .ok_or(WriteError::TooLarge)?;
        Ok((DataLayout::FlatPlain, size, first))
    }

    /// The entries of a directory, sorted, `.` and `..` included.
    fn dirents<'tree>(&self, tree: &'tree Tree, id: NodeId) -> Vec<Dirent<'tree>> {
        let entry = |name: &'tree [u8], id: NodeId| Dirent {
            name,
            nid: self.place(id).nid(),
            file_type: tree.node(id).kind.file_type(),
        };
        let mut entries = vec![entry(b".", id), entry(b"..", self.place(id).parent)];
        if let NodeKind::Directory(children) = &tree.node(id).kind {
            entries.extend(children.iter().map(|(name, &child)| entry(name, child)));
        }
        entries.sort_by_key(|entry| entry.name);
        entries
    }

    /// Appends the inode, its attributes and its inline data.
    fn encode_node(&self, tree: &Tree, id: NodeId, out: &mut Vec<u8>) {
        let place = self.place(id);
        let Node { metadata, kind } = tree.node(id);
        Inode {
            layout: place.layout,
            file_type: kind.file_type(),
            permissions: metadata.permissions,
            xattr_size: metadata.xattr_size(),
            size: place.size,
            block_or_device: place.block_or_device,
            // Only what is left of the number in 32 bits is asked for.
            #[allow(clippy::cast_possible_truncation)]
            ino: place.nid() as u32,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime: metadata.mtime,
            mtime_nsec: metadata.mtime_nsec,
            nlink: place.nlink,
        }
        .encode(out);
        encode_xattrs(metadata.xattrs(), out);
        if place.layout != DataLayout::FlatInline {
            return;
        }
        match kind {
            NodeKind::Regular(FileData::Inline(data)) | NodeKind::Symlink(data) => {
                out.extend_from_slice(data);
            }
            NodeKind::Directory(_) => {
                let appended: Result<(), std::convert::Infallible> =
                    encode_directory(&self.dirents(tree, id), |block| {
                        out.extend_from_slice(block);
                        Ok(())
                    });
                let Ok(()) = appended;
            }
            _ => {}
        }
    }

    // One place for each node of the tree, and ids are only made by that tree.
    #[allow(clippy::indexing_slicing)]
    fn place(&self, id: NodeId) -> &Place {
        &self.places[id.index()]
    }

    #[allow(clippy::indexing_slicing)]
    fn place_mut(&mut self, id: NodeId) -> &mut Place {
        &mut self.places[id.index()]
    }
}

//! The on-disk structures of EROFS that the writer uses, as the kernel's documentation describes
//! them (`Documentation/filesystems/erofs.rst`). All integers are little-endian.
//!
//! Used: 4 KiB blocks, extended inodes, data either in whole blocks ("flat plain") or behind the
//! inode in its own block ("flat inline"), extended attributes inside the inode. Not used:
//! compression, chunks, shared attributes, several devices. That is what every kernel since 5.4
//! reads, without an incompatible feature.

/// Bytes of a block. A page of x86_64, so that a kernel with 4 KiB pages can map file data.
pub(crate) const BLOCK_SIZE: u32 = 4096;
/// log2 of [`BLOCK_SIZE`].
const BLOCK_BITS: u8 = 12;
/// Where the superblock lies in block 0; the 1024 bytes before it are left to boot loaders.
pub(crate) const SUPERBLOCK_OFFSET: u32 = 1024;
const SUPERBLOCK_MAGIC: u32 = 0xE0F5_E1E2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`: the superblock's block carries a CRC-32C.
const FEATURE_COMPAT_SB_CHKSUM: u32 = 1;
/// `EROFS_FEATURE_COMPAT_MTIME`: inodes carry the modification time, not the change time.
const FEATURE_COMPAT_MTIME: u32 = 2;

/// Inodes are addressed in units of this many bytes, counted from the metadata's first block.
pub(crate) const INODE_SLOT: u64 = 32;
/// Bytes of an extended inode.
pub(crate) const INODE_SIZE: u32 = 64;
/// Bytes of a directory entry, without its name.
pub(crate) const DIRENT_SIZE: u32 = 12;
/// `EROFS_NAME_LEN`: longest name of a directory entry.
pub(crate) const NAME_MAX: usize = 255;
/// Bytes of the header in front of an inode's extended attributes.
const XATTR_HEADER_SIZE: u32 = 12;
/// Bytes of an extended attribute's own header.
const XATTR_ENTRY_SIZE: u32 = 4;
/// What `i_xattr_icount` can express: a header and this many units of four bytes.
pub(crate) const XATTR_BODY_MAX: u32 = XATTR_HEADER_SIZE + 4 * (u16::MAX as u32 - 1);

/// How an inode's data lies on disk (`i_format`, bits 1 to 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// Contiguous whole blocks.
    FlatPlain,
    /// Directly behind the inode and its extended attributes, in the inode's block.
    FlatInline,
}

impl DataLayout {
    fn i_format(self) -> u16 {
        const EXTENDED: u16 = 1;
        let layout: u16 = match self {
            Self::FlatPlain => 0,
            Self::FlatInline => 2,
        };
        EXTENDED | (layout << 1)
    }
}

/// The file types as directory entries and `i_mode` name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Symlink,
}

impl FileType {
    pub(crate) fn dirent_type(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }

    /// The `S_IF*` bits.
    fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
        }
    }
}

/// An extended inode.
#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) layout: DataLayout,
    pub(crate) file_type: FileType,
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) permissions: u16,
    /// Bytes of the extended attributes' body, as [`xattr_body_size`] counts them.
    pub(crate) xattr_size: u32,
    pub(crate) size: u64,
    /// First block of the data, or the device number.
    pub(crate) block_or_device: u32,
    /// Number for 32-bit stat; the kernel derives the real one from the position.
    pub(crate) ino: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) nlink: u32,
}

impl Inode {
    /// Appends the inode to `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let xattr_icount = match self.xattr_size.checked_sub(XATTR_HEADER_SIZE) {
            None => 0,
            // Bounded by XATTR_BODY_MAX, which is what makes it fit.
            Some(entries) => u16::try_from((entries / 4).saturating_add(1)).unwrap_or(u16::MAX),
        };
        out.extend_from_slice(&self.layout.i_format().to_le_bytes());
        out.extend_from_slice(&xattr_icount.to_le_bytes());
        out.extend_from_slice(&(self.file_type.mode_bits() | self.permissions).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.block_or_device.to_le_bytes());
        out.extend_from_slice(&self.ino.to_le_bytes());
        out.extend_from_slice(&self.uid.to_le_bytes());
        out.extend_from_slice(&self.gid.to_le_bytes());
        out.extend_from_slice(&self.mtime.to_le_bytes());
        out.extend_from_slice(&self.mtime_nsec.to_le_bytes());
        out.extend_from_slice(&self.nlink.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
    }
}

/// One extended attribute, its namespace already split off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    /// Number that EROFS gives the namespace (see [`split_xattr_name`]).
    pub(crate) prefix: u8,
    /// The name behind the namespace; at most 255 bytes.
    pub(crate) suffix: Box<[u8]>,
    /// At most 65535 bytes.
    pub(crate) value: Box<[u8]>,
}

/// Splits a full name into the number of its namespace and the rest. `None` is a namespace that
/// EROFS cannot hold.
pub(crate) fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    const NAMESPACES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    NAMESPACES.iter().find_map(|&(namespace, prefix)| {
        let suffix = name.strip_prefix(namespace)?;
        (!suffix.is_empty()).then_some((prefix, suffix))
    })
}

/// Bytes that one attribute takes, saturating; entries are aligned to four bytes.
fn xattr_entry_size(xattr: &Xattr) -> u32 {
    let content = xattr.suffix.len().saturating_add(xattr.value.len());
    u32::try_from(content).unwrap_or(u32::MAX).saturating_add(XATTR_ENTRY_SIZE + 3) & !3
}

/// Bytes that the attributes take behind the inode; 0 if there are none. Saturates, so that what
/// exceeds [`XATTR_BODY_MAX`] is seen to do so.
pub(crate) fn xattr_body_size(xattrs: &[Xattr]) -> u32 {
    if xattrs.is_empty() {
        return 0;
    }
    xattrs
        .iter()
        .fold(XATTR_HEADER_SIZE, |size, xattr| size.saturating_add(xattr_entry_size(xattr)))
}

/// Appends the attributes' body to `out`.
pub(crate) fn encode_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    // No name filter, no shared attributes.
    out.extend_from_slice(&[0; XATTR_HEADER_SIZE as usize]);
    for xattr in xattrs {
        out.push(u8::try_from(xattr.suffix.len()).unwrap_or(u8::MAX));
        out.push(xattr.prefix);
        let value_len = u16::try_from(xattr.value.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&value_len.to_le_bytes());
        out.extend_from_slice(&xattr.suffix);
        out.extend_from_slice(&xattr.value);
        while !out.len().is_multiple_of(4) {
            out.push(0);
        }
    }
}

/// What the superblock says of the whole file system.
#[derive(Debug)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    /// First block of the inodes, from which inode numbers count.
    pub(crate) meta_block: u32,
    pub(crate) uuid: [u8; 16],
}

impl Superblock {
    /// All of block 0, checksum included.
    pub(crate) fn encode_block(&self) -> Vec<u8> {
        let without_checksum = self.encode_with_checksum(0);
        let covered = without_checksum.get(SUPERBLOCK_OFFSET as usize..).unwrap_or_default();
        self.encode_with_checksum(crc32c(covered))
    }

    fn encode_with_checksum(&self, checksum: u32) -> Vec<u8> {
        let mut out = vec![0; SUPERBLOCK_OFFSET as usize];
        out.extend_from_slice(&SUPERBLOCK_MAGIC.to_le_bytes());
        out.extend_from_slice(&checksum.to_le_bytes());
        out.extend_from_slice(&(FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
        out.push(BLOCK_BITS);
        out.push(0); // no superblock extension slots
        out.extend_from_slice(&self.root_nid.to_le_bytes());
        out.extend_from_slice(&self.inodes.to_le_bytes());
        out.extend_from_slice(&[0; 12]); // build time: zero, for the same bytes from the same layer
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&self.meta_block.to_le_bytes());
        out.extend_from_slice(&[0; 4]); // shared attributes' block
        out.extend_from_slice(&self.uuid);
        // Volume name, incompatible features, compression, devices, prefixes, packed inode: none.
        out.resize(BLOCK_SIZE as usize, 0);
        out
    }
}

/// Bytes that a blob has according to its first block, or `None` if that is no superblock of ours.
pub(crate) fn blob_size(first_block: &[u8]) -> Option<u64> {
    let superblock = first_block.get(SUPERBLOCK_OFFSET as usize..BLOCK_SIZE as usize)?;
    let field = |at: usize| {
        let bytes = superblock.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let mut covered = superblock.to_vec();
    covered.get_mut(4..8)?.fill(0);
    if field(0)? != SUPERBLOCK_MAGIC || field(4)? != crc32c(&covered) {
        return None;
    }
    u64::from(field(36)?).checked_mul(u64::from(BLOCK_SIZE))
}

/// CRC-32C as the kernel computes it: seeded with all ones, not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 }
        })
    })
}

/// The kernel's 32-bit encoding of a device number (`new_encode_dev`): 12 bits of major, 20 of
/// minor. `None` if it does not fit.
pub(crate) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    if major > 0xFFF || minor > 0xF_FFFF {
        return None;
    }
    Some((minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_their_size_on_disk() {
        let inode = Inode {
            layout: DataLayout::FlatInline,
            file_type: FileType::Regular,
            permissions: 0o644,
            xattr_size: 0,
            size: 1,
            block_or_device: 0,
            ino: 1,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            nlink: 1,
        };
        let mut bytes = Vec::new();
        inode.encode(&mut bytes);
        assert_eq!(bytes.len(), INODE_SIZE as usize);
        let superblock =
            Superblock { root_nid: 2, inodes: 1, blocks: 1, meta_block: 1, uuid: [7; 16] };
        let block = superblock.encode_block();
        assert_eq!(block.len(), BLOCK_SIZE as usize);
        assert_eq!(&block[1024 + 48..1024 + 64], &[7; 16]);
        assert_eq!(blob_size(&block), Some(4096));
        let mut damaged = block.clone();
        damaged[1024 + 36] = 2;
        assert_eq!(blob_size(&damaged), None);
        assert_eq!(blob_size(&block[..4000]), None);
    }

    #[test]
    fn crc32c_matches_the_published_check_value() {
        // RFC 3720 B.4 inverts at the end; the kernel's form does not.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn xattr_names_outside_the_known_namespaces_are_refused() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr_name(b"trusted.overlay.opaque"), Some((4, &b"overlay.opaque"[..])));
        for name in [&b"user."[..], b"system.nfs4_acl", b"com.example", b""] {
            assert_eq!(split_xattr_name(name), None, "{name:?}");
        }
    }

    #[test]
    fn xattr_size_is_what_is_encoded() {
        let xattrs = [
            Xattr { prefix: 1, suffix: (*b"abc").into(), value: (*b"de").into() },
            Xattr { prefix: 6, suffix: (*b"capability").into(), value: vec![1; 20].into() },
        ];
        let mut out = Vec::new();
        encode_xattrs(&xattrs, &mut out);
        assert_eq!(u32::try_from(out.len()).unwrap(), xattr_body_size(&xattrs));
        assert_eq!(xattr_body_size(&[]), 0);
    }

    #[test]
    fn device_numbers_are_packed_as_the_kernel_does() {
        assert_eq!(encode_device(8, 1), Some(0x0801));
        assert_eq!(encode_device(0, 0), Some(0));
        assert_eq!(encode_device(259, 0x12345), Some(0x1230_0000 | 259 << 8 | 0x45));
        assert_eq!(encode_device(0x1000, 0), None);
        assert_eq!(encode_device(0, 0x10_0000), None);
    }
}

//! A reader for tests: says what a blob holds, so that tests can compare it with what went in.
//! Independent of the writer's structures on purpose; panics on anything unexpected.

use std::collections::BTreeMap;

/// A file as it is in the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadFile {
    /// With the type's bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) nlink: u32,
    /// Equal for two names of the same file.
    pub(crate) nid: u64,
    /// Of a device; 0 otherwise.
    pub(crate) device: u32,
    /// Data of a file, or target of a symbolic link.
    pub(crate) data: Vec<u8>,
    /// By full name.
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

struct Blob<'a>(&'a [u8]);

impl Blob<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    /// Position of the inode, checked against what the kernel demands.
    fn inode_at(&self, nid: u64) -> usize {
        let meta_block = self.u32(1024 + 40) as usize;
        meta_block * 4096 + usize::try_from(nid).unwrap() * 32
    }

    fn file(&self, nid: u64) -> ReadFile {
        let at = self.inode_at(nid);
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "extended inodes only");
        assert!(at % 4096 + 64 <= 4096, "the inode crosses a block");
        let icount = usize::from(self.u16(at + 2));
        let xattr_size = if icount == 0 { 0 } else { 12 + 4 * (icount - 1) };
        let mode = self.u16(at + 4);
        let size = usize::try_from(self.u64(at + 8)).unwrap();
        let raw = self.u32(at + 16);
        let data_at = match (format >> 1) & 7 {
            // Devices have their number there.
            0 => {
                if size == 0 {
                    0
                } else {
                    raw as usize * 4096
                }
            }
            2 => {
                let start = at + 64 + xattr_size;
                assert_eq!(at / 4096, (start + size.max(1) - 1) / 4096, "inline data elsewhere");
                start
            }
            other => panic!("data layout {other}"),
        };
        let is_device = matches!(mode & 0o170_000, 0o020_000 | 0o060_000);
        ReadFile {
            mode,
            uid: self.u32(at + 24),
            gid: self.u32(at + 28),
            mtime: (self.u64(at + 32) as i64, self.u32(at + 40)),
            nlink: self.u32(at + 44),
            nid,
            device: if is_device { raw } else { 0 },
            data: self.0[data_at..data_at + size].to_vec(),
            xattrs: self.xattrs(at + 64, xattr_size),
        }
    }

    fn xattrs(&self, start: usize, size: usize) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        let (mut at, end) = (start + 12, start + size);
        while size > 0 && at < end {
            let name_len = usize::from(self.0[at]);
            let value_len = usize::from(self.u16(at + 2));
            let prefix = match self.0[at + 1] {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("xattr prefix {other}"),
            };
            let name = String::from_utf8_lossy(&self.0[at + 4..at + 4 + name_len]);
            let value = &self.0[at + 4 + name_len..at + 4 + name_len + value_len];
            assert!(found.insert(format!("{prefix}{name}"), value.to_vec()).is_none());
            at = (at + 4 + name_len + value_len).next_multiple_of(4);
        }
        found
    }

    /// The entries of a directory's data: name, nid, type.
    fn entries(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut all = Vec::new();
        for block in data.chunks(4096) {
            let view = Blob(block);
            let count = usize::from(view.u16(8)) / 12;
            for index in 0..count {
                let start = usize::from(view.u16(index * 12 + 8));
                let end = if index + 1 < count {
                    usize::from(view.u16((index + 1) * 12 + 8))
                } else {
                    let padding = block[start..].iter().position(|&byte| byte == 0);
                    padding.map_or(block.len(), |length| start + length)
                };
                let entry =
                    (block[start..end].to_vec(), view.u64(index * 12), block[index * 12 + 10]);
                all.push(entry);
            }
        }
        all
    }
}

/// Everything in a blob by its path; the root is `""`.
pub(crate) fn read_blob(bytes: &[u8]) -> BTreeMap<String, ReadFile> {
    let blob = Blob(bytes);
    assert_eq!(blob.u32(1024), 0xE0F5_E1E2);
    assert_eq!(blob.u32(1024 + 36) as usize * 4096, bytes.len());
    let root = u64::from(blob.u16(1024 + 14));
    let mut files = BTreeMap::new();
    let mut pending = vec![(String::new(), root, root)];
    while let Some((path, nid, parent)) = pending.pop() {
        let mut file = blob.file(nid);
        if file.mode & 0o170_000 == 0o040_000 {
            let entries = Blob::entries(&file.data);
            assert!(entries.is_sorted_by(|a, b| a.0 < b.0), "{path}: not sorted");
            for (name, child, file_type) in entries {
                match name.as_slice() {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let kind = [0, 0o100, 0o040, 0o020, 0o060, 0o010, 0o140, 0o120];
                        let mode = u32::from(blob.u16(blob.inode_at(child) + 4));
                        assert_eq!(
                            (mode & 0o170_000) >> 9,
                            kind[usize::from(file_type)],
                            "{path}: type"
                        );
                        let escaped = name.escape_ascii().to_string();
                        let name = String::from_utf8(name).unwrap_or(escaped);
                        pending.push((format!("{path}/{name}"), child, nid));
                    }
                }
            }
            file.data.clear();
        }
        assert!(files.insert(path, file).is_none());
    }
    let inodes: std::collections::BTreeSet<u64> = files.values().map(|file| file.nid).collect();
    assert_eq!(blob.u64(1024 + 16), inodes.len() as u64);
    files
}

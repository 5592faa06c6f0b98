//! The 512-byte header of an entry (POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual,
//! "Basic Tar Format").

use super::pax::PaxRecords;
use super::{Entry, EntryKind, MAX_PATH, TarError};

/// Unit of a tar stream.
pub(super) const BLOCK: usize = 512;

/// A field: its first byte and its length.
type Field = (usize, usize);
const NAME: Field = (0, 100);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const CHECKSUM: Field = (148, 8);
const TYPE_FLAG: usize = 156;
const LINK_NAME: Field = (157, 100);
const MAGIC: Field = (257, 6);
const DEVICE_MAJOR: Field = (329, 8);
const DEVICE_MINOR: Field = (337, 8);
const PREFIX: Field = (345, 155);

/// A header whose checksum is right.
#[derive(Debug)]
pub(super) struct RawHeader([u8; BLOCK]);

impl RawHeader {
    pub(super) fn parse(block: [u8; BLOCK], offset: u64) -> Result<Self, TarError> {
        let header = Self(block);
        let stored = header.octal_or_binary(CHECKSUM).ok_or(TarError::Checksum { offset })?;
        // The checksum counts its own field as blanks. Some old writers summed signed bytes.
        let (start, len) = CHECKSUM;
        let checksum_field = start..start.saturating_add(len);
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (position, &byte) in header.0.iter().enumerate() {
            let byte = if checksum_field.contains(&position) { b' ' } else { byte };
            unsigned = unsigned.saturating_add(i64::from(byte));
            signed = signed.saturating_add(i64::from(byte.cast_signed()));
        }
        if stored != unsigned && stored != signed {
            return Err(TarError::Checksum { offset });
        }
        Ok(header)
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0.get(TYPE_FLAG).copied().unwrap_or_default()
    }

    /// Bytes of data behind this header.
    pub(super) fn size(&self, offset: u64) -> Result<u64, TarError> {
        self.number(SIZE, "size", offset)
    }

    /// The entry that this header describes, corrected by the extension headers before it.
    pub(super) fn into_entry(
        self,
        offset: u64,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        pax: PaxRecords,
    ) -> Result<Entry, TarError> {
        let path = pax.path.or(long_path).unwrap_or_else(|| self.path());
        check_path(&path, "path", offset)?;
        if pax.gnu_sparse {
            return Err(unsupported(offset, &path, "sparse file (GNU)"));
        }
        let kind = self.kind(&path, offset)?;
        let link = pax.link.or(long_link).unwrap_or_else(|| self.string(LINK_NAME).to_vec());
        let is_link = matches!(kind, EntryKind::HardLink | EntryKind::Symlink);
        check_path(if is_link { &link } else { b"" }, "link target", offset)?;
        let size = match kind {
            EntryKind::Regular => match pax.size {
                Some(size) => size,
                None => self.size(offset)?,
            },
            _ => 0,
        };
        let device = match kind {
            EntryKind::CharDevice | EntryKind::BlockDevice => (
                self.number(DEVICE_MAJOR, "major device number", offset)?,
                self.number(DEVICE_MINOR, "minor device number", offset)?,
            ),
            _ => (0, 0),
        };
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => (
                self.octal_or_binary(MTIME)
                    .ok_or(TarError::Number { offset, field: "modification time" })?,
                0,
            ),
        };
        let mode: u64 = self.number(MODE, "mode", offset)?;
        Ok(Entry {
            offset,
            kind,
            path,
            link,
            // The upper bits repeat the type in some archives.
            mode: u32::try_from(mode & 0o7777).unwrap_or_default(),
            uid: match pax.uid {
                Some(uid) => uid,
                None => self.number(UID, "user id", offset)?,
            },
            gid: match pax.gid {
                Some(gid) => gid,
                None => self.number(GID, "group id", offset)?,
            },
            mtime,
            size,
            device,
            xattrs: pax.xattrs,
        })
    }

    fn kind(&self, path: &[u8], offset: u64) -> Result<EntryKind, TarError> {
        Ok(match self.type_flag() {
            // Before ustar, a directory was a file whose name ends in a slash.
            b'0' | 0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' => EntryKind::Regular,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(unsupported(offset, path, "sparse file (GNU)")),
            b'D' => return Err(unsupported(offset, path, "incremental dump (GNU)")),
            b'M' => return Err(unsupported(offset, path, "part of a multi-volume archive (GNU)")),
            b'V' => return Err(unsupported(offset, path, "volume label (GNU)")),
            other => {
                let flag = format!("'{}'", other.escape_ascii());
                return Err(unsupported(offset, path, &flag));
            }
        })
    }

    /// The path of the header itself.
    fn path(&self) -> Vec<u8> {
        // GNU tar's own magic ("ustar  ") puts other things where ustar has the prefix.
        let prefix = match self.field(MAGIC) {
            b"ustar\0" => self.string(PREFIX),
            _ => b"",
        };
        let name = self.string(NAME);
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    fn field(&self, (start, len): Field) -> &[u8] {
        self.0.get(start..start.saturating_add(len)).unwrap_or_default()
    }

    /// A field up to its NUL.
    fn string(&self, field: Field) -> &[u8] {
        let field = self.field(field);
        field.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    fn number<Number: TryFrom<i64>>(
        &self,
        field: Field,
        name: &'static str,
        offset: u64,
    ) -> Result<Number, TarError> {
        self.octal_or_binary(field)
            .and_then(|number| Number::try_from(number).ok())
            .ok_or(TarError::Number { offset, field: name })
    }

    /// Octal digits between blanks and NULs, or, marked by the first bit, a big-endian two's
    /// complement number (GNU's extension). An empty field is 0.
    fn octal_or_binary(&self, field: Field) -> Option<i64> {
        let bytes = self.field(field);
        let (&first, rest) = bytes.split_first()?;
        if first & 0x80 != 0 {
            let negative = first & 0x40 != 0;
            let start = i64::from(first & 0x3F).saturating_sub(if negative { 0x40 } else { 0 });
            return rest.iter().try_fold(start, |number, &byte| {
                number.checked_mul(0x100)?.checked_add(i64::from(byte))
            });
        }
        let digits = bytes.trim_ascii_start();
        let end = digits.iter().position(|&byte| byte == 0 || byte == b' ');
        let (digits, after) = digits.split_at(end.unwrap_or(digits.len()));
        if after.iter().any(|&byte| byte != 0 && byte != b' ') {
            return None;
        }
        digits.iter().try_fold(0i64, |number, &byte| {
            let digit = byte.checked_sub(b'0').filter(|&digit| digit < 8)?;
            number.checked_mul(8)?.checked_add(i64::from(digit))
        })
    }
}

fn check_path(path: &[u8], what: &'static str, offset: u64) -> Result<(), TarError> {
    if path.len() > MAX_PATH {
        let (size, max) = (path.len() as u64, MAX_PATH as u64);
        return Err(TarError::TooLong { offset, what, size, max });
    }
    if path.contains(&0) { Err(TarError::Nul { offset, what }) } else { Ok(()) }
}

fn unsupported(offset: u64, path: &[u8], type_name: &str) -> TarError {
    let path = String::from_utf8_lossy(path).into_owned();
    TarError::UnsupportedType { offset, path, type_name: type_name.to_owned() }
}

//! Pax extended headers: records `LENGTH KEY=VALUE\n` (POSIX.1-2017 pax, "pax Header Block").

use super::TarError;

/// Where star, GNU tar and Go put extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
const GNU_SPARSE_PREFIX: &[u8] = b"GNU.sparse.";

/// What a pax header says about the next entry. A later record replaces an earlier one.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Any record about a sparse file: its data would not be what the file holds.
    pub(super) gnu_sparse: bool,
}

impl PaxRecords {
    /// Parses the data of the header at `offset`.
    pub(super) fn parse(mut data: &[u8], offset: u64) -> Result<Self, TarError> {
        let mut records = Self::default();
        while !data.is_empty() {
            let (key, value, rest) = split_record(data)
                .ok_or(TarError::Pax { offset, reason: "a record is not LENGTH KEY=VALUE" })?;
            records.set(key, value).ok_or(TarError::Pax { offset, reason: "a bad value" })?;
            data = rest;
        }
        Ok(records)
    }

    /// `None` if the value is malformed. An empty value takes back what was said before.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let empty = value.is_empty();
        match key {
            b"path" => self.path = (!empty).then(|| value.to_vec()),
            b"linkpath" => self.link = (!empty).then(|| value.to_vec()),
            b"size" => self.size = optional(value, decimal)?,
            b"uid" => self.uid = optional(value, |value| decimal(value)?.try_into().ok())?,
            b"gid" => self.gid = optional(value, |value| decimal(value)?.try_into().ok())?,
            b"mtime" => self.mtime = optional(value, timestamp)?,
            _ if key.starts_with(GNU_SPARSE_PREFIX) => self.gnu_sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Some(())
    }
}

/// The first record's key and value, and what follows it.
fn split_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = data.iter().take(20).position(|&byte| byte == b' ')?;
    let (digits, _) = data.split_at_checked(blank)?;
    let len = usize::try_from(decimal(digits)?).ok()?;
    let (record, rest) = data.split_at_checked(len)?;
    let record = record.get(blank.checked_add(1)?..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = record.split_at_checked(equals)?;
    if key.is_empty() {
        return None;
    }
    Some((key, value.strip_prefix(b"=")?, rest))
}

fn optional<T>(value: &[u8], parse: impl FnOnce(&[u8]) -> Option<T>) -> Option<Option<T>> {
    if value.is_empty() { Some(None) } else { parse(value).map(Some) }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, &byte| {
        let digit = byte.checked_sub(b'0').filter(|&digit| digit < 10)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// `SECONDS` or `SECONDS.FRACTION`, possibly negative; the fraction is cut at nanoseconds.
fn timestamp(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = u32::try_from(decimal(&digits.collect::<Vec<_>>())?).ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (seconds.checked_neg()?, 0),
        // -1.25 is 0.75 seconds after -2.
        (true, _) => {
            (seconds.checked_neg()?.checked_sub(1)?, 1_000_000_000_u32.checked_sub(nanoseconds)?)
        }
    })
}

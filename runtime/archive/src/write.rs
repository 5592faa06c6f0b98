//! Headers of an archive that is made: ustar, with a pax header where ustar's fields are too small
//! (POSIX.1-2017, pax: "ustar Interchange Format" and "pax Header Block").

use std::io::{self, Write};

use crate::tar::EntryKind;

/// Unit of a tar stream.
const BLOCK: usize = 512;

/// What is written about an entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header<'a> {
    /// A regular file, a directory or a symbolic link.
    pub(crate) kind: EntryKind,
    pub(crate) path: &'a [u8],
    /// What a symbolic link refers to.
    pub(crate) link: &'a [u8],
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// In seconds since 1970.
    pub(crate) mtime: u64,
    /// Bytes of data that follow.
    pub(crate) size: u64,
}

/// Writes an archive and counts its bytes.
#[derive(Debug)]
pub(crate) struct TarWriter<W> {
    to: W,
    written: u64,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(to: W) -> Self {
        TarWriter { to, written: 0 }
    }

    /// Writes bytes of an entry, as many as its header said.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written = self.written.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Fills up to the next block.
    pub(crate) fn pad(&mut self) -> io::Result<()> {
        let used = usize::try_from(self.written % BLOCK as u64).unwrap_or(0);
        if used > 0 {
            self.data([0; BLOCK].get(used..).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Writes what is said about an entry.
    pub(crate) fn header(&mut self, header: &Header<'_>) -> io::Result<()> {
        let mut records = Vec::new();
        // Longer than its field, or not certain to be read as it is meant.
        if header.path.len() > 100 {
            record(&mut records, b"path", header.path);
        }
        if header.link.len() > 100 {
            record(&mut records, b"linkpath", header.link);
        }
        for (name, number, digits) in [
            (&b"size"[..], header.size, 11),
            (b"uid", header.uid.into(), 7),
            (b"gid", header.gid.into(), 7),
            (b"mtime", header.mtime, 11),
        ] {
            if !fits(number, digits) {
                record(&mut records, name, number.to_string().as_bytes());
            }
        }
        if !records.is_empty() {
            let size = records.len() as u64;
            let (path, link) = (&b"husk.pax"[..], &b""[..]);
            let about =
                Header { path, link, mode: 0o644, uid: 0, gid: 0, mtime: 0, size, ..*header };
            self.data(&block(&about, b'x'))?;
            self.data(&records)?;
            self.pad()?;
        }
        let flag = match header.kind {
            EntryKind::Directory => b'5',
            EntryKind::Symlink => b'2',
            _ => b'0',
        };
        self.data(&block(header, flag))
    }

    /// Ends the archive. Returns its size in bytes.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.data(&[0; 2 * BLOCK])?;
        self.to.flush()?;
        Ok(self.written)
    }
}

fn fits(number: u64, digits: u32) -> bool {
    number >> (3 * digits) == 0
}

/// Adds a pax record: `LEN NAME=VALUE\n`, whose length counts its own digits.
fn record(records: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    // The blank, the equals sign and the line feed.
    let rest = name.len().saturating_add(value.len()).saturating_add(3);
    let mut len = rest;
    for _ in 0..3 {
        len = rest.saturating_add(len.to_string().len());
    }
    records.extend_from_slice(len.to_string().as_bytes());
    for part in [&b" "[..], name, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// The block of a header. What does not fit is left out: a pax header has it.
fn block(header: &Header<'_>, flag: u8) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, len: usize, bytes: &[u8]| {
        let field = block.get_mut(at..at.saturating_add(len)).unwrap_or_default();
        field.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    };
    let octal = |number: u64, digits: usize| {
        let number = if fits(number, u32::try_from(digits).unwrap_or(0)) { number } else { 0 };
        format!("{number:0digits$o}\0").into_bytes()
    };
    put(0, 100, header.path);
    put(100, 8, &octal(u64::from(header.mode & 0o7777), 7));
    put(108, 8, &octal(header.uid.into(), 7));
    put(116, 8, &octal(header.gid.into(), 7));
    put(124, 12, &octal(header.size, 11));
    put(136, 12, &octal(header.mtime, 11));
    put(148, 8, b"        ");
    put(156, 1, &[flag]);
    put(157, 100, header.link);
    put(257, 8, b"ustar\x0000");
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    let field = block.get_mut(148..156).unwrap_or_default();
    field.iter_mut().zip(sum.as_bytes()).for_each(|(to, from)| *to = *from);
    block
}

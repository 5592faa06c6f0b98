//! A reader of tar streams that is safe to feed anything.
//!
//! Understands what image builders write: ustar, pax and GNU long names. Metadata is bounded
//! before it is allocated ([`MAX_PAX_BYTES`], [`MAX_PATH`]); file data is never held. Fields that
//! the entry's type does not use are ignored, as Go's archive/tar does, so that a layer means the
//! same here as to other runtimes. Nothing here touches a file system.

mod header;
mod pax;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

use std::io::{self, Read};

use header::{BLOCK, RawHeader};
use pax::PaxRecords;

/// Longest path, and longest target of a link, in bytes: Linux' PATH_MAX without its NUL.
pub const MAX_PATH: usize = 4095;
/// Longest pax header of one entry. Holds the longest attribute values that Linux allows.
pub const MAX_PAX_BYTES: u64 = 1 << 20;
/// How many headers (pax, long names) may precede the one they are about.
const MAX_EXTENSION_HEADERS: u32 = 16;

/// Why a tar stream cannot be read. `offset` counts bytes of the uncompressed stream.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream below failed.
    #[error("cannot read the archive at byte {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream ends inside a header or a file.
    #[error("the archive ends early, at byte {offset}")]
    Truncated {
        /// Where.
        offset: u64,
    },
    /// This is not a tar header.
    #[error("no tar header at byte {offset}: its checksum is wrong")]
    Checksum {
        /// Where.
        offset: u64,
    },
    /// A number that is malformed, negative or too large.
    #[error("the header at byte {offset} has a bad {field}")]
    Number {
        /// Where.
        offset: u64,
        /// Which number.
        field: &'static str,
    },
    /// A pax header that is not a list of records.
    #[error("the pax header at byte {offset} is malformed: {reason}")]
    Pax {
        /// Where.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A pax header, path or link target above its limit.
    #[error("the {what} at byte {offset} has {size} bytes, more than {max}")]
    TooLong {
        /// Where.
        offset: u64,
        /// What it is.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// A path or link target with a NUL in it.
    #[error("the {what} at byte {offset} contains a NUL")]
    Nul {
        /// Where.
        offset: u64,
        /// What it is.
        what: &'static str,
    },
    /// Headers about a next entry that does not come.
    #[error("more than {MAX_EXTENSION_HEADERS} extension headers in a row at byte {offset}")]
    TooManyExtensions {
        /// Where.
        offset: u64,
    },
    /// A type of entry that has no place in an image.
    #[error("{path:?} at byte {offset} is of the unsupported type {type_name}")]
    UnsupportedType {
        /// Where.
        offset: u64,
        /// The entry's path.
        path: String,
        /// Its type, in words or as its flag.
        type_name: String,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file, with `size` bytes of data.
    Regular,
    /// Another name for an earlier file, `link`.
    HardLink,
    /// A symbolic link to `link`.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry, with everything that extension headers said about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where its header is in the stream.
    pub offset: u64,
    /// Its type.
    pub kind: EntryKind,
    /// Its path as the archive has it. Not safe to use on a file system.
    pub path: Vec<u8>,
    /// What a link refers to.
    pub link: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of data that follow; 0 for all but regular files.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, in the archive's order.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after the other from a stream.
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    /// Bytes read from `inner`.
    offset: u64,
    /// Data of the current entry that has not been read.
    data_left: u64,
    /// Padding behind that data.
    padding: u64,
    finished: bool,
}

impl<R: Read> TarReader<R> {
    /// Reads small pieces: `inner` should be buffered.
    pub fn new(inner: R) -> Self {
        Self { inner, offset: 0, data_left: 0, padding: 0, finished: false }
    }

    /// The next entry, or `None` at the archive's end. Data of the current one that was not read
    /// is skipped.
    ///
    /// # Errors
    /// See [`TarError`]. The reader is not to be used after an error.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.finished {
            return Ok(None);
        }
        let mut long_path = None;
        let mut long_link = None;
        let mut pax = PaxRecords::default();
        for extensions in 0..=MAX_EXTENSION_HEADERS {
            self.skip_data()?;
            let offset = self.offset;
            let Some(header) = self.read_header()? else {
                self.finished = true;
                return match extensions {
                    0 => Ok(None),
                    _ => Err(TarError::Truncated { offset }),
                };
            };
            match header.type_flag() {
                b'x' => {
                    let size = header.size(offset)?;
                    pax = PaxRecords::parse(&self.read_extension(size)?, offset)?;
                }
                // Global headers say nothing that other runtimes honour (git's commit id).
                b'g' => drop(self.read_global(&header, offset)?),
                b'L' => long_path = Some(self.read_long_name(&header, offset, "path")?),
                b'K' => long_link = Some(self.read_long_name(&header, offset, "link target")?),
                _ => {
                    let entry = header.into_entry(offset, long_path, long_link, pax)?;
                    self.data_left = entry.size;
                    self.padding = padding(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
        Err(TarError::TooManyExtensions { offset: self.offset })
    }

    /// The data of the current entry, up to its end.
    pub fn data(&mut self) -> EntryData<'_, R> {
        EntryData { reader: self }
    }

    /// Bytes of the stream that have been read: right after an entry, where its data starts.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// Skips the data of the current entry by means of the stream below: `seek` moves it forward
    /// by so many bytes. That they exist is not checked.
    pub fn seek_past_data(&mut self, seek: impl FnOnce(&mut R, u64)) {
        let left = self.data_left.saturating_add(self.padding);
        (self.data_left, self.padding) = (0, 0);
        self.offset = self.offset.saturating_add(left);
        seek(&mut self.inner, left);
    }

    /// The stream below, for what follows the archive's end.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// `None` at the end: a block of zeros, or the stream's end where a header would be. Without
    /// the zeros a truncation cannot be seen here; the layer's digest shows it.
    fn read_header(&mut self) -> Result<Option<RawHeader>, TarError> {
        let offset = self.offset;
        let mut block = [0; BLOCK];
        let mut filled = 0usize;
        while filled < BLOCK {
            match self.inner.read(block.get_mut(filled..).unwrap_or_default()) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated { offset: self.offset }),
                Ok(read) => {
                    filled = filled.saturating_add(read);
                    self.offset = self.offset.saturating_add(read as u64);
                }
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { offset: self.offset, source }),
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        RawHeader::parse(block, offset).map(Some)
    }

    fn read_global(&mut self, header: &RawHeader, offset: u64) -> Result<Vec<u8>, TarError> {
        let size = header.size(offset)?;
        self.read_extension(size)
    }

    fn read_long_name(
        &mut self,
        header: &RawHeader,
        offset: u64,
        what: &'static str,
    ) -> Result<Vec<u8>, TarError> {
        let size = header.size(offset)?;
        // With its terminating NUL.
        let max = (MAX_PATH as u64).saturating_add(1);
        if size > max {
            return Err(TarError::TooLong { offset, what, size, max });
        }
        let mut name = self.read_extension(size)?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    /// The data of an extension header, whole.
    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let offset = self.offset;
        if size > MAX_PAX_BYTES {
            let (what, max) = ("extension header", MAX_PAX_BYTES);
            return Err(TarError::TooLong { offset, what, size, max });
        }
        self.data_left = size;
        self.padding = padding(size);
        let mut data = Vec::new();
        self.data()
            .read_to_end(&mut data)
            .map_err(|source| TarError::from_io(source, self.offset))?;
        Ok(data)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let left = self.data_left.saturating_add(self.padding);
        (self.data_left, self.padding) = (0, 0);
        let skipped = io::copy(&mut self.inner.by_ref().take(left), &mut io::sink())
            .map_err(|source| TarError::Io { offset: self.offset, source })?;
        self.offset = self.offset.saturating_add(skipped);
        if skipped < left { Err(TarError::Truncated { offset: self.offset }) } else { Ok(()) }
    }
}

/// Zeros behind `size` bytes of data.
fn padding(size: u64) -> u64 {
    size.checked_next_multiple_of(BLOCK as u64).map_or(0, |end| end.saturating_sub(size))
}

impl TarError {
    /// What [`EntryData`] reported as an I/O error.
    fn from_io(source: io::Error, offset: u64) -> Self {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            Self::Truncated { offset }
        } else {
            Self::Io { offset, source }
        }
    }
}

/// Reads the data of one entry. The stream's end inside it is an error, never a short file.
#[derive(Debug)]
pub struct EntryData<'reader, R> {
    reader: &'reader mut TarReader<R>,
}

impl<R: Read> Read for EntryData<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.reader.data_left).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let read = self.reader.inner.read(buffer.get_mut(..want).unwrap_or_default())?;
        if read == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive ends inside a file",
            ));
        }
        self.reader.offset = self.reader.offset.saturating_add(read as u64);
        self.reader.data_left = self.reader.data_left.saturating_sub(read as u64);
        Ok(read)
    }
}

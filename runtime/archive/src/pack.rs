//! Making an archive of a file or a tree.
//!
//! No symbolic link is followed, and no file outside the tree is read, whatever is changed while it
//! is read: every step is taken from an opened directory.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};

use crate::tar::{EntryKind, MAX_PATH};
use crate::write::{Header, TarWriter};

/// How deep directories may lie in each other.
const MAX_DEPTH: u32 = 256;

/// Why no archive can be made.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Its path in the archive.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A path is too long, or too deep.
    #[error("{path} is too long a path, or too deep")]
    TooDeep {
        /// The path in the archive.
        path: String,
    },
    /// What is to be archived is neither a file nor a directory nor a link.
    #[error("{path} is neither a file nor a directory nor a symbolic link")]
    Unsupported {
        /// Its path in the archive.
        path: String,
    },
    /// Nobody takes the archive.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn read<E: Into<io::Error>>(path: &[u8]) -> impl FnOnce(E) -> PackError {
    let path = text(path);
    move |source| PackError::Read { path, source: source.into() }
}

/// Writes the file or tree that `file` (which may be opened with O_PATH) is, as `name` in the
/// archive. Hard links become files of their own; sockets, pipes and devices in a tree are left out.
/// A file that shrinks meanwhile is filled up with zeros. `owner`, if given, is named as the owner
/// (user and group) of everything. Needs `/proc`. Returns the archive's size in bytes.
///
/// # Errors
/// [`PackError`].
pub fn pack(
    file: BorrowedFd<'_>,
    name: &[u8],
    owner: Option<(u32, u32)>,
    to: impl Write,
) -> Result<u64, PackError> {
    let mut packer = Packer { to: TarWriter::new(to), owner };
    let stat = fstat(file).map_err(read(name))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let dir = openat(file, c".", DIRECTORY, Mode::empty()).map_err(read(name))?;
            packer.directory(dir, &stat, name, MAX_DEPTH)?;
        }
        FileType::RegularFile => {
            // The way from O_PATH to a file that can be read.
            let own = format!("/proc/self/fd/{}", file.as_raw_fd());
            let opened = File::open(own).map_err(read(name))?;
            packer.file(opened, name)?;
        }
        FileType::Symlink => {
            let target = readlinkat(file, c"", Vec::new()).map_err(read(name))?;
            packer.link(&stat, name, &target)?;
        }
        _ => return Err(PackError::Unsupported { path: text(name) }),
    }
    packer.to.finish().map_err(PackError::Write)
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
// Not held up by a pipe that took a file's place.
const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

struct Packer<W> {
    to: TarWriter<W>,
    owner: Option<(u32, u32)>,
}

impl<W: Write> Packer<W> {
    /// What a header says of a file with this status.
    fn about<'a>(&self, stat: &Stat, kind: EntryKind, path: &'a [u8]) -> Header<'a> {
        let (uid, gid) = self.owner.unwrap_or((stat.st_uid, stat.st_gid));
        Header {
            kind,
            path,
            link: b"",
            mode: stat.st_mode & 0o7777,
            uid,
            gid,
            mtime: u64::try_from(stat.st_mtime).unwrap_or(0),
            size: 0,
        }
    }

    fn directory(
        &mut self,
        dir: OwnedFd,
        stat: &Stat,
        path: &[u8],
        depth: u32,
    ) -> Result<(), PackError> {
        if path.len() > MAX_PATH || depth == 0 {
            return Err(PackError::TooDeep { path: text(path) });
        }
        let named = [path, b"/"].concat();
        let header = self.about(stat, EntryKind::Directory, &named);
        self.to.header(&header).map_err(PackError::Write)?;
        let entries = Dir::read_from(&dir).map_err(read(path))?;
        for entry in entries {
            let entry = entry.map_err(read(path))?;
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                self.child(dir.as_fd(), name, &[path, b"/", name.to_bytes()].concat(), depth)?;
            }
        }
        Ok(())
    }

    fn child(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: &[u8],
        depth: u32,
    ) -> Result<(), PackError> {
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            // Removed since the directory was read.
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            stat => stat.map_err(read(path))?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let dir = openat(dir, name, DIRECTORY, Mode::empty()).map_err(read(path))?;
                self.directory(dir, &stat, path, depth.saturating_sub(1))
            }
            FileType::RegularFile => {
                let file = openat(dir, name, FILE, Mode::empty()).map_err(read(path))?;
                self.file(file.into(), path)
            }
            FileType::Symlink => {
                let target = readlinkat(dir, name, Vec::new()).map_err(read(path))?;
                self.link(&stat, path, &target)
            }
            _ => Ok(()),
        }
    }

    fn link(&mut self, stat: &Stat, path: &[u8], target: &CStr) -> Result<(), PackError> {
        let link = target.to_bytes();
        let header = Header { link, ..self.about(stat, EntryKind::Symlink, path) };
        self.to.header(&header).map_err(PackError::Write)
    }

    fn file(&mut self, mut file: File, path: &[u8]) -> Result<(), PackError> {
        if path.len() > MAX_PATH {
            return Err(PackError::TooDeep { path: text(path) });
        }
        let stat = fstat(&file).map_err(read(path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            // Something else took its place.
            return Ok(());
        }
        let mut left = u64::try_from(stat.st_size).unwrap_or(0);
        let header = Header { size: left, ..self.about(&stat, EntryKind::Regular, path) };
        self.to.header(&header).map_err(PackError::Write)?;
        let mut buffer = vec![0; 64 * 1024];
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let piece = buffer.get_mut(..want).unwrap_or_default();
            let read_now = match file.read(piece) {
                Ok(0) => {
                    piece.fill(0);
                    want
                }
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(read(path)(error)),
            };
            self.to.data(piece.get(..read_now).unwrap_or_default()).map_err(PackError::Write)?;
            left = left.saturating_sub(read_now as u64);
        }
        self.to.pad().map_err(PackError::Write)
    }
}

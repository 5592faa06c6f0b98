//! The end of a file that was bound into a container, such as that for its last words.
//!
//! Not of any file of the container: a path there may lead into a file system that the container
//! itself serves (FUSE), on which the agent's one thread would wait. What config.json binds is the
//! guest's, and still there when the container has ended.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

use super::mounts::Kind;
use super::{ContainerError, Runner};
use crate::lock;

/// Most bytes that are read.
const MAX_BYTES: u32 = 64 * 1024;

/// Longest path in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;

impl Runner {
    /// Reads at most `max` bytes from the end of a file.
    ///
    /// # Errors
    /// [`ContainerError`], e.g. if there is no such file, or it is no regular one.
    pub(crate) fn read_file(
        &self,
        id: &str,
        path: &str,
        max: u32,
    ) -> Result<Vec<u8>, ContainerError> {
        if !path.starts_with('/') || path.len() > MAX_PATH || path.contains('\0') {
            return Err(ContainerError::Path(path.to_owned()));
        }
        if max > MAX_BYTES {
            let must = "at most 65536";
            return Err(ContainerError::Value { field: "max_bytes", value: max, must });
        }
        let no_file = |reason: String| ContainerError::NoFile {
            container: id.to_owned(),
            path: path.to_owned(),
            reason,
        };
        let source = {
            let mut table = lock(&self.table);
            let mounts = &table.container(id)?.plan.mounts;
            match mounts.iter().rev().find(|m| m.destination == path).map(|m| &m.kind) {
                Some(Kind::Bind { source, .. }) => source.clone(),
                _ => return Err(no_file("its configuration binds none there".into())),
            }
        };
        open(&source).and_then(|file| read_end(file, max)).map_err(|e| no_file(e.to_string()))
    }
}

/// Opens a regular file. Nothing that can block, or does something when it is opened: a container
/// may have put a pipe or a device there.
fn open(source: &str) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found: OwnedFd =
        rustix::fs::openat2(CWD, source, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let mode = rustix::fs::fstat(&found)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    reopen(&found)
}

/// Opens for reading what a path descriptor stands for.
fn reopen(found: &OwnedFd) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", found.as_fd().as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

fn read_end(mut file: File, max: u32) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(max.into())))?;
    let mut content = Vec::new();
    // It may grow meanwhile.
    file.take(max.into()).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_file_is_read_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, "0123456789").unwrap();
        let open = || File::open(&path).unwrap();
        assert_eq!(read_end(open(), 4).unwrap(), b"6789");
        assert_eq!(read_end(open(), 100).unwrap(), b"0123456789");
        assert_eq!(read_end(open(), 0).unwrap(), b"");
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let text = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::os::unix::fs::symlink("/etc/passwd", text("link")).unwrap();
        for path in [text("link"), directory.path().to_str().unwrap().to_owned(), text("none")] {
            assert!(open(&path).is_err(), "{path}");
        }
    }
}

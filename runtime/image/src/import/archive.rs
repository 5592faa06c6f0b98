//! Tar archives that hold the files of an image.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::ImportError;
use husk_archive::tar::{EntryKind, TarReader};

/// Files that an archive may have: some per layer, and one per image.
const MAX_FILES: usize = 100_000;
/// Links from one file of the archive to another that are followed.
const MAX_LINKS: u32 = 8;

/// Where a file of the archive is.
#[derive(Debug, Clone)]
enum Member {
    Data {
        offset: u64,
        size: u64,
    },
    /// The same as another, by its path; `docker save` links layers that occur twice.
    Link(String),
}

/// An archive whose files can be read in any order.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    path: PathBuf,
    members: HashMap<String, Member>,
}

impl Archive {
    /// Reads through the archive once. Of files that occur twice the last counts.
    pub(super) fn open(path: &Path) -> Result<Self, ImportError> {
        let io = |source| ImportError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let mut members = HashMap::new();
        // Data is skipped by seeking: an archive of gigabytes is indexed in milliseconds. One that
        // is truncated shows it when its last file is read.
        let mut reader = TarReader::new(Skipping { file: &file, position: 0 });
        let failed = |source| ImportError::Archive { path: path.to_owned(), source };
        while let Some(entry) = reader.next_entry().map_err(failed)? {
            let data_start = reader.position();
            reader.seek_past_data(|below, bytes| {
                below.position = below.position.saturating_add(bytes);
            });
            let Some(name) = plain_name(&entry.path) else { continue };
            let member = match entry.kind {
                EntryKind::Regular => Member::Data { offset: data_start, size: entry.size },
                EntryKind::HardLink => match plain_name(&entry.link) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                EntryKind::Symlink => match relative_to(&name, &entry.link) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            members.insert(name, member);
            if members.len() > MAX_FILES {
                let reason = format!("it holds more than {MAX_FILES} files");
                return Err(ImportError::Format { path: path.to_owned(), reason });
            }
        }
        Ok(Self { file, path: path.to_owned(), members })
    }

    /// The file of that name in the archive.
    pub(super) fn file(&self, name: &str) -> Result<MemberReader<'_>, ImportError> {
        let mut current = name;
        for _ in 0..MAX_LINKS {
            match self.members.get(current) {
                Some(&Member::Data { offset, size }) => {
                    return Ok(MemberReader { file: &self.file, position: offset, left: size });
                }
                Some(Member::Link(target)) => current = target,
                None => break,
            }
        }
        let reason = format!("{name} is not in it");
        Err(ImportError::Format { path: self.path.clone(), reason })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Bytes of the file of that name.
    pub(super) fn size(&self, name: &str) -> Result<u64, ImportError> {
        self.file(name).map(|reader| reader.left)
    }
}

/// One spelling for each path; `None` for what no file of an image has.
fn plain_name(path: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(path).ok()?;
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// What a symbolic link at `name` refers to, inside the archive.
fn relative_to(name: &str, link: &[u8]) -> Option<String> {
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    plain_name(&[directory.as_bytes(), b"/", link].concat())
}

/// Reads a file at positions of its own, so that several readers can share it.
#[derive(Debug)]
pub(super) struct MemberReader<'a> {
    file: &'a File,
    position: u64,
    left: u64,
}

impl Read for MemberReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        let read = self.file.read_at(part, self.position)?;
        self.position = self.position.saturating_add(read as u64);
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

/// As [`MemberReader`], over the whole file.
struct Skipping<'a> {
    file: &'a File,
    position: u64,
}

impl Read for Skipping<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position = self.position.saturating_add(read as u64);
        Ok(read)
    }
}

//! Files that grow to a size and are then rotated: `0.log` becomes `0.log.1`, that `0.log.2`, and so
//! on; the oldest is dropped. And reading them, also while they are written: a reader notices
//! rotation by the files' identity and goes on where it was.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How large and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Largest size of a file in bytes; at least one write goes into each.
    pub max_bytes: u64,
    /// How many files there may be, the one that is written included; at least 1.
    pub max_files: u32,
}

impl Default for Rotation {
    /// As the kubelet's.
    fn default() -> Self {
        Rotation { max_bytes: 10 << 20, max_files: 5 }
    }
}

/// Most files that are looked for. Who allows more keeps more than is ever read.
pub const MAX_FILES: u32 = 100;

/// How often a reader looks again when files are rotated under its eyes.
const RETRIES: u32 = 10;

fn rotated(path: &Path, number: u32) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// A file that is appended to.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    rotation: Rotation,
    file: File,
    size: u64,
}

impl Writer {
    /// Opens the file, made if it does not exist, for its owner only.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(path: PathBuf, rotation: Rotation) -> io::Result<Self> {
        let (file, size) = open_to_append(&path)?;
        Ok(Writer { path, rotation, file, size })
    }

    /// Appends whole lines, which stay in one file.
    ///
    /// # Errors
    /// As write(2) and rename(2). A later write may succeed.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let len = u64::try_from(lines.len()).unwrap_or(u64::MAX);
        if self.size > 0 && self.size.saturating_add(len) > self.rotation.max_bytes {
            self.rotate()?;
        }
        self.file.write_all(lines)?;
        self.size = self.size.saturating_add(len);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let oldest = self.rotation.max_files.clamp(1, MAX_FILES).saturating_sub(1);
        if oldest == 0 {
            std::fs::remove_file(&self.path)?;
        }
        for number in (0..oldest).rev() {
            let (from, to) = (rotated(&self.path, number), rotated(&self.path, number + 1));
            match std::fs::rename(&from, &to) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        (self.file, self.size) = open_to_append(&self.path)?;
        Ok(())
    }
}

fn open_to_append(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options().append(true).create(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

/// Removes a file and all that it was rotated to.
///
/// # Errors
/// As unlink(2).
pub fn remove(path: &Path) -> io::Result<()> {
    for number in 0..MAX_FILES {
        match std::fs::remove_file(rotated(path, number)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The first may be missing for a moment of rotation.
                if number > 0 {
                    return Ok(());
                }
            }
            result => result?,
        }
    }
    Ok(())
}

/// Reads a file and what it was rotated to, the oldest first.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    current: Option<File>,
    /// Whether a file was dropped before it was read to its end.
    lost: bool,
}

/// Which file it is, whatever it is called.
fn identity(file: &std::fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

impl Reader {
    /// Begins with the oldest file that there is.
    #[must_use]
    pub fn from_start(path: PathBuf) -> Self {
        Reader { path, current: None, lost: false }
    }

    /// Begins at the end of what is there now.
    ///
    /// # Errors
    /// As open(2); that there is no file is none.
    pub fn from_end(path: PathBuf) -> io::Result<Self> {
        let current = match File::open(&path) {
            Ok(mut file) => {
                file.seek(SeekFrom::End(0))?;
                Some(file)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Reader { path, current, lost: false })
    }

    /// Whether output was dropped before it was read, since this was last asked.
    pub fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// The file to read after the current one: the next younger one, or the oldest if there is no
    /// current one (any more). `None` if the current one is the youngest.
    fn next(&self) -> io::Result<Option<Next>> {
        let current = self.current.as_ref().map(File::metadata).transpose()?;
        let current = current.as_ref().map(identity);
        for _ in 0..RETRIES {
            // From the youngest to the oldest.
            let mut younger = None;
            let mut found = false;
            let mut gaps = 0;
            for number in 0..MAX_FILES {
                match std::fs::metadata(rotated(&self.path, number)) {
                    Ok(file) if current == Some(identity(&file)) => {
                        found = true;
                        break;
                    }
                    Ok(file) => younger = Some((number, identity(&file))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => gaps += 1,
                    Err(error) => return Err(error),
                }
                // One may be missing in the midst of a rotation.
                if gaps > 1 {
                    break;
                }
            }
            let Some((number, wanted)) = younger else { return Ok(None) };
            match File::open(rotated(&self.path, number)) {
                Ok(file) if identity(&file.metadata()?) == wanted => {
                    return Ok(Some(Next { file, lost: current.is_some() && !found }));
                }
                // Rotated since.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// See [`Reader::next`].
struct Next {
    file: File,
    /// Whether the current file and perhaps others between are gone.
    lost: bool,
}

impl Read for Reader {
    /// 0 is the end for now.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Each round goes to a younger file.
        for _ in 0..=MAX_FILES {
            if let Some(file) = &mut self.current {
                match file.read(buffer)? {
                    0 => {}
                    n => return Ok(n),
                }
            }
            let Some(next) = self.next()? else { return Ok(0) };
            // Nobody writes to it any more, but somebody may have before it was rotated.
            if let Some(file) = &mut self.current {
                match file.read(buffer)? {
                    0 => {}
                    n => return Ok(n),
                }
            }
            self.lost |= next.lost;
            self.current = Some(next.file);
        }
        Ok(0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(reader: &mut Reader) -> String {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_rotated_by_size_and_the_oldest_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let rotation = Rotation { max_bytes: 10, max_files: 3 };
        let mut writer = Writer::open(path.clone(), rotation).unwrap();
        for line in ["11111111\n", "22222222\n", "33333333\n", "44444444\n"] {
            writer.write(line.as_bytes()).unwrap();
        }
        assert_eq!(names(dir.path()), ["0.log", "0.log.1", "0.log.2"]);
        let mut reader = Reader::from_start(path.clone());
        assert_eq!(read_all(&mut reader), "22222222\n33333333\n44444444\n");
        assert!(!reader.take_lost());
        remove(&path).unwrap();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_is_larger_than_a_file_is_written_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut writer =
            Writer::open(path.clone(), Rotation { max_bytes: 1, max_files: 1 }).unwrap();
        for line in ["one\n", "two\n"] {
            writer.write(line.as_bytes()).unwrap();
        }
        assert_eq!(read_all(&mut Reader::from_start(path)), "two\n");
        assert_eq!(names(dir.path()), ["0.log"]);
    }

    #[test]
    fn a_reader_that_is_too_slow_learns_that_it_lost_something() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut writer =
            Writer::open(path.clone(), Rotation { max_bytes: 4, max_files: 2 }).unwrap();
        writer.write(b"aaa\n").unwrap();
        let mut reader = Reader::from_start(path);
        assert_eq!(read_all(&mut reader), "aaa\n");
        for line in ["bbb\n", "ccc\n", "ddd\n"] {
            writer.write(line.as_bytes()).unwrap();
        }
        assert_eq!(read_all(&mut reader), "ccc\nddd\n");
        assert!(reader.take_lost() && !reader.take_lost());
    }

    #[test]
    fn a_reader_may_begin_at_the_end_or_before_there_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut early = Reader::from_end(path.clone()).unwrap();
        assert_eq!(read_all(&mut early), "");
        let mut writer = Writer::open(path.clone(), Rotation::default()).unwrap();
        writer.write(b"old\n").unwrap();
        assert_eq!(read_all(&mut early), "old\n");
        let mut late = Reader::from_end(path).unwrap();
        writer.write(b"new\n").unwrap();
        assert_eq!(read_all(&mut late), "new\n");
    }

    proptest! {
        #[test]
        fn a_follower_that_keeps_up_reads_everything_once(
            steps in proptest::collection::vec((1_usize..20, any::<bool>()), 1..60),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("0.log");
            let rotation = Rotation { max_bytes: 30, max_files: 4 };
            let mut writer = Writer::open(path.clone(), rotation).unwrap();
            let mut reader = Reader::from_start(path);
            let (mut written, mut read, mut since) = (String::new(), String::new(), 0);
            for (number, (len, reads)) in steps.into_iter().enumerate() {
                let line = format!("{}{number}\n", "x".repeat(len));
                writer.write(line.as_bytes()).unwrap();
                written.push_str(&line);
                since += line.len();
                // Well before it would be dropped.
                if reads || since > 40 {
                    read.push_str(&read_all(&mut reader));
                    since = 0;
                }
            }
            read.push_str(&read_all(&mut reader));
            prop_assert_eq!(read, written);
            prop_assert!(!reader.take_lost());
        }
    }
}

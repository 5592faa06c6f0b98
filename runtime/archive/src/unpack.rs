//! Unpacking an archive into a directory, and nowhere else, whoever made it.
//!
//! Every step is taken from an opened directory, and no symbolic link is followed, whether it was in
//! the archive or there before: an archive cannot lead outside, not even while somebody changes the
//! directory at the same time.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod, fchown,
    futimens, mkdirat, openat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::tar::{Entry, EntryKind, TarError, TarReader};

/// How deep directories may lie in each other.
const MAX_DEPTH: usize = 256;

/// Most entries of an archive.
const MAX_ENTRIES: u64 = 10_000_000;

/// Why an archive cannot be unpacked. What came before is there.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no archive, or ends early.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A path that leads outside, or is too deep.
    #[error("the archive has the path {path:?}, which leads outside or is too deep")]
    BadPath {
        /// The path.
        path: String,
    },
    /// An entry that has no place where it is unpacked.
    #[error("{path:?} is a hard link, a pipe or a device, which are not unpacked")]
    Unsupported {
        /// Its path.
        path: String,
    },
    /// A symbolic link or file is where a directory is to be.
    #[error(
        "{path:?}: something that is no directory is in the way, e.g. a symbolic link, which is not followed"
    )]
    InTheWay {
        /// The path of the entry.
        path: String,
    },
    /// Too many entries.
    #[error("the archive has more than {MAX_ENTRIES} entries")]
    TooMany,
    /// A file cannot be made or written.
    #[error("cannot make {path:?}")]
    Make {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How to unpack.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Whether owners, and set-user-ID and set-group-ID bits, are as in the archive; else files are
    /// the caller's.
    pub owners: bool,
    /// A name instead of the first component of all paths.
    pub rename: Option<&'a OsStr>,
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Reads an archive to its end and unpacks it into `dir`. A file that is there already is replaced,
/// a directory stays with what is in it. Directories can be entered and changed by their owner,
/// whatever their mode in the archive. Returns the archive's size in bytes.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack(
    dir: BorrowedFd<'_>,
    from: impl Read,
    options: Options<'_>,
) -> Result<u64, UnpackError> {
    let mut archive = TarReader::new(from);
    let mut entries = 0_u64;
    while let Some(entry) = archive.next_entry()? {
        entries = entries.saturating_add(1);
        if entries > MAX_ENTRIES {
            return Err(UnpackError::TooMany);
        }
        let components = components(&entry.path, options.rename)?;
        // The directory itself, which is there.
        let Some((name, parents)) = components.split_last() else { continue };
        let parent = walk(dir, parents, &entry.path)?;
        let make = Make { parent: parent.as_fd(), name, entry: &entry, owners: options.owners };
        match entry.kind {
            EntryKind::Directory => make.directory()?,
            EntryKind::Regular => make.file(archive.data())?,
            EntryKind::Symlink => make.link()?,
            EntryKind::HardLink
            | EntryKind::CharDevice
            | EntryKind::BlockDevice
            | EntryKind::Fifo => {
                return Err(UnpackError::Unsupported { path: text(&entry.path) });
            }
        }
    }
    let size = archive.position();
    // What follows the end is padding; its reader would otherwise see a closed connection.
    let rest = io::copy(&mut archive.into_inner(), &mut io::sink());
    let rest = rest.map_err(|source| TarError::Io { offset: size, source })?;
    Ok(size.saturating_add(rest))
}

fn components<'a>(
    path: &'a [u8],
    rename: Option<&'a OsStr>,
) -> Result<Vec<&'a OsStr>, UnpackError> {
    let bad = || UnpackError::BadPath { path: text(path) };
    let mut components: Vec<&OsStr> = path
        .split(|byte| *byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .map(OsStr::from_bytes)
        .collect();
    if components.len() > MAX_DEPTH || components.contains(&OsStr::new("..")) {
        return Err(bad());
    }
    if let (Some(name), Some(first)) = (rename, components.first_mut()) {
        *first = name;
    }
    Ok(components)
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn make_failed(path: &[u8]) -> impl FnOnce(Errno) -> UnpackError {
    let path = text(path);
    move |errno| match errno {
        Errno::NOTDIR | Errno::LOOP => UnpackError::InTheWay { path },
        errno => UnpackError::Make { path, source: errno.into() },
    }
}

/// Opens the directory at the end of these names, making what is missing.
fn walk(from: BorrowedFd<'_>, names: &[&OsStr], path: &[u8]) -> Result<OwnedFd, UnpackError> {
    let mut dir = openat(from, c".", DIRECTORY, Mode::empty()).map_err(make_failed(path))?;
    for name in names {
        dir = match openat(&dir, *name, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => {
                match mkdirat(&dir, *name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(make_failed(path)(errno)),
                }
                openat(&dir, *name, DIRECTORY, Mode::empty()).map_err(make_failed(path))?
            }
            opened => opened.map_err(make_failed(path))?,
        };
    }
    Ok(dir)
}

/// An entry that is to be made.
struct Make<'a> {
    parent: BorrowedFd<'a>,
    name: &'a OsStr,
    entry: &'a Entry,
    owners: bool,
}

impl Make<'_> {
    fn failed(&self) -> impl FnOnce(Errno) -> UnpackError {
        make_failed(&self.entry.path)
    }

    fn mode(&self) -> Mode {
        Mode::from_raw_mode(self.entry.mode & if self.owners { 0o7777 } else { 0o777 })
    }

    fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.entry.uid)), Some(Gid::from_raw(self.entry.gid)))
    }

    fn directory(&self) -> Result<(), UnpackError> {
        match mkdirat(self.parent, self.name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(self.failed()(errno)),
        }
        let dir =
            openat(self.parent, self.name, DIRECTORY, Mode::empty()).map_err(self.failed())?;
        if self.owners {
            let (uid, gid) = self.owner();
            fchown(&dir, uid, gid).map_err(self.failed())?;
        }
        fchmod(&dir, self.mode() | Mode::RWXU).map_err(self.failed())
    }

    /// Makes room for something that is no directory.
    fn clear(&self) -> Result<(), UnpackError> {
        match unlinkat(self.parent, self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed()(errno)),
        }
    }

    fn file(&self, mut data: impl Read) -> Result<(), UnpackError> {
        self.clear()?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(self.parent, self.name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(self.failed())?;
        let mut file = File::from(file);
        let path = || text(&self.entry.path);
        io::copy(&mut data, &mut file)
            .map_err(|source| UnpackError::Make { path: path(), source })?;
        if self.owners {
            let (uid, gid) = self.owner();
            fchown(&file, uid, gid).map_err(self.failed())?;
        }
        // After the owner, whose change takes away set-user-ID.
        fchmod(&file, self.mode()).map_err(self.failed())?;
        let (tv_sec, nanoseconds) = self.entry.mtime;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec, tv_nsec: nanoseconds.min(999_999_999).into() },
        };
        futimens(&file, &times).map_err(self.failed())
    }

    fn link(&self) -> Result<(), UnpackError> {
        self.clear()?;
        symlinkat(OsStr::from_bytes(&self.entry.link), self.parent, self.name)
            .map_err(self.failed())?;
        if self.owners {
            let (uid, gid) = self.owner();
            chownat(self.parent, self.name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(self.failed())?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::pack::pack;

    fn open(path: &Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    }

    fn unpack_to(dir: &Path, archive: &[u8], options: Options<'_>) -> Result<u64, UnpackError> {
        unpack(File::open(dir).unwrap().as_fd(), archive, options)
    }

    fn packed(path: &Path, name: &str) -> Vec<u8> {
        let mut archive = Vec::new();
        let size = pack(open(path).as_fd(), name.as_bytes(), None, &mut archive).unwrap();
        assert_eq!(size, archive.len() as u64);
        archive
    }

    #[test]
    fn a_tree_comes_back_as_it_was() {
        let from = tempfile::tempdir().unwrap();
        let tree = from.path().join("tree");
        let deep = tree.join("a".repeat(90)).join("b".repeat(90));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("long"), "deep").unwrap();
        fs::write(tree.join("big"), vec![7; 200_000]).unwrap();
        fs::write(tree.join("empty"), "").unwrap();
        fs::set_permissions(tree.join("big"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("x".repeat(150), tree.join("link")).unwrap();
        let archive = packed(&tree, "tree");

        // Another program reads it as well.
        let mut read = ::tar::Archive::new(archive.as_slice());
        assert_eq!(read.entries().unwrap().map(Result::unwrap).count(), 7);

        let to = tempfile::tempdir().unwrap();
        let rename = Some(OsStr::new("other"));
        unpack_to(to.path(), &archive, Options { owners: false, rename }).unwrap();
        let other = to.path().join("other");
        assert_eq!(fs::read(other.join("big")).unwrap(), vec![7; 200_000]);
        let long = other.join("a".repeat(90)).join("b".repeat(90)).join("long");
        assert_eq!(fs::read_to_string(long).unwrap(), "deep");
        assert_eq!(fs::read_link(other.join("link")).unwrap(), Path::new(&"x".repeat(150)));
        let big = fs::metadata(other.join("big")).unwrap();
        assert_eq!(big.mode() & 0o7777, 0o751, "no set-user-ID");
        assert_eq!(big.mtime(), fs::metadata(tree.join("big")).unwrap().mtime());
        // Once more over what is there.
        unpack_to(to.path(), &archive, Options { owners: false, rename }).unwrap();
    }

    #[test]
    fn a_file_and_a_link_are_archives_too() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("f"), "content").unwrap();
        symlink("/etc/passwd", from.path().join("l")).unwrap();
        let to = tempfile::tempdir().unwrap();
        for name in ["f", "l"] {
            let archive = packed(&from.path().join(name), name);
            unpack_to(to.path(), &archive, Options::default()).unwrap();
        }
        assert_eq!(fs::read_to_string(to.path().join("f")).unwrap(), "content");
        assert_eq!(fs::read_link(to.path().join("l")).unwrap(), Path::new("/etc/passwd"));
    }

    fn hostile(kind: ::tar::EntryType, path: &str, link: &str) -> Vec<u8> {
        let mut header = ::tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_mode(0o777);
        header.set_size(0);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    #[test]
    fn nothing_leads_outside() {
        use ::tar::EntryType as Kind;
        let outside = tempfile::tempdir().unwrap();
        let victim = outside.path().join("victim");
        fs::create_dir(&victim).unwrap();
        let dir = outside.path().join("dir");
        fs::create_dir(&dir).unwrap();
        let target = victim.to_str().unwrap();
        let link = hostile(Kind::Symlink, "l", target);
        let cases: [(Vec<Vec<u8>>, &str); 6] = [
            (vec![hostile(Kind::Regular, "../victim/x", "")], "leads outside"),
            (vec![hostile(Kind::Directory, "a/../../victim/x", "")], "leads outside"),
            (vec![link.clone(), hostile(Kind::Regular, "l/x", "")], "in the way"),
            (vec![link.clone(), hostile(Kind::Directory, "l/x", "")], "in the way"),
            (vec![link.clone(), hostile(Kind::Directory, "l", "")], "in the way"),
            (vec![hostile(Kind::Link, "h", "/etc/passwd")], "hard link"),
        ];
        for (entries, words) in cases {
            let error = unpack_to(&dir, &entries.concat(), Options::default()).unwrap_err();
            assert!(error.to_string().contains(words), "{words}: {error}");
        }
        // An absolute path is one below the directory; a file replaces a link, and not its target.
        fs::write(victim.join("f"), "safe").unwrap();
        let file = victim.join("f");
        let over = hostile(Kind::Symlink, "f", file.to_str().unwrap());
        let entries = [over, hostile(Kind::Regular, "/f", "")].concat();
        unpack_to(&dir, &entries, Options::default()).unwrap();
        assert!(fs::symlink_metadata(dir.join("f")).unwrap().is_file());
        assert_eq!(fs::read_to_string(&file).unwrap(), "safe");
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn no_archive_panics_or_leads_outside(
            mut patches in proptest::collection::vec((0_usize..1536, any::<u8>()), 0..20),
            fix in any::<bool>(),
        ) {
            let outside = tempfile::tempdir().unwrap();
            let dir = outside.path().join("dir");
            fs::create_dir(&dir).unwrap();
            let mut archive = [
                hostile(::tar::EntryType::Symlink, "a", ".."),
                hostile(::tar::EntryType::Regular, "a/b", ""),
                hostile(::tar::EntryType::Directory, "c", ""),
            ]
            .concat();
            patches.truncate(20);
            for (at, byte) in patches {
                archive[at] = byte;
            }
            for header in archive.chunks_exact_mut(512).filter(|_| fix) {
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
                header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            let _any = unpack_to(&dir, &archive, Options::default());
            prop_assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        }
    }
}

//! Paths inside a container's root, which the container's image made and may have made to mislead:
//! every step is resolved by the kernel with the container's root as the root (openat2,
//! RESOLVE_IN_ROOT), so that no symbolic link and no `..` leads outside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// What a path must lead to, and is made as if it leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Directory,
    File,
}

/// Most links followed in one path, as in the kernel.
const MAX_LINKS: usize = 40;

/// How often a path is tried again whose parts others rename meanwhile: the kernel then cannot be
/// sure that a `..` did not lead outside, and says so.
const MAX_TRIES: usize = 1000;

/// Opens (O_PATH) what `path` leads to in `root`.
///
/// # Errors
/// `ENOENT` and so on, as open(2).
pub(crate) fn open(root: BorrowedFd<'_>, path: &str) -> rustix::io::Result<OwnedFd> {
    // An empty path means the root itself.
    let path = if path.is_empty() { "/" } else { path };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut tries = 0;
    loop {
        tries += 1;
        match rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Err(Errno::AGAIN) if tries < MAX_TRIES => {}
            result => return result,
        }
    }
}

/// As [`open`], making what is missing: directories with `mode`, and at the end a directory or an
/// empty file.
///
/// # Errors
/// As [`open`]; `ELOOP` for a chain of links that is too long.
pub(crate) fn open_or_make(
    root: BorrowedFd<'_>,
    path: &str,
    make: Make,
    mode: Mode,
) -> io::Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..=MAX_LINKS {
        match open(root, &path) {
            Err(Errno::NOENT) => {}
            result => return Ok(result?),
        }
        match make_missing(root, &path, make, mode)? {
            Made::All => return Ok(open(root, &path)?),
            Made::Redirected(elsewhere) => path = elsewhere,
        }
    }
    Err(Errno::LOOP.into())
}

/// The result of one walk along a path.
enum Made {
    /// The whole path exists now.
    All,
    /// A link that leads nowhere yet lies in the way: this is the path with the link replaced.
    Redirected(String),
}

/// Walks along `path` and makes the first missing components.
fn make_missing(root: BorrowedFd<'_>, path: &str, make: Make, mode: Mode) -> io::Result<Made> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    let mut parent = open(root, "/")?;
    let mut prefix = String::new();
    for (index, part) in parts.iter().enumerate() {
        let before = prefix.clone();
        prefix.push('/');
        prefix.push_str(part);
        let next = match open(root, &prefix) {
            Err(Errno::NOENT) => {
                let last = index + 1 == parts.len();
                match make_one(
                    parent.as_fd(),
                    part,
                    if last { make } else { Make::Directory },
                    mode,
                ) {
                    Ok(()) => open(root, &prefix)?,
                    Err(Errno::EXIST) => {
                        // It exists and yet leads nowhere: a link.
                        let target = match rustix::fs::readlinkat(&parent, *part, Vec::new()) {
                            // Or it was one: look again.
                            Err(Errno::INVAL | Errno::NOENT) => {
                                return Ok(Made::Redirected(path.to_owned()));
                            }
                            target => target?,
                        };
                        let target = target.into_string().map_err(|_| Errno::ILSEQ)?;
                        let base = if target.starts_with('/') { "" } else { before.as_str() };
                        let rest = parts.get(index + 1..).unwrap_or_default().join("/");
                        let path = format!("{base}/{target}/{rest}");
                        return Ok(Made::Redirected(path.trim_end_matches('/').to_owned()));
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            result => result?,
        };
        parent = next;
    }
    Ok(Made::All)
}

/// Makes one directory or file.
fn make_one(parent: BorrowedFd<'_>, name: &str, make: Make, mode: Mode) -> rustix::io::Result<()> {
    match make {
        Make::Directory => {
            rustix::fs::mkdirat(parent, name, mode)?;
            // The umask must not have a say. By descriptor: what has this name now may be a link that
            // another container put there.
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
            rustix::fs::fchmod(made, mode)
        }
        Make::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    struct Root {
        outside: tempfile::TempDir,
        fd: OwnedFd,
    }

    /// A directory `root` in a temporary one, which is the outside.
    fn root() -> Root {
        let outside = tempfile::tempdir().unwrap();
        let path = outside.path().join("root");
        fs::create_dir(&path).unwrap();
        let fd = fs::File::open(path).unwrap().into();
        Root { outside, fd }
    }

    impl Root {
        fn path(&self) -> std::path::PathBuf {
            self.outside.path().join("root")
        }

        fn make(&self, path: &str, make: Make) -> io::Result<u64> {
            let fd = open_or_make(self.fd.as_fd(), path, make, Mode::from_raw_mode(0o755))?;
            Ok(fs::File::from(fd).metadata()?.ino())
        }

        fn inode(&self, path: &str) -> u64 {
            fs::metadata(self.path().join(path)).unwrap().ino()
        }
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let root = root();
        assert_eq!(root.make("/a/b/c", Make::Directory).unwrap(), root.inode("a/b/c"));
        assert_eq!(root.make("/a/d/f", Make::File).unwrap(), root.inode("a/d/f"));
        assert!(fs::metadata(root.path().join("a/d/f")).unwrap().is_file());
        assert_eq!(root.make("/a/d/f", Make::File).unwrap(), root.inode("a/d/f"));
    }

    #[test]
    fn links_lead_nowhere_but_inside() {
        let root = root();
        fs::create_dir(root.path().join("etc")).unwrap();
        symlink("/etc", root.path().join("absolute")).unwrap();
        symlink("../../../../etc", root.path().join("relative")).unwrap();
        for link in ["absolute", "relative"] {
            let made = root.make(&format!("/{link}/{link}"), Make::Directory).unwrap();
            assert_eq!(made, root.inode(&format!("etc/{link}")));
        }
        assert!(!std::path::Path::new("/etc/absolute").exists());
    }

    #[test]
    fn a_link_to_what_does_not_exist_yet_is_made_to_lead_there() {
        let root = root();
        fs::create_dir(root.path().join("var")).unwrap();
        symlink("/run", root.path().join("var/run")).unwrap();
        symlink("../x/y", root.path().join("var/deep")).unwrap();
        assert_eq!(
            root.make("/var/run/secrets", Make::Directory).unwrap(),
            root.inode("run/secrets")
        );
        assert_eq!(root.make("/var/deep", Make::File).unwrap(), root.inode("x/y"));
    }

    #[test]
    fn dots_do_not_lead_above_the_root() {
        let root = root();
        root.make("/../../escaped", Make::Directory).unwrap();
        assert!(root.path().join("escaped").is_dir());
        assert!(!root.outside.path().join("escaped").exists());
    }

    #[test]
    fn a_loop_of_links_ends_with_an_error() {
        let root = root();
        symlink("/b", root.path().join("a")).unwrap();
        symlink("/a", root.path().join("b")).unwrap();
        let error = root.make("/a/x", Make::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let root = root();
        fs::write(root.path().join("f"), "").unwrap();
        let error = root.make("/f/x", Make::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }
}

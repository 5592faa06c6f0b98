//! Volumes of small files, replaced all at once, as the kubelet's AtomicWriter does it.
//!
//! ```text
//!   VOLUME/..data        -> ..0000000000000002     renamed over when all files are there
//!   VOLUME/..0000000000000002/KEY                  the files
//!   VOLUME/KEY           -> ..data/KEY             what containers open
//! ```
//!
//! A reader therefore sees either all old files or all new ones, and who watches the volume is told
//! of the rename of `..data` when the content is complete.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use husk_proto::agent::{Files, VolumeFile};

/// The link to the present files.
const DATA: &str = "..data";
/// The next such link, before it is renamed.
const NEXT_DATA: &str = "..data_tmp";

/// Least size of the file system of such a volume, in bytes: a request with all files of a pod fits
/// into it twice, unless they are many small ones.
const MIN_VOLUME_SIZE: u64 = 16 << 20;

/// Size of the file system of such a volume in a guest with so much memory, both in bytes. A file takes a
/// page at least, so that thousands of small ones are larger than their content; an update needs room
/// for the old ones and the new.
pub(crate) fn volume_size(memory: u64) -> u64 {
    MIN_VOLUME_SIZE.max(memory / 4)
}

/// Most files of a volume.
const MAX_FILES: usize = 100_000;
/// Longest path of a file in bytes, and the longest component of one (NAME_MAX).
const MAX_PATH: usize = 2048;
const MAX_COMPONENT: usize = 255;

/// Permissions of directories.
const DIRECTORY_MODE: u32 = 0o755;

/// A set of files that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("files: {0} of them; a volume has at most {MAX_FILES}")]
    TooMany(usize),
    #[error("files.path: {0:?} must be relative, without components that begin with ..")]
    Path(String),
    #[error("files.path: {0:?} appears twice, or is a directory of another one")]
    Twice(String),
    #[error("files.mode: {1:o} of {0:?} must be at most 777")]
    Mode(String, u32),
}

/// Checks files before anything is made of them.
///
/// # Errors
/// [`FilesError`] naming the field.
pub(crate) fn check(files: &Files) -> Result<(), FilesError> {
    if files.files.len() > MAX_FILES {
        return Err(FilesError::TooMany(files.files.len()));
    }
    let mut paths = BTreeSet::new();
    for VolumeFile { path, content: _, mode } in &files.files {
        let good = |part: &str| {
            !part.is_empty()
                && part != "."
                && !part.starts_with("..")
                && part.len() <= MAX_COMPONENT
        };
        if path.len() > MAX_PATH || path.contains('\0') || !path.split('/').all(good) {
            return Err(FilesError::Path(path.clone()));
        }
        if *mode > 0o777 {
            return Err(FilesError::Mode(path.clone(), *mode));
        }
        if !paths.insert(path.as_str()) {
            return Err(FilesError::Twice(path.clone()));
        }
    }
    // In this order a directory's first file need not follow it at once ("a", "a-b", "a/b").
    for path in &paths {
        let mut above = path.rmatch_indices('/').filter_map(|(at, _)| path.get(..at));
        if let Some(outer) = above.find(|outer| paths.contains(outer)) {
            return Err(FilesError::Twice(outer.to_owned()));
        }
    }
    Ok(())
}

/// Replaces the files in `volume` by these, which have passed [`check`]. All belong to `group`, if
/// there is one, which may read them: as the kubelet sets up a volume that can only be read.
///
/// # Errors
/// Of the file system; the files that were there are then still there.
pub(crate) fn replace(volume: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    let old = match fs::read_link(volume.join(DATA)) {
        Ok(target) => Some(target),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    let name = next_name(old.as_deref());
    let directory = volume.join(&name);
    remove_tree(&directory)?;
    let written = write_all(&directory, files, group).and_then(|()| {
        remove_if_there(&volume.join(NEXT_DATA))?;
        symlink(&name, volume.join(NEXT_DATA))?;
        fs::rename(volume.join(NEXT_DATA), volume.join(DATA))
    });
    if written.is_err() {
        remove_tree(&directory)?;
    }
    written?;
    link_all(volume, files)?;
    match old {
        Some(old) => remove_tree(&volume.join(old)),
        None => Ok(()),
    }
}

/// The name after that of the present directory: they never repeat, because who has an old one open
/// must not see new files come and go in it.
fn next_name(old: Option<&Path>) -> String {
    let number = old
        .and_then(|old| old.to_str()?.strip_prefix("..")?.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_add(1);
    format!("..{number:016}")
}

/// Writes files into a new directory.
fn write_all(directory: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    make_directory(directory, group)?;
    for VolumeFile { path, content, mode } in &files.files {
        let mut parent = directory.to_owned();
        let (outer, _) = path.rsplit_once('/').unwrap_or_default();
        for part in outer.split('/').filter(|part| !part.is_empty()) {
            parent.push(part);
            if !parent.exists() {
                make_directory(&parent, group)?;
            }
        }
        let path = directory.join(path);
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(content)?;
        let mut mode = *mode;
        if let Some(group) = group {
            chown(&path, None, Some(group))?;
            mode |= 0o440;
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn make_directory(path: &Path, group: Option<u32>) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)?;
    let mut mode = DIRECTORY_MODE;
    if let Some(group) = group {
        chown(path, None, Some(group))?;
        mode |= 0o2550;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Makes the links by which containers find the files, and removes those of files that are gone.
fn link_all(volume: &Path, files: &Files) -> io::Result<()> {
    let first = |path: &'_ str| path.split('/').next().unwrap_or_default().to_owned();
    let wanted: BTreeSet<String> = files.files.iter().map(|file| first(&file.path)).collect();
    let mut there = BTreeSet::new();
    for entry in fs::read_dir(volume)? {
        // A name that is not UTF-8 is none that this module has made.
        let Ok(name) = entry?.file_name().into_string() else { continue };
        // What begins with ".." is this module's own; a directory is what a subPath that named no
        // file has made.
        let is_link = fs::symlink_metadata(volume.join(&name))?.is_symlink();
        if is_link && !name.starts_with("..") {
            if wanted.contains(&name) {
                there.insert(name);
            } else {
                fs::remove_file(volume.join(&name))?;
            }
        }
    }
    for name in wanted.difference(&there) {
        let target: PathBuf = [DATA, name].iter().collect();
        symlink(target, volume.join(name))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn files(list: &[(&str, &str, u32)]) -> Files {
        let file = |(path, content, mode): &(&str, &str, u32)| VolumeFile {
            path: (*path).into(),
            content: content.as_bytes().to_vec(),
            mode: *mode,
        };
        Files { files: list.iter().map(file).collect() }
    }

    fn read(volume: &Path, path: &str) -> String {
        fs::read_to_string(volume.join(path)).unwrap()
    }

    #[test]
    fn files_are_links_through_one_link_that_changes() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path();
        replace(volume, &files(&[("a", "1", 0o644), ("d/e/f", "2", 0o400)]), None).unwrap();
        assert_eq!(fs::read_link(volume.join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::read_link(volume.join("d")).unwrap(), Path::new("..data/d"));
        assert_eq!((read(volume, "a"), read(volume, "d/e/f")), ("1".into(), "2".into()));
        let mode = |path: &str| fs::metadata(volume.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("a"), mode("d/e/f"), mode("d/e")), (0o644, 0o400, 0o755));

        let first = fs::read_link(volume.join("..data")).unwrap();
        replace(volume, &files(&[("a", "new", 0o600), ("b", "", 0o644)]), None).unwrap();
        assert_eq!((read(volume, "a"), read(volume, "b")), ("new".into(), String::new()));
        assert!(!volume.join("d").exists() && !volume.join(&first).exists());
        assert_ne!(fs::read_link(volume.join("..data")).unwrap(), first);

        replace(volume, &Files::default(), None).unwrap();
        let visible = fs::read_dir(volume).unwrap().filter(|entry| {
            !entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("..")
        });
        assert_eq!(visible.count(), 0);
    }

    #[test]
    fn a_group_may_read_everything() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path();
        let own = fs::metadata(volume).unwrap().gid();
        replace(volume, &files(&[("d/f", "x", 0o400)]), Some(own)).unwrap();
        let mode = |path: &str| fs::metadata(volume.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("d/f"), mode("d"), mode("..data/")), (0o440, 0o2755, 0o2755));
    }

    #[test]
    fn paths_that_would_lead_elsewhere_or_collide_are_refused() {
        for path in ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "..a", "a/..b", "a\0"] {
            let refused = check(&files(&[(path, "", 0o644)]));
            assert!(matches!(refused, Err(FilesError::Path(_))), "{path:?}");
        }
        assert!(check(&files(&[(&"a".repeat(256), "", 0)])).is_err());
        for pair in [["a", "a"], ["a/b", "a"], ["a", "a/b/c"]] {
            let refused = check(&files(&[(pair[0], "", 0), ("a-b", "", 0), (pair[1], "", 0)]));
            assert!(matches!(refused, Err(FilesError::Twice(_))), "{pair:?}");
        }
        assert!(matches!(check(&files(&[("a", "", 0o1777)])), Err(FilesError::Mode(..))));
        check(&files(&[("a", "", 0o777), (".b/c", "", 0), (".b/d", "", 0)])).unwrap();
    }

    proptest! {
        #[test]
        fn what_passes_the_check_can_be_made_and_stays_inside(
            paths in proptest::collection::vec("[a.]{0,3}(/[a.]{0,3}){0,2}", 0..5)
        ) {
            let list: Vec<_> = paths.iter().map(|path| (path.as_str(), "x", 0o644)).collect();
            let set = files(&list);
            if check(&set).is_ok() {
                let directory = tempfile::tempdir().unwrap();
                let volume = directory.path().join("v");
                fs::create_dir(&volume).unwrap();
                replace(&volume, &set, None).unwrap();
                for path in &paths {
                    prop_assert_eq!(read(&volume, path), "x");
                }
                prop_assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
            }
        }
    }
}

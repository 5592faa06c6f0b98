//! Files and directories of the host that are volumes of pods: checked, and made where the volume says
//! so, as the kubelet does it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use crate::types::{HostPathType, PodSpec, VolumeSource};
use crate::vm::Share;

/// Permissions of what is made, as of the kubelet.
const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;

/// Why a path of the host cannot be a volume.
#[derive(Debug, thiserror::Error)]
pub enum HostPathError {
    /// There is nothing at the path, or a link that leads nowhere.
    #[error("{path}: there is {found}, and type {kind} wants {wanted}{hint}")]
    Missing {
        /// The path.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
        /// The volume's type.
        kind: HostPathType,
        /// What it wants.
        wanted: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// Something else is there.
    #[error("{path}: is {found}, and type {kind} wants {wanted}")]
    Other {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
        /// The volume's type.
        kind: HostPathType,
        /// What it wants.
        wanted: &'static str,
    },
    /// Something is there that has no meaning to another kernel.
    #[error(
        "{path}: is {found} of the host: a pod has a kernel of its own, to which it leads nowhere; only \
         files and directories can be shared"
    )]
    NotShareable {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A step failed.
    #[error("cannot {step} {path}")]
    Io {
        /// What was done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn failed<'a, E: Into<io::Error>>(
    step: &'static str,
    path: &'a Path,
) -> impl FnOnce(E) -> HostPathError + 'a {
    move |source| HostPathError::Io { step, path: path.to_owned(), source: source.into() }
}

/// The paths of the host that a pod's volumes are, with the positions of the volumes: their order is
/// that of the shares.
pub(super) fn of(spec: &PodSpec) -> impl Iterator<Item = (usize, &str, &Path, HostPathType)> {
    spec.volumes.iter().enumerate().filter_map(|(index, volume)| match &volume.source {
        VolumeSource::HostPath { path, kind } => Some((index, &*volume.name, &**path, *kind)),
        _ => None,
    })
}

/// Whether no container can write to a volume.
fn is_read_only(spec: &PodSpec, volume: &str) -> bool {
    let mut mounts = spec.all_containers().flat_map(|container| &container.volume_mounts);
    mounts.all(|mount| mount.volume != volume || mount.read_only)
}

/// Opens all paths of the host that a pod shares, and makes those that are to be made. Blocks.
///
/// # Errors
/// [`super::StorageError::HostPath`], naming the volume's field.
pub fn open_shares(spec: &PodSpec) -> Result<Vec<Share>, super::StorageError> {
    of(spec)
        .map(|(index, name, path, kind)| {
            let path = open(path, kind).map_err(|source| super::StorageError::HostPath {
                field: format!("spec.volumes[{index}].hostPath"),
                source,
            })?;
            Ok(Share { name: name.to_owned(), path, read_only: is_read_only(spec, name) })
        })
        .collect()
}

/// Opens (`O_PATH`) one.
fn open(path: &Path, kind: HostPathType) -> Result<OwnedFd, HostPathError> {
    let fd = match open_now(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match kind {
                HostPathType::DirectoryOrCreate => make_directory(path)?,
                HostPathType::FileOrCreate => make_file(path)?,
                _ => return Err(missing(path, kind)),
            }
            open_now(path)
        }
        opened => opened,
    };
    let fd = fd.map_err(failed("open", path))?;
    let mode = rustix::fs::fstat(&fd).map_err(failed("look at", path))?.st_mode;
    check(FileType::from_raw_mode(mode), path, kind)?;
    Ok(fd)
}

fn open_now(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// What a volume of a type wants to be there.
fn wanted(kind: HostPathType) -> &'static str {
    match kind {
        HostPathType::Any => "a file or a directory",
        HostPathType::DirectoryOrCreate | HostPathType::Directory => "a directory",
        HostPathType::FileOrCreate | HostPathType::File => "a file",
    }
}

fn missing(path: &Path, kind: HostPathType) -> HostPathError {
    let is_link = fs::symlink_metadata(path).is_ok();
    let found = if is_link { "a symbolic link that leads nowhere" } else { "nothing" };
    let hint = match kind {
        _ if is_link => "",
        HostPathType::Any | HostPathType::Directory => "; DirectoryOrCreate makes one",
        HostPathType::File => "; FileOrCreate makes one",
        HostPathType::DirectoryOrCreate | HostPathType::FileOrCreate => "",
    };
    HostPathError::Missing { path: path.to_owned(), found, kind, wanted: wanted(kind), hint }
}

/// Checks that what is there is what the volume wants.
fn check(found: FileType, path: &Path, kind: HostPathType) -> Result<(), HostPathError> {
    let (found, is_directory) = match found {
        FileType::Directory => ("a directory", Some(true)),
        FileType::RegularFile => ("a file", Some(false)),
        FileType::Socket => ("a socket", None),
        FileType::Fifo => ("a named pipe", None),
        FileType::BlockDevice => ("a block device", None),
        FileType::CharacterDevice => ("a character device", None),
        _ => ("something unknown", None),
    };
    let fits = match (kind, is_directory) {
        (HostPathType::Any, None) => {
            return Err(HostPathError::NotShareable { path: path.to_owned(), found });
        }
        (HostPathType::Any, Some(_)) => true,
        (HostPathType::DirectoryOrCreate | HostPathType::Directory, other) => other == Some(true),
        (HostPathType::FileOrCreate | HostPathType::File, other) => other == Some(false),
    };
    let other =
        || HostPathError::Other { path: path.to_owned(), found, kind, wanted: wanted(kind) };
    if fits { Ok(()) } else { Err(other()) }
}

/// Makes a directory, and those above it.
fn make_directory(path: &Path) -> Result<(), HostPathError> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
    for path in missing.into_iter().rev() {
        match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
            // The umask must not have a say.
            Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(DIRECTORY_MODE))
                .map_err(failed("make the directory", path))?,
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(error) => return Err(failed("make the directory", path)(error)),
        }
    }
    Ok(())
}

/// Makes an empty file, in a directory that is there.
fn make_file(path: &Path) -> Result<(), HostPathError> {
    match File::options().write(true).create_new(true).mode(FILE_MODE).open(path) {
        Ok(file) => file
            .set_permissions(fs::Permissions::from_mode(FILE_MODE))
            .map_err(failed("make the file", path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.exists() => Ok(()),
        Err(error) => Err(failed("make the file", path)(error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::pod::chain;

    const ALL: [HostPathType; 5] = [
        HostPathType::Any,
        HostPathType::DirectoryOrCreate,
        HostPathType::Directory,
        HostPathType::FileOrCreate,
        HostPathType::File,
    ];

    /// What comes of a path for every type: the beginning of the error's text after the path.
    fn outcomes(path: &Path) -> Vec<String> {
        let outcome = |kind| match open(path, kind) {
            Ok(_) => "ok".to_owned(),
            Err(error) => chain(&error).replace(&path.display().to_string(), "P"),
        };
        ALL.into_iter().map(outcome).collect()
    }

    #[test]
    fn what_is_there_must_be_what_the_type_says() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("f"), "").unwrap();
        symlink("d", at("to-d")).unwrap();
        symlink("none", at("nowhere")).unwrap();
        let _socket = UnixListener::bind(at("s")).unwrap();

        for path in [at("d"), at("to-d")] {
            let file = "P: is a directory, and type File wants a file";
            let or_create = "P: is a directory, and type FileOrCreate wants a file";
            assert_eq!(outcomes(&path), ["ok", "ok", "ok", or_create, file]);
        }
        let directory = "P: is a file, and type Directory wants a directory";
        let or_create = "P: is a file, and type DirectoryOrCreate wants a directory";
        assert_eq!(outcomes(&at("f")), ["ok", or_create, directory, "ok", "ok"]);
        let socket = outcomes(&at("s"));
        assert!(socket.first().unwrap().starts_with("P: is a socket of the host: "), "{socket:?}");
        assert_eq!(socket.last().unwrap(), "P: is a socket, and type File wants a file");
        let device = outcomes(Path::new("/dev/null"));
        assert!(device.first().unwrap().starts_with("P: is a character device of the host"));

        let nowhere = outcomes(&at("nowhere"));
        assert_eq!(
            nowhere.first().unwrap(),
            "P: there is a symbolic link that leads nowhere, and type \"\" wants a file or a directory"
        );
        for made in [1, 3] {
            let text = nowhere.get(made).unwrap();
            assert!(text.starts_with("cannot make the ") && text.contains("File exists"), "{text}");
        }
        assert!(fs::symlink_metadata(at("none")).is_err(), "nothing is made behind a link");
    }

    #[test]
    fn what_is_missing_is_made_only_if_the_type_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b");
        let text = |path: &Path, kind| chain(&open(path, kind).unwrap_err());
        for (kind, words) in [
            (
                HostPathType::Any,
                "type \"\" wants a file or a directory; DirectoryOrCreate makes one",
            ),
            (
                HostPathType::Directory,
                "type Directory wants a directory; DirectoryOrCreate makes one",
            ),
            (HostPathType::File, "type File wants a file; FileOrCreate makes one"),
        ] {
            let expected = format!("{}: there is nothing, and {words}", deep.display());
            assert_eq!(text(&deep, kind), expected);
        }
        // As the kubelet: the directory of a file must be there.
        let no_file = text(&deep, HostPathType::FileOrCreate);
        assert!(no_file.contains("cannot make the file") && no_file.contains("No such file"));
        assert!(!directory.path().join("a").exists());

        open(&deep, HostPathType::DirectoryOrCreate).unwrap();
        open(&deep.join("f"), HostPathType::FileOrCreate).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let made = [mode(&directory.path().join("a")), mode(&deep), mode(&deep.join("f"))];
        assert_eq!(made, [0o755, 0o755, 0o644]);
        // A file is in the way.
        let blocked = text(&deep.join("f/g"), HostPathType::DirectoryOrCreate);
        assert!(blocked.contains("Not a directory"), "{blocked}");
    }
}

//! Files of records: written as a whole, read up to a bound, locked.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::failed;
use super::{MAX_FILE, RecordError};

/// Removes a directory with everything in it, unless it is gone already.
pub(super) fn remove_if_there(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path)(source))
        }
        _ => Ok(()),
    }
}

/// Opens a lock file and waits for its lock, which lasts until the file is closed.
pub(super) fn lock(path: &Path) -> Result<File, RecordError> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed("open", path))?;
    file.lock().map_err(failed("lock", path))?;
    Ok(file)
}

/// Writes a value as JSON, as [`write_file`] does.
pub(super) fn write_json(
    dir: &Path,
    name: &str,
    value: &impl Serialize,
) -> Result<(), RecordError> {
    let path = dir.join(name);
    let mut bytes =
        serde_json::to_vec(value).map_err(|source| RecordError::Malformed { path, source })?;
    bytes.push(b'\n');
    write_file(dir, name, &bytes)
}

/// Writes a file so that readers see the old one or the new one, whole.
pub(super) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
    let (draft, path) = (dir.join(format!(".{name}")), dir.join(name));
    let open = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
    open.and_then(|mut file| file.write_all(bytes)).map_err(failed("write", &draft))?;
    std::fs::rename(&draft, &path).map_err(failed("write", &path))
}

/// Reads a file of JSON, if it is not larger than [`MAX_FILE`].
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(failed("read", path))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(RecordError::TooLarge { path: path.to_owned() });
    }
    serde_json::from_slice(&bytes)
        .map_err(|source| RecordError::Malformed { path: path.to_owned(), source })
}

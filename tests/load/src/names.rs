//! Files in a directory.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Makes files with so many bytes, looks at each, and removes them.
pub(crate) fn run(directory: &Path, files: u32, bytes: usize) -> Result<Duration> {
    let content = vec![0x5a; bytes];
    let path = |number: u32| -> PathBuf { directory.join(format!("file-{number}")) };
    let start = Instant::now();
    for number in 0..files {
        let path = path(number);
        File::create_new(&path)
            .and_then(|mut file| file.write_all(&content))
            .with_context(|| format!("cannot create {}", path.display()))?;
    }
    for number in 0..files {
        fs::metadata(path(number)).context("cannot look at a file")?;
    }
    for number in 0..files {
        fs::remove_file(path(number)).context("cannot remove a file")?;
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_and_what_is_there_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        run(directory.path(), 10, 0).unwrap();
        run(directory.path(), 10, 1000).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        File::create(directory.path().join("file-3")).unwrap();
        assert!(run(directory.path(), 10, 0).is_err());
    }
}

//! Writable layers that nobody needs any more: gone by their name at once, emptied soon after, so that
//! who deletes a container does not wait for the removal of its files, of which there can be any
//! number.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, io};

use super::Runner;
use super::process::{StepError, step};

/// Where they are in the meantime, beside the directory of the layers.
const DISCARDED: &str = "discarded";

/// How long the emptying waits: whoever deletes a container often has more to ask at once.
const DELAY: Duration = Duration::from_millis(50);

/// Makes the names of discarded layers.
static NUMBER: AtomicU64 = AtomicU64::new(0);

impl Runner {
    /// Takes a writable layer away, if it is there.
    ///
    /// # Errors
    /// If it cannot be taken away; that it cannot be emptied later goes to the log.
    pub(super) fn discard(&self, layer: &Path) -> Result<(), StepError> {
        if !layer.exists() {
            return Ok(());
        }
        let discarded = take_away(layer).map_err(step("remove the writable layer"))?;
        let runner = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(DELAY).await;
            if let Err(error) = runner.empty(&discarded).await {
                tracing::error!(
                    layer = %discarded.display(),
                    error = crate::chain(&error),
                    "a layer that nobody needs takes up space"
                );
            }
        });
        Ok(())
    }

    async fn empty(&self, discarded: &Path) -> Result<(), StepError> {
        const STEP: &str = "empty a discarded layer";
        // It can hold any number of files, but most hold next to nothing.
        if is_small(discarded).map_err(step(STEP))? {
            return fs::remove_dir_all(discarded).map_err(step(STEP));
        }
        let path = discarded.to_owned();
        self.in_child(STEP, move || fs::remove_dir_all(path)).await
    }
}

/// Moves a layer to a name of its own among the discarded ones.
fn take_away(layer: &Path) -> io::Result<PathBuf> {
    let place = layer.parent().and_then(Path::parent).ok_or(io::ErrorKind::InvalidInput)?;
    let place = place.join(DISCARDED);
    loop {
        let to = place.join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
        match fs::rename(layer, &to) {
            Ok(()) => return Ok(to),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !place.exists() => {
                fs::create_dir(&place)?;
            }
            // One of a guest that died, on a disk that outlived it.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether a tree is so small that its removal holds up nobody.
fn is_small(tree: &Path) -> io::Result<bool> {
    const ENTRIES: usize = 128;
    /// In blocks of 512 bytes: freeing much takes time too.
    const BLOCKS: u64 = 32 << 11;
    use std::os::unix::fs::MetadataExt;
    let (mut entries, mut blocks): (usize, u64) = (0, 0);
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            entries = entries.saturating_add(1);
            blocks = blocks.saturating_add(metadata.blocks());
            if entries > ENTRIES || blocks > BLOCKS {
                return Ok(false);
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_taken_away_whole_and_never_onto_another() {
        let disk = tempfile::tempdir().unwrap();
        let layer = disk.path().join("containers").join("a");
        assert_eq!(take_away(&layer).unwrap_err().kind(), io::ErrorKind::NotFound);
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..3 {
            fs::create_dir_all(layer.join("upper")).unwrap();
            fs::write(layer.join("upper/file"), round.to_string()).unwrap();
            let to = take_away(&layer).unwrap();
            assert!(!layer.exists());
            assert_eq!(fs::read_to_string(to.join("upper/file")).unwrap(), round.to_string());
            assert!(seen.insert(to));
        }
        // What another guest left under the next names is not overwritten.
        fs::create_dir_all(layer.join("upper")).unwrap();
        let next = NUMBER.load(Ordering::Relaxed);
        for number in next..next + 20 {
            let other = disk.path().join(DISCARDED).join(number.to_string());
            fs::create_dir_all(other.join("theirs")).unwrap();
        }
        let to = take_away(&layer).unwrap();
        assert!(to.join("upper").exists() && !to.join("theirs").exists());
    }

    #[test]
    fn what_is_large_is_not_removed_by_the_agents_thread() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("work/work/incompat")).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("work/elsewhere")).unwrap();
        assert!(is_small(root.path()).unwrap(), "links are not followed");
        for file in 0..200 {
            fs::write(root.path().join(file.to_string()), "").unwrap();
        }
        assert!(!is_small(root.path()).unwrap());
        assert!(is_small(&root.path().join("missing")).is_err());
    }
}

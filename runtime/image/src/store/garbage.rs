//! Removal of what no image needs: mark from the index, sweep the directories.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::Path;

use super::files::{self, Lock, TEMP_PREFIX};
use super::index::Index;
use super::{Store, StoreError, layer_name};

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers that were removed.
    pub layers_removed: usize,
    /// Bytes of their blobs.
    pub bytes_removed: u64,
    /// Layers that no image needs but a pod uses. A later collection removes them.
    pub layers_in_use: usize,
    /// Nothing was collected because another process adds an image now.
    pub deferred: bool,
}

impl Store {
    /// Removes manifests, configurations and layers that no reference needs. Layers in use stay.
    ///
    /// # Errors
    /// If the index is damaged, or a file cannot be removed.
    pub fn collect_garbage(&self) -> Result<Collected, StoreError> {
        let Some(_alone) = self.try_alone()? else {
            return Ok(Collected { deferred: true, ..Collected::default() });
        };
        let index = Index::load(&self.root)?;
        let (mut blobs, mut layers) = (HashSet::new(), HashSet::new());
        for record in index.images.values() {
            let (manifest, config) = self.documents(record.manifest)?;
            blobs.insert(record.manifest.to_hex());
            blobs.insert(manifest.config.digest.to_hex());
            let diff_ids = self.diff_ids_of(&manifest, &config)?;
            layers.extend(diff_ids.iter().map(layer_name));
        }
        sweep(&self.blobs(), |name| blobs.contains(name), &mut Collected::default())?;
        let mut collected = Collected::default();
        sweep(&self.layers(), |name| layers.contains(name), &mut collected)?;
        Ok(collected)
    }

    /// Removes what a writer that died left half-made, unless there are writers now.
    pub(super) fn sweep_temporary(&self) -> Result<(), StoreError> {
        let Some(_alone) = self.try_alone()? else { return Ok(()) };
        for directory in [self.root.clone(), self.blobs(), self.layers()] {
            let keep = |name: &str| !name.starts_with(TEMP_PREFIX);
            sweep(&directory, keep, &mut Collected::default())?;
        }
        Ok(())
    }

    fn try_alone(&self) -> Result<Option<Lock>, StoreError> {
        Lock::try_exclusive(&self.root.join("writers.lock"))
    }
}

/// Removes what is not to be kept in a directory, except files that somebody holds a lock on.
fn sweep(
    directory: &Path,
    keep: impl Fn(&str) -> bool,
    collected: &mut Collected,
) -> Result<(), StoreError> {
    let mut changed = false;
    for name in files::names(directory)?.into_iter().filter(|name| !keep(name)) {
        let path = directory.join(&name);
        let failed = |source| StoreError::io("remove", &path, source);
        let file = File::open(&path).map_err(failed)?;
        if !files::try_flock_exclusive(&file).map_err(failed)? {
            collected.layers_in_use = collected.layers_in_use.saturating_add(1);
            continue;
        }
        let size = file.metadata().map_err(failed)?.len();
        fs::remove_file(&path).map_err(failed)?;
        tracing::debug!(path = %path.display(), size, "removed");
        collected.layers_removed = collected.layers_removed.saturating_add(1);
        collected.bytes_removed = collected.bytes_removed.saturating_add(size);
        changed = true;
    }
    if changed { files::sync_directory(directory) } else { Ok(()) }
}

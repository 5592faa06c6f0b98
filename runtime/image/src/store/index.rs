//! Which reference stands for which manifest: `refs.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{StoreError, files};
use crate::digest::Digest;

const FILE: &str = "refs.json";
const VERSION: u32 = 1;

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    version: u32,
    /// By full reference.
    pub(super) images: BTreeMap<String, Record>,
}

/// What a reference stands for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) manifest: Digest,
    /// Seconds since 1970 when the reference last came to stand for it.
    pub(super) stored_at: u64,
}

impl Index {
    /// Reads the index of the store at `root`; a store without one is empty.
    pub(super) fn load(root: &Path) -> Result<Self, StoreError> {
        let path = root.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, images: BTreeMap::new() });
            }
            Err(source) => return Err(StoreError::io("read", &path, source)),
        };
        let index: Self = serde_json::from_slice(&bytes)
            .map_err(|source| StoreError::Json { path: path.clone(), source })?;
        if index.version != VERSION {
            let reason = format!("it has version {}, this husk knows {VERSION}", index.version);
            return Err(StoreError::Corrupt { path, reason });
        }
        Ok(index)
    }

    pub(super) fn save(&self, root: &Path) -> Result<(), StoreError> {
        let path = root.join(FILE);
        let bytes =
            serde_json::to_vec_pretty(self).map_err(|source| StoreError::Json { path, source })?;
        files::write_atomically(root, FILE, &bytes)
    }
}

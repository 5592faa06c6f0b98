//! `pod.json`: who a pod is, and who holds it.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{RecordError, VERSION};
use crate::holder::cri_log::timestamp;
use crate::types::{PodSpec, Rootfs};

/// `pod.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRecord {
    /// [`VERSION`].
    pub version: u32,
    /// The husk that made it.
    pub husk_version: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its unique identifier.
    pub uid: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// Whether it runs in the background: then its record stays when it has ended.
    pub background: bool,
    /// The process that holds it.
    pub pid: u32,
    /// The directory in which that process has the directory of the running pod.
    pub run_dir: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Init containers and containers, in the order of their start.
    pub containers: Vec<ContainerInfo>,
}

/// What `pod.json` says of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerInfo {
    /// Its name.
    pub name: String,
    /// Its image, as the manifest names it.
    pub image: String,
    /// Whether it has a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Whether it has a standard input.
    #[serde(default)]
    pub stdin: bool,
}

impl PodRecord {
    /// Of a pod that this process is about to hold.
    #[must_use]
    pub fn new(spec: &PodSpec, uid: &str, run_dir: &Path, background: bool) -> Self {
        let containers = spec.all_containers().map(|container| ContainerInfo {
            name: container.name.clone(),
            image: match &container.rootfs {
                Rootfs::Image { reference, pull_policy: _ } => reference.clone(),
            },
            tty: container.tty,
            stdin: container.stdin,
        });
        PodRecord {
            version: VERSION,
            husk_version: env!("CARGO_PKG_VERSION").to_owned(),
            namespace: spec.metadata.namespace.clone(),
            name: spec.metadata.name.clone(),
            uid: uid.to_owned(),
            created_at: timestamp(SystemTime::now()),
            background,
            pid: std::process::id(),
            run_dir: run_dir.to_owned(),
            vcpus: spec.vm.vcpus,
            memory_mib: spec.vm.memory_mib,
            containers: containers.collect(),
        }
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The name of its directory.
    pub(super) fn directory(&self) -> Result<String, RecordError> {
        for part in [&self.namespace, &self.name, &self.uid] {
            let harmless = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if part.is_empty() || part.starts_with('.') || !part.bytes().all(harmless) {
                return Err(RecordError::BadName { part: part.clone() });
            }
        }
        Ok(format!("{}_{}_{}", self.namespace, self.name, self.uid))
    }
}

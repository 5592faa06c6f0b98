//! What of a pod changes while it runs: its labels and annotations, and what comes of ConfigMaps and
//! Secrets. As with the kubelet, the files of volumes follow at once, and the environment of a
//! container at its next start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::runtime::GuestRuntime;
use crate::guest::GuestError;
use crate::storage;
use crate::types::{PodSpec, VolumeSource};

/// The pod as it is described now. Locked for moments, never across an await.
#[derive(Debug)]
pub(super) struct Changes(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    now: Arc<PodSpec>,
    /// The description with which each container was last started.
    started: BTreeMap<String, Arc<PodSpec>>,
    /// Volumes that may not hold what `now` says, because a change was not completed.
    unsure: BTreeSet<String>,
}

impl Changes {
    pub(super) fn new(spec: Arc<PodSpec>) -> Self {
        let (started, unsure) = (BTreeMap::new(), BTreeSet::new());
        Changes(Mutex::new(Inner { now: spec, started, unsure }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the start of a container.
    pub(super) fn start(&self, container: &str) {
        let mut inner = self.lock();
        let now = inner.now.clone();
        inner.started.insert(container.to_owned(), now);
    }

    /// The pod as it was described when this container was last started.
    pub(super) fn of(&self, container: &str) -> Arc<PodSpec> {
        let inner = self.lock();
        inner.started.get(container).unwrap_or(&inner.now).clone()
    }
}

/// The pod `now`, with everything of `wanted` that may change.
fn changed(now: &PodSpec, wanted: &PodSpec) -> PodSpec {
    let mut next = now.clone();
    next.metadata.labels.clone_from(&wanted.metadata.labels);
    next.metadata.annotations.clone_from(&wanted.metadata.annotations);
    for volume in &mut next.volumes {
        let other = wanted.volumes.iter().find(|other| other.name == volume.name);
        if let (VolumeSource::Files(files), Some(VolumeSource::Files(other))) =
            (&mut volume.source, other.map(|other| &other.source))
        {
            files.clone_from(other);
        }
    }
    for container in next.init_containers.iter_mut().chain(&mut next.containers) {
        if let Some(other) = wanted.container(&container.name) {
            container.env.clone_from(&other.env);
        }
    }
    next
}

impl GuestRuntime {
    /// Makes the pod what `wanted` says, as far as that may change; returns the volumes whose files
    /// were replaced. Not to be called again before it has returned.
    ///
    /// # Errors
    /// [`GuestError`]: each volume is then either as it was or as wanted.
    pub(super) async fn change(&self, wanted: &PodSpec) -> Result<Vec<String>, GuestError> {
        let (changes, uid) = self.changes();
        let (now, unsure) = {
            let inner = changes.lock();
            (inner.now.clone(), inner.unsure.clone())
        };
        let next = changed(&now, wanted);
        let mut replaced = Vec::new();
        for (before, after) in now.volumes.iter().zip(&next.volumes) {
            let (VolumeSource::Files(old), VolumeSource::Files(new)) =
                (&before.source, &after.source)
            else {
                continue;
            };
            let files = storage::files(new, &next, uid);
            let name = &after.name;
            if files == storage::files(old, &now, uid) && !unsure.contains(name) {
                continue;
            }
            changes.lock().unsure.insert(name.clone());
            self.guest().update_volume(name, files).await?;
            replaced.push(name.clone());
        }
        let mut inner = changes.lock();
        inner.now = Arc::new(next);
        inner.unsure.clear();
        Ok(replaced)
    }
}

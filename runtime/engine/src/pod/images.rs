//! The images of a pod's containers, as the engine needs them.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use oci_spec::image::ImageConfiguration;

use super::debug;
use crate::storage::Layer;
use crate::types::{PodSpec, PullPolicy, Rootfs};

/// An image that is on this host.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Its layers, the lowest first.
    pub layers: Vec<Layer>,
    /// Its configuration: what is run, as whom, in which environment.
    pub config: ImageConfiguration,
}

/// Why an image is not there.
#[derive(Debug, thiserror::Error)]
#[error("image {reference:?}")]
pub struct ImageError {
    /// In one word, as the kubelet names it: `ErrImagePull`, `ErrImageNeverPull`, ...
    pub reason: &'static str,
    /// Which image.
    pub reference: String,
    /// The cause, and what to do.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// What [`Images::resolve`] returns.
pub type Resolving<'a> =
    Pin<Box<dyn Future<Output = Result<ResolvedImage, ImageError>> + Send + 'a>>;

/// Where images come from: a store with a registry behind it, or a test's.
pub trait Images: Send + Sync {
    /// Finds an image on this host, or brings it here if the policy allows. Must not block its
    /// thread.
    fn resolve<'a>(&'a self, reference: &'a str, policy: PullPolicy) -> Resolving<'a>;
}

/// Resolves the images of all containers and the one for debugging, each reference once; by the
/// containers' names, and by [`debug::NAME`].
pub(super) async fn resolve_all(
    images: &dyn Images,
    spec: &PodSpec,
    debug_image: Option<&str>,
) -> Result<BTreeMap<String, ResolvedImage>, ImageError> {
    let mut by_reference: BTreeMap<(&str, bool, bool), ResolvedImage> = BTreeMap::new();
    let mut by_container = BTreeMap::new();
    let of_containers = spec.all_containers().map(|container| {
        let Rootfs::Image { reference, pull_policy } = &container.rootfs;
        (container.name.as_str(), reference.as_str(), *pull_policy)
    });
    let for_debugging =
        debug_image.map(|reference| (debug::NAME, reference, PullPolicy::IfNotPresent));
    for (name, reference, policy) in of_containers.chain(for_debugging) {
        // Containers with the same image can differ in their policy.
        let key = (reference, policy == PullPolicy::Always, policy == PullPolicy::Never);
        let image = match by_reference.get(&key) {
            Some(image) => image.clone(),
            None => {
                let image = images.resolve(reference, policy).await?;
                by_reference.insert(key, image.clone());
                image
            }
        };
        by_container.insert(name.to_owned(), image);
    }
    Ok(by_container)
}

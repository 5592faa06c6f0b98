//! Images for pods, from husk's own store or a registry.

use std::sync::Arc;

use husk_engine::pod::{ImageError, Images, ResolvedImage, Resolving};
use husk_engine::storage::Layer;
use husk_engine::types::PullPolicy;
use husk_image::{Image, PullOptions, Store, StoreError};

use crate::progress::Reporter;

/// The store as the engine sees it.
pub(crate) struct StoreImages {
    store: Store,
    progress: Arc<Reporter>,
}

impl StoreImages {
    pub(crate) fn new(store: Store, progress: Arc<Reporter>) -> Self {
        StoreImages { store, progress }
    }
}

impl Images for StoreImages {
    fn resolve<'a>(&'a self, reference: &'a str, policy: PullPolicy) -> Resolving<'a> {
        Box::pin(async move {
            let error =
                |reason, source| ImageError { reason, reference: reference.to_owned(), source };
            let here = if policy == PullPolicy::Always {
                None
            } else {
                match look_up(&self.store, reference).await {
                    Ok(image) => Some(image),
                    Err(Failure::NotHere(source)) if policy == PullPolicy::Never => {
                        return Err(error("ErrImageNeverPull", source));
                    }
                    Err(Failure::NotHere(_)) => None,
                    Err(Failure::Other(source)) => return Err(error("ImageInspectError", source)),
                }
            };
            match here {
                Some(image) => Ok(resolved(image)),
                None => {
                    let (options, progress) = (PullOptions::default(), self.progress.clone());
                    crate::image::pull(&self.store, reference, options, progress)
                        .await
                        .map_err(|source| error("ErrImagePull", source.into()))?;
                    match look_up(&self.store, reference).await {
                        Ok(image) => Ok(resolved(image)),
                        Err(Failure::NotHere(source) | Failure::Other(source)) => {
                            Err(error("ImageInspectError", source))
                        }
                    }
                }
            }
        })
    }
}

enum Failure {
    NotHere(Box<dyn std::error::Error + Send + Sync>),
    Other(Box<dyn std::error::Error + Send + Sync>),
}

async fn look_up(store: &Store, reference: &str) -> Result<Image, Failure> {
    let (store, reference) = (store.clone(), reference.to_owned());
    match tokio::task::spawn_blocking(move || store.resolve(&reference)).await {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(error @ StoreError::NotFound { .. })) => Err(Failure::NotHere(error.into())),
        Ok(Err(error)) => Err(Failure::Other(error.into())),
        Err(error) => Err(Failure::Other(error.into())),
    }
}

fn resolved(image: Image) -> ResolvedImage {
    let layers = image
        .layers
        .into_iter()
        .map(|layer| Layer { diff_id: layer.diff_id.to_string(), file: layer.file });
    ResolvedImage { layers: layers.collect(), config: image.config }
}

//! Images for pods, from husk's own store, with progress on the terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};

use husk_engine::pod::{ImageError, Images, ResolvedImage, Resolving};
use husk_engine::storage::Layer;
use husk_engine::types::PullPolicy;
use husk_image::{Event, Image, Progress, PullOptions, Store, StoreError};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The store as the engine sees it.
pub(crate) struct StoreImages {
    store: Store,
}

impl StoreImages {
    pub(crate) fn new(store: Store) -> Self {
        StoreImages { store }
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
                    crate::image::pull(&self.store, reference, PullOptions::default())
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

/// Progress bars: one for each layer that is being read. Nothing if standard error is no terminal.
pub(crate) struct Bars {
    all: MultiProgress,
    by_layer: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    pub(crate) fn new() -> Arc<Self> {
        let all = MultiProgress::new();
        if !std::io::stderr().is_terminal() {
            all.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Arc::new(Bars { all, by_layer: Mutex::default() })
    }

    fn with_bar(&self, layer: &str, change: impl FnOnce(&ProgressBar)) {
        let mut bars = self.by_layer.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bars.entry(layer.to_owned()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::no_length());
            let short: String = layer.chars().skip("sha256:".len()).take(12).collect();
            // A template of this program's own; if it were wrong, the default would do.
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix} [{wide_bar}] {bytes:>10}/{total_bytes:<10} {msg}",
            ) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(short);
            bar
        });
        change(bar);
    }
}

impl Progress for Bars {
    fn event(&self, event: Event) {
        match event {
            Event::LayerStarted { diff_id, size } => self.with_bar(&diff_id.to_string(), |bar| {
                bar.set_length(size);
                bar.set_position(0);
            }),
            Event::LayerProgress { diff_id, bytes } => {
                self.with_bar(&diff_id.to_string(), |bar| bar.set_position(bytes));
            }
            Event::LayerDone { diff_id, .. } => {
                self.with_bar(&diff_id.to_string(), |bar| bar.finish_with_message("done"));
            }
            Event::LayerExists { diff_id } => self.with_bar(&diff_id.to_string(), |bar| {
                bar.finish_with_message("here already");
            }),
            _ => {}
        }
    }
}

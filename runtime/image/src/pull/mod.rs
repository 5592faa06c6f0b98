//! Images from registries.

mod challenge;
mod registry;
mod stream;

use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet, spawn_blocking};

use crate::digest::Digest;
use crate::document::{self, Descriptor, Document, Manifest, Platform};
use crate::import::{ImportError, Imported, MAX_INDEX_DEPTH, verify_document};
use crate::layer::LayerSpec;
use crate::progress::{Event, NoProgress, Progress};
use crate::reference::{Reference, ReferenceError};
use crate::store::{Lock, Store, StoreError};

use registry::{Access, Registry};

/// How often a request is tried before its failure is final.
const ATTEMPTS: u32 = 4;
/// Before the second attempt; doubled before each further one.
const FIRST_DELAY: Duration = Duration::from_millis(500);
/// Pieces of a layer between the network and the conversion, which is slower.
const CHANNEL_DEPTH: usize = 32;

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the registry gave cannot be used.
    #[error(transparent)]
    Image(#[from] ImportError),
    /// The HTTP client cannot be made.
    #[error("cannot set up an HTTP client")]
    Client(#[source] reqwest::Error),
    /// The file with additional certificates cannot be read.
    #[error("cannot read the certificates in {path}", path = .path.display())]
    CaFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file with additional certificates is malformed.
    #[error("{path} holds no usable certificates", path = .path.display())]
    Ca {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The file with additional certificates holds none.
    #[error("{path} holds no certificate", path = .path.display())]
    CaEmpty {
        /// Which file.
        path: PathBuf,
    },
    /// Docker's configuration names credentials that cannot be had.
    #[error("cannot get the credentials for {registry} that docker's configuration names")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why.
        #[source]
        source: CredentialRetrievalError,
    },
    /// The registry wants a user name and password.
    #[error("{registry} wants a user name and a password")]
    CredentialsNeeded {
        /// The repository.
        registry: String,
    },
    /// The registry sends us for a token to a place that gives none.
    #[error("cannot get a token from {realm:?}: {reason}")]
    Realm {
        /// The place.
        realm: String,
        /// Why not.
        reason: String,
    },
    /// A request failed before it was answered in full.
    #[error("cannot get {url}")]
    Request {
        /// What was asked for.
        url: String,
        /// Why it failed.
        #[source]
        source: reqwest::Error,
    },
    /// The registry answered with an error.
    #[error("{url}: the registry answered {status}: {message}")]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The registry's words.
        message: String,
    },
    /// A document above the limit.
    #[error("{url} has more than {max} bytes")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The limit.
        max: u64,
    },
    /// A worker of ours failed.
    #[error("a task of the pull ended unexpectedly")]
    Task(#[from] JoinError),
}

impl PullError {
    /// Whether the server's certificate was refused: its issuer is not trusted, it is for another
    /// name, or its time is over.
    #[must_use]
    pub fn is_untrusted_certificate(&self) -> bool {
        let Self::Request { source, .. } = self else { return false };
        let first: &dyn std::error::Error = source;
        // The TLS library's type is behind reqwest's, which does not show it; its words are.
        std::iter::successors(Some(first), |error| error.source())
            .any(|error| error.to_string().starts_with("invalid peer certificate"))
    }

    /// Whether trying again may help.
    fn is_transient(&self) -> bool {
        match self {
            // A redirect that was refused, or a certificate, will be so again.
            Self::Request { source, .. } => {
                !source.is_redirect() && !source.is_builder() && !self.is_untrusted_certificate()
            }
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// Who pulls.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user name with a password or access token.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// What `docker login` keeps for registries that give out tokens by OAuth 2.
    IdentityToken(String),
}

impl std::fmt::Debug for Credentials {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Password { username, .. } => write!(f, "Password({username:?}, ..)"),
            Self::IdentityToken(_) => f.write_str("IdentityToken(..)"),
        }
    }
}

/// How to pull.
#[derive(Clone)]
pub struct PullOptions {
    /// Which manifest of an index to take; an image for another platform is refused.
    pub platform: Platform,
    /// In place of those in docker's configuration (`$DOCKER_CONFIG`, `~/.docker/config.json`).
    pub credentials: Option<Credentials>,
    /// Whether to speak HTTP without TLS. `None`: only to this machine itself.
    pub plain_http: Option<bool>,
    /// Certificates (PEM) to trust beside the system's.
    pub extra_ca: Option<PathBuf>,
    /// Layers that are downloaded and converted at the same time; at least 1.
    pub concurrent_layers: usize,
    /// Told of what happens.
    pub progress: Arc<dyn Progress>,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::default(),
            credentials: None,
            plain_http: None,
            extra_ca: None,
            concurrent_layers: 3,
            progress: Arc::new(NoProgress),
        }
    }
}

impl std::fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullOptions")
            .field("platform", &self.platform)
            .field("credentials", &self.credentials)
            .field("plain_http", &self.plain_http)
            .field("extra_ca", &self.extra_ca)
            .field("concurrent_layers", &self.concurrent_layers)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Pulls an image from its registry. Layers that the store has are not downloaded. Dropping
    /// the future stops it. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// See [`PullError`]; then the store's references are as before. Layers that were complete
    /// when the network failed stay for the next attempt, until garbage is collected.
    pub async fn pull(
        &self,
        reference: &str,
        options: &PullOptions,
    ) -> Result<Imported, PullError> {
        let result = self.pull_image(reference.parse()?, options).await;
        if let Err(PullError::Image(_)) = &result {
            let store = self.clone();
            if let Err(error) = spawn_blocking(move || store.collect_garbage()).await? {
                // The pull's own error is the one to report.
                tracing::warn!(%error, "cannot clean up after a failed pull");
            }
        }
        result
    }

    async fn pull_image(
        &self,
        reference: Reference,
        options: &PullOptions,
    ) -> Result<Imported, PullError> {
        let access = Access {
            credentials: match &options.credentials {
                Some(credentials) => Some(credentials.clone()),
                None => stored_credentials(&reference).await?,
            },
            plain_http: options.plain_http,
            extra_ca: options.extra_ca.as_deref(),
        };
        let registry = Arc::new(Registry::new(&reference, access)?);
        let store = self.clone();
        // Shared with every worker: none outlives it, even if this future is dropped.
        let lock = Arc::new(spawn_blocking(move || store.writer_lock()).await??);
        let (bytes, manifest) = self.pull_manifest(&registry, &reference, options).await?;
        let config_bytes = self.pull_document(&registry, &manifest.config).await?;
        let digest = manifest.config.digest;
        let diff_ids = document::parse_config(&config_bytes)
            .and_then(|config| document::check_config(&manifest, &config, &options.platform))
            .map_err(|source| ImportError::Document { digest, source })?;
        self.pull_layers(&registry, &manifest, &diff_ids, options, &lock).await?;
        let (store, name) = (self.clone(), reference.clone());
        let manifest_digest =
            spawn_blocking(move || store.commit(&[name], &bytes, &config_bytes)).await??;
        drop(lock);
        Ok(Imported { references: vec![reference.to_string()], manifest_digest })
    }

    /// Follows indexes down to the manifest for the platform; returns its bytes as well.
    async fn pull_manifest(
        &self,
        registry: &Registry,
        reference: &Reference,
        options: &PullOptions,
    ) -> Result<(Vec<u8>, Manifest), PullError> {
        let max = self.limits().max_document_bytes;
        let pinned = reference.digest();
        let name = match (pinned, reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let mut bytes = with_retries(|| registry.manifest(&name, max)).await?;
        let mut digest = Digest::of(&bytes);
        if let Some(expected) = pinned.filter(|&expected| expected != digest) {
            let (expected, actual) = (expected.to_string(), digest.to_string());
            return Err(ImportError::Mismatch { what: "manifest", expected, actual }.into());
        }
        for _ in 0..MAX_INDEX_DEPTH {
            let failed = |source| ImportError::Document { digest, source };
            match Document::parse(&bytes, self.limits()).map_err(failed)? {
                Document::Manifest(manifest) => return Ok((bytes, manifest)),
                Document::Index(entries) => {
                    let entry = document::choose(&entries, &options.platform).map_err(failed)?;
                    let name = entry.digest.to_string();
                    bytes = with_retries(|| registry.manifest(&name, max)).await?;
                    verify_document(&bytes, entry, "manifest")?;
                    digest = entry.digest;
                }
            }
        }
        Err(ImportError::TooDeep { digest }.into())
    }

    async fn pull_document(
        &self,
        registry: &Registry,
        descriptor: &Descriptor,
    ) -> Result<Vec<u8>, PullError> {
        let max = self.limits().max_document_bytes;
        if descriptor.size > max {
            let (what, size) = ("image configuration".to_owned(), descriptor.size);
            return Err(ImportError::TooLarge { what, size, max }.into());
        }
        let bytes = with_retries(|| registry.small_blob(&descriptor.digest, max)).await?;
        verify_document(&bytes, descriptor, "configuration")?;
        Ok(bytes)
    }

    /// Several at a time; the first failure ends the others.
    async fn pull_layers(
        &self,
        registry: &Arc<Registry>,
        manifest: &Manifest,
        diff_ids: &[Digest],
        options: &PullOptions,
        lock: &Arc<Lock>,
    ) -> Result<(), PullError> {
        let compressions = manifest.layers.iter().map(|layer| {
            let failed = |source| ImportError::Document { digest: layer.digest, source };
            layer.layer_compression().map_err(failed)
        });
        let compressions = compressions.collect::<Result<Vec<_>, _>>()?;
        let count = diff_ids.len();
        options.progress.event(Event::Layers { count });
        let permits = Arc::new(Semaphore::new(options.concurrent_layers.max(1)));
        let (alive, mut finished) = mpsc::channel::<Infallible>(1);
        let mut seen = HashSet::new();
        let mut workers = JoinSet::new();
        let parts = manifest.layers.iter().zip(compressions).zip(diff_ids);
        for (number, ((layer, compression), &diff_id)) in parts.enumerate() {
            // Some images have the same layer twice.
            if !seen.insert(diff_id) {
                continue;
            }
            let job = LayerJob {
                store: self.clone(),
                registry: Arc::clone(registry),
                spec: LayerSpec { blob: Some((layer.digest, layer.size)), diff_id, compression },
                digest: layer.digest,
                number: number.saturating_add(1),
                count,
                progress: Arc::clone(&options.progress),
                _lock: Arc::clone(lock),
                _alive: alive.clone(),
            };
            let permits = Arc::clone(&permits);
            workers.spawn(async move {
                // The semaphore is never closed; without a permit there is only less order.
                let _permit = permits.acquire().await.ok();
                job.run().await
            });
        }
        drop(alive);
        let mut outcome = Ok(());
        while let Some(result) = workers.join_next().await {
            outcome = result.map_err(PullError::from).and_then(|result| result);
            if outcome.is_err() {
                // Ends the downloads, and with them the conversions, which cannot be aborted.
                workers.abort_all();
                break;
            }
        }
        workers.shutdown().await;
        // `None` comes when the last conversion is over: from then on nothing is written.
        match finished.recv().await {
            None => outcome,
            Some(never) => match never {},
        }
    }
}

/// The download and conversion of one layer.
#[derive(Clone)]
struct LayerJob {
    store: Store,
    registry: Arc<Registry>,
    spec: LayerSpec,
    digest: Digest,
    /// Counted from 1, the lowest.
    number: usize,
    count: usize,
    progress: Arc<dyn Progress>,
    /// Keeps collectors away until the conversion is over.
    _lock: Arc<Lock>,
    /// Dropped with the last copy of the job, which the conversion's thread has.
    _alive: mpsc::Sender<Infallible>,
}

impl LayerJob {
    async fn run(self) -> Result<(), PullError> {
        let (store, diff_id) = (self.store.clone(), self.spec.diff_id);
        if spawn_blocking(move || store.has_layer(&diff_id)).await? {
            self.progress.event(Event::LayerExists { diff_id });
            return Ok(());
        }
        with_retries(|| self.clone().attempt()).await
    }

    /// The network on this task, the conversion on a thread of its own.
    async fn attempt(self) -> Result<(), PullError> {
        let (url, response) = self.registry.blob(&self.digest).await?;
        let (sender, reader) = stream::pipe(CHANNEL_DEPTH);
        let converted = spawn_blocking(move || {
            // All of the job: its lock and its sign of life last as long as this thread works.
            let job = self;
            let Self { digest, number, count, .. } = job;
            job.store.add_layer(
                &job.spec,
                &*job.progress,
                || Ok::<_, ImportError>(reader),
                |source| ImportError::Layer { number, count, digest, source },
            )
        });
        let downloaded = sender.send_body(response).await;
        let converted = converted.await?;
        match downloaded {
            // Then the conversion failed only because its input did.
            Err(source) => Err(PullError::Request { url, source: source.without_url() }),
            Ok(()) => Ok(converted?),
        }
    }
}

async fn with_retries<T, Attempt>(mut attempt: impl FnMut() -> Attempt) -> Result<T, PullError>
where
    Attempt: Future<Output = Result<T, PullError>>,
{
    let mut delay = FIRST_DELAY;
    for number in 1..ATTEMPTS {
        match attempt().await {
            Err(error) if error.is_transient() => {
                tracing::warn!(%error, number, "will try again");
                tokio::time::sleep(delay).await;
                delay = delay.saturating_mul(2);
            }
            result => return result,
        }
    }
    attempt().await
}

/// What docker's configuration has for the registry. Credential helpers are run: may take a while.
async fn stored_credentials(reference: &Reference) -> Result<Option<Credentials>, PullError> {
    let registry = reference.credentials_key();
    let key = registry.clone();
    match spawn_blocking(move || docker_credential::get_credential(&key)).await? {
        Ok(DockerCredential::UsernamePassword(username, password)) => {
            Ok(Some(Credentials::Password { username, password }))
        }
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Credentials::IdentityToken(token))),
        Err(
            CredentialRetrievalError::ConfigNotFound
            | CredentialRetrievalError::ConfigReadError
            | CredentialRetrievalError::NoCredentialConfigured,
        ) => Ok(None),
        Err(source) => Err(PullError::Credentials { registry, source }),
    }
}

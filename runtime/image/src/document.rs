//! The JSON documents of an image: index, manifest, configuration. OCI image-spec 1.1 and Docker's
//! image manifest version 2, schema 2, which differ in their media types alone.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestError};
use crate::layer::Compression;
use crate::limits::Limits;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Why a document cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not the JSON that it should be.
    #[error("the {what} is malformed")]
    Json {
        /// Which document.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A document that could be read as two things.
    #[error("the document is neither an image manifest nor an index, or claims to be both")]
    Ambiguous,
    /// Another schema than 2.
    #[error("the manifest has schema version {version}; 2 is the only one supported")]
    Schema {
        /// Its version.
        version: u64,
    },
    /// A digest that cannot be verified.
    #[error("the {what} has a digest that cannot be used")]
    Digest {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// A media type that is not an image's.
    #[error("the {what} has the media type {media_type:?}, which is not supported")]
    MediaType {
        /// Which part.
        what: &'static str,
        /// Its type.
        media_type: String,
    },
    /// More parts than the limit.
    #[error("the {what} has {count} entries, more than {max}")]
    TooMany {
        /// Which document.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// Manifest and configuration do not belong together.
    #[error("the manifest has {layers} layers, the configuration {diff_ids}")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// No manifest for the platform.
    #[error("there is no image for {platform}; there are: {available}")]
    NoPlatform {
        /// What was asked for.
        platform: String,
        /// What there is.
        available: String,
    },
    /// The image is for another platform.
    #[error("the image is for {actual}, not for {platform}")]
    WrongPlatform {
        /// What was asked for.
        platform: String,
        /// What the configuration says.
        actual: String,
    },
}

/// Why a string is not a platform.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a platform: expected os/architecture or os/architecture/variant")]
pub struct PlatformError {
    text: String,
}

/// What an image runs on, in Go's words: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// Operating system.
    pub os: String,
    /// Processor.
    pub architecture: String,
    /// Of the processor; none is any.
    #[serde(default)]
    pub variant: Option<String>,
}

impl Default for Platform {
    fn default() -> Self {
        let (os, architecture) = ("linux".to_owned(), "amd64".to_owned());
        Self { os, architecture, variant: None }
    }
}

impl Platform {
    /// Whether something for `other` runs on this one. A variant counts only if both have one;
    /// `arm64` and `arm64/v8` are the same.
    fn accepts(&self, other: &Self) -> bool {
        self.os == other.os
            && self.architecture == other.architecture
            && match (&self.variant, &other.variant) {
                (Some(wanted), Some(offered)) => wanted == offered,
                _ => true,
            }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (*os, *architecture, None),
            [os, architecture, variant] => (*os, *architecture, Some(*variant)),
            _ => return Err(PlatformError { text: text.to_owned() }),
        };
        if parts.contains(&"") {
            return Err(PlatformError { text: text.to_owned() });
        }
        let variant = variant.map(str::to_owned);
        Ok(Self { os: os.to_owned(), architecture: architecture.to_owned(), variant })
    }
}

/// A descriptor as it stands in the JSON.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// An index or manifest as it stands in the JSON: told apart by what it has.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDocument {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<WireDescriptor>,
    #[serde(default)]
    layers: Option<Vec<WireDescriptor>>,
    #[serde(default)]
    manifests: Option<Vec<WireDescriptor>>,
}

/// Refers to a blob by its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) platform: Option<Platform>,
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Descriptor {
    fn from_wire(wire: WireDescriptor, what: &'static str) -> Result<Self, DocumentError> {
        let WireDescriptor { media_type, digest, size, platform, annotations } = wire;
        let digest = digest.parse().map_err(|source| DocumentError::Digest { what, source })?;
        let annotations = annotations.unwrap_or_default();
        Ok(Self { media_type, digest, size, platform, annotations })
    }

    /// How the layer that this refers to is compressed.
    pub(crate) fn layer_compression(&self) -> Result<Compression, DocumentError> {
        Ok(match self.media_type.as_str() {
            OCI_LAYER_TAR => Compression::None,
            "application/vnd.oci.image.layer.v1.tar+gzip" => Compression::Gzip,
            "application/vnd.oci.image.layer.v1.tar+zstd" => Compression::Zstd,
            // Docker's types do not always tell the truth.
            "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Compression::Detect,
            _ => {
                let media_type = self.media_type.clone();
                return Err(DocumentError::MediaType { what: "layer", media_type });
            }
        })
    }
}

/// An image's manifest.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Lowest first.
    pub(crate) layers: Vec<Descriptor>,
}

/// What a document turned out to be.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

impl Document {
    /// Parses an index or manifest; `bytes` are within the limits already.
    pub(crate) fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, DocumentError> {
        let wire: WireDocument = serde_json::from_slice(bytes)
            .map_err(|source| DocumentError::Json { what: "manifest", source })?;
        let WireDocument { schema_version, media_type, config, layers, manifests } = wire;
        if schema_version != 2 {
            return Err(DocumentError::Schema { version: schema_version });
        }
        let is_index = match media_type.as_deref() {
            None => None,
            Some(OCI_INDEX | DOCKER_LIST) => Some(true),
            Some(OCI_MANIFEST | DOCKER_MANIFEST) => Some(false),
            Some(other) => {
                let media_type = other.to_owned();
                return Err(DocumentError::MediaType { what: "manifest", media_type });
            }
        };
        match (config, layers, manifests, is_index) {
            (None, None, Some(manifests), None | Some(true)) => {
                let (count, max) = (manifests.len(), limits.max_index_entries);
                if count > max {
                    return Err(DocumentError::TooMany { what: "index", count, max });
                }
                let entries = manifests.into_iter();
                let entries = entries.map(|wire| Descriptor::from_wire(wire, "index entry"));
                entries.collect::<Result<_, _>>().map(Self::Index)
            }
            (Some(config), Some(layers), None, None | Some(false)) => {
                Manifest::from_wire(config, layers, limits).map(Self::Manifest)
            }
            _ => Err(DocumentError::Ambiguous),
        }
    }
}

impl Manifest {
    fn from_wire(
        config: WireDescriptor,
        layers: Vec<WireDescriptor>,
        limits: &Limits,
    ) -> Result<Self, DocumentError> {
        let (count, max) = (layers.len(), limits.max_layers);
        if count > max {
            return Err(DocumentError::TooMany { what: "manifest", count, max });
        }
        let config = Descriptor::from_wire(config, "configuration")?;
        if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let media_type = config.media_type;
            return Err(DocumentError::MediaType { what: "configuration", media_type });
        }
        let layers = layers.into_iter().map(|wire| Descriptor::from_wire(wire, "layer"));
        Ok(Self { config, layers: layers.collect::<Result<_, _>>()? })
    }
}

/// The manifest in an index that fits the platform: the first, as the specification wants.
pub(crate) fn choose<'index>(
    entries: &'index [Descriptor],
    platform: &Platform,
) -> Result<&'index Descriptor, DocumentError> {
    let fits = |entry: &&Descriptor| match &entry.platform {
        Some(offered) => platform.accepts(offered),
        None => false,
    };
    // A single entry without a platform is what tools write for a local image; whether it fits is
    // seen in its configuration.
    let unlabelled = || match entries {
        [only] if only.platform.is_none() => Some(only),
        _ => None,
    };
    entries.iter().find(fits).or_else(unlabelled).ok_or_else(|| no_platform(entries, platform))
}

/// That none of the entries fits the platform.
pub(crate) fn no_platform(entries: &[Descriptor], platform: &Platform) -> DocumentError {
    let names = entries.iter().filter_map(|entry| entry.platform.as_ref());
    let names: Vec<String> = names.take(20).map(ToString::to_string).collect();
    let available =
        if names.is_empty() { "none that are labelled".to_owned() } else { names.join(", ") };
    DocumentError::NoPlatform { platform: platform.to_string(), available }
}

/// Parses an image's configuration. `null` members, which Docker writes for what is not set, are
/// taken as absent.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<ImageConfiguration, DocumentError> {
    let failed = |source| DocumentError::Json { what: "image configuration", source };
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(failed)?;
    drop_nulls(&mut value);
    serde_json::from_value(value).map_err(failed)
}

/// Recursion is bounded by the parser's own limit of 128 levels.
fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The layers' diff-ids, lowest first.
pub(crate) fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, DocumentError> {
    let ids = config.rootfs().diff_ids().iter();
    ids.map(|id| {
        id.parse().map_err(|source| DocumentError::Digest { what: "image configuration", source })
    })
    .collect()
}

/// Whether manifest, configuration and platform fit together; returns the layers' diff-ids.
pub(crate) fn check_config(
    manifest: &Manifest,
    config: &ImageConfiguration,
    platform: &Platform,
) -> Result<Vec<Digest>, DocumentError> {
    let actual = Platform {
        os: config.os().to_string(),
        architecture: config.architecture().to_string(),
        variant: config.variant().clone(),
    };
    if !platform.accepts(&actual) {
        let (platform, actual) = (platform.to_string(), actual.to_string());
        return Err(DocumentError::WrongPlatform { platform, actual });
    }
    let diff_ids = diff_ids(config)?;
    if diff_ids.len() != manifest.layers.len() {
        let (layers, diff_ids) = (manifest.layers.len(), diff_ids.len());
        return Err(DocumentError::LayerCount { layers, diff_ids });
    }
    Ok(diff_ids)
}

/// The manifest that stands for an image which came without one.
pub(crate) fn synthesize_manifest(config: (Digest, u64), layers: &[(Digest, u64)]) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Written {
        media_type: &'static str,
        digest: Digest,
        size: u64,
    }
    let descriptor = |media_type, (digest, size)| Written { media_type, digest, size };
    let layers: Vec<Written> =
        layers.iter().map(|&layer| descriptor(OCI_LAYER_TAR, layer)).collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, config),
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}

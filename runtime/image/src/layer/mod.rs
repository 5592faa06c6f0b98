//! From a layer as images carry it (a tar archive, usually compressed) to an EROFS blob, in one
//! pass: nothing is unpacked onto the host's file system.

mod builder;
mod paths;
#[cfg(test)]
mod tests;

use std::io::{self, BufReader, Read, Seek, Write};

use crate::digest::{Digest, Meter, RatioLimit};
use crate::erofs::{BlobStats, BlobWriter, TreeError, WriteError};
use crate::limits::Limits;
use husk_archive::tar::{TarError, TarReader};

use builder::LayerBuilder;
pub use paths::PathFault;

/// Between the decompressor and the archive's reader.
const BUFFER: usize = 256 << 10;
/// The first bytes of gzip (RFC 1952 section 2.3.1) and of a zstd frame (RFC 8878 section 3.1.1).
const GZIP_MAGIC: &[u8] = &[0x1F, 0x8B];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream is no archive, or a hostile one.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry has a path that has no place in a layer.
    #[error("the archive has an entry {path:?}: {fault}")]
    Path {
        /// The entry's path or link target.
        path: String,
        /// What is wrong with it.
        fault: PathFault,
    },
    /// An entry lies below something that is no directory.
    #[error("{path:?} lies below {part:?}, which is not a directory")]
    NotADirectory {
        /// The entry's path.
        path: String,
        /// The part of it that is no directory.
        part: String,
    },
    /// The way to an entry leads through a loop of symbolic links, or through too many.
    #[error("the way to {path:?} leads through too many symbolic links")]
    TooManySymlinks {
        /// The entry's path.
        path: String,
    },
    /// A link that cannot be.
    #[error("{path:?} is a link to {target:?}: {reason}")]
    Link {
        /// The entry's path.
        path: String,
        /// What it refers to.
        target: String,
        /// Why not.
        reason: &'static str,
    },
    /// A device number that Linux does not have.
    #[error("{path:?} is a device with the impossible number {major}:{minor}")]
    Device {
        /// The entry's path.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A bound on names, attributes or the number of files.
    #[error("cannot add {path:?}")]
    Tree {
        /// The entry's path.
        path: String,
        /// Which bound.
        #[source]
        source: TreeError,
    },
    /// The blob could not be written, or the data for it not be read.
    #[error("cannot store {path:?}")]
    Write {
        /// The entry's path.
        path: String,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// The layer's stream failed where no entry is concerned.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    /// The layer has not the length that the manifest says.
    #[error("the layer {digest} has {actual} bytes, its manifest says {expected}")]
    Size {
        /// Which layer.
        digest: Digest,
        /// From the manifest.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// The layer's bytes are not those that the manifest names.
    #[error("the layer's digest is {actual}, its manifest says {expected}")]
    Digest {
        /// From the manifest.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The uncompressed bytes are not those that the image's configuration names.
    #[error(
        "the uncompressed layer's digest is {actual}, the image's configuration says {expected}"
    )]
    DiffId {
        /// From the configuration.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
}

impl LayerError {
    /// Whether wrong bytes, rather than this host, may be why.
    fn may_be_content(&self) -> bool {
        !matches!(
            self,
            Self::Write { source: WriteError::Blob(_), .. }
                | Self::Size { .. }
                | Self::Digest { .. }
                | Self::DiffId { .. }
        )
    }
}

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    /// Said nowhere, or not reliably: look at the first bytes.
    Detect,
}

/// What is known of a layer before it is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerSpec {
    /// Digest and length as it is stored or transferred, where something vouches for them.
    pub(crate) blob: Option<(Digest, u64)>,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
    pub(crate) compression: Compression,
}

/// Reads a layer to its end, verifies everything that is known of it, and writes its blob to
/// `out`, which is empty. After an error what `out` holds is of no use. The same layer gives the
/// same bytes. `on_bytes` is called with the number of bytes taken from `input`.
pub(crate) fn convert(
    input: impl Read,
    spec: &LayerSpec,
    limits: &Limits,
    out: impl Write + Seek,
    on_bytes: &dyn Fn(u64),
) -> Result<BlobStats, LayerError> {
    let max = spec.blob.map_or(u64::MAX, |(_, size)| size);
    let mut stored = Meter::new(input, max, "the layer").with_callback(on_bytes);
    let result = convert_stored(&mut stored, spec, limits, out);
    match result {
        Ok(stats) => {
            let actual = stored.finish().map_err(LayerError::Read)?;
            verify_stored(spec, actual, stored.count())?;
            Ok(stats)
        }
        // Damaged bytes fail anywhere. That they are damaged is what to say then.
        Err(error) if error.may_be_content() => match stored.finish() {
            Ok(actual) => Err(verify_stored(spec, actual, stored.count()).err().unwrap_or(error)),
            Err(_) => Err(error),
        },
        Err(error) => Err(error),
    }
}

fn verify_stored(spec: &LayerSpec, actual: Digest, count: u64) -> Result<(), LayerError> {
    match spec.blob {
        Some((digest, expected)) if count != expected => {
            Err(LayerError::Size { digest, expected, actual: count })
        }
        Some((expected, _)) if actual != expected => Err(LayerError::Digest { expected, actual }),
        _ => Ok(()),
    }
}

fn convert_stored<R: Read>(
    stored: &mut Meter<'_, R>,
    spec: &LayerSpec,
    limits: &Limits,
    out: impl Write + Seek,
) -> Result<BlobStats, LayerError> {
    let ratio = RatioLimit {
        compressed: stored.counter(),
        max_ratio: limits.max_ratio,
        free_bytes: limits.bomb_free_bytes,
    };
    let plain = decompressor(stored, spec.compression).map_err(LayerError::Read)?;
    let plain = Meter::new(plain, limits.max_layer_bytes, "an uncompressed layer");
    let mut archive = TarReader::new(BufReader::with_capacity(BUFFER, plain.with_ratio(ratio)));
    let blob =
        BlobWriter::new(out).map_err(|source| LayerError::Write { path: "/".into(), source })?;
    let mut builder = LayerBuilder::new(blob, limits.tree());
    while let Some(entry) = archive.next_entry()? {
        builder.apply(&entry, &mut archive.data())?;
    }
    // What the buffer holds beyond the archive's end has been hashed already.
    let mut plain = archive.into_inner().into_inner();
    let actual = plain.finish().map_err(LayerError::Read)?;
    if actual != spec.diff_id {
        return Err(LayerError::DiffId { expected: spec.diff_id, actual });
    }
    builder.finish(spec.diff_id.to_uuid())
}

fn decompressor<'a>(
    mut input: impl Read + 'a,
    compression: Compression,
) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::new();
    input.by_ref().take(4).read_to_end(&mut start)?;
    let compression = match compression {
        Compression::Detect if start.starts_with(GZIP_MAGIC) => Compression::Gzip,
        Compression::Detect if start.starts_with(ZSTD_MAGIC) => Compression::Zstd,
        Compression::Detect => Compression::None,
        given => given,
    };
    let input = io::Cursor::new(start).chain(input);
    Ok(match compression {
        Compression::Gzip => {
            let input = BufReader::with_capacity(BUFFER, input);
            Box::new(flate2::bufread::MultiGzDecoder::new(input))
        }
        // The library refuses windows above 128 MiB by itself.
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(input)?),
        Compression::None | Compression::Detect => Box::new(input),
    })
}

/// For messages: paths in archives are bytes.
fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

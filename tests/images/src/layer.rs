//! One layer: a directory tree becomes a compressed tar of the form that the OCI image
//! specification describes (image-spec, layer.md).

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// Longest list of names, and longest value, of extended attributes (`XATTR_LIST_MAX`,
/// `XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// What overlayfs sets on a directory that hides all of the lower one.
const OPAQUE: &str = "trusted.overlay.opaque";
/// A tar entry of this name hides all that lower layers have in its directory (layer.md).
const OPAQUE_WHITEOUT: &str = ".wh..wh..opq";
/// A tar entry of this prefix hides the file of the rest of its name (layer.md).
const WHITEOUT_PREFIX: &str = ".wh.";

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `application/vnd.oci.image.layer.v1.tar+gzip`
    Gzip,
    /// `application/vnd.oci.image.layer.v1.tar+zstd`
    Zstd,
}

impl Compression {
    /// The layer's media type.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// A finished layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The compressed file; its name is its digest.
    pub blob: PathBuf,
    /// `sha256:` and the digest of the compressed bytes.
    pub digest: String,
    /// `sha256:` and the digest of the uncompressed tar.
    pub diff_id: String,
    /// Compressed bytes.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
}

/// Writes the tree `root` as a layer into the directory `blobs`. What overlayfs uses to hide files
/// of lower layers becomes whiteouts.
///
/// # Errors
/// When the tree holds something that cannot be read or has no place in a layer.
pub fn write(root: &Path, compression: Compression, blobs: &Path) -> Result<Layer> {
    let temporary = blobs.join(format!("layer.tmp-{}", std::process::id()));
    let file =
        File::create(&temporary).with_context(|| format!("creating {}", temporary.display()))?;
    let compressed = Hashing::new(BufWriter::new(file));
    let (diff_id, compressed) = match compression {
        Compression::Gzip => {
            let encoder = flate2::write::GzEncoder::new(compressed, flate2::Compression::new(6));
            let (diff_id, encoder) = write_tar(root, encoder)?;
            (diff_id, encoder.finish().context("finishing gzip")?)
        }
        Compression::Zstd => {
            let encoder = zstd::Encoder::new(compressed, 3).context("starting zstd")?;
            let (diff_id, encoder) = write_tar(root, encoder)?;
            (diff_id, encoder.finish().context("finishing zstd")?)
        }
    };
    let (digest, size, output) = compressed.finish();
    output
        .into_inner()
        .map_err(io::IntoInnerError::into_error)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("writing {}", temporary.display()))?;
    let blob = blobs.join(digest.trim_start_matches("sha256:"));
    fs::rename(&temporary, &blob).with_context(|| format!("renaming to {}", blob.display()))?;
    Ok(Layer { blob, digest, diff_id, size, compression })
}

fn write_tar<W: Write>(root: &Path, output: W) -> Result<(String, W)> {
    let mut tar =
        TarTree { root, builder: Builder::new(Hashing::new(output)), first_names: HashMap::new() };
    tar.add_directory_content(Path::new(""))?;
    let hashing = tar.builder.into_inner().context("finishing the tar")?;
    let (diff_id, _, output) = hashing.finish();
    Ok((diff_id, output))
}

struct TarTree<'a, W: Write> {
    root: &'a Path,
    builder: Builder<Hashing<W>>,
    /// Name of the first entry of each file that has several, by device and inode.
    first_names: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> TarTree<'_, W> {
    /// Adds what `relative` contains, sorted, so that the same tree gives the same layer.
    fn add_directory_content(&mut self, relative: &Path) -> Result<()> {
        let directory = self.root.join(relative);
        let mut names: Vec<OsString> = fs::read_dir(&directory)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.file_name())).collect())
            .with_context(|| format!("reading {}", directory.display()))?;
        names.sort();
        for name in names {
            let path = relative.join(name);
            self.add(&path)
                .with_context(|| format!("adding {}", self.root.join(&path).display()))?;
        }
        Ok(())
    }

    fn add(&mut self, relative: &Path) -> Result<()> {
        let path = self.root.join(relative);
        let metadata = fs::symlink_metadata(&path).context("reading")?;
        let kind = metadata.file_type();
        if kind.is_char_device() && metadata.rdev() == 0 {
            return self.add_whiteout(relative);
        }
        let mut header = header_of(&metadata);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            let opaque = self.add_xattrs(&path)?;
            self.append(&mut header, relative, io::empty())?;
            if opaque {
                self.append_empty_file(&relative.join(OPAQUE_WHITEOUT))?;
            }
            return self.add_directory_content(relative);
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let target = fs::read_link(&path).context("reading the link")?;
            return Ok(self.builder.append_link(&mut header, relative, target)?);
        }
        if !kind.is_file() {
            bail!("it is neither a file, a directory nor a link");
        }
        if metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.first_names.get(&inode) {
                header.set_entry_type(EntryType::Link);
                return Ok(self.builder.append_link(&mut header, relative, first)?);
            }
            self.first_names.insert(inode, relative.to_owned());
        }
        self.add_xattrs(&path)?;
        header.set_entry_type(EntryType::Regular);
        header.set_size(metadata.len());
        let file = File::open(&path).context("opening")?;
        self.append(&mut header, relative, file)
    }

    fn append(&mut self, header: &mut Header, path: &Path, data: impl io::Read) -> Result<()> {
        Ok(self.builder.append_data(header, path, data)?)
    }

    fn append_empty_file(&mut self, path: &Path) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(0);
        self.append(&mut header, path, io::empty())
    }

    fn add_whiteout(&mut self, relative: &Path) -> Result<()> {
        let name = relative.file_name().context("a whiteout without a name")?;
        self.append_empty_file(&relative.with_file_name(whiteout_name(name)))
    }

    /// Adds the extended attributes of the next entry, file capabilities among them. Returns
    /// whether it is a directory that hides the lower one.
    fn add_xattrs(&mut self, path: &Path) -> Result<bool> {
        let mut opaque = false;
        let mut records = Vec::new();
        for name in xattr_names(path)? {
            let value = xattr(path, &name)?;
            match name.as_str() {
                OPAQUE => opaque = value == b"y",
                // Only means something on the file system on which the tree was made.
                name if name.starts_with("trusted.") => {}
                name => records.push((format!("SCHILY.xattr.{name}"), value)),
            }
        }
        if !records.is_empty() {
            let records = records.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
            self.builder.append_pax_extensions(records).context("adding attributes")?;
        }
        Ok(opaque)
    }
}

fn header_of(metadata: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

fn whiteout_name(name: &OsStr) -> OsString {
    OsString::from_vec([WHITEOUT_PREFIX.as_bytes(), name.as_bytes()].concat())
}

fn xattr_names(path: &Path) -> Result<Vec<String>> {
    let mut buffer = vec![0u8; XATTR_MAX];
    let length = match llistxattr(path, buffer.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("listing attributes"),
    };
    buffer.truncate(length);
    let names = buffer.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| String::from_utf8(name.to_vec()).context("an attribute's name is not text"))
        .collect()
}

fn xattr(path: &Path, name: &str) -> Result<Vec<u8>> {
    let mut value = vec![0u8; XATTR_MAX];
    let length = lgetxattr(path, name, value.as_mut_slice())
        .with_context(|| format!("reading attribute {name}"))?;
    value.truncate(length);
    Ok(value)
}

/// Marks a directory of an overlay's upper layer as hiding all of the lower one.
///
/// # Errors
/// When the file system keeps no such attributes.
pub fn make_opaque(directory: &Path) -> Result<()> {
    rustix::fs::setxattr(directory, OPAQUE, b"y", XattrFlags::empty())
        .with_context(|| format!("making {} opaque", directory.display()))
}

/// Counts and hashes what passes through.
#[derive(Debug)]
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    length: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), length: 0 }
    }

    fn finish(self) -> (String, u64, W) {
        (format!("sha256:{}", hex::encode(self.hash.finalize())), self.length, self.inner)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        let written = buffer.get(..count).unwrap_or_default();
        self.hash.update(written);
        self.length += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Names, entry types and link targets of a layer.
    fn entries(layer: &Layer) -> Vec<(String, EntryType, Option<String>)> {
        let file = File::open(&layer.blob).unwrap();
        let reader: Box<dyn Read> = match layer.compression {
            Compression::Gzip => Box::new(flate2::read::GzDecoder::new(file)),
            Compression::Zstd => Box::new(zstd::Decoder::new(file).unwrap()),
        };
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        tar::Archive::new(reader)
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let link = entry.link_name().unwrap().map(|link| text(&link));
                (text(&entry.path().unwrap()), entry.header().entry_type(), link)
            })
            .collect()
    }

    #[test]
    fn a_tree_becomes_a_layer_with_links_and_one_digest() {
        let root = tempfile::tempdir().unwrap();
        let blobs = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/a"), "content").unwrap();
        fs::hard_link(root.path().join("d/a"), root.path().join("d/b")).unwrap();
        symlink("d/a", root.path().join("link")).unwrap();

        let gzip = write(root.path(), Compression::Gzip, blobs.path()).unwrap();
        let zstd = write(root.path(), Compression::Zstd, blobs.path()).unwrap();
        assert_eq!(gzip.diff_id, zstd.diff_id, "the content is the same");
        assert_ne!(gzip.digest, zstd.digest);
        for layer in [&gzip, &zstd] {
            assert_eq!(fs::metadata(&layer.blob).unwrap().len(), layer.size);
            let hash = hex::encode(Sha256::digest(fs::read(&layer.blob).unwrap()));
            assert_eq!(layer.digest, format!("sha256:{hash}"));
            assert_eq!(
                entries(layer),
                [
                    ("d".into(), EntryType::Directory, None),
                    ("d/a".into(), EntryType::Regular, None),
                    ("d/b".into(), EntryType::Link, Some("d/a".into())),
                    ("link".into(), EntryType::Symlink, Some("d/a".into())),
                ]
            );
        }
    }

    #[test]
    fn what_a_layer_cannot_hold_is_an_error_that_names_it() {
        let root = tempfile::tempdir().unwrap();
        let blobs = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("sock")).unwrap();
        let error = write(root.path(), Compression::Gzip, blobs.path()).unwrap_err();
        assert!(format!("{error:#}").contains("sock"), "{error:#}");
    }

    #[test]
    fn a_whiteouts_name_has_the_prefix() {
        assert_eq!(whiteout_name(OsStr::new("motd")), ".wh.motd");
    }
}

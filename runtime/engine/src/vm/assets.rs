//! The guest's kernel and initial RAM file system: opened, and checked before a VM is made from
//! them, so that a damaged file is an error that names it and not a guest that does not boot.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What the two files are called in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asset {
    /// The guest kernel.
    Kernel,
    /// The initial RAM file system.
    Initramfs,
}

impl std::fmt::Display for Asset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Asset::Kernel => "guest kernel",
            Asset::Initramfs => "initramfs",
        })
    }
}

impl Asset {
    /// The option and the variable by which the file can be named.
    fn option(self) -> &'static str {
        match self {
            Asset::Kernel => "--kernel or HUSK_KERNEL",
            Asset::Initramfs => "--initramfs or HUSK_INITRAMFS",
        }
    }
}

/// Why a VM cannot be made from a file.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// It is not there.
    #[error("the {asset} {path} does not exist; install it, or name another with {}", asset.option())]
    Missing {
        /// Which.
        asset: Asset,
        /// Where it was expected.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read the {asset} {path}")]
    Read {
        /// Which.
        asset: Asset,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not what it must be.
    #[error("the {asset} {path} cannot be booted: {reason}; build or install it again")]
    Unusable {
        /// Which.
        asset: Asset,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Opens the guest kernel, after a check that it is a complete ELF file for this architecture.
///
/// # Errors
/// [`AssetError`].
pub fn open_kernel(path: &Path) -> Result<File, AssetError> {
    open(Asset::Kernel, path, check_elf)
}

/// Opens the initial RAM file system, after a check that it is a complete cpio archive.
///
/// # Errors
/// [`AssetError`].
pub fn open_initramfs(path: &Path) -> Result<File, AssetError> {
    open(Asset::Initramfs, path, check_cpio)
}

/// What a check finds: the reason for which the file is unusable, or a failure to read it.
enum Flaw {
    Reason(String),
    Io(std::io::Error),
}

impl From<std::io::Error> for Flaw {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return Flaw::Reason("it is truncated".into());
        }
        Flaw::Io(error)
    }
}

fn open(
    asset: Asset,
    path: &Path,
    check: fn(&File, u64) -> Result<(), Flaw>,
) -> Result<File, AssetError> {
    let read = |source| AssetError::Read { asset, path: path.to_owned(), source };
    let file = File::open(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => AssetError::Missing { asset, path: path.to_owned() },
        _ => read(source),
    })?;
    let metadata = file.metadata().map_err(read)?;
    let found = if metadata.is_file() {
        check(&file, metadata.len())
    } else {
        Err(Flaw::Reason("it is not a regular file".into()))
    };
    match found {
        Ok(()) => Ok(file),
        Err(Flaw::Io(source)) => Err(read(source)),
        Err(Flaw::Reason(reason)) => {
            Err(AssetError::Unusable { asset, path: path.to_owned(), reason })
        }
    }
}

/// ELF machine of the architecture for which this is built (ELF gABI, `e_machine`).
#[cfg(target_arch = "x86_64")]
const MACHINE: (u16, &str) = (62, "x86-64");
#[cfg(target_arch = "aarch64")]
const MACHINE: (u16, &str) = (183, "AArch64");

/// Size of an ELF64 header and of an ELF64 program header.
const EHDR: usize = 64;
const PHDR: usize = 56;

/// Most program headers that are looked at. A kernel has fewer than ten.
const MAX_PHDRS: u16 = 64;

/// Little-endian integers at fixed places of a header that was read completely.
fn le16<const N: usize>(header: &[u8; N], at: usize) -> u16 {
    header.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}
fn le64<const N: usize>(header: &[u8; N], at: usize) -> u64 {
    header.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// Checks that an ELF64 file (gABI chapter 4) is for this machine and that every segment that is
/// to be loaded lies within it.
fn check_elf(file: &File, len: u64) -> Result<(), Flaw> {
    const PT_LOAD: u16 = 1;
    let refuse = |reason: String| Err(Flaw::Reason(reason));
    let mut header = [0; EHDR];
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF") {
        let hint = if header.starts_with(b"MZ") { " (a bzImage is not supported)" } else { "" };
        return refuse(format!("it is not an uncompressed ELF vmlinux{hint}"));
    }
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return refuse("it is not a 64-bit little-endian ELF file".into());
    }
    let machine = le16(&header, 18);
    if machine != MACHINE.0 {
        return refuse(format!("it is for ELF machine {machine}, not for {}", MACHINE.1));
    }
    let (table, entry, count) = (le64(&header, 32), le16(&header, 54), le16(&header, 56));
    if usize::from(entry) != PHDR || count == 0 || count > MAX_PHDRS {
        return refuse(format!("it has {count} program headers of {entry} bytes"));
    }
    let mut loaded = false;
    for index in 0..count {
        let mut segment = [0; PHDR];
        let at = table.saturating_add(u64::from(index) * u64::from(entry));
        file.read_exact_at(&mut segment, at)?;
        if le16(&segment, 0) != PT_LOAD {
            continue;
        }
        loaded = true;
        let end = le64(&segment, 8).saturating_add(le64(&segment, 32));
        if end > len {
            return refuse(format!("it is truncated: {len} bytes of at least {end}"));
        }
    }
    if loaded { Ok(()) } else { refuse("it has no segment to load".into()) }
}

/// Magic number of a "newc" cpio header (Linux: Documentation/driver-api/early-userspace,
/// buffer-format) and the name of the archive's last entry.
const CPIO_MAGIC: &[u8] = b"070701";
const CPIO_TRAILER: &[u8] = b"TRAILER!!!";

/// How far before the end of the file the trailer may be: archives are padded.
const TRAILER_WITHIN: u64 = 8192;

fn check_cpio(file: &File, len: u64) -> Result<(), Flaw> {
    let mut magic = [0; CPIO_MAGIC.len()];
    file.read_exact_at(&mut magic, 0)?;
    if magic != CPIO_MAGIC {
        return Err(Flaw::Reason("it is not an uncompressed cpio archive (newc)".into()));
    }
    let from = len.saturating_sub(TRAILER_WITHIN);
    let mut end = vec![0; usize::try_from(len.saturating_sub(from)).unwrap_or(0)];
    file.read_exact_at(&mut end, from)?;
    if end.windows(CPIO_TRAILER.len()).any(|window| window == CPIO_TRAILER) {
        Ok(())
    } else {
        Err(Flaw::Reason("it is truncated: its last entry is missing".into()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    /// A minimal ELF with one loadable segment of `filesz` bytes at offset 120.
    fn elf(filesz: u64) -> Vec<u8> {
        let mut bytes = vec![0; EHDR + PHDR];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&MACHINE.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes[64] = 1;
        bytes[72..80].copy_from_slice(&120_u64.to_le_bytes());
        bytes[96..104].copy_from_slice(&filesz.to_le_bytes());
        bytes
    }

    fn file_of(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn kernel_flaw(bytes: &[u8]) -> String {
        let (_dir, path) = file_of(bytes);
        open_kernel(&path).unwrap_err().to_string()
    }

    #[test]
    fn a_whole_kernel_is_opened() {
        let mut bytes = elf(1000);
        bytes.resize(120 + 1000, 0);
        let (_dir, path) = file_of(&bytes);
        assert_eq!(open_kernel(&path).unwrap().metadata().unwrap().len(), 1120);
    }

    #[test]
    fn a_truncated_kernel_is_named_so_wherever_it_was_cut() {
        let mut bytes = elf(1000);
        bytes.resize(1119, 0);
        assert!(kernel_flaw(&bytes).contains("truncated: 1119 bytes of at least 1120"));
        assert!(kernel_flaw(&bytes[..100]).contains("truncated"));
        assert!(kernel_flaw(&bytes[..10]).contains("truncated"));
        assert!(kernel_flaw(b"").contains("truncated"));
    }

    #[test]
    fn sizes_that_overflow_are_truncation() {
        assert!(kernel_flaw(&elf(u64::MAX)).contains("truncated"));
    }

    #[test]
    fn other_files_are_not_kernels() {
        assert!(kernel_flaw(&[b'M'; 100]).contains("not an uncompressed ELF"));
        let mut bz = vec![0; 100];
        bz[..2].copy_from_slice(b"MZ");
        assert!(kernel_flaw(&bz).contains("bzImage"));
        let mut other = elf(0);
        other[18] = 40;
        assert!(kernel_flaw(&other).contains("ELF machine 40"));
    }

    #[test]
    fn a_missing_file_says_with_what_to_name_another() {
        let missing = open_kernel(Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(missing, AssetError::Missing { asset: Asset::Kernel, .. }));
        assert!(missing.to_string().contains("HUSK_KERNEL"));
        let missing = open_initramfs(Path::new("/nonexistent")).unwrap_err();
        assert!(missing.to_string().contains("HUSK_INITRAMFS"));
    }

    #[test]
    fn a_directory_is_refused() {
        let error = open_kernel(Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("not a regular file"));
    }

    #[test]
    fn an_initramfs_without_its_end_is_truncated() {
        let mut archive = b"070701 entry ".to_vec();
        archive.extend_from_slice(&[b'x'; 20_000]);
        let (_dir, path) = file_of(&archive);
        assert!(open_initramfs(&path).unwrap_err().to_string().contains("truncated"));
        archive.extend_from_slice(b"070701 TRAILER!!!\0\0\0");
        let (_dir, path) = file_of(&archive);
        open_initramfs(&path).unwrap();
        let (_dir, path) = file_of(b"\x1f\x8b compressed");
        assert!(
            open_initramfs(&path).unwrap_err().to_string().contains("not an uncompressed cpio")
        );
    }
}

//! What is in files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, SeekFrom as Whence, fallocate, seek};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("data is read as it was written", read_back),
    ("appends of two writers do not overwrite", appends),
    ("truncation cuts and extends", truncation),
    ("a hole takes no space", holes),
    ("space can be reserved", reserved),
    ("a shared mapping is the file", mapping),
    ("direct writes and reads go past the cache", direct),
    ("a file without a name lives on", unlinked),
    ("O_TMPFILE or a plain refusal", nameless),
    ("statvfs tells sizes", sizes),
];

fn open(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn read_back(dir: &Path) -> Result<()> {
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i ^ (i >> 9)) as u8).collect();
    let path = dir.join("file");
    fs::write(&path, &bytes)?;
    File::open(&path)?.sync_all()?;
    ensure!(fs::read(&path)? == bytes, "other bytes");
    let mut part = [0; 1000];
    File::open(&path)?.read_exact_at(&mut part, 1_234_567)?;
    ensure!(part == bytes[1_234_567..][..1000], "other bytes in the middle");
    ensure!(fs::metadata(&path)?.len() == 3_000_000, "another length");
    Ok(())
}

fn appends(dir: &Path) -> Result<()> {
    let path = dir.join("log");
    let writer = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut one, mut other) = (writer()?, writer()?);
    for _ in 0..50 {
        one.write_all(b"one\n")?;
        other.write_all(b"two\n")?;
    }
    ensure!(fs::read_to_string(&path)? == "one\ntwo\n".repeat(50), "lines are lost");
    Ok(())
}

fn truncation(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    file.write_all_at(&[7; 10_000], 0)?;
    file.set_len(5000)?;
    file.set_len(6000)?;
    let mut bytes = Vec::new();
    (&file).read_to_end(&mut bytes)?;
    ensure!(bytes.len() == 6000 && bytes[..5000] == [7; 5000] && bytes[5000..] == [0; 1000]);
    Ok(())
}

fn holes(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    file.write_all_at(b"data", 64 << 20)?;
    file.sync_all()?;
    ensure!(file.metadata()?.len() == (64 << 20) + 4, "another length");
    ensure!(file.metadata()?.blocks() * 512 < 1 << 20, "the hole takes space");
    let data = seek(&file, Whence::Data(0)).context("SEEK_DATA")?;
    ensure!(data > 32 << 20 && data <= 64 << 20, "SEEK_DATA finds {data}");
    ensure!(seek(&file, Whence::Hole(0)).context("SEEK_HOLE")? == 0, "SEEK_HOLE");
    Ok(())
}

fn reserved(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).context("fallocate")?;
    ensure!(file.metadata()?.len() == 1 << 20, "another length");
    file.write_all_at(&[1; 8192], 0)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, 4096).context("punching a hole")?;
    let mut bytes = [9; 8192];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes[..4096] == [0; 4096] && bytes[4096..] == [1; 4096], "other bytes");
    Ok(())
}

fn mapping(dir: &Path) -> Result<()> {
    const LEN: usize = 3 * 4096;
    let file = open(&dir.join("file"))?;
    file.write_all_at(&[1; LEN], 0)?;
    let (read_write, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    #[allow(unsafe_code)]
    // SAFETY: a new mapping of a file of this length, which nothing here cuts off, is looked at
    // within its bounds by nobody else, and is taken away once nothing refers to it.
    let seen = unsafe {
        let map = mmap(std::ptr::null_mut(), LEN, read_write, shared, &file, 0).context("mmap")?;
        let bytes = std::slice::from_raw_parts_mut(map.cast::<u8>(), LEN);
        bytes[5000] = 42;
        msync(map, LEN, MsyncFlags::SYNC).context("msync")?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5000)?;
        file.write_all_at(&[43], 9000)?;
        let seen = (byte[0], bytes[9000], bytes[0]);
        munmap(map, LEN).context("munmap")?;
        seen
    };
    ensure!(seen == (42, 43, 1), "{seen:?}");
    ensure!(fs::read(dir.join("file"))?[5000] == 42, "not in the file");
    Ok(())
}

/// Memory that is aligned as direct I/O asks for.
#[repr(align(4096))]
struct Aligned([u8; 16384]);

fn direct(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    let mut file = match opened {
        // tmpfs before Linux 6.6 has no direct I/O.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
        opened => opened.context("open with O_DIRECT")?,
    };
    let mut buffer = Box::new(Aligned([0; 16384]));
    buffer.0.iter_mut().zip((0..=255).cycle()).for_each(|(byte, value)| *byte = value);
    file.write_all(&buffer.0).context("a direct write")?;
    ensure!(fs::read(&path)? == buffer.0, "other bytes");
    let mut back = Box::new(Aligned([0; 16384]));
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut back.0).context("a direct read")?;
    ensure!(back.0 == buffer.0, "other bytes, read directly");
    Ok(())
}

fn unlinked(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = open(&path)?;
    file.write_all_at(b"still here", 0)?;
    fs::remove_file(&path)?;
    ensure!(!path.exists(), "the name is still there");
    let mut bytes = [0; 10];
    file.read_exact_at(&mut bytes, 0)?;
    file.write_all_at(b"and writable", 100)?;
    ensure!(&bytes == b"still here" && file.metadata()?.nlink() == 0, "{bytes:?}");
    Ok(())
}

fn nameless(dir: &Path) -> Result<()> {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(dir);
    match opened {
        Ok(file) => Ok(file.write_all_at(b"x", 0)?),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn sizes(dir: &Path) -> Result<()> {
    let sizes = rustix::fs::statvfs(dir)?;
    ensure!(
        sizes.f_bsize > 0 && sizes.f_blocks >= sizes.f_bfree,
        "{} {} {}",
        sizes.f_bsize,
        sizes.f_blocks,
        sizes.f_bfree
    );
    ensure!(
        sizes.f_blocks > 0 && sizes.f_namemax >= 255,
        "{} {} {}",
        sizes.f_bsize,
        sizes.f_blocks,
        sizes.f_bfree
    );
    Ok(())
}

//! Takes files from the transfer disk.

use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;

use super::TRANSFER_DISK;
use crate::wire::{
    Content, Kind, PushedFile, TRANSFER_ALIGN, receive, send, send_json, transfer_layout,
};

/// Read from the disk at once.
const CHUNK: usize = 1 << 20;

/// Says which files are missing or differ, waits until they lie on the disk, and installs them.
///
/// # Errors
/// When a file cannot be read from the disk or written.
pub(super) fn run(stream: &mut TcpStream, files: &[PushedFile]) -> Result<()> {
    let needed: Vec<usize> =
        (0..files.len()).filter(|index| files.get(*index).is_some_and(|f| !is_there(f))).collect();
    send_json(stream, Kind::Need, &needed)?;
    let needed: Vec<&PushedFile> = needed.iter().filter_map(|index| files.get(*index)).collect();
    if needed.is_empty() {
        return send(stream, Kind::Done, b"").context("answering");
    }
    let Some(frame) = receive(stream)? else { bail!("the client went away") };
    ensure!(frame.kind == Kind::Written, "expected Written, got {:?}", frame.kind);
    let (offsets, _) = transfer_layout(frame.json()?, needed.iter().copied())?;

    // Direct: the page cache may hold what lay at these places before.
    let disk = File::options()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(TRANSFER_DISK)
        .with_context(|| format!("opening {TRANSFER_DISK}"))?;
    let mut buffer = AlignedBuffer::new();
    for (file, offset) in needed.iter().zip(offsets) {
        install(&disk, offset, file, &mut buffer)
            .with_context(|| format!("writing {} in the test host", file.destination))?;
    }
    send(stream, Kind::Done, b"").context("answering")
}

fn is_there(file: &PushedFile) -> bool {
    let path = Path::new(&file.destination);
    match &file.content {
        Content::Symlink { target } => {
            fs::read_link(path).is_ok_and(|found| found.as_os_str() == target.as_str())
        }
        Content::Regular { size, mtime_s, mtime_ns } => {
            fs::symlink_metadata(path).is_ok_and(|found| {
                found.is_file()
                    && found.len() == *size
                    && found.mtime() == *mtime_s
                    && found.mtime_nsec() == *mtime_ns
                    && found.mode() & 0o7777 == file.mode
            })
        }
    }
}

fn install(disk: &File, offset: u64, file: &PushedFile, buffer: &mut AlignedBuffer) -> Result<()> {
    let path = Path::new(&file.destination);
    let parent = path.parent().context("no parent directory")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    if path.is_dir() && !path.is_symlink() {
        bail!("a directory is in the way");
    }
    let temporary = temporary_name(path)?;
    match &file.content {
        Content::Symlink { target } => symlink(target, &temporary).context("making the link")?,
        Content::Regular { size, mtime_s, mtime_ns } => {
            let mut output = File::create(&temporary).context("creating")?;
            copy(disk, offset, *size, &mut output, buffer)?;
            output
                .set_permissions(fs::Permissions::from_mode(file.mode))
                .context("setting the mode")?;
            let modified = time_from(*mtime_s, *mtime_ns)?;
            output
                .set_times(FileTimes::new().set_modified(modified))
                .context("setting the time")?;
        }
    }
    // A rename, so that a program that runs can be replaced.
    fs::rename(&temporary, path).context("renaming")
}

fn temporary_name(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().context("no file name")?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".push-{:?}", std::thread::current().id()));
    let temporary = path.with_file_name(temporary);
    match fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("removing a stale temporary file"),
    }
    Ok(temporary)
}

fn time_from(seconds: i64, nanoseconds: i64) -> Result<SystemTime> {
    let seconds = u64::try_from(seconds).context("a time before 1970")?;
    let nanoseconds = u32::try_from(nanoseconds).context("malformed time")?;
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanoseconds))
        .context("a time out of range")
}

fn copy(
    disk: &File,
    offset: u64,
    size: u64,
    output: &mut File,
    buffer: &mut AlignedBuffer,
) -> Result<()> {
    let mut done = 0;
    while done < size {
        let left = size - done;
        let wanted = left.next_multiple_of(TRANSFER_ALIGN).min(CHUNK as u64) as usize;
        let chunk = buffer.get(wanted)?;
        disk.read_exact_at(chunk, offset + done).context("reading the transfer disk")?;
        let useful = left.min(wanted as u64) as usize;
        let useful = chunk.get(..useful).context("chunk too short")?;
        output.write_all(useful).context("writing")?;
        done += useful.len() as u64;
    }
    Ok(())
}

/// Memory at an address that direct I/O accepts.
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    fn new() -> Self {
        let bytes = vec![0; CHUNK + TRANSFER_ALIGN as usize];
        let start = bytes.as_ptr().align_offset(TRANSFER_ALIGN as usize);
        Self { bytes, start }
    }

    fn get(&mut self, length: usize) -> Result<&mut [u8]> {
        let end = self.start.checked_add(length).context("buffer length overflows")?;
        self.bytes.get_mut(self.start..end).context("buffer too short")
    }
}

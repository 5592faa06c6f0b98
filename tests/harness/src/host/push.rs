//! Brings files into the test host over the transfer disk.
//!
//! Only what differs in size, time or mode is sent: it is written to the raw disk here and read
//! from it there, at the speed of copying files, where a network connection under TCG is slow.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FallocateFlags, fallocate};

use super::instance::Lease;
use crate::wire::{Content, Kind, Operation, PushedFile, receive, send_json, transfer_layout};
use husk_harness::cache::files::Lock;
use husk_harness::progress::say;

/// Root of everything of the product in the test host.
pub(crate) const GUEST_ROOT: &str = "/opt/husk";

/// Sub-directories of a product tree that [`Plan::tree`] mirrors.
const TREE: [&str; 4] = ["bin", "share", "images", "tests"];

/// Files here and where they go.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    files: Vec<(PathBuf, PushedFile)>,
}

impl Plan {
    /// Adds a file, or a directory and all in it, to appear as `destination`. Links inside a
    /// directory stay links; `source` itself may be one to what is meant.
    pub(crate) fn add(&mut self, source: &Path, destination: &str) -> Result<()> {
        let metadata =
            fs::metadata(source).with_context(|| format!("reading {}", source.display()))?;
        self.add_with(source, destination, &metadata)
    }

    /// Mirrors the known parts of a product tree (`dist`) to [`GUEST_ROOT`].
    pub(crate) fn tree(&mut self, root: &Path) -> Result<()> {
        for part in TREE {
            let dir = root.join(part);
            if dir.is_dir() {
                self.add(&dir, &format!("{GUEST_ROOT}/{part}"))?;
            }
        }
        if self.files.is_empty() {
            bail!("{} holds none of {}", root.display(), TREE.join(", "));
        }
        Ok(())
    }

    fn add_with(
        &mut self,
        source: &Path,
        destination: &str,
        metadata: &fs::Metadata,
    ) -> Result<()> {
        if metadata.is_dir() {
            let entries =
                fs::read_dir(source).with_context(|| format!("reading {}", source.display()))?;
            for entry in entries {
                let entry = entry.with_context(|| format!("reading {}", source.display()))?;
                let name = entry.file_name();
                let name = name.to_str().with_context(|| format!("{name:?} is not UTF-8"))?;
                let metadata = entry
                    .metadata()
                    .with_context(|| format!("reading {}", entry.path().display()))?;
                self.add_with(&entry.path(), &format!("{destination}/{name}"), &metadata)?;
            }
            return Ok(());
        }
        let content = if metadata.is_symlink() {
            let target =
                fs::read_link(source).with_context(|| format!("reading {}", source.display()))?;
            let target = target.to_str().context("a link's target is not UTF-8")?.to_owned();
            Content::Symlink { target }
        } else if metadata.is_file() {
            Content::Regular {
                size: metadata.len(),
                mtime_s: metadata.mtime(),
                mtime_ns: metadata.mtime_nsec(),
            }
        } else {
            bail!("{} is neither a file, a directory nor a link", source.display());
        };
        let mode = metadata.permissions().mode() & 0o7777;
        let file = PushedFile { destination: destination.to_owned(), mode, content };
        self.files.push((source.to_owned(), file));
        Ok(())
    }
}

/// Makes the planned files the same in the test host as here. Returns how many had to be sent,
/// and their bytes.
///
/// # Errors
/// When a file cannot be read here or written there.
pub(crate) fn push(lease: &Lease, plan: &Plan) -> Result<(usize, u64)> {
    let _pushing = Lock::exclusive(&lease.state.push_lock(), "pushes files")?;
    let list = plan.files.iter().map(|(_, file)| file.clone()).collect();
    let mut stream = lease.instance.request(Operation::Push(list))?;
    let needed: Vec<usize> = expect(&mut stream, Kind::Need)?.json()?;
    let needed: Vec<&(PathBuf, PushedFile)> = needed
        .iter()
        .map(|index| plan.files.get(*index).context("the agent asks for an unknown file"))
        .collect::<Result<_>>()?;
    let start = lease.instance.transfer_start;
    let (offsets, end) = transfer_layout(start, needed.iter().map(|(_, file)| file))?;
    if !needed.is_empty() {
        let path = lease.state.transfer_disk();
        let mut disk = File::options()
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let size = disk.metadata().context("reading the transfer disk's size")?.len();
        if end > size {
            bail!("{} MiB at once do not fit the transfer disk", (end - start) >> 20);
        }
        for ((source, file), offset) in needed.iter().zip(offsets) {
            write(&mut disk, offset, source, file)?;
        }
        send_json(&mut stream, Kind::Written, &start)?;
        expect(&mut stream, Kind::Done)?;
        // Give the space back.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&disk, hole, start, end - start).context("clearing the transfer disk")?;
    } else {
        expect(&mut stream, Kind::Done)?;
    }
    Ok((needed.len(), needed.iter().map(|(_, file)| file.size()).sum()))
}

/// As [`push`], and tells the person what was done.
pub(crate) fn push_and_say(lease: &Lease, plan: &Plan) -> Result<()> {
    let started = std::time::Instant::now();
    let (files, bytes) = push(lease, plan)?;
    let seconds = started.elapsed().as_secs_f64();
    let all = plan.files.len();
    say(format_args!("sent {files} of {all} files, {} KiB ({seconds:.1} s)", bytes >> 10));
    Ok(())
}

fn expect(stream: &mut std::net::TcpStream, kind: Kind) -> Result<crate::wire::Frame> {
    match receive(stream)? {
        Some(frame) if frame.kind == kind => Ok(frame),
        Some(frame) if frame.kind == Kind::Error => {
            bail!("in the test host: {}", String::from_utf8_lossy(&frame.payload))
        }
        Some(frame) => bail!("expected {kind:?}, got {:?}", frame.kind),
        None => bail!("the test host lost the connection"),
    }
}

fn write(disk: &mut File, offset: u64, source: &Path, file: &PushedFile) -> Result<()> {
    if file.size() == 0 {
        return Ok(());
    }
    let mut copy = || -> std::io::Result<u64> {
        let mut input = File::open(source)?;
        disk.seek(SeekFrom::Start(offset))?;
        // Both are files: the kernel copies.
        std::io::copy(&mut std::io::Read::take(&mut input, file.size()), disk)
    };
    let copied = copy().with_context(|| format!("copying {}", source.display()))?;
    if copied != file.size() {
        bail!("{} became shorter while it was copied", source.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_mirrored_with_its_links() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bin")).unwrap();
        fs::create_dir_all(dir.path().join("other")).unwrap();
        fs::write(dir.path().join("bin/husk"), "x").unwrap();
        fs::write(dir.path().join("other/not"), "x").unwrap();
        std::os::unix::fs::symlink("husk", dir.path().join("bin/link")).unwrap();
        let mut plan = Plan::default();
        plan.tree(dir.path()).unwrap();
        let mut found: Vec<_> = plan
            .files
            .iter()
            .map(|(_, file)| {
                (file.destination.as_str(), matches!(file.content, Content::Symlink { .. }))
            })
            .collect();
        found.sort_unstable();
        assert_eq!(found, [("/opt/husk/bin/husk", false), ("/opt/husk/bin/link", true)]);
    }

    #[test]
    fn a_tree_without_known_parts_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Plan::default().tree(dir.path()).is_err());
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = Plan::default().add(Path::new("/nowhere/at all"), "/x").unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/at all"));
    }
}

//! Copying a sparse file so that it stays sparse.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Makes `to`, which is empty, a copy of `from`: sharing its blocks where the file system can,
/// else copying only what is not a hole. Blocks.
pub(super) fn copy(from: &File, to: &File) -> std::io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    ftruncate(to, len)?;
    let mut at = 0;
    while at < len {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        at = seek(from, SeekFrom::Hole(data))?;
        copy_range(from, to, data, at)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> std::io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let rest = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), rest) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Not within this kernel, or not between these two file systems.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                return copy_bytes(from, to, read_at, end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// As [`copy_range`], by way of this process.
fn copy_bytes(from: &File, to: &File, start: u64, end: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut at = start;
    while at < end {
        let rest = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let piece = buffer.get_mut(..rest).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at = at.saturating_add(u64::try_from(rest).unwrap_or(0));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_has_the_same_content_and_the_same_holes() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(1 << 30).unwrap();
        from.write_all_at(b"begin", 0).unwrap();
        from.write_all_at(b"middle", 500 << 20).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 1 << 30);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20, "sparse");
        let mut text = [0; 6];
        to.read_exact_at(&mut text, 500 << 20).unwrap();
        assert_eq!(&text, b"middle");
        to.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"begin\0");
    }

    #[test]
    fn bytes_are_copied_in_pieces_up_to_the_end() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let content: Vec<u8> = (0..200_001_u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
        from.write_all_at(&content, 7).unwrap();
        copy_bytes(&from, &to, 7, 7 + 200_001).unwrap();
        let mut copied = vec![0; content.len()];
        to.read_exact_at(&mut copied, 7).unwrap();
        assert!(copied == content);
        assert!(copy_bytes(&from, &to, 0, 1 << 20).is_err(), "past the end");
    }

    #[test]
    fn a_file_that_is_one_hole_is_copied() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(12345).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 12345);
    }
}

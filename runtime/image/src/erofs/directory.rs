//! Directories on disk: blocks that each start with an array of entries, followed by their names.

use super::format::{BLOCK_SIZE, DIRENT_SIZE, FileType};

/// An entry of a directory, ready to be written.
#[derive(Debug)]
pub(crate) struct Dirent<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) file_type: FileType,
}

/// Bytes that a directory with these entries takes: whole blocks, but for the last. The lengths
/// are of the names in their order, `.` and `..` included.
pub(crate) fn directory_size(name_lens: impl Iterator<Item = usize>) -> u64 {
    let block_size = u64::from(BLOCK_SIZE);
    let (mut full_blocks, mut used) = (0u64, 0u64);
    for len in name_lens {
        let entry = u64::from(DIRENT_SIZE).saturating_add(len as u64);
        if used.saturating_add(entry) > block_size {
            full_blocks = full_blocks.saturating_add(1);
            used = 0;
        }
        used = used.saturating_add(entry);
    }
    full_blocks.saturating_mul(block_size).saturating_add(used)
}

/// Splits the entries, which are sorted by name, into the blocks that [`directory_size`] counts,
/// and hands each to `sink`: full blocks padded with zeros, the last as long as it is.
pub(crate) fn encode_directory<Failure>(
    entries: &[Dirent<'_>],
    mut sink: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut rest = entries;
    let mut block = Vec::with_capacity(BLOCK_SIZE as usize);
    while !rest.is_empty() {
        let mut used = 0usize;
        let fitting = rest
            .iter()
            .take_while(|entry| {
                used = used.saturating_add(DIRENT_SIZE as usize).saturating_add(entry.name.len());
                used <= BLOCK_SIZE as usize
            })
            .count();
        // A name has at most 255 bytes: one entry always fits, and the loop always advances.
        let (now, later) = rest.split_at(fitting.clamp(1, rest.len()));
        block.clear();
        encode_block(now, &mut block);
        if !later.is_empty() {
            block.resize(BLOCK_SIZE as usize, 0);
        }
        sink(&block)?;
        rest = later;
    }
    Ok(())
}

fn encode_block(entries: &[Dirent<'_>], out: &mut Vec<u8>) {
    let mut name_offset = entries.len().saturating_mul(DIRENT_SIZE as usize);
    for entry in entries {
        out.extend_from_slice(&entry.nid.to_le_bytes());
        // A block has 4096 bytes, which is what makes an offset in it fit.
        out.extend_from_slice(&u16::try_from(name_offset).unwrap_or(u16::MAX).to_le_bytes());
        out.push(entry.file_type.dirent_type());
        out.push(0);
        name_offset = name_offset.saturating_add(entry.name.len());
    }
    for entry in entries {
        out.extend_from_slice(entry.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_what_is_encoded() {
        for count in [0usize, 1, 2, 14, 15, 16, 17, 200, 5000] {
            let names: Vec<Vec<u8>> = (0..count).map(|n| vec![b'a'; (n * 37) % 255 + 1]).collect();
            let entries: Vec<Dirent<'_>> = names
                .iter()
                .map(|name| Dirent { name, nid: 7, file_type: FileType::Regular })
                .collect();
            let mut written = 0u64;
            encode_directory(&entries, |block| {
                assert!(block.len() <= BLOCK_SIZE as usize);
                written += block.len() as u64;
                Ok::<_, std::convert::Infallible>(())
            })
            .unwrap();
            assert_eq!(written, directory_size(names.iter().map(Vec::len)), "{count} entries");
        }
    }
}

//! Random requests to a disk.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};

use crate::Access;

/// Length of a request, and what its place and its memory are aligned to.
const BLOCK: usize = 4096;

/// Memory of one request.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// Places on a disk in an order that looks random, and is the same each time (xorshift).
struct Places {
    state: u64,
    blocks: u64,
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        Some(self.state % self.blocks * BLOCK as u64)
    }
}

/// Makes `requests` requests, `depth` at a time.
pub(crate) fn run(
    path: &Path,
    cached: bool,
    access: Access,
    depth: u32,
    requests: u64,
) -> Result<Duration> {
    let mut options = File::options();
    let options = options.read(true).write(matches!(access, Access::Write));
    let mut file = options
        .custom_flags(if cached { 0 } else { libc::O_DIRECT })
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
    ensure!(blocks > 0, "{} has less than a block", path.display());
    ensure!(depth > 0, "a depth of 0 does nothing");
    let mut places = Places { state: 0x9e37_79b9_7f4a_7c15, blocks };
    let mut ring = IoUring::new(depth).context("cannot make an io_uring")?;
    let mut memory: Vec<Block> = (0..depth).map(|_| Block([0x5a; BLOCK])).collect();
    let (mut begun, mut done) = (0, 0);
    let mut free: Vec<usize> = (0..memory.len()).collect();

    let start = Instant::now();
    while done < requests {
        while begun < requests
            && let Some(slot) = free.pop()
        {
            let place = places.next().unwrap_or_default();
            push(&mut ring, &file, access, &mut memory[slot], place, slot)?;
            begun += 1;
        }
        ring.submit_and_wait(1).context("io_uring_enter")?;
        for entry in ring.completion() {
            match usize::try_from(entry.result()) {
                Ok(BLOCK) => {}
                Ok(len) => bail!("a request did {len} of {BLOCK} bytes"),
                Err(_) => bail!(std::io::Error::from_raw_os_error(-entry.result())),
            }
            free.push(usize::try_from(entry.user_data())?);
            done += 1;
        }
    }
    Ok(start.elapsed())
}

fn push(
    ring: &mut IoUring,
    file: &File,
    access: Access,
    memory: &mut Block,
    place: u64,
    slot: usize,
) -> Result<()> {
    let fd = types::Fd(file.as_raw_fd());
    let len = BLOCK as u32;
    let entry = match access {
        Access::Read => opcode::Read::new(fd, memory.0.as_mut_ptr(), len).offset(place).build(),
        Access::Write => opcode::Write::new(fd, memory.0.as_ptr(), len).offset(place).build(),
    };
    // SAFETY: the descriptor and the memory outlive the ring's use of them: `run` waits for every
    // request, and gives a slot's memory to one at a time. (If it fails it ends the process.)
    unsafe { ring.submission().push(&entry.user_data(slot as u64)) }
        .context("the ring is full, though it has a place for each slot")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_blocks_of_the_disk_and_differ() {
        let places: Vec<u64> = Places { state: 1, blocks: 1000 }.take(500).collect();
        assert!(places.iter().all(|place| place % 4096 == 0 && *place < 4_096_000));
        let different: std::collections::BTreeSet<_> = places.iter().collect();
        assert!(different.len() > 300, "{}", different.len());
    }
}

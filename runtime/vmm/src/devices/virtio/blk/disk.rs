//! The host's side of a disk: a raw image file or a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use husk_vmm_api::MAX_SERIAL_LEN;
use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl, fdatasync};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::super::chain::{Chain, GuestFault};
use super::request::{Failure, HEADER_LEN, ID_LEN, Operation, Range, SECTOR_LEN};

/// Most pieces of memory in one system call (`IOV_MAX`).
const MAX_IOVECS: usize = 1024;

/// `BLKDISCARD` (linux/fs.h): `_IO(0x12, 119)` with an array of offset and length in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The serial is empty, too long, or not printable ASCII.
    #[error("disk serial {serial:?} is not 1 to {MAX_SERIAL_LEN} bytes of printable ASCII")]
    Serial {
        /// The serial.
        serial: String,
    },
    /// The descriptor could not be asked what it is.
    #[error("cannot examine the disk's descriptor")]
    Examine(#[source] io::Error),
    /// The descriptor is neither a file nor a block device.
    #[error("the disk is neither a regular file nor a block device")]
    NotADisk,
    /// The descriptor does not allow what the disk needs.
    #[error("the disk's descriptor is not open for {access}")]
    Access {
        /// What it lacks.
        access: &'static str,
    },
    /// The file holds no whole sector.
    #[error("the disk has {len} bytes, which is less than one sector of {SECTOR_LEN}")]
    TooSmall {
        /// Its length in bytes.
        len: u64,
    },
}

/// Why an operation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The guest's request cannot be met.
    #[error("the request is answered with {0:?}")]
    Refused(Failure),
    /// The host could not do it.
    #[error("cannot {what}")]
    Host {
        /// What, as an infinitive.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The chain changed under us.
    #[error(transparent)]
    Guest(#[from] GuestFault),
}

/// A disk: the descriptor and what may be done with it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    is_block_device: bool,
    sectors: u64,
    read_only: bool,
    serial: [u8; ID_LEN as usize],
}

impl Disk {
    /// Takes over a raw image or a block device. Bytes beyond the last whole sector are not seen.
    ///
    /// # Errors
    /// See [`BlkError`].
    pub fn new(serial: &str, file: File, read_only: bool) -> Result<Self, BlkError> {
        let is_printable = serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if serial.is_empty() || serial.len() > MAX_SERIAL_LEN || !is_printable {
            return Err(BlkError::Serial { serial: serial.to_owned() });
        }
        // Shorter ones end with a zero (5.2.6).
        let mut id = [0; ID_LEN as usize];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }

        let flags = fcntl_getfl(&file).map_err(|errno| BlkError::Examine(errno.into()))?;
        let mode = flags & OFlags::RWMODE;
        if mode == OFlags::WRONLY {
            return Err(BlkError::Access { access: "reading" });
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(BlkError::Access { access: "writing" });
        }
        // Every write would go to the end, wherever it is meant for.
        if !read_only && flags.contains(OFlags::APPEND) {
            return Err(BlkError::Access { access: "writing other than appending" });
        }

        let kind = file.metadata().map_err(BlkError::Examine)?.file_type();
        let is_block_device = kind.is_block_device();
        if !kind.is_file() && !is_block_device {
            return Err(BlkError::NotADisk);
        }
        // The metadata of a block device has no length.
        let len = (&file).seek(SeekFrom::End(0)).map_err(BlkError::Examine)?;
        let sectors = len.checked_div(u64::from(SECTOR_LEN)).unwrap_or(0);
        if sectors == 0 {
            return Err(BlkError::TooSmall { len });
        }
        Ok(Disk { file, is_block_device, sectors, read_only, serial: id })
    }

    /// Size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether every change is refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Does what `operation` says, with the data of `chain`. Blocks for the host's disk. Returns how
    /// many bytes at the front of the chain's writable part it wrote.
    ///
    /// # Errors
    /// See [`DiskError`]. Parts of the operation may have been done.
    pub fn execute(&self, operation: &Operation, chain: &Chain<'_>) -> Result<u32, DiskError> {
        let mut slices = Vec::new();
        match operation {
            Operation::Read { sector, len } => {
                let offset = self.offset(*sector, len / SECTOR_LEN)?;
                chain.writable().slices(0, *len, &mut slices)?;
                transfer(&self.file, &slices, offset, Direction::Read)
                    .map_err(host("read from the disk"))?;
                return Ok(*len);
            }
            Operation::Write { sector, len } => {
                self.check_writable()?;
                let offset = self.offset(*sector, len / SECTOR_LEN)?;
                chain.readable().slices(HEADER_LEN, *len, &mut slices)?;
                transfer(&self.file, &slices, offset, Direction::Write)
                    .map_err(host("write to the disk"))?;
            }
            // Nothing is ever dirty, whatever the descriptor allows.
            Operation::Flush if self.read_only => {}
            Operation::Flush => self.sync()?,
            Operation::GetId => {
                chain.writable().write_at(0, &self.serial)?;
                return Ok(ID_LEN);
            }
            Operation::Discard(ranges) => self.for_ranges(ranges, Disk::discard)?,
            Operation::WriteZeroes(ranges) => self.for_ranges(ranges, Disk::write_zeroes)?,
        }
        Ok(0)
    }

    /// Makes what was written survive a crash of the host.
    ///
    /// # Errors
    /// [`DiskError::Host`].
    pub fn sync(&self) -> Result<(), DiskError> {
        rustix::io::retry_on_intr(|| fdatasync(&self.file))
            .map_err(|errno| host("flush the disk")(errno.into()))
    }

    fn for_ranges(
        &self,
        ranges: &[Range],
        each: fn(&Disk, offset: u64, len: u64, &Range) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        self.check_writable()?;
        for range in ranges {
            let offset = self.offset(range.sector, range.sectors)?;
            let len = u64::from(range.sectors).saturating_mul(u64::from(SECTOR_LEN));
            if len > 0 {
                each(self, offset, len, range)
                    .map_err(unsupported_or("clear a part of the disk"))?;
            }
        }
        Ok(())
    }

    /// Gives the space back. What is read there afterwards is zeros or, on a block device, whatever
    /// the device makes of it.
    fn discard(&self, offset: u64, len: u64, _range: &Range) -> io::Result<()> {
        if self.is_block_device {
            let range = [offset, len];
            // SAFETY: BLKDISCARD reads two u64 from the pointer, which are there for the whole call,
            // and writes no memory of ours.
            let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            return if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        }
        self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, range: &Range) -> io::Result<()> {
        let how = if range.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        self.fallocate(how, offset, len)
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let flags = how | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| fallocate(&self.file, flags, offset, len))?;
        Ok(())
    }

    /// "A driver MUST NOT submit a request which would cause a read or write beyond capacity"
    /// (5.2.6.1). The position of `sector` in bytes, if `sectors` from it on are on the disk.
    fn offset(&self, sector: u64, sectors: u32) -> Result<u64, DiskError> {
        let end = sector.checked_add(u64::from(sectors));
        if end.is_none_or(|end| end > self.sectors) {
            return Err(DiskError::Refused(Failure::IoError));
        }
        sector.checked_mul(u64::from(SECTOR_LEN)).ok_or(DiskError::Refused(Failure::IoError))
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        // "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if the
        // VIRTIO_BLK_F_RO feature [is] offered, and MUST NOT write any data" (5.2.6.2).
        if self.read_only { Err(DiskError::Refused(Failure::IoError)) } else { Ok(()) }
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> DiskError {
    move |source| DiskError::Host { what, source }
}

/// As [`host`], but a host that cannot do it at all makes the request unsupported; Linux then stops
/// discarding, and writes zeros itself.
fn unsupported_or(what: &'static str) -> impl Fn(io::Error) -> DiskError {
    move |source| match Errno::from_io_error(&source) {
        Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY) => {
            DiskError::Refused(Failure::Unsupported)
        }
        _ => DiskError::Host { what, source },
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Moves all of `slices` from or to `file` at `offset`, straight between guest memory and the page
/// cache.
fn transfer(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
    direction: Direction,
) -> io::Result<()> {
    let mut iovecs: Vec<libc::iovec> = slices
        .iter()
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect();
    let mut rest = iovecs.as_mut_slice();
    let mut offset = offset;
    while !rest.is_empty() {
        let moved = match transfer_once(file, rest, offset, direction) {
            // The file became shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        offset = offset.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX));
        rest = advance(rest, moved);
    }
    Ok(())
}

/// One system call. `iovecs` must be built from live [`VolatileSlice`]s, or parts of them.
fn transfer_once(
    file: &File,
    iovecs: &[libc::iovec],
    offset: u64,
    direction: Direction,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(iovecs.len().min(MAX_IOVECS)).unwrap_or(libc::c_int::MAX);
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let fd = file.as_raw_fd();
    // SAFETY: each iovec is, or is the end of, a slice of guest memory, which `transfer`'s caller
    // borrows for the whole call. Guest memory is not Rust's: no reference to it exists, the guest
    // and the kernel may write to it at any time. `count` is at most the number of iovecs.
    let result = unsafe {
        match direction {
            Direction::Read => libc::preadv(fd, iovecs.as_ptr(), count, offset),
            Direction::Write => libc::pwritev(fd, iovecs.as_ptr(), count, offset),
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What is left of `iovecs` after their first `moved` bytes.
fn advance(iovecs: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let mut whole = 0_usize;
    for iovec in iovecs.iter() {
        let Some(left) = moved.checked_sub(iovec.iov_len) else { break };
        moved = left;
        whole = whole.saturating_add(1);
    }
    let rest = iovecs.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
        first.iov_len = first.iov_len.saturating_sub(moved);
    }
    rest
}

#[cfg(test)]
mod tests;

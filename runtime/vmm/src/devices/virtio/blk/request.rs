//! A block request as the driver laid it out (virtio 1.2, section 5.2.6).
//!
//! ```text
//!   readable                              writable
//!   ┌──────────────────┬────────────┐     ┌───────────┬────────┐
//!   │ type  -  sector  │ data (out) │     │ data (in) │ status │
//!   └──────────────────┴────────────┘     └───────────┴────────┘
//!     4     4    8 bytes                                1 byte
//! ```
//!
//! The driver may cut this into buffers as it likes (2.7.4), so everything goes by offsets and not
//! by descriptors. Parsing knows nothing of the disk and changes nothing.

use super::super::chain::{Chain, GuestFault};

/// Bytes of a sector, the unit of every position and length in the protocol (5.2.4).
pub const SECTOR_LEN: u32 = 512;

/// Bytes of the header in front of every request.
pub const HEADER_LEN: u32 = 16;

/// Bytes of a device's ID (`VIRTIO_BLK_ID_BYTES`).
pub const ID_LEN: u32 = 20;

/// Bytes of one range of a discard or write-zeroes request.
pub const RANGE_LEN: u32 = 16;

/// Most data in one read or write. What the configuration space allows stays below it.
pub const MAX_DATA_LEN: u32 = 64 * 1024 * 1024;

/// Most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;

/// Most sectors in one range (1 GiB).
pub const MAX_RANGE_SECTORS: u32 = 2 * 1024 * 1024;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const RANGE_FLAG_UNMAP: u32 = 1;

/// The status byte of a request that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// `VIRTIO_BLK_S_IOERR`: the request is wrong, or the host could not do it.
    IoError,
    /// `VIRTIO_BLK_S_UNSUPP`: there is no such request here.
    Unsupported,
}

impl Failure {
    /// The byte that the driver sees.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Failure::IoError => 1,
            Failure::Unsupported => 2,
        }
    }
}

/// `VIRTIO_BLK_S_OK`.
pub const STATUS_OK: u8 = 0;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Read `len` bytes from `sector` on into the writable part.
    Read {
        /// The first sector.
        sector: u64,
        /// How many bytes.
        len: u32,
    },
    /// Write the `len` bytes that follow the header to `sector` on.
    Write {
        /// The first sector.
        sector: u64,
        /// How many bytes.
        len: u32,
    },
    /// Make what was written survive a crash of the host.
    Flush,
    /// Say the disk's serial number.
    GetId,
    /// The contents of these ranges are not needed any more.
    Discard(Vec<Range>),
    /// These ranges are to read as zeros.
    WriteZeroes(Vec<Range>),
}

/// A range of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first sector.
    pub sector: u64,
    /// How many sectors.
    pub sectors: u32,
    /// Whether the space may be given back.
    pub unmap: bool,
}

/// A request, and where its status byte goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do, or the failure to answer with without doing anything.
    pub operation: Result<Operation, Failure>,
    /// Offset of the status byte in the writable part: its last byte.
    pub status_offset: u32,
}

impl Request {
    /// Parses the request that `chain` holds.
    ///
    /// # Errors
    /// [`GuestFault`] if there is no header, or no place for the status: such a request cannot be
    /// answered. One that can be answered with a failure is not an error.
    pub fn parse(chain: &Chain<'_>) -> Result<Request, GuestFault> {
        let readable = chain.readable();
        let status_offset = chain
            .writable()
            .len()
            .checked_sub(1)
            .ok_or(GuestFault::Request("a block request has no place for its status"))?;
        let header: [u8; HEADER_LEN as usize] = readable.read_obj(0)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let out_len = readable.len().saturating_sub(HEADER_LEN);
        let in_len = status_offset;
        let operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => data_len(in_len).map(|len| Operation::Read { sector, len }),
            T_OUT => data_len(out_len).map(|len| Operation::Write { sector, len }),
            T_FLUSH => Ok(Operation::Flush),
            // "The length of data MUST be 20 bytes" (5.2.6.1); more does no harm.
            T_GET_ID if in_len >= ID_LEN => Ok(Operation::GetId),
            T_GET_ID => Err(Failure::IoError),
            T_DISCARD => parse_ranges(chain, out_len)?.and_then(|ranges| {
                // "the device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard commands
                // if the unmap flag is set" (5.2.6.2).
                let unmap = ranges.iter().any(|range| range.unmap);
                if unmap { Err(Failure::Unsupported) } else { Ok(Operation::Discard(ranges)) }
            }),
            T_WRITE_ZEROES => parse_ranges(chain, out_len)?.map(Operation::WriteZeroes),
            // "VIRTIO_BLK_S_UNSUPP for a request unsupported by device" (5.2.6).
            _ => Err(Failure::Unsupported),
        };
        Ok(Request { operation, status_offset })
    }
}

/// "The length of data MUST be a multiple of 512 bytes" (5.2.6.1).
fn data_len(len: u32) -> Result<u32, Failure> {
    if len.is_multiple_of(SECTOR_LEN) && len <= MAX_DATA_LEN {
        Ok(len)
    } else {
        Err(Failure::IoError)
    }
}

/// The ranges that follow the header. "The length of data MUST be a multiple of the size of struct
/// virtio_blk_discard_write_zeroes", of which there "MUST NOT [be] more than max_discard_seg" or
/// max_write_zeroes_seg (5.2.6.1).
fn parse_ranges(chain: &Chain<'_>, len: u32) -> Result<Result<Vec<Range>, Failure>, GuestFault> {
    let count = len / RANGE_LEN;
    if !len.is_multiple_of(RANGE_LEN) || count == 0 || count > MAX_RANGES {
        return Ok(Err(Failure::IoError));
    }
    let mut ranges = Vec::new();
    for index in 0..count {
        let offset = index.saturating_mul(RANGE_LEN).saturating_add(HEADER_LEN);
        let bytes: [u8; RANGE_LEN as usize] = chain.readable().read_obj(offset)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase and
        // write zeroes commands if any unknown flag is set" (5.2.6.2).
        if flags & !RANGE_FLAG_UNMAP != 0 {
            return Ok(Err(Failure::Unsupported));
        }
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if sectors > MAX_RANGE_SECTORS {
            return Ok(Err(Failure::IoError));
        }
        let unmap = flags & RANGE_FLAG_UNMAP != 0;
        ranges.push(Range { sector: u64::from_le_bytes(sector), sectors, unmap });
    }
    Ok(Ok(ranges))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::testing::{Buffer, Driver, interrupt, memory};
    use super::*;

    /// Parses a request whose readable bytes are `readable`, cut at `cuts`, with `writable` bytes of
    /// room.
    fn parse_cut(readable: &[u8], cuts: &[usize], writable: u32) -> Result<Request, GuestFault> {
        let mut driver = Driver::new(&memory(), 0, 64);
        let mut queue = driver.virtqueue(&interrupt(), 0);
        let at = driver.place(readable);
        let mut buffers = Vec::new();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([readable.len()]) {
            let cut = cut.clamp(from, readable.len());
            buffers.push(Buffer::Out(at + from as u64, (cut - from) as u32));
            from = cut;
        }
        let room = driver.alloc(0x1000);
        buffers.push(Buffer::In(room, writable));
        driver.add(&buffers);
        let chain = queue.pop_or_arm().unwrap().unwrap();
        Request::parse(&chain)
    }

    fn parse(readable: &[u8], writable: u32) -> Request {
        parse_cut(readable, &[], writable).unwrap()
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn with(kind: u32, data: &[Vec<u8>]) -> Vec<u8> {
        [header(kind, 0), data.concat()].concat()
    }

    #[test]
    fn a_read_is_as_long_as_its_room_less_the_status() {
        assert_eq!(
            parse(&header(T_IN, 7), 1025),
            Request {
                operation: Ok(Operation::Read { sector: 7, len: 1024 }),
                status_offset: 1024
            }
        );
    }

    #[test]
    fn a_write_is_as_long_as_what_follows_the_header_however_it_is_cut() {
        let bytes = [header(T_OUT, u64::MAX), vec![1; 512]].concat();
        for cuts in [&[][..], &[16], &[1, 2, 3, 20], &[15, 17], &[16, 272]] {
            let request = parse_cut(&bytes, cuts, 1).unwrap();
            let write = Operation::Write { sector: u64::MAX, len: 512 };
            assert_eq!(request, Request { operation: Ok(write), status_offset: 0 });
        }
    }

    #[test]
    fn parts_of_sectors_are_refused() {
        assert_eq!(parse(&header(T_IN, 0), 512).operation, Err(Failure::IoError));
        let bytes = [header(T_OUT, 0), vec![1; 513]].concat();
        assert_eq!(parse(&bytes, 1).operation, Err(Failure::IoError));
    }

    #[test]
    fn flush_and_get_id() {
        assert_eq!(parse(&header(T_FLUSH, 0), 1).operation, Ok(Operation::Flush));
        assert_eq!(parse(&header(T_GET_ID, 0), 21).operation, Ok(Operation::GetId));
        assert_eq!(parse(&header(T_GET_ID, 0), 20).operation, Err(Failure::IoError));
    }

    #[test]
    fn unknown_types_are_unsupported() {
        for kind in [2, 3, 5, 10, 12, 14, 16, u32::MAX] {
            assert_eq!(parse(&header(kind, 0), 1).operation, Err(Failure::Unsupported), "{kind}");
        }
    }

    #[test]
    fn discard_ranges_are_taken_as_they_are() {
        let bytes = with(T_DISCARD, &[range(1, 2, 0), range(3, 4, 0)]);
        let expected = vec![
            Range { sector: 1, sectors: 2, unmap: false },
            Range { sector: 3, sectors: 4, unmap: false },
        ];
        assert_eq!(parse(&bytes, 1).operation, Ok(Operation::Discard(expected)));
    }

    #[test]
    fn write_zeroes_may_unmap_and_discard_may_not() {
        let bytes = with(T_WRITE_ZEROES, &[range(1, 2, 1)]);
        let expected = vec![Range { sector: 1, sectors: 2, unmap: true }];
        assert_eq!(parse(&bytes, 1).operation, Ok(Operation::WriteZeroes(expected)));
        let bytes = with(T_DISCARD, &[range(1, 2, 1)]);
        assert_eq!(parse(&bytes, 1).operation, Err(Failure::Unsupported));
    }

    #[test]
    fn ranges_that_break_the_rules_are_refused() {
        for (ranges, failure) in [
            (vec![], Failure::IoError),
            (vec![vec![0; 15]], Failure::IoError),
            (vec![range(0, 1, 0), vec![0]], Failure::IoError),
            (vec![range(0, 1, 0); MAX_RANGES as usize + 1], Failure::IoError),
            (vec![range(0, MAX_RANGE_SECTORS + 1, 0)], Failure::IoError),
            (vec![range(0, 1, 2)], Failure::Unsupported),
            (vec![range(0, 1, 1 << 31)], Failure::Unsupported),
        ] {
            for kind in [T_DISCARD, T_WRITE_ZEROES] {
                assert_eq!(parse(&with(kind, &ranges), 1).operation, Err(failure), "{ranges:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_answered_is_a_fault() {
        assert!(matches!(parse_cut(&header(T_FLUSH, 0), &[], 0), Err(GuestFault::Request(_))));
        assert!(matches!(
            parse_cut(&header(T_FLUSH, 0)[..15], &[], 1),
            Err(GuestFault::TooShort { have: 15, .. })
        ));
    }

    proptest! {
        /// Whatever is in the buffers and however they are cut: no panic, and what is accepted keeps
        /// to the limits.
        #[test]
        fn hostile_requests_are_parsed_within_limits(
            kind in prop_oneof![8 => 0..15_u32, 1 => any::<u32>()],
            rest in prop::collection::vec(any::<u8>(), 0..600),
            cuts in prop::collection::vec(0..600_usize, 0..6),
            writable in 0..3000_u32,
        ) {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend(&rest);
            let mut cuts = cuts;
            cuts.sort_unstable();
            match parse_cut(&bytes, &cuts, writable) {
                Err(_) => prop_assert!(writable == 0 || bytes.len() < HEADER_LEN as usize),
                Ok(request) => {
                    prop_assert_eq!(request.status_offset, writable - 1);
                    match request.operation {
                        Ok(Operation::Read { len, .. }) => {
                            prop_assert_eq!(len, writable - 1);
                            prop_assert_eq!(len % SECTOR_LEN, 0);
                        }
                        Ok(Operation::Write { len, .. }) => {
                            prop_assert_eq!(len as usize, bytes.len() - HEADER_LEN as usize);
                            prop_assert_eq!(len % SECTOR_LEN, 0);
                        }
                        Ok(Operation::Discard(ranges) | Operation::WriteZeroes(ranges)) => {
                            prop_assert!(ranges.len() <= MAX_RANGES as usize);
                            prop_assert!(ranges.iter().all(|r| r.sectors <= MAX_RANGE_SECTORS));
                        }
                        Ok(Operation::GetId) => prop_assert!(writable > ID_LEN),
                        Ok(Operation::Flush) | Err(_) => {}
                    }
                }
            }
        }
    }
}

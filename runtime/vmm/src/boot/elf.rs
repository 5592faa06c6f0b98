//! The ELF-64 headers of a kernel: where its segments lie. Pure but for reading the headers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most program headers; a kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Why a file is not a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// It cannot be read.
    #[error("cannot read the ELF {part}")]
    Read {
        /// Which part.
        part: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A field of a header is not what an x86-64 `vmlinux` has.
    #[error("ELF {field} is {value:#x}, expected {expected}")]
    Field {
        /// Its name in the ELF specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// The file ends before a segment does.
    #[error("the file is truncated: a segment ends at byte {end}, the file at {len}")]
    Truncated {
        /// End of the segment in the file.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// A segment's sizes contradict each other or overflow.
    #[error("segment at {address:#x} has {file_len} bytes in the file and {memory_len} in memory")]
    Segment {
        /// Its physical address.
        address: u64,
        /// Its length in the file.
        file_len: u64,
        /// Its length in memory.
        memory_len: u64,
    },
    /// A segment would overwrite the boot structures.
    #[error("a segment lies at {address:#x}, below 1 MiB")]
    LowSegment {
        /// Its physical address.
        address: u64,
    },
}

/// A part of the file that belongs into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes in the file.
    pub file_len: u64,
    /// Bytes in memory, at least `file_len`; the rest is zero.
    pub memory_len: u64,
}

/// A kernel's segments and its first instruction.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
}

/// Reads and checks the headers.
pub(super) fn read(file: &File) -> Result<Image, ElfError> {
    let stat = |source| ElfError::Read { part: "file's length", source };
    let file_len = file.metadata().map_err(stat)?.len();
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0)
        .map_err(|source| ElfError::Read { part: "header", source })?;
    let (entry, table, count) = parse_header(&header)?;
    let mut programs = vec![0; usize::from(count).saturating_mul(PROGRAM_HEADER_LEN)];
    file.read_exact_at(&mut programs, table)
        .map_err(|source| ElfError::Read { part: "program headers", source })?;
    let mut segments = Vec::new();
    for program in programs.chunks_exact(PROGRAM_HEADER_LEN) {
        segments.extend(parse_program(program, file_len)?);
    }
    let starts_inside =
        segments.iter().any(|s| (s.address..s.address.saturating_add(s.file_len)).contains(&entry));
    if !starts_inside {
        let expected = "an address in a loaded segment";
        return Err(ElfError::Field { field: "e_entry", value: entry, expected });
    }
    Ok(Image { entry, segments })
}

/// Entry, offset and number of the program headers (System V ABI, "ELF Header").
fn parse_header(header: &[u8; HEADER_LEN]) -> Result<(u64, u64, u16), ElfError> {
    let check = |field, value: u64, ok: bool, expected| {
        if ok { Ok(()) } else { Err(ElfError::Field { field, value, expected }) }
    };
    let magic = le(header, 0, 4);
    check("magic", magic, header.starts_with(MAGIC), "7f 45 4c 46: an uncompressed vmlinux")?;
    let class = le(header, 4, 1);
    check("class", class, class == u64::from(CLASS_64), "2 (64-bit)")?;
    let data = le(header, 5, 1);
    check("data", data, data == u64::from(LITTLE_ENDIAN), "1 (little-endian)")?;
    let machine = le(header, 18, 2);
    check("e_machine", machine, machine == u64::from(MACHINE_X86_64), "62 (x86-64)")?;
    let entry_len = le(header, 54, 2);
    check("e_phentsize", entry_len, entry_len == PROGRAM_HEADER_LEN as u64, "56")?;
    let count = le(header, 56, 2);
    let few = (1..=u64::from(MAX_PROGRAM_HEADERS)).contains(&count);
    check("e_phnum", count, few, "1 to 64")?;
    Ok((le(header, 24, 8), le(header, 32, 8), u16::try_from(count).unwrap_or_default()))
}

/// A segment, if the program header is of one (System V ABI, "Program Header").
fn parse_program(program: &[u8], file_len_total: u64) -> Result<Option<Segment>, ElfError> {
    if le(program, 0, 4) != u64::from(PT_LOAD) {
        return Ok(None);
    }
    let segment = Segment {
        offset: le(program, 8, 8),
        address: le(program, 24, 8),
        file_len: le(program, 32, 8),
        memory_len: le(program, 40, 8),
    };
    let Segment { offset, address, file_len, memory_len } = segment;
    let in_file = offset.checked_add(file_len);
    let in_memory = address.checked_add(memory_len);
    let (Some(end), Some(_)) = (in_file, in_memory) else {
        return Err(ElfError::Segment { address, file_len, memory_len });
    };
    if file_len > memory_len {
        return Err(ElfError::Segment { address, file_len, memory_len });
    }
    if end > file_len_total {
        return Err(ElfError::Truncated { end, len: file_len_total });
    }
    Ok((memory_len > 0).then_some(segment))
}

/// The little-endian number of `len` (at most 8) bytes at `at`; what lies behind the end is zero.
fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..).unwrap_or_default();
    field.iter().take(len.min(8)).rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    pub(in crate::boot) fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// Makes ELF files: (address, offset, bytes, length in memory).
    #[derive(Default)]
    pub(in crate::boot) struct Builder {
        entry: Option<u64>,
        segments: Vec<(u64, u64, Vec<u8>, u64)>,
    }

    impl Builder {
        pub(in crate::boot) fn entry(mut self, entry: u64) -> Self {
            self.entry = Some(entry);
            self
        }

        pub(in crate::boot) fn segment(
            mut self,
            address: u64,
            offset: u64,
            bytes: &[u8],
            memory_len: u64,
        ) -> Self {
            let mut content = bytes.to_vec();
            content.resize(content.len().max(64.min(memory_len as usize)), 0);
            self.segments.push((address, offset, content, memory_len));
            self
        }

        pub(in crate::boot) fn bytes(&self) -> Vec<u8> {
            let entry = self.entry.unwrap_or(self.segments[0].0);
            let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
            out.resize(64, 0);
            out[18..20].copy_from_slice(&62_u16.to_le_bytes());
            out[24..32].copy_from_slice(&entry.to_le_bytes());
            out[32..40].copy_from_slice(&64_u64.to_le_bytes());
            out[54..56].copy_from_slice(&56_u16.to_le_bytes());
            out[56..58].copy_from_slice(&(self.segments.len() as u16).to_le_bytes());
            for (address, offset, bytes, memory_len) in &self.segments {
                let mut program = vec![0; 56];
                program[0..4].copy_from_slice(&1_u32.to_le_bytes());
                for (at, value) in
                    [(8, *offset), (24, *address), (32, bytes.len() as u64), (40, *memory_len)]
                {
                    program[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                out.extend(program);
            }
            for (_, offset, bytes, _) in &self.segments {
                let end = *offset as usize + bytes.len();
                out.resize(out.len().max(end), 0);
                out[*offset as usize..end].copy_from_slice(bytes);
            }
            out
        }

        pub(in crate::boot) fn file(&self) -> File {
            file(&self.bytes())
        }
    }

    #[test]
    fn a_truncated_kernel_says_so() {
        let mut bytes = Builder::default().segment(0x100_0000, 0x1000, &[1; 100], 100).bytes();
        assert!(read(&file(&bytes)).is_ok());
        bytes.truncate(0x1000 + 50);
        assert!(matches!(
            read(&file(&bytes)),
            Err(ElfError::Truncated { end: 0x1064, len: 0x1032 })
        ));
        bytes.truncate(10);
        assert!(matches!(read(&file(&bytes)), Err(ElfError::Read { part: "header", .. })));
    }

    #[test]
    fn what_is_not_a_vmlinux_is_refused_by_field() {
        let good = Builder::default().segment(0x100_0000, 0x1000, &[1; 100], 100).bytes();
        for (at, field) in
            [(0, "magic"), (4, "class"), (5, "data"), (18, "e_machine"), (54, "e_phentsize")]
        {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            match read(&file(&bad)) {
                Err(ElfError::Field { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        let outside = Builder::default().entry(1).segment(0x100_0000, 0x1000, &[1], 100).file();
        assert!(matches!(read(&outside), Err(ElfError::Field { field: "e_entry", .. })));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(flips in proptest::collection::vec((0_usize..176, any::<u8>()), 0..40)) {
            let mut bytes = Builder::default()
                .segment(0x100_0000, 0x1000, &[1; 100], 200)
                .segment(0x200_0000, 0x2000, &[2; 100], 200)
                .bytes();
            for (at, value) in flips {
                bytes[at] = value;
            }
            if let Ok(image) = read(&file(&bytes)) {
                for segment in image.segments {
                    prop_assert!(segment.file_len <= segment.memory_len);
                    prop_assert!(segment.offset + segment.file_len <= bytes.len() as u64);
                }
            }
        }
    }
}

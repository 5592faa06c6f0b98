//! Kernels of a few instructions, for tests of the VMM alone.

use std::fs::File;
use std::io::{self, Write};

/// Where such a kernel is loaded and entered: 16 MiB, as Linux.
pub const ADDRESS: u64 = 0x100_0000;
const OFFSET: usize = 0x1000;
const HEADER_LEN: u16 = 64;
const PROGRAM_HEADER_LEN: u16 = 56;
const EXECUTABLE: u16 = 2;
const X86_64: u16 = 62;
const LOAD: u32 = 1;

/// An ELF kernel that executes `code` (64-bit, paging on, interrupts off, one CPU).
///
/// # Errors
/// No temporary file can be made.
pub fn of(code: &[u8]) -> io::Result<File> {
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    elf.resize(16, 0);
    for half in [EXECUTABLE, X86_64] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [ADDRESS, u64::from(HEADER_LEN), 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [HEADER_LEN, PROGRAM_HEADER_LEN, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [LOAD, 7] {
        elf.extend(word.to_le_bytes());
    }
    let len = code.len() as u64;
    for word in [OFFSET as u64, ADDRESS, ADDRESS, len, len, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.resize(OFFSET, 0);
    elf.extend(code);
    let mut file = tempfile::tempfile()?;
    file.write_all(&elf)?;
    Ok(file)
}

/// `mov dx, port; mov al, value; out dx, al`
#[must_use]
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `hlt` for ever: the guest does nothing more.
pub const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

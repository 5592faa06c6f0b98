//! What the boot CPU finds in memory: `boot_params`, command line, page tables, descriptor table.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;
use crate::GuestMemory;

/// A boot structure does not fit into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum BootParamsError {
    /// Guest memory ends before the structure does.
    #[error("cannot write {what} at guest address {address:#x}")]
    Write {
        /// The structure.
        what: &'static str,
        /// Where it was to be.
        address: u64,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The command line is longer than the kernel takes, or holds a NUL.
    #[error(
        "kernel command line of {len} bytes; at most {max} without NUL are accepted",
        max = layout::CMDLINE_CAPACITY - 1
    )]
    Cmdline {
        /// Its length.
        len: usize,
    },
}

/// Where the initramfs lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    /// Its first byte, page-aligned, below 4 GiB.
    pub address: u32,
    /// Its length in bytes.
    pub len: u32,
}

/// `struct boot_params` that is safe to copy into the guest.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: boot_params is a packed C struct of integers and arrays of them; every bit pattern is
// valid and it has no padding.
unsafe impl ByteValued for ZeroPage {}

/// boot.rst: `boot_flag` of every kernel image.
const BOOT_FLAG: u16 = 0xaa55;
/// boot.rst: magic "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// boot.rst: `type_of_loader` without an assigned ID.
const LOADER_UNDEFINED: u8 = 0xff;
/// e820: usable memory.
const E820_RAM: u32 = 1;
/// e820: not to be touched.
const E820_RESERVED: u32 = 2;

/// Writes the zero page and the command line.
///
/// # Errors
/// The command line is too long, or guest memory too small.
pub fn write_boot_params(
    memory: &GuestMemory,
    cmdline: &str,
    initramfs: Option<Initramfs>,
) -> Result<(), BootParamsError> {
    if cmdline.len() >= layout::CMDLINE_CAPACITY || cmdline.contains('\0') {
        return Err(BootParamsError::Cmdline { len: cmdline.len() });
    }
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    write(memory, "the command line", layout::CMDLINE, &text)?;

    let mut page = ZeroPage::default();
    let hdr = &mut page.0.hdr;
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.boot_flag = BOOT_FLAG;
    hdr.header = HEADER_MAGIC;
    // Both constants fit: the layout lies below 1 MiB.
    hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE.0).unwrap_or_default();
    hdr.cmdline_size = u32::try_from(text.len()).unwrap_or_default();
    if let Some(initramfs) = initramfs {
        hdr.ramdisk_image = initramfs.address;
        hdr.ramdisk_size = initramfs.len;
    }
    let map = memory_map(memory);
    for (slot, entry) in page.0.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    page.0.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    write(memory, "boot_params", layout::ZERO_PAGE, page.as_slice())
}

/// The memory map: conventional memory, the MP table, and each region from 1 MiB up.
fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let mut map = vec![
        boot_e820_entry { addr: 0, size: layout::LOW_MEMORY_END, r#type: E820_RAM },
        boot_e820_entry {
            addr: layout::MP_TABLE.0,
            size: layout::MP_TABLE_CAPACITY,
            r#type: E820_RESERVED,
        },
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY.0);
        let end = region.start_addr().0.saturating_add(region.len());
        if end > start {
            let size = end.saturating_sub(start);
            map.push(boot_e820_entry { addr: start, size, r#type: E820_RAM });
        }
    }
    map
}

/// Descriptor table entries: null, null, 64-bit code, data, TSS. The selectors 0x10 and 0x18 are
/// what boot.rst demands (`__BOOT_CS`, `__BOOT_DS`).
pub(super) const GDT_ENTRIES: [u64; 5] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Present, writable (Intel SDM 3A, 4.5).
const PAGE_TABLE: u64 = 0x3;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0x83;
const LARGE_PAGE_SHIFT: u32 = 21;
const ENTRIES: u64 = 512;

/// Writes descriptor table and page tables of the boot CPU.
///
/// # Errors
/// Guest memory is too small.
pub fn write_cpu_tables(memory: &GuestMemory) -> Result<(), BootParamsError> {
    let bytes = |entries: &[u64]| entries.iter().flat_map(|e| e.to_le_bytes()).collect::<Vec<u8>>();
    write(memory, "the GDT", layout::GDT, &bytes(&GDT_ENTRIES))?;
    write(memory, "the IDT", layout::IDT, &bytes(&[0]))?;
    write(memory, "the PML4", layout::PML4, &bytes(&[layout::PDPT.0 | PAGE_TABLE]))?;
    write(memory, "the PDPT", layout::PDPT, &bytes(&[layout::PAGE_DIRECTORY.0 | PAGE_TABLE]))?;
    let large_pages: Vec<u64> =
        (0..ENTRIES).map(|i| (i << LARGE_PAGE_SHIFT) | LARGE_PAGE).collect();
    write(memory, "the page directory", layout::PAGE_DIRECTORY, &bytes(&large_pages))
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    address: GuestAddress,
    bytes: &[u8],
) -> Result<(), BootParamsError> {
    memory.write_slice(bytes, address).map_err(|source| BootParamsError::Write {
        what,
        address: address.0,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
        let ranges: Vec<_> = ranges.iter().map(|(a, l)| (GuestAddress(*a), *l)).collect();
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn boot_params_say_where_everything_lies() {
        let memory = memory(&[(0, 64 << 20), (1 << 32, 16 << 20)]);
        let initramfs = Initramfs { address: 0x300_0000, len: 12345 };
        write_boot_params(&memory, "console=hvc0", Some(initramfs)).unwrap();
        let page: ZeroPage = memory.read_obj(layout::ZERO_PAGE).unwrap();
        let hdr = page.0.hdr;
        assert_eq!({ hdr.boot_flag }, 0xaa55);
        assert_eq!(&{ hdr.header }.to_le_bytes(), b"HdrS");
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x300_0000, 12345));
        let mut text = [0; 13];
        memory.read_slice(&mut text, GuestAddress(hdr.cmd_line_ptr.into())).unwrap();
        assert_eq!(&text, b"console=hvc0\0");
        let map: Vec<(u64, u64, u32)> = page.0.e820_table[..usize::from(page.0.e820_entries)]
            .iter()
            .map(|e| (e.addr, e.size, e.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0xf_0000, 0x1_0000, 2),
                (0x10_0000, (64 << 20) - 0x10_0000, 1),
                (1 << 32, 16 << 20, 1),
            ]
        );
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = memory(&[(0, 2 << 20)]);
        let long = "x".repeat(layout::CMDLINE_CAPACITY);
        assert!(matches!(
            write_boot_params(&memory, &long, None),
            Err(BootParamsError::Cmdline { len: 2048 })
        ));
        assert!(write_boot_params(&memory, &long[1..], None).is_ok());
        assert!(write_boot_params(&memory, "a\0b", None).is_err());
    }

    #[test]
    fn page_tables_map_the_first_gib_onto_itself() {
        let memory = memory(&[(0, 2 << 20)]);
        write_cpu_tables(&memory).unwrap();
        for address in [0_u64, 0x20_0000, 0x1234_5678, 0x3fff_ffff] {
            let entry = |table: u64, index: u64| -> u64 {
                memory.read_obj(GuestAddress((table & !0xfff) + index * 8)).unwrap()
            };
            let pdpt = entry(layout::PML4.0, address >> 39);
            let directory = entry(pdpt, (address >> 30) & 511);
            let page = entry(directory, (address >> 21) & 511);
            assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
            assert_eq!(page & 0xff, LARGE_PAGE);
        }
    }
}

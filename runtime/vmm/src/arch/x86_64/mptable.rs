//! The MP table: how the kernel finds CPUs and the IO-APIC without ACPI.
//!
//! MultiProcessor Specification 1.4: floating pointer (4.1), configuration table (4.2), entries
//! (4.3). Written as bytes, little-endian, in the specification's order.

use vm_memory::Bytes;

use super::layout;
use crate::GuestMemory;

const SPEC_REVISION: u8 = 4;
/// Versions of the integrated APICs, which are KVM's, and of the IO-APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const IO_APIC_ENABLED: u8 = 1;

/// Interrupt types (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;

const FLOATING_POINTER_LEN: u64 = 16;
const HEADER_LEN: usize = 44;
/// "All local APICs" as a destination.
const ALL_APICS: u8 = 0xff;

/// The MP table does not fit into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// APIC IDs are bytes, and the last two are taken.
    #[error("{vcpus} vCPUs; an MP table describes at most {max}", max = husk_vmm_api::MAX_VCPUS)]
    TooManyVcpus {
        /// What was asked for.
        vcpus: u32,
    },
    /// Guest memory ends before the table does.
    #[error("cannot write the MP table at guest address {:#x}", layout::MP_TABLE.0)]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes the table for so many CPUs (APIC IDs from 0) and one IO-APIC with so many inputs.
///
/// # Errors
/// Too many CPUs, or guest memory is too small.
pub fn write_mp_table(memory: &GuestMemory, vcpus: u32, inputs: u8) -> Result<(), MpTableError> {
    let cpus = u8::try_from(vcpus)
        .ok()
        .filter(|n| (1..=husk_vmm_api::MAX_VCPUS).contains(&u32::from(*n)))
        .ok_or(MpTableError::TooManyVcpus { vcpus })?;
    let mut bytes = floating_pointer();
    bytes.extend(configuration_table(cpus, inputs));
    memory.write_slice(&bytes, layout::MP_TABLE).map_err(MpTableError::Write)
}

fn floating_pointer() -> Vec<u8> {
    let table = u32::try_from(layout::MP_TABLE.0.saturating_add(FLOATING_POINTER_LEN));
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.unwrap_or_default().to_le_bytes());
    // Length in paragraphs of 16 bytes, revision, checksum, five feature bytes (0: a table exists).
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn configuration_table(cpus: u8, inputs: u8) -> Vec<u8> {
    let io_apic_id = cpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count = count.saturating_add(1);
    };
    for cpu in 0..cpus {
        let flags = CPU_ENABLED | if cpu == 0 { CPU_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, cpu, LOCAL_APIC_VERSION, flags];
        // Signature and feature flags: the kernel asks CPUID. Two reserved words.
        entry.extend([0; 16]);
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut entry = vec![ENTRY_IO_APIC, io_apic_id, IO_APIC_VERSION, IO_APIC_ENABLED];
    entry.extend(layout::IO_APIC.to_le_bytes());
    push(&entry);
    // Every line goes straight to the input of the same number; flags 0: as the bus defines (edge,
    // active high).
    for line in 0..inputs {
        push(&[ENTRY_IO_INTERRUPT, INT, 0, 0, 0, line, io_apic_id, line]);
    }
    // There is no 8259 whose interrupts would come in at input 0 of the local APICs.
    push(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let len = u16::try_from(HEADER_LEN.saturating_add(entries.len())).unwrap_or(u16::MAX);
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"HUSK    ");
    bytes.extend(b"MICROVM     ");
    bytes.extend([0; 6]); // no OEM table
    bytes.extend(count.to_le_bytes());
    bytes.extend(layout::LOCAL_APIC.to_le_bytes());
    bytes.extend([0; 4]); // no extended table
    bytes.extend(entries);
    set_checksum(&mut bytes, 7);
    bytes
}

/// Makes the sum of all bytes zero modulo 256 (4.1, 4.2).
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |s: u8, b| s.wrapping_add(*b))
    }

    #[test]
    fn checksums_and_lengths_hold_for_every_number_of_cpus() {
        assert_eq!(sum(&floating_pointer()), 0);
        assert_eq!(floating_pointer().len() as u64, FLOATING_POINTER_LEN);
        for cpus in 1..=64 {
            let table = configuration_table(cpus, 120);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert!((table.len() as u64) + FLOATING_POINTER_LEN <= layout::MP_TABLE_CAPACITY);
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(count, u16::from(cpus) + 1 + 1 + 120 + 1);
        }
    }

    #[test]
    fn entries_have_the_lengths_of_the_specification() {
        let table = configuration_table(3, 9);
        let (mut at, mut cpus) = (HEADER_LEN, Vec::new());
        while at < table.len() {
            match table[at] {
                0 => {
                    cpus.push((table[at + 1], table[at + 3]));
                    at += 20;
                }
                1..=4 => at += 8,
                other => panic!("entry type {other}"),
            }
        }
        assert_eq!(at, table.len());
        assert_eq!(cpus, [(0, 3), (1, 1), (2, 1)]);
    }

    #[test]
    fn too_many_cpus_are_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert!(write_mp_table(&memory, 64, 5).is_ok());
        for vcpus in [0, 65, 300] {
            assert!(matches!(
                write_mp_table(&memory, vcpus, 5),
                Err(MpTableError::TooManyVcpus { .. })
            ));
        }
    }
}

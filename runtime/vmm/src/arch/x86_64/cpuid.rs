//! CPUID: what KVM supports, with the VM's own identity and topology.
//!
//! The topology is flat: one package, one core per vCPU, one thread per core. Saying so in every
//! leaf where a kernel looks keeps it from assuming a package per CPU, which slows the start of
//! many CPUs.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: the local APIC timer has a TSC-deadline mode. KVM always emulates it, but does not
/// report it as supported.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the count of logical processors in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX (AMD): legacy multi-core mode, and topology extensions.
const CMP_LEGACY: u32 = 1 << 1;

/// Levels of leaf 0xb (Intel SDM 2A, CPUID).
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Fits what KVM supports to vCPU `id` of `vcpus`.
pub fn specialise(cpuid: &mut CpuId, id: u32, vcpus: u32) {
    let core_bits = bits_for(vcpus);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                // EBX: initial APIC ID 31..24, logical processors 23..16.
                let count = vcpus.min(0xff);
                entry.ebx = (entry.ebx & 0xffff) | (count << 16) | ((id & 0xff) << 24);
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                if vcpus > 1 {
                    entry.edx |= HTT;
                } else {
                    entry.edx &= !HTT;
                }
            }
            // Intel's cache leaf. EAX: cores per package 31..26, threads that share the cache 25..14.
            0x4 => {
                let sharing = if cache_level(entry) >= 3 { vcpus.saturating_sub(1) } else { 0 };
                entry.eax &= 0x3fff;
                entry.eax |= (vcpus.saturating_sub(1).min(0x3f) << 26) | (sharing.min(0xfff) << 14);
            }
            0xb | 0x1f => topology_level(entry, id, vcpus, core_bits),
            0x8000_0001 => {
                if vcpus > 1 {
                    entry.ecx |= CMP_LEGACY;
                } else {
                    entry.ecx &= !CMP_LEGACY;
                }
            }
            // AMD. ECX: cores less one 7..0, bits of the APIC ID that number them 15..12.
            0x8000_0008 => {
                entry.ecx &= !0xf0ff;
                entry.ecx |= (vcpus.saturating_sub(1) & 0xff) | ((core_bits & 0xf) << 12);
            }
            // AMD's cache leaf; as leaf 4.
            0x8000_001d => {
                let sharing = if cache_level(entry) >= 3 { vcpus.saturating_sub(1) } else { 0 };
                entry.eax &= !(0xfff << 14);
                entry.eax |= sharing.min(0xfff) << 14;
            }
            // AMD. EAX: extended APIC ID; EBX: core 7..0, threads per core less one 15..8; ECX: node.
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

/// EAX of a cache leaf: level 7..5.
fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    (entry.eax >> 5) & 0x7
}

fn topology_level(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32, core_bits: u32) {
    let (shift, count, level) = match entry.index {
        0 => (0, 1, LEVEL_THREAD),
        1 => (core_bits, vcpus, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = (entry.index & 0xff) | level;
    entry.edx = id;
}

/// How many bits number `count` things.
fn bits_for(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn specialised(entries: &[kvm_cpuid_entry2], id: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
        let mut cpuid = CpuId::from_entries(entries).unwrap();
        specialise(&mut cpuid, id, vcpus);
        cpuid.as_slice().to_vec()
    }

    #[test]
    fn every_leaf_tells_the_same_apic_id() {
        let entries = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_001e, 0)];
        let got = specialised(&entries, 37, 64);
        assert_eq!(got[0].ebx >> 24, 37);
        assert_eq!((got[1].edx, got[2].edx, got[3].eax), (37, 37, 37));
    }

    #[test]
    fn one_package_holds_all_cores() {
        let got =
            specialised(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_0008, 0)], 0, 6);
        assert_eq!((got[0].ebx >> 16) & 0xff, 6);
        assert_eq!((got[1].eax, got[1].ebx), (0, 1));
        assert_eq!((got[2].eax, got[2].ebx), (3, 6));
        assert_eq!((got[3].ecx & 0xff, (got[3].ecx >> 12) & 0xf), (5, 3));
    }

    #[test]
    fn the_deadline_timer_and_the_hypervisor_are_announced() {
        let got = specialised(&[leaf(1, 0)], 0, 1);
        assert_eq!(got[0].ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!(got[0].edx & HTT, 0);
    }
}

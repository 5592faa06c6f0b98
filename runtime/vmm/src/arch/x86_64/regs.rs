//! Registers of the boot CPU at the kernel's 64-bit entry (boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::boot_params::GDT_ENTRIES;
use super::layout;

/// KVM refused a vCPU's initial state.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// An ioctl failed.
    #[error("cannot {what} of the boot CPU")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took only some of the model-specific registers.
    #[error("KVM refused model-specific register {index:#x}")]
    Msr {
        /// The first that it refused.
        index: u32,
    },
}

/// CR0: protection, extension type (always set), paging.
const CR0: u64 = (1 << 0) | (1 << 4) | (1 << 31);
/// CR4: physical address extension.
const CR4: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER: u64 = (1 << 8) | (1 << 10);
/// RFLAGS: bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 2;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on; write-back where none says otherwise.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Sets general, segment, control and model-specific registers for the entry at `entry`.
///
/// # Errors
/// KVM refuses a value.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), RegsError> {
    let failed = |what| move |source| RegsError::Kvm { what, source };

    let mut sregs = vcpu.get_sregs().map_err(failed("read the segment registers"))?;
    let data = segment(DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = segment(CODE);
    sregs.tr = segment(TSS);
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit =
        u16::try_from(size_of_val(&GDT_ENTRIES)).unwrap_or_default().saturating_sub(1);
    sregs.idt.base = layout::IDT.0;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0;
    sregs.cr3 = layout::PML4.0;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs).map_err(failed("set the segment registers"))?;

    let regs = kvm_regs {
        rip: entry,
        rsp: layout::BOOT_STACK.0,
        rsi: layout::ZERO_PAGE.0,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("set the general registers"))?;
    set_msrs(vcpu)
}

/// Model-specific registers whose reset value is not what a kernel expects of firmware.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let entries = [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let first = RegsError::Msr { index: IA32_MISC_ENABLE };
    let Ok(msrs) = Msrs::from_entries(&entries) else { return Err(first) };
    let what = "set the model-specific registers";
    let taken = vcpu.set_msrs(&msrs).map_err(|source| RegsError::Kvm { what, source })?;
    match entries.get(taken) {
        None => Ok(()),
        Some(refused) => Err(RegsError::Msr { index: refused.index }),
    }
}

/// The segment that a selector of our GDT stands for (Intel SDM 3A, 3.4.5).
fn segment(selector: u16) -> kvm_segment {
    let entry = GDT_ENTRIES.get(usize::from(selector >> 3)).copied().unwrap_or_default();
    let bit = |at: u32| u8::from((entry >> at) & 1 == 1);
    kvm_segment {
        base: 0,
        limit: if bit(55) == 1 { u32::MAX } else { 0xffff },
        selector,
        type_: low_byte(entry >> 40) & 0xf,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        avl: 0,
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes().first().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_boot_protocol_demands() {
        let code = segment(CODE);
        assert_eq!((code.type_, code.s, code.l, code.db, code.present), (0xb, 1, 1, 0, 1));
        let data = segment(DATA);
        assert_eq!((data.type_, data.s, data.l, data.db, data.present), (0x3, 1, 0, 1, 1));
        // A 64-bit busy TSS: KVM refuses long mode without one.
        let tss = segment(TSS);
        assert_eq!((tss.type_, tss.s, tss.present), (0xb, 0, 1));
    }
}

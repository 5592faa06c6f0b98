//! Whether this machine's KVM runs a guest.
//!
//! That `/dev/kvm` opens, or even that it creates virtual machines and runs real-mode code, proves
//! nothing: a KVM that emulates every instruction, or that runs its guests' kernels deprivileged
//! (PVM), does all of it and yet cannot run an unmodified kernel. So a few instructions are run where a kernel
//! runs: in long mode, at ring 0, in the upper half of the address space.

use std::io;
use std::ptr::NonNull;

use kvm_bindings::{kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What the guest writes to the port if it runs natively at ring 0.
const EXPECTED: u8 = b'h';
/// A population count, which processors have and KVM's instruction emulator has not, and the
/// privilege level that the processor really runs at:
/// ```text
///   mov eax, cs
///   and eax, 3              ; 0 for a kernel
///   shl eax, 4
///   mov ecx, 0x1234
///   popcnt ecx, ecx         ; 5
///   lea eax, [rax+rcx+'c']  ; 'h'
///   out 0xe9, al
///   hlt
/// ```
const CODE: [u8; 24] = [
    0x8c, 0xc8, 0x83, 0xe0, 0x03, 0xc1, 0xe0, 0x04, 0xb9, 0x34, 0x12, 0x00, 0x00, 0xf3, 0x0f, 0xb8,
    0xc9, 0x8d, 0x44, 0x08, b'c', 0xe6, 0xe9, 0xf4,
];
const PORT: u16 = 0xe9;

/// Guest-physical layout: a page each for three levels of page tables, and the code.
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PAGE_DIRECTORY: usize = 0x3000;
const CODE_AT: usize = 0x4000;
const MEMORY: usize = 0x5000;
/// Where the first 2 MiB of guest-physical memory appear: where Linux has its kernel mapping.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;
/// Indices of `KERNEL_BASE` in the upper two levels (Intel SDM vol. 3, 4.5).
const PML4_INDEX: usize = 511;
const PDPT_INDEX: usize = 510;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// What the probe found, worded for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable(pub(crate) String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Memory shared with the guest; unmapped on drop.
struct Memory(NonNull<u8>);

impl Memory {
    fn new() -> io::Result<Self> {
        // SAFETY: a new private mapping at an address that the kernel chooses touches no existing
        // memory.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                MEMORY,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("mmap returned address zero"))
    }

    /// Fills the memory; called before there is a guest.
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        // SAFETY: the mapping is `MEMORY` bytes long and readable and writable; no guest has it
        // yet, and `&mut self` excludes other references.
        let all = unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), MEMORY) };
        all[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn write_entry(&mut self, table: usize, index: usize, entry: u64) {
        self.write(table + index * 8, &entry.to_le_bytes());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length and not used afterwards: in `probe` the memory
        // is declared before the virtual machine, so that it is dropped after it.
        if let Err(error) = unsafe { munmap(self.0.as_ptr().cast(), MEMORY) } {
            eprintln!("husk-testhost: unmapping the probe's memory: {error}");
        }
    }
}

/// Runs a few instructions in a guest, as its kernel.
///
/// # Errors
/// Which step failed, or what the guest did instead of writing to the port at ring 0.
pub(crate) fn probe() -> Result<(), Unusable> {
    let failed = |step: &str, error: &dyn std::fmt::Display| Unusable(format!("{step}: {error}"));
    let mut memory = Memory::new().map_err(|error| failed("mmap", &error))?;
    memory.write_entry(PML4, PML4_INDEX, PDPT as u64 | PRESENT_WRITABLE);
    memory.write_entry(PDPT, PDPT_INDEX, PAGE_DIRECTORY as u64 | PRESENT_WRITABLE);
    memory.write_entry(PAGE_DIRECTORY, 0, LARGE_PAGE | PRESENT_WRITABLE);
    memory.write(CODE_AT, &CODE);

    let kvm = Kvm::new().map_err(|error| failed("opening /dev/kvm", &error))?;
    let vm = kvm.create_vm().map_err(|error| failed("KVM_CREATE_VM", &error))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0.as_ptr() as u64,
    };
    // SAFETY: the memory stays mapped until after `vm` is dropped, and this is its only region.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| failed("KVM_SET_USER_MEMORY_REGION", &error))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|error| failed("KVM_CREATE_VCPU", &error))?;

    let mut sregs = vcpu.get_sregs().map_err(|error| failed("KVM_GET_SREGS", &error))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(|error| failed("KVM_SET_SREGS", &error))?;
    let mut regs = vcpu.get_regs().map_err(|error| failed("KVM_GET_REGS", &error))?;
    regs.rip = KERNEL_BASE + CODE_AT as u64;
    // Bit 1 of the flags is always set (Intel SDM vol. 1, 3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(|error| failed("KVM_SET_REGS", &error))?;

    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [EXPECTED])) => Ok(()),
        Ok(exit) => Err(Unusable(format!("the guest's first exit was {exit:?}"))),
        Err(error) => Err(failed("KVM_RUN", &error)),
    }
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x18,
        // Read, write, accessed (Intel SDM vol. 3, 3.4.5.1).
        type_: 0b0011,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..kvm_segment::default()
    };
    // Execute, read, accessed; 64-bit.
    sregs.cs = kvm_segment { selector: 0x10, type_: 0b1011, l: 1, db: 0, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME_LMA;
}

/// Whether a guest of this KVM can itself have a KVM.
pub(crate) fn nested() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y" | "y"))
    })
}

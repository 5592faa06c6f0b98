//! Does a KVM really run guests? Proven by running a few instructions in one.
//!
//! What it is for: `husk check` (by way of `husk-vmm --probe-kvm`) and the test host, which is built
//! before anything else and must not pull in the whole monitor. What it is not for: anything but
//! that question.
//!
//! That `/dev/kvm` opens, or even that it creates virtual machines and runs real-mode code, proves
//! nothing: a KVM that emulates every instruction, or that runs its guests' kernels deprivileged
//! (PVM), does all of it and yet cannot run an unmodified kernel. So the instructions are run where
//! a kernel runs: in long mode, at ring 0, in the upper half of the address space.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;

use kvm_bindings::{kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What the guest writes to the port if it runs natively at ring 0.
const EXPECTED: u8 = b'h';
/// Instructions that every x86-64 processor has and KVM's emulator has not (`POPCNT`, `FLD1`), and
/// the privilege level that the processor really runs at:
/// ```text
///   mov eax, cs
///   and eax, 3              ; 0 for a kernel
///   shl eax, 4
///   mov ecx, 0x1234
///   popcnt ecx, ecx         ; 5
///   lea eax, [rax+rcx+'b']  ; 'g'
///   fninit
///   fld1
///   fistp dword [rsp]       ; 1
///   add eax, [rsp]          ; 'h'
///   out 0xe9, al
///   hlt
/// ```
const CODE: [u8; 34] = [
    0x8c, 0xc8, 0x83, 0xe0, 0x03, 0xc1, 0xe0, 0x04, 0xb9, 0x34, 0x12, 0x00, 0x00, 0xf3, 0x0f, 0xb8,
    0xc9, 0x8d, 0x44, 0x08, b'b', 0xdb, 0xe3, 0xd9, 0xe8, 0xdb, 0x1c, 0x24, 0x03, 0x04, 0x24, 0xe6,
    0xe9, 0xf4,
];
const PORT: u16 = 0xe9;

/// Guest-physical layout: a page each for three levels of page tables, and the code with its stack.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE_AT: u64 = 0x4000;
const STACK_AT: u64 = 0x4800;
const MEMORY: usize = 0x5000;
/// Where the first 2 MiB of guest-physical memory appear: where Linux has its kernel mapping.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;
/// Indices of `KERNEL_BASE` in the upper two levels (Intel SDM vol. 3, 4.5), in bytes.
const PML4_ENTRY: u64 = PML4 + 511 * 8;
const PDPT_ENTRY: u64 = PDPT + 510 * 8;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Exits after which a guest that sends nothing is given up.
const MAX_EXITS: u32 = 100;

/// Why guests do not run here.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A step before the first instruction failed.
    #[error("cannot {step}")]
    Setup {
        /// The step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// KVM could not run the instructions.
    #[error("KVM cannot run guest code natively: {exit}")]
    Run {
        /// What happened instead.
        exit: String,
    },
    /// The guest computed nonsense, or does not run where a kernel does.
    #[error("the guest's CPU computed {value}, expected {EXPECTED}")]
    WrongResult {
        /// The result.
        value: u8,
    },
}

fn setup<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ProbeError {
    move |source| ProbeError::Setup { step, source: source.into() }
}

/// As [`setup`], for what an ioctl returns.
fn ioctl(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |error| ProbeError::Setup { step, source: io::Error::from_raw_os_error(error.errno()) }
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
        NonNull::new(address.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Fills the memory; called before there is a guest. What does not fit is an error.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the mapping is `MEMORY` bytes long and readable and writable; no guest has it
        // yet, and `&mut self` excludes other references.
        let all = unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), MEMORY) };
        let rest = usize::try_from(offset).ok().and_then(|offset| all.get_mut(offset..));
        let place = rest.and_then(|rest| rest.get_mut(..bytes.len()));
        place.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(bytes);
        Ok(())
    }

    /// The page tables and the code.
    fn fill(&mut self) -> io::Result<()> {
        for (at, entry) in [
            (PML4_ENTRY, PDPT | PRESENT_WRITABLE),
            (PDPT_ENTRY, PAGE_DIRECTORY | PRESENT_WRITABLE),
            (PAGE_DIRECTORY, LARGE_PAGE | PRESENT_WRITABLE),
        ] {
            self.write(at, &entry.to_le_bytes())?;
        }
        self.write(CODE_AT, &CODE)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length and not used afterwards: in `run` the memory is
        // declared before the virtual machine, so that it is dropped after it. It cannot fail: the
        // range is one that was mapped.
        let _never_fails = unsafe { munmap(self.0.as_ptr().cast(), MEMORY) };
    }
}

/// Runs a few instructions in a guest of an open `/dev/kvm`, as its kernel. Takes a few milliseconds
/// on hardware; blocks for ever on a KVM that neither runs nor fails, so the caller bounds it from
/// outside.
///
/// # Errors
/// Guests do not run here, and why.
pub fn run(kvm: OwnedFd) -> Result<(), ProbeError> {
    let mut memory = Memory::new().map_err(setup("map guest memory"))?;
    memory.fill().map_err(setup("write the instructions"))?;
    // SAFETY: the descriptor is ours, open, and given up here; what is not KVM fails the first ioctl.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let vm = kvm.create_vm().map_err(ioctl("create a VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0.as_ptr() as u64,
    };
    // SAFETY: the memory stays mapped until after `vm` is dropped, and this is its only region.
    unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("register guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(ioctl("create a vCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(ioctl("read the CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(ioctl("set the CPUID"))?;
    enter_kernel(&vcpu)?;
    for _ in 0..MAX_EXITS {
        let exit = match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [EXPECTED])) => return Ok(()),
            Ok(VcpuExit::IoOut(PORT, [value])) => {
                return Err(ProbeError::WrongResult { value: *value });
            }
            Ok(VcpuExit::Intr) => continue,
            Ok(VcpuExit::InternalError) => {
                "it tried to emulate an instruction and gave up".to_owned()
            }
            Ok(other) => format!("{other:?}"),
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => continue,
            Err(error) => error.to_string(),
        };
        return Err(ProbeError::Run { exit });
    }
    Err(ProbeError::Run { exit: format!("no result after {MAX_EXITS} interruptions") })
}

/// Puts a vCPU where a kernel's code runs.
fn enter_kernel(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl("read the segment registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(ioctl("set the segment registers"))?;
    let mut regs = vcpu.get_regs().map_err(ioctl("read the registers"))?;
    regs.rip = KERNEL_BASE | CODE_AT;
    regs.rsp = KERNEL_BASE | STACK_AT;
    // Bit 1 of the flags is always set (Intel SDM vol. 1, 3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(ioctl("set the registers"))
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
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME_LMA;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn what_is_no_kvm_fails_at_the_first_step_with_the_reason() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = run(file.into()).unwrap_err();
        assert_eq!(error.to_string(), "cannot create a VM");
        assert!(error.source().unwrap().to_string().contains("ioctl"), "ENOTTY: {error:?}");
    }

    #[test]
    fn nothing_is_written_beside_the_memory() {
        let mut memory = Memory::new().unwrap();
        memory.fill().unwrap();
        memory.write(MEMORY as u64 - 1, &[1]).unwrap();
        for offset in [MEMORY as u64, u64::MAX] {
            assert_eq!(memory.write(offset, &[1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}

//! Does this host's KVM really run guests? Proven by running a few instructions in one.
//!
//! A KVM may create VMs and yet emulate every instruction, giving up at the first that its emulator
//! does not know. So the guest executes some that every x86-64 CPU has and KVM's emulator has not
//! (`POPCNT`, `FLD1`), and sends the result out at a port.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestMemory;

/// Where the instructions lie; real mode.
const CODE: u64 = 0x1000;
const MEMORY_LEN: usize = 0x4000;
const PORT: u16 = 0x10;

/// ```text
///   fninit
///   fld1
///   fistp word [0x2000]      ; 1
///   mov  ax, 0x1234
///   popcnt bx, ax            ; 5
///   mov  al, bl
///   add  al, [0x2000]        ; 6
///   out  0x10, al
///   hlt
/// ```
const PROGRAM: [u8; 25] = [
    0xdb, 0xe3, 0xd9, 0xe8, 0xdf, 0x1e, 0x00, 0x20, 0xb8, 0x34, 0x12, 0xf3, 0x0f, 0xb8, 0xd8, 0x88,
    0xd8, 0x02, 0x06, 0x00, 0x20, 0xe6, 0x10, 0xf4, 0x90,
];
const RESULT: u8 = 6;

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
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// KVM could not run the instructions.
    #[error("KVM cannot run guest code natively: {exit}")]
    Run {
        /// What happened instead.
        exit: String,
    },
    /// The guest computed nonsense.
    #[error("the guest's CPU computed {value}, expected {RESULT}")]
    WrongResult {
        /// The result.
        value: u8,
    },
}

/// Runs the probe on an open `/dev/kvm`. Takes a few milliseconds on hardware; blocks for ever on a
/// KVM that neither runs nor fails, so the caller bounds it from outside.
///
/// # Errors
/// Guests do not run here, and why.
pub fn run(kvm: OwnedFd) -> Result<(), ProbeError> {
    // SAFETY: the descriptor is ours, open, and given up here; what is not KVM fails the first ioctl.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let vm = kvm.create_vm().map_err(setup("create a VM"))?;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)])
        .map_err(setup("map guest memory"))?;
    memory.write_slice(&PROGRAM, GuestAddress(CODE)).map_err(setup("write the instructions"))?;
    register(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(setup("create a vCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(setup("read the CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("set the CPUID"))?;
    enter_real_mode(&vcpu)?;
    for _ in 0..MAX_EXITS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [RESULT])) => return Ok(()),
            Ok(VcpuExit::IoOut(PORT, [value])) => {
                return Err(ProbeError::WrongResult { value: *value });
            }
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => {
                let exit = "it tried to emulate an instruction and gave up".to_owned();
                return Err(ProbeError::Run { exit });
            }
            Ok(other) => return Err(ProbeError::Run { exit: format!("{other:?}") }),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(ProbeError::Run { exit: error.to_string() }),
        }
    }
    Err(ProbeError::Run { exit: format!("no result after {MAX_EXITS} exits") })
}

fn setup<E>(step: &'static str) -> impl Fn(E) -> ProbeError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| ProbeError::Setup { step, source: Box::new(source) }
}

fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), ProbeError> {
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: a live mapping that outlives the VM: both end with `run`, the VM first.
        unsafe { vm.set_user_memory_region(slot) }.map_err(setup("register guest memory"))?;
    }
    Ok(())
}

fn enter_real_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(setup("read the segment registers"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(setup("set the segment registers"))?;
    let mut regs = vcpu.get_regs().map_err(setup("read the registers"))?;
    regs.rip = CODE;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(setup("set the registers"))
}

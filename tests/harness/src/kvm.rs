//! Whether this machine's KVM runs a guest.
//!
//! That `/dev/kvm` opens, or even that it creates virtual machines, proves nothing: some hosts do
//! both and fail at the first guest instruction. So three instructions are run.

use std::io;
use std::ptr::NonNull;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// `mov al, 'h'; out 0xe9, al; hlt`: one exit with a value that only the guest can have produced.
const CODE: [u8; 5] = [0xb0, b'h', 0xe6, 0xe9, 0xf4];
const PORT: u16 = 0xe9;
/// Where the code lies, both in guest-physical memory and as the offset of the instruction pointer.
const CODE_ADDRESS: u64 = 0x1000;
const PAGE: usize = 4096;

/// What the probe found, worded for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable(pub(crate) String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// One page shared with the guest; unmapped on drop.
struct Page(NonNull<u8>);

impl Page {
    fn new() -> io::Result<Self> {
        // SAFETY: a new private mapping at an address that the kernel chooses touches no existing
        // memory.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("mmap returned address zero"))
    }

    fn write(&self, bytes: &[u8; CODE.len()]) {
        // SAFETY: the page is mapped writable, is larger than the code, and nothing else refers to
        // it before the guest runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_ptr(), bytes.len()) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length and not used afterwards: in `probe` the page is
        // declared before the virtual machine, so that it is dropped after it.
        if let Err(error) = unsafe { munmap(self.0.as_ptr().cast(), PAGE) } {
            eprintln!("husk-testhost: unmapping the probe's page: {error}");
        }
    }
}

/// Runs three real-mode instructions in a guest.
///
/// # Errors
/// Which step failed, or what the guest did instead of writing to the port.
pub(crate) fn probe() -> Result<(), Unusable> {
    let failed = |step: &str, error: &dyn std::fmt::Display| Unusable(format!("{step}: {error}"));
    let page = Page::new().map_err(|error| failed("mmap", &error))?;
    page.write(&CODE);

    let kvm = Kvm::new().map_err(|error| failed("opening /dev/kvm", &error))?;
    let vm = kvm.create_vm().map_err(|error| failed("KVM_CREATE_VM", &error))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_ADDRESS,
        memory_size: PAGE as u64,
        userspace_addr: page.0.as_ptr() as u64,
    };
    // SAFETY: the page stays mapped until after `vm` is dropped, and this is its only region.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| failed("KVM_SET_USER_MEMORY_REGION", &error))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|error| failed("KVM_CREATE_VCPU", &error))?;

    let mut sregs = vcpu.get_sregs().map_err(|error| failed("KVM_GET_SREGS", &error))?;
    sregs.cs = kvm_segment { base: 0, selector: 0, ..sregs.cs };
    vcpu.set_sregs(&sregs).map_err(|error| failed("KVM_SET_SREGS", &error))?;
    let mut regs = vcpu.get_regs().map_err(|error| failed("KVM_GET_REGS", &error))?;
    regs.rip = CODE_ADDRESS;
    // Bit 1 of the flags is always set (Intel SDM vol. 1, 3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(|error| failed("KVM_SET_REGS", &error))?;

    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [b'h'])) => Ok(()),
        Ok(exit) => Err(Unusable(format!("the guest's first exit was {exit:?}"))),
        Err(error) => Err(failed("KVM_RUN", &error)),
    }
}

/// Whether a guest of this KVM can itself have a KVM.
pub(crate) fn nested() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y" | "y"))
    })
}

//! Every guest-physical address, in one place.
//!
//! ```text
//!   0x0000_0500  GDT, IDT (null)
//!   0x0000_7000  boot_params ("zero page")
//!   0x0000_9000  PML4, PDPT, PD: 1 GiB identity-mapped
//!   0x0002_0000  kernel command line
//!   0x0009_fc00  end of conventional memory
//!   0x000f_0000  MP table                        (reserved in the memory map)
//!   0x0010_0000  high memory: kernel (linked at 16 MiB), initramfs at the top
//!   0xd000_0000  virtio-mmio windows             (in the hole below 4 GiB)
//!   0xfec0_0000  IO-APIC, 0xfee0_0000 local APIC
//!   0xfffb_c000  KVM's identity-map page and TSS (Intel only)
//! 0x1_0000_0000  memory above 3 GiB continues here
//! ```

use vm_memory::GuestAddress;

/// Global descriptor table, 8 bytes an entry.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// A null interrupt descriptor table: the kernel loads its own before it enables interrupts.
pub const IDT: GuestAddress = GuestAddress(0x528);

/// `struct boot_params`, one page (boot.rst, "Zero Page").
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);

/// Top of the boot CPU's first stack. The 64-bit entry sets its own at once.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);

/// Page map level 4 of the boot CPU, one page.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Page directory pointers, one page.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Page directory: 512 large pages of 2 MiB. 1 GiB covers kernel, boot_params and command line; the
/// initramfs is reached by page tables that the kernel makes itself.
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);

/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Its longest length with the terminating NUL (`COMMAND_LINE_SIZE` of x86).
pub const CMDLINE_CAPACITY: usize = 2048;

/// End of conventional memory as a PC's firmware leaves it (639 KiB).
pub const LOW_MEMORY_END: u64 = 0x9_fc00;

/// The BIOS data area's reset flag (a 16-bit word): the kernel says there, before it resets the
/// machine, whether it wants a warm boot. See `devices::reset`.
pub const WARM_BOOT_FLAG: GuestAddress = GuestAddress(0x472);

/// MP floating pointer and configuration table; one of the places where the kernel looks
/// (MultiProcessor Specification 1.4, section 4).
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Room for it: up to high memory.
pub const MP_TABLE_CAPACITY: u64 = 0x1_0000;

/// Start of high memory.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// Below 4 GiB, memory ends here at the latest; the rest of it continues at [`ABOVE_HOLE`].
pub const HOLE_START: GuestAddress = GuestAddress(0xc000_0000);
/// End of the hole.
pub const ABOVE_HOLE: GuestAddress = GuestAddress(0x1_0000_0000);

/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Number of windows: more than there can be devices.
pub const VIRTIO_MMIO_WINDOWS: u32 = 64;
/// From one window to the next.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;

/// Address of the IO-APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Address of the local APICs that KVM emulates.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where KVM on Intel keeps its three TSS pages for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// I/O ports of the first serial port.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Number of its ports.
pub const SERIAL_PORT_SIZE: u64 = 8;

/// I/O ports of the keyboard controller: data at 0x60, command and status at 0x64.
pub const KEYBOARD_PORT: u64 = 0x60;
/// From data to command port.
pub const KEYBOARD_PORT_SIZE: u64 = 5;

/// The interrupt line of the device with this number: the first that is neither 0, which a kernel takes
/// for the timer, nor the serial port's.
#[must_use]
pub fn irq_of(device: u32) -> u32 {
    let line = device.saturating_add(1);
    if line < SERIAL_IRQ { line } else { line.saturating_add(1) }
}

/// The MMIO window of the device with this number.
#[must_use]
pub fn mmio_of(device: u32) -> u64 {
    VIRTIO_MMIO.saturating_add(u64::from(device).saturating_mul(VIRTIO_MMIO_STRIDE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_all_devices_lie_in_the_hole() {
        let most = (husk_vmm_api::MAX_DISKS + husk_vmm_api::MAX_NICS) as u32 + 8;
        assert!(most <= VIRTIO_MMIO_WINDOWS);
        assert!(mmio_of(VIRTIO_MMIO_WINDOWS) + VIRTIO_MMIO_STRIDE <= u64::from(IO_APIC));
        assert!(mmio_of(0) >= HOLE_START.0);
    }

    #[test]
    fn every_device_has_a_line_of_its_own() {
        let most = (husk_vmm_api::MAX_DISKS + husk_vmm_api::MAX_NICS) as u32 + 8;
        let lines: std::collections::BTreeSet<u32> = (0..most).map(irq_of).collect();
        assert_eq!(lines.len(), most as usize);
        assert!(!lines.contains(&0) && !lines.contains(&SERIAL_IRQ));
        assert!(lines.iter().all(|line| *line < crate::devices::ioapic::MAX_INPUTS));
    }
}

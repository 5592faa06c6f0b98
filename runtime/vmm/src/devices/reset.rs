//! How the guest kernel ends itself: the reset line of a PC's keyboard controller.
//!
//! The kernel's command line says `reboot=k,panic_warm panic=-1`: every restart pulses the
//! controller's reset line (command 0xfe to port 0x64), and before that the kernel leaves the kind of
//! restart in the BIOS's reset flag: "warm" (0x1234) after a panic, "cold" (0) otherwise
//! (`native_machine_emergency_restart` in `arch/x86/kernel/reboot.c`). So a panic is told from a
//! reboot without a driver in the guest.

use vm_memory::Bytes;

use super::BusDevice;
use crate::GuestMemory;
use crate::arch::layout;
use crate::machine::report::{Ending, Reporter};

const COMMAND_PORT: u64 = 4;
const PULSE_RESET_LINE: u8 = 0xfe;
/// The BIOS's "warm boot": skip the memory test.
const WARM_BOOT: u16 = 0x1234;

/// The keyboard controller, as far as its reset line.
pub struct ResetLine {
    memory: GuestMemory,
    reporter: Reporter,
}

impl ResetLine {
    /// A reset line that reports the VM's end.
    #[must_use]
    pub fn new(memory: GuestMemory, reporter: Reporter) -> Self {
        ResetLine { memory, reporter }
    }
}

impl BusDevice for ResetLine {
    /// Status 0: no output, and the input buffer is empty, so the kernel need not wait.
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != COMMAND_PORT || data != [PULSE_RESET_LINE] {
            return;
        }
        let flag = self.memory.read_obj::<u16>(layout::WARM_BOOT_FLAG);
        self.reporter.end(match flag {
            Ok(WARM_BOOT) => Ending::Panic,
            _ => Ending::Reboot,
        });
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::machine::report::{self, VmEvent};

    #[test]
    fn a_panic_is_told_from_a_reboot() {
        for (flag, ending) in [(0x1234_u16, Ending::Panic), (0, Ending::Reboot)] {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            memory.write_obj(flag, layout::WARM_BOOT_FLAG).unwrap();
            let (reporter, reports) = report::channel().unwrap();
            let mut line = ResetLine::new(memory, reporter);
            line.write(COMMAND_PORT, &[0xd1]);
            line.write(0, &[PULSE_RESET_LINE]);
            assert_eq!(reports.drain(), []);
            line.write(COMMAND_PORT, &[PULSE_RESET_LINE]);
            assert_eq!(reports.drain(), [VmEvent::Ended(ending)]);
        }
    }
}

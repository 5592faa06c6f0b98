//! A vCPU's thread: runs the guest, carries its accesses to the devices, reports how it ends.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use husk_vmm_api::Phase;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::report::{Ending, Reporter};
use crate::counters::{ExitCounters, ExitKind};
use crate::devices::bus::Bus;

/// `kvm_run.internal.suberror`: KVM met an instruction that it had to emulate and cannot.
const SUBERROR_EMULATION: u32 = 1;

/// What all vCPUs share.
#[derive(Clone)]
pub struct Shared {
    /// Devices at I/O ports.
    pub ports: Arc<Bus>,
    /// Devices in MMIO windows.
    pub mmio: Arc<Bus>,
    /// Exits of all vCPUs.
    pub exits: Arc<ExitCounters>,
    /// To the control loop.
    pub reporter: Reporter,
}

/// Whether the guest runs on.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Continue,
    End(Ending),
}

/// Starts the thread of vCPU `id`. It runs until the VM ends; the process's end is its end.
///
/// # Errors
/// The host has no thread for it.
pub fn spawn(mut fd: VcpuFd, id: u32, shared: Shared) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        if id == 0 {
            shared.reporter.phase(Phase::FirstInstruction);
        }
        loop {
            if let Step::End(ending) = run_once(&mut fd, &shared) {
                shared.reporter.end(ending);
            }
            // Another vCPU or a device may have ended the VM. The guest gets no further instruction.
            if shared.reporter.has_ended() {
                return;
            }
        }
    })
}

/// Runs the guest to its next exit and handles that.
fn run_once(fd: &mut VcpuFd, shared: &Shared) -> Step {
    let count = |kind| shared.exits.count(kind);
    match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            count(ExitKind::IoOut);
            shared.ports.write(port.into(), data);
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            count(ExitKind::IoIn);
            shared.ports.read(port.into(), data);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(ExitKind::MmioRead);
            shared.mmio.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(ExitKind::MmioWrite);
            shared.mmio.write(address, data);
        }
        Ok(VcpuExit::Shutdown) => {
            count(ExitKind::Other);
            return Step::End(Ending::TripleFault);
        }
        Ok(VcpuExit::Intr) => count(ExitKind::Interrupted),
        Ok(VcpuExit::InternalError) => {
            count(ExitKind::Other);
            return Step::End(Ending::Failure(internal_error(fd)));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            count(ExitKind::Other);
            let message =
                format!("the CPU refused to enter the guest: reason {reason:#x}, CPU {cpu}");
            return Step::End(Ending::Failure(message));
        }
        Ok(other) => {
            count(ExitKind::Other);
            return Step::End(Ending::Failure(format!("unexpected exit of a vCPU: {other:?}")));
        }
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
            count(ExitKind::Interrupted);
        }
        Err(error) => {
            count(ExitKind::Other);
            return Step::End(Ending::Failure(format!("KVM_RUN failed: {error}")));
        }
    }
    Step::Continue
}

/// What KVM says of an internal error, with what to do.
fn internal_error(fd: &mut VcpuFd) -> String {
    let address = match fd.get_regs() {
        Ok(regs) => format!(" at guest address {:#x}", regs.rip),
        Err(_) => String::new(),
    };
    let run = fd.get_kvm_run();
    // SAFETY: after KVM_EXIT_INTERNAL_ERROR the kernel has filled the `internal` member of the
    // union, whose fields are plain integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    if internal.suberror == SUBERROR_EMULATION {
        format!(
            "KVM had to emulate an instruction{address} and cannot: this host's KVM does not run \
             guests natively; `husk check` proves it"
        )
    } else {
        format!("KVM reports internal error {}{address}", internal.suberror)
    }
}

//! The peer: QEMU's `microvm` machine with the same kernel, initramfs, memory and kinds of device.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Setup;

const PATIENCE: Duration = Duration::from_secs(300);

/// What husk's VMM tells its kernel, as far as it makes sense to QEMU's machine.
const CMDLINE: &str = "console=hvc0 quiet panic=-1 reboot=t tsc=reliable no_timer_check \
                       random.trust_cpu=on cryptomgr.notests noreplace-smp 8250.nr_uarts=0 rdinit=/init";

/// The machine, with a console that goes to the character device `con`.
pub(crate) fn machine(setup: &Setup, initramfs: &Path, memory_mib: u32) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,usb=off"])
        .args(["-cpu", "host", "-smp", "1", "-m", &format!("{memory_mib}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-kernel".as_ref(), setup.kernel.as_os_str()])
        .args(["-initrd".as_ref(), initramfs.as_os_str()])
        .args(["-append", CMDLINE])
        .args(["-device", "virtio-serial-device", "-device", "virtconsole,chardev=con"])
        .args(["-device", "virtio-rng-device"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// What failed if it cannot be started.
pub(crate) const START: &str = "cannot start qemu-system-x86_64; install qemu-system-x86";

/// From the spawn of QEMU to the agent's first instruction, which writes to the signal port: QEMU's
/// debug console there passes the byte on.
pub(crate) fn spawn_to_init(setup: &Setup, memory_mib: u32) -> Result<Duration> {
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
    let port = husk_proto::guest::SIGNAL_PORT;
    let started = Instant::now();
    let mut qemu = machine(setup, &setup.initramfs, memory_mib)
        .args(["-chardev", "null,id=con"])
        .args(["-chardev", &format!("socket,fd={},id=signal", theirs.as_raw_fd())])
        .args(["-device", &format!("isa-debugcon,iobase={port:#x},chardev=signal")])
        .spawn()
        .context(START)?;
    drop(theirs);
    let mut byte = [0];
    let read = ours.read_exact(&mut byte);
    let took = started.elapsed();
    qemu.kill().context("cannot end QEMU")?;
    qemu.wait()?;
    read.context("the guest in QEMU never reached its init")?;
    let expected = husk_proto::guest::signal::INIT;
    ensure!(byte == [expected], "the guest in QEMU sent {byte:?}, not {expected}");
    Ok(took)
}

//! Building a VM: one linear recipe.
//!
//! The order matters. Guest memory is registered before the ioeventfds exist, because afterwards every
//! new memory slot waits for a grace period. That the local APICs are KVM's is said before the vCPUs
//! are made, which then have them. Kernel and initramfs are
//! placed while nothing runs. Devices come last: each is wired to KVM by its eventfds and named on
//! the kernel's command line, and with that the boot structures can be written.

use std::fs::File;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use husk_vmm_api::{
    ChannelError, DiskConfig, MAX_DISKS, MAX_HOT_DISKS, NicConfig, Phase, Received, Request,
    VmConfig,
};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::config::{self, ConfigError};
use super::report::Reporter;
use super::slots::{self, SlotError, Slots};
use super::vcpu;
use crate::GuestMemory;
use crate::arch::boot_params::{self, BootParamsError};
use crate::arch::mptable::{self, MpTableError};
use crate::arch::regs::{self, RegsError};
use crate::arch::{cpuid, layout};
use crate::boot::{self, LoadError, LoadedKernel};
use crate::counters::{DeviceCounters, ExitCounters};
use crate::devices::bus::{Bus, RangeTaken};
use crate::devices::console_log::ConsoleLog;
use crate::devices::ioapic::{self, IoApic, Message, Messages};
use crate::devices::reset::ResetLine;
use crate::devices::serial::SerialPort;
use crate::devices::signal::SignalPort;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::blk::{self, Blk, BlkError};
use crate::devices::virtio::console::Console;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::mmio::slot::Hidden;
use crate::devices::virtio::mmio::window::{Window, Windows};
use crate::devices::virtio::mmio::{MmioTransport, WINDOW_LEN};
use crate::devices::virtio::net::{Net, TapError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{HostSink, Vsock, VsockHandle};
use crate::devices::{BusDevice, Line};
use crate::memory::{self, MemoryError, Sharing};

/// The API version that every KVM has had since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// What KVM must be able to do.
const CAPABILITIES: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// What every guest is told on its command line, before its devices.
///
/// `reboot=k,panic_warm panic=-1`: see `devices::reset`. `quiet`: the console costs an exit per line;
/// the log is complete in the guest (`dmesg`), and a panic is printed anyway.
const CMDLINE: &str = "panic=-1 reboot=k,panic_warm tsc=reliable no_timer_check \
                       random.trust_cpu=on cryptomgr.notests noreplace-smp rdinit=/init";
const CMDLINE_CONSOLE: &str = "console=hvc0 quiet 8250.nr_uarts=0";
const CMDLINE_SERIAL: &str = "console=ttyS0 earlycon=uart8250,io,0x3f8 8250.nr_uarts=1";

/// The VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration is not one that can be built.
    #[error("the VM's configuration is not usable")]
    Config(#[from] ConfigError),
    /// A descriptor did not come with the configuration.
    #[error("{what} did not come with the VM's configuration")]
    Descriptor {
        /// Which one.
        what: String,
        /// Why not.
        #[source]
        source: ChannelError,
    },
    /// The descriptor is not KVM's, or KVM is too old.
    #[error("KVM answers with API version {version}, expected {KVM_API_VERSION}; is it /dev/kvm?")]
    KvmVersion {
        /// What it answered.
        version: i32,
    },
    /// KVM lacks something.
    #[error("this host's KVM lacks {capability}")]
    KvmCapability {
        /// Its name.
        capability: &'static str,
    },
    /// KVM refused a step.
    #[error("KVM refused to {step}")]
    Kvm {
        /// The step.
        step: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel and initramfs.
    #[error("cannot load the guest")]
    Load(#[from] LoadError),
    /// Boot structures.
    #[error(transparent)]
    BootParams(#[from] BootParamsError),
    /// MP table.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// Registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// A disk.
    #[error("disk {serial}")]
    Disk {
        /// Its serial.
        serial: String,
        /// What is wrong with it.
        #[source]
        source: BlkError,
    },
    /// A NIC.
    #[error("NIC {position}")]
    Nic {
        /// Its position.
        position: usize,
        /// What is wrong with it.
        #[source]
        source: TapError,
    },
    /// A device could not be made.
    #[error("cannot make device {device}")]
    Device {
        /// Its name.
        device: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A device that comes later, or a place for one.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] RangeTaken),
    /// A vCPU's thread could not be started.
    #[error("cannot start the thread of vCPU {id}")]
    Thread {
        /// The vCPU.
        id: u32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// A device's name and its counters.
pub type NamedCounters = (String, Arc<DeviceCounters>);

/// A VM whose vCPUs are ready to run.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    shared: vcpu::Shared,
    /// Counters of the virtio devices that were there from the start.
    devices: Vec<NamedCounters>,
    /// The guest kernel's log.
    pub console: Arc<ConsoleLog>,
    /// To connect to the guest's vsock ports, if the VM has a vsock device.
    pub vsock: Option<VsockHandle>,
    /// Disks that come and go while the guest runs.
    slots: Slots,
    // Both must live as long as the vCPUs; the process's end is their end.
    _vm: Arc<VmFd>,
    _memory: GuestMemory,
}

impl Machine {
    /// Starts every vCPU. The guest runs from here on.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn run(&mut self) -> Result<(), BuildError> {
        for (id, fd) in (0_u32..).zip(self.vcpus.drain(..)) {
            vcpu::spawn(fd, id, self.shared.clone())
                .map_err(|source| BuildError::Thread { id, source })?;
        }
        Ok(())
    }

    /// Adds a disk to the running guest, from a descriptor that came with `request`. Returns the
    /// device's number.
    ///
    /// # Errors
    /// The configuration or the descriptor is not one of a disk, or there is no place for it.
    pub fn add_disk(
        &mut self,
        disk: &DiskConfig,
        request: &mut Received<Request>,
    ) -> Result<u32, BuildError> {
        config::validate_serial(&disk.serial)?;
        let blk = open_disk(disk, request)?;
        if self.counters().any(|(name, _)| name == blk.name()) {
            return Err(ConfigError::SerialTaken { serial: disk.serial.clone() }.into());
        }
        Ok(self.slots.add(Box::new(blk))?)
    }

    /// Takes a disk away that was added to the running guest. Blocks for as long as the host takes for
    /// the request that it is at.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn remove_disk(&mut self, serial: &str) -> Result<(), BuildError> {
        Ok(self.slots.remove(&blk::name_of(serial))?)
    }

    /// Counters of the virtio devices that there are now.
    pub fn counters(&self) -> impl Iterator<Item = &NamedCounters> {
        self.devices.iter().chain(self.slots.counters())
    }

    /// Exits of all vCPUs.
    #[must_use]
    pub fn exits(&self) -> &ExitCounters {
        &self.shared.exits
    }
}

/// Builds the VM that `boot` asks for, from the descriptors that came with it.
///
/// # Errors
/// Whatever is missing, wrong, or refused by the host.
pub fn build(
    config: &VmConfig,
    boot: &mut Received<Request>,
    sink: Box<dyn HostSink>,
    reporter: Reporter,
) -> Result<Machine, BuildError> {
    config::validate(config)?;
    let kernel_file = take(boot, config.kernel, "the kernel")?.into();

    let kvm = open_kvm(take(boot, config.kvm, "/dev/kvm")?)?;
    let vm = Arc::new(create_vm(&kvm)?);
    reporter.phase(Phase::Kvm);

    // The file server works in guest memory.
    let sharing = if config.fs.is_some() { Sharing::Shared } else { Sharing::Private };
    let memory = memory::map(config.memory_mib, sharing)?;
    memory::register(&vm, &memory)?;
    let windows = Windows::new(layout::VIRTIO_MMIO_WINDOWS).map_err(MemoryError::Windows)?;
    register_windows(&kvm, &vm, &windows, &memory)?;
    reporter.phase(Phase::Memory);

    let kernel = boot::load_kernel(&memory, &kernel_file)?;
    let initramfs = match config.initramfs {
        Some(index) => {
            let file = take(boot, index, "the initramfs")?.into();
            Some(boot::load_initramfs(&memory, &file, kernel.end)?)
        }
        None => None,
    };
    reporter.phase(Phase::Load);

    create_local_apics(&vm)?;
    let console_file = match config.console {
        Some(index) => Some(File::from(take(boot, index, "the console log")?)),
        None => None,
    };
    let console = Arc::new(ConsoleLog::new(console_file, VmConfig::CONSOLE_LOG_CAP));
    let mut devices = Devices::new(&vm, &memory, &windows, &reporter, config)?;
    devices.add(Box::new(Console::new(console.clone())))?;
    let vsock = match &config.vsock {
        Some(vsock) => {
            let (device, handle) = Vsock::new(vsock.guest_cid, sink)
                .map_err(|source| BuildError::Device { device: "vsock".to_owned(), source })?;
            devices.add(Box::new(device))?;
            Some(handle)
        }
        None => None,
    };
    let rng = devices.add(Box::new(Rng::new()))?;
    for disk in &config.disks {
        devices.add(Box::new(open_disk(disk, boot)?))?;
    }
    for (position, nic) in config.nics.iter().enumerate() {
        devices.add(Box::new(open_nic(position, nic, boot)?))?;
    }
    if let Some(fs) = &config.fs {
        let socket = take(boot, fs.socket, "the file server's socket")?;
        devices.add(Box::new(Fs::new(&fs.tag, socket)))?;
    }
    // What comes once the guest runs shares the line of a device that is silent by then.
    let balloon = devices.add_late(Box::new(Balloon::new()), rng)?;
    let slots = devices.add_slots(MAX_DISKS.saturating_sub(config.disks.len()), rng)?;
    let exits = Arc::new(ExitCounters::default());
    devices.add_legacy(config, &console, &exits, vec![balloon])?;
    let Devices { ioapic, mut mmio, ports, counters, cmdline, .. } = devices;
    let inputs = ioapic.inputs();
    mmio.insert(layout::IO_APIC.into(), ioapic::WINDOW_LEN, Arc::new(Mutex::new(ioapic)))?;
    reporter.phase(Phase::Devices);

    boot_params::write_boot_params(&memory, &cmdline, initramfs)?;
    boot_params::write_cpu_tables(&memory)?;
    mptable::write_mp_table(&memory, config.vcpus, inputs)?;
    let vcpus = create_vcpus(&kvm, &vm, config.vcpus, kernel)?;

    let shared = vcpu::Shared { ports: Arc::new(ports), mmio: Arc::new(mmio), exits, reporter };
    let devices = counters;
    Ok(Machine { vcpus, shared, devices, console, vsock, slots, _vm: vm, _memory: memory })
}

fn take(
    boot: &mut Received<Request>,
    index: husk_vmm_api::FdIndex,
    what: &str,
) -> Result<OwnedFd, BuildError> {
    boot.take_fd(index).map_err(|source| BuildError::Descriptor { what: what.to_owned(), source })
}

fn kvm_error(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { step, source }
}

/// Wraps the descriptor and checks that it is a KVM with what we need.
fn open_kvm(fd: OwnedFd) -> Result<Kvm, BuildError> {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is ours, open, and given up here. Whether it is KVM's is checked next;
    // another device answers the ioctl with an error.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(BuildError::KvmVersion { version });
    }
    for (cap, capability) in CAPABILITIES {
        if !kvm.check_extension(cap) {
            return Err(BuildError::KvmCapability { capability });
        }
    }
    Ok(kvm)
}

/// Creates the VM. A signal may interrupt the kernel in this; it is then asked again.
fn create_vm(kvm: &Kvm) -> Result<VmFd, BuildError> {
    const TRIES: u32 = 16;
    let mut result = kvm.create_vm();
    for _ in 1..TRIES {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    let vm = result.map_err(kvm_error("create a VM"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm_error("set the TSS address"))?;
    Ok(vm)
}

/// Has KVM show the devices' windows to the guest. On a host that cannot do that, reads leave the
/// guest as writes do.
fn register_windows(
    kvm: &Kvm,
    vm: &VmFd,
    windows: &Windows,
    memory: &GuestMemory,
) -> Result<(), BuildError> {
    if !kvm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    let (address, len) = (layout::VIRTIO_MMIO, windows.len());
    let slot = kvm_userspace_memory_region {
        slot: u32::try_from(memory.num_regions()).unwrap_or(u32::MAX),
        flags: KVM_MEM_READONLY,
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: windows.host_address(),
    };
    // SAFETY: the range is a live mapping that `windows` owns; the transports keep it until the
    // process ends, longer than the VM.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(|source| MemoryError::Register { address, source }.into())
}

/// Has KVM make a local APIC with each vCPU. The other half of an interrupt controller is
/// [`IoApic`].
fn create_local_apics(vm: &VmFd) -> Result<(), BuildError> {
    // No input of an IO-APIC whose end of interrupt would have to be told.
    let cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [0; 4], ..Default::default() };
    vm.enable_cap(&cap).map_err(kvm_error("create the local APICs"))
}

/// Messages go to KVM's local APICs.
impl Messages for VmFd {
    fn send(&self, message: Message) {
        let msi = kvm_msi { address_lo: message.address, data: message.data, ..Default::default() };
        if let Err(error) = self.signal_msi(msi) {
            // A vector or a destination that there is not: the guest's own doing.
            tracing::trace!(%error, ?message, "an interrupt cannot be delivered");
        }
    }
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u32,
    kernel: LoadedKernel,
) -> Result<Vec<VcpuFd>, BuildError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("tell its CPUID"))?;
    let mut vcpus = Vec::new();
    for id in 0..count {
        let vcpu = vm.create_vcpu(id.into()).map_err(kvm_error("create a vCPU"))?;
        let mut cpuid = supported.clone();
        cpuid::specialise(&mut cpuid, id, count);
        // CPUID before the model-specific registers: KVM gates those by it (Linux 6.13).
        vcpu.set_cpuid2(&cpuid).map_err(kvm_error("set a vCPU's CPUID"))?;
        if id == 0 {
            // The others wait for the kernel to start them (INIT, SIPI).
            regs::set_boot_registers(&vcpu, kernel.entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn open_disk(disk: &DiskConfig, boot: &mut Received<Request>) -> Result<Blk, BuildError> {
    let file = take(boot, disk.fd, &format!("disk {}", disk.serial))?.into();
    Blk::new(&disk.serial, file, disk.read_only)
        .map_err(|source| BuildError::Disk { serial: disk.serial.clone(), source })
}

fn open_nic(
    position: usize,
    nic: &NicConfig,
    boot: &mut Received<Request>,
) -> Result<Net, BuildError> {
    let mut taps = Vec::with_capacity(nic.taps.len());
    for (queue, index) in nic.taps.iter().enumerate() {
        taps.push(take(boot, *index, &format!("tap descriptor {queue} of NIC {position}"))?);
    }
    Net::new(position, nic, taps).map_err(|source| BuildError::Nic { position, source })
}

/// What tells the guest of a device (the kernel's admin-guide/kernel-parameters, virtio_mmio.device).
/// In KiB, which is shorter: there may be many devices.
fn announcement(window: u64, irq: u32) -> String {
    const KIB: u64 = WINDOW_LEN / 1024;
    format!(" virtio_mmio.device={KIB}K@{window:#x}:{irq}")
}

/// The devices as they are added: their places in both address spaces, and how the guest learns of
/// them.
struct Devices<'a> {
    vm: &'a Arc<VmFd>,
    memory: &'a GuestMemory,
    windows: &'a Arc<Windows>,
    reporter: &'a Reporter,
    ioapic: IoApic,
    mmio: Bus,
    ports: Bus,
    counters: Vec<NamedCounters>,
    cmdline: String,
    /// How many windows are taken.
    count: u32,
    /// How many of the interrupt lines are.
    lines: u32,
    /// Where the guest's acknowledgements of interrupts end: nobody reads it.
    acks: Arc<EventFd>,
}

impl<'a> Devices<'a> {
    fn new(
        vm: &'a Arc<VmFd>,
        memory: &'a GuestMemory,
        windows: &'a Arc<Windows>,
        reporter: &'a Reporter,
        config: &VmConfig,
    ) -> Result<Self, BuildError> {
        let console = if config.serial_console { CMDLINE_SERIAL } else { CMDLINE_CONSOLE };
        let mut cmdline = format!("{CMDLINE} {console}");
        if !config.cmdline.is_empty() {
            cmdline = format!("{cmdline} {}", config.cmdline);
        }
        let ioapic = IoApic::new(vm.clone());
        let (mmio, ports, counters) = (Bus::default(), Bus::default(), Vec::new());
        let acks = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            BuildError::Device { device: "interrupt acknowledgement".to_owned(), source }
        })?;
        Ok(Devices {
            vm,
            memory,
            windows,
            reporter,
            ioapic,
            mmio,
            ports,
            counters,
            cmdline,
            count: 0,
            lines: 0,
            acks: Arc::new(acks),
        })
    }

    /// Adds a virtio device: a window, an interrupt line, an ioeventfd per queue and one for the
    /// acknowledgements. Returns the line.
    fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<u32, BuildError> {
        let irq = layout::irq_of(self.lines);
        self.lines = self.lines.saturating_add(1);
        let (place, transport) = self.transport(device, irq)?;
        self.insert(place, transport, irq)?;
        Ok(irq)
    }

    /// Adds a device that the guest does not see yet, on the interrupt line `irq` of another one.
    fn add_late(&mut self, device: Box<dyn VirtioDevice>, irq: u32) -> Result<Hidden, BuildError> {
        let (place, transport) = self.transport(device, irq)?;
        let hidden = Hidden::new(&transport);
        self.insert(place, transport, irq)?;
        Ok(hidden)
    }

    /// Adds places for disks that come later, at most so many, whose devices share the line `irq`.
    fn add_slots(&mut self, most: usize, irq: u32) -> Result<Slots, BuildError> {
        let line = self.line("hot-added disks", irq)?;
        let (memory, reporter) = (self.memory.clone(), self.reporter.clone());
        let mut slots = Slots::new(self.vm.clone(), memory, reporter, line, self.acks.clone());
        for _ in 0..most.min(MAX_HOT_DISKS) {
            let (number, address) = (self.count, layout::mmio_of(self.count));
            let slot = slots.push(number, address, self.window("hot-added disk")?);
            self.announce(address, irq, slot)?;
        }
        Ok(slots)
    }

    /// A device behind its transport in the next window, and that window's address.
    fn transport(
        &mut self,
        device: Box<dyn VirtioDevice>,
        irq: u32,
    ) -> Result<(u64, MmioTransport), BuildError> {
        let name = device.name().to_owned();
        let place = (self.window(&name)?, self.line(&name, irq)?);
        let (memory, reporter) = (self.memory.clone(), self.reporter.clone());
        let transport = MmioTransport::new(memory, device, reporter, place)
            .map_err(|source| BuildError::Device { device: name, source })?;
        Ok((layout::mmio_of(self.count), transport))
    }

    /// Wires a transport to KVM and puts it on the bus.
    fn insert(
        &mut self,
        address: u64,
        transport: MmioTransport,
        irq: u32,
    ) -> Result<(), BuildError> {
        let kicks: Vec<&EventFd> = transport.queue_kicks().iter().collect();
        slots::wire(self.vm, &self.acks, &kicks, address)?;
        self.counters.push((transport.name().to_owned(), transport.counters()));
        self.announce(address, irq, Arc::new(Mutex::new(transport)))
    }

    /// Puts what answers at `address`, the next window, on the bus and on the command line.
    fn announce(
        &mut self,
        address: u64,
        irq: u32,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BuildError> {
        self.mmio.insert(address, WINDOW_LEN, device)?;
        self.cmdline.push_str(&announcement(address, irq));
        self.count = self.count.saturating_add(1);
        Ok(())
    }

    /// The next device's window.
    fn window(&self, device: &str) -> Result<Window, BuildError> {
        self.windows.window(self.count).ok_or_else(|| BuildError::Device {
            device: device.to_owned(),
            source: std::io::Error::other("there are more devices than windows"),
        })
    }

    /// The interrupt line of a device.
    fn line(&mut self, device: &str, irq: u32) -> Result<Arc<dyn Line>, BuildError> {
        self.ioapic.line(irq).ok_or_else(|| BuildError::Device {
            device: device.to_owned(),
            source: std::io::Error::other("there are more devices than interrupt lines"),
        })
    }

    /// Adds what lies at I/O ports.
    fn add_legacy(
        &mut self,
        config: &VmConfig,
        console: &Arc<ConsoleLog>,
        exits: &Arc<ExitCounters>,
        late: Vec<Hidden>,
    ) -> Result<(), BuildError> {
        let reset = ResetLine::new(self.memory.clone(), self.reporter.clone());
        self.add_port(layout::KEYBOARD_PORT, layout::KEYBOARD_PORT_SIZE, reset)?;
        let signal = SignalPort::new(self.reporter.clone(), exits.clone(), late);
        self.add_port(husk_proto::guest::SIGNAL_PORT.into(), 1, signal)?;
        if config.serial_console {
            let line = self.line("serial", layout::SERIAL_IRQ)?;
            let serial = SerialPort::new(line, console.clone());
            self.add_port(layout::SERIAL_PORT, layout::SERIAL_PORT_SIZE, serial)?;
        }
        Ok(())
    }

    fn add_port(
        &mut self,
        start: u64,
        len: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BuildError> {
        Ok(self.ports.insert(start, len, Arc::new(Mutex::new(device)))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_devices_fit_on_the_command_line() {
        let most = husk_vmm_api::MAX_DISKS + husk_vmm_api::MAX_NICS;
        // Console, vsock, rng, balloon and fs come first.
        let devices: String = (0..most as u32 + 5)
            .map(|device| announcement(layout::mmio_of(device), layout::irq_of(device)))
            .collect();
        let len = format!("{CMDLINE} {CMDLINE_SERIAL}{devices}").len();
        assert!(len < layout::CMDLINE_CAPACITY, "{len}");
        assert_eq!(announcement(0xd000_0000, 5), " virtio_mmio.device=4K@0xd0000000:5");
    }
}

//! How QEMU is started: which accelerator, which command line.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::kvm;
use crate::wire::GUEST_PORT;

/// How the test host's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accelerator {
    /// By this machine's hardware; needs nested virtualisation.
    Kvm,
    /// By translation, with an emulated AMD processor: works everywhere, about 50 times slower.
    Tcg,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Accelerator::Kvm => "KVM",
            Accelerator::Tcg => "TCG",
        })
    }
}

/// KVM if it is proven to run guests that can have a KVM of their own, else TCG; with the reason.
pub(crate) fn choose() -> (Accelerator, String) {
    match kvm::probe() {
        Ok(()) if kvm::nested() => (Accelerator::Kvm, "this machine's KVM works and nests".into()),
        Ok(()) => (Accelerator::Tcg, "this machine's KVM does not nest".into()),
        Err(reason) => (Accelerator::Tcg, format!("no usable KVM here: {reason}")),
    }
}

/// The machine to start.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) accelerator: Accelerator,
    /// Processors for what runs in it; see [`Machine::processors`].
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) kernel: PathBuf,
    pub(crate) root_disk: PathBuf,
    pub(crate) transfer_disk: PathBuf,
    /// Gets the kernel's and systemd's messages.
    pub(crate) console_log: PathBuf,
    /// Port on this machine's loopback that leads to the agent.
    pub(crate) host_port: u16,
}

/// `panic=-1`: with `-no-reboot` a panic ends QEMU at once. The root on NVMe, because its driver is
/// built into Debian's cloud kernel, so that no initramfs is needed; only one disk there, because
/// namespaces are numbered in the order in which they happen to be found.
const KERNEL_COMMAND_LINE: &str = "root=/dev/nvme0n1 rw rootfstype=ext4 console=ttyS0 quiet panic=-1 \
     mitigations=off audit=0 net.ifnames=0 systemd.show_status=0 nvme.poll_queues=0";

impl Machine {
    /// How many processors QEMU has, and what else the kernel is told.
    ///
    /// TCG's first processor must never run a guest, so that it gets one more, and no process is
    /// scheduled on the first: QEMU (10.0, and later) writes to that processor's flags, among them whether
    /// nested paging is on, from every other one that restores an FPU state (`cpu_clear_ignne`), with
    /// no lock. A context switch there at the moment of a VMRUN or #VMEXIT here undid it: guests died
    /// of a triple fault, and this kernel with them. ADR 0016.
    fn processors(&self) -> (u32, String) {
        match self.accelerator {
            Accelerator::Kvm => (self.cpus, String::new()),
            Accelerator::Tcg => (self.cpus.saturating_add(1), " isolcpus=domain,0".to_owned()),
        }
    }

    /// QEMU's arguments.
    pub(crate) fn arguments(&self) -> Result<Vec<String>> {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => ("tcg,thread=multi,tb-size=512", "EPYC,+svm,+npt"),
        };
        let (processors, affinity) = self.processors();
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |parts: &[&str]| arguments.extend(parts.iter().map(|part| (*part).into()));
        add(&["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
        add(&["-name", "husk-testhost", "-M", "q35", "-accel", accelerator, "-cpu", cpu]);
        add(&["-smp", &processors.to_string(), "-m", &self.memory_mib.to_string()]);
        let command_line = format!("{KERNEL_COMMAND_LINE}{affinity}");
        add(&["-kernel", &text(&self.kernel)?, "-append", &command_line]);
        add(&["-serial", &format!("file:{}", comma_escaped(&self.console_log)?)]);
        // The overlay is a file that QEMU has already unlinked: it cannot outlive QEMU.
        let root = comma_escaped(&self.root_disk)?;
        add(&[
            "-drive",
            &format!("if=none,id=root,file={root},format=raw,snapshot=on,cache=unsafe"),
        ]);
        let transfer = comma_escaped(&self.transfer_disk)?;
        add(&["-drive", &format!("if=none,id=transfer,file={transfer},format=raw,cache=unsafe")]);
        add(&["-device", "nvme,drive=root,serial=husk"]);
        add(&["-device", "virtio-blk-pci,drive=transfer"]);
        let forward = format!("hostfwd=tcp:127.0.0.1:{}-:{GUEST_PORT}", self.host_port);
        add(&["-netdev", &format!("user,id=net,{forward}")]);
        add(&["-device", "virtio-net-pci,netdev=net,romfile="]);
        add(&["-device", "virtio-rng-pci"]);
        Ok(arguments)
    }

    /// The command, not yet started.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(self.arguments()?);
        Ok(command)
    }
}

fn text(path: &std::path::Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// In QEMU's options a comma separates; a doubled one is a comma.
fn comma_escaped(path: &std::path::Path) -> Result<String> {
    Ok(text(path)?.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(accelerator: Accelerator) -> Machine {
        Machine {
            accelerator,
            cpus: 2,
            memory_mib: 6144,
            kernel: "/c/vmlinuz".into(),
            root_disk: "/c/a,b/root.ext4".into(),
            transfer_disk: "/s/transfer".into(),
            console_log: "/s/console.log".into(),
            host_port: 4242,
        }
    }

    #[test]
    fn translation_emulates_amd_virtualisation() {
        let arguments = machine(Accelerator::Tcg).arguments().unwrap().join(" ");
        assert!(arguments.contains("-cpu EPYC,+svm,+npt"), "{arguments}");
        let arguments = machine(Accelerator::Kvm).arguments().unwrap().join(" ");
        assert!(arguments.contains("-accel kvm -cpu host"), "{arguments}");
    }

    #[test]
    fn the_first_emulated_processor_is_one_more_and_runs_no_process() {
        let arguments = machine(Accelerator::Tcg).arguments().unwrap().join(" ");
        assert!(arguments.contains("-smp 3 -m 6144"), "{arguments}");
        assert!(arguments.contains(" isolcpus=domain,0 -serial"), "{arguments}");
        let arguments = machine(Accelerator::Kvm).arguments().unwrap().join(" ");
        assert!(arguments.contains("-smp 2 -m 6144"), "{arguments}");
        assert!(!arguments.contains("isolcpus"), "{arguments}");
    }

    #[test]
    fn the_cached_image_is_only_ever_overlaid() {
        let arguments = machine(Accelerator::Tcg).arguments().unwrap();
        let root = arguments.iter().find(|a| a.contains("id=root")).unwrap();
        assert!(root.contains("snapshot=on"), "{root}");
        assert!(root.contains("file=/c/a,,b/root.ext4,"), "{root}");
    }

    #[test]
    fn the_agent_is_reachable_from_loopback_only() {
        let arguments = machine(Accelerator::Tcg).arguments().unwrap().join(" ");
        assert!(arguments.contains("hostfwd=tcp:127.0.0.1:4242-:7001"), "{arguments}");
    }
}

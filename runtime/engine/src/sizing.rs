//! How large a pod's virtual machine is.
//!
//! As large as the limits of its containers together, computed as Kubernetes computes a pod's
//! effective limits: sidecars count from their start on, init containers run one after the other
//! beside the sidecars before them, containers run all at once. CPU is rounded up to whole CPUs,
//! memory to whole MiB. Volumes in memory lie inside the memory limits and add nothing.
//!
//! A resource for which any container has no limit has no effective limit; the VM then gets
//! [`DEFAULT_VCPUS`] or [`DEFAULT_MEMORY_MIB`], or what the containers declare (limits, or else
//! requests) if that is more.

use husk_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

use crate::types::{ContainerKind, ContainerSpec, Resources, VmSize};

/// Virtual CPUs of a pod without a CPU limit.
pub const DEFAULT_VCPUS: u32 = 1;

/// Memory in MiB of a pod without a memory limit.
pub const DEFAULT_MEMORY_MIB: u32 = 512;

const MIB: u64 = 1024 * 1024;

/// Limits for which there is no virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Less memory than the guest needs for itself.
    #[error("the guest needs at least {MIN_MEMORY_MIB}Mi")]
    MemoryTooSmall {
        /// The effective limit in bytes.
        memory: u64,
    },
    /// More memory than a VM can have.
    #[error("a virtual machine has at most {MAX_MEMORY_MIB}Mi")]
    MemoryTooLarge {
        /// The effective limit in bytes.
        memory: u64,
    },
    /// More CPUs than a VM can have.
    #[error("a virtual machine has at most {MAX_VCPUS} CPUs")]
    TooManyCpus {
        /// The effective limit in thousandths of a CPU.
        cpu_millis: u64,
    },
}

/// The size of the virtual machine for these containers.
///
/// # Errors
/// The first limit that cannot be kept.
pub fn vm_size(init: &[ContainerSpec], containers: &[ContainerSpec]) -> Result<VmSize, SizeError> {
    let memory = effective(init, containers, |r| (r.limits.memory, r.requests.memory));
    let memory = memory.or_default(u64::from(DEFAULT_MEMORY_MIB) * MIB);
    let memory_mib = match u32::try_from(memory.div_ceil(MIB)) {
        Ok(mib) if mib < MIN_MEMORY_MIB => return Err(SizeError::MemoryTooSmall { memory }),
        Ok(mib) if mib <= MAX_MEMORY_MIB => mib,
        _ => return Err(SizeError::MemoryTooLarge { memory }),
    };
    let cpu = effective(init, containers, |r| (r.limits.cpu_millis, r.requests.cpu_millis));
    let cpu_millis = cpu.or_default(u64::from(DEFAULT_VCPUS) * 1000);
    let vcpus = match u32::try_from(cpu_millis.div_ceil(1000)) {
        Ok(vcpus) if vcpus <= MAX_VCPUS => vcpus.max(1),
        _ => return Err(SizeError::TooManyCpus { cpu_millis }),
    };
    Ok(VmSize { vcpus, memory_mib })
}

/// What containers declare of one resource, together.
struct Declared {
    amount: u64,
    /// Whether every container has a limit.
    limited: bool,
}

impl Declared {
    fn or_default(&self, default: u64) -> u64 {
        if self.limited { self.amount } else { self.amount.max(default) }
    }
}

/// The most that containers declare at any one time. `limit_and_request` takes one resource.
fn effective(
    init: &[ContainerSpec],
    containers: &[ContainerSpec],
    limit_and_request: impl Fn(&Resources) -> (Option<u64>, Option<u64>),
) -> Declared {
    let mut limited = true;
    let mut declared = |container: &ContainerSpec| {
        let (limit, request) = limit_and_request(&container.resources);
        limited &= limit.is_some();
        limit.or(request).unwrap_or(0)
    };
    let mut sidecars = 0_u64;
    let mut peak = 0_u64;
    for container in init {
        let with_this = sidecars.saturating_add(declared(container));
        if container.kind == ContainerKind::Sidecar {
            sidecars = with_this;
        }
        peak = peak.max(with_this);
    }
    let running =
        containers.iter().fold(sidecars, |sum, container| sum.saturating_add(declared(container)));
    Declared { amount: peak.max(running), limited }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Amounts, PullPolicy, Rootfs, SecurityContext};

    const SIDECAR: ContainerKind = ContainerKind::Sidecar;
    const INIT: ContainerKind = ContainerKind::Init;
    const MAIN: ContainerKind = ContainerKind::Main;

    fn container(kind: ContainerKind, cpu_millis: u64, memory_mib: u64) -> ContainerSpec {
        let some = |amount: u64| (amount > 0).then_some(amount);
        let limits =
            Amounts { cpu_millis: some(cpu_millis), memory: some(memory_mib.saturating_mul(MIB)) };
        ContainerSpec {
            name: "c".into(),
            kind,
            rootfs: Rootfs::Image { reference: "i".into(), pull_policy: PullPolicy::IfNotPresent },
            command: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            working_dir: None,
            ports: Vec::new(),
            resources: Resources { requests: limits, limits },
            volume_mounts: Vec::new(),
            volume_devices: Vec::new(),
            security: SecurityContext::default(),
            tty: false,
            stdin: false,
            stdin_once: false,
            probes: Default::default(),
            lifecycle: Default::default(),
            termination_message: Default::default(),
        }
    }

    fn size(init: &[ContainerSpec], containers: &[ContainerSpec]) -> (u32, u32) {
        let size = vm_size(init, containers).map_err(|e| e.to_string());
        size.map(|s| (s.vcpus, s.memory_mib)).unwrap_or_default()
    }

    #[test]
    fn a_pod_without_limits_has_the_default_size() {
        assert_eq!(size(&[], &[container(MAIN, 0, 0)]), (DEFAULT_VCPUS, DEFAULT_MEMORY_MIB));
    }

    #[test]
    fn containers_add_up_and_cpus_are_rounded_up() {
        let two = [container(MAIN, 700, 64), container(MAIN, 600, 100)];
        assert_eq!(size(&[], &two), (2, 164));
        assert_eq!(size(&[], &[container(MAIN, 1, 64)]), (1, 64));
        assert_eq!(size(&[], &[container(MAIN, 2000, 64)]), (2, 64));
    }

    #[test]
    fn init_containers_count_by_their_maximum() {
        let init = [container(INIT, 3000, 300), container(INIT, 100, 400)];
        assert_eq!(size(&init, &[container(MAIN, 1000, 200)]), (3, 400));
    }

    /// The example of KEP-753 (sidecar containers), "Resources calculation for scheduling".
    #[test]
    fn sidecars_count_from_their_start_on() {
        let init = [
            container(INIT, 5000, 100),
            container(SIDECAR, 1000, 100),
            container(INIT, 10_000, 100),
            container(SIDECAR, 2000, 100),
            container(INIT, 6000, 100),
        ];
        assert_eq!(size(&init, &[container(MAIN, 3000, 100)]).0, 11);
        assert_eq!(size(&init, &[container(MAIN, 9000, 100)]).0, 12);
    }

    #[test]
    fn one_container_without_a_limit_makes_the_default_the_minimum() {
        let small = [container(MAIN, 500, 64), container(MAIN, 0, 0)];
        assert_eq!(size(&[], &small), (1, 512));
        let large = [container(MAIN, 4000, 2048), container(MAIN, 0, 0)];
        assert_eq!(size(&[], &large), (4, 2048));
    }

    #[test]
    fn impossible_sizes_are_refused_with_the_amount() {
        let of = |cpu, memory| vm_size(&[], &[container(MAIN, cpu, memory)]);
        assert_eq!(of(1000, 8), Err(SizeError::MemoryTooSmall { memory: 8 * MIB }));
        assert_eq!(of(64_001, 64), Err(SizeError::TooManyCpus { cpu_millis: 64_001 }));
        assert!(matches!(of(1000, 1 << 21), Err(SizeError::MemoryTooLarge { .. })));
        assert!(matches!(of(1000, u64::MAX), Err(SizeError::MemoryTooLarge { .. })));
        let huge = || container(MAIN, u64::MAX, 64);
        assert!(matches!(vm_size(&[], &[huge(), huge()]), Err(SizeError::TooManyCpus { .. })));
    }
}

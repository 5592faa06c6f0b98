//! What a container may use, as the kubelet tells it to a CRI runtime.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use crate::types::{Amounts, ContainerKind, ContainerSpec, PodSpec, QosClass, Resources};

/// The period over which a CPU limit is enforced, in us.
const CPU_PERIOD_US: u64 = 100_000;

/// Least quota that the kernel takes, in us.
const MIN_QUOTA_US: u64 = 1000;

/// CPU shares: of one CPU, least and most.
const SHARES_PER_CPU: u64 = 1024;
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// The container's cgroup: the CPU limit is its quota, the CPU request its weight, the memory limit
/// its limit. The guest has no swap, so nothing is said about it. Device nodes are closed to it,
/// except those that every runtime opens, unless it is privileged.
pub(super) fn resources(container: &ContainerSpec) -> Result<LinuxResources, OciSpecError> {
    let Resources { requests, limits } = &container.resources;
    let mut cpu = LinuxCpuBuilder::default().shares(shares(requests));
    if let Some(millis) = limits.cpu_millis {
        let quota = (millis.saturating_mul(CPU_PERIOD_US) / 1000).max(MIN_QUOTA_US);
        cpu = cpu.quota(i64::try_from(quota).unwrap_or(i64::MAX)).period(CPU_PERIOD_US);
    }
    let devices = LinuxDeviceCgroupBuilder::default()
        .allow(container.security.privileged)
        .access("rwm")
        .build()?;
    let mut builder = LinuxResourcesBuilder::default().devices(vec![devices]).cpu(cpu.build()?);
    if let Some(bytes) = limits.memory {
        let limit = i64::try_from(bytes).unwrap_or(i64::MAX);
        builder = builder.memory(LinuxMemoryBuilder::default().limit(limit).build()?);
    }
    builder.build()
}

/// Without a request, the least: such containers share what the others leave.
fn shares(requests: &Amounts) -> u64 {
    let millis = requests.cpu_millis.unwrap_or(0);
    (millis.saturating_mul(SHARES_PER_CPU) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

/// Whom the kernel kills first when the guest's memory runs out, as the kubelet computes it
/// (`pkg/kubelet/qos/policy.go`), with the VM's memory for the node's.
pub(super) fn oom_score_adj(pod: &PodSpec, container: &ContainerSpec) -> i32 {
    const GUARANTEED: i32 = -997;
    const BEST_EFFORT: i32 = 1000;
    match pod.qos_class() {
        QosClass::Guaranteed => return GUARANTEED,
        QosClass::BestEffort => return BEST_EFFORT,
        QosClass::Burstable => {}
    }
    let request = |container: &ContainerSpec| container.resources.requests.memory.unwrap_or(0);
    let mut requested = request(container);
    // A sidecar is not killed before the containers that it serves.
    if container.kind == ContainerKind::Sidecar {
        requested = requested.max(pod.containers.iter().map(request).min().unwrap_or(0));
    }
    let capacity = u64::from(pod.vm.memory_mib).saturating_mul(1024 * 1024).max(1);
    let thousandths = requested.saturating_mul(1000) / capacity;
    let adj = BEST_EFFORT.saturating_sub(i32::try_from(thousandths).unwrap_or(i32::MAX));
    // Between those of the other classes.
    adj.clamp(BEST_EFFORT + GUARANTEED, BEST_EFFORT - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_requests_become_shares() {
        for (millis, expected) in [
            (None, 2),
            (Some(1), 2),
            (Some(100), 102),
            (Some(1000), 1024),
            (Some(u64::MAX), 262_144),
        ] {
            assert_eq!(shares(&Amounts { cpu_millis: millis, memory: None }), expected);
        }
    }
}

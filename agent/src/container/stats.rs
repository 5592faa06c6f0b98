//! What containers, the agent and the guest use.

use std::fs;
use std::time::SystemTime;

use husk_proto::agent::{ContainerStats, InterfaceStats, StatsResponse};

use super::{ContainerError, Runner};
use crate::cgroup::{Cgroup, CgroupError};
use crate::lock;

impl Runner {
    /// Reads every number. What an absent controller would give is 0.
    ///
    /// # Errors
    /// [`ContainerError`] naming the file that cannot be read: a number that cannot be had is never
    /// a zero.
    pub(crate) fn stats(&self) -> Result<StatsResponse, ContainerError> {
        let (memory, own) = (read("/proc/meminfo")?, read("/proc/self/status")?);
        let table = lock(&self.table);
        let measure = |(id, container): (&String, &super::Container)| {
            container_stats(id, &container.remains.cgroup)
        };
        let containers = table.containers.iter().map(measure).collect::<Result<_, _>>()?;
        Ok(StatsResponse {
            agent_rss: kib_of(&own, "VmRSS:"),
            memory_total: kib_of(&memory, "MemTotal:"),
            memory_available: kib_of(&memory, "MemAvailable:"),
            containers,
            // The agent's own network namespace is the pod's.
            interfaces: interfaces(&read("/proc/net/dev")?),
            at_ns: crate::epoch_ns(SystemTime::now()),
        })
    }
}

pub(super) fn read(path: &str) -> Result<String, ContainerError> {
    fs::read_to_string(path)
        .map_err(|source| ContainerError::Read { path: path.to_owned(), source })
}

fn container_stats(id: &str, cgroup: &Cgroup) -> Result<ContainerStats, CgroupError> {
    let (cpu, memory) = (cgroup.keyed("cpu.stat")?, cgroup.keyed("memory.stat")?);
    let [io_read_bytes, io_write_bytes, io_read_ops, io_write_ops] =
        cgroup.sums("io.stat", ["rbytes", "wbytes", "rios", "wios"])?;
    Ok(ContainerStats {
        id: id.to_owned(),
        cpu_usage_us: cpu.get("usage_usec"),
        memory_current: cgroup.number("memory.current")?,
        memory_peak: cgroup.number("memory.peak")?,
        oom_kills: cgroup.oom_kills()?,
        pids: cgroup.number("pids.current")?,
        cpu_user_us: cpu.get("user_usec"),
        cpu_system_us: cpu.get("system_usec"),
        cpu_periods: cpu.get("nr_periods"),
        cpu_throttled_periods: cpu.get("nr_throttled"),
        cpu_throttled_us: cpu.get("throttled_usec"),
        memory_limit: cgroup.limit("memory.max")?,
        memory_anon: memory.get("anon"),
        memory_file: memory.get("file"),
        memory_inactive_file: memory.get("inactive_file"),
        memory_active_file: memory.get("active_file"),
        memory_kernel: memory.get("kernel"),
        page_faults: memory.get("pgfault"),
        major_page_faults: memory.get("pgmajfault"),
        swap_current: cgroup.number("memory.swap.current")?,
        pids_limit: cgroup.limit("pids.max")?,
        io_read_bytes,
        io_write_bytes,
        io_read_ops,
        io_write_ops,
    })
}

/// The lines of /proc/net/dev below its two headers: a name, a colon, eight numbers of what was
/// received and eight of what was sent.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let interface = |line: &str| {
        let (name, numbers) = line.rsplit_once(':')?;
        let numbers: Vec<u64> =
            numbers.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        match numbers.as_slice() {
            &[
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                _,
                _,
                _,
                _,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..,
            ] => Some(InterfaceStats {
                name: name.trim().to_owned(),
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
            }),
            _ => None,
        }
    };
    text.lines().filter_map(interface).collect()
}

/// The value of a line `key  number kB`, in bytes; 0 if there is none.
fn kib_of(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_sizes_are_read_in_bytes() {
        let text = "MemTotal:         100 kB\nMemAvailable:   7 kB\n";
        assert_eq!(kib_of(text, "MemTotal:"), 102_400);
        assert_eq!(kib_of(text, "MemFree:"), 0);
    }

    #[test]
    fn interfaces_are_read_with_both_directions() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs \
            drop fifo colls carrier compressed\n    \
            lo:    1  2  3  4    0     0          0         0     5   6    7    8    0     0       \
            0          0\n  eth0:9 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\nbad: 1 2\n";
        let all = interfaces(text);
        let [lo, eth0] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!((lo.name.as_str(), eth0.name.as_str()), ("lo", "eth0"));
        assert_eq!((lo.rx_bytes, lo.rx_packets, lo.rx_errors, lo.rx_dropped), (1, 2, 3, 4));
        assert_eq!((lo.tx_bytes, lo.tx_packets, lo.tx_errors, lo.tx_dropped), (5, 6, 7, 8));
        assert_eq!(eth0.rx_bytes, 9);
    }
}

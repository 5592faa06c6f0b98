//! The specification's resources as the files of cgroup v2, converted as runc converts them. Pure:
//! nothing is written here.

use crate::container::spec::{BlockIo, Cpu, HugepageLimit, Memory, Resources, SpecError};

/// A file of a cgroup, what to write into it, and the field of the specification that asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) field: String,
    pub(crate) file: String,
    pub(crate) value: String,
    pub(crate) if_absent: IfAbsent,
}

/// What a setting means where the kernel lacks its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum IfAbsent {
    /// It cannot be honoured.
    Refuse,
    /// There is nothing that it could limit.
    Skip,
    /// The same is said by another value in another file.
    Instead { file: String, value: String },
}

/// Most entries of a list of resources: each costs a write at least.
const MAX_ENTRIES: usize = 256;

/// CPU weight of cgroup v2 (1 to 10000) for shares of v1 (2 to 262144), by the linear mapping that
/// the kubelet, runc and crun use. 0 means unset, and gives 0.
pub(crate) fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        shares => 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142,
    }
}

/// A weight of `io.weight` (1 to 10000) for one of cgroup v1 (10 to 1000), by runc's mapping.
fn io_weight(weight: u16) -> u32 {
    1 + (u32::from(weight).clamp(10, 1000) - 10) * 9_999 / 990
}

/// A limit as cgroup v2 writes it: "max" for what is not limited.
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// The settings so far.
#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn push(&mut self, field: &str, file: impl Into<String>, value: impl ToString) {
        self.push_or(IfAbsent::Refuse, field, file, value);
    }

    fn push_or(
        &mut self,
        if_absent: IfAbsent,
        field: &str,
        file: impl Into<String>,
        value: impl ToString,
    ) {
        let (file, value) = (file.into(), value.to_string());
        let field = format!("linux.resources.{field}");
        self.0.push(Setting { field, file, value, if_absent });
    }
}

/// All files that `resources` sets, in the order in which they must be written. 0 means unset, as
/// in runc.
///
/// # Errors
/// [`SpecError::Invalid`] for values that cgroup v2 cannot express.
pub(crate) fn settings(resources: &Resources) -> Result<Vec<Setting>, SpecError> {
    // The rules of devices are no file: see `devices`.
    let Resources { devices: _, memory, cpu, pids, block_io, hugepage_limits, unified } = resources;
    let mut all = Settings::default();
    if let Some(pids) = pids.filter(|p| p.limit != 0) {
        all.push("pids.limit", "pids.max", limit(pids.limit));
    }
    set_memory(&mut all, memory)?;
    set_block_io(&mut all, block_io)?;
    set_cpu(&mut all, cpu);
    set_hugepages(&mut all, hugepage_limits)?;
    check_count("unified", unified.len())?;
    for (file, value) in unified {
        check_unified(file)?;
        // A file of several keys takes one at a time.
        for line in value.lines() {
            all.push(&format!("unified[{file:?}]"), file, line);
        }
    }
    Ok(all.0)
}

fn check_count(field: &str, count: usize) -> Result<(), SpecError> {
    if count <= MAX_ENTRIES {
        return Ok(());
    }
    let field = format!("linux.resources.{field}");
    Err(SpecError::invalid(field, count.to_string(), "at most 256 entries"))
}

/// Whether `file` is one of this cgroup's own that says what it may use. Those of the cgroup itself
/// move processes, freeze and kill: only its two limits are resources.
fn check_unified(file: &str) -> Result<(), SpecError> {
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let named = file.split_once('.').is_some_and(|(controller, parameter)| {
        !controller.is_empty() && !parameter.is_empty() && file.bytes().all(good)
    });
    let own_limit = matches!(file, "cgroup.max.depth" | "cgroup.max.descendants");
    if named && (own_limit || !file.starts_with("cgroup.")) {
        return Ok(());
    }
    let reason = "must name a controller's file, as memory.high";
    Err(SpecError::invalid("linux.resources.unified", file, reason))
}

fn set_memory(all: &mut Settings, memory: &Memory) -> Result<(), SpecError> {
    // The check before an update is the update's; see `Cgroup::update`.
    let Memory { limit: max, reservation, swap, disable_oom_killer, check_before_update: _ } =
        *memory;
    if disable_oom_killer {
        let field = "linux.resources.memory.disableOOMKiller";
        return Err(SpecError::invalid(field, "true", "cgroup v2 can only have false"));
    }
    let (max, swap) = (max.unwrap_or(0), swap.unwrap_or(0));
    if let Some(value) = swap_only(swap, max)? {
        // Without swap there is nothing that a limit of it could limit.
        all.push_or(IfAbsent::Skip, "memory.swap", "memory.swap.max", value);
    }
    if max != 0 {
        all.push("memory.limit", "memory.max", limit(max));
    }
    if let Some(value) = reservation.filter(|v| *v != 0) {
        all.push("memory.reservation", "memory.low", limit(value));
    }
    Ok(())
}

/// The swap limit of v2, which is of swap alone, for that of v1, which is of memory and swap. None
/// leaves it as it is.
fn swap_only(both: i64, memory: i64) -> Result<Option<String>, SpecError> {
    let invalid =
        |reason| Err(SpecError::invalid("linux.resources.memory.swap", both.to_string(), reason));
    match (both, memory) {
        // No limit of memory and none given for swap: both are meant to be free, as in v1.
        (0, ..0) | (..0, _) => Ok(Some("max".into())),
        (0, _) => Ok(None),
        (_, ..=0) => invalid("needs a memory limit beside it"),
        _ if both < memory => invalid("must not be below the limit"),
        _ => Ok(Some((both.saturating_sub(memory)).to_string())),
    }
}

fn set_cpu(all: &mut Settings, cpu: &Cpu) {
    let Cpu { shares, quota, period, burst, idle, cpus, mems } = cpu;
    if let Some(value) = idle {
        all.push("cpu.idle", "cpu.idle", value);
    }
    // The weight is ignored, and its writing refused, while a cgroup is idle.
    if let Some(weight) = shares.map(weight_of_shares).filter(|w| *w != 0)
        && idle.unwrap_or(0) == 0
    {
        all.push("cpu.shares", "cpu.weight", weight);
    }
    if let Some(burst) = burst {
        all.push("cpu.burst", "cpu.max.burst", burst);
    }
    let (quota, period) = (quota.unwrap_or(0), period.unwrap_or(0));
    if quota != 0 || period != 0 {
        let quota = if quota > 0 { quota.to_string() } else { "max".into() };
        // Without a period the cgroup keeps the one that it has: at first 100 ms, as in v1.
        let period = if period == 0 { String::new() } else { format!(" {period}") };
        all.push("cpu.quota", "cpu.max", quota + &period);
    }
    for (field, file, value) in
        [("cpu.cpus", "cpuset.cpus", cpus), ("cpu.mems", "cpuset.mems", mems)]
    {
        if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
            all.push(field, file, value);
        }
    }
}

fn set_block_io(all: &mut Settings, block_io: &BlockIo) -> Result<(), SpecError> {
    let BlockIo { weight, weight_device, read_bps, write_bps, read_iops, write_iops } = block_io;
    let check = |field: &str, weight: u16| match weight {
        10..=1000 => Ok(()),
        other => {
            let field = format!("linux.resources.{field}");
            Err(SpecError::invalid(field, other.to_string(), "must be 10 to 1000"))
        }
    };
    // The weight of the BFQ scheduler, where the kernel has it, is that of v1.
    let mut set = |field: &str, device: &str, weight: u16| {
        let value = format!("{device}{}", io_weight(weight));
        let instead = IfAbsent::Instead { file: "io.weight".into(), value };
        all.push_or(instead, field, "io.bfq.weight", format!("{device}{weight}"));
    };
    if let Some(weight) = weight.filter(|w| *w != 0) {
        check("blockIO.weight", weight)?;
        set("blockIO.weight", "", weight);
    }
    check_count("blockIO.weightDevice", weight_device.len())?;
    for (index, device) in weight_device.iter().enumerate() {
        let field = format!("blockIO.weightDevice[{index}].weight");
        if let Some(weight) = device.weight.filter(|w| *w != 0) {
            check(&field, weight)?;
            set(&field, &format!("{}:{} ", device.major, device.minor), weight);
        }
    }
    for (field, key, limits) in [
        ("blockIO.throttleReadBpsDevice", "rbps", read_bps),
        ("blockIO.throttleWriteBpsDevice", "wbps", write_bps),
        ("blockIO.throttleReadIOPSDevice", "riops", read_iops),
        ("blockIO.throttleWriteIOPSDevice", "wiops", write_iops),
    ] {
        check_count(field, limits.len())?;
        for (index, limit) in limits.iter().enumerate() {
            let field = format!("{field}[{index}]");
            if limit.rate == 0 {
                let field = format!("linux.resources.{field}.rate");
                return Err(SpecError::invalid(field, "0", "must be positive"));
            }
            let value = format!("{}:{} {key}={}", limit.major, limit.minor, limit.rate);
            all.push(&field, "io.max", value);
        }
    }
    Ok(())
}

fn set_hugepages(all: &mut Settings, limits: &[HugepageLimit]) -> Result<(), SpecError> {
    check_count("hugepageLimits", limits.len())?;
    for (index, HugepageLimit { page_size, limit }) in limits.iter().enumerate() {
        let field = format!("hugepageLimits[{index}]");
        let number = ["KB", "MB", "GB"].iter().find_map(|unit| page_size.strip_suffix(unit));
        let digits =
            |n: &str| !n.is_empty() && n.len() < 8 && n.bytes().all(|c| c.is_ascii_digit());
        if !number.is_some_and(digits) {
            let field = format!("linux.resources.{field}.pageSize");
            return Err(SpecError::invalid(field, page_size, "must be a size, as 2MB"));
        }
        all.push(&field, format!("hugetlb.{page_size}.max"), limit);
        // Reservations are limited too, so that a fault does not meet the limit first (SIGBUS).
        // Not every kernel counts them.
        all.push_or(IfAbsent::Skip, &field, format!("hugetlb.{page_size}.rsvd.max"), limit);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn of(resources: Value) -> Result<Vec<Setting>, SpecError> {
        settings(&serde_json::from_value(resources).unwrap())
    }

    fn pairs(resources: Value) -> Vec<(String, String)> {
        of(resources).unwrap().into_iter().map(|s| (s.file, s.value)).collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    fn refusal(resources: Value) -> String {
        of(resources).unwrap_err().to_string()
    }

    #[test]
    fn shares_map_to_weights_as_in_the_kubelet() {
        for (shares, weight) in [(0, 0), (1, 1), (2, 1), (1024, 39), (2048, 79), (262_144, 10_000)]
        {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    proptest! {
        #[test]
        fn any_shares_give_a_weight_that_the_kernel_takes(shares in 1_u64..) {
            prop_assert!((1..=10_000).contains(&weight_of_shares(shares)));
        }

        #[test]
        fn a_name_of_unified_never_leads_elsewhere(file in ".{0,20}") {
            if check_unified(&file).is_ok() {
                prop_assert!(!file.contains('/') && !file.starts_with('.') && file != "cgroup.procs");
            }
        }
    }

    #[test]
    fn memory_limits_are_translated() {
        assert_eq!(
            pairs(json!({"memory": {"limit": 1000, "reservation": 500, "swap": 1500}})),
            [pair("memory.swap.max", "500"), pair("memory.max", "1000"), pair("memory.low", "500"),]
        );
        let unlimited = [pair("memory.swap.max", "max"), pair("memory.max", "max")];
        assert_eq!(pairs(json!({"memory": {"limit": -1, "swap": -1}})), unlimited);
        assert_eq!(pairs(json!({"memory": {"limit": -1}})), unlimited, "swap too, as in v1");
        assert_eq!(pairs(json!({"memory": {"limit": 7}})), [pair("memory.max", "7")]);
        assert_eq!(pairs(json!({"memory": {"limit": 0, "swap": 0, "reservation": 0}})), []);
        assert_eq!(pairs(json!({"memory": {"swap": -1}})), [pair("memory.swap.max", "max")]);
        assert!(refusal(json!({"memory": {"limit": 1000, "swap": 999}})).contains("memory.swap"));
        assert!(refusal(json!({"memory": {"swap": 999}})).contains("memory.swap"));
        assert!(refusal(json!({"memory": {"limit": -1, "swap": 999}})).contains("memory.swap"));
        let message = refusal(json!({"memory": {"disableOOMKiller": true}}));
        assert!(message.contains("disableOOMKiller"), "{message}");
    }

    #[test]
    fn cpu_quota_and_period_make_one_file() {
        let max = |cpu: Value| pairs(json!({ "cpu": cpu }));
        assert_eq!(
            max(json!({"quota": 50000, "period": 100000, "burst": 10000})),
            [pair("cpu.max.burst", "10000"), pair("cpu.max", "50000 100000")]
        );
        assert_eq!(max(json!({"quota": -1})), [pair("cpu.max", "max")]);
        assert_eq!(max(json!({"quota": 0, "period": 0})), []);
        assert_eq!(max(json!({"period": 10000})), [pair("cpu.max", "max 10000")]);
        assert_eq!(
            max(json!({"idle": 1, "shares": 2})),
            [pair("cpu.idle", "1")],
            "an idle cgroup refuses a weight"
        );
        assert_eq!(max(json!({"cpus": "0-1", "mems": ""})), [pair("cpuset.cpus", "0-1")]);
    }

    #[test]
    fn weights_of_disks_are_those_of_bfq_or_converted() {
        let all = of(json!({"blockIO": {"weight": 500,
            "weightDevice": [{"major": 8, "minor": 16, "weight": 10}]}}))
        .unwrap();
        let instead =
            |value: &str| IfAbsent::Instead { file: "io.weight".into(), value: value.into() };
        let seen: Vec<_> =
            all.iter().map(|s| (s.file.as_str(), s.value.as_str(), s.if_absent.clone())).collect();
        assert_eq!(
            seen,
            [
                ("io.bfq.weight", "500", instead("4950")),
                ("io.bfq.weight", "8:16 10", instead("8:16 1")),
            ]
        );
        for (weight, converted) in [(10, 1), (100, 910), (1000, 10_000)] {
            assert_eq!(io_weight(weight), converted);
        }
        assert!(refusal(json!({"blockIO": {"weight": 9}})).contains("blockIO.weight"));
    }

    #[test]
    fn throttles_become_io_max() {
        let device = |rate: u64| json!([{"major": 254, "minor": 0, "rate": rate}]);
        assert_eq!(
            pairs(json!({"blockIO": {
                "throttleReadBpsDevice": device(1), "throttleWriteBpsDevice": device(2),
                "throttleReadIOPSDevice": device(3), "throttleWriteIOPSDevice": device(4),
            }})),
            [
                pair("io.max", "254:0 rbps=1"),
                pair("io.max", "254:0 wbps=2"),
                pair("io.max", "254:0 riops=3"),
                pair("io.max", "254:0 wiops=4"),
            ]
        );
        let message = refusal(json!({"blockIO": {"throttleReadBpsDevice": device(0)}}));
        assert!(message.contains("blockIO.throttleReadBpsDevice[0].rate"), "{message}");
    }

    #[test]
    fn hugepages_are_limited_by_page_size() {
        assert_eq!(
            pairs(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]})),
            [pair("hugetlb.2MB.max", "4194304"), pair("hugetlb.2MB.rsvd.max", "4194304")]
        );
        for bad in ["", "2", "MB", "../2MB", "2mb", "2 MB"] {
            let message = refusal(json!({"hugepageLimits": [{"pageSize": bad, "limit": 0}]}));
            assert!(message.contains("hugepageLimits[0].pageSize"), "{message}");
        }
    }

    #[test]
    fn pids_and_unified_are_written_as_given() {
        assert_eq!(
            pairs(json!({"pids": {"limit": -1}, "unified": {"io.max": "8:0 rbps=1\n8:16 rbps=2"}})),
            [pair("pids.max", "max"), pair("io.max", "8:0 rbps=1"), pair("io.max", "8:16 rbps=2")]
        );
        assert_eq!(pairs(json!({"pids": {"limit": 0}})), [], "0 is unset, as in runc");
        let own = json!({"unified": {"cgroup.max.descendants": "5"}});
        assert_eq!(pairs(own), [pair("cgroup.max.descendants", "5")]);
        for file in ["../x.y", "memory", "cgroup.procs", "cgroup.freeze", "a/b.c", ".x", "..", "x."]
        {
            let message = refusal(json!({"unified": {file: "1"}}));
            assert!(message.contains("unified") && message.contains(file), "{message}");
        }
    }

    #[test]
    fn lists_without_end_are_refused() {
        let device = json!({"major": 8, "minor": 0, "rate": 1});
        let many = vec![device; MAX_ENTRIES + 1];
        let message = refusal(json!({"blockIO": {"throttleReadBpsDevice": many}}));
        assert!(message.contains("throttleReadBpsDevice"), "{message}");
    }
}

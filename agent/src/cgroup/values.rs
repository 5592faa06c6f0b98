//! The specification's resources as the files of cgroup v2. Pure: nothing is written here.

use crate::container::spec::{Resources, SpecError};

/// A file of a cgroup and what to write into it.
pub(crate) type Setting = (String, String);

/// CPU weight of cgroup v2 (1 to 10000) for shares of v1 (2 to 262144), by the linear mapping that
/// the kubelet, runc and crun use. 0 means unset, and gives 0.
pub(crate) fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        shares => 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142,
    }
}

/// A limit as cgroup v2 writes it: "max" for what is not limited.
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// All files that `resources` sets, in the order in which they must be written.
///
/// # Errors
/// [`SpecError::Invalid`] for values that cgroup v2 cannot express.
pub(crate) fn settings(resources: &Resources) -> Result<Vec<Setting>, SpecError> {
    let mut all: Vec<Setting> = Vec::new();
    let mut set = |file: &str, value: String| all.push((file.to_owned(), value));

    let memory = &resources.memory;
    if let Some(value) = memory.limit.filter(|v| *v != 0) {
        set("memory.max", limit(value));
    }
    if let Some(value) = memory.reservation.filter(|v| *v != 0) {
        set("memory.low", limit(value));
    }
    if let Some(both) = memory.swap.filter(|v| *v != 0) {
        set("memory.swap.max", swap_only(both, memory.limit)?);
    }

    let cpu = &resources.cpu;
    // The weight is ignored, and its writing refused, while a cgroup is idle.
    if let Some(value) = cpu.idle {
        set("cpu.idle", value.to_string());
    }
    if let Some(weight) = cpu.shares.map(weight_of_shares).filter(|w| *w != 0)
        && cpu.idle.unwrap_or(0) == 0
    {
        set("cpu.weight", weight.to_string());
    }
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = cpu.quota.filter(|q| *q > 0).map_or("max".into(), |q| q.to_string());
        let period = cpu.period.filter(|p| *p != 0).map_or(String::new(), |p| format!(" {p}"));
        set("cpu.max", format!("{quota}{period}"));
    }
    if let Some(burst) = cpu.burst {
        set("cpu.max.burst", burst.to_string());
    }
    if let Some(cpus) = &cpu.cpus {
        set("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = &cpu.mems {
        set("cpuset.mems", mems.clone());
    }

    if let Some(pids) = resources.pids {
        set("pids.max", if pids.limit > 0 { pids.limit.to_string() } else { "max".into() });
    }

    for (file, value) in &resources.unified {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            let reason = "must name a controller's file, as memory.high";
            return Err(SpecError::invalid("linux.resources.unified", file, reason));
        }
        set(file, value.clone());
    }
    Ok(all)
}

/// The swap limit of v2, which is of swap alone, for that of v1, which is of memory and swap.
fn swap_only(both: i64, memory: Option<i64>) -> Result<String, SpecError> {
    let field = "linux.resources.memory.swap";
    match memory {
        _ if both < 0 => Ok("max".into()),
        Some(memory) if memory > 0 => match both.checked_sub(memory) {
            Some(swap) if swap >= 0 => Ok(swap.to_string()),
            _ => Err(SpecError::invalid(field, both.to_string(), "must not be below the limit")),
        },
        _ => Err(SpecError::invalid(field, both.to_string(), "needs a memory limit beside it")),
    }
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
        of(resources).unwrap()
    }

    fn setting(file: &str, value: &str) -> Setting {
        (file.into(), value.into())
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
    }

    #[test]
    fn memory_limits_are_translated() {
        assert_eq!(
            pairs(json!({"memory": {"limit": 1000, "reservation": 500, "swap": 1500}})),
            [
                setting("memory.max", "1000"),
                setting("memory.low", "500"),
                setting("memory.swap.max", "500")
            ]
        );
        assert_eq!(
            pairs(json!({"memory": {"limit": -1, "swap": -1}})),
            [setting("memory.max", "max"), setting("memory.swap.max", "max")]
        );
        assert!(of(json!({"memory": {"limit": 1000, "swap": 999}})).is_err());
        assert!(of(json!({"memory": {"swap": 999}})).is_err());
    }

    #[test]
    fn cpu_quota_and_period_make_one_file() {
        let max = |cpu: Value| pairs(json!({ "cpu": cpu }));
        assert_eq!(
            max(json!({"quota": 50000, "period": 100000})),
            [setting("cpu.max", "50000 100000")]
        );
        assert_eq!(max(json!({"quota": -1})), [setting("cpu.max", "max")]);
        assert_eq!(max(json!({"period": 10000})), [setting("cpu.max", "max 10000")]);
        assert_eq!(
            max(json!({"idle": 1, "shares": 2})),
            [setting("cpu.idle", "1")],
            "an idle cgroup refuses a weight"
        );
    }

    #[test]
    fn pids_and_unified_are_written_as_given() {
        assert_eq!(
            pairs(json!({"pids": {"limit": 0}, "unified": {"memory.high": "7"}})),
            [setting("pids.max", "max"), setting("memory.high", "7")]
        );
        for file in ["../x.y", "memory", "cgroup.procs"] {
            assert!(of(json!({"unified": {file: "1"}})).is_err(), "{file}");
        }
    }
}

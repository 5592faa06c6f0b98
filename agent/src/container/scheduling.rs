//! How the kernel is to schedule a process: `process.scheduler`, `process.ioPriority`,
//! `process.execCPUAffinity`, and `linux.personality`, which is of the same kind.

use rustix::thread::CpuSet;
use serde::Deserialize;

use super::process::{StepError, step};
use super::spec::SpecError;
use crate::sys::{self, SchedAttr};

/// `process.scheduler`
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Scheduler {
    policy: String,
    #[serde(default)]
    nice: i32,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    flags: Vec<String>,
    /// These three in nanoseconds.
    #[serde(default)]
    runtime: u64,
    #[serde(default)]
    deadline: u64,
    #[serde(default)]
    period: u64,
}

/// `process.ioPriority`
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct IoPriority {
    class: String,
    #[serde(default)]
    priority: i32,
}

/// `process.execCPUAffinity`: lists of CPUs, as `0-3,7`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ExecCpuAffinity {
    initial: Option<String>,
    #[serde(rename = "final")]
    last: Option<String>,
}

/// `linux.personality`
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Personality {
    domain: String,
    #[serde(default)]
    flags: Vec<String>,
}

/// `SCHED_*` of linux/sched.h.
const OTHER: u32 = 0;
const FIFO: u32 = 1;
const RR: u32 = 2;
const BATCH: u32 = 3;
const IDLE: u32 = 5;
const DEADLINE: u32 = 6;

/// How a process is scheduled that is not told otherwise.
const DEFAULT: SchedAttr =
    SchedAttr { policy: OTHER, flags: 0, nice: 0, priority: 0, runtime: 0, deadline: 0, period: 0 };

/// `SCHED_FLAG_*` of linux/sched.h.
const FLAGS: [(&str, u64); 5] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
];

/// `PER_*` of linux/personality.h.
const PER_LINUX: u32 = 0;
const PER_LINUX32: u32 = 8;

/// Understands a scheduler; `prefix` is put before the field's name.
///
/// # Errors
/// [`SpecError`] naming the field.
pub(crate) fn scheduler(given: &Scheduler, prefix: &str) -> Result<SchedAttr, SpecError> {
    let field = |name: &str| format!("{prefix}scheduler.{name}");
    let invalid =
        |name: &str, value: String, reason| Err(SpecError::invalid(field(name), value, reason));
    let policy = match given.policy.as_str() {
        "SCHED_OTHER" => OTHER,
        "SCHED_FIFO" => FIFO,
        "SCHED_RR" => RR,
        "SCHED_BATCH" => BATCH,
        "SCHED_IDLE" => IDLE,
        "SCHED_DEADLINE" => DEADLINE,
        "SCHED_ISO" => {
            return invalid("policy", given.policy.clone(), "is reserved: Linux does not have it");
        }
        _ => return invalid("policy", given.policy.clone(), "must be a policy, as SCHED_BATCH"),
    };
    let mut flags = 0;
    for name in &given.flags {
        match FLAGS.iter().find(|(n, _)| n == name) {
            Some((_, flag)) => flags |= flag,
            None if name.starts_with("SCHED_FLAG_UTIL_CLAMP") => {
                let reason = "is not supported: the guest's kernel does not clamp utilization";
                return invalid("flags", name.clone(), reason);
            }
            None => {
                return invalid(
                    "flags",
                    name.clone(),
                    "must be a flag, as SCHED_FLAG_RESET_ON_FORK",
                );
            }
        }
    }
    if !(-20..=19).contains(&given.nice) {
        return invalid("nice", given.nice.to_string(), "must be -20 to 19");
    }
    let priority = match (policy, given.priority) {
        (FIFO | RR, 1..=99) => given.priority.unsigned_abs(),
        (FIFO | RR, other) => return invalid("priority", other.to_string(), "must be 1 to 99"),
        (_, 0) => 0,
        (_, other) => {
            return invalid("priority", other.to_string(), "needs SCHED_FIFO or SCHED_RR");
        }
    };
    for (name, value) in
        [("runtime", given.runtime), ("deadline", given.deadline), ("period", given.period)]
    {
        if policy != DEADLINE && value != 0 {
            return invalid(name, value.to_string(), "needs SCHED_DEADLINE");
        }
    }
    Ok(SchedAttr {
        policy,
        flags,
        nice: given.nice,
        priority,
        runtime: given.runtime,
        deadline: given.deadline,
        period: given.period,
    })
}

/// Understands an I/O priority: the argument of ioprio_set(2).
///
/// # Errors
/// [`SpecError`] naming the field.
pub(crate) fn io_priority(given: &IoPriority, prefix: &str) -> Result<u16, SpecError> {
    /// IOPRIO_CLASS_SHIFT of linux/ioprio.h.
    const CLASS_SHIFT: u32 = 13;
    let class: u16 = match given.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => {
            let reason = "must be IOPRIO_CLASS_RT, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE";
            return Err(SpecError::invalid(format!("{prefix}ioPriority.class"), other, reason));
        }
    };
    match u16::try_from(given.priority) {
        Ok(priority @ 0..=7) => Ok((class << CLASS_SHIFT) | priority),
        _ => {
            let field = format!("{prefix}ioPriority.priority");
            Err(SpecError::invalid(field, given.priority.to_string(), "must be 0 to 7"))
        }
    }
}

/// On which CPUs an exec is made, and on which it then runs; None leaves that as it is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Affinity {
    /// Before the process is in the container's cgroup: those of the agent, while it makes it.
    pub(crate) initial: Option<CpuSet>,
    pub(crate) last: Option<CpuSet>,
}

/// Understands the affinity of an exec.
///
/// # Errors
/// [`SpecError`] naming the field.
pub(crate) fn affinity(given: &ExecCpuAffinity, prefix: &str) -> Result<Affinity, SpecError> {
    let list = |name: &str, text: &Option<String>| {
        let Some(text) = text.as_deref().filter(|t| !t.is_empty()) else { return Ok(None) };
        let reason = "must be a list of CPUs below 1024, as 0-3,7";
        let field = format!("{prefix}execCPUAffinity.{name}");
        cpus(text).map(Some).ok_or_else(|| SpecError::invalid(field, text, reason))
    };
    Ok(Affinity { initial: list("initial", &given.initial)?, last: list("final", &given.last)? })
}

/// The CPUs of a list: numbers, and ranges of them, separated by commas.
fn cpus(text: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
            digits.then(|| text.parse::<usize>().ok())?.filter(|n| *n < CpuSet::MAX_CPU)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Some(set)
}

/// Understands an execution domain: the argument of personality(2).
///
/// # Errors
/// [`SpecError`] naming the field.
pub(crate) fn personality(given: &Personality) -> Result<u32, SpecError> {
    if let Some(flag) = given.flags.first() {
        let reason = "must be empty: the specification defines none";
        return Err(SpecError::invalid("linux.personality.flags", flag, reason));
    }
    match given.domain.as_str() {
        "LINUX" => Ok(PER_LINUX),
        "LINUX32" => Ok(PER_LINUX32),
        other => {
            let reason = "must be LINUX or LINUX32";
            Err(SpecError::invalid("linux.personality.domain", other, reason))
        }
    }
}

/// Lets the agent's thread, and the threads that it starts, run when they have something to do
/// without taking the CPU from whoever made that so: a process that writes line by line is not
/// interrupted at each, but when its pipe is full, it waits, or its slice is over, and its output
/// travels in large pieces. Latency while the CPU has nothing else to do is the same.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn let_the_containers_go_first() -> std::io::Result<()> {
    sys::sched_setattr(&SchedAttr { policy: BATCH, ..DEFAULT })
}

/// Keeps the agent on some CPUs until it is dropped.
pub(crate) struct OnCpus {
    before: Option<CpuSet>,
}

impl OnCpus {
    /// Goes to these CPUs, or stays.
    ///
    /// # Errors
    /// If there are none of these.
    pub(crate) fn go(cpus: Option<CpuSet>) -> Result<Self, StepError> {
        let Some(cpus) = cpus else { return Ok(Self { before: None }) };
        let before = rustix::thread::sched_getaffinity(None)
            .map_err(step("execCPUAffinity.initial: read the agent's own"))?;
        rustix::thread::sched_setaffinity(None, &cpus).map_err(step("execCPUAffinity.initial"))?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for OnCpus {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = rustix::thread::sched_setaffinity(None, &before)
        {
            tracing::error!(%error, "the agent stays on the CPUs of an exec");
        }
    }
}

/// Sets what has been understood, for this process.
///
/// # Errors
/// [`StepError`] naming the field.
pub(crate) fn apply(
    scheduler: Option<&SchedAttr>,
    io_priority: Option<u16>,
    cpus: Option<&CpuSet>,
) -> Result<(), StepError> {
    if let Some(cpus) = cpus {
        rustix::thread::sched_setaffinity(None, cpus).map_err(step("execCPUAffinity.final"))?;
    }
    // First, and also without a scheduler in the configuration: the agent's own is not for its
    // children, nor is it what SCHED_FLAG_KEEP_POLICY keeps.
    sys::sched_setattr(&DEFAULT).map_err(step("scheduler"))?;
    if let Some(scheduler) = scheduler {
        sys::sched_setattr(scheduler).map_err(step("scheduler"))?;
    }
    if let Some(priority) = io_priority {
        sys::ioprio_set(priority).map_err(step("ioPriority"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn scheduled(json: Value) -> Result<SchedAttr, SpecError> {
        scheduler(&serde_json::from_value(json).unwrap(), "process.")
    }

    #[test]
    fn schedulers_are_understood() {
        let attr = scheduled(json!({"policy": "SCHED_BATCH", "nice": 7})).unwrap();
        assert_eq!((attr.policy, attr.nice), (3, 7));
        let attr = scheduled(
            json!({"policy": "SCHED_RR", "priority": 9, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
        )
        .unwrap();
        assert_eq!((attr.policy, attr.priority, attr.flags), (2, 9, 1));
        let attr = scheduled(
            json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3}),
        )
        .unwrap();
        assert_eq!((attr.runtime, attr.deadline, attr.period), (1, 2, 3));
    }

    #[test]
    fn impossible_schedulers_are_refused_by_name() {
        for (json, field) in [
            (json!({"policy": "SCHED_ISO"}), "process.scheduler.policy"),
            (json!({"policy": "FIFO"}), "process.scheduler.policy"),
            (json!({"policy": "SCHED_FIFO"}), "process.scheduler.priority"),
            (json!({"policy": "SCHED_FIFO", "priority": 100}), "process.scheduler.priority"),
            (json!({"policy": "SCHED_OTHER", "priority": 1}), "process.scheduler.priority"),
            (json!({"policy": "SCHED_OTHER", "nice": 20}), "process.scheduler.nice"),
            (json!({"policy": "SCHED_OTHER", "runtime": 1}), "process.scheduler.runtime"),
            (
                json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"]}),
                "process.scheduler.flags",
            ),
        ] {
            let message = scheduled(json).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn io_priorities_have_their_class_in_the_upper_bits() {
        let priority = |class: &str, priority: i32| {
            io_priority(&IoPriority { class: class.into(), priority }, "process.")
        };
        assert_eq!(priority("IOPRIO_CLASS_BE", 7).unwrap(), 0x4007);
        assert_eq!(priority("IOPRIO_CLASS_IDLE", 0).unwrap(), 0x6000);
        assert!(priority("IOPRIO_CLASS_RT", 8).unwrap_err().to_string().contains("ioPriority"));
        assert!(priority("RT", 0).unwrap_err().to_string().contains("process.ioPriority.class"));
    }

    #[test]
    fn lists_of_cpus_are_understood() {
        let list = |text| {
            let set: CpuSet = cpus(text)?;
            Some((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>())
        };
        assert_eq!(list("0-3,7"), Some(vec![0, 1, 2, 3, 7]));
        assert_eq!(list("1023"), Some(vec![1023]));
        for bad in ["", ",", "1-", "-1", "3-1", "1024", "0-4294967295", "a", "+1", "1,,2"] {
            assert_eq!(list(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn domains_are_understood() {
        let domain = |domain: &str, flags: &[&str]| {
            personality(&Personality {
                domain: domain.into(),
                flags: flags.iter().map(|f| (*f).into()).collect(),
            })
        };
        assert_eq!(domain("LINUX", &[]).unwrap(), 0);
        assert_eq!(domain("LINUX32", &[]).unwrap(), 8);
        assert!(domain("LINUX64", &[]).unwrap_err().to_string().contains("personality.domain"));
        assert!(domain("LINUX", &["X"]).unwrap_err().to_string().contains("personality.flags"));
    }

    proptest! {
        #[test]
        fn hostile_lists_never_panic(text in "[0-9,-]{0,20}") {
            if let Some(set) = cpus(&text) {
                prop_assert!(set.count() > 0);
            }
        }
    }
}

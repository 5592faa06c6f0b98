//! `linux.seccomp`: understood, and what it means.

use serde::Deserialize;

use super::abi::{self, Abi};
use crate::container::spec::SpecError;

/// `linux.seccomp` as given.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Seccomp {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Syscalls>,
    /// Both only for notification, which there is none of: must be empty.
    listener_path: Option<String>,
    listener_metadata: Option<String>,
}

/// One element of `linux.seccomp.syscalls`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Syscalls {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Vec<Argument>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// What the kernel is to do with a call: a `SECCOMP_RET_*` value of linux/seccomp.h, with its data.
pub(super) type Action = u32;

pub(super) const KILL_THREAD: Action = 0;
const KILL_PROCESS: Action = 0x8000_0000;
const TRAP: Action = 0x0003_0000;
const ERRNO: Action = 0x0005_0000;
const TRACE: Action = 0x7ff0_0000;
const LOG: Action = 0x7ffc_0000;
pub(super) const ALLOW: Action = 0x7fff_0000;
/// What a call answers that the profile's author cannot have known.
pub(super) const ENOSYS: Action = ERRNO | libc::ENOSYS.unsigned_abs();

/// The upper half of an [`Action`].
const KIND: u32 = 0xffff_0000;

/// How one argument is compared with constants; always without sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Test {
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Equal(u64),
    GreaterOrEqual(u64),
    Greater(u64),
    MaskedEqual { mask: u64, value: u64 },
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Condition {
    /// 0 to 5.
    pub(super) argument: u8,
    pub(super) test: Test,
}

/// What happens to calls of these names of which all conditions hold.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) names: Vec<String>,
    pub(super) conditions: Vec<Condition>,
    pub(super) action: Action,
}

/// A profile, understood.
#[derive(Debug, Clone)]
pub(super) struct Profile {
    pub(super) default: Action,
    /// Always with the machine's own.
    pub(super) abis: Vec<Abi>,
    /// In the order of the profile.
    pub(super) rules: Vec<Rule>,
    /// For `seccomp(2)`: `SECCOMP_FILTER_FLAG_*`.
    pub(super) flags: u32,
}

/// Flags that mean something without a listener.
const FLAGS: [(&str, libc::c_ulong); 3] = [
    ("SECCOMP_FILTER_FLAG_TSYNC", libc::SECCOMP_FILTER_FLAG_TSYNC),
    ("SECCOMP_FILTER_FLAG_LOG", libc::SECCOMP_FILTER_FLAG_LOG),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
];

/// Most names in a profile. Linux has about 600 calls, of which a profile may speak several times.
const MAX_NAMES: usize = 16_384;

/// Arguments of a system call.
const ARGUMENTS: u32 = 6;

/// Largest error number that the kernel returns (MAX_ERRNO).
const MAX_ERRNO: u32 = 4095;

/// Largest number that an action can carry (SECCOMP_RET_DATA).
const MAX_DATA: u32 = 0xffff;

/// The field under `linux.seccomp`.
fn field(name: &str) -> String {
    format!("linux.seccomp.{name}")
}

/// Understands an action and its number; `place` is the object that both are in, and `number` the
/// name of the latter.
fn action(name: &str, errno: Option<u32>, place: &str, number: &str) -> Result<Action, SpecError> {
    let named = |field: &str| format!("linux.seccomp.{place}{field}");
    let key = if place.is_empty() { "defaultAction" } else { "action" };
    let (kind, max) = match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => (KILL_THREAD, None),
        "SCMP_ACT_KILL_PROCESS" => (KILL_PROCESS, None),
        "SCMP_ACT_TRAP" => (TRAP, None),
        "SCMP_ACT_ERRNO" => (ERRNO, Some(MAX_ERRNO)),
        "SCMP_ACT_TRACE" => (TRACE, Some(MAX_DATA)),
        "SCMP_ACT_LOG" => (LOG, None),
        "SCMP_ACT_ALLOW" => (ALLOW, None),
        "SCMP_ACT_NOTIFY" => {
            let reason = "is not supported: no agent listens in the guest";
            return Err(SpecError::invalid(named(key), name, reason));
        }
        _ => {
            let reason = "must be an action, as SCMP_ACT_ERRNO";
            return Err(SpecError::invalid(named(key), name, reason));
        }
    };
    match (errno, max) {
        (None, None) => Ok(kind),
        (None, Some(_)) => Ok(kind | libc::EPERM.unsigned_abs()),
        (Some(data), Some(max)) if data <= max => Ok(kind | data),
        (Some(data), Some(_)) => {
            let reason = "must be at most 4095 (SCMP_ACT_ERRNO) or 65535 (SCMP_ACT_TRACE)";
            Err(SpecError::invalid(named(number), data.to_string(), reason))
        }
        (Some(data), None) => {
            let reason = "needs an action that has a number: SCMP_ACT_ERRNO or SCMP_ACT_TRACE";
            Err(SpecError::invalid(named(number), data.to_string(), reason))
        }
    }
}

/// Understands one condition.
fn condition(given: &Argument, place: &str) -> Result<Condition, SpecError> {
    let argument = u8::try_from(given.index).ok().filter(|i| u32::from(*i) < ARGUMENTS);
    let Some(argument) = argument else {
        let field = format!("{place}.index");
        return Err(SpecError::invalid(field, given.index.to_string(), "must be 0 to 5"));
    };
    let value = given.value;
    let test = match given.op.as_str() {
        "SCMP_CMP_NE" => Test::NotEqual(value),
        "SCMP_CMP_LT" => Test::Less(value),
        "SCMP_CMP_LE" => Test::LessOrEqual(value),
        "SCMP_CMP_EQ" => Test::Equal(value),
        "SCMP_CMP_GE" => Test::GreaterOrEqual(value),
        "SCMP_CMP_GT" => Test::Greater(value),
        "SCMP_CMP_MASKED_EQ" => Test::MaskedEqual { mask: value, value: given.value_two },
        other => {
            let reason = "must be a comparison, as SCMP_CMP_EQ";
            return Err(SpecError::invalid(format!("{place}.op"), other, reason));
        }
    };
    Ok(Condition { argument, test })
}

/// Understands one element of `syscalls`. It is several rules if it tests an argument twice: each of
/// its conditions then counts alone, as in runc and crun (profiles rely on it, because libseccomp
/// cannot do otherwise).
fn rules(index: usize, given: &Syscalls) -> Result<Vec<Rule>, SpecError> {
    let place = format!("syscalls[{index}].");
    let action = action(&given.action, given.errno_ret, &place, "errnoRet")?;
    if given.names.iter().any(String::is_empty) {
        return Err(SpecError::invalid(field(&format!("{place}names")), "", "must be names"));
    }
    let conditions = given
        .args
        .iter()
        .enumerate()
        .map(|(number, argument)| condition(argument, &field(&format!("{place}args[{number}]"))))
        .collect::<Result<Vec<_>, _>>()?;
    let twice = conditions
        .iter()
        .enumerate()
        .any(|(i, c)| conditions.iter().take(i).any(|earlier| earlier.argument == c.argument));
    let groups: Vec<Vec<Condition>> =
        if twice { conditions.into_iter().map(|c| vec![c]).collect() } else { vec![conditions] };
    let rule = |conditions| Rule { names: given.names.clone(), conditions, action };
    Ok(groups.into_iter().map(rule).collect())
}

impl Profile {
    /// Understands a profile.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(super) fn new(given: &Seccomp) -> Result<Self, SpecError> {
        let Seccomp {
            default_action,
            default_errno_ret,
            architectures,
            flags: given_flags,
            syscalls,
            listener_path,
            listener_metadata,
        } = given;
        for (name, value) in
            [("listenerPath", listener_path), ("listenerMetadata", listener_metadata)]
        {
            if value.as_ref().is_some_and(|v| !v.is_empty()) {
                return Err(SpecError::Unsupported(vec![field(name)]));
            }
        }
        let mut abis = vec![Abi::X86_64];
        for name in architectures {
            let named = abi::named(name)
                .map_err(|reason| SpecError::invalid(field("architectures"), name, reason))?;
            abis.extend(named.filter(|abi| !abis.contains(abi)));
        }
        let mut flags = 0;
        for name in given_flags {
            let Some((_, flag)) = FLAGS.iter().find(|(n, _)| n == name) else {
                let reason = if name == "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" {
                    "is not supported: it needs notification"
                } else {
                    "must be a flag, as SECCOMP_FILTER_FLAG_LOG"
                };
                return Err(SpecError::invalid(field("flags"), name, reason));
            };
            flags |= u32::try_from(*flag).unwrap_or_default();
        }
        let names: usize =
            syscalls.iter().map(|s| s.names.len().saturating_mul(s.args.len().max(1))).sum();
        if names > MAX_NAMES {
            let reason = "must be at most 16384 names";
            return Err(SpecError::invalid(field("syscalls"), names.to_string(), reason));
        }
        let rules = syscalls
            .iter()
            .enumerate()
            .map(|(index, given)| rules(index, given))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            default: action(default_action, *default_errno_ret, "", "defaultErrnoRet")?,
            abis,
            rules: rules.into_iter().flatten().collect(),
            flags,
        })
    }

    /// Whether a call that is newer than the profile is to answer `ENOSYS`, which programs know what
    /// to do about, and not the default action. As in runc: not if that lets calls through, or if a
    /// tracer decides, or if it is `ENOSYS` anyhow.
    pub(super) fn hides_new_calls(&self) -> bool {
        !matches!(self.default & KIND, ALLOW | LOG | TRACE) && self.default != ENOSYS
    }
}

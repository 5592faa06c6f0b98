//! `linux.seccomp`: which system calls a container may make.
//!
//! A profile becomes a BPF program in the agent, before anything of the container exists
//! ([`Filter::new`]); its processes install it as the last thing before their program, execs too. The
//! meaning is that which runc and libseccomp give a profile:
//! - the machine's own architecture always belongs to it; calls of one that it does not name kill;
//! - a name that no interface knows is ignored: a profile may be newer than the kernel;
//! - a call with a number above all that the profile names answers `ENOSYS` if it would not be
//!   allowed, because a program can cope with that and not with `EPERM`;
//! - of the entries for one call, one without conditions decides; else the first, in the order of
//!   the profile, all of whose conditions hold (libseccomp leaves that order open);
//! - a number that an action cannot carry is an error, as the specification demands.
//!
//! The kernel of the guest has no audit: `SCMP_ACT_LOG` allows and writes nothing.

mod abi;
mod bpf;
mod compile;
mod profile;

pub(crate) use bpf::Instruction;
pub(crate) use profile::Seccomp;

use std::io;
use std::sync::Arc;

use super::spec::SpecError;
use crate::sys;
use profile::Profile;

/// A profile, ready to be installed. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    program: Arc<[Instruction]>,
    /// `SECCOMP_FILTER_FLAG_*`
    flags: u32,
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// [`SpecError`] naming the field, also for a profile that is longer than the kernel takes.
    pub(crate) fn new(given: &Seccomp) -> Result<Self, SpecError> {
        let profile = Profile::new(given)?;
        let program = compile::compile(&profile).map_err(|bpf::TooLong| {
            let count = format!("{} entries", profile.rules.len());
            let reason = "must not need more than 4096 instructions of BPF";
            SpecError::invalid("linux.seccomp", count, reason)
        })?;
        Ok(Self { program: program.into(), flags: profile.flags })
    }

    /// Installs the filter on this process, for it and all that it will ever execute.
    ///
    /// # Errors
    /// `EACCES` without `no_new_privs` and without CAP_SYS_ADMIN; otherwise what the kernel answers.
    pub(crate) fn install(&self) -> io::Result<()> {
        sys::install_seccomp_filter(&self.program, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn refusal(json: Value) -> String {
        let given = match serde_json::from_value(json) {
            Ok(given) => given,
            Err(error) => return error.to_string(),
        };
        Filter::new(&given).unwrap_err().to_string()
    }

    fn rule(extra: Value) -> Value {
        let mut rule = json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"});
        rule.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]})
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let notify = "SCMP_ACT_NOTIFY";
        for (json, words) in [
            (json!({"defaultAction": notify}), "linux.seccomp.defaultAction"),
            (rule(json!({"action": notify})), "linux.seccomp.syscalls[0].action"),
            (json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}), "listenerPath"),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}),
                "linux.seccomp.listenerMetadata",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                       "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
                "needs notification",
            ),
        ] {
            let message = refusal(json);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        let argument =
            |index: u32, op: &str| rule(json!({"args": [{"index": index, "value": 0, "op": op}]}));
        for (json, words) in [
            (json!({}), "defaultAction"),
            (json!({"defaultAction": "ALLOW"}), "linux.seccomp.defaultAction"),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
                "linux.seccomp.defaultErrnoRet",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["amd64"]}),
                "linux.seccomp.architectures",
            ),
            (json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["X"]}), "linux.seccomp.flags"),
            (rule(json!({"errnoRet": 1})), "linux.seccomp.syscalls[0].errnoRet"),
            (
                rule(json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 4096})),
                "linux.seccomp.syscalls[0].errnoRet",
            ),
            (rule(json!({"names": [""]})), "linux.seccomp.syscalls[0].names"),
            (argument(6, "SCMP_CMP_EQ"), "linux.seccomp.syscalls[0].args[0].index"),
            (argument(0, "=="), "linux.seccomp.syscalls[0].args[0].op"),
            (rule(json!({"names": vec!["read"; 16_385]})), "linux.seccomp.syscalls"),
        ] {
            let message = refusal(json);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn empty_strings_of_a_listener_mean_none() {
        let given = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "",
                           "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]});
        let filter = Filter::new(&serde_json::from_value(given).unwrap()).unwrap();
        assert_eq!(filter.flags, 0b11);
    }
}

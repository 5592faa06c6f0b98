//! Capabilities by name.

use rustix::thread::CapabilitySet;

use super::spec::{Capabilities, SpecError};

/// The names, each at the number that the kernel gives it (linux/capability.h).
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The five sets of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) bounding: CapabilitySet,
    pub(crate) effective: CapabilitySet,
    pub(crate) inheritable: CapabilitySet,
    pub(crate) permitted: CapabilitySet,
    pub(crate) ambient: CapabilitySet,
}

/// Every capability that the kernel of the guest knows, one by one.
pub(crate) fn every() -> impl Iterator<Item = CapabilitySet> {
    (0..NAMES.len()).map(|number| CapabilitySet::from_bits_retain(1 << number))
}

/// Understands the names; `prefix` is put before the field in errors.
///
/// # Errors
/// [`SpecError::Invalid`] for a name that is none: runc warns and goes on, but a program that
/// silently lacks what it asked for is harder to understand than an error.
pub(crate) fn sets(names: &Capabilities, prefix: &str) -> Result<CapSets, SpecError> {
    let set = |field: &str, names: &[String]| {
        names.iter().try_fold(CapabilitySet::empty(), |set, name| {
            let number = NAMES.iter().position(|n| n == name).ok_or_else(|| {
                let field = format!("{prefix}capabilities.{field}");
                SpecError::invalid(field, name, "must name a capability, as CAP_KILL")
            })?;
            Ok(set | CapabilitySet::from_bits_retain(1 << number))
        })
    };
    let (inheritable, permitted) =
        (set("inheritable", &names.inheritable)?, set("permitted", &names.permitted)?);
    Ok(CapSets {
        bounding: set("bounding", &names.bounding)?,
        effective: set("effective", &names.effective)?,
        inheritable,
        permitted,
        // The kernel lets a process have no other ambient ones (capabilities(7)). runc tries, and
        // goes on without: the configuration that `runc spec` prints relies on it.
        ambient: set("ambient", &names.ambient)? & inheritable & permitted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_numbers_of_the_kernel() {
        for (name, set) in [
            ("CAP_CHOWN", CapabilitySet::CHOWN),
            ("CAP_NET_BIND_SERVICE", CapabilitySet::NET_BIND_SERVICE),
            ("CAP_SYS_ADMIN", CapabilitySet::SYS_ADMIN),
            ("CAP_MKNOD", CapabilitySet::MKNOD),
            ("CAP_CHECKPOINT_RESTORE", CapabilitySet::CHECKPOINT_RESTORE),
        ] {
            let names = Capabilities { effective: vec![name.into()], ..Default::default() };
            assert_eq!(sets(&names, "").unwrap().effective, set);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_field() {
        let names = Capabilities { ambient: vec!["CAP_FLY".into()], ..Default::default() };
        let message = sets(&names, "process.").unwrap_err().to_string();
        assert!(message.contains("process.capabilities.ambient") && message.contains("CAP_FLY"));
    }

    #[test]
    fn ambient_ones_that_the_kernel_would_refuse_are_left_out() {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let names = Capabilities {
            ambient: set(&["CAP_KILL", "CAP_CHOWN", "CAP_FOWNER"]),
            permitted: set(&["CAP_KILL", "CAP_CHOWN"]),
            inheritable: set(&["CAP_CHOWN", "CAP_FOWNER"]),
            ..Default::default()
        };
        assert_eq!(sets(&names, "").unwrap().ambient, CapabilitySet::CHOWN);
    }

    #[test]
    fn every_capability_appears_once() {
        let all = every().fold(CapabilitySet::empty(), |a, b| {
            assert!(!a.intersects(b));
            a | b
        });
        assert_eq!(all.bits(), (1 << 41) - 1);
    }
}

//! Capabilities of a container: containerd's default set, with the changes that a pod asks for.

use std::collections::HashSet;

use oci_spec::OciSpecError;
use oci_spec::runtime::Capability::{self, *};
use oci_spec::runtime::{LinuxCapabilities, LinuxCapabilitiesBuilder};

use crate::types::SecurityContext;

/// What a container has unless its pod says otherwise; containerd's and Docker's set.
const DEFAULT: &[Capability] = &[
    AuditWrite,
    Chown,
    DacOverride,
    Fowner,
    Fsetid,
    Kill,
    Mknod,
    NetBindService,
    NetRaw,
    Setfcap,
    Setgid,
    Setpcap,
    Setuid,
    SysChroot,
];

/// All capabilities of Linux 6.12, in the order of their numbers.
const ALL: &[Capability] = &[
    Chown,
    DacOverride,
    DacReadSearch,
    Fowner,
    Fsetid,
    Kill,
    Setgid,
    Setuid,
    Setpcap,
    LinuxImmutable,
    NetBindService,
    NetBroadcast,
    NetAdmin,
    NetRaw,
    IpcLock,
    IpcOwner,
    SysModule,
    SysRawio,
    SysChroot,
    SysPtrace,
    SysPacct,
    SysAdmin,
    SysBoot,
    SysNice,
    SysResource,
    SysTime,
    SysTtyConfig,
    Mknod,
    Lease,
    AuditWrite,
    AuditControl,
    Setfcap,
    MacOverride,
    MacAdmin,
    Syslog,
    WakeAlarm,
    BlockSuspend,
    AuditRead,
    Perfmon,
    Bpf,
    CheckpointRestore,
];

/// The capability of this name, which is in capitals and without `CAP_`.
pub(crate) fn from_name(name: &str) -> Option<Capability> {
    ALL.iter().copied().find(|capability| capability.to_string() == name)
}

/// The sets of a container's process. Nothing is inheritable or ambient, as in containerd: a user
/// other than root gets none by its program alone.
pub(super) fn sets(security: &SecurityContext) -> Result<LinuxCapabilities, OciSpecError> {
    let set = granted(security);
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .build()
}

fn granted(security: &SecurityContext) -> HashSet<Capability> {
    if security.privileged {
        return ALL.iter().copied().collect();
    }
    let changes = &security.capabilities;
    let names_all = |names: &[String]| names.iter().any(|name| name == "ALL");
    // In containerd's order: `ALL` first, so that single names can make exceptions to it.
    let base = match (names_all(&changes.add), names_all(&changes.drop)) {
        (_, true) => &[],
        (true, false) => ALL,
        (false, false) => DEFAULT,
    };
    let mut set: HashSet<Capability> = base.iter().copied().collect();
    set.extend(changes.add.iter().filter_map(|name| from_name(name)));
    for dropped in changes.drop.iter().filter_map(|name| from_name(name)) {
        set.remove(&dropped);
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::CapabilityChanges;

    fn with(add: &[&str], drop: &[&str]) -> HashSet<Capability> {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        granted(&SecurityContext {
            capabilities: CapabilityChanges { add: names(add), drop: names(drop) },
            ..SecurityContext::default()
        })
    }

    fn set(of: &[Capability]) -> HashSet<Capability> {
        of.iter().copied().collect()
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        for (name, capability) in [
            ("CHOWN", Chown),
            ("NET_BIND_SERVICE", NetBindService),
            ("SYS_TTY_CONFIG", SysTtyConfig),
            ("DAC_READ_SEARCH", DacReadSearch),
            ("CHECKPOINT_RESTORE", CheckpointRestore),
            ("IPC_LOCK", IpcLock),
            ("BPF", Bpf),
        ] {
            assert_eq!(from_name(name), Some(capability));
        }
        assert_eq!(from_name("CAP_CHOWN"), None);
        assert_eq!(from_name("chown"), None);
        assert_eq!(set(ALL).len(), 41);
    }

    #[test]
    fn changes_are_applied_as_containerd_does() {
        assert_eq!(with(&[], &[]), set(DEFAULT));
        assert_eq!(with(&["NET_ADMIN"], &[]).len(), DEFAULT.len() + 1);
        assert!(!with(&[], &["CHOWN"]).contains(&Chown));
        assert_eq!(with(&[], &["ALL"]), set(&[]));
        assert_eq!(with(&["NET_BIND_SERVICE"], &["ALL"]), set(&[NetBindService]));
        assert_eq!(with(&["ALL"], &[]), set(ALL));
        let mut all_but_one = set(ALL);
        all_but_one.remove(&SysTime);
        assert_eq!(with(&["ALL"], &["SYS_TIME"]), all_but_one);
        assert_eq!(with(&["CHOWN"], &["CHOWN", "ALL"]), set(&[]));
        assert_eq!(with(&["ALL"], &["ALL"]), set(&[]));
    }

    #[test]
    fn privileged_has_all() {
        let security = SecurityContext { privileged: true, ..SecurityContext::default() };
        assert_eq!(granted(&security), set(ALL));
    }
}

//! Kernel parameters that belong to a namespace.

use std::collections::BTreeMap;
use std::io;

/// A parameter that was not set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SysctlError {
    #[error("sysctl {0:?} belongs to no namespace of the pod, and cannot be set")]
    NotNamespaced(String),
    #[error("sysctl {key:?} = {value:?}")]
    Write {
        key: String,
        value: String,
        #[source]
        source: io::Error,
    },
}

/// Parameters of the IPC namespace, by name.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// A name in one spelling: parts separated by dots. As in sysctl(8), whichever of `.` and `/` comes
/// first separates, and the other is part of a name (`net/ipv4/conf/eth0.1/x`).
fn parts(key: &str) -> Vec<String> {
    match key.find(['.', '/']).and_then(|at| key[at..].chars().next()) {
        Some('/') => key.split('/').map(str::to_owned).collect(),
        _ => key.split('.').map(|part| part.replace('/', ".")).collect(),
    }
}

/// Whether the parameter belongs to a namespace, and its name leads nowhere else.
pub(crate) fn is_namespaced(key: &str) -> bool {
    let parts = parts(key);
    if parts.iter().any(|p| p.is_empty() || p == "." || p == ".." || p.contains('\0')) {
        return false;
    }
    let name = parts.join(".");
    IPC.contains(&name.as_str()) || name.starts_with("net.") || name.starts_with("fs.mqueue.")
}

/// Sets the parameters in the namespaces of this process.
///
/// # Errors
/// [`SysctlError`] for the first that cannot be set.
pub(crate) fn apply<'a>(
    sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), SysctlError> {
    // Sorted, so that what fails first does not depend on a hash.
    for (key, value) in sysctls.into_iter().collect::<BTreeMap<_, _>>() {
        if !is_namespaced(key) {
            return Err(SysctlError::NotNamespaced(key.clone()));
        }
        let path = format!("/proc/sys/{}", parts(key).join("/"));
        std::fs::write(path, value).map_err(|source| SysctlError::Write {
            key: key.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_parameters_of_namespaces_are_allowed() {
        for key in [
            "net.ipv4.ip_unprivileged_port_start",
            "net/ipv4/conf/eth0.1/rp_filter",
            "kernel.shm_rmid_forced",
            "fs.mqueue.msg_max",
        ] {
            assert!(is_namespaced(key), "{key}");
        }
        for key in ["vm.swappiness", "kernel.core_pattern", "net", "net..x", "net.", ""] {
            assert!(!is_namespaced(key), "{key}");
        }
    }

    #[test]
    fn a_path_cannot_leave_the_tree() {
        for key in ["net/../kernel/core_pattern", "net/./x", "net/a\0b"] {
            assert!(!is_namespaced(key), "{key}");
        }
        assert_eq!(parts("net.ipv4.conf.eth0/1.x").join("/"), "net/ipv4/conf/eth0.1/x");
    }

    proptest! {
        #[test]
        fn no_allowed_name_has_a_part_that_leads_up(key in "[a-z./]{0,24}") {
            if is_namespaced(&key) {
                let path = parts(&key).join("/");
                prop_assert!(path.split('/').all(|p| !matches!(p, "" | "." | "..")), "{}", path);
            }
        }
    }
}

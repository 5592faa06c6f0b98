//! Reads security contexts, and merges the pod's into the containers'.

use std::collections::BTreeMap;

use super::problem::{ProblemKind, Problems};
use super::view::View;
use crate::oci::capability;
use crate::types::{CapabilityChanges, ProcMount, SecurityContext};

/// Largest user and group ID that Kubernetes takes.
const MAX_ID: i128 = i32::MAX as i128;

/// `spec.securityContext`.
#[derive(Debug, Default)]
pub(super) struct PodSecurity {
    run_as_user: Option<u32>,
    run_as_group: Option<u32>,
    run_as_non_root: Option<bool>,
    pub(super) fs_group: Option<u32>,
    pub(super) supplemental_groups: Vec<u32>,
    pub(super) sysctls: BTreeMap<String, String>,
}

impl PodSecurity {
    pub(super) fn read(view: &View<'_>, problems: &mut Problems) -> Self {
        if !view.is_object(problems) {
            return PodSecurity::default();
        }
        let groups = view.get("supplementalGroups").items(problems);
        PodSecurity {
            run_as_user: view.get("runAsUser").integer(0..=MAX_ID, problems),
            run_as_group: view.get("runAsGroup").integer(0..=MAX_ID, problems),
            run_as_non_root: view.get("runAsNonRoot").boolean(problems),
            fs_group: view.get("fsGroup").integer(0..=MAX_ID, problems),
            supplemental_groups: groups
                .iter()
                .filter_map(|group| group.integer(0..=MAX_ID, problems))
                .collect(),
            sysctls: read_sysctls(&view.get("sysctls"), problems),
        }
    }
}

/// A container's security context, on top of the pod's.
pub(super) fn read(view: &View<'_>, pod: &PodSecurity, problems: &mut Problems) -> SecurityContext {
    let fine = view.is_object(problems);
    if !fine {
        return SecurityContext::default();
    }
    let privileged = view.get("privileged").boolean(problems).unwrap_or(false);
    let capabilities = read_capabilities(&view.get("capabilities"), problems);
    let escalation = view.get("allowPrivilegeEscalation");
    let allow_privilege_escalation = escalation.boolean(problems).unwrap_or(true);
    if !allow_privilege_escalation {
        // As the API server: no_new_privs cannot hold what has every right already.
        if privileged {
            escalation.invalid("false", "must be true with privileged: true", problems);
        } else if capabilities.add.iter().any(|name| name == "SYS_ADMIN") {
            let reason = "must be true with the capability SYS_ADMIN";
            escalation.invalid("false", reason, problems);
        }
    }
    SecurityContext {
        run_as_user: view.get("runAsUser").integer(0..=MAX_ID, problems).or(pod.run_as_user),
        run_as_group: view.get("runAsGroup").integer(0..=MAX_ID, problems).or(pod.run_as_group),
        run_as_non_root: view
            .get("runAsNonRoot")
            .boolean(problems)
            .or(pod.run_as_non_root)
            .unwrap_or(false),
        read_only_root: view.get("readOnlyRootFilesystem").boolean(problems).unwrap_or(false),
        privileged,
        allow_privilege_escalation,
        capabilities,
        proc_mount: view
            .get("procMount")
            .one_of(&[("Default", ProcMount::Default), ("Unmasked", ProcMount::Unmasked)], problems)
            .unwrap_or_default(),
    }
}

fn read_capabilities(view: &View<'_>, problems: &mut Problems) -> CapabilityChanges {
    if !view.is_object(problems) {
        return CapabilityChanges::default();
    }
    let mut names = |field| {
        let items = view.get(field).items(problems);
        let names = items.iter().filter_map(|item| {
            item.require(problems);
            let name = item.text(problems)?;
            if name != "ALL" && capability::from_name(name).is_none() {
                let bare = name.strip_prefix("CAP_").unwrap_or(name).to_ascii_uppercase();
                let reason = match capability::from_name(&bare) {
                    Some(_) => format!("no such capability, did you mean {bare}?"),
                    None => "no such capability".into(),
                };
                item.invalid(name, reason, problems);
            }
            Some(name.to_owned())
        });
        names.collect()
    };
    CapabilityChanges { add: names("add"), drop: names("drop") }
}

fn read_sysctls(view: &View<'_>, problems: &mut Problems) -> BTreeMap<String, String> {
    let mut sysctls = BTreeMap::new();
    for view in view.objects(problems) {
        let name_view = view.get("name");
        let value_view = view.get("value");
        value_view.require(problems);
        let value = value_view.text(problems).unwrap_or_default();
        let Some(name) = name_view.required_text(problems) else {
            continue;
        };
        let dotted = dotted_sysctl(name);
        if !is_sysctl(&dotted) {
            let reason = "not the name of a namespaced sysctl: must be kernel.shm*, kernel.msg*, \
                          kernel.sem, fs.mqueue.* or net.*";
            name_view.invalid(name, reason, problems);
        }
        if value.contains(['\0', '\n']) {
            value_view.invalid(value, "must be one line without a NUL byte", problems);
        }
        if sysctls.insert(dotted, value.to_owned()).is_some() {
            let reason = "another sysctl of this pod has this name".into();
            let kind = ProblemKind::Invalid { value: name.into(), reason };
            name_view.problem(kind, problems);
        }
    }
    sysctls
}

/// The name with dots as separators. As sysctl(8): if the first separator is a slash, slashes
/// separate, and a dot belongs to a name (`net/ipv4/conf/eth0.1/forwarding`) and is written as a
/// slash.
fn dotted_sysctl(name: &str) -> String {
    match name.find(['.', '/']).and_then(|i| name.get(i..)) {
        Some(rest) if rest.starts_with('/') => {
            let swap = |c| match c {
                '/' => '.',
                '.' => '/',
                other => other,
            };
            name.chars().map(swap).collect()
        }
        _ => name.to_owned(),
    }
}

/// Whether it is a well-formed name of a sysctl that a namespace of the pod has.
fn is_sysctl(dotted: &str) -> bool {
    const PREFIXES: &[&str] = &["kernel.shm", "kernel.msg", "fs.mqueue.", "net."];
    let well_formed = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'/'))
            && part.split('/').all(|piece| !piece.is_empty())
    };
    (dotted == "kernel.sem" || PREFIXES.iter().any(|prefix| dotted.starts_with(prefix)))
        && dotted.split('.').all(well_formed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_sysctls_are_taken() {
        for name in [
            "kernel.shm_rmid_forced",
            "kernel.sem",
            "fs.mqueue.msg_max",
            "net.core.somaxconn",
            "net/ipv4/conf/eth0.1/forwarding",
            "net.ipv4.conf.eth0/1.forwarding",
        ] {
            assert!(is_sysctl(&dotted_sysctl(name)), "{name}");
        }
        for name in ["vm.swappiness", "kernel.panic", "net", "net.", "net..a", "net.a/../b", "a"] {
            assert!(!is_sysctl(&dotted_sysctl(name)), "{name}");
        }
    }
}

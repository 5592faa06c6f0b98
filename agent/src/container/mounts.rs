//! `mounts` of the specification as instructions for the kernel. Pure: nothing is mounted here.

use super::spec::{Mount, SpecError};
use crate::sys::MountAttr;

/// One mount, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPlan {
    /// Path inside the container's root; absolute.
    pub(crate) destination: String,
    pub(crate) kind: Kind,
    /// Attributes of the mount itself.
    pub(crate) attr: MountAttr,
    /// Attributes of the mount and of all below it (`rro` and so on).
    pub(crate) recursive_attr: MountAttr,
    /// MS_PRIVATE and so on, 0 to leave it; and whether for all mounts below too.
    pub(crate) propagation: (u64, bool),
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory or file of the guest.
    Bind { source: String, recursive: bool },
    /// A new file system; options as the file system takes them: keys, and values of those with one.
    New { fstype: &'static str, source: String, options: Vec<(String, Option<String>)> },
}

/// File system types that a specification may name, with the kernel's name of each.
const FILE_SYSTEMS: &[(&str, &str)] = &[
    ("cgroup", "cgroup2"),
    ("cgroup2", "cgroup2"),
    ("devpts", "devpts"),
    ("mqueue", "mqueue"),
    ("proc", "proc"),
    ("sysfs", "sysfs"),
    ("tmpfs", "tmpfs"),
];

/// Options that set (true) or clear an attribute; with an `r` before them they do so for the mounts
/// below too (mount(8)).
const ATTRIBUTES: &[(&str, bool, u64)] = &[
    ("ro", true, libc::MOUNT_ATTR_RDONLY),
    ("rw", false, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", true, libc::MOUNT_ATTR_NOSUID),
    ("suid", false, libc::MOUNT_ATTR_NOSUID),
    ("nodev", true, libc::MOUNT_ATTR_NODEV),
    ("dev", false, libc::MOUNT_ATTR_NODEV),
    ("noexec", true, libc::MOUNT_ATTR_NOEXEC),
    ("exec", false, libc::MOUNT_ATTR_NOEXEC),
    ("nodiratime", true, libc::MOUNT_ATTR_NODIRATIME),
    ("diratime", false, libc::MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", true, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("symfollow", false, libc::MOUNT_ATTR_NOSYMFOLLOW),
];

/// Options that choose how access times are kept. The kernel wants the whole field cleared before.
const ACCESS_TIMES: &[(&str, u64)] = &[
    ("relatime", libc::MOUNT_ATTR_RELATIME),
    ("norelatime", libc::MOUNT_ATTR_STRICTATIME),
    ("noatime", libc::MOUNT_ATTR_NOATIME),
    ("atime", libc::MOUNT_ATTR_RELATIME),
    ("strictatime", libc::MOUNT_ATTR_STRICTATIME),
    ("nostrictatime", libc::MOUNT_ATTR_RELATIME),
];

/// Propagation types; with an `r` before them they hold for the mounts below too.
const PROPAGATIONS: &[(&str, u64)] = &[
    ("private", libc::MS_PRIVATE),
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Understands a propagation such as `rslave`: MS_* and whether it is recursive.
pub(crate) fn propagation(option: &str) -> Option<(u64, bool)> {
    let find = |name: &str| PROPAGATIONS.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
    match find(option) {
        Some(value) => Some((value, false)),
        None => option.strip_prefix('r').and_then(find).map(|value| (value, true)),
    }
}

/// Changes `attr` as an option says; false if it is not such an option.
fn attribute(option: &str, attr: &mut MountAttr) -> bool {
    if let Some((_, set, value)) = ATTRIBUTES.iter().find(|(n, ..)| *n == option) {
        // The later of two contradicting options wins, as in mount(8).
        let (on, off) =
            if *set { (&mut attr.set, &mut attr.clear) } else { (&mut attr.clear, &mut attr.set) };
        *on |= value;
        *off &= !value;
        return true;
    }
    if let Some((_, value)) = ACCESS_TIMES.iter().find(|(n, _)| *n == option) {
        attr.set = (attr.set & !libc::MOUNT_ATTR__ATIME) | value;
        attr.clear |= libc::MOUNT_ATTR__ATIME;
        return true;
    }
    false
}

/// Understands mount number `index` of the specification.
///
/// # Errors
/// [`SpecError::Invalid`] naming the field, e.g. for a file system that is not supported.
pub(crate) fn plan(index: usize, mount: &Mount) -> Result<MountPlan, SpecError> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if !mount.destination.starts_with('/') {
        let reason = "must be absolute";
        return Err(SpecError::invalid(field("destination"), &mount.destination, reason));
    }
    let mut attr = MountAttr::default();
    let mut recursive_attr = MountAttr::default();
    let mut propagation_type = (0, false);
    let mut bind = None;
    let mut data = Vec::new();
    for option in &mount.options {
        match option.as_str() {
            "bind" => bind = bind.or(Some(false)),
            "rbind" => bind = Some(true),
            "defaults" => {}
            o if attribute(o, &mut attr) => {}
            o if propagation(o).is_some_and(|p| {
                propagation_type = p;
                true
            }) => {}
            o if o.strip_prefix('r').is_some_and(|o| attribute(o, &mut recursive_attr)) => {}
            o => data.push(match o.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (o.to_owned(), None),
            }),
        }
    }
    let kind_name = mount.kind.as_deref().unwrap_or("");
    let kind = if bind.is_some() || kind_name == "bind" {
        let Some(source) = mount.source.clone().filter(|s| s.starts_with('/')) else {
            let source = mount.source.as_deref().unwrap_or("");
            return Err(SpecError::invalid(field("source"), source, "must be absolute"));
        };
        if let Some((key, _)) = data.first() {
            let reason = "is no option of a bind mount";
            return Err(SpecError::invalid(field("options"), key, reason));
        }
        Kind::Bind { source, recursive: bind.unwrap_or(false) }
    } else {
        let Some((_, fstype)) = FILE_SYSTEMS.iter().find(|(n, _)| *n == kind_name) else {
            let reason = "must be bind, cgroup, cgroup2, devpts, mqueue, proc, sysfs or tmpfs";
            return Err(SpecError::invalid(field("type"), kind_name, reason));
        };
        let source = mount.source.clone().unwrap_or_else(|| (*fstype).to_owned());
        Kind::New { fstype, source, options: data }
    };
    Ok(MountPlan {
        destination: mount.destination.clone(),
        kind,
        attr,
        recursive_attr,
        propagation: propagation_type,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            destination: "/x".into(),
            kind: (!kind.is_empty()).then(|| kind.into()),
            source: (!source.is_empty()).then(|| source.into()),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    #[test]
    fn a_tmpfs_keeps_its_own_options_apart_from_the_flags() {
        let plan = plan(
            0,
            &mount("tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        )
        .unwrap();
        let flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV;
        assert_eq!(plan.attr, MountAttr { set: flags, clear: 0, propagation: 0 });
        let Kind::New { fstype, source, options } = plan.kind else { panic!("not new") };
        assert_eq!((fstype, source.as_str()), ("tmpfs", "shm"));
        assert_eq!(
            options,
            [("mode".into(), Some("1777".into())), ("size".into(), Some("65536k".into()))]
        );
    }

    #[test]
    fn a_bind_mount_knows_recursion_propagation_and_recursive_flags() {
        let plan = plan(0, &mount("none", "/a", &["rbind", "rslave", "ro", "rnosuid"])).unwrap();
        assert_eq!(plan.kind, Kind::Bind { source: "/a".into(), recursive: true });
        assert_eq!(plan.propagation, (libc::MS_SLAVE, true));
        assert_eq!(plan.attr.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(plan.recursive_attr.set, libc::MOUNT_ATTR_NOSUID);
    }

    #[test]
    fn the_later_of_two_contradicting_options_wins() {
        let plan = plan(0, &mount("bind", "/a", &["ro", "rw", "noatime", "relatime"])).unwrap();
        assert_eq!(plan.attr.set, libc::MOUNT_ATTR_RELATIME);
        assert_eq!(plan.attr.clear, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (mount, field) in [
            (mount("nfs", "x", &[]), "mounts[7].type"),
            (mount("", "x", &[]), "mounts[7].type"),
            (mount("bind", "x", &[]), "mounts[7].source"),
            (mount("bind", "", &[]), "mounts[7].source"),
            (mount("bind", "/x", &["idmap"]), "mounts[7].options"),
        ] {
            assert!(plan(7, &mount).unwrap_err().to_string().contains(field));
        }
    }

    #[test]
    fn every_option_with_an_r_before_it_is_not_mistaken_for_another() {
        // `rw`, `relatime` and `ro` begin with r themselves.
        assert_eq!(propagation("rw"), None);
        assert_eq!(propagation("rprivate"), Some((libc::MS_PRIVATE, true)));
        let plan = plan(0, &mount("bind", "/a", &["relatime", "rw", "rro"])).unwrap();
        assert_eq!(plan.recursive_attr.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(plan.attr.set, libc::MOUNT_ATTR_RELATIME);
    }
}

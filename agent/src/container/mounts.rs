//! `mounts` of the specification as instructions for the kernel. Pure: nothing is mounted here.

use super::spec::{self, IdMapping, Mount, SpecError};
use crate::cgroup;
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
    /// In this order: MS_PRIVATE and so on, and whether for all mounts below too.
    pub(crate) propagation: Vec<(u64, bool)>,
    /// How the owners of files are to be shown, if not as they are.
    pub(crate) id_map: Option<IdMap>,
}

/// The mappings of an idmapped mount: from the numbers on the file system to those that are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdMap {
    pub(crate) uids: Vec<IdMapping>,
    pub(crate) gids: Vec<IdMapping>,
    /// Whether for all mounts below too.
    pub(crate) recursive: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory or file of the guest.
    Bind { source: String, recursive: bool },
    /// An overlay of directories of the guest.
    Overlay { directories: Vec<(&'static str, String)>, options: Options },
    /// A new tmpfs, and whether it gets what its destination holds.
    Tmpfs { source: String, options: Options, copy_up: bool },
    /// A new file system that has no device.
    New { fstype: &'static str, source: String, options: Options },
}

/// Options as a file system takes them: keys, and values of those with one.
pub(crate) type Options = Vec<(String, Option<String>)>;

/// File system types that a specification may name, with the kernel's name of each.
const FILE_SYSTEMS: &[(&str, &str)] = &[
    ("cgroup", "cgroup2"),
    ("cgroup2", "cgroup2"),
    ("devpts", "devpts"),
    ("mqueue", "mqueue"),
    ("overlay", "overlay"),
    ("proc", "proc"),
    ("sysfs", "sysfs"),
    ("tmpfs", "tmpfs"),
];

/// Most mappings of one mount, as in the kernel (UID_GID_MAP_MAX_EXTENTS).
const MAX_MAPPINGS: usize = 340;

/// Most directories of an overlay (OVL_MAX_STACK).
const MAX_LAYERS: usize = 500;

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
    // Not strictatime: mount(8) only takes the flag back, and relatime is the kernel's default.
    ("norelatime", libc::MOUNT_ATTR_RELATIME),
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

/// The options of a mount, sorted by what they concern.
#[derive(Default)]
struct Sorted {
    attr: MountAttr,
    recursive_attr: MountAttr,
    propagation: Vec<(u64, bool)>,
    /// Some for a bind mount: whether it is recursive.
    bind: Option<bool>,
    /// Some for an idmapped mount: whether it is recursive.
    id_map: Option<bool>,
    copy_up: bool,
    /// What is left is the file system's.
    data: Options,
}

fn sort(options: &[String]) -> Sorted {
    let mut sorted = Sorted::default();
    for option in options {
        match option.as_str() {
            "bind" => sorted.bind = sorted.bind.or(Some(false)),
            "rbind" => sorted.bind = Some(true),
            "idmap" => sorted.id_map = Some(false),
            "ridmap" => sorted.id_map = Some(true),
            "tmpcopyup" => sorted.copy_up = true,
            "defaults" => {}
            // What the kernel prints of a mount; mandatory locks, which Linux has no longer; and
            // how a file counts its changes, which none of the types here lets one choose.
            "silent" | "loud" | "mand" | "nomand" | "iversion" | "noiversion" => {}
            o if attribute(o, &mut sorted.attr) => {}
            o if let Some(propagation) = propagation(o) => sorted.propagation.push(propagation),
            o if o.strip_prefix('r').is_some_and(|o| attribute(o, &mut sorted.recursive_attr)) => {}
            o => sorted.data.push(match o.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (o.to_owned(), None),
            }),
        }
    }
    sorted
}

/// Understands mount number `index` of the specification, for a container with a user namespace of
/// these mappings, if it has a new one.
///
/// # Errors
/// [`SpecError::Invalid`] naming the field, e.g. for a file system that is not supported.
pub(crate) fn plan(
    index: usize,
    mount: &Mount,
    container: Option<(&[IdMapping], &[IdMapping])>,
) -> Result<MountPlan, SpecError> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    spec::check_path(|| field("destination"), &mount.destination)?;
    let sorted = sort(&mount.options);
    let id_map = id_map(mount, sorted.id_map, container, &field)?;
    let Sorted { attr, recursive_attr, propagation, bind, id_map: _, copy_up, data } = sorted;
    let kind = kind(mount, bind, copy_up, data, &field)?;
    // What leads there by `..` or a link is found when it is mounted.
    let mut parts = mount.destination.split('/').filter(|part| !matches!(*part, "" | "."));
    let on_proc = parts.next() == Some("proc") && parts.next().is_none();
    let is_proc = match &kind {
        Kind::New { fstype, .. } => *fstype == "proc",
        Kind::Bind { source, .. } => source == "/proc",
        Kind::Overlay { .. } | Kind::Tmpfs { .. } => false,
    };
    if on_proc && !is_proc {
        let reason = "nothing but a proc file system may be there";
        return Err(SpecError::invalid(field("destination"), &mount.destination, reason));
    }
    let destination = mount.destination.clone();
    Ok(MountPlan { destination, kind, attr, recursive_attr, propagation, id_map })
}

/// What is to be mounted.
fn kind(
    mount: &Mount,
    bind: Option<bool>,
    copy_up: bool,
    data: Options,
    field: &dyn Fn(&str) -> String,
) -> Result<Kind, SpecError> {
    let kind_name = mount.kind.as_deref().unwrap_or("");
    let no_option = |key: &str, reason| Err(SpecError::invalid(field("options"), key, reason));
    let is_bind = bind.is_some() || kind_name == "bind";
    if copy_up && (is_bind || kind_name != "tmpfs") {
        return no_option("tmpcopyup", "is for a tmpfs only");
    }
    if is_bind {
        let source = mount.source.clone().unwrap_or_default();
        spec::check_path(|| field("source"), &source)?;
        if let Some((key, _)) = data.first() {
            return no_option(key, "is no option of a bind mount");
        }
        return Ok(Kind::Bind { source, recursive: bind.unwrap_or(false) });
    }
    let Some((_, fstype)) = FILE_SYSTEMS.iter().find(|(n, _)| *n == kind_name) else {
        let reason = "must be bind, cgroup, cgroup2, devpts, mqueue, overlay, proc, sysfs or tmpfs";
        return Err(SpecError::invalid(field("type"), kind_name, reason));
    };
    let source = mount.source.clone().unwrap_or_else(|| (*fstype).to_owned());
    match *fstype {
        "overlay" => overlay(data, field),
        "tmpfs" => Ok(Kind::Tmpfs { source, options: data, copy_up }),
        "cgroup2" => {
            // What a mount in the first cgroup namespace does not repeat is taken from all mounts.
            let mut options = data;
            options.extend(cgroup::MOUNT_OPTIONS.split(',').map(|o| (o.to_owned(), None)));
            Ok(Kind::New { fstype, source, options })
        }
        _ => Ok(Kind::New { fstype, source, options: data }),
    }
}

/// Understands the options of an overlay: its directories one by one, because the kernel bounds the
/// length of an option.
fn overlay(data: Options, field: &dyn Fn(&str) -> String) -> Result<Kind, SpecError> {
    let (mut directories, mut options) = (Vec::new(), Vec::new());
    for (key, value) in data {
        match (key.as_str(), value) {
            ("lowerdir", Some(value)) => {
                let mut key = "lowerdir+";
                for part in split_layers(&value) {
                    if part.is_empty() {
                        // After `::` come layers of which only the data is seen.
                        key = "datadir+";
                    } else {
                        directories.push((key, part));
                    }
                }
            }
            ("upperdir", Some(value)) => directories.push(("upperdir", value)),
            ("workdir", Some(value)) => directories.push(("workdir", value)),
            (_, value) => options.push((key, value)),
        }
    }
    let invalid = |value: &str, reason| Err(SpecError::invalid(field("options"), value, reason));
    if directories.len() > MAX_LAYERS {
        return invalid(&directories.len().to_string(), "an overlay has at most 500 directories");
    }
    if !directories.iter().any(|(key, _)| *key == "lowerdir+") {
        return invalid("", "an overlay needs a lowerdir");
    }
    if let Some((_, bad)) = directories.iter().find(|(_, path)| !path.starts_with('/')) {
        return invalid(bad, "a directory of an overlay must be absolute");
    }
    Ok(Kind::Overlay { directories, options })
}

/// The parts of `lowerdir`, which are separated by colons; a backslash takes the meaning of the next
/// character.
fn split_layers(value: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        if character == ':' {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.extend(if character == '\\' { characters.next() } else { Some(character) });
        }
    }
    parts
}

/// Understands the mappings of a mount; `option` is that of its options. Without mappings of its own
/// it has those of the container.
fn id_map(
    mount: &Mount,
    option: Option<bool>,
    container: Option<(&[IdMapping], &[IdMapping])>,
    field: &dyn Fn(&str) -> String,
) -> Result<Option<IdMap>, SpecError> {
    let (uids, gids) = (&mount.uid_mappings, &mount.gid_mappings);
    if uids.is_empty() && gids.is_empty() {
        return match (option, container) {
            (None, _) => Ok(None),
            // They have been checked with the namespace.
            (Some(recursive), Some((uids, gids))) => {
                Ok(Some(IdMap { uids: uids.to_vec(), gids: gids.to_vec(), recursive }))
            }
            (Some(_), None) => {
                let reason =
                    "needs uidMappings and gidMappings of the mount, or a new user namespace";
                Err(SpecError::invalid(field("options"), "idmap", reason))
            }
        };
    }
    for (name, mappings) in [("uidMappings", uids), ("gidMappings", gids)] {
        let invalid = |reason| {
            Err(SpecError::invalid(field(name), format!("{} mappings", mappings.len()), reason))
        };
        if mappings.is_empty() || mappings.len() > MAX_MAPPINGS {
            return invalid("both uidMappings and gidMappings must have 1 to 340 mappings");
        }
        let fits = |m: &IdMapping| {
            m.size > 0
                && m.container_id.checked_add(m.size).is_some()
                && m.host_id.checked_add(m.size).is_some()
        };
        if !mappings.iter().all(fits) {
            return invalid("a mapping must have a size, and end below 4294967295");
        }
    }
    let recursive = option.unwrap_or(false);
    Ok(Some(IdMap { uids: uids.clone(), gids: gids.clone(), recursive }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(index: usize, mount: &Mount) -> Result<MountPlan, SpecError> {
        super::plan(index, mount, None)
    }

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            destination: "/x".into(),
            kind: (!kind.is_empty()).then(|| kind.into()),
            source: (!source.is_empty()).then(|| source.into()),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            uid_mappings: Vec::new(),
            gid_mappings: Vec::new(),
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
        let Kind::Tmpfs { source, options, copy_up } = plan.kind else { panic!("no tmpfs") };
        assert_eq!((source.as_str(), copy_up), ("shm", false));
        assert_eq!(
            options,
            [("mode".into(), Some("1777".into())), ("size".into(), Some("65536k".into()))]
        );
    }

    #[test]
    fn a_bind_mount_knows_recursion_propagation_and_recursive_flags() {
        let plan = plan(0, &mount("none", "/a", &["rbind", "rslave", "ro", "rnosuid"])).unwrap();
        assert_eq!(plan.kind, Kind::Bind { source: "/a".into(), recursive: true });
        assert_eq!(plan.propagation, [(libc::MS_SLAVE, true)]);
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
            (mount("bind", "/x", &["size=1"]), "mounts[7].options"),
            (mount("bind", "/x", &["tmpcopyup"]), "mounts[7].options"),
            (mount("proc", "x", &["tmpcopyup"]), "mounts[7].options"),
            (mount("overlay", "x", &["upperdir=/x"]), "mounts[7].options"),
            (mount("overlay", "x", &["lowerdir=/x:y"]), "mounts[7].options"),
        ] {
            assert!(plan(7, &mount).unwrap_err().to_string().contains(field));
        }
    }

    #[test]
    fn the_directories_of_an_overlay_are_taken_apart() {
        let options = ["lowerdir=/a:/b\\:c::/d", "upperdir=/u", "workdir=/w", "index=off"];
        let Kind::Overlay { directories, options } =
            plan(0, &mount("overlay", "", &options)).unwrap().kind
        else {
            panic!("no overlay")
        };
        let directory = |key, path: &str| (key, path.to_owned());
        assert_eq!(
            directories,
            [
                directory("lowerdir+", "/a"),
                directory("lowerdir+", "/b:c"),
                directory("datadir+", "/d"),
                directory("upperdir", "/u"),
                directory("workdir", "/w"),
            ]
        );
        assert_eq!(options, [("index".to_owned(), Some("off".to_owned()))]);
    }

    #[test]
    fn several_propagations_hold_in_their_order() {
        let plan = plan(0, &mount("bind", "/a", &["rslave", "shared"])).unwrap();
        assert_eq!(plan.propagation, [(libc::MS_SLAVE, true), (libc::MS_SHARED, false)]);
    }

    #[test]
    fn mappings_make_an_idmapped_mount_and_are_checked() {
        let mapped = |uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)], options: &[&str]| {
            let map =
                |m: &(u32, u32, u32)| IdMapping { container_id: m.0, host_id: m.1, size: m.2 };
            let mut mount = mount("bind", "/a", options);
            mount.uid_mappings = uids.iter().map(map).collect();
            mount.gid_mappings = gids.iter().map(map).collect();
            plan(3, &mount).map(|plan| plan.id_map)
        };
        let one = &[(0, 1000, 10)][..];
        assert!(!mapped(one, one, &[]).unwrap().unwrap().recursive);
        assert!(mapped(one, one, &["rbind", "ridmap"]).unwrap().unwrap().recursive);
        let own = IdMapping { container_id: 0, host_id: 5, size: 6 };
        let inherited =
            super::plan(3, &mount("bind", "/a", &["idmap"]), Some((&[own], &[own]))).unwrap();
        let expected = IdMap { uids: vec![own], gids: vec![own], recursive: false };
        assert_eq!(inherited.id_map, Some(expected));
        let plain = super::plan(3, &mount("bind", "/a", &[]), Some((&[own], &[own]))).unwrap();
        assert_eq!(plain.id_map, None);
        for (uids, gids, field) in [
            (one, &[][..], "gidMappings"),
            (&[], one, "uidMappings"),
            (&[(0, 0, 0)], one, "uidMappings"),
            (one, &[(1, u32::MAX, 1)], "gidMappings"),
        ] {
            let message = mapped(uids, gids, &[]).unwrap_err().to_string();
            assert!(message.contains(&format!("mounts[3].{field}")), "{message}");
        }
    }

    #[test]
    fn nothing_but_proc_may_be_at_proc() {
        let at_proc = |mut mount: Mount| {
            mount.destination = "/proc/".into();
            plan(0, &mount)
        };
        at_proc(mount("proc", "proc", &[])).unwrap();
        at_proc(mount("bind", "/proc", &["rbind"])).unwrap();
        for other in [mount("tmpfs", "x", &[]), mount("bind", "/x", &[])] {
            assert!(at_proc(other).unwrap_err().to_string().contains("mounts[0].destination"));
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

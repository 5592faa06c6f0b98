//! A container, understood: everything that can be known to be wrong with a request is found here,
//! before anything exists.

use std::collections::BTreeMap;

use husk_proto::agent::BlockDevice;
use husk_proto::guest;

use super::ContainerError;
use super::hooks::HookPlan;
use super::mounts::{self, MountPlan};
use super::namespaces::Namespaces;
use super::process::{Confinement, ProcessPlan};
use super::scheduling;
use super::seccomp::Filter;
use super::spec::{self, Device, NamespaceKind, Spec, SpecError};
use super::user_namespace::UserPlan;
use crate::cgroup::devices::{self, Rule};
use crate::cgroup::values::{self, Setting};
use crate::{storage, sysctl};

/// A container, understood.
#[derive(Debug, Clone)]
pub(crate) struct ContainerPlan {
    pub(crate) process: ProcessPlan,
    /// The `process` object as given, from which an exec takes what it does not say itself.
    pub(crate) given: spec::Process,
    confinement: Confinement,
    pub(crate) namespaces: Namespaces,
    pub(crate) hooks: HookPlan,
    pub(crate) mounts: Vec<MountPlan>,
    pub(crate) devices: Vec<DeviceNode>,
    pub(crate) read_only_root: bool,
    /// Both only with a UTS namespace of its own.
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    /// Of the root: MS_* and whether for all mounts below it.
    pub(crate) propagation: Option<(u64, bool)>,
    /// Below the cgroup of all containers.
    pub(crate) cgroup_path: String,
    pub(crate) cgroup_settings: Vec<Setting>,
    /// Those of the specification.
    pub(crate) device_rules: Vec<Rule>,
    /// Those of the disks that the container has beside it.
    disk_rules: Vec<Rule>,
}

/// A device node to make, beside those that every container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceNode {
    pub(crate) path: String,
    /// S_IFCHR, S_IFBLK or S_IFIFO, and the permissions.
    pub(crate) mode: u32,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Most entries of a list of the specification that costs the kernel something each.
const MAX_ENTRIES: usize = 1024;

/// Permissions of the node of a disk, as they are on most hosts.
const DISK_MODE: u32 = 0o660;

/// Most disks of a container: more than a VM has, and few enough for their rules to fit beside those of
/// the specification.
const MAX_DISKS: usize = 64;

/// Checks the disks that a container is to have.
///
/// # Errors
/// [`ContainerError`] naming the field.
pub(crate) fn check_disks(disks: &[BlockDevice]) -> Result<(), ContainerError> {
    if disks.len() > MAX_DISKS {
        let count = disks.len().to_string();
        return Err(SpecError::invalid("devices", count, "at most 64 of them").into());
    }
    for (index, disk) in disks.iter().enumerate() {
        spec::check_path(|| format!("devices[{index}].path"), &disk.path)?;
        let checked = storage::check_serial("devices.disk_serial", &disk.disk_serial);
        checked.map_err(|source| ContainerError::Disk { path: disk.path.clone(), source })?;
    }
    Ok(())
}

impl ContainerPlan {
    /// Understands the specification of container `id` in a pod of this host name.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(crate) fn new(id: &str, spec: &Spec, pod_hostname: &str) -> Result<Self, SpecError> {
        let root = format!("{}/{id}/rootfs", guest::CONTAINERS);
        if spec.root.path != root {
            let reason = "must be the container's own (CONTAINERS/<id>/rootfs)";
            return Err(SpecError::invalid("root.path", &spec.root.path, reason));
        }
        let linux = &spec.linux;
        for (field, count) in [
            ("mounts", spec.mounts.len()),
            ("linux.devices", linux.devices.len()),
            ("linux.maskedPaths", linux.masked_paths.len()),
            ("linux.readonlyPaths", linux.readonly_paths.len()),
            ("linux.sysctl", linux.sysctl.len()),
        ] {
            if count > MAX_ENTRIES {
                return Err(SpecError::invalid(field, count.to_string(), "at most 1024 entries"));
            }
        }
        let namespaces = Namespaces::new(linux)?;
        let container_map = match &namespaces.user {
            Some(UserPlan::New { uids, gids }) => Some((uids.as_slice(), gids.as_slice())),
            Some(UserPlan::Joined(_)) | None => None,
        };
        let mounts = spec
            .mounts
            .iter()
            .enumerate()
            .map(|(index, mount)| mounts::plan(index, mount, container_map))
            .collect::<Result<_, _>>()?;
        for (field, paths) in [
            ("linux.maskedPaths", &linux.masked_paths),
            ("linux.readonlyPaths", &linux.readonly_paths),
        ] {
            for (index, path) in paths.iter().enumerate() {
                spec::check_path(|| format!("{field}[{index}]"), path)?;
            }
        }
        for key in linux.sysctl.keys() {
            if !sysctl::is_namespaced(key) {
                let reason = "must be of a namespace (net.*, kernel.shm*, kernel.msg*, ...)";
                return Err(SpecError::invalid("linux.sysctl", key, reason));
            }
        }
        let propagation = match linux.rootfs_propagation.as_deref() {
            None | Some("") => None,
            Some(name) => Some(mounts::propagation(name).ok_or_else(|| {
                let reason = "must be a propagation, as rslave";
                SpecError::invalid("linux.rootfsPropagation", name, reason)
            })?),
        };
        let cgroup_path = linux.cgroups_path.clone().filter(|p| !p.is_empty());
        let confinement = Confinement {
            seccomp: linux.seccomp.as_ref().map(Filter::new).transpose()?,
            personality: linux.personality.as_ref().map(scheduling::personality).transpose()?,
        };
        Ok(Self {
            process: ProcessPlan::new(&spec.process, "process.", confinement.clone())?,
            given: spec.process.clone(),
            confinement,
            hostname: own_name("hostname", spec.hostname.as_deref(), &namespaces, pod_hostname)?,
            domainname: own_name("domainname", spec.domainname.as_deref(), &namespaces, "")?,
            namespaces,
            hooks: HookPlan::new(id, &format!("{}/{id}", guest::CONTAINERS), spec)?,
            mounts,
            devices: device_nodes(&linux.devices)?,
            read_only_root: spec.root.readonly,
            sysctls: linux.sysctl.clone(),
            masked_paths: linux.masked_paths.clone(),
            readonly_paths: linux.readonly_paths.clone(),
            propagation,
            cgroup_path: cgroup_path.unwrap_or_else(|| id.to_owned()),
            cgroup_settings: values::settings(&linux.resources)?,
            device_rules: devices::rules(&linux.resources.devices)?,
            disk_rules: Vec::new(),
        })
    }

    /// Gives the container a disk, which is this device of the guest.
    pub(crate) fn add_disk(&mut self, disk: &BlockDevice, device: rustix::fs::Dev) {
        let BlockDevice { disk_serial: _, path, read_only, uid, gid } = disk;
        self.devices.push(DeviceNode {
            path: path.clone(),
            mode: libc::S_IFBLK | DISK_MODE,
            major: rustix::fs::major(device),
            minor: rustix::fs::minor(device),
            uid: *uid,
            gid: *gid,
        });
        self.disk_rules.push(devices::disk(device, *read_only));
    }

    /// The rules of its device cgroup: of those that match, the last one decides.
    pub(crate) fn all_device_rules(&self) -> Vec<Rule> {
        [self.device_rules.as_slice(), &self.disk_rules].concat()
    }

    /// The process of an exec: what it does not say itself is as in the container.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(crate) fn exec(&self, mut process: spec::Process) -> Result<ProcessPlan, SpecError> {
        let given = &self.given;
        process.capabilities = process.capabilities.or_else(|| given.capabilities.clone());
        process.rlimits = process.rlimits.or_else(|| given.rlimits.clone());
        process.no_new_privileges = process.no_new_privileges.or(given.no_new_privileges);
        process.oom_score_adj = process.oom_score_adj.or(given.oom_score_adj);
        process.scheduler = process.scheduler.or_else(|| given.scheduler.clone());
        process.io_priority = process.io_priority.or_else(|| given.io_priority.clone());
        process.exec_cpu_affinity =
            process.exec_cpu_affinity.or_else(|| given.exec_cpu_affinity.clone());
        ProcessPlan::new(&process, "", self.confinement.clone())
    }
}

/// A host or domain name: only for a container with a UTS namespace of its own, but the name that
/// the pod has anyhow is no contradiction.
fn own_name(
    field: &str,
    name: Option<&str>,
    namespaces: &Namespaces,
    pod: &str,
) -> Result<Option<String>, SpecError> {
    match name.filter(|n| !n.is_empty()) {
        None => Ok(None),
        Some(name) if namespaces.makes(NamespaceKind::Uts) => Ok(Some(name.to_owned())),
        Some(name) if name == pod => Ok(None),
        Some(name) => {
            let reason = "needs a uts namespace of the container's own";
            Err(SpecError::invalid(field, name, reason))
        }
    }
}

/// Understands `linux.devices`.
fn device_nodes(given: &[Device]) -> Result<Vec<DeviceNode>, SpecError> {
    let node = |(index, device): (usize, &Device)| {
        let field = |name: &str| format!("linux.devices[{index}].{name}");
        let kind = match device.kind.as_str() {
            "c" | "u" => libc::S_IFCHR,
            "b" => libc::S_IFBLK,
            "p" => libc::S_IFIFO,
            other => {
                return Err(SpecError::invalid(field("type"), other, "must be b, c, u or p"));
            }
        };
        spec::check_path(|| field("path"), &device.path)?;
        Ok(DeviceNode {
            path: device.path.clone(),
            mode: kind | (device.file_mode.unwrap_or(0o666) & 0o7777),
            major: device.major,
            minor: device.minor,
            uid: device.uid.unwrap_or(0),
            gid: device.gid.unwrap_or(0),
        })
    };
    given.iter().enumerate().map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn plan(change: impl FnOnce(&mut Value)) -> Result<ContainerPlan, SpecError> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["true"], "noNewPrivileges": true,
                        "capabilities": {"bounding": ["CAP_KILL"]}},
            "root": {"path": "/run/husk/containers/a/rootfs"},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        });
        change(&mut spec);
        let spec = spec::parse(&serde_json::to_vec(&spec).unwrap())?;
        ContainerPlan::new("a", &spec, "pod")
    }

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        plan(change).unwrap_err().to_string()
    }

    #[test]
    fn a_root_elsewhere_is_refused() {
        assert!(refusal(|s| s["root"]["path"] = json!("/")).contains("root.path"));
    }

    #[test]
    fn a_container_needs_a_mount_namespace_of_its_own() {
        assert!(refusal(|s| s["linux"]["namespaces"] = json!([])).contains("linux.namespaces"));
        let joined = json!([{"type": "mount", "path": "/proc/1/ns/mnt"}]);
        assert!(refusal(|s| s["linux"]["namespaces"] = joined).contains("linux.namespaces[0]"));
        let twice = json!([{"type": "mount"}, {"type": "mount"}]);
        assert!(refusal(|s| s["linux"]["namespaces"] = twice).contains("once"));
    }

    #[test]
    fn a_host_name_needs_a_uts_namespace_unless_it_is_the_pods() {
        assert_eq!(plan(|s| s["hostname"] = json!("pod")).unwrap().hostname, None);
        assert!(refusal(|s| s["hostname"] = json!("other")).contains("hostname"));
        let own = plan(|s| {
            s["hostname"] = json!("other");
            s["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
        });
        assert_eq!(own.unwrap().hostname.as_deref(), Some("other"));
    }

    #[test]
    fn the_cgroup_is_named_after_the_container_unless_a_path_is_given() {
        assert_eq!(plan(|_| ()).unwrap().cgroup_path, "a");
        let given = plan(|s| s["linux"]["cgroupsPath"] = json!("/x/y")).unwrap();
        assert_eq!(given.cgroup_path, "/x/y");
    }

    #[test]
    fn sysctls_of_the_whole_guest_are_refused() {
        assert!(plan(|s| s["linux"]["sysctl"] = json!({"net.core.somaxconn": "1"})).is_ok());
        let message = refusal(|s| s["linux"]["sysctl"] = json!({"vm.swappiness": "1"}));
        assert!(message.contains("linux.sysctl") && message.contains("vm.swappiness"));
    }

    #[test]
    fn devices_are_understood() {
        let devices = json!([{"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229}]);
        let plan = plan(|s| s["linux"]["devices"] = devices).unwrap();
        let [node] = &plan.devices[..] else { panic!("not one") };
        assert_eq!((node.mode, node.major, node.minor), (libc::S_IFCHR | 0o666, 10, 229));
        let bad = json!([{"type": "x", "path": "/dev/fuse"}]);
        assert!(refusal(|s| s["linux"]["devices"] = bad).contains("linux.devices[0].type"));
    }

    fn disk(serial: &str, path: &str, read_only: bool) -> BlockDevice {
        let (disk_serial, path) = (serial.to_owned(), path.to_owned());
        BlockDevice { disk_serial, path, read_only, uid: 5, gid: 6 }
    }

    #[test]
    fn a_disk_becomes_a_node_and_a_rule_beside_those_of_the_specification() {
        let mut plan = plan(|_| ()).unwrap();
        let given = plan.device_rules.clone();
        let device = rustix::fs::makedev(254, 16);
        plan.add_disk(&disk("vol-0", "/dev/xvda", true), device);
        let expected = DeviceNode {
            path: "/dev/xvda".into(),
            mode: libc::S_IFBLK | 0o660,
            major: 254,
            minor: 16,
            uid: 5,
            gid: 6,
        };
        assert_eq!(plan.devices, [expected]);
        let rules = plan.all_device_rules();
        assert_eq!(rules.split_last(), Some((&devices::disk(device, true), given.as_slice())));
        // By these, an update tells whether it repeats what is in force.
        assert_eq!(plan.device_rules, given);
    }

    #[test]
    fn disks_are_checked_by_their_fields() {
        check_disks(&[disk("vol-0", "/dev/xvda", false)]).unwrap();
        let message = |disks: &[BlockDevice]| crate::chain(&check_disks(disks).unwrap_err());
        let relative = message(&[disk("a", "/a", false), disk("b", "b", false)]);
        assert!(relative.contains("devices[1].path"), "{relative}");
        for serial in ["", "a/b", "123456789012345678901"] {
            let words = message(&[disk(serial, "/dev/xvda", false)]);
            assert!(
                words.contains("/dev/xvda") && words.contains("devices.disk_serial"),
                "{words}"
            );
        }
        let many = message(&vec![disk("a", "/a", false); MAX_DISKS + 1]);
        assert!(many.contains("at most 64"), "{many}");
    }

    #[test]
    fn the_rules_of_all_disks_fit_beside_all_of_the_specification() {
        let rule = json!({"allow": true, "type": "b", "major": 1, "minor": 2, "access": "r"});
        let rules = vec![rule; 250];
        let mut plan = plan(|s| s["linux"]["resources"]["devices"] = json!(rules)).unwrap();
        for minor in 0..MAX_DISKS {
            let device = rustix::fs::makedev(254, u32::try_from(minor).unwrap());
            plan.add_disk(&disk("a", "/a", true), device);
        }
        // BPF_MAXINSNS
        assert!(devices::program(&plan.all_device_rules()).len() <= 4096);
    }

    #[test]
    fn an_exec_takes_from_the_container_what_it_does_not_say() {
        let plan = plan(|_| ()).unwrap();
        let exec = |json: &[u8]| plan.exec(spec::parse_process(json).unwrap()).unwrap();
        let inherited = format!("{:?}", exec(br#"{"cwd": "/", "args": ["x"]}"#));
        assert!(inherited.contains("no_new_privileges: true") && inherited.contains("KILL"));
        let own =
            exec(br#"{"cwd": "/", "args": ["x"], "noNewPrivileges": false, "capabilities": {}}"#);
        let own = format!("{own:?}");
        assert!(own.contains("no_new_privileges: false") && !own.contains("KILL"));
    }
}

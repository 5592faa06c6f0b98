//! `linux.namespaces` and `linux.timeOffsets`: which namespaces a container has for itself, and which
//! it shares.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;
use serde::Deserialize;

use super::plan::ContainerPlan;
use super::process::{StepError, step};
use super::spec::{self, Linux, NamespaceKind, SpecError};
use super::user_namespace::UserPlan;
use crate::sys;

/// `linux.timeOffsets`
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct TimeOffsets {
    monotonic: Option<TimeOffset>,
    boottime: Option<TimeOffset>,
}

/// How far a clock of the container is before the guest's.
#[derive(Debug, Clone, Copy, Deserialize)]
struct TimeOffset {
    #[serde(default)]
    secs: i64,
    #[serde(default)]
    nanosecs: u32,
}

/// Which namespaces a container has for itself (CLONE_NEW*), and which it joins (paths).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    pub(crate) new: u64,
    pub(crate) joined: Vec<(NamespaceKind, String)>,
    /// Neither in `new` nor in `joined`, because all others depend on it.
    pub(crate) user: Option<UserPlan>,
    /// What is to be written to timens_offsets.
    time_offsets: String,
}

impl NamespaceKind {
    /// The flag of clone(2) and setns(2).
    pub(crate) fn flag(self) -> u64 {
        let flag = match self {
            Self::Pid => libc::CLONE_NEWPID,
            Self::Network => libc::CLONE_NEWNET,
            Self::Mount => libc::CLONE_NEWNS,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::Time => libc::CLONE_NEWTIME,
            Self::User => libc::CLONE_NEWUSER,
        };
        u64::from(flag.unsigned_abs())
    }

    fn set(self) -> ThreadNameSpaceType {
        match self {
            Self::Pid => ThreadNameSpaceType::PROCESS_ID,
            Self::Network => ThreadNameSpaceType::NETWORK,
            Self::Mount => ThreadNameSpaceType::MOUNT,
            Self::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
            Self::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
            Self::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
            Self::Time => ThreadNameSpaceType::TIME,
            Self::User => ThreadNameSpaceType::USER,
        }
    }
}

/// The kinds that a process enters like any other: not those of users, process IDs and time.
const OTHERS: [NamespaceKind; 5] = [
    NamespaceKind::Mount,
    NamespaceKind::Cgroup,
    NamespaceKind::Ipc,
    NamespaceKind::Uts,
    NamespaceKind::Network,
];

/// Opens the file of a namespace that is to be joined.
pub(crate) fn open(path: &str) -> Result<OwnedFd, StepError> {
    // Whatever it is, it must not be waited for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(step(format!("linux.namespaces: open {path}")))
}

impl Namespaces {
    /// Understands what `linux` says about namespaces.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(crate) fn new(linux: &Linux) -> Result<Self, SpecError> {
        let mut all = Self::default();
        let mut seen = 0;
        for (index, namespace) in linux.namespaces.iter().enumerate() {
            let field = format!("linux.namespaces[{index}]");
            let flag = namespace.kind.flag();
            let name = format!("{:?}", namespace.kind).to_lowercase();
            if seen & flag != 0 {
                return Err(SpecError::invalid(field, name, "must appear once"));
            }
            seen |= flag;
            let user = namespace.kind == NamespaceKind::User;
            let path = namespace.path.as_deref().filter(|p| !p.is_empty());
            if let Some(path) = path {
                spec::check_path(|| format!("{field}.path"), path)?;
            }
            match path {
                None if user => all.user = Some(UserPlan::of_mappings(linux)?),
                None => all.new |= flag,
                Some(_) if namespace.kind == NamespaceKind::Mount => {
                    let reason =
                        "a mount namespace cannot be joined: the root is made in a new one";
                    return Err(SpecError::invalid(field, name, reason));
                }
                Some(path) if user => all.user = Some(UserPlan::Joined(path.to_owned())),
                Some(path) => all.joined.push((namespace.kind, path.to_owned())),
            }
        }
        if !all.makes(NamespaceKind::Mount) {
            let reason = "must hold a new mount namespace";
            return Err(SpecError::invalid("linux.namespaces", "[]", reason));
        }
        if !matches!(all.user, Some(UserPlan::New { .. })) {
            for (name, mappings) in
                [("uidMappings", &linux.uid_mappings), ("gidMappings", &linux.gid_mappings)]
            {
                if !mappings.is_empty() {
                    let count = format!("{} mappings", mappings.len());
                    let reason = "needs a new user namespace";
                    return Err(SpecError::invalid(format!("linux.{name}"), count, reason));
                }
            }
        }
        all.time_offsets = time_offsets(&linux.time_offsets)?;
        if !all.time_offsets.is_empty() && !all.makes(NamespaceKind::Time) {
            let reason = "needs a new time namespace";
            return Err(SpecError::invalid("linux.timeOffsets", &all.time_offsets, reason));
        }
        Ok(all)
    }

    /// Whether the container has one of its own.
    pub(crate) fn makes(&self, kind: NamespaceKind) -> bool {
        self.new & kind.flag() != 0
    }

    /// The path of the one that it joins.
    pub(crate) fn joins(&self, kind: NamespaceKind) -> Option<&str> {
        self.joined.iter().find(|(k, _)| *k == kind).map(|(_, path)| path.as_str())
    }

    /// Those that the clone of its first process makes. With a user namespace that is the one of
    /// process IDs only: the others are made by who holds the user namespace, so as to belong to it.
    pub(crate) fn by_clone(&self) -> u64 {
        if self.user.is_some() {
            return self.new & NamespaceKind::Pid.flag();
        }
        // The root of a cgroup namespace would be the agent's cgroup, and a time namespace takes
        // no offsets once there is a process in it: both are made by the process itself.
        self.new & !NamespaceKind::Cgroup.flag() & !NamespaceKind::Time.flag()
    }

    /// Those that the holder of its user namespace makes.
    pub(crate) fn by_holder(&self) -> u64 {
        self.new & !NamespaceKind::Pid.flag() & !NamespaceKind::Time.flag()
    }

    /// The kinds of [`Self::by_holder`].
    pub(crate) fn of_holder(&self) -> ThreadNameSpaceType {
        let made = |kind: &NamespaceKind| self.by_holder() & kind.flag() != 0;
        OTHERS.into_iter().filter(made).fold(ThreadNameSpaceType::empty(), |all, k| all | k.set())
    }

    /// Those that a further process has to enter by itself; of process IDs by its clone.
    pub(crate) fn to_enter(&self) -> ThreadNameSpaceType {
        let time = self.makes(NamespaceKind::Time) || self.joins(NamespaceKind::Time).is_some();
        OTHERS
            .into_iter()
            .chain(time.then_some(NamespaceKind::Time))
            .fold(ThreadNameSpaceType::empty(), |all, kind| all | kind.set())
    }
}

/// Understands the offsets: lines for timens_offsets(5).
fn time_offsets(given: &TimeOffsets) -> Result<String, SpecError> {
    let TimeOffsets { monotonic, boottime } = given;
    let mut text = String::new();
    for (clock, offset) in [("monotonic", monotonic), ("boottime", boottime)] {
        let Some(TimeOffset { secs, nanosecs }) = offset else { continue };
        if *nanosecs > 999_999_999 {
            let field = format!("linux.timeOffsets.{clock}.nanosecs");
            return Err(SpecError::invalid(field, nanosecs.to_string(), "must be below 10^9"));
        }
        text.push_str(&format!("{clock} {secs} {nanosecs}\n"));
    }
    Ok(text)
}

/// Enters the namespaces of a new container that nobody has made, and prepares all. To be
/// called while the process still sees the agent's /proc.
///
/// # Errors
/// [`StepError`].
pub(crate) fn enter_new(plan: &ContainerPlan) -> Result<(), StepError> {
    let namespaces = &plan.namespaces;
    for (kind, path) in &namespaces.joined {
        // The process ID namespace was entered by the clone.
        if *kind != NamespaceKind::Pid {
            rustix::thread::move_into_thread_name_spaces(open(path)?.as_fd(), kind.set())
                .map_err(step(format!("linux.namespaces: join {path}")))?;
        }
    }
    if namespaces.makes(NamespaceKind::Cgroup) && namespaces.user.is_none() {
        sys::unshare(libc::CLONE_NEWCGROUP).map_err(step("new cgroup namespace"))?;
    }
    if namespaces.makes(NamespaceKind::Time) {
        // This process is in it from its execve on, and what it starts at once.
        sys::unshare(libc::CLONE_NEWTIME).map_err(step("new time namespace"))?;
        if !namespaces.time_offsets.is_empty() {
            std::fs::write("/proc/self/timens_offsets", &namespaces.time_offsets)
                .map_err(step("linux.timeOffsets"))?;
        }
    }
    if namespaces.makes(NamespaceKind::Network) {
        sys::loopback_up().map_err(step("bring the loopback interface up"))?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes()).map_err(step("hostname"))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes()).map_err(step("domainname"))?;
    }
    crate::sysctl::apply(&plan.sysctls).map_err(|e| StepError {
        step: "linux.sysctl".into(),
        source: io::Error::other(crate::chain(&e)),
    })
}

/// Enters namespaces of a running process.
///
/// # Errors
/// [`StepError`].
pub(crate) fn enter_of(pidfd: BorrowedFd<'_>, kinds: ThreadNameSpaceType) -> Result<(), StepError> {
    rustix::thread::move_into_thread_name_spaces(pidfd, kinds)
        .map_err(step("enter the container's namespaces"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn understood(json: Value) -> Result<Namespaces, String> {
        let linux: Linux = serde_json::from_value(json).map_err(|e| e.to_string())?;
        Namespaces::new(&linux).map_err(|e| e.to_string())
    }

    fn with(kinds: &[Value]) -> Result<Namespaces, String> {
        let mut all = vec![json!({"type": "mount"})];
        all.extend_from_slice(kinds);
        understood(json!({ "namespaces": all }))
    }

    #[test]
    fn each_kind_appears_once_at_most() {
        for kind in ["pid", "network", "mount", "ipc", "uts", "cgroup", "time"] {
            let one = json!({ "type": kind });
            let message = with(&[one.clone(), one]).unwrap_err();
            assert!(message.contains("once"), "{message}");
        }
    }

    #[test]
    fn a_path_is_joined_and_no_path_means_a_new_one() {
        let path = "/proc/7/ns/ipc";
        let all = with(&[json!({"type": "ipc", "path": path}), json!({"type": "uts", "path": ""})])
            .unwrap();
        assert_eq!(all.joins(NamespaceKind::Ipc), Some(path));
        assert!(all.makes(NamespaceKind::Uts) && !all.makes(NamespaceKind::Ipc));
        let message = with(&[json!({"type": "ipc", "path": "relative"})]).unwrap_err();
        assert!(message.contains("linux.namespaces[1].path"), "{message}");
    }

    #[test]
    fn offsets_need_a_new_time_namespace() {
        let offsets =
            json!({"monotonic": {"secs": 86400, "nanosecs": 5}, "boottime": {"secs": -1}});
        let mount = json!({"type": "mount"});
        let plan = |time: Value, offsets: &Value| {
            understood(json!({"namespaces": [mount, time], "timeOffsets": offsets}))
        };
        let all = plan(json!({"type": "time"}), &offsets).unwrap();
        assert_eq!(all.time_offsets, "monotonic 86400 5\nboottime -1 0\n");
        for other in [json!({"type": "uts"}), json!({"type": "time", "path": "/proc/1/ns/time"})] {
            assert!(plan(other, &offsets).unwrap_err().contains("linux.timeOffsets"));
        }
        let bad = json!({"boottime": {"nanosecs": 1_000_000_000}});
        let message = plan(json!({"type": "time"}), &bad).unwrap_err();
        assert!(message.contains("linux.timeOffsets.boottime.nanosecs"), "{message}");
    }

    #[test]
    fn what_the_clone_cannot_make_is_left_to_the_process() {
        let all =
            with(&[json!({"type": "pid"}), json!({"type": "cgroup"}), json!({"type": "time"})])
                .unwrap();
        assert_eq!(all.by_clone(), NamespaceKind::Mount.flag() | NamespaceKind::Pid.flag());
        assert!(all.to_enter().contains(ThreadNameSpaceType::TIME));
        assert!(!with(&[]).unwrap().to_enter().contains(ThreadNameSpaceType::TIME));
    }
}

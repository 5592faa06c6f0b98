//! The `process` object: understood before the process exists, applied inside it.

use std::ffi::CString;
use std::io;

use rustix::fs::Mode;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::caps::{self, CapSets};
use super::scheduling::{self, Affinity};
use super::seccomp::Filter;
use super::spec::{self, Capabilities, Process, SpecError};
use super::user::{self, Identity};
use crate::sys::{self, SchedAttr};

/// What every process of a container is subject to, whoever starts it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Confinement {
    pub(crate) seccomp: Option<Filter>,
    /// `PER_*` of personality(2).
    pub(crate) personality: Option<u32>,
}

/// A process, understood.
#[derive(Debug, Clone)]
pub(crate) struct ProcessPlan {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// `USER[:GROUP]`, which wins over `uid` and `gid` and adds to `groups`.
    username: Option<String>,
    umask: u32,
    capabilities: CapSets,
    rlimits: Vec<(Resource, Rlimit)>,
    no_new_privileges: bool,
    oom_score_adj: i32,
    scheduler: Option<SchedAttr>,
    io_priority: Option<u16>,
    /// For an exec only.
    pub(crate) affinity: Affinity,
    confinement: Confinement,
    /// Some if it has a terminal: its columns and rows, both 0 if the specification gives none.
    pub(crate) terminal: Option<(u16, u16)>,
}

/// Names of resource limits.
const RLIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_STACK", Resource::Stack),
];

/// The file mode creation mask of a process that names none, as in runc.
const DEFAULT_UMASK: u32 = 0o022;

/// Open files of a process that names no limit: the kernel's own default.
const DEFAULT_NOFILE: u64 = 1024;

/// Most supplementary groups that Linux takes (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// A step of starting a process that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(crate) struct StepError {
    pub(crate) step: String,
    #[source]
    pub(crate) source: io::Error,
}

/// Names the step that failed.
pub(crate) fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> StepError {
    move |source| StepError { step: step.into(), source: source.into() }
}

impl ProcessPlan {
    /// Understands a `process` object; `prefix` is put before the fields' names in errors.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] naming the field.
    pub(crate) fn new(
        process: &Process,
        prefix: &str,
        confinement: Confinement,
    ) -> Result<Self, SpecError> {
        let given = &process.user;
        // The kernel takes this number for "do not change".
        for (name, id) in [("uid", given.uid), ("gid", given.gid)]
            .into_iter()
            .chain(given.additional_gids.iter().map(|gid| ("additionalGids", *gid)))
        {
            if id == u32::MAX {
                let field = format!("{prefix}user.{name}");
                return Err(SpecError::invalid(field, id.to_string(), "must be below 2^32 - 1"));
            }
        }
        if given.additional_gids.len() > MAX_GROUPS {
            let count = given.additional_gids.len().to_string();
            let field = format!("{prefix}user.additionalGids");
            return Err(SpecError::invalid(field, count, "must be at most 65536 groups"));
        }
        let none = Capabilities::default();
        let adj = process.oom_score_adj.unwrap_or(0);
        if !(-1000..=1000).contains(&adj) {
            let field = format!("{prefix}oomScoreAdj");
            return Err(SpecError::invalid(field, adj.to_string(), "must be -1000 to 1000"));
        }
        Ok(Self {
            args: process.args.clone(),
            env: process.env.clone(),
            cwd: process.cwd.clone(),
            uid: given.uid,
            gid: given.gid,
            groups: given.additional_gids.clone(),
            username: given.username.clone().filter(|name| !name.is_empty()),
            umask: given.umask.unwrap_or(DEFAULT_UMASK),
            capabilities: caps::sets(process.capabilities.as_ref().unwrap_or(&none), prefix)?,
            rlimits: rlimits(process.rlimits.as_deref().unwrap_or_default(), prefix)?,
            no_new_privileges: process.no_new_privileges.unwrap_or(false),
            oom_score_adj: adj,
            scheduler: process
                .scheduler
                .as_ref()
                .map(|given| scheduling::scheduler(given, prefix))
                .transpose()?,
            io_priority: process
                .io_priority
                .as_ref()
                .map(|given| scheduling::io_priority(given, prefix))
                .transpose()?,
            affinity: match &process.exec_cpu_affinity {
                Some(given) => scheduling::affinity(given, prefix)?,
                None => Affinity::default(),
            },
            confinement,
            terminal: process
                .terminal
                .then(|| process.console_size.map_or((0, 0), |s| (s.width, s.height))),
        })
    }

    /// Makes the process a candidate for the OOM killer, which the agent is not. To be called while
    /// the process still sees the agent's /proc.
    pub(crate) fn apply_oom_score(&self) -> Result<(), StepError> {
        std::fs::write("/proc/self/oom_score_adj", self.oom_score_adj.to_string())
            .map_err(step("oomScoreAdj"))
    }

    /// Sets how the process is scheduled. To be called while it has all rights.
    pub(crate) fn apply_scheduling(&self, exec: bool) -> Result<(), StepError> {
        let cpus = self.affinity.last.as_ref().filter(|_| exec);
        scheduling::apply(self.scheduler.as_ref(), self.io_priority, cpus)
    }

    /// Sets the resource limits, which the process may not raise itself later.
    pub(crate) fn apply_rlimits(&self) -> Result<(), StepError> {
        if !self.rlimits.iter().any(|(resource, _)| *resource == Resource::Nofile) {
            // Not the agent's: programs that use select(2), or close all descriptors up to it, fail
            // with a high one.
            let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
            let current = Some(DEFAULT_NOFILE.min(maximum.unwrap_or(u64::MAX)));
            let limit = Rlimit { current, maximum };
            rustix::process::setrlimit(Resource::Nofile, limit)
                .map_err(step("rlimits: default"))?;
        }
        for (resource, limit) in &self.rlimits {
            rustix::process::setrlimit(*resource, *limit)
                .map_err(step(format!("rlimits: {resource:?}")))?;
        }
        Ok(())
    }

    /// As whom the process runs. To be called inside the container, whose files say who a name is.
    pub(crate) fn identity(&self) -> Result<Identity, StepError> {
        let Some(username) = &self.username else {
            return Ok(Identity { uid: self.uid, gid: self.gid, groups: self.groups.clone() });
        };
        let passwd = read_if_there("/etc/passwd").map_err(step("/etc/passwd"))?;
        let group = read_if_there("/etc/group").map_err(step("/etc/group"))?;
        let mut identity = user::resolve(username, &passwd, &group)
            .map_err(|e| step("process.user.username")(io::Error::other(e)))?;
        identity.groups.extend(&self.groups);
        Ok(identity)
    }

    /// Goes to the working directory, and becomes the user with its groups and capabilities.
    pub(crate) fn apply_identity(&self, identity: &Identity) -> Result<(), StepError> {
        rustix::process::umask(Mode::from_raw_mode(self.umask & 0o777));
        // As runc: first with all rights; then again as the user, who may be the only one to enter
        // (a FUSE file system, for instance).
        let entered = rustix::process::chdir(self.cwd.as_str());
        self.become_user(identity)?;
        if let Err(first) = entered {
            let retry = match first {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    rustix::process::chdir(self.cwd.as_str())
                }
                other => Err(other),
            };
            retry.map_err(step(format!("cwd {:?}", self.cwd)))?;
        }
        if self.no_new_privileges {
            thread::set_no_new_privs(true).map_err(step("noNewPrivileges"))?;
        }
        if let Some(domain) = self.confinement.personality {
            sys::personality(domain).map_err(step("linux.personality"))?;
        }
        Ok(())
    }

    /// Confines the process to the system calls of its profile: the very last thing, after which the
    /// profile need not allow more than the execution of the program.
    pub(crate) fn apply_seccomp(&self) -> Result<(), StepError> {
        match &self.confinement.seccomp {
            Some(filter) => filter.install().map_err(step("linux.seccomp")),
            None => Ok(()),
        }
    }

    /// What the process still needs of the agent's rights up to the execution of its program: to
    /// install a filter without `no_new_privs`. It need not be dropped before, because an execution
    /// does not look at the effective and permitted sets of who executes (capabilities(7)), and
    /// could not be without a system call that the profile may forbid.
    fn until_executed(&self) -> CapabilitySet {
        if self.confinement.seccomp.is_some() && !self.no_new_privileges {
            CapabilitySet::SYS_ADMIN
        } else {
            CapabilitySet::empty()
        }
    }

    /// The order matters: the bounding set needs CAP_SETPCAP, the groups need CAP_SETGID, and the
    /// permitted set survives the change of user only by KEEPCAPS.
    fn become_user(&self, identity: &Identity) -> Result<(), StepError> {
        let wanted = &self.capabilities;
        for capability in caps::every().filter(|c| !wanted.bounding.contains(*c)) {
            thread::remove_capability_from_bounding_set(capability)
                .map_err(step("capabilities.bounding"))?;
        }
        thread::set_keep_capabilities(true).map_err(step("keep capabilities"))?;
        let groups: Vec<Gid> = identity.groups.iter().map(|g| Gid::from_raw(*g)).collect();
        thread::set_thread_groups(&groups).map_err(step("user.additionalGids"))?;
        let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        thread::set_thread_res_gid(gid, gid, gid).map_err(step("user.gid"))?;
        thread::set_thread_res_uid(uid, uid, uid).map_err(step("user.uid"))?;
        thread::set_keep_capabilities(false).map_err(step("keep capabilities"))?;
        let sets = CapabilitySets {
            effective: wanted.effective | self.until_executed(),
            permitted: wanted.permitted | self.until_executed(),
            inheritable: wanted.inheritable,
        };
        thread::set_capabilities(None, sets).map_err(step("capabilities"))?;
        thread::clear_ambient_capability_set().map_err(step("capabilities.ambient"))?;
        for capability in caps::every().filter(|c| wanted.ambient.contains(*c)) {
            let one: CapabilitySet = capability;
            thread::configure_capability_in_ambient_set(one, true)
                .map_err(step("capabilities.ambient"))?;
        }
        Ok(())
    }

    /// The environment, with HOME added from the container's /etc/passwd if it has none, as runc
    /// does. To be called inside the container.
    pub(crate) fn environment(&self, uid: u32) -> Vec<String> {
        let mut env = self.env.clone();
        let has_home = env.iter().any(|e| e.strip_prefix("HOME=").is_some_and(|v| !v.is_empty()));
        if !has_home {
            env.retain(|e| !e.starts_with("HOME="));
            // HOME is a convenience: a container with a broken file starts, at the root.
            let passwd = read_if_there("/etc/passwd").unwrap_or_default();
            env.push(format!("HOME={}", user::home(&passwd, uid).unwrap_or("/")));
        }
        env
    }
}

/// Most of /etc/passwd that is read: the file is the container's, and can be anything.
const MAX_PASSWD_BYTES: u64 = 1 << 20;

/// The file's text; a container without it has nobody in it. One that cannot be read, or only in
/// part, is an error: a group that is overlooked would be a right lost, or a denial.
fn read_if_there(path: &str) -> io::Result<String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut text = Vec::new();
    // A FIFO of that name must not stop the start.
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    file.take(MAX_PASSWD_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_PASSWD_BYTES {
        let message = format!("larger than {MAX_PASSWD_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Understands the resource limits.
fn rlimits(given: &[spec::Rlimit], prefix: &str) -> Result<Vec<(Resource, Rlimit)>, SpecError> {
    let mut all: Vec<(Resource, Rlimit)> = Vec::new();
    for (index, limit) in given.iter().enumerate() {
        let field = format!("{prefix}rlimits[{index}]");
        let Some((_, resource)) = RLIMITS.iter().find(|(name, _)| *name == limit.kind) else {
            return Err(SpecError::invalid(field, &limit.kind, "must name one, as RLIMIT_NOFILE"));
        };
        if limit.soft > limit.hard {
            let value = limit.soft.to_string();
            return Err(SpecError::invalid(field, value, "soft must not be above hard"));
        }
        if all.iter().any(|(r, _)| r == resource) {
            return Err(SpecError::invalid(field, &limit.kind, "must appear once"));
        }
        // RLIM_INFINITY
        let value = |v: u64| (v != u64::MAX).then_some(v);
        let limit = Rlimit { current: value(limit.soft), maximum: value(limit.hard) };
        all.push((*resource, limit));
    }
    Ok(all)
}

/// Strings as C wants them.
pub(crate) fn c_strings(strings: &[String]) -> Result<Vec<CString>, StepError> {
    strings.iter().map(|s| CString::new(s.as_str()).map_err(step("a string with a NUL"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_of_users_is_empty_and_one_that_is_too_large_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        assert_eq!(read_if_there(&path("none")).unwrap(), "");
        let most = usize::try_from(MAX_PASSWD_BYTES).unwrap();
        std::fs::write(path("most"), "x".repeat(most)).unwrap();
        assert_eq!(read_if_there(&path("most")).unwrap().len(), most);
        std::fs::write(path("more"), "x".repeat(most + 1)).unwrap();
        assert_eq!(read_if_there(&path("more")).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert!(read_if_there(&path("")).is_err());
    }

    use serde_json::{Value, json};

    fn plan(extra: Value) -> Result<ProcessPlan, SpecError> {
        let mut process = json!({"cwd": "/", "args": ["true"]});
        process.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let process = serde_json::from_value(process).unwrap();
        ProcessPlan::new(&process, "process.", Confinement::default())
    }

    #[test]
    fn limits_are_understood_and_infinity_is_no_limit() {
        let rlimits = json!([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": u64::MAX}]);
        let plan = plan(json!({ "rlimits": rlimits })).unwrap();
        let [(resource, limit)] = &plan.rlimits[..] else { panic!("not one") };
        assert_eq!(*resource, Resource::Nofile);
        assert_eq!((limit.current, limit.maximum), (Some(64), None));
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        for (extra, field) in [
            (json!({"user": {"uid": u32::MAX, "gid": 0}}), "process.user.uid"),
            (json!({"oomScoreAdj": 1001}), "process.oomScoreAdj"),
            (
                json!({"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}),
                "process.rlimits[0]",
            ),
            (
                json!({"rlimits": [{"type": "RLIMIT_AS", "soft": 2, "hard": 1}]}),
                "process.rlimits[0]",
            ),
            (
                json!({"rlimits": [{"type": "RLIMIT_AS", "soft": 1, "hard": 1},
                                   {"type": "RLIMIT_AS", "soft": 1, "hard": 1}]}),
                "process.rlimits[1]",
            ),
        ] {
            let message = plan(extra).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn a_given_home_is_kept_and_an_empty_one_replaced() {
        let given = plan(json!({"env": ["HOME=/h"]})).unwrap();
        assert_eq!(given.environment(0), ["HOME=/h"]);
        let empty = plan(json!({"env": ["A=1", "HOME="], "user": {"uid": 0, "gid": 0}})).unwrap();
        assert_eq!(empty.environment(0), ["A=1", "HOME=/root"]);
    }
}

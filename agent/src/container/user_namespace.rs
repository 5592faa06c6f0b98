//! User namespaces: containers whose root is nobody in the guest.
//!
//! ```text
//!  agent ── clone ─▶ holder: user namespace, then the container's other namespaces in it
//!    │   ◀─ ready ──   │
//!    │                 │ namespaces
//!    └── clone ─▶ container's process: enters them with the agent's rights, makes the mounts,
//!                                      enters the user namespace as its root, goes on as any other
//! ```
//! The namespaces have to be made inside the user namespace, or the container's root would have no
//! rights over them; the mounts (overlay, device nodes) need the rights of the guest's root. Hence two
//! processes. The holder ends when the container is made. The namespaces of process IDs and of time
//! belong to the guest's root: both need the container's process itself.
//!
//! The layers of the root are shown with mapped owners (idmapped mounts): on the disk they stay as
//! they are, and root's files are those of the container's root. Volumes are not touched, as the
//! specification demands: what they hold belongs to the container's users only as far as it is mapped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::OpenTreeFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{DumpableBehavior, Gid, Uid};
use rustix::thread::{CapabilitySets, ThreadNameSpaceType};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::id_map::lines;
use super::mounts::Kind;
use super::namespaces;
use super::plan::ContainerPlan;
use super::process::{StepError, step};
use super::report::Report;
use super::rootfs::{self, Overlay};
use super::spawn::read_report;
use super::spec::{IdMapping, Linux, NamespaceKind, SpecError};
use super::{ContainerError, Runner};
use crate::reaper::Reaped;
use crate::sys::{self, Cloned};

/// The user namespace that a container is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UserPlan {
    New {
        uids: Vec<IdMapping>,
        gids: Vec<IdMapping>,
    },
    /// That of a path.
    Joined(String),
}

/// Most mappings that Linux takes (UID_GID_MAP_MAX_EXTENTS).
const MAX_MAPPINGS: usize = 340;

impl UserPlan {
    /// A new namespace with the mappings of `linux`.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(crate) fn of_mappings(linux: &Linux) -> Result<Self, SpecError> {
        for (name, mappings) in
            [("uidMappings", &linux.uid_mappings), ("gidMappings", &linux.gid_mappings)]
        {
            let field = format!("linux.{name}");
            let invalid = |reason| {
                Err(SpecError::invalid(&field, format!("{} mappings", mappings.len()), reason))
            };
            if mappings.is_empty() || mappings.len() > MAX_MAPPINGS {
                return invalid("a new user namespace needs 1 to 340 mappings");
            }
            // 2^32 - 1 is no ID.
            let fits = |first: u32, size: u32| first.checked_add(size).is_some();
            let good = |m: &IdMapping| {
                m.size > 0 && fits(m.container_id, m.size) && fits(m.host_id, m.size)
            };
            if !mappings.iter().all(good) {
                return invalid("each must have a size, and end below 2^32");
            }
            if translate(mappings, 0).is_none() {
                return invalid("must map 0: the container's root makes the container");
            }
        }
        Ok(Self::New { uids: linux.uid_mappings.clone(), gids: linux.gid_mappings.clone() })
    }
}

/// The number outside of an ID inside.
fn translate(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id).filter(|offset| *offset < m.size)?;
        m.host_id.checked_add(offset)
    })
}

/// Mappings from the kernel's text.
fn parse(text: &str) -> Option<Vec<IdMapping>> {
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(|n| n.parse().ok());
        let (container_id, host_id) = (numbers.next()??, numbers.next()??);
        Some(IdMapping { container_id, host_id, size: numbers.next()?? })
    };
    text.lines().map(line).collect()
}

/// The mappings of a user namespace, with which its root is somebody outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mappings {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
    root: (u32, u32),
}

impl Mappings {
    /// Those of a process.
    ///
    /// # Errors
    /// If they cannot be read, or map no root.
    pub(crate) fn of_process(pid: u32) -> Result<Self, StepError> {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/{name}"))?;
            parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        let of = || {
            let (uids, gids) = (read("uid_map")?, read("gid_map")?);
            let root = translate(&uids, 0).zip(translate(&gids, 0));
            let root = root.ok_or_else(|| io::Error::other("it maps no root"))?;
            Ok(Self { uids, gids, root })
        };
        of().map_err(step::<io::Error>("read the mappings of the user namespace"))
    }

    /// Makes a stream of a process its root's, who could not take it.
    pub(crate) fn give(&self, fd: &OwnedFd) -> rustix::io::Result<()> {
        let (uid, gid) = self.root;
        rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }
}

/// A user namespace with the container's other new namespaces, kept by a process for as long as this
/// exists.
#[derive(Debug)]
pub(crate) struct UserNamespace {
    /// The process that keeps it.
    holder: OwnedFd,
    file: OwnedFd,
    pub(crate) mappings: Mappings,
    /// The holder ends with it.
    release: OwnedFd,
    reaped: oneshot::Receiver<Reaped>,
}

impl Runner {
    /// Makes or joins the user namespace of a container, if it has one, with its new namespaces in it.
    ///
    /// # Errors
    /// [`ContainerError`]. Nothing is left then.
    pub(super) async fn hold_user_namespace(
        &self,
        plan: &ContainerPlan,
        cgroup: BorrowedFd<'_>,
    ) -> Result<Option<UserNamespace>, ContainerError> {
        let Some(user) = &plan.namespaces.user else { return Ok(None) };
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"));
        let ((report_read, report), (told, release)) = (pipe()?, pipe()?);
        let mut report_read =
            pipe::Receiver::from_owned_fd(report_read).map_err(step("watch the report"))?;
        let flags = match user {
            UserPlan::New { .. } => NamespaceKind::User.flag(),
            UserPlan::Joined(_) => 0,
        };
        // In the container's cgroup, which becomes the root of a new cgroup namespace.
        let (pid, holder) = match sys::clone_process(flags, Some(cgroup)).map_err(step("clone"))? {
            Cloned::Child => hold(plan, user, &told, &report),
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        let reaped = self.reaper.watch(pid);
        drop((told, report));
        if let UserPlan::New { uids, gids } = user {
            for (name, mappings) in [("uid_map", uids), ("gid_map", gids)] {
                std::fs::write(format!("/proc/{pid}/{name}"), lines(mappings))
                    .map_err(step(format!("linux: write {name} of the user namespace")))?;
            }
        }
        // If the holder is gone, its report says why.
        if let Err(error) = rustix::io::write(&release, &[1]) {
            tracing::debug!(%error, "the user namespace's holder has ended");
        }
        match read_report(&mut report_read).await? {
            Some(Report::Ready(_)) => {}
            Some(Report::Error(message)) => return Err(ContainerError::Reported(message)),
            Some(Report::Failure(_)) | None => return Err(ContainerError::Died),
        }
        let mappings = Mappings::of_process(pid)?;
        let file = namespaces::open(&format!("/proc/{pid}/ns/user"))?;
        Ok(Some(UserNamespace { holder, file, mappings, release, reaped }))
    }
}

/// What the holder does.
fn hold(plan: &ContainerPlan, user: &UserPlan, told: &OwnedFd, report: &OwnedFd) -> ! {
    let make = || -> Result<(), StepError> {
        sys::close_all_but(&[told.as_raw_fd(), report.as_raw_fd()])
            .map_err(step("close the agent's descriptors"))?;
        sys::reset_signals();
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(step("make undumpable"))?;
        if let UserPlan::Joined(path) = user {
            let file = namespaces::open(path)?;
            rustix::thread::move_into_thread_name_spaces(file.as_fd(), ThreadNameSpaceType::USER)
                .map_err(step(format!("linux.namespaces: join {path}")))?;
        }
        // Until the mappings are written.
        wait(told);
        let flags = i32::try_from(plan.namespaces.by_holder())
            .map_err(|_| step("new namespaces")(io::Error::from(io::ErrorKind::InvalidInput)))?;
        sys::unshare(flags).map_err(step("new namespaces"))
    };
    let result = make();
    let message = match &result {
        Ok(()) => Report::Ready(None),
        Err(error) => Report::Error(crate::chain(error)),
    };
    if rustix::io::write(report, &message.encode()).is_ok() && result.is_ok() {
        wait(told);
    }
    sys::exit_now(u8::from(result.is_err()))
}

/// Returns after a byte, or the end of the pipe.
fn wait(pipe: &OwnedFd) {
    let mut byte = [0_u8; 1];
    while let Err(rustix::io::Errno::INTR) = rustix::io::read(pipe, &mut byte) {}
}

impl UserNamespace {
    /// Lets the holder go, and waits for its end.
    pub(crate) async fn release(self) {
        let Self { release, reaped, holder, file: _, mappings: _ } = self;
        drop(release);
        // The reaper lives as long as the agent.
        let _reaped = reaped.await;
        drop(holder);
    }

    /// Descriptors that the container's process needs.
    pub(crate) fn descriptors(&self) -> [i32; 2] {
        [self.holder.as_raw_fd(), self.file.as_raw_fd()]
    }

    /// Enters the namespaces that belong to the user namespace, with the rights of the guest's root;
    /// what is made from then on belongs to the container's root.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn enter_others(&self, plan: &ContainerPlan) -> Result<(), StepError> {
        namespaces::enter_of(self.holder.as_fd(), plan.namespaces.of_holder())?;
        let (uid, gid) = self.mappings.root;
        sys::set_file_owner(uid, gid).map_err(step("own files as the container's root"))?;
        // The change took away what lets root ignore permissions.
        let CapabilitySets { permitted, inheritable, .. } =
            rustix::thread::capabilities(None).map_err(step("read the capabilities"))?;
        let sets = CapabilitySets { effective: permitted, permitted, inheritable };
        rustix::thread::set_capabilities(None, sets).map_err(step("keep the capabilities"))
    }

    /// Shows the layers of the root with mapped owners, in this process's mount namespace.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn map_layers(&self, overlay: &Overlay) -> Result<Overlay, StepError> {
        let parent = |path: &str| {
            let parent = Path::new(path).parent().and_then(Path::to_str).map(str::to_owned);
            parent.ok_or_else(|| step("layers")(io::Error::from(io::ErrorKind::InvalidInput)))
        };
        let place = format!("{}/layers", parent(&overlay.target)?);
        let map = |source: &str, name: &str| {
            let what = || format!("show the layer {source} with mapped owners");
            let target = format!("{place}/{name}");
            std::fs::create_dir_all(&target).map_err(step(what()))?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let mount =
                rustix::mount::open_tree(rustix::fs::CWD, source, flags).map_err(step(what()))?;
            sys::mount_set_id_map(mount.as_fd(), false, self.file.as_fd()).map_err(step(what()))?;
            let directory = namespaces::open(&target)?;
            rootfs::attach(mount.as_fd(), directory.as_fd()).map_err(step(what()))?;
            Ok::<String, StepError>(target)
        };
        let lower = overlay
            .lower
            .iter()
            .enumerate()
            .map(|(index, path)| map(path, &index.to_string()))
            .collect::<Result<_, _>>()?;
        // Both must be in the same mount.
        let writable = map(&parent(&overlay.upper)?, "writable")?;
        let inside = |path: &str| {
            let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
            format!("{writable}/{name}")
        };
        let (upper, work) = (inside(&overlay.upper), inside(&overlay.work));
        Ok(Overlay { lower, upper, work, target: overlay.target.clone() })
    }

    /// The plan with the container's IDs replaced by those outside, where the guest's root is to
    /// give something to them.
    ///
    /// # Errors
    /// [`StepError`] for an ID that is not mapped.
    pub(crate) fn translate(&self, plan: &ContainerPlan) -> Result<ContainerPlan, StepError> {
        let mut plan = plan.clone();
        let Mappings { uids, gids, .. } = &self.mappings;
        let of = |mappings: &[IdMapping], id: u32, what: &str| {
            let unmapped = || io::Error::other(format!("ID {id} is not mapped"));
            translate(mappings, id).ok_or_else(|| step(what.to_owned())(unmapped()))
        };
        for device in &mut plan.devices {
            let what = format!("linux.devices: {}", device.path);
            device.uid = of(uids, device.uid, &what)?;
            device.gid = of(gids, device.gid, &what)?;
        }
        for (index, mount) in plan.mounts.iter_mut().enumerate() {
            let (Kind::New { options, .. } | Kind::Tmpfs { options, .. }) = &mut mount.kind else {
                continue;
            };
            for (key, value) in options {
                let mappings = match key.as_str() {
                    "uid" => uids,
                    "gid" => gids,
                    _ => continue,
                };
                // What is no number is the file system's to refuse.
                if let Some(id) = value.as_ref().and_then(|v| v.parse().ok()) {
                    let what = format!("mounts[{index}]: {key}");
                    *value = Some(of(mappings, id, &what)?.to_string());
                }
            }
        }
        Ok(plan)
    }

    /// Enters the user namespace itself.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn enter(&self) -> Result<(), StepError> {
        enter(self.file.as_fd())
    }
}

/// Enters a user namespace (its file, or a pidfd of a process in it) as its root.
///
/// # Errors
/// [`StepError`].
pub(crate) fn enter(namespace: BorrowedFd<'_>) -> Result<(), StepError> {
    let what = || "become root of the user namespace";
    rustix::thread::move_into_thread_name_spaces(namespace, ThreadNameSpaceType::USER)
        .map_err(step("enter the user namespace"))?;
    rustix::thread::set_thread_groups(&[]).map_err(step(what()))?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(step(what()))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(step(what()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping { container_id, host_id, size }
    }

    fn plan(uids: Vec<IdMapping>, gids: Vec<IdMapping>) -> Result<UserPlan, String> {
        let mut linux = Linux::default();
        (linux.uid_mappings, linux.gid_mappings) = (uids, gids);
        UserPlan::of_mappings(&linux).map_err(|e| e.to_string())
    }

    #[test]
    fn mappings_that_cannot_be_are_refused_by_name() {
        let good = || vec![mapping(0, 100_000, 65_536)];
        plan(good(), good()).unwrap();
        for bad in [
            vec![],
            vec![mapping(0, 1, 0)],
            vec![mapping(0, u32::MAX, 1)],
            vec![mapping(1, 1, 1)],
            vec![mapping(0, 0, 1); MAX_MAPPINGS + 1],
        ] {
            assert!(plan(bad.clone(), good()).unwrap_err().contains("linux.uidMappings"));
            assert!(plan(good(), bad).unwrap_err().contains("linux.gidMappings"));
        }
    }

    #[test]
    fn ids_are_translated_by_the_mapping_that_has_them() {
        let mappings = [mapping(0, 1000, 10), mapping(10, 5, 1)];
        assert_eq!(translate(&mappings, 0), Some(1000));
        assert_eq!(translate(&mappings, 9), Some(1009));
        assert_eq!(translate(&mappings, 10), Some(5));
        assert_eq!(translate(&mappings, 11), None);
    }

    proptest! {
        #[test]
        fn mappings_survive_the_kernels_text(
            numbers in prop::collection::vec(any::<(u32, u32, u32)>(), 0..9), id in any::<u32>(),
        ) {
            let mappings: Vec<_> = numbers.into_iter().map(|(a, b, c)| mapping(a, b, c)).collect();
            prop_assert_eq!(parse(&lines(&mappings)).unwrap(), mappings.clone());
            if let Some(outside) = translate(&mappings, id) {
                prop_assert!(mappings.iter().any(|m| outside >= m.host_id));
            }
        }
    }

    #[test]
    fn a_text_that_is_no_mapping_is_refused() {
        assert_eq!(parse("0 0 4294967295\n").unwrap(), [mapping(0, 0, u32::MAX)]);
        assert!(parse("0 0\n").is_none() && parse("a b c\n").is_none());
    }
}

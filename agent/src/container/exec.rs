//! One more process in a running container.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::init::Job;
use super::process::ProcessPlan;
use super::spawn::{Spawned, take_master};
use super::state::{self, Event};
use super::user_namespace::Mappings;
use super::{
    Container, ContainerError, Ending, MAX_ENDED_EXECS, Outcome, Process, Remains, Runner, Started,
    Table, check_name, spec,
};
use crate::cgroup::Cgroup;
use crate::lock;
use crate::stdio::{self, Ends, Relay};
use husk_proto::agent::ExecProcessRequest;
use rustix::thread::ThreadNameSpaceType;

/// What an exec needs of its container.
struct Target {
    plan: ProcessPlan,
    /// Namespaces that the new process has to enter.
    kinds: ThreadNameSpaceType,
    /// Whether it is in a user namespace.
    user: bool,
    remains: Arc<Remains>,
    pid: u32,
    pidfd: Arc<std::os::fd::OwnedFd>,
}

impl Target {
    /// The container, unless it has been deleted: another one may have its name by now.
    fn container<'t>(
        &self,
        table: &'t mut Table,
        id: &str,
    ) -> Result<&'t mut Container, ContainerError> {
        let container = table.container(id)?;
        match Arc::ptr_eq(&container.remains, &self.remains) {
            true => Ok(container),
            false => Err(ContainerError::NoContainer(id.to_owned())),
        }
    }
}

impl Runner {
    /// Runs a process in a running container. If its program cannot be executed, nothing is left of
    /// it.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) async fn exec(
        &self,
        request: ExecProcessRequest,
    ) -> Result<Started, ContainerError> {
        let ExecProcessRequest { container_id: id, exec_id: exec, process, stdio } = request;
        check_name("exec_id", &exec)?;
        let given = spec::parse_process(&process)?;
        let target = self.take_name(&id, &exec, given)?;
        let ports = stdio.unwrap_or_default();
        let result = self.exec_reserved(&id, &exec, &target, ports).await;
        if let Ok(container) = target.container(&mut lock(&self.table), &id) {
            container.execs_starting.remove(&exec);
            if !matches!(result, Ok(Ok(_))) {
                container.execs.remove(&exec);
            }
        }
        result
    }

    fn take_name(
        &self,
        id: &str,
        exec: &str,
        given: spec::Process,
    ) -> Result<Target, ContainerError> {
        let mut table = lock(&self.table);
        let container = table.container(id)?;
        state::transition(container.state, Event::Exec)
            .map_err(|refused| ContainerError::Refused(id.to_owned(), refused))?;
        let plan = container.plan.exec(given)?;
        if container.execs.contains_key(exec) || container.execs_starting.contains(exec) {
            return Err(ContainerError::ExecExists {
                container: id.to_owned(),
                exec: exec.to_owned(),
            });
        }
        container.execs_starting.insert(exec.to_owned());
        Ok(Target {
            plan,
            kinds: container.plan.namespaces.to_enter(),
            user: container.plan.namespaces.user.is_some(),
            remains: Arc::clone(&container.remains),
            pid: container.main.pid,
            pidfd: Arc::clone(&container.main.pidfd),
        })
    }

    async fn exec_reserved(
        &self,
        id: &str,
        exec: &str,
        target: &Target,
        ports: husk_proto::agent::Stdio,
    ) -> Result<Started, ContainerError> {
        let plan = &target.plan;
        let terminal = plan.terminal.is_some();
        // Nothing has to be connected before it starts, and nothing be taken out of it.
        let held = terminal || ports.stdin_port != 0;
        let (streams, child_stdio) = stdio::prepare(&ports, terminal)?;
        let oom_kills_before = target.remains.cgroup.oom_kills()?;
        // The container may have been deleted since the name was taken; from here to the record of the
        // new process it cannot be.
        target.container(&mut lock(&self.table), id)?;
        let Spawned { mut process, mut gate, reaped } =
            self.clone_exec(target, child_stdio, held)?;
        process.oom_kills_before = oom_kills_before;
        let (pid, ending) = (process.pid, Ending::of(&process.outcome));
        let streams = match held {
            true => Some(streams),
            false => {
                process.relay = Relay::start(streams.without_connections(&self.transport), None)?;
                None
            }
        };
        {
            let mut table = lock(&self.table);
            let container = target.container(&mut table, id)?;
            forget_oldest(&mut container.execs);
            container.execs.insert(exec.to_owned(), process);
        }
        self.follow(id, exec, Arc::clone(&target.remains), reaped);
        let Some(streams) = streams else {
            return Ok(gate.open().await?.map_or(Ok((pid, ending)), Err));
        };
        let connected = async { Ok(streams.connect(&self.transport).await?) };
        let (ready, ends) = tokio::try_join!(gate.ready(), connected)?;
        let terminal = match ready {
            Ok(terminal) => terminal,
            Err(failure) => return Ok(Err(failure)),
        };
        self.connect_exec(id, exec, ends, terminal)?;
        Ok(gate.open().await?.map_or(Ok((pid, ending)), Err))
    }

    /// Clones a process into the container's cgroup and process ID namespace.
    fn clone_exec(
        &self,
        target: &Target,
        stdio: [std::os::fd::OwnedFd; 3],
        held: bool,
    ) -> Result<Spawned, ContainerError> {
        let (pidfd, cgroup) = (target.pidfd.as_fd(), &target.remains.cgroup);
        let user = target.user.then(|| Mappings::of_process(target.pid)).transpose()?;
        let (plan, kinds, user) = (&target.plan, target.kinds, user.as_ref());
        let job = Job::Exec { plan, pidfd, kinds, user, held };
        // A container that divides its cgroup may have no process in the upper one any more
        // (cgroup v2's "no internal processes"): then go where its first process is, as runc does.
        let divided = cgroup.keyed("cgroup.stat")?.get("nr_descendants") > 0;
        let below = if divided { Cgroup::of_process(target.pid).ok() } else { None };
        let directory = below.as_ref().map_or(cgroup.fd(), AsFd::as_fd);
        Ok(self.spawn(&job, stdio, 0, directory, Some(pidfd))?)
    }

    /// Lets the streams of a process that is ready flow.
    fn connect_exec(
        &self,
        id: &str,
        exec: &str,
        ends: Ends,
        terminal: Option<i32>,
    ) -> Result<(), ContainerError> {
        let mut table = lock(&self.table);
        let process = table.process(id, exec)?;
        if !process.alive {
            return Err(ContainerError::Died);
        }
        let master = terminal.map(|fd| take_master(process, fd)).transpose()?;
        process.relay = Relay::start(ends, master)?;
        Ok(())
    }
}

/// Makes room for one more process, if too many ended ones are known.
fn forget_oldest(execs: &mut std::collections::BTreeMap<String, Process>) {
    let ended = |process: &Process| match *process.outcome.borrow() {
        Outcome::Ended(exit) => Some(exit.at),
        Outcome::Pending => None,
    };
    if execs.values().filter(|p| ended(p).is_some()).count() < MAX_ENDED_EXECS {
        return;
    }
    let oldest = execs
        .iter()
        .filter_map(|(name, process)| ended(process).map(|at| (at, name.clone())))
        .min();
    if let Some((_, name)) = oldest {
        execs.remove(&name);
    }
}

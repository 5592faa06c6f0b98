//! Everything that happens to a container after it was made.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent;

use super::spec::{self, SpecError};
use super::state::{self, Event, Refused, State};
use super::{Container, ContainerError, Ending, Exit, Outcome, Process, Runner, Started};
use crate::cgroup::{Cgroup, devices};
use crate::lock;
use crate::sys;

/// How long a shutdown waits for killed processes: they can hang in the kernel on a broken disk.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// How long a pause waits until all processes stand still: one that hangs in the kernel does not.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
const FREEZE_RETRY: Duration = Duration::from_millis(2);

/// Signals that exist on Linux.
const LAST_SIGNAL: u32 = 64;
const SIGKILL: u32 = 9;

impl Runner {
    /// Starts the program of a created container. If it cannot be executed, nothing is left of the
    /// container.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub(crate) async fn start(&self, id: &str) -> Result<Started, ContainerError> {
        let (gate, remains, pid, ending) = {
            let mut table = lock(&self.table);
            let container = table.container(id)?;
            container.apply(id, Event::Start)?;
            let Process { pid, outcome, .. } = &container.main;
            let ending = Ending::of(outcome);
            (container.gate.take(), Arc::clone(&container.remains), *pid, ending)
        };
        let failure = gate.ok_or(ContainerError::Died)?.open().await?;
        let Some(failure) = failure else { return Ok(Ok((pid, ending))) };
        // Its end is made known first, to those who wait for it.
        ending.told().await?;
        let _reservation = self.take_out(id)?;
        self.clear(&remains).await?;
        Ok(Err(failure))
    }

    /// Waits for the end of a process and of its output.
    ///
    /// # Errors
    /// [`ContainerError`] if there is no such process.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit, ContainerError> {
        let ending = Ending::of(&lock(&self.table).process(id, exec)?.outcome);
        ending.told().await
    }

    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// [`ContainerError`], e.g. if the process has ended.
    pub(crate) fn signal(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        if signal == 0 || signal > LAST_SIGNAL {
            let must = "a signal of Linux, 1 to 64";
            return Err(ContainerError::Value { field: "signal", value: signal, must });
        }
        let mut table = lock(&self.table);
        let ended = || ContainerError::Ended { container: id.to_owned(), exec: exec.to_owned() };
        let container = table.container(id)?;
        if container.state == State::Stopped {
            return Err(ended());
        }
        container.apply(id, Event::Signal)?;
        let remains = Arc::clone(&container.remains);
        let paused = container.state.is_paused();
        if all {
            match signal {
                SIGKILL => remains.cgroup.kill()?,
                signal => remains.cgroup.signal_all(signal)?,
            }
        } else {
            let process = table.process(id, exec)?;
            if !process.alive {
                return Err(ended());
            }
            sys::pidfd_send_signal(process.pidfd.as_fd(), signal).map_err(|_| ended())?;
        }
        if paused && signal == SIGKILL && (all || exec == super::MAIN) {
            // As in runc: what the container's end leaves to do must not stand still.
            remains.cgroup.freeze(false)?;
        }
        Ok(())
    }

    /// Stops every process of a container; returns when all stand still.
    ///
    /// # Errors
    /// [`ContainerError`]: also if it ends or is resumed meanwhile, or a process does not stop within
    /// [`FREEZE_LIMIT`]. Then none stands still.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), ContainerError> {
        let remains = {
            let mut table = lock(&self.table);
            let container = table.container(id)?;
            container.apply(id, Event::Pause)?;
            Arc::clone(&container.remains)
        };
        let result = self.until_frozen(id, &remains.cgroup).await;
        if result.is_err()
            && let Ok(container) = lock(&self.table).container(id)
            && container.state.is_paused()
        {
            container.thaw(id)?;
        }
        result
    }

    async fn until_frozen(&self, id: &str, cgroup: &Cgroup) -> Result<(), ContainerError> {
        cgroup.freeze(true)?;
        let deadline = tokio::time::Instant::now() + FREEZE_LIMIT;
        loop {
            let state = lock(&self.table).container(id)?.state;
            if !state.is_paused() {
                let refused = Refused { state, event: Event::Pause };
                return Err(ContainerError::Refused(id.to_owned(), refused));
            }
            if cgroup.is_frozen()? {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(ContainerError::NotFrozen(id.to_owned()));
            }
            tokio::time::sleep(FREEZE_RETRY).await;
        }
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// [`ContainerError`], e.g. if it is not paused.
    pub(crate) fn resume(&self, id: &str) -> Result<(), ContainerError> {
        lock(&self.table).container(id)?.thaw(id)
    }

    /// Changes a container's resources: all that is given, or none.
    ///
    /// # Errors
    /// [`ContainerError`] naming the field.
    pub(crate) fn update(&self, id: &str, resources: &[u8]) -> Result<(), ContainerError> {
        let resources = spec::parse_resources(resources)?;
        let mut table = lock(&self.table);
        let container = table.container(id)?;
        container.apply(id, Event::Update)?;
        // A client may send all the resources that there are, with the rules that are in force.
        let given = &resources.devices;
        if !given.is_empty() && devices::rules(given)? != container.plan.device_rules {
            let reason = "cannot be changed while the container exists";
            let count = format!("{} rules", given.len());
            return Err(SpecError::invalid("linux.resources.devices", count, reason).into());
        }
        Ok(container.remains.cgroup.update(&resources)?)
    }

    /// Sets the window size of a process's terminal, in characters.
    ///
    /// # Errors
    /// [`ContainerError`], e.g. if it has none.
    pub(crate) fn resize(
        &self,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), ContainerError> {
        let size = |field, value: u32| {
            u16::try_from(value).map_err(|_| ContainerError::Value {
                field,
                value,
                must: "at most 65535",
            })
        };
        let (columns, rows) = (size("width", width)?, size("height", height)?);
        let mut table = lock(&self.table);
        let process = table.process(id, exec)?;
        let (container, exec) = (id.to_owned(), exec.to_owned());
        if !process.alive {
            return Err(ContainerError::Ended { container, exec });
        }
        match process.relay.resize(columns, rows) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ContainerError::NoTerminal { container, exec }),
            Err(source) => Err(super::process::step("set the window size")(source).into()),
        }
    }

    /// Takes a container out of the table but keeps its name in use.
    fn take_out(&self, id: &str) -> Result<super::Reservation, ContainerError> {
        let mut table = lock(&self.table);
        table.containers.remove(id).ok_or_else(|| ContainerError::NoContainer(id.to_owned()))?;
        table.reserved.insert(id.to_owned());
        Ok(super::Reservation { table: Arc::clone(&self.table), id: id.to_owned() })
    }

    /// Removes a container that is not running.
    ///
    /// # Errors
    /// [`ContainerError`], e.g. if it is running.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let remains = {
            let mut table = lock(&self.table);
            let container = table.container(id)?;
            container.apply(id, Event::Delete)?;
            // A created container's process ends by this.
            container.gate = None;
            Arc::clone(&container.remains)
        };
        remains.cgroup.kill()?;
        self.wait(id, super::MAIN).await?;
        let _reservation = self.take_out(id)?;
        self.clear(&remains).await
    }

    /// Kills all containers and waits for their end, but no longer than [`KILL_LIMIT`].
    pub(crate) async fn kill_all(&self) {
        if let Err(error) = crate::cgroup::kill_all() {
            tracing::error!(error = crate::chain(&error), "cannot kill the containers");
        }
        let outcomes: Vec<_> =
            lock(&self.table).containers.values().map(|c| c.main.outcome.subscribe()).collect();
        let all = async {
            for mut outcome in outcomes {
                // The sender may be gone: then so is the container.
                let _gone = outcome.wait_for(|o| matches!(o, Outcome::Ended(_))).await;
            }
        };
        if tokio::time::timeout(KILL_LIMIT, all).await.is_err() {
            tracing::error!("a process cannot be killed: its disk may hang");
        }
    }

    /// All containers.
    pub(crate) fn list(&self) -> Vec<agent::Container> {
        use agent::container::State as Wire;
        let table = lock(&self.table);
        let describe = |(id, container): (&String, &super::Container)| agent::Container {
            id: id.clone(),
            state: match container.state {
                State::Creating => Wire::Unspecified,
                State::Created => Wire::Created,
                State::CreatedPaused | State::Paused => Wire::Paused,
                State::Running => Wire::Running,
                State::Stopped | State::Deleting => Wire::Stopped,
            }
            .into(),
            pid: container.main.pid,
        };
        table.containers.iter().map(describe).collect()
    }
}

impl Container {
    /// Lets its processes go on.
    fn thaw(&mut self, id: &str) -> Result<(), ContainerError> {
        let next = state::transition(self.state, Event::Resume)
            .map_err(|refused| ContainerError::Refused(id.to_owned(), refused))?;
        self.remains.cgroup.freeze(false)?;
        self.state = next;
        Ok(())
    }
}

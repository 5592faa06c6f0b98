//! The end of what runs: of a single container that a probe or a hook condemned, and of all when
//! the pod stops.
//!
//! ```text
//!   No ──▶ PreStop ──▶ Waiting ──▶ Told ──▶ killed
//!    │   its hook runs   │ for its turn,     │ after the grace period, but not before
//!    └───────────────────┴─▶ in a stop       │ LAST_WINDOW has passed since it was told
//! ```

use std::time::Duration;

use super::super::status::Moment;
use super::container::{Activity, Ending, RunId, Up};
use super::{Action, Failure, Index, KILL_LIMIT, Machine, Stage};
use crate::types::ContainerKind;

/// How long a container has at least between being told to end and being killed, when its hook or
/// the containers that come before it took the grace period: the kubelet's
/// `minimumGracePeriodInSeconds`.
const LAST_WINDOW: Duration = Duration::from_secs(2);

impl Machine {
    /// Begins to end one container, which has so long for it.
    pub(super) fn end_container(
        &mut self,
        index: Index,
        grace: Duration,
        now: Moment,
    ) -> Vec<Action> {
        let Some(container) = self.containers.get_mut(index) else { return Vec::new() };
        let id = RunId { container: index, run: container.restarts };
        let has_pre_stop = container.has_pre_stop;
        let Some(up) = container.up().filter(|up| up.ending == Ending::No) else {
            return Vec::new();
        };
        if has_pre_stop && !grace.is_zero() {
            up.ending = Ending::PreStop;
            return vec![Action::PreStop(id, grace), Action::EndAfter(id, grace)];
        }
        up.ending = Ending::Told { at: now.uptime, late: false };
        if grace.is_zero() {
            return vec![Action::Kill(index)];
        }
        vec![Action::Terminate(index), Action::EndAfter(id, grace)]
    }

    /// The time that a single container had to end is over.
    pub(super) fn end_due(&mut self, id: RunId, now: Moment) -> Vec<Action> {
        // If the whole pod stops, its own time counts.
        if matches!(self.stage, Stage::Stopping { .. }) {
            return Vec::new();
        }
        let Some(up) = self.current(id) else { return Vec::new() };
        match last_window(up, now) {
            Some((tell, left)) => {
                let told = tell.then_some(Action::Terminate(id.container));
                told.into_iter().chain([Action::EndAfter(id, left)]).collect()
            }
            None => vec![Action::Kill(id.container)],
        }
    }

    /// The hook before a container's end is done.
    pub(super) fn pre_stopped(&mut self, id: RunId, now: Moment) -> Vec<Action> {
        let stopping = matches!(self.stage, Stage::Stopping { .. });
        let Some(up) = self.current(id).filter(|up| up.ending == Ending::PreStop) else {
            return Vec::new();
        };
        if stopping {
            up.ending = Ending::Waiting;
            return self.advance_stop(now);
        }
        up.ending = Ending::Told { at: now.uptime, late: true };
        vec![Action::Terminate(id.container)]
    }

    pub(super) fn stop_requested(&mut self, grace: Duration, now: Moment) -> Vec<Action> {
        match self.stage {
            Stage::Preparing => self.fail(Failure {
                reason: "Stopped",
                message: "the pod was stopped before its containers were started".into(),
                containers: Vec::new(),
            }),
            // Only the time left can change.
            Stage::Stopping { killed: true } => Vec::new(),
            Stage::Stopping { killed: false } if grace.is_zero() => self.kill(),
            Stage::Stopping { killed: false } => vec![Action::ArmGrace(grace)],
            Stage::Initializing(_) | Stage::Running => self.stop(grace, now),
            Stage::PoweringOff | Stage::Ended { .. } => Vec::new(),
        }
    }

    /// Begins to end what runs.
    pub(super) fn stop(&mut self, grace: Duration, now: Moment) -> Vec<Action> {
        self.stage = Stage::Stopping { killed: false };
        for container in &mut self.containers {
            if let Activity::BackingOff { ended, .. } = &container.activity {
                container.activity = Activity::Done(ended.clone());
            }
        }
        let mut actions = Vec::new();
        if self.alive().next().is_some() {
            if grace.is_zero() {
                return self.kill();
            }
            actions.push(Action::ArmGrace(grace));
        }
        // The hooks of all at once, whoever is told first afterwards.
        for (index, container) in self.containers.iter_mut().enumerate() {
            let id = RunId { container: index, run: container.restarts };
            let has_pre_stop = container.has_pre_stop;
            if let Some(up) = container.up().filter(|up| has_pre_stop && up.ending == Ending::No) {
                up.ending = Ending::PreStop;
                actions.push(Action::PreStop(id, grace));
            }
        }
        actions.extend(self.advance_stop(now));
        actions
    }

    /// The time for the pod's end is over.
    pub(super) fn grace_elapsed(&mut self, now: Moment) -> Vec<Action> {
        match self.stage {
            Stage::Stopping { killed: false } => {}
            Stage::Stopping { killed: true } => {
                let message = format!(
                    "containers did not end within {} s of being killed",
                    KILL_LIMIT.as_secs()
                );
                let failure = Failure { reason: "KillTimeout", message, containers: Vec::new() };
                return self.lost(failure, now.wall);
            }
            _ => return Vec::new(),
        }
        let mut actions = Vec::new();
        let mut longest = None;
        for (index, container) in self.containers.iter_mut().enumerate() {
            let Some(up) = container.up() else { continue };
            match last_window(up, now) {
                Some((tell, left)) => {
                    actions.extend(tell.then_some(Action::Terminate(index)));
                    longest = longest.max(Some(left));
                }
                None => actions.push(Action::Kill(index)),
            }
        }
        match longest {
            Some(left) => {
                actions.push(Action::ArmGrace(left));
                actions
            }
            None => self.kill(),
        }
    }

    /// Ends what runs, sidecars and all; if even that does not help, the VM is ended.
    fn kill(&mut self) -> Vec<Action> {
        self.stage = Stage::Stopping { killed: true };
        let kills: Vec<Action> = self.alive().map(Action::Kill).collect();
        kills.into_iter().chain([Action::ArmGrace(KILL_LIMIT)]).collect()
    }

    /// Tells who is next to end: all but the sidecars at once, then each sidecar after those that
    /// were started after it.
    pub(super) fn advance_stop(&mut self, now: Moment) -> Vec<Action> {
        let mut alive: Vec<Index> = self.alive().collect();
        let is_sidecar = |machine: &Self, index: &Index| {
            machine.containers.get(*index).is_some_and(|c| c.kind == ContainerKind::Sidecar)
        };
        if alive.is_empty() {
            self.stage = Stage::PoweringOff;
            return vec![Action::PowerOff];
        }
        let their_turn = alive.iter().all(|index| is_sidecar(self, index));
        if their_turn {
            alive.drain(..alive.len() - 1);
        } else {
            alive.retain(|index| !is_sidecar(self, index));
        }
        let tell = |index: Index| {
            let up = self.containers.get_mut(index)?.up()?;
            let late = match up.ending {
                Ending::No => their_turn,
                Ending::Waiting => true,
                Ending::PreStop | Ending::Told { .. } => return None,
            };
            up.ending = Ending::Told { at: now.uptime, late };
            Some(Action::Terminate(index))
        };
        alive.into_iter().filter_map(tell).collect()
    }
}

/// What is left of a container's last window when its time is over, and whether it must be told
/// first. `None` if it can be killed.
fn last_window(up: &mut Up, now: Moment) -> Option<(bool, Duration)> {
    match up.ending {
        Ending::Told { late: false, .. } => None,
        Ending::Told { at, late: true } => {
            let left = LAST_WINDOW.saturating_sub(now.uptime.saturating_sub(at));
            (!left.is_zero()).then_some((false, left))
        }
        Ending::No | Ending::PreStop | Ending::Waiting => {
            up.ending = Ending::Told { at: now.uptime, late: true };
            Some((true, LAST_WINDOW))
        }
    }
}

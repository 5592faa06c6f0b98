//! When what happened at the start of a pod.

use std::sync::{Arc, Mutex, PoisonError};

use husk_vmm_api::Phase;
use rustix::time::{ClockId, clock_gettime};
use tracing::Instrument;

/// Nanoseconds of `CLOCK_MONOTONIC`, by which the times of different processes compare.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// One step of the start. Steps may overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its name, e.g. `images` or `container web created`.
    pub name: String,
    /// When it began, in ns since the pod's start.
    pub begin_ns: u64,
    /// When it ended, in ns since the pod's start. Equal to `begin_ns` for what only has a moment.
    pub end_ns: u64,
}

/// The record of a start. Clones are the same record.
#[derive(Debug, Clone)]
pub(super) struct Timeline {
    zero_ns: u64,
    steps: Arc<Mutex<Vec<Step>>>,
}

/// Most steps that are kept.
const MAX_STEPS: usize = 256;

impl Timeline {
    pub(super) fn new() -> Self {
        Timeline { zero_ns: monotonic_ns(), steps: Arc::default() }
    }

    fn push(&self, name: String, begin_ns: u64, end_ns: u64) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        // What happens again is a restart, and no part of the start.
        let again = steps.iter().any(|step| step.name == name);
        if !again && steps.len() < MAX_STEPS {
            let since = |ns: u64| ns.saturating_sub(self.zero_ns);
            steps.push(Step { name, begin_ns: since(begin_ns), end_ns: since(end_ns) });
        }
    }

    /// Records how long this takes, whether it succeeds or not; also as a span.
    pub(super) async fn during<T>(
        &self,
        name: impl Into<String>,
        what: impl Future<Output = T>,
    ) -> T {
        let name = name.into();
        let span = tracing::debug_span!("start", step = %name);
        let begin = monotonic_ns();
        let result = what.instrument(span).await;
        self.push(name, begin, monotonic_ns());
        result
    }

    /// The steps in the order of their beginnings, with those that the VMM has told.
    pub(super) fn steps(&self, vm: &[(Phase, u64)]) -> Vec<Step> {
        let since = |ns: u64| ns.saturating_sub(self.zero_ns);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut previous = None;
        for (phase, at_ns) in vm {
            let end_ns = since(*at_ns);
            // Each phase began when the one before it was over.
            let begin_ns = previous.unwrap_or(end_ns).min(end_ns);
            steps.push(Step { name: format!("vm: {}", phase_name(*phase)), begin_ns, end_ns });
            previous = Some(end_ns);
        }
        steps.sort_by_key(|step| (step.end_ns, step.begin_ns));
        steps
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::VmmStarted => "VMM started",
        Phase::Kvm => "KVM",
        Phase::Memory => "memory",
        Phase::Load => "load",
        Phase::Devices => "devices",
        Phase::FirstInstruction => "first instruction",
        Phase::Init => "init",
        Phase::AgentReady => "agent ready",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn steps_and_phases_are_merged_by_their_ends() {
        let timeline = Timeline::new();
        let zero = timeline.zero_ns;
        timeline.push("spawn".into(), zero + 10, zero + 20);
        timeline.push("ready".into(), zero + 20, zero + 70);
        let steps = timeline.steps(&[(Phase::Kvm, zero + 30), (Phase::Init, zero + 60)]);
        let steps: Vec<_> = steps.iter().map(|s| (s.name.as_str(), s.begin_ns, s.end_ns)).collect();
        assert_eq!(
            steps,
            [("spawn", 10, 20), ("vm: KVM", 30, 30), ("vm: init", 30, 60), ("ready", 20, 70)]
        );
    }

    #[test]
    fn the_record_is_bounded() {
        let timeline = Timeline::new();
        (0..1000).for_each(|number| timeline.push(number.to_string(), 0, 0));
        assert_eq!(timeline.steps(&[]).len(), MAX_STEPS);
    }

    #[test]
    fn what_happens_again_is_not_part_of_the_start() {
        let timeline = Timeline::new();
        let zero = timeline.zero_ns;
        timeline.push("container c started".into(), zero, zero + 5);
        timeline.push("container c started".into(), zero + 100, zero + 105);
        let ends: Vec<u64> = timeline.steps(&[]).iter().map(|step| step.end_ns).collect();
        assert_eq!(ends, [5]);
    }
}

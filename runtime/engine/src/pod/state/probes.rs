//! The probes of one run of a container: when each is due, and what its answers mean. As the
//! kubelet's workers (`pkg/kubelet/prober/worker.go`).

use std::time::Duration;

use crate::types::{Probe, Probes};

/// One of the probes of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pod) enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl ProbeKind {
    /// Its probe among those of a container.
    pub(in crate::pod) fn of(self, probes: &Probes) -> Option<&Probe> {
        match self {
            ProbeKind::Startup => probes.startup.as_ref(),
            ProbeKind::Liveness => probes.liveness.as_ref(),
            ProbeKind::Readiness => probes.readiness.as_ref(),
        }
    }
}

/// What the answers to a probe have come to, once enough of them agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    Failed,
}

/// What is known of one probe in this run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Answers {
    last: Option<bool>,
    /// How many in a row were as the last.
    in_a_row: u32,
    /// When the present one was due.
    due: Duration,
}

impl Answers {
    fn add(&mut self, success: bool, probe: &Probe) -> Option<Verdict> {
        self.in_a_row =
            if self.last == Some(success) { self.in_a_row.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let (enough, verdict) = match success {
            true => (probe.success_threshold, Verdict::Passed),
            false => (probe.failure_threshold, Verdict::Failed),
        };
        (self.in_a_row >= enough).then_some(verdict)
    }
}

/// The probes of one run. Durations are those of the pod's clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RunProbes {
    startup: Answers,
    liveness: Answers,
    readiness: Answers,
    /// Whether the startup probe has passed, or there is none.
    pub(super) started: bool,
    /// Whether the readiness probe has passed last.
    passed: bool,
}

/// A probe, and how long from now.
pub(super) type Due = (ProbeKind, Duration);

impl RunProbes {
    /// Begins, at `now`, with a run whose program was started at `since`.
    pub(super) fn begin(&mut self, probes: &Probes, since: Duration, now: Duration) -> Vec<Due> {
        if probes.startup.is_some() {
            return self.first(ProbeKind::Startup, probes, since, now).into_iter().collect();
        }
        self.start(probes, since, now)
    }

    /// The container has started: the other probes begin.
    fn start(&mut self, probes: &Probes, since: Duration, now: Duration) -> Vec<Due> {
        self.started = true;
        let kinds = [ProbeKind::Liveness, ProbeKind::Readiness];
        kinds.into_iter().filter_map(|kind| self.first(kind, probes, since, now)).collect()
    }

    fn first(
        &mut self,
        kind: ProbeKind,
        probes: &Probes,
        since: Duration,
        now: Duration,
    ) -> Option<Due> {
        let delay = Duration::from_secs(kind.of(probes)?.initial_delay_s.into());
        let due = since.saturating_add(delay).max(now);
        self.answers(kind).due = due;
        Some((kind, due.saturating_sub(now)))
    }

    fn answers(&mut self, kind: ProbeKind) -> &mut Answers {
        match kind {
            ProbeKind::Startup => &mut self.startup,
            ProbeKind::Liveness => &mut self.liveness,
            ProbeKind::Readiness => &mut self.readiness,
        }
    }

    /// Takes note of an answer (none if the question could not be put), and says what it means and
    /// which probes are next. A probe that failed and ends the container is put no more.
    pub(super) fn answer(
        &mut self,
        kind: ProbeKind,
        success: Option<bool>,
        probes: &Probes,
        since: Duration,
        now: Duration,
    ) -> (Option<Verdict>, Vec<Due>) {
        let Some(probe) = kind.of(probes) else { return (None, Vec::new()) };
        let verdict = success.and_then(|success| self.answers(kind).add(success, probe));
        match (kind, verdict) {
            (ProbeKind::Startup, Some(Verdict::Passed)) => {
                return (verdict, self.start(probes, since, now));
            }
            (ProbeKind::Startup | ProbeKind::Liveness, Some(Verdict::Failed)) => {
                return (verdict, Vec::new());
            }
            (ProbeKind::Readiness, Some(verdict)) => self.passed = verdict == Verdict::Passed,
            _ => {}
        }
        let answers = self.answers(kind);
        // As a ticker: at fixed times, but one that is late does not make the next ones pile up.
        let period = Duration::from_secs(probe.period_s.max(1).into());
        answers.due = answers.due.saturating_add(period).max(now);
        (verdict, vec![(kind, answers.due.saturating_sub(now))])
    }

    /// Whether the container is ready, as long as it runs.
    pub(super) fn ready(&self, probes: &Probes) -> bool {
        self.started && (probes.readiness.is_none() || self.passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Check;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn probe(success_threshold: u32, failure_threshold: u32) -> Probe {
        Probe {
            check: Check::Exec(vec!["true".into()]),
            initial_delay_s: 5,
            period_s: 10,
            timeout_s: 1,
            success_threshold,
            failure_threshold,
            termination_grace_s: None,
        }
    }

    #[test]
    fn answers_count_only_in_a_row() {
        let probe = probe(2, 3);
        let mut answers = Answers::default();
        let verdicts: Vec<_> = [true, false, true, true, true, false, false, true, false, false]
            .into_iter()
            .chain([false, false])
            .map(|success| answers.add(success, &probe))
            .collect();
        let (passed, failed) = (Some(Verdict::Passed), Some(Verdict::Failed));
        let none = None;
        assert_eq!(
            verdicts,
            [none, none, none, passed, passed, none, none, none, none, none, failed, failed]
        );
    }

    #[test]
    fn probes_come_at_fixed_times_and_do_not_pile_up() {
        let probes = Probes { liveness: Some(probe(1, 3)), ..Probes::default() };
        let mut run = RunProbes::default();
        assert_eq!(run.begin(&probes, S(100), S(101)), [(ProbeKind::Liveness, S(4))]);
        let mut next = |now| run.answer(ProbeKind::Liveness, Some(true), &probes, S(100), now).1;
        // Due at 105, answered at 107: the next is due at 115.
        assert_eq!(next(S(107)), [(ProbeKind::Liveness, S(8))]);
        // Answered at 138: those of 125 and 135 are left out.
        assert_eq!(next(S(138)), [(ProbeKind::Liveness, S(0))]);
        assert_eq!(next(S(139)), [(ProbeKind::Liveness, S(9))]);
    }

    #[test]
    fn the_startup_probe_holds_the_others_back() {
        let probes = Probes {
            startup: Some(probe(1, 2)),
            liveness: Some(probe(1, 3)),
            readiness: Some(probe(1, 3)),
        };
        let mut run = RunProbes::default();
        assert_eq!(run.begin(&probes, S(0), S(0)), [(ProbeKind::Startup, S(5))]);
        let (verdict, next) = run.answer(ProbeKind::Startup, Some(false), &probes, S(0), S(5));
        assert_eq!((verdict, next), (None, vec![(ProbeKind::Startup, S(10))]));
        assert!(!run.started);
        let (_, next) = run.answer(ProbeKind::Startup, Some(true), &probes, S(0), S(15));
        // Their own delays are over by now.
        assert_eq!(next, [(ProbeKind::Liveness, S(0)), (ProbeKind::Readiness, S(0))]);
        assert!(run.started && !run.ready(&probes));
        run.answer(ProbeKind::Readiness, Some(true), &probes, S(0), S(15));
        assert!(run.ready(&probes));
    }

    #[test]
    fn readiness_goes_and_comes_and_a_question_not_put_changes_nothing() {
        let probes = Probes { readiness: Some(probe(1, 2)), ..Probes::default() };
        let mut run = RunProbes::default();
        run.begin(&probes, S(0), S(0));
        let mut ready = |success| {
            run.answer(ProbeKind::Readiness, success, &probes, S(0), S(0));
            run.ready(&probes)
        };
        assert!(!ready(None) && ready(Some(true)) && ready(Some(false)) && ready(None));
        assert!(!ready(Some(false)) && ready(Some(true)));
    }

    #[test]
    fn a_failure_for_good_is_not_asked_about_again() {
        let probes = Probes { liveness: Some(probe(1, 1)), ..Probes::default() };
        let mut run = RunProbes::default();
        run.begin(&probes, S(0), S(0));
        let answer = run.answer(ProbeKind::Liveness, Some(false), &probes, S(0), S(5));
        assert_eq!(answer, (Some(Verdict::Failed), Vec::new()));
    }
}

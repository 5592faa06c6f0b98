//! The kubelet's delay before a container is started again. Pure.

use std::time::Duration;

/// First delay that is not zero.
const INITIAL: Duration = Duration::from_secs(10);

/// Longest delay.
const MAX: Duration = Duration::from_secs(300);

/// A run of this length makes the next restart count as the first.
const RESET_AFTER: Duration = Duration::from_secs(600);

/// How long a container waits for its next start: not at all after its first run, then 10 s,
/// doubling up to 300 s; from the beginning again after a run of ten minutes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The delay after a run of this length.
    pub(super) fn after_run_of(&mut self, run: Duration) -> Duration {
        if run >= RESET_AFTER {
            self.next = Duration::ZERO;
        }
        let delay = self.next;
        self.next = if delay.is_zero() { INITIAL } else { delay.saturating_mul(2).min(MAX) };
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delays(backoff: &mut Backoff, runs: &[u64]) -> Vec<u64> {
        runs.iter().map(|s| backoff.after_run_of(Duration::from_secs(*s)).as_secs()).collect()
    }

    #[test]
    fn delays_double_to_five_minutes() {
        let mut backoff = Backoff::default();
        assert_eq!(delays(&mut backoff, &[1; 9]), [0, 10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn ten_minutes_of_running_forgive_everything() {
        let mut backoff = Backoff::default();
        assert_eq!(delays(&mut backoff, &[1, 1, 1, 599, 600, 1, 1]), [0, 10, 20, 40, 0, 10, 20]);
    }
}

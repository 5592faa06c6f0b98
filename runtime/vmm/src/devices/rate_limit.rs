//! Token buckets: how much a device may move in a time.
//!
//! A bucket fills at a steady rate up to its burst. What is moved takes tokens out, afterwards and
//! whole, since its size is often known only then: a transfer is let through while there is at least
//! one token, and may leave the bucket in debt, which is paid back before the next one. So a transfer
//! larger than the burst passes too, and over time the rate holds.
//!
//! The arithmetic is exact (in 10^-9 tokens, without rounding) and pure: whoever uses it brings the
//! time, and a timer for when it has to wait.

use std::time::{Duration, Instant};

/// Parts of a token, so that a nanosecond's refill is a whole number of them.
const NANO: i128 = 1_000_000_000;

/// One bucket.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Most that it holds, in 10^-9 tokens.
    burst: i128,
    /// Tokens per second, which is 10^-9 tokens per nanosecond.
    refill: u64,
    /// What it holds, in 10^-9 tokens; negative: the debt.
    level: i128,
    /// As of when.
    updated: Instant,
}

impl TokenBucket {
    /// A full bucket of `burst` tokens that gets `refill_per_second`. Of each at least one: fewer
    /// would never let anything through.
    #[must_use]
    pub fn new(burst: u64, refill_per_second: u64, now: Instant) -> Self {
        let burst = i128::from(burst.max(1)).saturating_mul(NANO);
        TokenBucket { burst, refill: refill_per_second.max(1), level: burst, updated: now }
    }

    /// How long to wait until there is a token; `None` if there is one.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        let missing = NANO.saturating_sub(self.level);
        let missing = u128::try_from(missing).ok().filter(|missing| *missing > 0)?;
        let nanos = missing.div_ceil(u128::from(self.refill));
        // A debt of hundreds of years at a token a second.
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Takes `tokens` out, whether they are there or not.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        self.refill(now);
        self.level = self.level.saturating_sub(i128::from(tokens).saturating_mul(NANO));
    }

    fn refill(&mut self, now: Instant) {
        // Zero where threads that share a bucket come with times out of order.
        let elapsed = now.saturating_duration_since(self.updated);
        self.updated = self.updated.max(now);
        let nanos = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let gained = nanos.saturating_mul(i128::from(self.refill));
        self.level = self.level.saturating_add(gained).min(self.burst);
    }
}

/// The limits of one direction of a device: bytes and operations, each with or without one.
#[derive(Debug, Clone, Default)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl RateLimiter {
    /// Limits as configured, with full buckets.
    #[must_use]
    pub fn new(limit: &husk_vmm_api::RateLimit, now: Instant) -> Self {
        let bucket = |config: &husk_vmm_api::TokenBucketConfig| {
            TokenBucket::new(config.burst, config.refill_per_second, now)
        };
        RateLimiter {
            bytes: limit.bytes.as_ref().map(bucket),
            operations: limit.operations.as_ref().map(bucket),
        }
    }

    /// How long to wait until the next operation; `None` if it may be done now.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let wait = |bucket: &mut Option<TokenBucket>| bucket.as_mut().and_then(|b| b.wait(now));
        wait(&mut self.bytes).max(wait(&mut self.operations))
    }

    /// One operation that moved `bytes` was done.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use husk_vmm_api::{RateLimit, TokenBucketConfig};
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_full_bucket_lets_its_burst_through_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(3, 10, start);
        for _ in 0..3 {
            assert_eq!(bucket.wait(start), None);
            bucket.take(1, start);
        }
        let wait = bucket.wait(start).unwrap();
        assert_eq!(wait, Duration::from_millis(100));
        assert!(bucket.wait(start + wait - Duration::from_nanos(1)).is_some());
        assert_eq!(bucket.wait(start + wait), None);
    }

    #[test]
    fn more_than_the_burst_passes_and_is_paid_back() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(1000, 1000, start);
        bucket.take(64_000, start);
        assert_eq!(bucket.wait(start), Some(Duration::from_millis(63_001)));
    }

    #[test]
    fn a_bucket_does_not_fill_above_its_burst() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(2, 1000, start);
        let later = start + 1000 * SECOND;
        bucket.take(2, later);
        assert_eq!(bucket.wait(later), Some(Duration::from_millis(1)));
    }

    #[test]
    fn absurd_numbers_saturate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(u64::MAX, u64::MAX, start);
        for _ in 0..100 {
            bucket.take(u64::MAX, start);
        }
        assert!(bucket.wait(start).is_some());
        assert_eq!(bucket.wait(start + 1000 * SECOND), None);
        let mut bucket = TokenBucket::new(0, 0, start);
        bucket.take(u64::MAX, start);
        assert_eq!(bucket.wait(start), Some(Duration::from_nanos(u64::MAX)));
    }

    #[test]
    fn time_that_goes_back_gains_nothing() {
        let start = Instant::now() + SECOND;
        let mut bucket = TokenBucket::new(1, 1, start);
        bucket.take(1, start);
        assert_eq!(bucket.wait(start - SECOND), Some(SECOND));
        assert_eq!(bucket.wait(start), Some(SECOND));
    }

    #[test]
    fn the_stricter_of_two_limits_holds() {
        let start = Instant::now();
        let limit = RateLimit {
            bytes: Some(TokenBucketConfig { burst: 1500, refill_per_second: 1000 }),
            operations: Some(TokenBucketConfig { burst: 1, refill_per_second: 100 }),
        };
        let mut limiter = RateLimiter::new(&limit, start);
        assert_eq!(limiter.wait(start), None);
        limiter.charge(100, start);
        assert_eq!(limiter.wait(start), Some(Duration::from_millis(10)));
        limiter.charge(1900, start);
        assert_eq!(limiter.wait(start), Some(Duration::from_millis(501)));
        let mut unlimited = RateLimiter::new(&RateLimit::default(), start);
        unlimited.charge(u64::MAX, start);
        assert_eq!(unlimited.wait(start), None);
    }

    proptest! {
        /// Whoever moves as soon as allowed moves at most the burst, the refill of the time, and the
        /// one transfer that went into debt; and never waits longer than is needed.
        #[test]
        fn the_rate_holds_over_any_sequence(
            burst in 1..100_000_u64,
            refill in 1..10_000_000_u64,
            transfers in prop::collection::vec((0..70_000_u64, 0..50_000_000_u64), 1..100),
        ) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(burst, refill, start);
            let (mut now, mut moved) = (start, 0_u128);
            for (size, pause_ns) in transfers {
                now += Duration::from_nanos(pause_ns);
                if let Some(wait) = bucket.wait(now) {
                    prop_assert!(bucket.clone().wait(now + wait - Duration::from_nanos(1)).is_some());
                    now += wait;
                    prop_assert_eq!(bucket.wait(now), None);
                }
                let elapsed = (now - start).as_nanos();
                let refilled = (elapsed * u128::from(refill)).div_ceil(1_000_000_000);
                prop_assert!(moved <= u128::from(burst) + refilled);
                bucket.take(size, now);
                moved += u128::from(size);
            }
        }
    }
}

//! Times as people write and read them.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A moment in the past: `10m`, `1h30m`, `2d` ago, or a time like `2026-01-02T15:04:05Z`.
pub(super) fn since(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(time.into());
    }
    let explain = || {
        format!(
            "{text:?} is neither a duration like 90s, 10m, 1h30m, 2d nor a time like 2026-01-02T15:04:05Z"
        )
    };
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(explain)?;
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| explain())?;
        let (unit, tail) = tail.split_at(tail.chars().next().map_or(0, char::len_utf8));
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(explain()),
        };
        total = total.saturating_add(Duration::from_secs(number.saturating_mul(seconds)));
        rest = tail;
    }
    if text.is_empty() {
        return Err(explain());
    }
    Ok(SystemTime::now().checked_sub(total).unwrap_or(SystemTime::UNIX_EPOCH))
}

/// A time as the records have it.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

/// A duration in one or two units, as kubectl shows ages.
pub(super) fn human(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..120 => format!("{s}s"),
        120..600 => format!("{}m{}s", s / 60, s % 60),
        600..10_800 => format!("{}m", s / 60),
        10_800..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// How long ago a time of the records was.
pub(super) fn age(text: &str) -> String {
    let age = parse(text).map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
    age.map_or_else(|| "?".to_owned(), human)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_times_are_understood() {
        let ago = |text: &str| {
            let past = since(text).unwrap();
            SystemTime::now().duration_since(past).unwrap()
        };
        assert_eq!(ago("1h30m").as_secs(), 5400);
        assert_eq!(ago("2d").as_secs(), 172_800);
        let time = since("2026-01-02T15:04:05Z").unwrap();
        assert_eq!(time, SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_366_245));
        for bad in ["", "10", "m", "10x", "-5m", "10é"] {
            assert!(since(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ages_are_short() {
        let texts = [0, 119, 120, 3599, 10_800, 200_000].map(|s| human(Duration::from_secs(s)));
        assert_eq!(texts, ["0s", "119s", "2m0s", "59m", "3h", "2d"]);
    }
}

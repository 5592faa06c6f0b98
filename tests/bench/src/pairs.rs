//! Interleaved rounds: A, B, A, B, … so that a drift of the machine's speed hits all alike.

use std::time::Duration;

use anyhow::Result;

/// One thing to measure: its name and a function that runs it once and says how long it took.
pub(crate) struct Contender<'a> {
    pub(crate) name: &'a str,
    pub(crate) once: Box<dyn FnMut() -> Result<Duration> + 'a>,
}

/// Runs all contenders in turn, `rounds` times after a warm-up, and returns the samples of each.
/// `before` runs before every single one of them.
pub(crate) fn interleave(
    rounds: usize,
    before: impl Fn() -> Result<()>,
    contenders: &mut [Contender<'_>],
) -> Result<Vec<Vec<Duration>>> {
    let mut samples = vec![Vec::with_capacity(rounds); contenders.len()];
    for round in 0..=rounds {
        let label =
            if round == 0 { "warm-up".to_owned() } else { format!("round {round}/{rounds}") };
        let mut line = format!("  {label}:");
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
            before()?;
            let took = (contender.once)()?;
            line.push_str(&format!("  {} {:.1} ms", contender.name, millis(took)));
            if round > 0 {
                samples.push(took);
            }
        }
        println!("{line}");
    }
    Ok(samples)
}

/// The median; of an even number of samples the lower one.
pub(crate) fn median<T: PartialOrd + Copy>(samples: &[T]) -> Option<T> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    sorted.get(sorted.len().saturating_sub(1) / 2).copied()
}

/// The median of the ratios A/B, pair by pair.
pub(crate) fn ratio(a: &[Duration], b: &[Duration]) -> Option<f64> {
    let ratios: Vec<f64> = a
        .iter()
        .zip(b)
        .filter(|(_, b)| !b.is_zero())
        .map(|(a, b)| a.as_secs_f64() / b.as_secs_f64())
        .collect();
    median(&ratios)
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        let ms =
            |values: &[u64]| values.iter().map(|v| Duration::from_millis(*v)).collect::<Vec<_>>();
        // The machine became slower by ten in the middle: the ratio does not notice.
        let ratio = ratio(&ms(&[10, 100, 11, 120]), &ms(&[20, 200, 22, 240])).unwrap();
        assert!((ratio - 0.5).abs() < 1e-9);
        assert_eq!(median::<u32>(&[]), None);
        assert_eq!(median(&[3, 1, 2]), Some(2));
    }

    #[test]
    fn the_warm_up_is_not_counted() {
        let mut calls = 0;
        let once = Box::new(|| {
            calls += 1;
            Ok(Duration::from_millis(calls))
        });
        let samples = interleave(3, || Ok(()), &mut [Contender { name: "a", once }]).unwrap();
        assert_eq!(samples[0], [2, 3, 4].map(Duration::from_millis));
    }
}

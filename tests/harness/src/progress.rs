//! Progress on standard error: a line that changes on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Off a terminal, a changing message is printed at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// One long step. Say [`Step::finish`] at its end; a dropped step only disappears.
#[derive(Debug)]
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    started: Instant,
    last_plain: Instant,
}

impl Step {
    /// Begins the step and says so.
    pub fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            say(format_args!("{what} ..."));
        }
        let now = Instant::now();
        Self { what, bar, started: now, last_plain: now }
    }

    /// Shows a detail of the running step.
    pub fn detail(&mut self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {detail}", self.what));
        } else if self.last_plain.elapsed() >= PLAIN_INTERVAL {
            self.last_plain = Instant::now();
            let seconds = self.started.elapsed().as_secs();
            say(format_args!("  {detail} ({seconds} s)"));
        }
    }

    /// Says that the step is done, how, and how long it took.
    pub fn finish(self, result: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        say(format_args!("{}: {result} ({seconds:.1} s)", self.what));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line to the person at the terminal.
pub fn say(line: impl std::fmt::Display) {
    eprintln!("husk tests: {line}");
}

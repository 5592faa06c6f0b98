//! How far pulls and imports have come, for people: bars on a terminal, else plain lines.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use console::Term;
use husk_image::{Event, Progress};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::image::human_bytes;

/// How often bars are drawn, in Hz.
const DRAWS_PER_SECOND: u8 = 10;

/// How much of a layer's digest is shown.
const SHOWN_DIGITS: usize = 12;

/// Shows the progress of pulls and imports, of several at the same time too.
pub(crate) struct Reporter {
    shown: Mutex<Shown>,
    /// Whether somebody still looks.
    wanted: Box<dyn Fn() -> bool + Send + Sync>,
}

enum Shown {
    Nothing,
    Lines(Box<dyn Write + Send>),
    Bars(MultiProgress, HashMap<String, ProgressBar>),
}

/// What is shown at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Most {
    Nothing,
    /// For where others write, too.
    Lines,
    Bars,
}

impl Reporter {
    /// Shows it on standard error, unless husk is to be quiet.
    pub(crate) fn on_stderr(quiet: bool) -> Arc<Self> {
        let most = if quiet { Most::Nothing } else { Most::Bars };
        Self::on_this_stderr(most, || true)
    }

    /// Shows it on what is standard error now, whatever that becomes, until it is
    /// [closed](Self::close) or `wanted` no more.
    pub(crate) fn on_this_stderr(
        most: Most,
        wanted: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Arc<Self> {
        let shown = match most {
            Most::Nothing => Shown::Nothing,
            Most::Lines | Most::Bars => match shown_on_stderr(most == Most::Bars) {
                Ok(shown) => shown,
                Err(error) => {
                    tracing::debug!(%error, "progress cannot be shown");
                    Shown::Nothing
                }
            },
        };
        Arc::new(Reporter { shown: Mutex::new(shown), wanted: Box::new(wanted) })
    }

    /// Shows nothing more, and lets go of where it was shown.
    pub(crate) fn close(&self) {
        self.with(|shown| {
            if let Shown::Bars(all, _) = shown {
                // Bars may be kept elsewhere.
                all.set_draw_target(ProgressDrawTarget::hidden());
            }
            *shown = Shown::Nothing;
        });
    }

    /// Says that this image is asked for. What follows of it is told by events.
    pub(crate) fn pulling(&self, reference: &str) {
        self.with(|shown| shown.line(&format!("pulling {reference}")));
    }

    fn with(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for Reporter {
    fn event(&self, event: Event) {
        if !(self.wanted)() {
            self.close();
        }
        self.with(|shown| shown.event(event));
    }
}

/// Where standard error goes now, for as long as it is wanted.
fn shown_on_stderr(bars: bool) -> io::Result<Shown> {
    let stderr = || -> io::Result<File> { Ok(io::stderr().as_fd().try_clone_to_owned()?.into()) };
    if !bars || !io::stderr().is_terminal() {
        return Ok(Shown::Lines(Box::new(stderr()?)));
    }
    let term = Term::read_write_pair(stderr()?, stderr()?);
    let target = ProgressDrawTarget::term(term, DRAWS_PER_SECOND);
    Ok(Shown::Bars(MultiProgress::with_draw_target(target), HashMap::new()))
}

impl Shown {
    fn event(&mut self, event: Event) {
        match event {
            Event::LayerStarted { diff_id, size } => {
                let layer = short(&diff_id.to_string());
                self.line(&format!("layer {layer}: {}", human_bytes(size)));
                self.bar(&layer, |bar| {
                    bar.set_length(size);
                    bar.set_position(0);
                });
            }
            Event::LayerProgress { diff_id, bytes } => {
                self.bar(&short(&diff_id.to_string()), |bar| bar.set_position(bytes));
            }
            Event::LayerDone { diff_id, .. } => {
                let layer = short(&diff_id.to_string());
                self.line(&format!("layer {layer}: done"));
                self.bar(&layer, |bar| bar.finish_with_message("done"));
            }
            // Nothing happens: no line.
            Event::LayerExists { diff_id } => self.bar(&short(&diff_id.to_string()), |bar| {
                bar.finish_with_message("here already");
            }),
            _ => {}
        }
    }

    /// Says something, where there are no bars.
    fn line(&mut self, text: &str) {
        if let Shown::Lines(to) = self
            && let Err(error) = to.write_all(format!("husk: {text}\n").as_bytes())
        {
            tracing::debug!(%error, "nobody sees the progress");
            *self = Shown::Nothing;
        }
    }

    /// Changes the bar of a layer, where there are bars.
    fn bar(&mut self, layer: &str, change: impl FnOnce(&ProgressBar)) {
        let Shown::Bars(all, by_layer) = self else { return };
        let bar = by_layer.entry(layer.to_owned()).or_insert_with(|| {
            let bar = all.add(ProgressBar::no_length());
            // A template of this program's own; if it were wrong, the default would do.
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix} [{wide_bar}] {bytes:>10}/{total_bytes:<10} {msg}",
            ) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(layer.to_owned());
            bar
        });
        change(bar);
    }
}

/// The beginning of a digest, without the name of its algorithm.
fn short(digest: &str) -> String {
    let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
    digits.chars().take(SHOWN_DIGITS).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use husk_image::Digest;

    use super::*;

    /// Keeps what is written.
    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Paper {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn digest(digit: &str) -> Digest {
        format!("sha256:{}", digit.repeat(64)).parse().unwrap()
    }

    #[test]
    fn without_a_terminal_each_layer_that_is_read_has_its_lines_while_they_are_wanted() {
        let (paper, wanted) = (Paper::default(), Arc::new(AtomicBool::new(true)));
        let asked = wanted.clone();
        let reporter = Reporter {
            shown: Mutex::new(Shown::Lines(Box::new(paper.clone()))),
            wanted: Box::new(move || asked.load(Ordering::Relaxed)),
        };
        reporter.pulling("web:1");
        reporter.event(Event::Layers { count: 2 });
        reporter.event(Event::LayerExists { diff_id: digest("a") });
        reporter.event(Event::LayerStarted { diff_id: digest("b"), size: 3 << 20 });
        reporter.event(Event::LayerProgress { diff_id: digest("b"), bytes: 1 << 20 });
        reporter.event(Event::LayerDone { diff_id: digest("b"), size: 1 });
        let told = "husk: pulling web:1\nhusk: layer bbbbbbbbbbbb: 3.0 MiB\n\
                    husk: layer bbbbbbbbbbbb: done\n";
        assert_eq!(paper.text(), told);
        wanted.store(false, Ordering::Relaxed);
        reporter.event(Event::LayerStarted { diff_id: digest("c"), size: 1 });
        assert_eq!(paper.text(), told);
        assert_eq!(Arc::strong_count(&paper.0), 1, "it is let go of");
    }
}

//! What must be undone when a pod ends: a stack, undone last in, first out.

use std::future::Future;
use std::pin::Pin;

type Step = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// Steps that were done and have an opposite. A step is pushed only after it succeeded.
#[derive(Default)]
pub(super) struct Undo {
    steps: Vec<(&'static str, Step)>,
}

impl Undo {
    /// Adds how the step that was just done is undone. It reports its failures itself: there is
    /// nobody left to act on them.
    pub(super) fn push<F>(&mut self, step: &'static str, undo: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.steps.push((step, Box::new(move || Box::pin(undo()))));
    }

    /// Undoes everything.
    pub(super) async fn run(&mut self) {
        while let Some((step, undo)) = self.steps.pop() {
            tracing::debug!(step, "undoing");
            undo().await;
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // Only if the pod's task was cut off, by the end of its runtime. What the steps hold has
        // owners that release it, except for what they wait for.
        for (step, _) in &self.steps {
            tracing::debug!(step, "not undone in order");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn steps_are_undone_once_in_reverse_order() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        for step in ["first", "second", "third"] {
            let log = log.clone();
            undo.push(step, move || async move {
                if let Ok(mut log) = log.lock() {
                    log.push(step);
                }
            });
        }
        undo.run().await;
        undo.run().await;
        let log = log.lock().map(|log| log.clone()).unwrap_or_default();
        assert_eq!(log, ["third", "second", "first"]);
    }
}

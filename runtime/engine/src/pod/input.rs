//! The standard inputs of the containers that have one, for whoever attaches to them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

/// How many pieces of input may wait for the container.
const QUEUE: usize = 4;

/// Something for a container's standard input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Its end. What is sent after it is lost.
    End,
}

/// See the module. Clones are the same. Locked for moments, never across an await.
#[derive(Debug, Clone, Default)]
pub(super) struct Inputs(Arc<Mutex<HashMap<Arc<str>, mpsc::Sender<Input>>>>);

impl Inputs {
    /// A way to write to a container's input; `None` if it has none now.
    pub(super) fn of(&self, container: &str) -> Option<mpsc::Sender<Input>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(container).cloned()
    }

    /// Opens the input of a container's new run.
    pub(super) fn open(&self, container: Arc<str>) -> mpsc::Receiver<Input> {
        let (sender, queue) = mpsc::channel(QUEUE);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(container, sender);
        queue
    }
}

/// Carries input to a container until its end, or until its process has ended. While nobody is
/// attached it stays open.
pub(super) async fn feed(
    mut to: UnixStream,
    mut queue: mpsc::Receiver<Input>,
    mut ended: watch::Receiver<bool>,
) {
    let carry = async {
        while let Some(input) = queue.recv().await {
            match input {
                Input::Bytes(bytes) => to.write_all(&bytes).await?,
                Input::End => break,
            }
        }
        to.shutdown().await
    };
    tokio::select! {
        carried = carry => {
            if let Err(error) = carried {
                // A program need not read its input to the end.
                tracing::debug!(%error, "a container takes no input any more");
            }
        }
        _ = ended.wait_for(|ended| *ended) => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn input_arrives_and_ends() {
        let inputs = Inputs::default();
        assert!(inputs.of("c").is_none());
        let queue = inputs.open("c".into());
        let (host, mut guest) = UnixStream::pair().unwrap();
        let ended = watch::Sender::new(false);
        let feeding = tokio::spawn(feed(host, queue, ended.subscribe()));
        let input = inputs.of("c").unwrap();
        input.send(Input::Bytes(b"hello".to_vec())).await.unwrap();
        input.send(Input::End).await.unwrap();
        let mut got = Vec::new();
        guest.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"hello");
        feeding.await.unwrap();
        assert!(input.send(Input::End).await.is_err());
    }

    #[tokio::test]
    async fn a_container_that_ends_takes_its_input_with_it() {
        let inputs = Inputs::default();
        let queue = inputs.open("c".into());
        let (host, _guest) = UnixStream::pair().unwrap();
        let ended = watch::Sender::new(false);
        let feeding = tokio::spawn(feed(host, queue, ended.subscribe()));
        ended.send_replace(true);
        feeding.await.unwrap();
        assert!(inputs.of("c").unwrap().is_closed());
    }
}

//! What happens to containers that no answer to a request tells.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use husk_proto::agent::{AgentEvent, OomKill, agent_event};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged;
use tokio_stream::{Stream, StreamExt};

use super::{Container, Runner};
use crate::cgroup::Cgroup;
use crate::{lock, sys};

/// How many events wait for a reader; the oldest are lost to one that is slower.
const QUEUE: usize = 256;

/// Something that happened.
#[derive(Debug, Clone)]
enum Event {
    OomKill { container: String },
}

/// Where events are told, and where the kernel tells of them.
#[derive(Debug, Clone)]
pub(super) struct Events {
    /// None once nothing more is to be told.
    sender: Arc<Mutex<Option<broadcast::Sender<Event>>>>,
    inotify: Arc<AsyncFd<OwnedFd>>,
    /// Identifiers of containers by watch descriptor.
    watches: Arc<Mutex<HashMap<i32, String>>>,
}

/// A container that is watched for kills for memory, until this is dropped. The kernel does not end
/// the watch by itself when the cgroup is removed.
#[derive(Debug)]
pub(super) struct OomWatch {
    events: Events,
    descriptor: i32,
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        lock(&self.events.watches).remove(&self.descriptor);
        if let Err(error) = inotify::remove_watch(self.events.inotify.as_fd(), self.descriptor) {
            tracing::warn!(%error, "cannot end the watch of a cgroup");
        }
    }
}

impl Events {
    /// To be called in the runtime.
    ///
    /// # Errors
    /// If inotify is not to be had.
    pub(super) fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            sender: Arc::new(Mutex::new(Some(broadcast::Sender::new(QUEUE)))),
            inotify: Arc::new(sys::watch(inotify)?),
            watches: Arc::default(),
        })
    }

    /// Watches a cgroup, as container `id`; None where the memory controller is absent.
    ///
    /// # Errors
    /// What the kernel answers, e.g. `ENOSPC` for too many watches.
    pub(super) fn watch(&self, id: &str, cgroup: &Cgroup) -> io::Result<Option<OomWatch>> {
        let path = cgroup.memory_events();
        match inotify::add_watch(self.inotify.as_fd(), &path, WatchFlags::MODIFY) {
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(descriptor) => {
                lock(&self.watches).insert(descriptor, id.to_owned());
                Ok(Some(OomWatch { events: self.clone(), descriptor }))
            }
        }
    }

    fn tell(&self, event: Event) {
        if let Some(sender) = &*lock(&self.sender) {
            // Without a reader it is lost, as for one that comes later.
            let _readers = sender.send(event);
        }
    }

    /// Waits for changes, and returns the containers in which there are some.
    async fn changed(&self) -> io::Result<Vec<String>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut ids = Vec::new();
        self.inotify
            .async_io(tokio::io::Interest::READABLE, |inotify| {
                let mut reader = Reader::new(inotify, &mut buffer);
                // One buffer at a time: what remains makes it readable at once again.
                while ids.is_empty() || !reader.is_buffer_empty() {
                    let event = reader.next()?;
                    ids.extend(lock(&self.watches).get(&event.wd()).cloned());
                }
                Ok(())
            })
            .await?;
        Ok(ids)
    }
}

impl Container {
    /// Tells of kills for memory that have not been told of, given how many there were in all.
    pub(super) fn tell_oom_kills(&mut self, id: &str, count: u64, events: &Events) {
        if count > self.oom_kills_told {
            self.oom_kills_told = count;
            events.tell(Event::OomKill { container: id.to_owned() });
        }
    }
}

impl Runner {
    /// Looks for kills for memory whenever the kernel says that there may be some. Only those of
    /// processes that nobody follows need this: the end of any other tells as well.
    pub(super) async fn watch_oom_kills(self) {
        loop {
            let ids = match self.events.changed().await {
                Ok(ids) => ids,
                Err(error) => {
                    tracing::error!(%error, "kills for memory cannot be watched any more");
                    return;
                }
            };
            let mut table = lock(&self.table);
            for id in ids {
                // It may be on its way in or out of the table.
                let Some(container) = table.containers.get_mut(&id) else { continue };
                match container.remains.cgroup.oom_kills() {
                    Ok(count) => container.tell_oom_kills(&id, count, &self.events),
                    Err(error) => {
                        tracing::warn!(container = id, error = crate::chain(&error), "memory");
                    }
                }
            }
        }
    }

    /// What happens from now on; None if nothing more will.
    pub(crate) fn events(&self) -> Option<impl Stream<Item = AgentEvent> + Send + use<>> {
        let receiver = lock(&self.events.sender).as_ref()?.subscribe();
        let mut lost = 0_u64;
        Some(BroadcastStream::new(receiver).filter_map(move |item| match item {
            Err(Lagged(count)) => {
                lost = lost.saturating_add(count);
                None
            }
            Ok(Event::OomKill { container }) => Some(AgentEvent {
                lost: std::mem::take(&mut lost),
                event: Some(agent_event::Event::OomKill(OomKill { container_id: container })),
            }),
        }))
    }

    /// Ends all streams of events.
    pub(crate) fn end_events(&self) {
        *lock(&self.events.sender) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_reader_loses_the_oldest_events_and_is_told_how_many() {
        let events = Events::new().unwrap();
        let runner = Runner {
            table: Arc::default(),
            transport: crate::host::Host::Test("/nonexistent".into()).transport(),
            reaper: crate::reaper::Reaper::default(),
            events,
            own_pid_namespace: Arc::new(std::fs::File::open("/dev/null").unwrap().into()),
        };
        let mut stream = Box::pin(runner.events().unwrap());
        for number in 0..QUEUE + 3 {
            runner.events.tell(Event::OomKill { container: number.to_string() });
        }
        runner.end_events();
        let all: Vec<_> = stream.as_mut().collect().await;
        assert_eq!(all.len(), QUEUE);
        assert_eq!(all.first().unwrap().lost, 3);
        assert!(all.iter().skip(1).all(|e| e.lost == 0));
        assert!(runner.events().is_none());
    }
}

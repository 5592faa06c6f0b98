//! Processes that see the whole guest, for those who debug it: each is the first one of a container
//! that is made for it and removed with it.
//!
//! The guest's initramfs holds nothing but the agent, so that there is nothing to run in it: the
//! files come from an image, whose layers are disks of the VM from its boot on, because there is no
//! hotplug. Whoever starts the pod names the image, and thereby enables it.
//!
//! Such a container is no container of the pod: the state machine does not know it, so that the
//! pod's phase, its restarts and its end do not either.

use std::sync::atomic::Ordering;

use husk_proto::agent::Rootfs;

use super::access::{
    AccessError, ExecProcess, ExecRequest, ExecStreams, PodAccess, adapt, connect,
};
use super::actor::chain;
use crate::guest::{Guest, GuestError, StartFailure, Wanted};

/// Stands for the name of a container where images and roots are kept by those, and begins the names
/// of debug containers at the agent. No container of a pod can have it: it is no DNS label.
pub(super) const NAME: &str = "husk.debug";

/// Cannot be caught.
const SIGKILL: u32 = 9;

impl PodAccess {
    /// Runs a process as root beside the pod's containers, in a root made from the pod's image for
    /// debugging, with nothing of the guest hidden; or says why its program cannot be executed.
    ///
    /// # Errors
    /// [`AccessError::NoDebugging`] and the others.
    pub async fn debug(
        &self,
        request: ExecRequest,
    ) -> Result<Result<(ExecProcess, ExecStreams), StartFailure>, AccessError> {
        let runtime = self.runtime()?;
        let id = format!("{NAME}-{}", self.next_debug.fetch_add(1, Ordering::Relaxed));
        let describe = |error: &dyn std::error::Error| AccessError::Describe(chain(error));
        let (mut config, root) = runtime
            .debug_config(&id)
            .ok_or(AccessError::NoDebugging)?
            .map_err(|error| describe(&error))?;
        let wanted = Wanted { stdin: request.stdin, tty: request.tty };
        let process = config.process().clone().unwrap_or_default();
        config.set_process(Some(adapt(process, request).map_err(AccessError::Describe)?));
        let config = serde_json::to_vec(&config).map_err(|error| describe(&error))?;
        let guest = runtime.guest().clone();
        // Not held on to: it keeps the pod's output open.
        drop(runtime);
        // To its end, even if nobody waits for it any more: the container is removed then, and not
        // left half made.
        tokio::spawn(start(guest, id, config, root, wanted)).await?
    }
}

async fn start(
    guest: Guest,
    id: String,
    config: Vec<u8>,
    root: Rootfs,
    wanted: Wanted,
) -> Result<Result<(ExecProcess, ExecStreams), StartFailure>, AccessError> {
    let (stdio, streams) = guest.expect_streams(wanted);
    if let Err(failure) = guest.create_container(&id, config, root, Vec::new(), stdio).await? {
        return Ok(Err(failure));
    }
    let remover = Remover { container: Some((guest.clone(), id.clone())) };
    let end = match guest.start_container(&id).await? {
        Ok(end) => end,
        Err(failure) => {
            // Nothing is left of it.
            remover.disarm();
            return Ok(Err(failure));
        }
    };
    // The agent made the connection of the input before it answered.
    let streams = connect(streams).await?;
    let process =
        ExecProcess { guest, container: id, id: None, end: end.into(), debug: Some(remover) };
    Ok(Ok((process, streams)))
}

/// Removes a debug container with all of its processes, at the latest when it is dropped.
#[derive(Debug)]
pub(super) struct Remover {
    /// `None` if there is nothing to remove.
    container: Option<(Guest, String)>,
}

impl Remover {
    fn disarm(mut self) {
        self.container = None;
    }

    /// Removes it, now that its first process has ended.
    pub(super) async fn remove(mut self) {
        if let Some((guest, id)) = self.container.take() {
            told(&id, guest.delete_container(&id).await);
        }
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        if let Some((guest, id)) = self.container.take() {
            tokio::spawn(async move { told(&id, end(&guest, &id).await) });
        }
    }
}

async fn end(guest: &Guest, id: &str) -> Result<(), GuestError> {
    guest.signal(id, SIGKILL, true).await?;
    guest.wait_process(id, None).await?;
    guest.delete_container(id).await
}

fn told(id: &str, removed: Result<(), GuestError>) {
    match removed {
        Ok(()) => {}
        // With its VM, which may end at any time.
        Err(error @ GuestError::Ended(_)) => tracing::debug!(error = chain(&error), "gone"),
        Err(error) => tracing::warn!(container = id, error = chain(&error), "not removed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    #[test]
    fn no_container_of_a_pod_can_have_the_name() {
        for name in [NAME, "husk.debug-0", "debug"] {
            let text = format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\n\
                 spec: {{containers: [{{name: {name}, image: i}}]}}"
            );
            assert_eq!(manifest::parse(&text, "test").is_ok(), name == "debug", "{name}");
        }
    }
}

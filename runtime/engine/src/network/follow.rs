//! Changes of the pod's network namespace, told to the guest.

use husk_network::follow::{FollowError, Follower};
use husk_network::join::Snapshot;
use husk_network::netns::Netns;
use tokio::sync::watch;

use super::tell::update;
use crate::guest::Guest;
use crate::pod::chain;
use crate::task::Task;

/// What follows a namespace for a guest, for as long as it is kept.
pub(crate) struct Following {
    follower: Follower,
    telling: Task<()>,
}

/// Follows a namespace that was joined as `told`, which the guest knows.
///
/// # Errors
/// [`FollowError`].
pub(crate) fn follow(
    netns: &Netns,
    told: &Snapshot,
    guest: Guest,
) -> Result<Following, FollowError> {
    // The last state counts, whatever came before it.
    let (tell, mut changed) = watch::channel(told.clone());
    let follower = Follower::start(netns, told, move |now| {
        tell.send_replace(now);
    })?;
    let mut told = update(told);
    let telling = Task::spawn(async move {
        while changed.changed().await.is_ok() {
            let now = update(&changed.borrow_and_update());
            if now == told {
                continue;
            }
            match guest.update_network(now.clone()).await {
                Ok(()) => tracing::info!("the guest's network follows a change on the host"),
                Err(error) if error.is_fatal() => {
                    return tracing::debug!(%error, "the guest is gone");
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "the guest's network is not as the host's any more");
                }
            }
            // What was refused would be again.
            told = now;
        }
    });
    Ok(Following { follower, telling })
}

impl Following {
    /// Ends it.
    pub(crate) async fn end(self) {
        let Following { follower, telling } = self;
        drop(telling);
        // Its thread is waited for.
        if let Err(error) = tokio::task::spawn_blocking(move || drop(follower)).await {
            tracing::debug!(%error, "nobody follows the network any more");
        }
    }
}

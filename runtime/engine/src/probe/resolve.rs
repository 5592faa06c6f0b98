//! Where a server is. Names are looked up by the host's resolver, because the kubelet does it there,
//! and because images need not have one.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};

use tokio::sync::{Semaphore, oneshot};

/// Most addresses of a name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Most lookups at once, those included that nobody waits for any more. A resolver that does not
/// answer holds a thread for tens of seconds, and probes come every second.
const MAX_LOOKUPS: usize = 4;

static LOOKUPS: Semaphore = Semaphore::const_new(MAX_LOOKUPS);

/// The addresses of a server, at least one; `None` is the pod's own. `localhost` is the pod's, not
/// the host's.
///
/// # Errors
/// Why the name is not found.
pub(super) async fn resolve(host: &str) -> Result<Vec<Option<IpAddr>>, String> {
    match host {
        "" => Ok(vec![None]),
        "localhost" => Ok(vec![Some(Ipv4Addr::LOCALHOST.into())]),
        _ => match host.parse() {
            Ok(address) => Ok(vec![Some(address)]),
            Err(_) => look_up(host.to_owned()).await,
        },
    }
}

async fn look_up(name: String) -> Result<Vec<Option<IpAddr>>, String> {
    let failed = |why: String| format!("look up {name}: {why}");
    let permit = LOOKUPS.acquire().await.map_err(|error| failed(error.to_string()))?;
    let (answer, answered) = oneshot::channel();
    let asked = name.clone();
    // In a thread of its own: the runtime's end waits for those of its pool (`lookup_host`), and a
    // pod that has ended shall not wait for a resolver.
    let thread = std::thread::Builder::new().name("lookup".into()).spawn(move || {
        let found = (asked.as_str(), 0).to_socket_addrs();
        drop(permit);
        // Nobody may wait any more.
        drop(answer.send(found.map(|all| all.map(|address| address.ip()).collect::<Vec<_>>())));
    });
    thread.map_err(|error| failed(error.to_string()))?;
    let found = match answered.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(error) => return Err(failed(error.to_string())),
    };
    let mut addresses = Vec::new();
    for address in found.into_iter().map(Some) {
        if addresses.len() < MAX_ADDRESSES && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() { Err(failed("it has no address".into())) } else { Ok(addresses) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_taken_as_they_are() {
        let one = |address: &str| Ok(vec![address.parse().ok()]);
        assert_eq!(resolve("").await, Ok(vec![None]));
        assert_eq!(resolve("localhost").await, one("127.0.0.1"));
        assert_eq!(resolve("::1").await, one("::1"));
        assert_eq!(resolve("192.0.2.7").await, one("192.0.2.7"));
    }

    /// A name that no resolver takes, so that none is asked over a network: its label is too long.
    fn nowhere() -> String {
        "a".repeat(64) + ".invalid"
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_is_told() {
        let why = resolve(&nowhere()).await.unwrap_err();
        assert!(why.starts_with(&format!("look up {}: ", nowhere())), "{why}");
    }

    /// More than there may be at once, and given up: they come to their turn all the same.
    #[tokio::test]
    async fn lookups_that_were_given_up_make_room() {
        let name = nowhere();
        for _ in 0..MAX_LOOKUPS * 3 {
            tokio::select! {
                biased;
                answer = resolve(&name) => assert!(answer.is_err()),
                () = tokio::task::yield_now() => {}
            }
        }
        assert!(resolve(&name).await.is_err());
    }
}

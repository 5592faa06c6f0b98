//! A pod's network: made on the host ([`husk_network`]), told to the guest, and what containers
//! read of it in their files.
//!
//! The library below blocks; here it is called from threads that may, and given up with the pod.

mod dns;
mod files;
mod follow;
mod localhost;
mod tell;

use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_network::cni::{Capabilities, PortMapping, Stop};
use husk_network::join::{Joined, Nic, Snapshot};
use husk_network::localhost::{Localhost, LocalhostError};
use husk_network::netns::Netns;
use husk_network::pod::{Attached, Host, PodNetwork, Request, Source};
pub use husk_network::pod::{Checked, NetworkError};
use serde_json::{Map, Value};
use tokio::task::{JoinError, JoinHandle};

pub(crate) use self::dns::resolv_conf;
pub(crate) use self::files::hosts;
use self::follow::Following;
use self::tell::update;
use crate::guest::{Guest, GuestError};
use crate::task::Task;
use crate::types::{Network, PodSpec, Protocol};

/// A pod's network that is being made, or was: its [`Undo`] takes it back.
pub(crate) struct Attaching(JoinHandle<Result<Attached, NetworkError>>);

/// How a network is taken back.
pub(crate) struct Undo {
    pod: Arc<PodNetwork>,
    stop: Stop,
    /// Closed when nobody works on it any more.
    idle: tokio::sync::oneshot::Receiver<()>,
}

/// Begins to make the network of a pod, with this many pairs of queues for each interface; `None`
/// for one that has none. What it makes is taken back by the [`Undo`], whatever became of it.
///
/// # Errors
/// [`NetworkError`].
pub(crate) fn attach(
    spec: &PodSpec,
    uid: &str,
    state_dir: &Path,
    queue_pairs: usize,
) -> Result<Option<(Attaching, Undo)>, NetworkError> {
    let capabilities = capabilities(spec);
    let source = match &spec.network {
        Network::Loopback => {
            return capabilities.refuse_ports("the pod has no network").map(|()| None);
        }
        Network::Cni(name) => Source::Network(name.clone()),
        Network::Netns(path) => Source::Netns(path.clone()),
    };
    let pod = Arc::new(Host::of_environment(state_dir).pod(uid)?);
    let stop = Stop::new().map_err(NetworkError::Stop)?;
    let request = Request {
        namespace: spec.metadata.namespace.clone(),
        name: spec.metadata.name.clone(),
        source,
        capabilities,
        queue_pairs,
    };
    let (working, idle) = tokio::sync::oneshot::channel();
    let work = {
        let (pod, stop) = (pod.clone(), stop.clone());
        tokio::task::spawn_blocking(move || {
            let attached = pod.attach(&request, &stop);
            drop(working);
            attached
        })
    };
    Ok(Some((Attaching(work), Undo { pod, stop, idle })))
}

impl Attaching {
    /// Waits for it.
    pub(crate) async fn done(self) -> Result<Result<Attached, NetworkError>, JoinError> {
        self.0.await
    }
}

impl Undo {
    /// Gives the making up, if it is under way, and takes everything back. What is left of it, for
    /// reasons that are told in the log, is tried again with the next sweep.
    pub(crate) async fn run(self) {
        let Undo { pod, stop, idle } = self;
        stop.stop();
        // Nothing is ever sent: it ends when the other end is dropped.
        let _closed = idle.await;
        match tokio::task::spawn_blocking(move || pod.detach()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error = crate::pod::chain(&error);
                tracing::warn!(error, "something of the pod's network is left");
            }
            Err(error) => tracing::error!(%error, "the pod's network was not taken back"),
        }
    }
}

/// A network on the host, for the guest that is to have it.
pub(crate) struct GuestNetwork {
    netns: Netns,
    snapshot: Snapshot,
    localhost: Result<Localhost, LocalhostError>,
}

/// What is done between a network and its guest, for as long as it is kept.
pub(crate) struct Upkeep {
    following: Option<Following>,
    serving: Option<Task<()>>,
}

impl GuestNetwork {
    /// The virtual machine's interfaces, the pod's addresses, and the rest.
    pub(crate) fn of(attached: Attached) -> (Vec<Nic>, Vec<IpAddr>, Self) {
        let Attached { netns, addresses, joined: Joined { nics, snapshot }, localhost } = attached;
        (nics, addresses, GuestNetwork { netns, snapshot, localhost })
    }

    /// Tells the guest.
    ///
    /// # Errors
    /// [`GuestError`].
    pub(crate) async fn tell(&self, guest: &Guest) -> Result<(), GuestError> {
        guest.update_network(update(&self.snapshot)).await
    }

    /// Has the guest, which was told, follow later changes, and get the connections to `localhost` of
    /// the namespace. A pod is of use without either: what does not work is told in the log.
    pub(crate) fn keep(self, guest: &Guest) -> Upkeep {
        let GuestNetwork { netns, snapshot, localhost } = self;
        let following = follow::follow(&netns, &snapshot, guest.clone()).inspect_err(|error| {
            let error = crate::pod::chain(error);
            tracing::warn!(error, "later changes of the pod's network are not followed");
        });
        let told = |error: &dyn std::error::Error| {
            let error = crate::pod::chain(error);
            tracing::warn!(error, "connections to localhost in the pod's network namespace fail");
        };
        let localhost = localhost.inspect_err(|error| told(error)).ok();
        let serve = |localhost| localhost::serve(localhost, guest.clone());
        let serving = localhost.map(serve).transpose().inspect_err(|error| told(error));
        Upkeep { following: following.ok(), serving: serving.ok().flatten() }
    }
}

impl Upkeep {
    /// Ends it.
    pub(crate) async fn end(self) {
        let Upkeep { following, serving } = self;
        drop(serving);
        if let Some(following) = following {
            following.end().await;
        }
    }
}

/// Takes the networks back of pods whose processes died, on a thread of its own for which nobody
/// waits: plugins may take long, and what this process does not come to, the next one does.
pub(crate) fn sweep_in_background(state_dir: &Path) {
    let host = Host::of_environment(state_dir);
    let sweep = move || {
        let swept = match host.sweep() {
            Ok(swept) => swept,
            Err(error) => {
                let error = crate::pod::chain(&error);
                return tracing::warn!(error, "cannot look for networks whose owner died");
            }
        };
        for (uid, outcome) in swept {
            match outcome {
                Ok(()) => tracing::info!(uid, "took back the network of a pod whose owner died"),
                Err(error) => {
                    let error = crate::pod::chain(&error);
                    tracing::warn!(uid, error, "cannot take back the network of a pod");
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("network-sweep".into()).spawn(sweep) {
        tracing::warn!(%error, "cannot look for networks whose owner died");
    }
}

/// Takes the network of a pod back that has no process any more. Blocks as long as plugins take,
/// after it waited for whoever has the network up to `patience`.
///
/// # Errors
/// [`NetworkError`]. It stays recorded then, and can be tried again.
pub fn take_back(state_dir: &Path, uid: &str, patience: Duration) -> Result<(), NetworkError> {
    Host::of_environment(state_dir).pod_within(uid, patience)?.detach()
}

/// Sees whether the network of a pod is as it was made, whatever holds the pod. Blocks as long as
/// plugins take.
///
/// # Errors
/// [`NetworkError`] of what is not.
pub fn check(state_dir: &Path, uid: &str) -> Result<Checked, NetworkError> {
    Host::of_environment(state_dir).check(uid)
}

/// What is asked of plugins that are capable of it.
fn capabilities(spec: &PodSpec) -> Capabilities {
    let ports = spec.all_containers().flat_map(|container| &container.ports);
    let mapping = |port: &crate::types::ContainerPort| {
        Some(PortMapping {
            host_port: port.host_port?,
            container_port: port.port,
            protocol: protocol(port.protocol).to_owned(),
            host_ip: port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        })
    };
    let annotations: Map<String, Value> =
        spec.metadata.annotations.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
    Capabilities { port_mappings: ports.filter_map(mapping).collect(), annotations }
}

/// As CNI names it.
fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The addresses by which the host goes out, which are those of a node in Kubernetes.
pub(crate) fn host_addresses() -> Vec<IpAddr> {
    // Addresses for documentation (RFC 5737, RFC 3849). Nothing is sent: connecting a datagram
    // socket only looks the route up.
    let places = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let own = |(any, place)| {
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(place).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    places.into_iter().filter_map(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::stand_in;

    #[test]
    fn ports_of_the_host_become_mappings() {
        let mut spec = stand_in::spec(&["main"]);
        let port = |host_port| crate::types::ContainerPort {
            name: None,
            port: 80,
            protocol: Protocol::Udp,
            host_port,
            host_ip: None,
        };
        if let Some(main) = spec.containers.first_mut() {
            main.ports = vec![port(None), port(Some(8080))];
        }
        let mappings = capabilities(&spec).port_mappings;
        let [mapping] = mappings.as_slice() else { panic!("{mappings:?}") };
        assert_eq!((mapping.host_port, mapping.container_port), (8080, 80));
        assert_eq!((mapping.protocol.as_str(), mapping.host_ip.as_str()), ("udp", ""));
    }
}

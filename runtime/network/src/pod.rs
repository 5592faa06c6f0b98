//! The network of one pod: made as a whole, taken back as a whole, by whoever is there to do it.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cni::{
    Attachment, CONFIG_DIRECTORY, Capabilities, Cni, CniError, Limits, PLUGIN_DIRECTORIES,
    PORT_MAPPINGS, Stop,
};
use crate::join::{self, JoinError, Joined};
use crate::localhost::{Localhost, LocalhostError};
use crate::netns::{self, Netns, NetnsError};
use crate::record::{Record, Records};

pub use crate::record::RecordError;

/// Name of a pod's interface.
const INTERFACE: &str = "eth0";

/// Before a pod's uid in names of the host: of namespaces, and of containers to plugins.
const PREFIX: &str = "husk-";

/// How often somebody who waits for a pod's network looks again.
const RETRY: Duration = Duration::from_millis(20);

/// Why a pod has no network, or still has one.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Its namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A plugin.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The way into the virtual machine.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// What is kept of it.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A port of the host cannot lead to the pod.
    #[error("hostPort {port} cannot lead to the pod: {why}")]
    HostPort {
        /// The port.
        port: u16,
        /// Why not.
        why: String,
    },
    /// Another process has it.
    #[error(
        "the network of the pod {0:?} is in use by another process: try again when that has ended"
    )]
    Held(String),
    /// A call cannot be given up later.
    #[error("cannot make a means of stopping plugins")]
    Stop(#[source] std::io::Error),
}

impl Capabilities {
    /// Refuses ports of the host, for this reason.
    ///
    /// # Errors
    /// [`NetworkError::HostPort`] if there are any.
    pub fn refuse_ports(&self, why: &str) -> Result<(), NetworkError> {
        match self.port_mappings.first() {
            Some(mapping) => {
                let port = mapping.host_port;
                Err(NetworkError::HostPort { port, why: why.to_owned() })
            }
            None => Ok(()),
        }
    }
}

/// Where the networks of pods are made and recorded.
#[derive(Debug, Clone)]
pub struct Host {
    /// Plugins and configurations.
    pub cni: Cni,
    /// Where it is recorded what has to be taken back; it must outlive a crash of the host, as the
    /// records of plugins do.
    pub records: PathBuf,
    /// Where namespaces are made.
    pub netns_directory: PathBuf,
}

/// Where a pod's network comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A CNI network by its name, or the host's default.
    Network(Option<String>),
    /// A network namespace that somebody else made, and keeps.
    Netns(PathBuf),
}

/// A pod that is to have a network.
#[derive(Debug, Clone)]
pub struct Request {
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Where its network comes from.
    pub source: Source,
    /// What is asked of plugins.
    pub capabilities: Capabilities,
    /// How many pairs of queues each interface has.
    pub queue_pairs: usize,
}

/// A pod's network.
#[derive(Debug)]
pub struct Attached {
    /// Its network namespace.
    pub netns: Netns,
    /// The pod's addresses, its own one first.
    pub addresses: Vec<IpAddr>,
    /// The way into the virtual machine.
    pub joined: Joined,
    /// Connections to `localhost` of the namespace; a pod is of use without them.
    pub localhost: Result<Localhost, LocalhostError>,
}

impl Host {
    /// The host's own: configurations and plugins from the usual places, or those that the
    /// environment names as the tools of CNI have it (`NETCONFPATH`; `CNI_PATH`, which is looked
    /// through first). `HUSK_CNI_TIMEOUT` is how long a plugin may take, in seconds. `state` is where
    /// records are kept.
    #[must_use]
    pub fn of_environment(state: &Path) -> Self {
        let config_directory = std::env::var_os("NETCONFPATH").filter(|path| !path.is_empty());
        let config_directory = config_directory.unwrap_or_else(|| CONFIG_DIRECTORY.into()).into();
        let named = std::env::var_os("CNI_PATH").unwrap_or_default();
        let named = std::env::split_paths(&named).filter(|path| path.is_absolute());
        let usual = PLUGIN_DIRECTORIES.iter().map(PathBuf::from);
        let plugin_directories = named.chain(usual).collect();
        let mut limits = Limits::default();
        match std::env::var("HUSK_CNI_TIMEOUT").ok().map(|text| text.parse()) {
            None => {}
            Some(Ok(seconds)) => limits.time = Duration::from_secs(seconds),
            Some(Err(_)) => tracing::warn!("HUSK_CNI_TIMEOUT is no number of seconds"),
        }
        Host {
            cni: Cni { config_directory, plugin_directories, limits },
            records: state.join("network"),
            netns_directory: netns::DIRECTORY.into(),
        }
    }

    fn records(&self) -> Records {
        Records(self.records.clone())
    }

    /// The network of a pod, whether it has one or not. No other process can do anything with it
    /// as long as this lives.
    ///
    /// # Errors
    /// [`NetworkError::Held`] if another process has it, and [`NetworkError::Record`].
    pub fn pod(&self, uid: &str) -> Result<PodNetwork, NetworkError> {
        match self.records().lock(uid)? {
            Some(lock) => Ok(PodNetwork { host: self.clone(), uid: uid.to_owned(), _lock: lock }),
            None => Err(NetworkError::Held(uid.to_owned())),
        }
    }

    /// As [`Self::pod`], but waits this long for the process that has it: one that was killed lets
    /// go of its files one after the other, and one that takes it back does so when it has done that.
    ///
    /// # Errors
    /// As [`Self::pod`].
    pub fn pod_within(&self, uid: &str, patience: Duration) -> Result<PodNetwork, NetworkError> {
        let begun = Instant::now();
        loop {
            match self.pod(uid) {
                Err(NetworkError::Held(_)) if begun.elapsed() < patience => {
                    std::thread::sleep(RETRY);
                }
                held => return held,
            }
        }
    }

    /// Takes the networks back of pods whose processes died. The pods of which it is done, and
    /// those of which it failed.
    ///
    /// # Errors
    /// [`RecordError`] if it cannot be told which there are.
    pub fn sweep(&self) -> Result<Vec<Swept>, RecordError> {
        let records = self.records();
        let (mut swept, mut dead) = (Vec::new(), Vec::new());
        for uid in records.list()? {
            match self.pod(&uid) {
                Err(NetworkError::Held(_)) => {}
                Err(error) => swept.push((uid, Err(error))),
                Ok(pod) => {
                    // One that cannot be read is told below.
                    dead.extend(records.read(&uid).ok().flatten());
                    swept.push((uid, pod.detach()));
                }
            }
        }
        self.collect_garbage(dead);
        Ok(swept)
    }

    /// Has the plugins of networks in which pods died take back what belongs to none of the others,
    /// where the configuration, as it is now, allows it. What it does not come to is done after the
    /// next death.
    fn collect_garbage(&self, dead: Vec<Record>) {
        let mut done = BTreeSet::new();
        for Record { attachment, plugin_directories, .. } in dead {
            let Some(attachment) = attachment else { continue };
            let collected = self.collect_in(&attachment, plugin_directories, &mut done);
            if let Err(error) = collected {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the garbage of a network is not collected");
            }
        }
    }

    fn collect_in(
        &self,
        dead: &Attachment,
        plugin_directories: Vec<PathBuf>,
        done: &mut BTreeSet<String>,
    ) -> Result<(), NetworkError> {
        let mut network = dead.list().map_err(CniError::from)?;
        // What its configuration says now. One that is gone, or cannot be read, allows nothing.
        network.disable_gc = match self.cni.network(Some(&network.name)) {
            Ok(now) => now.disable_gc,
            Err(error) => {
                tracing::debug!(%error, network = network.name, "its garbage stays");
                None
            }
        };
        if network.disable_gc != Some(false) || !done.insert(network.name.clone()) {
            return Ok(());
        }
        let records = self.records();
        let Some(_alone) = records.plugins_alone()? else {
            tracing::debug!(network = network.name, "others are at it: garbage stays");
            return Ok(());
        };
        let mut valid = Vec::new();
        for uid in records.list()? {
            // Of one that cannot be read nothing must be taken.
            let Some(attachment) = records.read(&uid)?.and_then(|record| record.attachment) else {
                continue;
            };
            if attachment.list().map_err(CniError::from)?.name == network.name {
                valid.push((attachment.container_id, attachment.ifname));
            }
        }
        let stop = Stop::new().map_err(NetworkError::Stop)?;
        let cni = Cni { plugin_directories, ..self.cni.clone() };
        cni.gc(&network, &valid, &stop)?;
        Ok(())
    }

    /// Sees whether the network of a pod is as it was made, whoever holds it. Blocks as long as
    /// plugins take.
    ///
    /// # Errors
    /// [`NetworkError`] of what is not.
    pub fn check(&self, uid: &str) -> Result<Checked, NetworkError> {
        let Some(record) = self.records().read(uid)? else { return Ok(Checked::NoNetwork) };
        let Record { netns, attachment, plugin_directories, .. } = record;
        Netns::open(&netns)?;
        let Some(attachment) = attachment else { return Ok(Checked::Namespace(netns)) };
        if attachment.result.is_none() {
            return Ok(Checked::Unfinished);
        }
        let stop = Stop::new().map_err(NetworkError::Stop)?;
        let cni = Cni { plugin_directories, ..self.cni.clone() };
        let name = attachment.list().map_err(CniError::from)?.name;
        Ok(match cni.check(&attachment, &stop)? {
            true => Checked::AsMade(name),
            false => Checked::Unchecked(name),
        })
    }

    /// The pods that have a network, or a part of one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn attached(&self) -> Result<Vec<String>, RecordError> {
        self.records().list()
    }
}

/// What is known of a pod's network that nothing is wrong with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// It has none.
    NoNetwork,
    /// It has this namespace of somebody else, which is there.
    Namespace(PathBuf),
    /// Plugins are still making it, or did not come to the end.
    Unfinished,
    /// The plugins of this network say that it is as they made it.
    AsMade(String),
    /// The configuration of this network does not let its plugins be asked, by its version or by
    /// `disableCheck`.
    Unchecked(String),
}

/// The uid of a pod whose process died, and whether its network was taken back.
pub type Swept = (String, Result<(), NetworkError>);

/// The network of a pod, held by this process.
#[derive(Debug)]
pub struct PodNetwork {
    host: Host,
    uid: String,
    _lock: File,
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        // The lock itself goes with its file, after this.
        if let Err(error) = self.host.records().remove_lock(&self.uid) {
            tracing::warn!(%error, "the lock of a pod's network is left");
        }
    }
}

impl PodNetwork {
    /// Makes the network of the pod. If that fails, everything is taken back. Blocks as long as
    /// plugins take, unless `stop` is used.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn attach(&self, request: &Request, stop: &Stop) -> Result<Attached, NetworkError> {
        let attached = self.attach_all(request, stop);
        if attached.is_err()
            && let Err(error) = self.detach()
        {
            tracing::warn!(%error, "the network of a pod that failed is not all taken back");
        }
        attached
    }

    fn record(&self, record: &Record) -> Result<(), NetworkError> {
        Ok(self.host.records().write(&self.uid, record)?)
    }

    fn attach_all(&self, request: &Request, stop: &Stop) -> Result<Attached, NetworkError> {
        let (netns, added) = match &request.source {
            Source::Network(name) => self.add(request, name.as_deref(), stop)?,
            Source::Netns(path) => {
                let why = "its network namespace is of somebody else, who maps ports";
                request.capabilities.refuse_ports(why)?;
                let netns = Netns::open(path)?;
                self.record(&Record::of_other(path.clone()))?;
                (netns, Vec::new())
            }
        };
        let joined = join::join(&netns, request.queue_pairs)?;
        let addresses = if added.is_empty() { joined.snapshot.pod_addresses() } else { added };
        let localhost = Localhost::take(&netns);
        Ok(Attached { netns, addresses, joined, localhost })
    }

    /// Makes a namespace, and has plugins make an interface in it.
    fn add(
        &self,
        request: &Request,
        name: Option<&str>,
        stop: &Stop,
    ) -> Result<(Netns, Vec<IpAddr>), NetworkError> {
        let Host { cni, netns_directory, .. } = &self.host;
        let network = cni.network(name)?;
        if !network.is_capable_of(PORT_MAPPINGS) {
            let why = format!(
                "no plugin of network {:?} has the capability {PORT_MAPPINGS}",
                network.name
            );
            request.capabilities.refuse_ports(&why)?;
        }
        cni.status(&network, stop)?;
        let id = format!("{PREFIX}{}", self.uid);
        let mut attachment = Attachment {
            args: arguments(&self.uid, &id, request),
            container_id: id.clone(),
            netns: netns_directory.join(&id),
            ifname: INTERFACE.to_owned(),
            capabilities: request.capabilities.clone(),
            network: network.to_json(),
            result: None,
        };
        let record = |attachment: &Attachment| Record::of(attachment, &cni.plugin_directories);
        self.record(&record(&attachment))?;
        let netns = Netns::create(netns_directory, &id)?;
        let _calling = self.host.records().share_plugins()?;
        let added = cni.add(&mut attachment, stop)?;
        self.record(&record(&attachment))?;
        Ok((netns, added.addresses))
    }

    /// Takes the network of the pod back, if it has one; also one of which only a part was made,
    /// and by another process. What plugins refuse to take back stays recorded, and can be tried
    /// again.
    ///
    /// # Errors
    /// [`NetworkError`] of the first step that failed; the others were done.
    pub fn detach(&self) -> Result<(), NetworkError> {
        let records = self.host.records();
        let Some(record) = records.read(&self.uid)? else { return Ok(()) };
        let Record { netns, owned, attachment, plugin_directories, .. } = record;
        let mut outcome: Result<(), NetworkError> = Ok(());
        if let Some(attachment) = &attachment {
            let stop = Stop::new().map_err(NetworkError::Stop)?;
            // Those that made it, wherever others are found now.
            let cni = Cni { plugin_directories, ..self.host.cni.clone() };
            let _calling = records.share_plugins()?;
            outcome = cni.del(attachment, &stop).map_err(Into::into);
        }
        if owned {
            outcome = outcome.and(netns::delete(&netns).map_err(Into::into));
        } else {
            outcome = outcome.and(leave(&netns));
        }
        outcome?;
        Ok(records.remove(&self.uid)?)
    }
}

/// Ends what was set up in a namespace of somebody else, if it is still there.
fn leave(path: &Path) -> Result<(), NetworkError> {
    if !path.exists() {
        return Ok(());
    }
    match Netns::open(path) {
        Ok(netns) => Ok(join::part(&netns)?),
        // It was removed, and something else has its name.
        Err(NetnsError::NotOne { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `CNI_ARGS` as Kubernetes' runtimes give them.
fn arguments(uid: &str, id: &str, request: &Request) -> Vec<(String, String)> {
    let Request { namespace, name, .. } = request;
    [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", namespace),
        ("K8S_POD_NAME", name),
        ("K8S_POD_INFRA_CONTAINER_ID", id),
        ("K8S_POD_UID", uid),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_another_process_lets_go_of_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let host = Host::of_environment(directory.path());
        let held = host.pod("a").unwrap();
        let nobody = host.pod_within("a", Duration::from_millis(50));
        assert!(matches!(nobody, Err(NetworkError::Held(uid)) if uid == "a"));
        let waiting = std::thread::spawn(move || host.pod_within("a", Duration::from_secs(600)));
        std::thread::sleep(Duration::from_millis(50));
        drop(held);
        waiting.join().unwrap().unwrap();
    }
}

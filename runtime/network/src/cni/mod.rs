//! CNI: the network plugins of the host, as a container runtime calls them (specification 1.1).
//!
//! [`config`] reads network configurations, [`Cni`] calls their plugins for an [`Attachment`],
//! [`result`](mod@result) reads what they answer. Plugins are programs of the host's administrator: they are
//! trusted with the host, but not to answer in time, at all, or with sense.

mod builtin;
pub mod config;
mod exec;
mod invoke;
pub mod result;

use std::path::PathBuf;
use std::time::Duration;

pub use builtin::{BUILTIN, builtin};
pub use config::{ConfigError, NetworkList};
pub use exec::Stop;
pub use invoke::{Attachment, Cni};
pub use result::{AddResult, PluginError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Versions of the specification that are spoken here, the oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Where configurations are.
pub const CONFIG_DIRECTORY: &str = "/etc/cni/net.d";

/// Where plugins are: where they are installed by hand or by Kubernetes, by Debian, by Fedora.
pub const PLUGIN_DIRECTORIES: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// What a plugin may take at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Time for one call.
    pub time: Duration,
    /// Bytes of its output, and of its messages.
    pub output: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { time: Duration::from_secs(120), output: 1 << 20 }
    }
}

/// What a runtime can ask of plugins that say they are capable of it (`runtimeConfig`).
///
/// Each field is the capability of its name; a plugin is told of those in its `capabilities` only.
/// To support another one, add it here: nothing else has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    /// Ports of the host that lead to ports of the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// The pod's annotations, for plugins that read theirs.
    #[serde(
        default,
        rename = "io.kubernetes.cri.pod-annotations",
        skip_serializing_if = "Map::is_empty"
    )]
    pub annotations: Map<String, Value>,
}

/// Name of the capability by which ports of the host lead to the pod.
pub const PORT_MAPPINGS: &str = "portMappings";

/// A port of the host that leads to one of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The port of the host, 1 to 65535.
    pub host_port: u16,
    /// The port of the pod, 1 to 65535.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// The host's address; all of them if there is none.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// Why a call of plugins failed.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is no such configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The plugin is not installed.
    #[error("network {network:?}: there is no CNI plugin {plugin:?} in {}", show(directories))]
    NoPlugin {
        /// Of which network.
        network: String,
        /// Its name.
        plugin: String,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// The plugin says that it failed.
    #[error("network {network:?}: the CNI plugin {plugin:?} failed at {command}: {error}")]
    Refused {
        /// Of which network.
        network: String,
        /// Its name.
        plugin: String,
        /// What was asked for.
        command: &'static str,
        /// Its own words.
        error: PluginError,
    },
    /// The plugin did not do what a plugin has to do.
    #[error("network {network:?}: the CNI plugin {plugin:?} failed at {command}: {what}")]
    Misbehaved {
        /// Of which network.
        network: String,
        /// Its name.
        plugin: String,
        /// What was asked for.
        command: &'static str,
        /// What it did instead.
        what: String,
    },
    /// Its plugins have no version of the specification in common with the configuration and husk.
    #[error(
        "network {network:?}: its configuration (CNI {wanted}), its plugins and husk ({}) have no \
         version of CNI in common; {plugin:?} supports {supported}",
        VERSIONS.join(", ")
    )]
    NoVersion {
        /// Which.
        network: String,
        /// The version of its configuration.
        wanted: String,
        /// The plugin at which nothing was left.
        plugin: String,
        /// What that one supports.
        supported: String,
    },
    /// The caller does not want it any more.
    #[error("network {network:?}: {command} was given up")]
    Stopped {
        /// Which.
        network: String,
        /// What was asked for.
        command: &'static str,
    },
}

fn show(directories: &[PathBuf]) -> String {
    let all: Vec<_> = directories.iter().map(|path| path.display().to_string()).collect();
    all.join(", ")
}

//! The commands of CNI for a whole list of plugins.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::{self, ConfigError, Directory, NetworkList, Plugin, is_identifier};
use super::exec::{self, ExecError, Outcome, Stop};
use super::result::{AddResult, INCOMPATIBLE_VERSION, PluginError, clean, versions};
use super::{Capabilities, CniError, Limits, VERSIONS, builtin};

/// First versions of the specification that have these commands.
const CHECK_SINCE: &str = "0.4.0";
const GC_SINCE: &str = "1.1.0";

/// An interface of a pod in a network, before it is made, while it is there, and until it is taken
/// away: all that has to be known for that, also by another process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Who the pod is to the plugins: letters, digits, `_`, `.` and `-`.
    pub container_id: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Name of the interface in it.
    pub ifname: String,
    /// `CNI_ARGS`: names and values.
    pub args: Vec<(String, String)>,
    /// What is asked of plugins that are capable of it.
    pub capabilities: Capabilities,
    /// The configuration of the network as it was ([`NetworkList::to_json`]).
    pub network: Value,
    /// What ADD gave, if it came so far.
    pub result: Option<Value>,
}

impl Attachment {
    /// The configuration, read again.
    pub(crate) fn list(&self) -> Result<NetworkList, ConfigError> {
        NetworkList::of(Path::new("(recorded)"), &self.network)
    }

    /// `CNI_ARGS`
    fn arguments(&self) -> OsString {
        let all: Vec<_> = self.args.iter().map(|(name, value)| format!("{name}={value}")).collect();
        all.join(";").into()
    }

    /// What ADD made, if it came so far.
    ///
    /// # Errors
    /// What is wrong with the result.
    pub fn added(&self) -> Result<Option<AddResult>, String> {
        self.result.as_ref().map(|result| AddResult::of(result, &self.ifname)).transpose()
    }
}

/// The host's CNI: where configurations and plugins are, and how long those may take.
#[derive(Debug, Clone)]
pub struct Cni {
    /// Where configurations are.
    pub config_directory: PathBuf,
    /// Where plugins are; the first that has one wins.
    pub plugin_directories: Vec<PathBuf>,
    /// What a call may take.
    pub limits: Limits,
}

/// What is asked of a plugin, apart from its own configuration.
struct Call<'a> {
    command: &'static str,
    /// Its name in the environment, and the value.
    environment: Vec<(&'static str, OsString)>,
    network: &'a NetworkList,
    previous: Option<&'a Value>,
    capabilities: Option<&'a Capabilities>,
    stop: &'a Stop,
}

impl Cni {
    /// The network of this name, or without one the first: what `name` is `None` for is the default
    /// network of the host, and if it has no configuration at all, husk's own ([`builtin`]).
    ///
    /// # Errors
    /// [`CniError::Config`].
    pub fn network(&self, name: Option<&str>) -> Result<NetworkList, CniError> {
        let found = config::read_directory(&self.config_directory)?;
        for error in &found.broken {
            tracing::warn!(%error, "a CNI configuration is not used");
        }
        if let Some(name) = name {
            return Ok(found.named(name, &self.config_directory)?);
        }
        let Directory { networks, broken } = found;
        match (networks.into_iter().next(), broken.into_iter().next()) {
            (Some(network), _) => Ok(network),
            // There was to be a network, and this is not it.
            (None, Some(error)) => Err(error.into()),
            (None, None) => {
                let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
                Ok(builtin(ipv6)?)
            }
        }
    }

    /// Makes the interface, and keeps the result in `attachment`. If that fails, DEL has to be
    /// called all the same.
    ///
    /// # Errors
    /// [`CniError`] of the first plugin that fails.
    pub fn add(&self, attachment: &mut Attachment, stop: &Stop) -> Result<AddResult, CniError> {
        let mut network = attachment.list()?;
        if !is_identifier(&attachment.container_id) {
            let problem = format!("{:?} cannot identify a container", attachment.container_id);
            return Err(misbehaved(&network, "", "ADD", problem));
        }
        let result = match self.add_all(attachment, &network, stop) {
            Err(CniError::Refused { error, .. }) if error.code == INCOMPATIBLE_VERSION => {
                self.negotiate(&mut network, stop)?;
                attachment.network = network.to_json();
                self.add_all(attachment, &network, stop)
            }
            result => result,
        };
        let result = result?;
        let last = network.plugins.last().map(|plugin| plugin.kind.clone()).unwrap_or_default();
        let added = AddResult::of(&result, &attachment.ifname)
            .map_err(|problem| misbehaved(&network, &last, "ADD", problem))?;
        attachment.result = Some(result);
        Ok(added)
    }

    fn add_all(
        &self,
        attachment: &Attachment,
        network: &NetworkList,
        stop: &Stop,
    ) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in &network.plugins {
            let mut call = attachment_call("ADD", attachment, network, stop);
            call.previous = result.as_ref();
            let output = self.call(plugin, &call)?;
            let value = output.ok_or_else(|| {
                misbehaved(network, &plugin.kind, "ADD", "it gave no result".to_owned())
            })?;
            AddResult::of(&value, &attachment.ifname)
                .map_err(|problem| misbehaved(network, &plugin.kind, "ADD", problem))?;
            result = Some(value);
        }
        Ok(result.unwrap_or_else(|| json!({"cniVersion": network.version})))
    }

    /// Takes the interface away, also one that was made in part, or is gone. Every plugin is asked,
    /// whatever the others say.
    ///
    /// # Errors
    /// [`CniError`] of the first plugin that failed.
    pub fn del(&self, attachment: &Attachment, stop: &Stop) -> Result<(), CniError> {
        let network = attachment.list()?;
        let mut outcome = Ok(());
        for plugin in network.plugins.iter().rev() {
            let mut call = attachment_call("DEL", attachment, &network, stop);
            call.previous = attachment.result.as_ref();
            // Since 0.4.0 only; a plugin of before would take it for a mistake.
            if is_older(&network.version, CHECK_SINCE) {
                call.previous = None;
            }
            if let Err(error) = self.call(plugin, &call) {
                tracing::debug!(%error, "CNI DEL");
                outcome = outcome.and(Err(error));
            }
        }
        outcome
    }

    /// Sees whether the interface is as it was made. False if the network does not have that, by its
    /// version or by `disableCheck`.
    ///
    /// # Errors
    /// [`CniError`] of the first plugin that says that it is not.
    pub fn check(&self, attachment: &Attachment, stop: &Stop) -> Result<bool, CniError> {
        let network = attachment.list()?;
        if network.disable_check || is_older(&network.version, CHECK_SINCE) {
            return Ok(false);
        }
        for plugin in &network.plugins {
            let mut call = attachment_call("CHECK", attachment, &network, stop);
            call.previous = attachment.result.as_ref();
            self.call(plugin, &call)?;
        }
        Ok(true)
    }

    /// Has plugins take everything back in a network that is not of these attachments (pairs of
    /// `containerID` and `ifname`): also what other runtimes made in it. Therefore only where the
    /// configuration says in so many words that it may be (`disableGC: false`), and the version has
    /// it; and not while anybody makes or takes back an attachment. False if it was not done.
    ///
    /// # Errors
    /// [`CniError`] of the first plugin that failed; the others were asked, too.
    pub fn gc(
        &self,
        network: &NetworkList,
        valid: &[(String, String)],
        stop: &Stop,
    ) -> Result<bool, CniError> {
        if network.disable_gc != Some(false) || is_older(&network.version, GC_SINCE) {
            return Ok(false);
        }
        let valid: Vec<_> =
            valid.iter().map(|(id, ifname)| json!({"containerID": id, "ifname": ifname})).collect();
        let mut outcome = Ok(());
        for plugin in &network.plugins {
            let mut plugin = plugin.clone();
            plugin.config.insert("cni.dev/valid-attachments".to_owned(), valid.clone().into());
            let call = network_call("GC", network, stop);
            outcome = outcome.and(self.call(&plugin, &call).map(drop));
        }
        outcome.map(|()| true)
    }

    /// Asks whether the network can take pods.
    ///
    /// # Errors
    /// [`CniError`] of the first plugin that says that it cannot.
    pub fn status(&self, network: &NetworkList, stop: &Stop) -> Result<(), CniError> {
        if is_older(&network.version, GC_SINCE) {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.call(plugin, &network_call("STATUS", network, stop))?;
        }
        Ok(())
    }

    /// Lowers the version of a network to the newest that all its plugins speak.
    fn negotiate(&self, network: &mut NetworkList, stop: &Stop) -> Result<(), CniError> {
        let mut common: Vec<&str> =
            VERSIONS.into_iter().filter(|version| !is_older(&network.version, version)).collect();
        for plugin in &network.plugins {
            let output = self.call(plugin, &network_call("VERSION", network, stop))?;
            let supported = output.as_ref().and_then(versions).ok_or_else(|| {
                misbehaved(network, &plugin.kind, "VERSION", "it names no versions".to_owned())
            })?;
            common.retain(|version| supported.iter().any(|other| other == version));
            if common.is_empty() {
                return Err(CniError::NoVersion {
                    network: network.name.clone(),
                    wanted: network.version.clone(),
                    plugin: plugin.kind.clone(),
                    supported: clean(&supported.join(", ")),
                });
            }
        }
        if let Some(newest) = common.last() {
            tracing::info!(network = network.name, version = newest, "CNI version lowered");
            network.version = (*newest).to_owned();
        }
        Ok(())
    }

    /// Calls one plugin. What it wrote as JSON, if it wrote anything.
    fn call(&self, plugin: &Plugin, call: &Call<'_>) -> Result<Option<Value>, CniError> {
        let Call { command, network, stop, .. } = call;
        let program = self.find(network, plugin)?;
        let mut environment = call.environment.clone();
        environment.push(("CNI_COMMAND", (*command).into()));
        let path = std::env::join_paths(&self.plugin_directories).unwrap_or_default();
        environment.push(("CNI_PATH", path));
        let input = execution_config(plugin, call).to_string();
        tracing::debug!(plugin = plugin.kind, command, network = network.name, "CNI");
        let ended = exec::run(&program, &environment, input.as_bytes(), self.limits, stop);
        let outcome = match ended {
            Ok(outcome) => outcome,
            Err(ExecError::Stopped) => {
                return Err(CniError::Stopped { network: network.name.clone(), command });
            }
            Err(error) => {
                return Err(misbehaved(network, &plugin.kind, command, error.to_string()));
            }
        };
        match understand(&outcome) {
            Ok(output) => Ok(output),
            Err(Failure::Told(error)) => Err(CniError::Refused {
                network: network.name.clone(),
                plugin: plugin.kind.clone(),
                command,
                error,
            }),
            Err(Failure::Untold(what)) => Err(misbehaved(network, &plugin.kind, command, what)),
        }
    }

    fn find(&self, network: &NetworkList, plugin: &Plugin) -> Result<PathBuf, CniError> {
        let places = self.plugin_directories.iter().map(|directory| directory.join(&plugin.kind));
        places.into_iter().find(|path| path.is_file()).ok_or_else(|| CniError::NoPlugin {
            network: network.name.clone(),
            plugin: plugin.kind.clone(),
            directories: self.plugin_directories.clone(),
        })
    }
}

fn misbehaved(
    network: &NetworkList,
    plugin: &str,
    command: &'static str,
    what: String,
) -> CniError {
    CniError::Misbehaved { network: network.name.clone(), plugin: plugin.to_owned(), command, what }
}

fn attachment_call<'a>(
    command: &'static str,
    attachment: &'a Attachment,
    network: &'a NetworkList,
    stop: &'a Stop,
) -> Call<'a> {
    let Attachment { container_id, netns, ifname, .. } = attachment;
    // One that is gone is told by an empty path: some plugins fail at one that leads nowhere.
    let netns = if netns.exists() { netns.clone().into() } else { OsString::new() };
    let environment = vec![
        ("CNI_CONTAINERID", container_id.into()),
        ("CNI_NETNS", netns),
        ("CNI_IFNAME", ifname.into()),
        ("CNI_ARGS", attachment.arguments()),
    ];
    let capabilities = Some(&attachment.capabilities);
    Call { command, environment, network, previous: None, capabilities, stop }
}

fn network_call<'a>(command: &'static str, network: &'a NetworkList, stop: &'a Stop) -> Call<'a> {
    Call { command, environment: Vec::new(), network, previous: None, capabilities: None, stop }
}

/// What a plugin reads: its configuration with what the specification puts in, and takes out.
fn execution_config(plugin: &Plugin, call: &Call<'_>) -> Value {
    let mut config = plugin.config.clone();
    config.remove("capabilities");
    config.insert("name".to_owned(), call.network.name.clone().into());
    config.insert("cniVersion".to_owned(), call.network.version.clone().into());
    if let Some(previous) = call.previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    // Of plain texts and numbers: it cannot fail.
    let asked = call.capabilities.and_then(|all| serde_json::to_value(all).ok());
    let asked = asked.as_ref().and_then(Value::as_object);
    let granted: Map<String, Value> = asked
        .into_iter()
        .flatten()
        .filter(|(name, _)| plugin.capabilities.contains(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !granted.is_empty() {
        config.insert("runtimeConfig".to_owned(), granted.into());
    }
    config.into()
}

/// Why a plugin's end is a failure.
enum Failure {
    /// In its own words.
    Told(PluginError),
    /// In ours.
    Untold(String),
}

/// Reads what a plugin that has ended wrote.
fn understand(outcome: &Outcome) -> Result<Option<Value>, Failure> {
    let Outcome { status, stdout, stderr } = outcome;
    let (out, err) = (clean(&String::from_utf8_lossy(stdout)), String::from_utf8_lossy(stderr));
    let said = || {
        let mut said = Vec::new();
        for (name, text) in [("output", &out), ("messages", &clean(&err))] {
            if !text.is_empty() {
                said.push(format!("; its {name}: {text:?}"));
            }
        }
        said.concat()
    };
    if !status.success() {
        let told = serde_json::from_slice(stdout).ok().as_ref().and_then(PluginError::of);
        let untold = || Failure::Untold(format!("it ended with {status}{}", said()));
        return Err(told.map_or_else(untold, Failure::Told));
    }
    if out.is_empty() {
        return Ok(None);
    }
    match serde_json::from_slice::<Value>(stdout) {
        Ok(value @ Value::Object(_)) => match PluginError::of(&value) {
            Some(error) if value.get("msg").is_some() => Err(Failure::Told(error)),
            _ => Ok(Some(value)),
        },
        _ => Err(Failure::Untold(format!("its output is no JSON object{}", said()))),
    }
}

/// Whether a version comes before another; both of the form A.B.C.
fn is_older(version: &str, other: &str) -> bool {
    let numbers = |text: &str| -> Vec<u32> {
        text.split('.').map(|part| part.parse().unwrap_or(0)).collect()
    };
    numbers(version) < numbers(other)
}

#[cfg(test)]
#[path = "invoke_tests.rs"]
mod tests;

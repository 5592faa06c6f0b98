//! The environment of a container, as the kubelet and a CRI runtime make it together.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;

use oci_spec::image::Config;

use super::StartContext;
use super::expansion::{TooLong, expand};
use crate::downward;
use crate::types::{ContainerSpec, EnvValue, FieldRef, Hidden, PodSpec};

/// Longest argument or `NAME=VALUE`, in bytes: Linux' `MAX_ARG_STRLEN`, which counts a NUL byte.
const MAX_STRING: usize = 128 * 1024 - 1;

/// Most bytes of all arguments and variables together: Linux' `ARG_MAX` for a stack of 8 MiB. Also
/// what keeps variables that refer to each other from growing without end.
const MAX_TOTAL: usize = 2 * 1024 * 1024;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why an environment or a command cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// A value is longer than the kernel takes.
    #[error("{name}: longer than {MAX_STRING} bytes once expanded")]
    TooLong {
        /// The variable, or `command` or `args`.
        name: String,
    },
    /// All of it is more than the kernel takes.
    #[error("more than {MAX_TOTAL} bytes of arguments and environment")]
    TooMuch,
    /// The pod or the host has no address.
    #[error("{name}: {field} is not known: {owner} has no address")]
    NoAddress {
        /// The variable.
        name: String,
        /// The field that it refers to.
        field: &'static str,
        /// Who has none.
        owner: &'static str,
    },
    /// A resource of a container that the pod does not have.
    #[error("{name}: the pod has no container {container}")]
    NoSuchContainer {
        /// The variable.
        name: String,
        /// The container.
        container: String,
    },
}

/// The variables that the pod declares for a container, resolved.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// In the order of their declaration, names once.
    list: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Declared {
    fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.list.get(*self.index.get(name)?)?;
        Some(value)
    }

    fn set(&mut self, name: &str, value: String) {
        match self.index.get(name).and_then(|i| self.list.get_mut(*i)) {
            Some((_, old)) => *old = value,
            None => {
                self.index.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value));
            }
        }
    }

    /// Expands a text that may refer only to variables that are there; the name of one that is not.
    pub(super) fn expand_known(&self, text: &str) -> Result<Result<String, TooLong>, String> {
        let unknown = RefCell::new(None);
        let lookup = |name: &str| {
            let value = self.get(name);
            if value.is_none() {
                unknown.borrow_mut().get_or_insert_with(|| name.to_owned());
            }
            value
        };
        let expanded = expand(text, lookup, MAX_STRING);
        match unknown.into_inner() {
            None => Ok(expanded),
            Some(name) => Err(name),
        }
    }

    fn expand(&self, name: &str, text: &str) -> Result<String, EnvError> {
        expand(text, |name| self.get(name), MAX_STRING)
            .map_err(|TooLong| EnvError::TooLong { name: name.into() })
    }

    /// Expands every text. `name` is for the error.
    pub(super) fn expand_all(&self, name: &str, texts: &[String]) -> Result<Vec<String>, EnvError> {
        let mut budget = Budget::default();
        let mut expanded = Vec::new();
        for text in texts {
            let text = self.expand(name, text)?;
            budget.take(text.len())?;
            expanded.push(text);
        }
        Ok(expanded)
    }
}

/// Bytes that are left of [`MAX_TOTAL`].
struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Budget(MAX_TOTAL)
    }
}

impl Budget {
    /// Takes a string and its NUL byte.
    fn take(&mut self, len: usize) -> Result<(), EnvError> {
        let left = self.0.checked_sub(len).and_then(|left| left.checked_sub(1));
        self.0 = left.ok_or(EnvError::TooMuch)?;
        Ok(())
    }
}

/// The command of a probe, in which `$(VAR)` stands for the text that the manifest gives VAR, not
/// expanded itself, and for nothing if the value comes from elsewhere: the kubelet's
/// `ExpandContainerCommandOnlyStatic`. A word that would become too long stays as it is.
pub(crate) fn probe_command(container: &ContainerSpec, command: &[String]) -> Vec<String> {
    let given: HashMap<&str, &str> = container
        .env
        .iter()
        .map(|variable| match &variable.value {
            EnvValue::Literal(text) => (variable.name.as_str(), text.as_str()),
            _ => (variable.name.as_str(), ""),
        })
        .collect();
    let lookup = |name: &str| given.get(name).copied();
    let word = |word: &String| expand(word, lookup, MAX_STRING).unwrap_or_else(|_| word.clone());
    command.iter().map(word).collect()
}

/// Resolves the variables that the pod declares for `container`, one after the other: each sees
/// those before it, and of a repeated name the last value stays.
pub(super) fn declared(
    pod: &PodSpec,
    container: &ContainerSpec,
    context: &StartContext<'_>,
) -> Result<Declared, EnvError> {
    let mut declared = Declared::default();
    let mut budget = Budget::default();
    for variable in &container.env {
        let name = &variable.name;
        let value = match &variable.value {
            EnvValue::Literal(text) => declared.expand(name, text)?,
            EnvValue::Field(field) => field_value(name, field, pod, context)?,
            EnvValue::Verbatim(Hidden(text)) => text.clone(),
            EnvValue::Resource(reference) => {
                let container = &reference.container;
                downward::resource(reference, pod).ok_or_else(|| EnvError::NoSuchContainer {
                    name: name.clone(),
                    container: container.clone(),
                })?
            }
        };
        if name.len().saturating_add(value.len()) >= MAX_STRING {
            return Err(EnvError::TooLong { name: name.clone() });
        }
        budget.take(name.len().saturating_add(value.len()))?;
        declared.set(name, value);
    }
    Ok(declared)
}

/// The whole environment: defaults, then the image's, then what the pod declares; of a repeated
/// name the last value stays.
pub(super) fn complete(
    pod: &PodSpec,
    tty: bool,
    image: &Config,
    declared: &Declared,
) -> Result<Vec<String>, EnvError> {
    let mut all = Declared::default();
    all.set("PATH", DEFAULT_PATH.to_owned());
    if tty {
        all.set("TERM", "xterm".to_owned());
    }
    all.set("HOSTNAME", pod.hostname.clone());
    let of_image = image.env().as_deref().unwrap_or_default();
    // The image specification knows only NAME=VALUE; what has another form is no variable.
    for (name, value) in of_image.iter().filter_map(|entry| entry.split_once('=')) {
        all.set(name, value.to_owned());
    }
    for (name, value) in &declared.list {
        all.set(name, value.clone());
    }
    let mut budget = Budget::default();
    let mut env = Vec::new();
    for (name, value) in all.list {
        let entry = format!("{name}={value}");
        budget.take(entry.len())?;
        env.push(entry);
    }
    Ok(env)
}

fn field_value(
    name: &str,
    field: &FieldRef,
    pod: &PodSpec,
    context: &StartContext<'_>,
) -> Result<String, EnvError> {
    let first = |ips: &[IpAddr], field, owner| match ips.first() {
        Some(ip) => Ok(ip.to_string()),
        None => Err(EnvError::NoAddress { name: name.to_owned(), field, owner }),
    };
    let all = |ips: &[IpAddr], field, owner| {
        first(ips, field, owner)?;
        Ok(ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","))
    };
    match field {
        FieldRef::NodeName => Ok(context.node_name.to_owned()),
        FieldRef::ServiceAccountName => Ok(pod.service_account.clone()),
        FieldRef::HostIp => first(context.host_ips, "status.hostIP", "the host"),
        FieldRef::HostIps => all(context.host_ips, "status.hostIPs", "the host"),
        FieldRef::PodIp => first(context.pod_ips, "status.podIP", "the pod"),
        FieldRef::PodIps => all(context.pod_ips, "status.podIPs", "the pod"),
        of_metadata => Ok(downward::metadata_field(of_metadata, &pod.metadata, context.pod_uid)
            .unwrap_or_default()),
    }
}

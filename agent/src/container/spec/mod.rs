//! The OCI runtime specification's `config.json` (1.2), as far as the runner honours it.
//!
//! These structures are the table of what is supported: a field of the document that is in none of
//! them fails the create, and is named by its path. To honour one more field, add it here and read
//! it in the runner (the compiler warns of a field that nobody reads).
//! A null, and an empty array, mean the same as an absent field, and are taken for one.

mod json;
mod linux;
mod resources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Deserialize;

use super::hooks::Hooks;
use super::scheduling::{ExecCpuAffinity, IoPriority, Scheduler};
use json::strict;
pub(crate) use linux::{Device, Linux, NamespaceKind};
pub(crate) use resources::{BlockIo, Cpu, DeviceRule, HugepageLimit, Memory, Resources};

/// Longest path in bytes: PATH_MAX of Linux without its NUL.
const MAX_PATH: usize = 4095;

/// A specification that cannot be honoured. The texts name fields as `linux.resources.cpu.shares`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("not a JSON document")]
    Json(#[source] serde_json::Error),
    #[error("`{path}`")]
    Value {
        path: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("the document has {count} {what}; must be at most {most}")]
    TooLarge { what: &'static str, count: usize, most: usize },
    #[error("not supported: {}", list(.0))]
    Unsupported(Vec<String>),
    #[error("`{field}`: {reason}, but it is {value:?}")]
    Invalid { field: String, value: String, reason: &'static str },
}

impl SpecError {
    /// A value that a field must not have.
    pub(crate) fn invalid(
        field: impl Into<String>,
        value: impl Into<String>,
        reason: &'static str,
    ) -> Self {
        Self::Invalid { field: field.into(), value: value.into(), reason }
    }
}

/// Names as they appear in a message: `a`, `b`.
fn list(names: &[String]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    pub(crate) oci_version: String,
    pub(crate) process: Process,
    pub(crate) root: Root,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    #[serde(default)]
    pub(crate) mounts: Vec<Mount>,
    #[serde(default)]
    pub(crate) linux: Linux,
    /// Only hooks are told of them ("must not be an error" by the specification).
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) hooks: Hooks,
}

/// `process`, also the whole document of an exec.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Process {
    #[serde(default)]
    pub(crate) terminal: bool,
    pub(crate) console_size: Option<ConsoleSize>,
    #[serde(default)]
    pub(crate) user: User,
    pub(crate) args: Vec<String>,
    #[serde(default)]
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    /// Absent: none, or in an exec those of the container. So are the next six.
    pub(crate) capabilities: Option<Capabilities>,
    pub(crate) rlimits: Option<Vec<Rlimit>>,
    pub(crate) no_new_privileges: Option<bool>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) scheduler: Option<Scheduler>,
    pub(crate) io_priority: Option<IoPriority>,
    /// Of execs only.
    #[serde(rename = "execCPUAffinity")]
    pub(crate) exec_cpu_affinity: Option<ExecCpuAffinity>,
    /// The kernel of the guest has no security modules: these must be empty.
    apparmor_profile: Option<String>,
    selinux_label: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct ConsoleSize {
    pub(crate) height: u16,
    pub(crate) width: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) umask: Option<u32>,
    #[serde(default)]
    pub(crate) additional_gids: Vec<u32>,
    /// Here not of Windows, but of husk: see `CreateContainerRequest.spec`.
    pub(crate) username: Option<String>,
}

/// Names of capabilities, e.g. `CAP_KILL`, set by set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Capabilities {
    pub(crate) bounding: Vec<String>,
    pub(crate) effective: Vec<String>,
    pub(crate) inheritable: Vec<String>,
    pub(crate) permitted: Vec<String>,
    pub(crate) ambient: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Rlimit {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Root {
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) readonly: bool,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Mount {
    pub(crate) destination: String,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) source: Option<String>,
    #[serde(default)]
    pub(crate) options: Vec<String>,
    #[serde(default, rename = "uidMappings")]
    pub(crate) uid_mappings: Vec<IdMapping>,
    #[serde(default, rename = "gidMappings")]
    pub(crate) gid_mappings: Vec<IdMapping>,
}

/// A line of `uid_map` or `gid_map` (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct IdMapping {
    #[serde(rename = "containerID")]
    pub(crate) container_id: u32,
    #[serde(rename = "hostID")]
    pub(crate) host_id: u32,
    pub(crate) size: u32,
}

/// Reads a `config.json`.
///
/// # Errors
/// [`SpecError::Unsupported`] names every field that is present and not honoured; the other
/// variants name the field whose value is impossible.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, SpecError> {
    let spec: Spec = strict(json)?;
    if !spec.oci_version.starts_with("1.") {
        return Err(SpecError::invalid("ociVersion", &spec.oci_version, "must be 1.x"));
    }
    check_process(&spec.process, "process.")?;
    no_label("linux.mountLabel", spec.linux.mount_label.as_deref())?;
    Ok(spec)
}

/// Reads the `process` object of an exec.
///
/// # Errors
/// As [`parse`].
pub(crate) fn parse_process(json: &[u8]) -> Result<Process, SpecError> {
    let process: Process = strict(json)?;
    check_process(&process, "")?;
    Ok(process)
}

/// Reads the `linux.resources` object of an update.
///
/// # Errors
/// As [`parse`].
pub(crate) fn parse_resources(json: &[u8]) -> Result<Resources, SpecError> {
    let named = |path: String| match path.as_str() {
        "the document" => "linux.resources".to_owned(),
        path => format!("linux.resources.{path}"),
    };
    strict(json).map_err(|error| match error {
        SpecError::Unsupported(paths) => {
            SpecError::Unsupported(paths.into_iter().map(named).collect())
        }
        SpecError::Value { path, source } => SpecError::Value { path: named(path), source },
        SpecError::Invalid { field, value, reason } => {
            SpecError::Invalid { field: named(field), value, reason }
        }
        other => other,
    })
}

/// What the specification demands of every process; `prefix` is put before the fields' names.
fn check_process(process: &Process, prefix: &str) -> Result<(), SpecError> {
    if process.args.is_empty() {
        return Err(SpecError::invalid(format!("{prefix}args"), "[]", "must have an element"));
    }
    check_path(|| format!("{prefix}cwd"), &process.cwd)?;
    for entry in &process.env {
        if entry.starts_with('=') || !entry.contains('=') {
            return Err(SpecError::invalid(format!("{prefix}env"), entry, "must be NAME=VALUE"));
        }
    }
    no_label(&format!("{prefix}apparmorProfile"), process.apparmor_profile.as_deref())?;
    no_label(&format!("{prefix}selinuxLabel"), process.selinux_label.as_deref())?;
    if process.console_size.is_some() && !process.terminal {
        // The specification: "Runtimes MUST ignore consoleSize if terminal is false or unset."
        tracing::debug!("consoleSize without a terminal is ignored");
    }
    Ok(())
}

/// What every path must be.
pub(crate) fn check_path(field: impl FnOnce() -> String, path: &str) -> Result<(), SpecError> {
    if !path.starts_with('/') {
        return Err(SpecError::invalid(field(), path, "must be absolute"));
    }
    if path.len() > MAX_PATH {
        return Err(SpecError::invalid(field(), path, "must be at most 4095 bytes long"));
    }
    Ok(())
}

/// Refuses a label, except the empty one, by which engines say that there is none.
fn no_label(field: &str, label: Option<&str>) -> Result<(), SpecError> {
    match label {
        None | Some("") => Ok(()),
        Some(_) => Err(SpecError::Unsupported(vec![field.to_owned()])),
    }
}

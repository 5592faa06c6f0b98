//! The `linux` object: namespaces, mappings, devices, confinement.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::IdMapping;
use super::resources::Resources;
use crate::container::namespaces::TimeOffsets;
use crate::container::scheduling::Personality;
use crate::container::seccomp::Seccomp;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Linux {
    pub(crate) namespaces: Vec<Namespace>,
    pub(crate) uid_mappings: Vec<IdMapping>,
    pub(crate) gid_mappings: Vec<IdMapping>,
    pub(crate) devices: Vec<Device>,
    pub(crate) cgroups_path: Option<String>,
    pub(crate) resources: Resources,
    pub(crate) sysctl: BTreeMap<String, String>,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    pub(crate) rootfs_propagation: Option<String>,
    pub(crate) seccomp: Option<Seccomp>,
    pub(crate) personality: Option<Personality>,
    pub(crate) time_offsets: TimeOffsets,
    /// As the labels of a process.
    pub(super) mount_label: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Namespace {
    #[serde(rename = "type")]
    pub(crate) kind: NamespaceKind,
    pub(crate) path: Option<String>,
}

/// The namespaces that the runner can make or join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    Cgroup,
    Time,
    User,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) major: u32,
    #[serde(default)]
    pub(crate) minor: u32,
    pub(crate) file_mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

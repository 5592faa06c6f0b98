//! The OCI runtime specification's `config.json` (1.2), as far as the runner honours it.
//!
//! These structures are the table of what is supported: a field of the document that is in none of
//! them fails the create, and is named by its path. To honour one more field, add it here and read
//! it in the runner (the compiler warns of a field that nobody reads).
//! A null, and an empty array, mean the same as an absent field, and are taken for one.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::hooks::Hooks;
use super::namespaces::TimeOffsets;
use super::scheduling::{ExecCpuAffinity, IoPriority, Personality, Scheduler};
use super::seccomp::Seccomp;

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
    mount_label: Option<String>,
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

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Resources {
    pub(crate) devices: Vec<DeviceRule>,
    pub(crate) memory: Memory,
    pub(crate) cpu: Cpu,
    pub(crate) pids: Option<Pids>,
    #[serde(rename = "blockIO")]
    pub(crate) block_io: BlockIo,
    #[serde(rename = "hugepageLimits")]
    pub(crate) hugepage_limits: Vec<HugepageLimit>,
    pub(crate) unified: BTreeMap<String, String>,
}

/// One rule of the device cgroup.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct DeviceRule {
    pub(crate) allow: bool,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) major: Option<i64>,
    pub(crate) minor: Option<i64>,
    pub(crate) access: Option<String>,
}

/// In bytes; -1 for no limit.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Memory {
    pub(crate) limit: Option<i64>,
    pub(crate) reservation: Option<i64>,
    /// Memory and swap together, as in cgroup v1.
    pub(crate) swap: Option<i64>,
    /// Cannot be honoured by cgroup v2: only false is accepted.
    #[serde(rename = "disableOOMKiller")]
    pub(crate) disable_oom_killer: bool,
    /// Whether an update is to refuse a limit below what is in use.
    pub(crate) check_before_update: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cpu {
    pub(crate) shares: Option<u64>,
    /// In microseconds for each period; not positive for no limit.
    pub(crate) quota: Option<i64>,
    /// In microseconds.
    pub(crate) period: Option<u64>,
    pub(crate) burst: Option<u64>,
    pub(crate) idle: Option<i64>,
    pub(crate) cpus: Option<String>,
    pub(crate) mems: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Pids {
    /// Negative for no limit, 0 for unset.
    pub(crate) limit: i64,
}

/// Weights are those of cgroup v1, 10 to 1000.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct BlockIo {
    pub(crate) weight: Option<u16>,
    pub(crate) weight_device: Vec<WeightDevice>,
    #[serde(rename = "throttleReadBpsDevice")]
    pub(crate) read_bps: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteBpsDevice")]
    pub(crate) write_bps: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice")]
    pub(crate) read_iops: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub(crate) write_iops: Vec<ThrottleDevice>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct WeightDevice {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) weight: Option<u16>,
}

/// Bytes or operations per second.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct ThrottleDevice {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) rate: u64,
}

/// In bytes.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HugepageLimit {
    pub(crate) page_size: String,
    pub(crate) limit: u64,
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
        other => other,
    })
}

/// What the specification demands of every process; `prefix` is put before the fields' names.
fn check_process(process: &Process, prefix: &str) -> Result<(), SpecError> {
    if process.args.is_empty() {
        return Err(SpecError::invalid(format!("{prefix}args"), "[]", "must have an element"));
    }
    if !process.cwd.starts_with('/') {
        return Err(SpecError::invalid(format!("{prefix}cwd"), &process.cwd, "must be absolute"));
    }
    for entry in &process.env {
        if entry.starts_with('=') || !entry.contains('=') {
            return Err(SpecError::invalid(format!("{prefix}env"), entry, "must be NAME=VALUE"));
        }
    }
    let strings = process.args.iter().chain(&process.env).chain([&process.cwd]);
    if let Some(bad) = strings.into_iter().find(|s| s.contains('\0')) {
        let field = prefix.trim_end_matches('.');
        return Err(SpecError::invalid(field, bad, "must not contain a NUL"));
    }
    no_label(&format!("{prefix}apparmorProfile"), process.apparmor_profile.as_deref())?;
    no_label(&format!("{prefix}selinuxLabel"), process.selinux_label.as_deref())?;
    if process.console_size.is_some() && !process.terminal {
        // The specification: "Runtimes MUST ignore consoleSize if terminal is false or unset."
        tracing::debug!("consoleSize without a terminal is ignored");
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

/// Deserialises, and refuses every field that was not read.
fn strict<'de, T: Deserialize<'de>>(json: &[u8]) -> Result<T, SpecError> {
    let mut value: Value = serde_json::from_slice(json).map_err(SpecError::Json)?;
    prune(&mut value);
    let mut unread = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unread.push(field_name(&path.to_string()));
    let checked = serde_ignored::Deserializer::new(value, &mut note);
    let parsed = serde_path_to_error::deserialize(checked).map_err(|e| {
        let path = field_name(&e.path().to_string());
        SpecError::Value { path, source: e.into_inner() }
    })?;
    if unread.is_empty() { Ok(parsed) } else { Err(SpecError::Unsupported(unread)) }
}

/// The path of a field as people write it: `mounts[7].source`, without the marks that the library
/// puts for `Option`, and with a word for the whole.
fn field_name(path: &str) -> String {
    match path {
        "." => "the document".to_owned(),
        path => {
            let is_index =
                |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
            let join = |path: String, part: &str| match path.is_empty() {
                true => part.to_owned(),
                false if is_index(part) => format!("{path}[{part}]"),
                false => format!("{path}.{part}"),
            };
            path.replace(".?", "").split('.').fold(String::new(), join)
        }
    }
}

/// Removes what means the same as absent: nulls and empty arrays. Its depth is that of the parsed
/// document, which serde_json bounds.
fn prune(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, v| !v.is_null() && !v.as_array().is_some_and(Vec::is_empty));
            fields.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": { "cwd": "/", "args": ["true"] },
            "root": { "path": "/run/husk/containers/a/rootfs" },
        })
    }

    fn with(pointer: &str, field: &str, value: Value) -> Vec<u8> {
        let mut spec = minimal();
        let object = if pointer.is_empty() {
            spec.as_object_mut().unwrap()
        } else {
            let (_, name) = pointer.rsplit_once('/').unwrap();
            spec.as_object_mut()
                .unwrap()
                .entry(name)
                .or_insert_with(|| json!({}))
                .as_object_mut()
                .unwrap()
        };
        object.insert(field.into(), value);
        serde_json::to_vec(&spec).unwrap()
    }

    fn error(json: &[u8]) -> String {
        let error = parse(json).unwrap_err();
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn the_minimal_specification_is_accepted() {
        let spec = parse(&serde_json::to_vec(&minimal()).unwrap()).unwrap();
        assert_eq!(spec.process.args, ["true"]);
        assert!(!spec.process.terminal);
    }

    #[test]
    fn every_field_that_is_not_honoured_is_named_by_its_path() {
        for (pointer, field, value, path) in [
            ("", "solaris", json!({}), "solaris"),
            ("/linux", "mountLabel", json!("x"), "linux.mountLabel"),
            ("/linux", "intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
            ("/process", "apparmorProfile", json!("x"), "process.apparmorProfile"),
            ("/process", "selinuxLabel", json!("x"), "process.selinuxLabel"),
            ("", "hooks", json!({"preboot": [{"path": "/x"}]}), "hooks.preboot"),
            ("/linux", "resources", json!({"rdma": {"mlx": {}}}), "linux.resources.rdma"),
            ("/linux", "resources", json!({"network": {}}), "linux.resources.network"),
            (
                "/linux",
                "resources",
                json!({"cpu": {"realtimeRuntime": 1}}),
                "linux.resources.cpu.realtimeRuntime",
            ),
            (
                "/linux",
                "resources",
                json!({"memory": {"swappiness": 1}}),
                "linux.resources.memory.swappiness",
            ),
            (
                "/linux",
                "resources",
                json!({"blockIO": {"leafWeight": 100}}),
                "linux.resources.blockIO.leafWeight",
            ),
        ] {
            let message = error(&with(pointer, field, value));
            assert_eq!(message, format!("not supported: `{path}`"));
        }
    }

    #[test]
    fn an_element_of_an_array_is_named_by_its_number() {
        let message = error(&with("", "mounts", json!([{"destination": "/x", "x": 1}])));
        assert_eq!(message, "not supported: `mounts[0].x`");
    }

    #[test]
    fn nulls_and_empty_arrays_count_as_absent() {
        parse(&with("/linux", "seccomp", Value::Null)).unwrap();
        parse(&with("/linux", "gidMappings", json!([]))).unwrap();
        parse(&with("", "hooks", json!({}))).unwrap();
    }

    #[test]
    fn empty_labels_count_as_absent() {
        parse(&with("/process", "apparmorProfile", json!(""))).unwrap();
        parse(&with("/process", "selinuxLabel", json!(""))).unwrap();
        parse(&with("/linux", "mountLabel", json!(""))).unwrap();
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_by_its_path() {
        let message = error(&with("/process", "user", json!({"uid": "root", "gid": 0})));
        assert!(message.starts_with("`process.user.uid`: invalid type: string"), "{message}");
        let message = error(&with("/linux", "namespaces", json!([{"type": "disk"}])));
        assert!(message.starts_with("`linux.namespaces[0].type`: unknown variant"), "{message}");
    }

    #[test]
    fn the_resources_of_an_update_are_named_as_in_the_document() {
        let message = |json: &[u8]| crate::chain(&parse_resources(json).unwrap_err());
        assert_eq!(message(br#"{"rdma": {"x": {}}}"#), "not supported: `linux.resources.rdma`");
        let wrong = message(br#"{"cpu": {"shares": "x"}}"#);
        assert!(wrong.starts_with("`linux.resources.cpu.shares`: invalid type"), "{wrong}");
        assert!(message(b"7").starts_with("`linux.resources`"), "{}", message(b"7"));
        assert!(parse_resources(br#"{"cpu": {"shares": 7}}"#).is_ok());
    }

    #[test]
    fn impossible_values_are_refused() {
        assert!(error(&with("", "ociVersion", json!("2.0.0"))).contains("ociVersion"));
        assert!(error(&with("/process", "cwd", json!("tmp"))).contains("process.cwd"));
        assert!(error(&with("/process", "env", json!(["A"]))).contains("process.env"));
        assert!(error(&with("/process", "args", json!(["a\0b"]))).contains("NUL"));
        assert!(error(&with("/process", "args", json!([]))).contains("args"));
        assert!(error(b"{").contains("JSON"));
    }

    /// Any JSON value.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-zA-Z]{1,9}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn an_unknown_field_anywhere_is_never_dropped(
            place in prop::sample::select(vec!["", "/process", "/linux", "/root"]),
            name in "x[a-z]{3,9}",
            value in any_json(),
        ) {
            let absent = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            let result = parse(&with(place, &name, value));
            prop_assert_eq!(result.is_ok(), absent);
        }

        #[test]
        fn any_value_in_a_known_field_parses_or_names_the_field(
            field in prop::sample::select(vec!["process", "root", "mounts", "linux", "hostname"]),
            value in any_json(),
        ) {
            if let Err(e) = parse(&with("", field, value)) {
                let text = crate::chain(&e);
                prop_assert!(text.contains(field), "{}", text);
            }
        }
    }
}

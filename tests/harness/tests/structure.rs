//! The structure of the workspace: which crate may depend on which, and single versions of the
//! crates whose types cross our interfaces.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What each crate of the product may depend on, of our own. Dependencies point one way.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("husk", &["husk-archive", "husk-engine", "husk-image"]),
    ("husk-engine", &["husk-image", "husk-network", "husk-proto", "husk-vmm-api"]),
    ("husk-archive", &[]),
    ("husk-fs", &["husk-vmm-api"]),
    ("husk-image", &["husk-archive"]),
    ("husk-kvm-probe", &[]),
    ("husk-netlink", &[]),
    ("husk-network", &["husk-netlink"]),
    ("husk-vmm", &["husk-kvm-probe", "husk-proto", "husk-vmm-api"]),
    ("husk-vmm-api", &[]),
    ("husk-proto", &[]),
    ("husk-agent", &["husk-archive", "husk-netlink", "husk-proto"]),
];

/// The one program whose library pins other versions than ours: what it shares with others are
/// messages, not types.
const APART: &str = "husk-fs";

/// Two versions of one of these in the tree, and types that should be the same are not.
const SINGLE: [&str; 7] =
    ["vm-memory", "vmm-sys-util", "kvm-bindings", "tonic", "prost", "oci-spec", "rustls"];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn names_of(dependencies: &Value) -> BTreeSet<String> {
    dependencies
        .as_array()
        .into_iter()
        .flatten()
        .filter(|d| d["kind"].is_null())
        .filter_map(|d| d["name"].as_str().map(str::to_owned))
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let own: BTreeMap<&str, &Value> = packages
        .iter()
        .filter(|p| p["source"].is_null())
        .filter_map(|p| Some((p["name"].as_str()?, p)))
        .collect();
    for (name, allowed) in ALLOWED {
        let package = own.get(name).unwrap_or_else(|| panic!("crate {name} is gone"));
        for dependency in names_of(&package["dependencies"]) {
            if own.contains_key(dependency.as_str()) {
                assert!(
                    allowed.contains(&dependency.as_str()),
                    "{name} depends on {dependency}; allowed are {allowed:?}"
                );
            }
        }
    }
}

/// The packages that anything but [`APART`] uses, by their identifiers.
fn used_elsewhere(metadata: &Value) -> BTreeSet<&str> {
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let apart = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == APART)
        .and_then(|package| package["id"].as_str());
    let members = metadata["workspace_members"].as_array().into_iter().flatten();
    let mut ways: Vec<&str> = members
        .filter_map(Value::as_str)
        .filter(|id| apart.is_none_or(|apart| apart != *id))
        .collect();
    let mut used = BTreeSet::new();
    while let Some(id) = ways.pop() {
        if used.insert(id) {
            let dependencies = nodes.get(id).map(|node| &node["dependencies"]);
            let dependencies = dependencies.and_then(Value::as_array).into_iter().flatten();
            ways.extend(dependencies.filter_map(Value::as_str));
        }
    }
    used
}

#[test]
fn crates_whose_types_we_share_are_there_once() {
    let metadata = metadata();
    let used = used_elsewhere(&metadata);
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        if !package["id"].as_str().is_some_and(|id| used.contains(id)) {
            continue;
        }
        if let (Some(name), Some(version)) = (package["name"].as_str(), package["version"].as_str())
        {
            versions.entry(name).or_default().insert(version);
        }
    }
    for name in SINGLE {
        let found = versions.get(name).cloned().unwrap_or_default();
        assert_eq!(found.len(), 1, "{name} is there as {found:?}");
    }
}

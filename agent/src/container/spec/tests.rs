//! What is accepted, and how what is not is named.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

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

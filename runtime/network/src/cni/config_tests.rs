use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<NetworkList, ConfigError> {
    NetworkList::of(Path::new("/etc/x.conflist"), &serde_json::from_str(text).unwrap())
}

#[test]
fn a_single_plugin_is_a_list_of_one() {
    let network =
        parse(r#"{"cniVersion": "0.4.0", "name": "n", "type": "bridge", "bridge": "b0"}"#).unwrap();
    assert_eq!((network.name.as_str(), network.version.as_str()), ("n", "0.4.0"));
    assert_eq!(network.plugins.len(), 1);
    assert_eq!(network.plugins[0].kind, "bridge");
    assert_eq!(network.plugins[0].config["bridge"], "b0");
}

#[test]
fn only_capabilities_that_are_true_count() {
    let text = r#"{"name": "n", "plugins":
        [{"type": "portmap", "capabilities": {"portMappings": true, "mac": false}}]}"#;
    assert_eq!(parse(text).unwrap().plugins[0].capabilities, ["portMappings"]);
}

#[test]
fn the_newest_version_that_both_know_is_chosen() {
    for (versions, chosen) in [
        (r#""cniVersion": "1.0.0""#, Some("1.0.0")),
        (r#""cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"]"#, Some("1.1.0")),
        (r#""cniVersion": "9.0.0", "cniVersions": ["0.3.1"]"#, Some("0.3.1")),
        (r#""cniVersions": null"#, Some(DEFAULT_VERSION)),
        (r#""cniVersion": "9.0.0""#, None),
        (r#""cniVersion": "0.2.0""#, None),
    ] {
        let network = parse(&format!(r#"{{{versions}, "name": "n", "type": "x"}}"#));
        match chosen {
            Some(version) => assert_eq!(network.unwrap().version, version, "{versions}"),
            None => {
                assert!(network.unwrap_err().to_string().contains("cniVersion: "), "{versions}")
            }
        }
    }
}

#[test]
fn errors_name_the_field_and_the_value() {
    for (text, words) in [
        ("[]", "no object"),
        (r#"{"type": "x"}"#, "name: it is required"),
        (r#"{"name": "-n", "type": "x"}"#, r#"name: "-n" must be"#),
        (r#"{"name": "n"}"#, "plugins: must be 1 to"),
        (r#"{"name": "n", "plugins": []}"#, "plugins: must be 1 to"),
        (r#"{"name": "n", "plugins": {}}"#, "plugins: {} is no list"),
        (r#"{"name": "n", "plugins": [{}]}"#, "plugins[0].type: it is required"),
        (r#"{"name": "n", "plugins": [{"type": "../x"}]}"#, "is no file name"),
        (r#"{"name": "n", "plugins": [{"type": 1}]}"#, "plugins[0].type: 1 is no text"),
        (r#"{"name": "n", "type": "x", "disableCheck": 3}"#, "disableCheck: 3"),
        (r#"{"name": "n", "type": "x", "capabilities": []}"#, "capabilities: [] is no object"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(words) && error.starts_with("/etc/x.conflist"), "{text}: {error}");
    }
}

#[test]
fn files_are_read_in_the_order_of_their_names_and_a_broken_one_hides_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("20-b.conf", r#"{"name": "b", "type": "x"}"#);
    write("10-a.conflist", r#"{"name": "a", "plugins": [{"type": "x"}]}"#);
    write("05-broken.json", "{");
    write("00-not-one.txt", r#"{"name": "z", "type": "x"}"#);
    std::fs::create_dir(directory.path().join("01.conf")).unwrap();
    let found = read_directory(directory.path()).unwrap();
    let names: Vec<_> = found.networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!((names, found.broken.len()), (vec!["a", "b"], 1));
    assert_eq!(read_directory(Path::new("/nonexistent")).unwrap().networks, []);

    let again = read_directory(directory.path()).unwrap();
    assert_eq!(again.named("b", directory.path()).unwrap().plugins[0].kind, "x");
    let error = found.named("c", directory.path()).unwrap_err().to_string();
    assert!(error.contains("there is a, b") && error.contains("05-broken.json"), "{error}");
}

#[test]
fn plugins_in_a_directory_of_the_networks_name_follow_those_of_the_list() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("n");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(inner.join("10-y.conf"), r#"{"type": "y"}"#).unwrap();
    let path = directory.path().join("n.conflist");
    for (only, kinds) in [("false", vec!["x", "y"]), ("true", vec!["x"])] {
        let text = format!(
            r#"{{"name": "n", "loadOnlyInlinedPlugins": {only}, "plugins": [{{"type": "x"}}]}}"#
        );
        let network = NetworkList::of(&path, &serde_json::from_str(&text).unwrap()).unwrap();
        let found: Vec<_> = network.plugins.iter().map(|plugin| plugin.kind.as_str()).collect();
        assert_eq!(found, kinds);
    }
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9./]{0,6}".prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("name"),
        Just("type"),
        Just("plugins"),
        Just("cniVersion"),
        Just("cniVersions"),
        Just("capabilities"),
        Just("disableGC"),
    ];
    leaf.prop_recursive(3, 24, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map(key.clone(), inner, 0..5).prop_map(|map| {
                Value::Object(map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn whatever_is_accepted_survives_its_way_through_json(value in json()) {
        let path = Path::new("/nonexistent/x.conf");
        if let Ok(network) = NetworkList::of(path, &value) {
            prop_assert_eq!(NetworkList::of(path, &network.to_json()).unwrap(), network);
        }
    }
}

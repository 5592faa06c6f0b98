//! Against plugins that are scripts: each writes down how it was called.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tempfile::TempDir;

use super::super::PortMapping;
use super::*;

const RESULT: &str = r#"{"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}"#;

struct Host {
    root: TempDir,
    cni: Cni,
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let cni = Cni {
            config_directory: root.path().join("net.d"),
            plugin_directories: vec![root.path().join("missing"), root.path().join("bin")],
            limits: Limits::default(),
        };
        std::fs::create_dir(root.path().join("bin")).unwrap();
        Host { root, cni }
    }

    /// A plugin that logs its call, and then does this.
    fn plugin(&self, name: &str, text: &str) {
        let path = self.root.path().join("bin").join(name);
        let log = self.root.path().join("log");
        let script = format!(
            "#!/bin/sh\nconfig=$(cat)\necho {name} $CNI_COMMAND \"$config\" >> {}\n{text}\n",
            log.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The calls so far: plugin, command, and what it was given.
    fn calls(&self) -> Vec<(String, String, Value)> {
        let log = std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default();
        log.lines()
            .map(|line| {
                let mut words = line.splitn(3, ' ');
                let mut word = || words.next().unwrap().to_owned();
                let (plugin, command) = (word(), word());
                (plugin, command, serde_json::from_str(&word()).unwrap())
            })
            .collect()
    }

    fn order(&self) -> Vec<String> {
        self.calls().iter().map(|(plugin, command, _)| format!("{plugin} {command}")).collect()
    }
}

fn attachment(version: &str, plugins: &[Value]) -> Attachment {
    let network = json!({"name": "n", "cniVersion": version, "plugins": plugins});
    Attachment {
        container_id: "husk-1".into(),
        netns: "/proc/self/ns/net".into(),
        ifname: "eth0".into(),
        args: vec![("IgnoreUnknown".into(), "1".into()), ("K8S_POD_NAME".into(), "p".into())],
        capabilities: Capabilities {
            port_mappings: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: "tcp".into(),
                host_ip: String::new(),
            }],
            annotations: Map::new(),
        },
        network,
        result: None,
    }
}

fn stop() -> Stop {
    Stop::new().unwrap()
}

#[test]
fn results_are_chained_and_capabilities_go_to_those_that_have_them() {
    let host = Host::new();
    host.plugin("first", &format!("echo '{RESULT}'"));
    host.plugin(
        "second",
        "echo \"$config\" | sed 's/.*\"prevResult\":\\({.*}\\),\"runtime.*/\\1/'",
    );
    let mut pod = attachment(
        "1.0.0",
        &[
            json!({"type": "first", "own": [1, {"deep": null}]}),
            json!({"type": "second", "capabilities": {"portMappings": true, "mac": true}}),
        ],
    );
    let added = host.cni.add(&mut pod, &stop()).unwrap();
    assert_eq!(added.addresses, ["10.0.0.2".parse::<std::net::IpAddr>().unwrap()]);
    host.cni.check(&pod, &stop()).unwrap();
    host.cni.del(&pod, &stop()).unwrap();

    assert_eq!(
        host.order(),
        ["first ADD", "second ADD", "first CHECK", "second CHECK", "second DEL", "first DEL"]
    );
    let calls = host.calls();
    let (first, second) = (&calls[0].2, &calls[1].2);
    assert_eq!(first["own"], json!([1, {"deep": null}]));
    assert_eq!((&first["name"], &first["cniVersion"]), (&json!("n"), &json!("1.0.0")));
    assert!(first.get("prevResult").is_none() && first.get("runtimeConfig").is_none());
    assert_eq!(second["prevResult"], serde_json::from_str::<Value>(RESULT).unwrap());
    assert!(second.get("capabilities").is_none());
    assert_eq!(
        second["runtimeConfig"],
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]})
    );
    assert_eq!(calls[4].2["prevResult"], second["prevResult"]);
}

#[test]
fn an_attachment_survives_its_way_through_json() {
    let mut pod = attachment("1.0.0", &[json!({"type": "x"})]);
    pod.result = Some(serde_json::from_str(RESULT).unwrap());
    let text = serde_json::to_string(&pod).unwrap();
    assert_eq!(serde_json::from_str::<Attachment>(&text).unwrap(), pod);
}

#[test]
fn the_environment_says_who_and_where() {
    let host = Host::new();
    let print = r#"echo "{\"code\": 100, \"msg\": \"$CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS\"}"; exit 1"#;
    host.plugin("x", print);
    let mut pod = attachment("1.0.0", &[json!({"type": "x"})]);
    let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
    let words = "husk-1 /proc/self/ns/net eth0 IgnoreUnknown=1;K8S_POD_NAME=p (code 100)";
    assert_eq!(error, format!("network \"n\": the CNI plugin \"x\" failed at ADD: {words}"));
    pod.netns = "/nonexistent".into();
    let error = host.cni.del(&pod, &stop()).unwrap_err().to_string();
    assert!(error.contains("husk-1  eth0"), "{error}");
}

#[test]
fn failures_are_told_in_the_plugins_words_or_for_what_they_are() {
    let host = Host::new();
    for (script, words) in [
        (
            r#"echo '{"code": 11, "msg": "try later", "details": "busy"}'; exit 1"#,
            "try later; busy (code 11)",
        ),
        (
            "echo rubbish; echo why >&2",
            r#"its output is no JSON object; its output: "rubbish"; its messages: "why""#,
        ),
        ("echo '[]'", "its output is no JSON object"),
        ("exit 0", "it gave no result"),
        ("echo boom >&2; exit 7", r#"it ended with exit status: 7; its messages: "boom""#),
        ("kill -9 $$", "it ended with signal: 9"),
        (r#"echo '{"ips": [{"address": "x"}]}'"#, r#"its result has no address: "x""#),
        (r#"echo '{"code": 5, "msg": "odd"}'"#, "odd (code 5)"),
    ] {
        host.plugin("x", script);
        let mut pod = attachment("1.0.0", &[json!({"type": "x"})]);
        let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
        assert!(error.contains(words), "{script}: {error}");
        assert_eq!(pod.result, None);
    }
}

#[test]
fn a_plugin_that_hangs_or_floods_is_told() {
    let mut host = Host::new();
    host.cni.limits = Limits { time: Duration::from_millis(300), output: 1000 };
    host.plugin("hangs", "sleep 1000");
    let mut pod = attachment("1.0.0", &[json!({"type": "hangs"})]);
    let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
    assert!(error.contains("did not end within 0.3 s, and was killed"), "{error}");
    host.cni.limits.time = Duration::from_secs(100);
    host.plugin("floods", "yes");
    let mut pod = attachment("1.0.0", &[json!({"type": "floods"})]);
    let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
    assert!(error.contains("wrote more than 1000 bytes"), "{error}");
}

#[test]
fn del_asks_all_plugins_and_tells_the_first_failure() {
    let host = Host::new();
    host.plugin("a", "");
    host.plugin("b", "exit 1");
    host.plugin("c", "echo why >&2; exit 2");
    let plugins = ["a", "b", "c"].map(|kind| json!({"type": kind}));
    let error = host.cni.del(&attachment("1.0.0", &plugins), &stop()).unwrap_err();
    assert!(error.to_string().contains("\"c\" failed at DEL"), "{error}");
    assert_eq!(host.order(), ["c DEL", "b DEL", "a DEL"]);
}

#[test]
fn a_plugin_that_is_missing_is_named_with_the_places() {
    let host = Host::new();
    let mut pod = attachment("1.0.0", &[json!({"type": "absent"})]);
    let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
    assert!(error.contains("no CNI plugin \"absent\" in ") && error.contains("/bin"), "{error}");
}

#[test]
fn versions_are_negotiated_downwards() {
    let host = Host::new();
    let old = r#"
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0"]}';;
*) case "$config" in
   *'"cniVersion":"0.4.0"'*) echo '{"cniVersion": "0.4.0"}';;
   *) echo '{"code": 1, "msg": "incompatible CNI versions"}'; exit 1;;
   esac;;
esac"#;
    host.plugin("old", old);
    let mut pod = attachment("1.0.0", &[json!({"type": "old"})]);
    host.cni.add(&mut pod, &stop()).unwrap();
    assert_eq!(pod.network["cniVersion"], "0.4.0");
    assert_eq!(host.order(), ["old ADD", "old VERSION", "old ADD"]);

    host.plugin("older", &old.replace("\"0.3.1\", \"0.4.0\"", "\"0.1.0\""));
    let mut pod = attachment("1.0.0", &[json!({"type": "older"})]);
    let error = host.cni.add(&mut pod, &stop()).unwrap_err().to_string();
    assert!(error.contains("\"older\" supports 0.1.0"), "{error}");
}

#[test]
fn commands_are_called_only_where_the_version_has_them() {
    let host = Host::new();
    host.plugin("x", "");
    let network = |version| {
        let plugins = [json!({"type": "x"})];
        let value = json!({
            "name": "n", "cniVersion": version, "plugins": plugins, "disableGC": false,
            "loadOnlyInlinedPlugins": true,
        });
        NetworkList::of(Path::new("x"), &value).unwrap()
    };
    assert!(!host.cni.gc(&network("1.0.0"), &[], &stop()).unwrap());
    for disable_gc in [None, Some(true)] {
        let network = NetworkList { disable_gc, ..network("1.1.0") };
        assert!(!host.cni.gc(&network, &[], &stop()).unwrap());
        let again = NetworkList::of(Path::new("x"), &network.to_json()).unwrap();
        assert_eq!(again, network);
    }
    host.cni.status(&network("1.0.0"), &stop()).unwrap();
    let checked = host.cni.check(&attachment("0.3.1", &[json!({"type": "x"})]), &stop());
    assert!(!checked.unwrap());
    assert_eq!(host.order(), Vec::<String>::new());

    let valid = [("husk-1".into(), "eth0".into())];
    assert!(host.cni.gc(&network("1.1.0"), &valid, &stop()).unwrap());
    host.cni.status(&network("1.1.0"), &stop()).unwrap();
    assert_eq!(host.order(), ["x GC", "x STATUS"]);
    let valid = &host.calls()[0].2["cni.dev/valid-attachments"];
    assert_eq!(*valid, json!([{"containerID": "husk-1", "ifname": "eth0"}]));
}

#[test]
fn without_a_configuration_the_built_in_network_is_taken_and_a_broken_one_is_told() {
    let host = Host::new();
    assert_eq!(host.cni.network(None).unwrap().name, super::super::BUILTIN);
    std::fs::create_dir(&host.cni.config_directory).unwrap();
    std::fs::write(host.cni.config_directory.join("a.conf"), "{").unwrap();
    assert!(host.cni.network(None).unwrap_err().to_string().contains("a.conf is no JSON"));
    let text = r#"{"name": "b", "type": "x"}"#;
    std::fs::write(host.cni.config_directory.join("b.conf"), text).unwrap();
    assert_eq!(host.cni.network(None).unwrap().name, "b");
    assert!(host.cni.network(Some("c")).is_err());
}

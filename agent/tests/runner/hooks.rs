//! `hooks`: those of the container run at their points, and those of the host do not.
//!
//! Before the container has its root, a guest has no programs but those of its file systems.

use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec};

/// A hook that runs a script in the container.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]})
}

/// A hook that runs a script before the container has its root.
fn early(script: &str) -> Value {
    let bin = "/run/husk/fs/base/bin";
    json!({"path": format!("{bin}/sh"), "args": ["sh", "-c", script],
           "env": [format!("PATH={bin}")]})
}

fn with_hooks(args: &[&str], hooks: Value) -> Value {
    let mut spec = base_spec(args);
    spec["hooks"] = hooks;
    spec["annotations"] = json!({"a.b/c": "d"});
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/v", "type": "bind", "source": "/run/husk/volumes/v", "options": ["bind"]}
    ));
    spec
}

#[tokio::test]
async fn hooks_run_at_their_points_in_their_order_and_know_the_state() {
    let guest = Guest::boot().await;
    let volume = "/run/husk/volumes/v";
    let spec = with_hooks(
        &["sh", "-c", "cd /v; cat order create start; echo program"],
        json!({
            // The host's.
            "prestart": [hook("exit 1")], "createRuntime": [hook("exit 1")],
            "poststart": [{"path": "/no/such"}], "poststop": [hook("exit 1")],
            // The root is mounted, but it is not the root yet.
            "createContainer": [
                early(&format!("cat > {volume}/create; echo create 1 > {volume}/order")),
                early(&format!("cd /run/husk/containers/a/rootfs && test -d proc/1 \
                               && test -f v/create && echo create 2 >> {volume}/order")),
            ],
            "startContainer": [hook("cat > /v/start; echo start >> /v/order; id -u >> /v/order")],
        }),
    );
    let mut spec = spec;
    spec["process"]["user"] = json!({"uid": 33, "gid": 33});
    let streams = guest.create("a", spec, Options::default()).await;
    let order = guest.volume().join("order");
    assert_eq!(std::fs::read_to_string(&order).unwrap(), "create 1\ncreate 2\n");
    std::fs::set_permissions(&order, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    guest.try_start("a").await.unwrap().unwrap();
    let output = streams.rest().await;
    let output = output.strip_prefix("create 1\ncreate 2\nstart\n33\n").expect(&output);
    let states: Vec<Value> = serde_json::Deserializer::from_str(output)
        .into_iter::<Value>()
        .map_while(Result::ok)
        .collect();
    let expected = |status: &str| {
        json!({"ociVersion": "1.2.0", "id": "a", "status": status, "pid": 1,
               "bundle": "/run/husk/containers/a", "annotations": {"a.b/c": "d"}})
    };
    assert_eq!(states, [expected("creating"), expected("created")]);
    assert!(output.ends_with("program\n"), "{output}");
}

#[tokio::test]
async fn a_hook_that_fails_stops_the_create_and_leaves_nothing() {
    let guest = Guest::boot().await;
    let mut slow = early("sleep 1000");
    slow["timeout"] = json!(1);
    for (first, words) in [
        (early("echo because >&2; exit 3"), "exit code 3: because"),
        (slow, "not done after 1 s"),
        (json!({"path": "/no/such"}), "/no/such"),
    ] {
        let hooks = json!({"createContainer": [first, early("exit 4")]});
        let spec = with_hooks(&["true"], hooks);
        let error = guest.try_create("a", spec, Options::default()).await.unwrap_err();
        assert_eq!(error.code(), Code::Internal);
        let message = error.message();
        assert!(message.contains("hooks.createContainer[0]") && message.contains(words), "{error}");
        assert!(guest.nothing_left("a"));
    }
}

#[tokio::test]
async fn a_hook_that_fails_before_the_program_stops_the_container() {
    let guest = Guest::boot().await;
    let hooks = json!({"startContainer": [hook("exit 5")]});
    guest.create("a", with_hooks(&["echo", "never"], hooks), Options::default()).await;
    let start = guest.try_start("a").await.unwrap_err();
    assert!(start.message().contains("hooks.startContainer[0]"), "{start}");
    assert!(start.message().contains("exit code 5"), "{start}");
    assert_ne!(guest.wait("a", "").await.exit_code, 0);
    guest.delete("a").await;
    assert!(guest.nothing_left("a"));
}

//! Hooks.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

/// A hook of a kind that tells the state it was given and its environment to `file`, with the
/// programs of the image at `root`.
fn tells(kind: &str, root: &str, file: &str) -> Value {
    let script =
        format!("s=$(sed 's/.*\"status\": *\"\\([a-z]*\\)\".*/\\1/'); echo $s-$VALUE-$1 > {file}");
    json!({"hooks": {kind: [{
        "path": format!("{root}/bin/sh"), "args": ["sh", "-c", script, "sh", "argument"],
        "env": [format!("PATH={root}/bin"), "VALUE=value"], "timeout": 60,
    }]}})
}

/// A hook that is the host's to run.
fn elsewhere(kind: &str, fields: &'static [&'static str]) -> Case {
    Case {
        checks: "accepted, and not run in the guest",
        fields,
        sets: tells(kind, "{layer}", "/proc/sys/kernel/hostname"),
        probe: "cat /proc/sys/kernel/hostname",
        needs: &[],
        expect: Expect::Alone {
            prints: "(the runtime's)",
            why: "run by whoever gives husk the specification, on the host; the agent checks it",
        },
    }
}

fn fails(kind: &str, fields: &'static [&'static str], named: &'static str) -> Case {
    Case {
        checks: "one that takes too long is killed, and the create fails",
        fields,
        sets: json!({"hooks": {kind: [{
            "path": "{layer}/bin/sleep", "args": ["sleep", "1000"], "env": ["A=b"], "timeout": 1,
        }]}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why: "the specification demands it" },
    }
}

rows! {
    prestart => elsewhere("prestart", &["hooks.prestart[]"]);
    create_runtime => elsewhere("createRuntime", &["hooks.createRuntime[]"]);
    poststart => elsewhere("poststart", &["hooks.poststart[]"]);
    poststop => elsewhere("poststop", &["hooks.poststop[]"]);
    create_container => Case {
        checks: "run in the container's namespaces with the runtime's files; told the state",
        fields: &["hooks.createContainer[]"],
        sets: tells("createContainer", "{layer}", "/proc/sys/kernel/hostname"),
        probe: "hostname",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "creating-value-argument"),
    };
    create_container_too_long =>
        fails("createContainer", &["hooks.createContainer[].timeout"], "hooks.createContainer[0]");
    start_container => Case {
        checks: "run with the container's files; told the state",
        fields: &["hooks.startContainer[]"],
        sets: tells("startContainer", "", "/tmp/told"),
        probe: "cat /tmp/told",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "created-value-argument"),
    };
}

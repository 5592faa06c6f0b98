//! Namespaces and the mappings and clocks in them.

use serde_json::json;

use super::rows;
use crate::case::{Case, Expect, Reference};

/// Prints which namespaces are the runtime's and which are the container's own.
const LIST: &str = "for n in cgroup ipc mnt net pid time user uts; do readlink /proc/1/ns/$n; done";

rows! {
    own => Case {
        checks: "each named type is a new namespace, the others are the runtime's",
        fields: &["linux.namespaces[].type"],
        sets: json!({"linux": {"namespaces": [
            {"type": "pid"}, {"type": "network"}, {"type": "mount"}, {"type": "ipc"},
            {"type": "uts"}, {"type": "cgroup"},
        ]}}),
        probe: LIST,
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "cgroup:own\nipc:own\nmnt:own\nnet:own\npid:own\ntime:runtime\nuser:runtime\nuts:own",
        ),
    };
    inherited => Case {
        checks: "what is not named is the runtime's",
        fields: &["linux.namespaces[].type"],
        sets: json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}}),
        probe: LIST,
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "cgroup:runtime\nipc:runtime\nmnt:own\nnet:runtime\npid:own\ntime:runtime\n\
             user:runtime\nuts:runtime",
        ),
    };
    joined => Case {
        checks: "a path is joined, in the runtime's view of /proc",
        fields: &["linux.namespaces[]"],
        sets: json!({"linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "cgroup"},
            {"type": "uts", "path": "/proc/1/ns/uts"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "network", "path": "/proc/1/ns/net"},
        ]}}),
        probe: "for n in cgroup ipc net uts; do readlink /proc/1/ns/$n; done; hostname",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "cgroup:own\nipc:runtime\nnet:runtime\nuts:runtime\n(the runtime's)",
        ),
    };
    joined_of_another_type => Case {
        checks: "the create fails, as the specification demands",
        fields: &["linux.namespaces[]"],
        sets: json!({"linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "uts", "path": "/proc/1/ns/net"},
        ]}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "linux.namespaces", why: "a path of another type" },
    };
    twice => Case {
        checks: "the create fails, as the specification demands",
        fields: &["linux.namespaces[].type"],
        sets: json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "pid"}]}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "linux.namespaces[2]", why: "given twice" },
    };
    user => Case {
        checks: "a new namespace with these mappings",
        fields: &["linux.namespaces[].type", "linux.uidMappings[]", "linux.gidMappings[]"],
        sets: json!({"linux": {
            "namespaces+": [{"type": "user"}],
            "uidMappings": [
                {"containerID": 0, "hostID": 100_000, "size": 1000},
                {"containerID": 1000, "hostID": 300_000, "size": 64_536},
            ],
            "gidMappings": [{"containerID": 0, "hostID": 200_000, "size": 65_536}],
        }}),
        probe: "readlink /proc/1/ns/user; awk '{print $1, $2, $3}' /proc/1/uid_map; \
                awk '{print $1, $2, $3}' /proc/1/gid_map; id -u",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "user:own\n0 100000 1000\n1000 300000 64536\n0 200000 65536\n0",
        ),
    };
    time => Case {
        checks: "a new namespace, whose clocks are ahead",
        fields: &["linux.namespaces[].type", "linux.timeOffsets."],
        sets: json!({"linux": {
            "namespaces+": [{"type": "time"}],
            "timeOffsets": {
                "monotonic": {"secs": 1000, "nanosecs": 5},
                "boottime": {"secs": 2_000_000_000, "nanosecs": 6},
            },
        }}),
        probe: "readlink /proc/1/ns/time; awk '{print $1, $2, $3}' /proc/1/timens_offsets; \
                awk '{print ($1 > 2000000000)}' /proc/uptime",
        needs: &[],
        expect: Expect::Same(
            Reference::Crun,
            "time:own\nmonotonic 1000 5\nboottime 2000000000 6\n1",
        ),
    };
}

//! Control groups: paths, devices and limits.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

const ONLY_V1: &str = "of cgroup v1; the guest has version 2";

/// Reads files of the process's own cgroup.
macro_rules! files {
    ($files:literal) => {
        concat!("cd /sys/fs/cgroup; for f in ", $files, "; do echo $f $(cat $f); done")
    };
}

/// A resource that is refused.
fn refused(
    fields: &'static [&'static str],
    resources: &Value,
    named: &'static str,
    why: &'static str,
) -> Case {
    Case {
        checks: "the create fails",
        fields,
        sets: json!({"linux": {"resources": resources}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why },
    }
}

rows! {
    cgroups_path => Case {
        checks: "the cgroup is there",
        fields: &["linux.cgroupsPath"],
        sets: json!({"linux": {
            "cgroupsPath": "{cgroup}",
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
        }}),
        probe: "grep ^0 /proc/1/cgroup",
        needs: &[],
        expect: Expect::Differs {
            reference: Reference::Runc,
            husk: "0::/husk/c",
            other: "0::/husk-conformance-*",
            why: "all containers of a pod are below one cgroup of the guest",
        },
    };
    cgroups_path_upwards => Case {
        checks: "the create fails",
        fields: &["linux.cgroupsPath"],
        sets: json!({"linux": {"cgroupsPath": "/a/../../agent"}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "cgroup path", why: "it would lead elsewhere" },
    };
    devices_denied => Case {
        checks: "a device that no rule allows cannot be opened, made though it can be",
        fields: &["linux.resources.devices[].allow", "linux.resources.devices[].access"],
        sets: json!({"linux": {
            "devices": [{"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        }}),
        probe: "(: > /dev/kmsg) 2>&1; (: < /dev/kmsg) 2>&1; echo null > /dev/null && echo works",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "sh: can't create /dev/kmsg: Operation not permitted\n\
             sh: can't open /dev/kmsg: Operation not permitted\nworks",
        ),
    };
    devices_allowed => Case {
        checks: "type, numbers and access of a rule are matched",
        fields: &["linux.resources.devices[]"],
        sets: json!({"linux": {
            "devices": [
                {"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11},
                {"type": "c", "path": "/dev/port", "major": 1, "minor": 4},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"},
                {"allow": true, "type": "b", "major": 1, "minor": 4, "access": "rwm"},
            ]},
        }}),
        probe: "(: > /dev/kmsg) 2>&1 && echo written; (: < /dev/kmsg) 2>&1; (: < /dev/port) 2>&1",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "written\nsh: can't open /dev/kmsg: Operation not permitted\n\
             sh: can't open /dev/port: Operation not permitted\nexit 1",
        ),
    };
    devices_all_allowed => Case {
        checks: "type a is every device",
        fields: &[
            "linux.resources.devices[].allow", "linux.resources.devices[].type",
            "linux.resources.devices[].access",
        ],
        sets: json!({"linux": {
            "devices": [{"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11}],
            "resources": {"devices": [{"allow": true, "type": "a", "access": "rwm"}]},
        }}),
        probe: "(: > /dev/kmsg) 2>&1 && echo written",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "written"),
    };
    memory => Case {
        checks: "the limits in the cgroup's files; that of swap is of swap alone",
        fields: &[
            "linux.resources.memory.limit", "linux.resources.memory.reservation",
            "linux.resources.memory.swap",
        ],
        sets: json!({"linux": {"resources": {"memory": {
            "limit": 67_108_864, "reservation": 33_554_432, "swap": 100_663_296,
        }}}}),
        probe: files!("memory.max memory.low memory.swap.max"),
        needs: &["memory"],
        expect: Expect::Same(
            Reference::Runc,
            "memory.max 67108864\nmemory.low 33554432\nmemory.swap.max 33554432",
        ),
    };
    memory_unlimited => Case {
        checks: "-1 is no limit",
        fields: &["linux.resources.memory.limit", "linux.resources.memory.swap"],
        sets: json!({"linux": {"resources": {"memory": {"limit": -1, "swap": -1}}}}),
        probe: files!("memory.max memory.swap.max"),
        needs: &["memory"],
        expect: Expect::Same(Reference::Runc, "memory.max max\nmemory.swap.max max"),
    };
    memory_group => Case {
        checks: "the kernel kills a container that exceeds its memory as a whole",
        fields: &["linux.resources.memory.limit"],
        sets: json!({"linux": {"resources": {"memory": {"limit": 67_108_864}}}}),
        probe: files!("memory.oom.group"),
        needs: &["memory"],
        expect: Expect::Differs {
            reference: Reference::Runc,
            husk: "memory.oom.group 1",
            other: "memory.oom.group 0",
            why: "half a container helps nobody; the kubelet asks runc for the same",
        },
    };
    memory_kernel => refused(
        &["linux.resources.memory.kernel"],
        &json!({"memory": {"kernel": 1_000_000}}),
        "linux.resources.memory.kernel",
        ONLY_V1,
    );
    memory_kernel_tcp => refused(
        &["linux.resources.memory.kernelTCP"],
        &json!({"memory": {"kernelTCP": 1_000_000}}),
        "linux.resources.memory.kernelTCP",
        ONLY_V1,
    );
    memory_swappiness => refused(
        &["linux.resources.memory.swappiness"],
        &json!({"memory": {"swappiness": 0}}),
        "linux.resources.memory.swappiness",
        ONLY_V1,
    );
    memory_hierarchy => refused(
        &["linux.resources.memory.useHierarchy"],
        &json!({"memory": {"useHierarchy": true}}),
        "linux.resources.memory.useHierarchy",
        ONLY_V1,
    );
    memory_without_killer => refused(
        &["linux.resources.memory.disableOOMKiller"],
        &json!({"memory": {"disableOOMKiller": true}}),
        "linux.resources.memory.disableOOMKiller",
        ONLY_V1,
    );
    memory_with_killer => Case {
        checks: "false is what is",
        fields: &["linux.resources.memory.disableOOMKiller"],
        sets: json!({"linux": {"resources": {"memory": {"disableOOMKiller": false}}}}),
        probe: "echo ran",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "ran"),
    };
    memory_check => Case {
        checks: "accepted: it is for updates",
        fields: &["linux.resources.memory.checkBeforeUpdate"],
        sets: json!({"linux": {"resources": {"memory": {
            "limit": 67_108_864, "checkBeforeUpdate": true,
        }}}}),
        probe: files!("memory.max"),
        needs: &["memory"],
        expect: Expect::Same(Reference::Runc, "memory.max 67108864"),
    };
    cpu => Case {
        checks: "shares as a weight, quota and period in one file",
        fields: &[
            "linux.resources.cpu.shares", "linux.resources.cpu.quota",
            "linux.resources.cpu.period",
        ],
        sets: json!({"linux": {"resources": {"cpu": {
            "shares": 1024, "quota": 50_000, "period": 200_000,
        }}}}),
        probe: files!("cpu.weight cpu.max"),
        needs: &["cpu"],
        expect: Expect::Same(Reference::Runc, "cpu.weight 39\ncpu.max 50000 200000"),
    };
    cpu_unlimited => Case {
        checks: "a quota that is not positive is no limit",
        fields: &["linux.resources.cpu.quota"],
        sets: json!({"linux": {"resources": {"cpu": {"quota": -1}}}}),
        probe: files!("cpu.max"),
        needs: &["cpu"],
        expect: Expect::Same(Reference::Runc, "cpu.max max 100000"),
    };
    cpu_burst => Case {
        checks: "time saved up for a burst",
        fields: &["linux.resources.cpu.burst"],
        sets: json!({"linux": {"resources": {"cpu": {
            "quota": 50_000, "period": 100_000, "burst": 20_000,
        }}}}),
        probe: files!("cpu.max cpu.max.burst"),
        needs: &["cpu"],
        expect: Expect::Same(Reference::Crun, "cpu.max 50000 100000\ncpu.max.burst 20000"),
    };
    cpu_idle => Case {
        checks: "scheduled only when nobody else wants to run",
        fields: &["linux.resources.cpu.idle"],
        sets: json!({"linux": {"resources": {"cpu": {"idle": 1}}}}),
        probe: files!("cpu.idle"),
        needs: &["cpu"],
        expect: Expect::Same(Reference::Crun, "cpu.idle 1"),
    };
    cpu_sets => Case {
        checks: "the processors and memory nodes that it may use",
        fields: &["linux.resources.cpu.cpus", "linux.resources.cpu.mems"],
        sets: json!({"linux": {"resources": {"cpu": {"cpus": "0", "mems": "0"}}}}),
        probe: "cd /sys/fs/cgroup; cat cpuset.cpus cpuset.mems; \
                grep -E '^(Cpu|Mem)s_allowed_list' /proc/1/status",
        needs: &["cpuset"],
        expect: Expect::Same(
            Reference::Runc,
            "0\n0\nCpus_allowed_list:\t0\nMems_allowed_list:\t0",
        ),
    };
    cpu_realtime => refused(
        &["linux.resources.cpu.realtimeRuntime", "linux.resources.cpu.realtimePeriod"],
        &json!({"cpu": {"realtimeRuntime": 1000, "realtimePeriod": 10_000}}),
        "linux.resources.cpu.realtime",
        ONLY_V1,
    );
    block_io_weight => Case {
        checks: "the weight of version 1 as that of version 2",
        fields: &["linux.resources.blockIO.weight"],
        sets: json!({"linux": {"resources": {"blockIO": {"weight": 100}}}}),
        probe: "cd /sys/fs/cgroup; cat io.bfq.weight 2> /dev/null || cat io.weight",
        needs: &["io"],
        expect: Expect::Same(Reference::Runc, "default *"),
    };
    block_io_device_weight => Case {
        checks: "the create fails",
        fields: &[
            "linux.resources.blockIO.weightDevice[].major",
            "linux.resources.blockIO.weightDevice[].minor",
            "linux.resources.blockIO.weightDevice[].weight",
        ],
        sets: json!({"linux": {"resources": {"blockIO": {"weightDevice": [
            {"major": "{disk major}", "minor": "{disk minor}", "weight": 200},
        ]}}}}),
        probe: "",
        needs: &["io"],
        expect: Expect::Refused {
            named: "linux.resources.blockIO.weightDevice[0].weight",
            why: "on no disk of the guest is there a scheduler that weighs: neither BFQ, nor a model \
                  of costs for io.weight",
        },
    };
    block_io_throttle => Case {
        checks: "bytes and operations per second, by device",
        fields: &[
            "linux.resources.blockIO.throttleReadBpsDevice[]",
            "linux.resources.blockIO.throttleWriteBpsDevice[]",
            "linux.resources.blockIO.throttleReadIOPSDevice[]",
            "linux.resources.blockIO.throttleWriteIOPSDevice[]",
        ],
        sets: json!({"linux": {"resources": {"blockIO": {
            "throttleReadBpsDevice":
                [{"major": "{disk major}", "minor": "{disk minor}", "rate": 1_000_000}],
            "throttleWriteBpsDevice":
                [{"major": "{disk major}", "minor": "{disk minor}", "rate": 2_000_000}],
            "throttleReadIOPSDevice":
                [{"major": "{disk major}", "minor": "{disk minor}", "rate": 300}],
            "throttleWriteIOPSDevice":
                [{"major": "{disk major}", "minor": "{disk minor}", "rate": 400}],
        }}}}),
        probe: "cat /sys/fs/cgroup/io.max",
        needs: &["io"],
        expect: Expect::Same(Reference::Runc, "*:* rbps=1000000 wbps=2000000 riops=300 wiops=400"),
    };
    block_io_leaf_weight => refused(
        &["linux.resources.blockIO.leafWeight"],
        &json!({"blockIO": {"leafWeight": 100}}),
        "linux.resources.blockIO.leafWeight",
        ONLY_V1,
    );
    block_io_device_leaf_weight => refused(
        &["linux.resources.blockIO.weightDevice[]"],
        &json!({"blockIO": {"weightDevice": [
            {"major": "{disk major}", "minor": "{disk minor}", "weight": 200, "leafWeight": 200},
        ]}}),
        "linux.resources.blockIO.weightDevice[0].leafWeight",
        ONLY_V1,
    );
    huge_pages => Case {
        checks: "limits of use and of reservations",
        fields: &["linux.resources.hugepageLimits[]"],
        sets: json!({"linux": {"resources": {"hugepageLimits": [
            {"pageSize": "2MB", "limit": 4_194_304},
        ]}}}),
        probe: files!("hugetlb.2MB.max hugetlb.2MB.rsvd.max"),
        needs: &["hugetlb"],
        expect: Expect::Same(
            Reference::Runc,
            "hugetlb.2MB.max 4194304\nhugetlb.2MB.rsvd.max 4194304",
        ),
    };
    network => refused(
        &["linux.resources.network."],
        &json!({"network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]}}),
        "linux.resources.network",
        ONLY_V1,
    );
    pids => Case {
        checks: "the limit in the cgroup's file",
        fields: &["linux.resources.pids.limit"],
        sets: json!({"linux": {"resources": {"pids": {"limit": 50}}}}),
        probe: files!("pids.max"),
        needs: &["pids"],
        expect: Expect::Same(Reference::Runc, "pids.max 50"),
    };
    pids_unlimited => Case {
        checks: "-1 is no limit",
        fields: &["linux.resources.pids.limit"],
        sets: json!({"linux": {"resources": {"pids": {"limit": -1}}}}),
        probe: files!("pids.max"),
        needs: &["pids"],
        expect: Expect::Same(Reference::Runc, "pids.max max"),
    };
    rdma => refused(
        &["linux.resources.rdma.*.hcaHandles", "linux.resources.rdma.*.hcaObjects"],
        &json!({"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 1000}}}),
        "linux.resources.rdma",
        "the guest has no RDMA device",
    );
    unified => Case {
        checks: "files of controllers are written as given",
        fields: &["linux.resources.unified"],
        sets: json!({"linux": {"resources": {"unified": {
            "memory.high": "66060288", "pids.max": "77",
        }}}}),
        probe: files!("memory.high pids.max"),
        needs: &["memory", "pids"],
        expect: Expect::Same(Reference::Runc, "memory.high 66060288\npids.max 77"),
    };
    unified_elsewhere => refused(
        &["linux.resources.unified"],
        &json!({"unified": {"../memory.max": "max"}}),
        "linux.resources.unified",
        "it would lead elsewhere",
    );
}

//! Devices, kernel parameters, hidden and read-only paths, propagation of the root, personality.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

/// The root's propagation.
fn root_propagation(kind: &'static str, prints: &'static str) -> Case {
    Case {
        checks: "by mountinfo",
        fields: &["linux.rootfsPropagation"],
        sets: json!({"linux": {"rootfsPropagation": kind}}),
        probe: "mnt / | sed -e 's/ - .*//' -e 's/ [a-z,]*/ /'",
        needs: &[],
        // runc 1.1 leaves it private.
        expect: Expect::Same(Reference::Crun, prints),
    }
}

fn refused(
    fields: &'static [&'static str],
    linux: &Value,
    named: &'static str,
    why: &'static str,
) -> Case {
    Case {
        checks: "the create fails",
        fields,
        sets: json!({"linux": linux}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why },
    }
}

rows! {
    devices => Case {
        checks: "nodes of every type, with their numbers, mode and owners",
        fields: &["linux.devices[]"],
        sets: json!({"linux": {"devices": [
            {"type": "c", "path": "/dev/char", "major": 10, "minor": 229, "fileMode": 0o640,
             "uid": 1, "gid": 2},
            {"type": "u", "path": "/dev/unbuffered", "major": 10, "minor": 200, "fileMode": 0o600,
             "uid": 0, "gid": 0},
            {"type": "b", "path": "/dev/deep/block", "major": 7, "minor": 3, "fileMode": 0o660,
             "uid": 0, "gid": 6},
            {"type": "p", "path": "/dev/fifo", "fileMode": 0o622, "uid": 3, "gid": 3},
        ]}}),
        probe: "stat -c '%n %F %t:%T %a %u:%g' /dev/char /dev/unbuffered /dev/deep/block /dev/fifo",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/dev/char character special file a:e5 640 1:2\n\
             /dev/unbuffered character special file a:c8 600 0:0\n\
             /dev/deep/block block special file 7:3 660 0:6\n\
             /dev/fifo fifo 0:0 622 3:3",
        ),
    };
    default_devices => Case {
        checks: "beside those given there are always these nodes and links",
        fields: &["linux.devices[].type", "linux.devices[].path"],
        sets: json!({"linux": {"devices": [
            {"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11},
        ]}}),
        probe: "cd /dev; stat -c '%n %t:%T %a %u:%g' full null random tty urandom zero; \
                for l in fd ptmx stderr stdin stdout; do echo $l $(readlink $l); done",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "full 1:7 666 0:0\nnull 1:3 666 0:0\nrandom 1:8 666 0:0\ntty 5:0 666 0:0\n\
             urandom 1:9 666 0:0\nzero 1:5 666 0:0\n\
             fd /proc/self/fd\nptmx pts/ptmx\nstderr /proc/self/fd/2\nstdin /proc/self/fd/0\n\
             stdout /proc/self/fd/1",
        ),
    };
    sysctl => Case {
        checks: "parameters of the container's own namespaces",
        fields: &["linux.sysctl"],
        sets: json!({"linux": {"sysctl": {
            "net.core.somaxconn": "77", "kernel.shmmni": "1234", "net/ipv4/ip_default_ttl": "99",
        }}}),
        probe: "cd /proc/sys; cat net/core/somaxconn kernel/shmmni net/ipv4/ip_default_ttl",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "77\n1234\n99"),
    };
    sysctl_of_the_guest => refused(
        &["linux.sysctl"],
        &json!({"sysctl": {"vm.swappiness": "1"}}),
        "linux.sysctl",
        "as in runc: it would change the pod's other containers too",
    );
    masked_paths => Case {
        checks: "a file reads as empty, a directory as an empty one; what is not there is no error",
        fields: &["linux.maskedPaths"],
        sets: json!({"linux": {"maskedPaths": ["/proc/uptime", "/etc", "/no/such"]}}),
        probe: "wc -c < /proc/uptime; ls -A /etc | wc -l; touch /etc/x 2>&1; \
                mnt /etc | cut -d, -f1; ls /no 2>&1",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "0\n0\ntouch: /etc/x: Read-only file system\n/etc ro\n\
             ls: /no: No such file or directory\nexit 1",
        ),
    };
    readonly_paths => Case {
        checks: "files and directories cannot be written; what is not there is no error",
        fields: &["linux.readonlyPaths"],
        sets: json!({"linux": {"readonlyPaths": ["/proc/sys", "/etc/passwd", "/no/such"]}}),
        probe: "(echo x > /proc/sys/kernel/domainname) 2>&1; (echo x > /etc/passwd) 2>&1; \
                mnt /proc/sys /etc/passwd | sed 's/ - .*//'",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "sh: can't create /proc/sys/kernel/domainname: Read-only file system\n\
             sh: can't create /etc/passwd: Read-only file system\n\
             /proc/sys ro,*\n/etc/passwd ro,*",
        ),
    };
    propagation_private => root_propagation("private", "/ ");
    propagation_slave => root_propagation("slave", "/ ");
    propagation_shared => root_propagation("shared", "/  shared");
    propagation_unbindable => root_propagation("unbindable", "/  unbindable");
    mount_label => refused(
        &["linux.mountLabel"],
        &json!({"mountLabel": "system_u:object_r:container_file_t:s0"}),
        "linux.mountLabel",
        "the guest's kernel has no SELinux",
    );
    personality => Case {
        checks: "uname says so",
        fields: &["linux.personality.domain", "linux.personality.flags"],
        sets: json!({"linux": {"personality": {"domain": "LINUX32", "flags": []}}}),
        probe: "uname -m",
        needs: &[],
        expect: Expect::Same(Reference::Crun, "i686"),
    };
    personality_of_linux => Case {
        checks: "uname says so",
        fields: &["linux.personality.domain"],
        sets: json!({"linux": {"personality": {"domain": "LINUX"}}}),
        probe: "uname -m",
        needs: &[],
        expect: Expect::Same(Reference::Crun, "x86_64"),
    };
    personality_with_flags => refused(
        &["linux.personality.flags"],
        &json!({"personality": {"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]}}),
        "linux.personality.flags",
        "the specification supports none",
    );
    intel_rdt => refused(
        &["linux.intelRdt."],
        &json!({"intelRdt": {
            "closID": "x", "l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=50",
            "enableCMT": true, "enableMBM": true,
        }}),
        "linux.intelRdt",
        "a guest has no control over the processor's caches",
    );
}

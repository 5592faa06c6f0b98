//! Version, root, names of the host, annotations, and what belongs to other platforms.

use serde_json::json;

use super::rows;
use crate::case::{Case, Expect, Reference};

const NO_OTHER_PLATFORM: &str = "the guest is Linux";

/// A field of another platform.
fn elsewhere(field: &'static [&'static str], sets: serde_json::Value) -> Case {
    Case {
        checks: "the create fails",
        fields: field,
        sets,
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: field[0], why: NO_OTHER_PLATFORM },
    }
}

rows! {
    version => Case {
        checks: "any 1.x is accepted",
        fields: &["ociVersion"],
        sets: json!({"ociVersion": "1.0.2-dev"}),
        probe: "echo ran",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "ran"),
    };
    version_of_the_future => Case {
        checks: "2.x is not",
        fields: &["ociVersion"],
        sets: json!({"ociVersion": "2.0.0"}),
        probe: "",
        needs: &[],
        expect: Expect::Refused {
            named: "ociVersion",
            why: "a new major version is incompatible by definition",
        },
    };
    path => Case {
        checks: "the root is the image, and its links stay inside",
        fields: &["root.path"],
        sets: json!({"root": {"path": "rootfs"}}),
        probe: "ls -d /etc/passwd; cat /links/etc/group | head -n 1; ls /../..",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/etc/passwd\nroot:x:0:\nbin\ndev\netc\nlinks\nproc\nsys\ntmp",
        ),
    };
    writable => Case {
        checks: "the root can be written",
        fields: &["root.readonly"],
        sets: json!({"root": {"readonly": false}}),
        probe: "echo new > /file; cat /file; mnt / | cut -d, -f1",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "new\n/ rw"),
    };
    readonly => Case {
        checks: "the root cannot be written, mounts in it can",
        fields: &["root.readonly"],
        sets: json!({"root": {"readonly": true}}),
        probe: "touch /file 2>&1; echo mount > /dev/file; cat /dev/file; mnt / | cut -d, -f1",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "touch: /file: Read-only file system\nmount\n/ ro",
        ),
    };
    hostname => Case {
        checks: "uname and /proc say it",
        fields: &["hostname"],
        sets: json!({"hostname": "its-own.example"}),
        probe: "hostname; cat /proc/sys/kernel/hostname",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "its-own.example\nits-own.example"),
    };
    domainname => Case {
        checks: "/proc says it",
        fields: &["domainname"],
        sets: json!({"domainname": "example.org"}),
        probe: "cat /proc/sys/kernel/domainname",
        needs: &[],
        expect: Expect::Same(Reference::Crun, "example.org"),
    };
    annotations => Case {
        checks: "accepted, without a meaning for the runtime",
        fields: &["annotations"],
        sets: json!({"annotations": {"org.example.key": "value", "empty": ""}}),
        probe: "echo ran",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "ran"),
    };
    windows => elsewhere(&["windows"], json!({"windows": {"layerFolders": ["C:\\"]}}));
    solaris => elsewhere(&["solaris"], json!({"solaris": {"milestone": "svc:/milestone"}}));
    vm => elsewhere(&["vm"], json!({"vm": {"kernel": {"path": "/vmlinuz"}}}));
    zos => elsewhere(&["zos"], json!({"zos": {"namespaces": [{"type": "mount"}]}}));
}

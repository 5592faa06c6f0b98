//! Mounts: their places, sources, types and options.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

/// Mounts beside those of the base, as (destination, type, source, options).
fn mounts(list: &[(&str, &str, &str, &[&str])]) -> Value {
    let one = |(destination, kind, source, options): &(&str, &str, &str, &[&str])| json!({"destination": destination, "type": kind, "source": source, "options": options});
    json!({"mounts+": list.iter().map(one).collect::<Vec<_>>()})
}

/// Binds of the volume, one at /1, /2 and so on for each list of options after `bind`.
fn binds(options: &[&[&str]]) -> Value {
    let one = |(number, options): (usize, &&[&str])| {
        let mut all = vec!["bind"];
        all.extend(*options);
        json!({"destination": format!("/{number}"), "type": "none", "source": "{volume}",
               "options": all})
    };
    json!({"mounts+": (1..).zip(options).map(one).collect::<Vec<_>>()})
}

/// A tmpfs at /1, /2 and so on for each list of options.
fn tmpfs(options: &[&[&str]]) -> Value {
    let one = |(number, options): (usize, &&[&str])| json!({"destination": format!("/{number}"), "type": "tmpfs", "source": "tmpfs", "options": options});
    json!({"mounts+": (1..).zip(options).map(one).collect::<Vec<_>>()})
}

/// The runtime's /sys with all below it at /1, /2 and so on.
fn trees(options: &[&[&str]]) -> Value {
    let one = |(number, options): (usize, &&[&str])| {
        let mut all = vec!["rbind"];
        all.extend(*options);
        json!({"destination": format!("/{number}"), "type": "bind", "source": "/sys",
               "options": all})
    };
    json!({"mounts+": (1..).zip(options).map(one).collect::<Vec<_>>()})
}

const OPTIONS: &[&str] = &["mounts[].options"];

/// A mount whose files belong to other users than in its source.
fn mapped_by(bind: &str, option: &str) -> Case {
    Case {
        checks: "owners are shown by the mapping",
        fields: &["mounts[].uidMappings[]", "mounts[].gidMappings[]", "mounts[].options"],
        sets: json!({"mounts+": [{
            "destination": "/1", "type": "none", "source": "{volume}", "options": [bind, option],
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
            "gidMappings": [{"containerID": 1234, "hostID": 2000, "size": 10}],
        }]}),
        probe: "stat -c '%u %g' /1/file",
        needs: &[],
        expect: Expect::Same(Reference::Crun, "1000 2000"),
    }
}

/// An option that is not supported.
fn refused(sets: Value, named: &'static str, why: &'static str) -> Case {
    Case {
        checks: "the create fails",
        fields: OPTIONS,
        sets,
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why },
    }
}

rows! {
    bind_of_a_directory => Case {
        checks: "the source is there, and what it holds can be changed; the place is made",
        fields: &[
            "mounts[].destination", "mounts[].source", "mounts[].type", "mounts[].options",
        ],
        sets: mounts(&[("/made/for/it", "none", "{volume}", &["bind", "rw"])]),
        probe: "cat /made/for/it/file; stat -c '%a %g' /made/for/it; echo x > /made/for/it/file; \
                cat /made/for/it/file",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "volume\n2777 1234\nx"),
    };
    bind_of_a_file => Case {
        checks: "the place is made as a file",
        fields: &["mounts[].destination", "mounts[].source"],
        sets: mounts(&[("/etc/new", "bind", "{volume}/file", &["bind", "ro"])]),
        probe: "cat /etc/new; (echo x > /etc/new) 2>&1",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "volume\nsh: can't create /etc/new: Read-only file system\nexit 1"),
    };
    destination_behind_a_link => Case {
        checks: "links in the image are followed inside the root, also where they lead to nothing",
        fields: &["mounts[].destination"],
        sets: mounts(&[
            ("/links/up/inside", "bind", "{volume}/file", &["bind"]),
            ("/links/dangling/below", "bind", "{volume}", &["bind"]),
        ]),
        probe: "cat /etc/inside /run/x/below/file",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "volume\nvolume"),
    };
    types => Case {
        checks: "proc, tmpfs, devpts, mqueue, sysfs and cgroup (version 2) with the usual options",
        fields: &["mounts[].destination", "mounts[].type", "mounts[].source", "mounts[].options"],
        sets: mounts(&[("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777", "size=2m"])]),
        probe: "mnt /proc /dev /dev/pts /dev/mqueue /dev/shm /sys /sys/fs/cgroup /tmp; \
                stat -c %a /tmp; df -k /tmp | tail -n 1 | awk '{print $2}'",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/proc rw,nosuid,nodev,noexec,relatime - proc\n\
             /dev rw,nosuid - tmpfs\n\
             /dev/pts rw,nosuid,noexec,relatime - devpts\n\
             /dev/mqueue rw,nosuid,nodev,noexec,relatime - mqueue\n\
             /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs\n\
             /sys ro,nosuid,nodev,noexec,relatime - sysfs\n\
             /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2\n\
             /tmp rw,nosuid,nodev,relatime - tmpfs\n1777\n2048",
        ),
    };
    attributes => Case {
        checks: "a bind mount has what is set, whatever its source has",
        fields: OPTIONS,
        sets: binds(&[
            &["ro"], &["nosuid"], &["nodev"], &["noexec"], &["noatime"], &["nodiratime"],
            &["strictatime"], &["ro", "nosuid", "nodev", "noexec", "noatime"],
        ]),
        probe: "mnt /1 /2 /3 /4 /5 /6 /7 /8 | sed 's/ - .*//'",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 ro,relatime\n/2 rw,nosuid,relatime\n/3 rw,nodev,relatime\n/4 rw,noexec,relatime\n\
             /5 rw,noatime\n/6 rw,nodiratime,relatime\n/7 rw\n\
             /8 ro,nosuid,nodev,noexec,noatime",
        ),
    };
    attributes_cleared => Case {
        checks: "the later of two options that contradict each other wins",
        fields: OPTIONS,
        sets: tmpfs(&[
            &[], &["ro", "rw"], &["nosuid", "suid"], &["nodev", "dev"],
            &["noexec", "exec"], &["nodiratime", "diratime"], &["noatime", "atime"],
            &["relatime"],
        ]),
        probe: "mnt /1 /2 /3 /4 /5 /6 /7 /8",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw,relatime - tmpfs\n/2 rw,relatime - tmpfs\n/3 rw,relatime - tmpfs\n\
             /4 rw,relatime - tmpfs\n/5 rw,relatime - tmpfs\n/6 rw,relatime - tmpfs\n\
             /7 rw,relatime - tmpfs\n/8 rw,relatime - tmpfs",
        ),
    };
    defaults => Case {
        checks: "accepted, and nothing is different",
        fields: OPTIONS,
        sets: tmpfs(&[&["defaults"], &["ro", "defaults"]]),
        probe: "mnt /1 /2",
        needs: &[],
        expect: Expect::Same(Reference::Crun, "/1 rw,relatime - tmpfs\n/2 ro,relatime - tmpfs"),
    };
    attributes_of_time => Case {
        checks: "access times as mount(8) says",
        fields: OPTIONS,
        sets: tmpfs(&[&["strictatime"], &["strictatime", "nostrictatime"], &["norelatime"]]),
        probe: "mnt /1 /2 /3",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw - tmpfs\n/2 rw,relatime - tmpfs\n/3 rw,relatime - tmpfs",
        ),
    };
    no_symlinks => Case {
        checks: "links below the mount are not followed",
        fields: OPTIONS,
        sets: tmpfs(&[&["nosymfollow"], &["nosymfollow", "symfollow"]]),
        probe: "mnt /1 /2; for d in 1 2; do ln -s /etc/passwd /$d/link; \
                head -n 1 /$d/link > /dev/null 2>&1 && echo followed || echo not; done",
        needs: &[],
        expect: Expect::Alone {
            prints: "/1 rw,relatime,nosymfollow - tmpfs\n/2 rw,relatime - tmpfs\nnot\nfollowed",
            why: "neither runc 1.1 nor crun 1.21 knows them",
        },
    };
    of_the_file_system => Case {
        checks: "flags of the whole file system",
        fields: OPTIONS,
        sets: tmpfs(&[
            &["sync"], &["dirsync"], &["lazytime"], &["sync", "async"],
            &["lazytime", "nolazytime"],
        ]),
        probe: "for d in 1 2 3 4 5; do super /$d; done",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw,sync\n/2 rw,dirsync\n/3 rw,lazytime\n/4 rw\n/5 rw",
        ),
    };
    without_effect => Case {
        checks: "accepted, and nothing is different",
        fields: OPTIONS,
        sets: tmpfs(&[
            &["silent"], &["loud"], &["mand"], &["nomand"], &["iversion"], &["noiversion"],
        ]),
        probe: "for d in 1 2 3 4 5 6; do mnt /$d; done",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw,relatime - tmpfs\n/2 rw,relatime - tmpfs\n/3 rw,relatime - tmpfs\n\
             /4 rw,relatime - tmpfs\n/5 rw,relatime - tmpfs\n/6 rw,relatime - tmpfs",
        ),
    };
    of_a_tmpfs => Case {
        checks: "options of the file system itself are passed on to it",
        fields: OPTIONS,
        sets: tmpfs(&[&["size=1m", "mode=750", "uid=3", "gid=4", "nr_inodes=100"]]),
        probe: "super /1; stat -c '%a %u %g' /1",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw,size=1024k,nr_inodes=100,mode=750,uid=3,gid=4\n750 3 4",
        ),
    };
    propagation => Case {
        checks: "each kind, by mountinfo",
        fields: OPTIONS,
        sets: binds(&[&["private"], &["shared"], &["slave"], &["unbindable"], &[]]),
        probe: "mnt /1 /2 /3 /4 /5 | sed 's/ - .*//'",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 rw,relatime\n/2 rw,relatime shared\n/3 rw,relatime\n\
             /4 rw,relatime unbindable\n/5 rw,relatime",
        ),
    };
    propagation_of_trees => Case {
        checks: "each kind for the mounts below too",
        fields: OPTIONS,
        sets: trees(&[&["rprivate"], &["rshared"], &["rslave"], &["runbindable"], &[]]),
        probe: "for d in 1 2 3 4 5; do mnt /$d /$d/fs/cgroup | \
                sed -e 's/ - .*//' -e 's/ [a-z,]*/ /'; done",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1 \n/1/fs/cgroup \n/2  shared\n/2/fs/cgroup  shared\n/3 \n/3/fs/cgroup \n\
             /4  unbindable\n/4/fs/cgroup  unbindable\n/5 \n/5/fs/cgroup ",
        ),
    };
    recursive_attributes => Case {
        checks: "set for the mounts below too",
        fields: OPTIONS,
        sets: trees(&[
            &["rro", "rnosuid", "rnodev", "rnoexec", "rnoatime", "rnodiratime", "rnosymfollow"],
            &["rro", "rnosuid", "rnodev", "rnoexec", "rrelatime", "rdiratime", "rsymfollow"],
            &["rro", "rnosuid", "rnodev", "rnoexec", "rstrictatime", "rdiratime"],
        ]),
        probe: "for d in 1 2 3; do mnt /$d/fs/cgroup | sed 's/ - .*//'; done",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/1/fs/cgroup ro,nosuid,nodev,noexec,noatime,nodiratime,nosymfollow\n\
             /2/fs/cgroup ro,nosuid,nodev,noexec,relatime\n\
             /3/fs/cgroup ro,nosuid,nodev,noexec",
        ),
    };
    recursive_attributes_cleared => Case {
        checks: "cleared for the mounts below too",
        fields: OPTIONS,
        sets: trees(&[&["rrw", "rsuid", "rdev", "rexec"]]),
        probe: "mnt /1/fs/cgroup | sed 's/ - .*//'",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "/1/fs/cgroup rw,relatime"),
    };
    recursive_times_cleared => Case {
        checks: "back to the kernel's default for the mounts below too",
        fields: OPTIONS,
        sets: trees(&[&["ratime"], &["rnorelatime"], &["rnostrictatime"]]),
        probe: "for d in 1 2 3; do mnt /$d/fs/cgroup | sed 's/.*[,]//'; done",
        needs: &[],
        expect: Expect::Alone {
            prints: "relatime - cgroup2\nrelatime - cgroup2\nrelatime - cgroup2",
            why: "runc 1.1 asks the kernel for what it refuses, crun 1.21 does not know them",
        },
    };
    copy_up => Case {
        checks: "a tmpfs begins with what the image has in its place",
        fields: OPTIONS,
        sets: mounts(&[("/etc", "tmpfs", "tmpfs", &["tmpcopyup", "mode=755"])]),
        probe: "mnt /etc; head -n 1 /etc/group; echo new > /etc/new; cat /etc/new",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "/etc rw,relatime - tmpfs\nroot:x:0:\nnew"),
    };
    overlay => Case {
        checks: "an overlay of the runtime's directories",
        fields: &["mounts[].type", "mounts[].options"],
        sets: mounts(&[("/1", "overlay", "overlay", &["lowerdir={volume}:{layer}", "ro"])]),
        probe: "mnt /1; cat /1/file; ls -d /1/links",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "/1 ro,relatime - overlay\nvolume\n/1/links"),
    };
    remount => refused(
        mounts(&[("/dev", "tmpfs", "tmpfs", &["remount", "ro"])]),
        "mounts[7]",
        "no mount is changed by a later one: its own options say how it is to be",
    );
    mapped => mapped_by("bind", "idmap");
    mapped_tree => mapped_by("rbind", "ridmap");
}

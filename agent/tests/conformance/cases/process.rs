//! The process and its user.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

/// A scheduler; prints priority, nice value, static priority and policy of the process and of its
/// child.
fn scheduled(fields: &'static [&'static str], scheduler: &Value, prints: &'static str) -> Case {
    Case {
        checks: "by /proc/PID/stat of the process and its child",
        fields,
        sets: json!({"process": {"scheduler": scheduler}}),
        probe: "awk '{print $18, $19, $40, $41}' /proc/1/stat /proc/self/stat; true",
        needs: &[],
        expect: Expect::Same(Reference::Crun, prints),
    }
}

fn prioritised(class: &str, priority: i32, prints: &'static str) -> Case {
    Case {
        checks: "by ioprio_get(2)",
        fields: &["process.ioPriority."],
        sets: json!({"process": {"ioPriority": {"class": class, "priority": priority}}}),
        probe: "ionice -p 1",
        needs: &[],
        expect: Expect::Same(Reference::Crun, prints),
    }
}

fn refused(
    fields: &'static [&'static str],
    process: &Value,
    named: &'static str,
    why: &'static str,
) -> Case {
    Case {
        checks: "the create fails",
        fields,
        sets: json!({"process": process}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why },
    }
}

rows! {
    terminal => Case {
        checks: "all three streams are a terminal of the container's own, which is also /dev/console",
        fields: &["process.terminal"],
        sets: json!({"process": {"terminal": true}}),
        probe: "tty; for n in 0 1 2; do test -t $n && echo $n; done; stat -c '%F %t:%T' /dev/console",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "/dev/pts/0\n0\n1\n2\ncharacter special file 88:0",
        ),
    };
    no_terminal => Case {
        checks: "without a terminal the size is ignored",
        fields: &["process.terminal", "process.consoleSize."],
        sets: json!({"process": {"terminal": false, "consoleSize": {"height": 1, "width": 1}}}),
        probe: "tty; ls /dev/console 2>&1",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "not a tty\nls: /dev/console: No such file or directory\nexit 1",
        ),
    };
    console_size => Case {
        checks: "the terminal has this size from the first instruction on",
        fields: &["process.consoleSize."],
        sets: json!({"process": {"terminal": true, "consoleSize": {"height": 33, "width": 101}}}),
        probe: "stty size",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "33 101"),
    };
    cwd => Case {
        checks: "the process starts there",
        fields: &["process.cwd"],
        sets: json!({"process": {"cwd": "/links/etc"}}),
        probe: "pwd -P; ls passwd",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "/etc\npasswd"),
    };
    cwd_is_made => Case {
        checks: "a directory that is missing is made, for root",
        fields: &["process.cwd"],
        sets: json!({"process": {"cwd": "/made/for/it", "user": {"uid": 33, "gid": 33}}}),
        probe: "pwd -P; stat -c '%a %u %g' . ..",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "/made/for/it\n755 0 0\n755 0 0"),
    };
    env => Case {
        checks: "the environment is this, and HOME by /etc/passwd",
        fields: &["process.env"],
        sets: json!({"process": {"env+": ["EMPTY=", "SPACES=a  b", "EQUALS=a=b", "UTF8=ü"]}}),
        probe: "tr '\\0' '\\n' < /proc/1/environ | sort",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "EMPTY=\nEQUALS=a=b\nHOME=/root\nPATH=/bin\nSPACES=a  b\nUTF8=ü",
        ),
    };
    args => Case {
        checks: "the arguments are exactly these; the program is looked up in PATH",
        fields: &["process.args"],
        sets: json!({"process": {"args": ["printf", "<%s>", "a b", "", "*", "\"$HOME\\"]}}),
        probe: "",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "<a b><><*><\"$HOME\\>"),
    };
    exit_code => Case {
        checks: "the exit code is the process's",
        fields: &["process.args"],
        sets: json!({"process": {"args": ["sh", "-c", "echo ends; exit 42"]}}),
        probe: "",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "ends\nexit 42"),
    };
    command_line => Case {
        checks: "the create fails",
        fields: &["process.commandLine"],
        sets: json!({"process": {"commandLine": "cmd.exe"}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "process.commandLine", why: "of Windows only" },
    };
    rlimits => Case {
        checks: "/proc/PID/limits has every kind, with its soft and hard limit",
        fields: &["process.rlimits[]"],
        sets: json!({"process": {"rlimits": [
            {"type": "RLIMIT_CPU", "soft": 1000, "hard": 2000},
            {"type": "RLIMIT_FSIZE", "soft": 100_000_000, "hard": 200_000_000},
            {"type": "RLIMIT_DATA", "soft": 300_000_000, "hard": 400_000_000},
            {"type": "RLIMIT_STACK", "soft": 8_000_000, "hard": 9_000_000},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
            {"type": "RLIMIT_RSS", "soft": 10_000_000, "hard": 20_000_000},
            {"type": "RLIMIT_NPROC", "soft": 5000, "hard": 6000},
            {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99},
            {"type": "RLIMIT_MEMLOCK", "soft": 65_536, "hard": 131_072},
            {"type": "RLIMIT_AS", "soft": 500_000_000, "hard": 18_446_744_073_709_551_615_u64},
            {"type": "RLIMIT_LOCKS", "soft": 11, "hard": 12},
            {"type": "RLIMIT_SIGPENDING", "soft": 1300, "hard": 1400},
            {"type": "RLIMIT_MSGQUEUE", "soft": 15_000, "hard": 16_000},
            {"type": "RLIMIT_NICE", "soft": 17, "hard": 18},
            {"type": "RLIMIT_RTPRIO", "soft": 19, "hard": 20},
            {"type": "RLIMIT_RTTIME", "soft": 2_100_000, "hard": 2_200_000},
        ]}}),
        probe: "sed -e 1d -e 's/  *\\([0-9a-z]*\\)  *\\([0-9a-z]*\\)  *[a-z]* *$/ \\1 \\2/' /proc/1/limits",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "Max cpu time*1000 2000\n\
             Max file size*100000000 200000000\n\
             Max data size*300000000 400000000\n\
             Max stack size*8000000 9000000\n\
             Max core file size*0 4096\n\
             Max resident set*10000000 20000000\n\
             Max processes*5000 6000\n\
             Max open files*77 99\n\
             Max locked memory*65536 131072\n\
             Max address space*500000000 unlimited\n\
             Max file locks*11 12\n\
             Max pending signals*1300 1400\n\
             Max msgqueue size*15000 16000\n\
             Max nice priority*17 18\n\
             Max realtime priority*19 20\n\
             Max realtime timeout*2100000 2200000",
        ),
    };
    rlimit_twice => Case {
        checks: "the create fails, as the specification demands",
        fields: &["process.rlimits[]"],
        sets: json!({"process": {"rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99},
            {"type": "RLIMIT_NOFILE", "soft": 78, "hard": 99},
        ]}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "process.rlimits[1]", why: "given twice" },
    };
    rlimit_unknown => Case {
        checks: "the create fails, as the specification demands",
        fields: &["process.rlimits[]"],
        sets: json!({"process": {"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named: "process.rlimits[0]", why: "not of Linux" },
    };
    apparmor_profile => Case {
        checks: "the create fails",
        fields: &["process.apparmorProfile"],
        sets: json!({"process": {"apparmorProfile": "docker-default"}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused {
            named: "process.apparmorProfile",
            why: "the guest's kernel has no AppArmor",
        },
    };
    selinux_label => Case {
        checks: "the create fails",
        fields: &["process.selinuxLabel"],
        sets: json!({"process": {"selinuxLabel": "system_u:system_r:container_t:s0"}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused {
            named: "process.selinuxLabel",
            why: "the guest's kernel has no SELinux",
        },
    };
    capabilities => Case {
        checks: "each of the five sets is exactly this",
        fields: &["process.capabilities."],
        sets: json!({"process": {"capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE"],
            "permitted": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN"],
            "effective": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
            "ambient": ["CAP_KILL"],
        }}}),
        probe: "grep ^Cap /proc/1/status",
        needs: &[],
        // A program of root's gets all that is inheritable or in the bounding set.
        expect: Expect::Same(
            Reference::Runc,
            "CapInh:\t0000000000002020\nCapPrm:\t*\nCapEff:\t*\n\
             CapBnd:\t0000010000002021\nCapAmb:\t0000000000000020",
        ),
    };
    capabilities_of_a_user => Case {
        checks: "another user's process has the ambient set, through its program's start",
        fields: &["process.capabilities."],
        sets: json!({"process": {"user": {"uid": 33, "gid": 33}, "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "permitted": ["CAP_KILL", "CAP_NET_RAW"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
            "ambient": ["CAP_KILL"],
        }}}),
        probe: "grep ^Cap /proc/1/status",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "CapInh:\t0000000000002020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
             CapBnd:\t0000000000002021\nCapAmb:\t0000000000000020",
        ),
    };
    no_capabilities => Case {
        checks: "empty sets leave none",
        fields: &["process.capabilities."],
        sets: json!({"process": {"capabilities": {
            "bounding": [], "permitted": [], "effective": [], "inheritable": [], "ambient": [],
        }}}),
        probe: "grep ^Cap /proc/1/status",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
             CapBnd:\t0000000000000000\nCapAmb:\t0000000000000000",
        ),
    };
    capability_of_no_name => Case {
        checks: "the create fails",
        fields: &["process.capabilities.bounding"],
        sets: json!({"process": {"capabilities": {"bounding": ["CAP_KILL", "CAP_OF_THE_FUTURE"]}}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused {
            named: "process.capabilities.bounding",
            why: "runc warns of a name that it does not know and goes on without it; a program that \
                  silently lacks what it asked for is harder to understand than an error",
        },
    };
    no_new_privileges => Case {
        checks: "no_new_privs is set",
        fields: &["process.noNewPrivileges"],
        sets: json!({"process": {"noNewPrivileges": true}}),
        probe: "grep ^NoNewPrivs /proc/1/status",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "NoNewPrivs:\t1"),
    };
    new_privileges => Case {
        checks: "no_new_privs is not set",
        fields: &["process.noNewPrivileges"],
        sets: json!({"process": {"noNewPrivileges": false}}),
        probe: "grep ^NoNewPrivs /proc/1/status",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "NoNewPrivs:\t0"),
    };
    oom_score_adj => Case {
        checks: "/proc/PID/oom_score_adj has it",
        fields: &["process.oomScoreAdj"],
        sets: json!({"process": {"oomScoreAdj": 321}}),
        probe: "cat /proc/1/oom_score_adj",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "321"),
    };
    scheduler_other => scheduled(
        &["process.scheduler.policy", "process.scheduler.nice"],
        &json!({"policy": "SCHED_OTHER", "nice": 5}),
        "25 5 0 0\n25 5 0 0",
    );
    scheduler_batch => scheduled(
        &["process.scheduler.policy", "process.scheduler.nice"],
        &json!({"policy": "SCHED_BATCH", "nice": -3}),
        "17 -3 0 3\n17 -3 0 3",
    );
    scheduler_idle => scheduled(
        &["process.scheduler.policy"],
        &json!({"policy": "SCHED_IDLE"}),
        "20 0 0 5\n20 0 0 5",
    );
    scheduler_fifo => scheduled(
        &[
            "process.scheduler.policy", "process.scheduler.priority", "process.scheduler.flags",
        ],
        &json!({"policy": "SCHED_FIFO", "priority": 10, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
        "-11 0 10 1\n20 0 0 0",
    );
    scheduler_rr => scheduled(
        &["process.scheduler.policy", "process.scheduler.priority"],
        &json!({"policy": "SCHED_RR", "priority": 7}),
        "-8 0 7 2\n-8 0 7 2",
    );
    scheduler_deadline => Case {
        expect: Expect::Alone {
            prints: "-101 0 0 6\n20 0 0 0",
            why: "crun 1.21 goes on to change the affinity, which the kernel then refuses",
        },
        ..scheduled(
            &[
                "process.scheduler.policy", "process.scheduler.runtime",
                "process.scheduler.deadline", "process.scheduler.period",
                "process.scheduler.flags",
            ],
            &json!({
                "policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 50_000_000,
                "period": 100_000_000,
                "flags":
                    ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_RECLAIM", "SCHED_FLAG_DL_OVERRUN"],
            }),
            "",
        )
    };
    scheduler_kept => scheduled(
        &["process.scheduler.policy", "process.scheduler.flags"],
        &json!({
            "policy": "SCHED_OTHER", "nice": 5,
            "flags": ["SCHED_FLAG_KEEP_POLICY", "SCHED_FLAG_KEEP_PARAMS"],
        }),
        "20 0 0 0\n20 0 0 0",
    );
    scheduler_iso => refused(
        &["process.scheduler.policy"],
        &json!({"scheduler": {"policy": "SCHED_ISO"}}),
        "process.scheduler.policy",
        "Linux does not have it",
    );
    scheduler_clamped => refused(
        &["process.scheduler.flags"],
        &json!({"scheduler": {"policy": "SCHED_OTHER", "flags": [
            "SCHED_FLAG_UTIL_CLAMP_MIN", "SCHED_FLAG_UTIL_CLAMP_MAX",
        ]}}),
        "process.scheduler.flags",
        "the specification has no field for the value to clamp to",
    );
    io_priority => prioritised("IOPRIO_CLASS_BE", 6, "best-effort: prio 6");
    io_priority_realtime => prioritised("IOPRIO_CLASS_RT", 2, "realtime: prio 2");
    io_priority_idle => prioritised("IOPRIO_CLASS_IDLE", 0, "idle*");
    exec_cpu_affinity => Case {
        checks: "without effect on the container's first process",
        fields: &["process.execCPUAffinity."],
        sets: json!({"process": {"execCPUAffinity": {"initial": "0", "final": "0"}}}),
        probe: "grep ^Cpus_allowed_list /proc/1/status",
        needs: &[],
        expect: Expect::Same(Reference::Runc, "Cpus_allowed_list:\t*"),
    };
    user => Case {
        checks: "all user and group IDs of the process, its further groups, its umask",
        fields: &[
            "process.user.uid", "process.user.gid", "process.user.umask",
            "process.user.additionalGids",
        ],
        sets: json!({"process": {"user": {
            "uid": 33, "gid": 34, "umask": 0o27, "additionalGids": [35, 1000, 36],
        }}}),
        probe: "grep -E '^(Uid|Gid|Groups|Umask)' /proc/1/status",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "Umask:\t0027\nUid:\t33\t33\t33\t33\nGid:\t34\t34\t34\t34\nGroups:\t35 36 1000 ",
        ),
    };
    user_without_umask => Case {
        checks: "a number that nobody in the image has; without a umask it is 0022",
        fields: &["process.user.uid", "process.user.gid"],
        sets: json!({"process": {"user": {"uid": 4242, "gid": 4243}}}),
        probe: "grep -E '^(Uid|Gid|Groups|Umask)' /proc/1/status; echo $HOME",
        needs: &[],
        expect: Expect::Same(
            Reference::Runc,
            "Umask:\t0022\nUid:\t4242\t4242\t4242\t4242\nGid:\t4243\t4243\t4243\t4243\nGroups:\t \n/",
        ),
    };
    username => Case {
        checks: "the image's own /etc/passwd and /etc/group say who it is",
        fields: &["process.user.username"],
        sets: json!({"process": {"user": {"uid": 0, "gid": 0, "username": "w"}}}),
        probe: "id -u; id -G",
        needs: &[],
        expect: Expect::Differs {
            reference: Reference::Runc,
            husk: "33\n33 44",
            other: "0\n0",
            why: "elsewhere of Windows only; husk's engine never reads an image's files on the host",
        },
    };
}

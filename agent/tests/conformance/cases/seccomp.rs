//! Filters of system calls.

use serde_json::{Value, json};

use super::rows;
use crate::case::{Case, Expect, Reference};

fn filtered(
    reference: Reference,
    checks: &'static str,
    fields: &'static [&'static str],
    seccomp: &Value,
    probe: &'static str,
    prints: &'static str,
) -> Case {
    Case {
        checks,
        fields,
        // With it the filter is the last thing before the program, in every runtime.
        sets: json!({"process": {"noNewPrivileges": true}, "linux": {"seccomp": seccomp}}),
        probe,
        needs: &[],
        expect: Expect::Same(reference, prints),
    }
}

fn refused(
    fields: &'static [&'static str],
    seccomp: &Value,
    named: &'static str,
    why: &'static str,
) -> Case {
    Case {
        checks: "the create fails",
        fields,
        sets: json!({"linux": {"seccomp": seccomp}}),
        probe: "",
        needs: &[],
        expect: Expect::Refused { named, why },
    }
}

/// What the shell and its programs need.
const NEEDED: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "chdir",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "eventfd2",
    "execve",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fcntl",
    "fork",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getrandom",
    "gettid",
    "gettimeofday",
    "getuid",
    "ioctl",
    "kill",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "pipe",
    "pipe2",
    "poll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "sendfile",
    "set_robust_list",
    "set_tid_address",
    "setpgid",
    "sigaltstack",
    "stat",
    "statfs",
    "statx",
    "sysinfo",
    "tgkill",
    "time",
    "umask",
    "uname",
    "vfork",
    "wait4",
    "write",
    "writev",
];

rows! {
    actions => filtered(
        Reference::Runc,
        "each action: an error, death of the program, a signal, no tracer, a log",
        &[
            "linux.seccomp.defaultAction", "linux.seccomp.syscalls[].names",
            "linux.seccomp.syscalls[].action", "linux.seccomp.syscalls[].errnoRet",
        ],
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["unlink", "unlinkat"], "action": "SCMP_ACT_KILL"},
                {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["link", "linkat"], "action": "SCMP_ACT_KILL_THREAD"},
                {"names": ["rename", "renameat", "renameat2"], "action": "SCMP_ACT_TRAP"},
                {"names": ["mknod", "mknodat"], "action": "SCMP_ACT_TRACE", "errnoRet": 5},
                {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_LOG"},
                {"names": ["utimensat", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            ]}),
        "echo > /tmp/f; mkdir /tmp/d 2>&1; rmdir /tmp 2>&1; rm /tmp/f 2> /dev/null; echo $?; \
         ln -s a /tmp/l 2> /dev/null; echo $?; ln /tmp/f /tmp/g 2> /dev/null; echo $?; \
         mv /tmp/f /tmp/g 2> /dev/null; echo $?; mknod /tmp/p p 2>&1; \
         chmod 600 /tmp/f; echo $?; touch /tmp/f; echo $?; grep ^Seccomp: /proc/1/status",
        "mkdir: can't create directory '/tmp/d': No space left on device\n\
         rmdir: '/tmp': Operation not permitted\n159\n159\n159\n159\n\
         mknod: /tmp/p: Function not implemented\n0\n0\nSeccomp:\t2",
    );
    default_action => filtered(
        Reference::Runc,
        "what no rule allows fails with the profile's own number",
        &["linux.seccomp.defaultAction", "linux.seccomp.defaultErrnoRet"],
        &json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 28,
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": NEEDED, "action": "SCMP_ACT_ALLOW"}]}),
        "mkdir /tmp/d 2>&1; grep ^Seccomp: /proc/1/status",
        "mkdir: can't create directory '/tmp/d': No space left on device\nSeccomp:\t2",
    );
    conditions => filtered(
        Reference::Runc,
        "every comparison, with the value below, at and above; all conditions of a rule must hold",
        &["linux.seccomp.syscalls[].args[]"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                kill(1_000_001, "SCMP_CMP_NE", 5, 0),
                kill(1_000_002, "SCMP_CMP_LT", 5, 0),
                kill(1_000_003, "SCMP_CMP_LE", 5, 0),
                kill(1_000_004, "SCMP_CMP_EQ", 5, 0),
                kill(1_000_005, "SCMP_CMP_GE", 5, 0),
                kill(1_000_006, "SCMP_CMP_GT", 5, 0),
                kill(1_000_007, "SCMP_CMP_MASKED_EQ", 6, 4),
            ]}),
        "for p in 1 2 3 4 5 6 7; do for s in 4 5 6; do \
           case $(kill -$s 100000$p 2>&1) in *permitted*) echo $p $s;; esac; done; done",
        "1 4\n1 6\n2 4\n3 4\n3 5\n4 5\n5 5\n5 6\n6 6\n7 4\n7 5",
    );
    architectures_and_flags => filtered(
        Reference::Crun,
        "accepted; the filter is there once",
        &["linux.seccomp.architectures", "linux.seccomp.flags"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "flags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG",
                          "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}),
        "mkdir /tmp/d 2>&1; grep ^Seccomp /proc/1/status",
        "mkdir: can't create directory '/tmp/d': Operation not permitted\n\
         Seccomp:\t2\nSeccomp_filters:\t1",
    );
    notification => refused(
        &["linux.seccomp.syscalls[].action"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"},
        ]}),
        "linux.seccomp.syscalls[0].action",
        "nobody in the guest answers",
    );
    notification_of_the_killed => refused(
        &["linux.seccomp.flags"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW",
                "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
        "linux.seccomp.flags",
        "it needs notification",
    );
    listener => refused(
        &["linux.seccomp.listenerPath"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/seccomp.sock"}),
        "linux.seccomp.listenerPath",
        "nobody in the guest answers",
    );
    listener_metadata => refused(
        &["linux.seccomp.listenerMetadata"],
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}),
        "linux.seccomp.listenerMetadata",
        "nobody in the guest answers",
    );
}

/// A rule for a signal to a process that does not exist: refused rather than not found.
fn kill(pid: u32, op: &str, value: u32, second: u32) -> Value {
    json!({"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [
        {"index": 0, "value": pid, "op": "SCMP_CMP_EQ"},
        {"index": 1, "value": value, "valueTwo": second, "op": op},
    ]})
}

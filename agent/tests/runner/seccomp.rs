//! `linux.seccomp`, as the container's processes meet it.

use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec, exec_process};

/// Signal 31 is SIGSYS.
const KILLED_BY_FILTER: (u32, u32) = (128 + 31, 31);

fn with_profile(args: &[&str], profile: Value) -> Value {
    let mut spec = base_spec(args);
    spec["linux"]["seccomp"] = profile;
    spec
}

/// Everything is allowed but one call, which answers EOPNOTSUPP.
fn all_but(name: &str) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW",
           "syscalls": [{"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]})
}

#[tokio::test]
async fn a_profile_holds_for_the_container_and_its_execs() {
    let guest = Guest::boot().await;
    let script = "mkdir /tmp/x; grep ^Seccomp /proc/self/status";
    let expected = "Seccomp:\t2\nSeccomp_filters:\t1\n";
    for (id, privileges, uid) in [("a", false, 33), ("b", true, 33), ("c", false, 0)] {
        let mut spec = with_profile(&["sh", "-c", script], all_but("mkdir"));
        spec["process"]["noNewPrivileges"] = json!(privileges);
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        let run = guest.run_with(id, spec, Options::default()).await;
        assert_eq!(run.stdout, expected, "{}", run.stderr);
        assert!(run.stderr.contains("Operation not supported"), "{}", run.stderr);
    }
    let spec = with_profile(&["sleep", "1000"], all_but("mkdir"));
    guest.start("d", spec, Options::default()).await;
    let run = guest.exec("d", "e", exec_process(&["sh", "-c", script])).await.unwrap();
    assert_eq!(run.stdout, expected, "{}", run.stderr);
    assert!(run.stderr.contains("Operation not supported"), "{}", run.stderr);
}

#[tokio::test]
async fn installing_a_filter_gives_no_capability_away() {
    let guest = Guest::boot().await;
    let script = "grep ^Cap /proc/self/status | cut -f2 | tr '\\n' ' '";
    for (id, uid) in [("a", 0), ("b", 33)] {
        let mut spec = with_profile(&["sh", "-c", script], all_but("mkdir"));
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"],
            "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]});
        let run = guest.run_with(id, spec.clone(), Options::default()).await;
        spec["linux"].as_object_mut().unwrap().remove("seccomp");
        let without = guest.run_with(&format!("{id}-without"), spec, Options::default()).await;
        assert_eq!(run.stdout, without.stdout, "{}", run.stderr);
    }
}

#[tokio::test]
async fn a_profile_need_not_allow_what_only_the_start_needs() {
    let guest = Guest::boot().await;
    // What a static busybox needs to say something, and nothing of what makes a container: not
    // setresuid, setgroups, capset, chdir or faccessat, for instance.
    let names = [
        "execve",
        "brk",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "mprotect",
        "write",
        "exit_group",
        "getuid",
        "uname",
        "getgid",
        "setuid",
        "newfstatat",
        "prctl",
        "setgid",
    ];
    let profile = json!({"defaultAction": "SCMP_ACT_KILL_PROCESS",
                         "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}]});
    for (id, privileges) in [("a", false), ("b", true)] {
        let mut spec = with_profile(&["echo", "hello"], profile.clone());
        spec["process"]["noNewPrivileges"] = json!(privileges);
        spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        let run = guest.run_with(id, spec, Options::default()).await;
        assert_eq!((run.stdout.as_str(), run.exit.exit_code), ("hello\n", 0), "{}", run.stderr);
    }
}

#[tokio::test]
async fn a_forbidden_call_kills_if_the_profile_says_so() {
    let guest = Guest::boot().await;
    for (id, action) in
        [("a", "SCMP_ACT_KILL"), ("b", "SCMP_ACT_KILL_PROCESS"), ("c", "SCMP_ACT_TRAP")]
    {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW",
                             "syscalls": [{"names": ["mkdir"], "action": action}]});
        let spec = with_profile(&["mkdir", "/tmp/x"], profile);
        let run = guest.run_with(id, spec, Options::default()).await;
        assert_eq!((run.exit.exit_code, run.exit.signal), KILLED_BY_FILTER, "{action}");
    }
}

#[tokio::test]
async fn arguments_are_compared() {
    let guest = Guest::boot().await;
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{
        "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
        "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                 {"index": 1, "value": 0, "op": "SCMP_CMP_GT"}],
    }]});
    let script = "kill -0 1 && echo 0; kill -10 1; kill -10 999";
    let run = guest.run_with("a", with_profile(&["sh", "-c", script], profile), Options::default());
    let run = run.await;
    assert_eq!(run.stdout, "0\n");
    let errors: Vec<&str> = run.stderr.lines().collect();
    assert!(errors[0].contains("Operation not supported"), "{}", run.stderr);
    assert!(errors[1].contains("No such process"), "{}", run.stderr);
}

#[tokio::test]
async fn a_program_that_the_profile_does_not_let_start_fails_at_start() {
    let guest = Guest::boot().await;
    let spec = with_profile(&["true"], all_but("execve"));
    guest.create("a", spec, Options::default()).await;
    let failure = guest.try_start("a").await.unwrap().unwrap_err();
    assert_eq!(failure.exit_code, 126);
    assert!(failure.message.contains("exec /bin/true"), "{}", failure.message);
    assert!(guest.nothing_left("a"));
}

/// A program of i386 that makes the call mkdir("/tmp", 0) and exits with the error's number.
fn i386_program() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let code: &[u8] = &[
        0xb8, 39, 0, 0, 0, // mov eax, mkdir
        0xbb, 0, 0, 0, 0, // mov ebx, path
        0x31, 0xc9, // xor ecx, ecx
        0xcd, 0x80, // int 0x80
        0xf7, 0xd8, // neg eax
        0x89, 0xc3, // mov ebx, eax
        0xb8, 1, 0, 0, 0, // mov eax, exit
        0xcd, 0x80, // int 0x80
    ];
    let mut code = code.to_vec();
    let path = BASE + HEADERS + u32::try_from(code.len()).unwrap();
    code[6..10].copy_from_slice(&path.to_le_bytes());
    code.extend(b"/tmp\0");
    let size = HEADERS + u32::try_from(code.len()).unwrap();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    };
    let word = |file: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    };
    // ET_EXEC, EM_386
    half(&mut file, &[2, 3]);
    word(&mut file, &[1, BASE + HEADERS, 52, 0, 0]);
    half(&mut file, &[52, 32, 1, 0, 0, 0]);
    // PT_LOAD, readable and executable
    word(&mut file, &[1, 0, BASE, BASE, size, size, 5, 4096]);
    file.extend(code);
    file
}

#[tokio::test]
async fn a_32_bit_program_is_confined_too() {
    let guest = Guest::boot().await;
    let script = "cat > /tmp/x && chmod 755 /tmp/x && exec /tmp/x";
    let run = async |id: &str, profile: Value| {
        let options = Options { stdin: Some(i386_program()), ..Options::default() };
        guest.run_with(id, with_profile(&["sh", "-c", script], profile), options).await.exit
    };
    let mut profile = all_but("mkdir");
    profile["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    assert_eq!(run("a", profile.clone()).await.exit_code, 95);
    profile["syscalls"] = json!([]);
    assert_eq!(run("b", profile.clone()).await.exit_code, 17, "EEXIST: it is let through");
    profile["architectures"] = json!(["SCMP_ARCH_X86_64"]);
    let exit = run("c", profile).await;
    assert_eq!((exit.exit_code, exit.signal), KILLED_BY_FILTER);
}

#[tokio::test]
async fn a_profile_that_cannot_be_honoured_is_refused_and_leaves_nothing() {
    let guest = Guest::boot().await;
    let many: Vec<Value> = (0..3000)
        .map(|value| {
            json!({"names": ["ioctl"], "action": "SCMP_ACT_ERRNO",
                   "args": [{"index": 1, "value": value, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();
    for (profile, words) in [
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}), "listenerPath"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": many}), "4096 instructions"),
    ] {
        let spec = with_profile(&["true"], profile);
        let error = guest.try_create("refused", spec, Options::default()).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(words), "{error}");
        assert!(guest.nothing_left("refused"));
    }
}

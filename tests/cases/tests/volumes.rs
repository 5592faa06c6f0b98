//! Volumes of pods that run: what is changed while programs look, and what they share with the host.
//! The guest half of each test is its manifest. Few pods that do much each: a start takes seconds on
//! an emulated host.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cases::background::{Pod, text};
use husk_cases::pods::Husk;

/// Nothing here depends on a time; this only ends what hangs.
const LIMIT: Duration = Duration::from_secs(400);

/// Waits until a pod's log has this line.
fn says(pod: &Pod, line: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let log = pod.ok(&["logs", pod.name])?;
        if log.lines().any(|said| said == line) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it never says {line}:\n{log}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Runs a shell script in a pod's first container; what it prints.
fn sh(pod: &Pod, script: &str) -> Result<String> {
    pod.ok(&["exec", pod.name, "--", "sh", "-c", script])
}

/// How often the ConfigMap is changed.
const UPDATES: usize = 1000;

/// Watches a volume as programs do that read their configuration anew: by inotify, for the link
/// `..data`. Whenever it moves, the files behind it are complete, of one update, and at least as new
/// as the move.
const WATCHER: &str = r#"
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
watch = libc.inotify_init()
IN_MOVED_TO = 0x80
assert libc.inotify_add_watch(watch, b"/config", IN_MOVED_TO) >= 0

def content():
    while True:
        try:
            data = os.open("/config/..data", os.O_RDONLY | os.O_DIRECTORY)
            try:
                read = lambda name: open(os.open(name, os.O_RDONLY, dir_fd=data)).read()
                first, second = read("one"), read("other")
            finally:
                os.close(data)
        except FileNotFoundError:
            continue  # Replaced by the next update meanwhile.
        assert first == second, (first, second)
        return int(first)

assert content() == 0
print("watching", flush=True)
moves, last = 0, 0
while last < UPDATES or moves < UPDATES:
    buffer = os.read(watch, 65536)
    while buffer:
        _, mask, _, length = struct.unpack_from("iIII", buffer)
        name = buffer[16:16 + length].rstrip(b"\0")
        buffer = buffer[16 + length:]
        assert not mask & 0x4000, "the queue overflowed"
        if name == b"..data":
            moves += 1
            now = content()
            assert now >= moves and now >= last, (moves, last, now)
            last = now
print("moves", moves, "last", last, flush=True)
print("env", os.environ["NUMBER"], "part", open("/part").read(), flush=True)
import time
time.sleep(3600)
"#;

/// The ConfigMap as it is after this many updates.
fn numbered(n: usize) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: numbered}}\ndata: {{one: '{n}', other: '{n}'}}\n"
    )
}

#[test]
fn a_watcher_sees_every_one_of_a_thousand_updates_and_each_complete() -> Result<()> {
    let mut own = String::from(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: watched, labels: {v: a}}\nspec:\n  \
         containers:\n  - name: main\n    image: localhost/husk/debian:test\n    \
         env: [{name: NUMBER, valueFrom: {configMapKeyRef: {name: numbered, key: one}}}]\n    \
         volumeMounts:\n    - {name: config, mountPath: /config}\n    \
         - {name: config, mountPath: /part, subPath: one}\n    \
         - {name: pod, mountPath: /pod}\n    \
         command: [python3, -c]\n    args:\n    - |\n",
    );
    for line in WATCHER.replace("UPDATES", &UPDATES.to_string()).lines() {
        writeln!(own, "      {line}")?;
    }
    own += "  volumes:\n  - {name: config, configMap: {name: numbered}}\n  \
            - name: pod\n    projected:\n      sources:\n      \
            - downwardAPI: {items: [{path: v, fieldRef: {fieldPath: \"metadata.labels['v']\"}}]}\n      \
            - secret: {name: later, optional: true}\n";
    let pod = Pod::of("watched", &format!("{}{own}", numbered(0)), &[])?;
    says(&pod, "watching")?;

    let directory = tempfile::tempdir()?;
    let mut files = Vec::new();
    for n in 1..=UPDATES {
        let path = directory.path().join(format!("{n}.yaml"));
        fs::write(&path, numbered(n))?;
        files.push(path.to_str().context("not UTF-8")?.to_owned());
    }
    let mut args = vec!["apply", "--pod", "watched"];
    args.extend(files.iter().map(String::as_str));
    let told = pod.ok(&args)?;
    ensure!(told.lines().count() == UPDATES, "{told}");
    ensure!(told.lines().all(|line| line == "default/watched: volume config updated"), "{told}");
    says(&pod, &format!("moves {UPDATES} last {UPDATES}"))?;
    // What Kubernetes does not update either.
    says(&pod, "env 0 part 0")?;

    // Labels, and an object that was not there at the start.
    let path = directory.path().join("more.yaml");
    let path = path.to_str().context("not UTF-8")?;
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: later}\nstringData: {k: secret}\n";
    fs::write(path, format!("{secret}{}", own.replace("labels: {v: a}", "labels: {v: b}")))?;
    ensure!(
        pod.ok(&["apply", "--pod", "watched", path])? == "default/watched: volume pod updated\n"
    );
    ensure!(sh(&pod, "cat /pod/v /pod/k; ls /pod; ls -A /config | wc -l")? == "bsecretk\nv\n4\n");
    // A process that is started beside has the container's environment.
    ensure!(sh(&pod, "echo $NUMBER")? == "0\n");

    fs::write(path, own.replace("metadata: {name: watched", "metadata: {name: watched, uid: u"))?;
    let refused = pod.husk.output(&["apply", "--pod", "watched", path])?;
    let why = text(&refused.stderr);
    ensure!(
        refused.status.code() == Some(1) && why.contains("metadata.uid: u: must stay"),
        "{why}"
    );
    Ok(())
}

/// Mounts inside a volume: one that is there when the other containers start, and one that comes later.
const MOUNTS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  volumes:
  - {name: v, emptyDir: {}}
  - {name: parts, emptyDir: {}}
  - {name: limited, emptyDir: {sizeLimit: 32Mi}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 32Mi}}
  initContainers:
  - name: giver
    image: localhost/husk/busybox:test
    restartPolicy: Always
    securityContext: {privileged: true}
    command:
    - sh
    - -c
    - |
      mkdir /v/sub /v/late && mount -t tmpfs sub /v/sub && echo early > /v/sub/f && touch /v/early
      until [ -e /v/go ]; do sleep 0.1; done
      mount -t tmpfs late /v/late && echo late > /v/late/f && touch /v/done
      sleep 3600
    startupProbe: {exec: {command: [test, -e, /v/early]}, periodSeconds: 1, failureThreshold: 100}
    volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]
  containers:
  - name: slave
    image: localhost/husk/busybox:test
    command: [sh, -c, 'touch /v/go; until [ -e /v/done ]; do sleep 0.1; done; cat /v/sub/f /v/late/f']
    volumeMounts: [{name: v, mountPath: /v, mountPropagation: HostToContainer}]
  - name: private
    image: localhost/husk/busybox:test
    command: [sh, -c, 'until [ -e /v/done ]; do sleep 0.1; done; cat /v/sub/f; ls /v/late']
    volumeMounts: [{name: v, mountPath: /v}]
  - name: reader
    image: localhost/husk/busybox:test
    env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
    command:
    - sh
    - -c
    - |
      for f in /flat/x /flat/sub/x /deep/x /deep/sub/x; do
        if touch $f 2>/dev/null; then echo $f; else echo no $f; fi
      done
      touch /part/x; ls /parts/of-case
      df -k /limited /memory | awk 'NR > 1 {print $2, $4}'
    volumeMounts:
    - {name: v, mountPath: /flat, readOnly: true}
    - {name: v, mountPath: /deep, readOnly: true, recursiveReadOnly: Enabled}
    - {name: parts, mountPath: /parts}
    - {name: parts, mountPath: /part, subPathExpr: of-$(POD)}
    - {name: limited, mountPath: /limited}
    - {name: memory, mountPath: /memory}
"#;

#[test]
fn mounts_inside_a_volume_spread_and_are_read_only_as_they_are_told() -> Result<()> {
    let pod = Husk::shared()?.run(MOUNTS)?.succeeded()?;
    assert_eq!(pod.log("slave"), ["early", "late"], "{}", pod.text);
    assert_eq!(pod.log("private"), ["early"], "{}", pod.text);
    let log = pod.log("reader");
    let (sizes, rest) = (log.get(5..).unwrap_or_default(), log.get(..5).unwrap_or_default());
    assert_eq!(rest, ["no /flat/x", "/flat/sub/x", "no /deep/x", "no /deep/sub/x", "x"]);
    // What fits before ENOSPC: of a disk what its limit says, but for a few blocks.
    let [disk, memory] = sizes else { anyhow::bail!("{log:?}") };
    assert_eq!(*memory, "32768 32768");
    let free = |line: &str| line.split_once(' ')?.1.parse::<u64>().ok();
    let free = free(disk).context("no number")?;
    assert!((30 << 10..=32 << 10).contains(&free), "{disk}");
    Ok(())
}

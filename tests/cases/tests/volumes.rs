//! Volumes of pods that run: what is changed while programs look, and what they share with the host.
//! The guest half of each test is its manifest. Few pods that do much each: a start takes seconds on
//! an emulated host.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;
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

/// A user without rights and a privileged one, on directories and a file of the host. `DIR` is the
/// test's directory there.
const HOSTED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: hosted}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 7000, supplementalGroups: [4000]}
  volumes:
  - {name: new, hostPath: {path: DIR/new/deep, type: DirectoryOrCreate}}
  - {name: data, hostPath: {path: DIR/data, type: Directory}}
  - {name: file, hostPath: {path: DIR/file, type: FileOrCreate}}
  - {name: fixed, hostPath: {path: DIR/fixed}}
  containers:
  - name: user
    image: localhost/husk/busybox:test
    command: [sleep, '3600']
    securityContext: {runAsUser: 1000, runAsGroup: 1000}
    volumeMounts:
    - {name: data, mountPath: /data}
    - {name: fixed, mountPath: /fixed, readOnly: true}
  - name: root
    image: localhost/husk/busybox:test
    command: [sleep, '3600']
    securityContext: {privileged: true}
    volumeMounts:
    - {name: new, mountPath: /new}
    - {name: new, mountPath: /part, subPath: a/b}
    - {name: data, mountPath: /data, readOnly: true}
    - {name: file, mountPath: /file}
    - {name: fixed, mountPath: /fixed, readOnly: true}
"#;

#[test]
fn files_of_the_host_are_shared_both_ways_with_their_owners_and_no_further() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let mode = |name: &str, mode| fs::set_permissions(at(name), fs::Permissions::from_mode(mode));
    for name in ["data", "fixed"] {
        fs::create_dir(at(name))?;
    }
    // The user reaches it by its supplementary group alone.
    chown(at("data"), None, Some(4000))?;
    mode("data", 0o2770)?;
    fs::write(at("data/greeting"), "from the host\n")?;
    fs::write(at("fixed/f"), "fixed\n")?;
    fs::write(at("secret"), "beside the share\n")?;
    symlink(at("secret"), at("data/link"))?;
    symlink("../secret", at("data/up"))?;
    let manifest = HOSTED.replace("DIR", directory.path().to_str().context("not UTF-8")?);
    let pod = Pod::of("hosted", &manifest, &[])?;
    let user = |script: &str| pod.ok(&["exec", "-c", "user", "hosted", "--", "sh", "-c", script]);
    let root = |script: &str| pod.ok(&["exec", "-c", "root", "hosted", "--", "sh", "-c", script]);

    let said = user("cat /data/greeting; echo mine > /data/mine; stat -c '%u %g' /data/mine")?;
    ensure!(said == "from the host\n1000 4000\n", "{said}");
    ensure!(fs::read_to_string(at("data/mine"))? == "mine\n");
    let made = fs::metadata(at("data/mine"))?;
    ensure!((made.uid(), made.gid()) == (1000, 4000), "{made:?}");
    // As in Kubernetes, an fsGroup does not concern what is the host's.
    let data = fs::metadata(at("data"))?;
    ensure!((data.gid(), data.mode() & 0o7777) == (4000, 0o2770), "{data:?}");

    let said =
        root("echo more >> /file; echo part > /part/f; cat /new/a/b/f; touch /new/x && echo x")?;
    ensure!(said == "part\nx\n", "{said}");
    ensure!(fs::read_to_string(at("file"))? == "more\n");
    ensure!(fs::read_to_string(at("new/deep/a/b/f"))? == "part\n");
    fs::write(at("new/deep/later"), "later\n")?;
    pod.until("what the host writes later", |_| {
        Ok(root("cat /new/later 2>/dev/null || true")? == "later\n")
    })?;

    // A container's own rights do not make writable what the pod may only read.
    let script = "touch /fixed/x 2>/dev/null || echo no; mount -o remount,bind,rw /fixed; \
                  touch /fixed/x 2>&1 | grep -o 'Read-only.*'; cat /fixed/f";
    let said = root(script)?;
    ensure!(said == "no\nRead-only file system\nfixed\n", "{said}");
    ensure!(fs::read_dir(at("fixed"))?.count() == 1);
    // Links lead to the container's own files. A device is the host's, so that it leads nowhere; nor can
    // one be made.
    let null = at("new/deep/null");
    ensure!(Command::new("mknod").arg(&null).args(["c", "1", "3"]).status()?.success());
    let said = root(
        "cat /data/link /data/up 2>&1 | grep -c 'No such file'; \
         cat /new/null 2>&1 | grep -o 'Permission denied'; \
         mknod /new/zero c 1 5 2>&1 | grep -o 'Operation not permitted'",
    )?;
    ensure!(said == "2\nPermission denied\nOperation not permitted\n", "{said}");
    ensure!(fs::read_to_string(at("secret"))? == "beside the share\n");
    pod.ok(&["stop", "hosted"])?;
    pod.gone()
}

#[test]
fn a_path_of_the_host_that_is_not_what_it_should_be_is_named() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("none");
    let path = path.to_str().context("not UTF-8")?;
    let more = format!("  volumes: [{{name: v, hostPath: {{path: {path}, type: Directory}}}}]");
    let pod = Husk::shared()?.run(&husk_cases::pods::one("busybox", "true", &more))?;
    ensure!(pod.report["reason"] == "StorageError", "{:#}", pod.report);
    let expected = format!(
        "spec.volumes[0].hostPath: {path}: there is nothing, and type Directory wants a directory; \
         DirectoryOrCreate makes one"
    );
    ensure!(pod.report["message"] == expected.as_str(), "{:#}", pod.report);
    Ok(())
}

/// What two containers do with one volume after the other: each adds rows to one database, and counts
/// in one file under locks of BSD, and in another one under locks of POSIX.
const WRITER: &str = r#"
import fcntl, os, sqlite3, sys, time
ROUNDS = 100
name = sys.argv[1]

def meet(directory, what):
    open(f"{directory}/{name}.{what}", "w").close()
    while not all(os.path.exists(f"{directory}/{n}.{what}") for n in ("one", "two")):
        time.sleep(0.05)

for volume in ("disk", "memory", "host"):
    directory = "/v/" + volume
    meet(directory, "ready")
    base = sqlite3.connect(directory + "/base", timeout=300, isolation_level=None)
    while True:
        try:
            mode = base.execute("PRAGMA journal_mode=WAL").fetchone()
            break
        except sqlite3.OperationalError:
            time.sleep(0.05)  # The other one changes it right now.
    assert mode == ("wal",), mode
    base.execute("CREATE TABLE IF NOT EXISTS t (who TEXT, n INTEGER)")
    locks = {fcntl.flock: "bsd", fcntl.lockf: "posix"}
    counters = [
        (lock, os.open(f"{directory}/{kind}", os.O_RDWR | os.O_CREAT)) for lock, kind in locks.items()
    ]
    for n in range(ROUNDS):
        base.execute("INSERT INTO t VALUES (?, ?)", (name, n))
        for lock, counter in counters:
            lock(counter, fcntl.LOCK_EX)
            count = int(os.pread(counter, 20, 0) or b"0") + 1
            os.pwrite(counter, b"%20d" % count, 0)
            lock(counter, fcntl.LOCK_UN)
    meet(directory, "done")
    rows = base.execute("SELECT who, count(*) FROM t GROUP BY who ORDER BY who").fetchall()
    check = base.execute("PRAGMA integrity_check").fetchone()[0]
    counts = [int(os.pread(counter, 20, 0)) for _, counter in counters]
    print(volume, rows, check, counts, flush=True)
"#;

#[test]
fn two_containers_write_one_database_and_lock_each_other_out_on_every_kind_of_volume() -> Result<()>
{
    let directory = tempfile::tempdir()?;
    let path = directory.path().to_str().context("not UTF-8")?;
    let mut manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: case}}\nspec:\n  restartPolicy: Never\n  \
         volumes:\n  - {{name: disk, emptyDir: {{}}}}\n  \
         - {{name: memory, emptyDir: {{medium: Memory}}}}\n  \
         - {{name: host, hostPath: {{path: {path}}}}}\n  containers:\n"
    );
    for name in ["one", "two"] {
        write!(
            manifest,
            "  - name: {name}\n    image: localhost/husk/debian:test\n    volumeMounts:\n    \
             - {{name: disk, mountPath: /v/disk}}\n    - {{name: memory, mountPath: /v/memory}}\n    \
             - {{name: host, mountPath: /v/host}}\n    command:\n    - python3\n    - -c\n    - |\n"
        )?;
        for line in WRITER.lines() {
            writeln!(manifest, "      {line}")?;
        }
        writeln!(manifest, "    - {name}")?;
    }
    let pod = Husk::shared()?.run(&manifest)?.succeeded()?;
    let expected = ["disk", "memory", "host"]
        .map(|volume| format!("{volume} [('one', 100), ('two', 100)] ok [200, 200]"));
    for container in ["one", "two"] {
        ensure!(pod.log(container) == expected, "{}", pod.text);
    }
    ensure!(fs::read_to_string(directory.path().join("posix"))?.trim() == "200");
    Ok(())
}

#[test]
fn the_example_serves_files_of_the_host_and_follows_its_configuration() -> Result<()> {
    const EXAMPLE: &str = include_str!("../../../examples/host-files.yaml");
    let pages = tempfile::tempdir()?;
    // For nginx' workers, who have no right to a directory of the test's.
    fs::set_permissions(pages.path(), fs::Permissions::from_mode(0o755))?;
    fs::write(pages.path().join("index.html"), "hello\n")?;
    let manifest = EXAMPLE.replace("/srv/www", pages.path().to_str().context("not UTF-8")?);
    let pod = Pod::of("host-files", &manifest, &[])?;
    let fetch = || {
        let wget = "until wget -qO- http://127.0.0.1/; do sleep 1; done";
        pod.ok(&["exec", "-c", "client", "host-files", "--", "sh", "-c", wget])
    };
    ensure!(fetch()? == "hello\n");
    fs::write(pages.path().join("index.html"), "hello again\n")?;
    pod.until("the new page", |_| Ok(fetch()? == "hello again\n"))?;

    let said = |color: &str| {
        let line = format!("the color is {color}\n");
        Ok(pod.ok(&["logs", "-c", "watcher", "host-files"])?.ends_with(&line))
    };
    pod.until("the first color", |_| said("blue"))?;
    let changed = pages.path().join("changed.yaml");
    fs::write(&changed, manifest.replace("color: blue", "color: red"))?;
    let changed = changed.to_str().context("not UTF-8")?;
    ensure!(
        pod.ok(&["apply", "--pod", "host-files", changed])?
            == "default/host-files: volume settings updated\n"
    );
    pod.until("the second color", |_| said("red"))
}

//! Disks and memory: what is written, where it ends, what is full.

use anyhow::Result;
use husk_cases::pods::{self, Husk};

/// Writes five times the container's memory twice, to its own layer and to a volume, and tells what is
/// left to be written: in bytes not yet on the disk, killed processes, and MiB that came to the disk.
const FIVE_TIMES: &str = "
cd /sys/fs/cgroup
scratch=/sys/block/$(basename $(dirname $(grep -l '^scratch' /sys/block/*/serial)))
written() { echo $(($(awk '{print $7}' $scratch/stat) / 2048)); }
dirty() { awk '/^file_(dirty|writeback) / {sum += $2} END {print sum}' memory.stat; }
before=$(written)
for file in /big /data/big; do dd if=/dev/zero of=$file bs=1M count=480 2>/dev/null; done
[ $(dirty) -lt 50331648 ] && echo 'less than half of the memory is dirty'
[ $(($(written) - before)) -ge 912 ] && echo 'the rest is on the disk'
sync
[ $(dirty) -lt 1048576 ] && [ $(($(written) - before)) -ge 960 ] && echo 'all is'
grep -E '^oom' memory.events
stat -c %s /big /data/big";

#[test]
fn five_times_the_pods_memory_can_be_written_and_is_written_back() -> Result<()> {
    let more = "    resources: {limits: {memory: 96Mi, cpu: 1}}\n    \
                volumeMounts: [{name: data, mountPath: /data}]\n  volumes: [{name: data, emptyDir: {}}]";
    let pod = Husk::shared()?.run(&pods::one("busybox", FIVE_TIMES, more))?.succeeded()?;
    let expected = [
        "less than half of the memory is dirty",
        "the rest is on the disk",
        "all is",
        "oom 0",
        "oom_kill 0",
        "oom_group_kill 0",
        "503316480",
        "503316480",
    ];
    assert_eq!(pod.log("main"), expected, "{}", pod.text);
    Ok(())
}

#[test]
fn a_volume_with_a_limit_is_full_at_its_limit() -> Result<()> {
    for medium in ["", "medium: Memory, "] {
        let script = "df -m /data | tail -n 1 | awk '{print ($2 > 12 && $2 <= 16)}'\n\
                      dd if=/dev/zero of=/data/big bs=1M count=40 2>&1 | grep -o 'No space left.*'\n\
                      touch /elsewhere && echo alive";
        let more = format!(
            "    volumeMounts: [{{name: data, mountPath: /data}}]\n  volumes: [{{name: data, emptyDir: \
             {{{medium}sizeLimit: 16Mi}}}}]"
        );
        let pod = Husk::shared()?.run(&pods::one("busybox", script, &more))?.succeeded()?;
        assert_eq!(pod.log("main"), ["1", "No space left on device", "alive"], "{}", pod.text);
    }
    Ok(())
}

#[test]
fn a_full_disk_is_enospc_and_nothing_worse() -> Result<()> {
    let script = "dd if=/dev/zero of=/big bs=1M count=1200 2>&1 | grep -o 'No space left.*'\n\
                  rm /big; echo again > /small && cat /small";
    let husk = Husk::shared()?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), pods::shell(script))?;
    let path = file.path().to_str().unwrap_or_default();
    let output = husk.output(&["run", "--disk-size", "1", "--no-summary", path])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "main | No space left on device\nmain | again\n");
    assert!(output.status.success());
    Ok(())
}

#[test]
fn a_container_beyond_its_memory_is_oom_killed_and_its_sibling_lives() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  containers:
  - name: greedy
    image: localhost/husk/busybox:test
    command: [sh, -c, 'tail /dev/zero']
    resources: {limits: {memory: 32Mi, cpu: 1}}
  - name: sibling
    image: localhost/husk/busybox:test
    command: [sh, -c, 'sleep 8; echo fine']
    resources: {limits: {memory: 64Mi, cpu: 1}}
"#;
    let pod = Husk::shared()?.run(manifest)?;
    assert_eq!(pod.exit_code("greedy"), Some(137), "{}", pod.report);
    assert_eq!(pod.container("greedy")["reason"], "OOMKilled");
    assert_eq!(pod.exit_code("sibling"), Some(0));
    assert_eq!(pod.log("sibling"), ["fine"]);
    Ok(())
}

#[test]
fn output_is_complete_to_the_last_byte() -> Result<()> {
    // 1 MiB in lines of 64 bytes, from several containers at once, whose end comes right after.
    let script = "i=0; while [ $i -lt 256 ]; do echo 0123456789012345678901234567890123456789\
                  01234567890123456789012; i=$((i+1)); done > /tmp/part; \
                  n=0; while [ $n -lt 64 ]; do cat /tmp/part; n=$((n+1)); done";
    let husk = Husk::shared()?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), pods::shell(script))?;
    let path = file.path().to_str().unwrap_or_default();
    for _ in 0..3 {
        let output = husk.output(&["run", "--no-summary", path])?;
        let lines: Vec<&[u8]> = output.stdout.split_inclusive(|b| *b == b'\n').collect();
        assert_eq!(lines.len(), 64 * 256);
        let expected = b"main | 012345678901234567890123456789012345678901234567890123456789012\n";
        assert!(lines.iter().all(|line| line == expected));
    }
    Ok(())
}

//! Memory of a pod that it does not use any more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cases::background::{Pod, text};

const MIB: u64 = 1 << 20;

/// How long something may take on a machine a hundred times slower than the author's, where it is a
/// matter of seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// A container in 2 GiB, with a volume that can hold most of it.
const CONTAINER: &str = "
  - name: main
    image: localhost/husk/busybox:test
    command: [sleep, '100000']
    resources: {limits: {memory: 2Gi, cpu: 2}}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {medium: Memory, sizeLimit: 1700Mi}}]
";

/// Uses memory again, and looks whether it keeps what is written to it.
const AGAIN: &str = "
set -eu
dd if=/dev/urandom of=/data/seed bs=1M count=1 2>/dev/null
n=0; while [ $n -lt 512 ]; do cat /data/seed; n=$((n+1)); done > /data/big
sum=$(md5sum < /data/seed)
n=0; while [ $n -lt 512 ]; do
  [ \"$(dd if=/data/big bs=1M skip=$n count=1 2>/dev/null | md5sum)\" = \"$sum\" ]
  n=$((n+32))
done";

/// The resident memory of a pod's VMM in bytes.
fn resident(pod: &Pod) -> Result<u64> {
    let pid = pod.vmm()?.as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib * 1024)
}

fn shell(pod: &Pod, script: &str) -> Result<()> {
    let output = pod.exec(&["sh", "-c", script])?;
    ensure!(output.status.success(), "{script}: {}", text(&output.stderr));
    Ok(())
}

#[test]
fn memory_that_a_pod_frees_is_the_hosts_again() -> Result<()> {
    let pod = Pod::up("case-memory", CONTAINER, &[])?;
    shell(&pod, "dd if=/dev/zero of=/data/big bs=1M count=1536")?;
    let used = resident(&pod)?;
    ensure!(used > 1536 * MIB, "{} MiB are resident", used / MIB);

    shell(&pod, "rm /data/big")?;
    let start = Instant::now();
    let mut least = used;
    while used - least.min(used) < 1400 * MIB {
        let mib = least / MIB;
        ensure!(start.elapsed() < PATIENCE, "{mib} MiB are resident after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(200));
        least = resident(&pod)?;
    }
    let took = start.elapsed();
    println!("{} of {} MiB were given back in {took:.1?}", (used - least) / MIB, used / MIB);

    shell(&pod, AGAIN)?;
    ensure!(resident(&pod)? > least + 400 * MIB, "memory that is used is resident");
    pod.ok(&["rm", "-f", pod.name])?;
    Ok(())
}

//! Random requests of 4 KiB to a disk: a file of the host, in husk's VMM and in QEMU with its
//! virtio-blk, and by the host itself.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Setup;
use crate::guest::{self, Devices, Times, in_husk, in_qemu, load_program};

/// Length of the disk in MiB.
const DISK_MIB: usize = 256;

/// Name, access, depth and number of requests of each load.
const LOADS: [(&str, &str, u32, u32); 4] = [
    ("read_1", "read", 1, 2000),
    ("read_32", "read", 32, 8000),
    ("write_1", "write", 1, 2000),
    ("write_32", "write", 32, 8000),
];

const QEMU: &str = "qemu-microvm";

/// Compares them.
pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("disk: random 4 KiB, {DISK_MIB} MiB, one and 32 at a time, guest's page cache unused");
    let image = image().context("cannot make a disk")?;
    let script: String = LOADS
        .iter()
        .map(|(name, access, depth, requests)| {
            format!("husk-load {name} disk /dev/vda {access} {depth} {requests}\n")
        })
        .collect();
    let (mut husk, mut qemu, mut host) = (Vec::new(), Vec::new(), Vec::new());
    let mut per_request = Vec::new();
    for round in 0..=setup.rounds {
        let devices = || Devices { disk: Some(image.path()), ..Devices::default() };
        let (times, counters) = in_husk(&script, devices())?;
        guest::print(round, "husk-vmm", &times);
        let in_qemu = in_qemu(setup, &script, devices())?;
        guest::print(round, QEMU, &in_qemu);
        let on_host = on_host(image.path())?;
        guest::print(round, "host", &on_host);
        // The first round is a warm-up.
        if round > 0 {
            husk.push(times);
            qemu.push(in_qemu);
            host.push(on_host);
            let disk = counters.devices.get("blk:bench").context("the disk is not counted")?;
            let requests: u32 = LOADS.iter().map(|load| load.3).sum();
            per_request.push((disk.kicks + disk.interrupts) as f64 / f64::from(requests));
        }
    }
    let mut lines =
        guest::throughput("disk", &husk, &[("", QEMU, &qemu), ("_of_host", "host", &host)])?;
    let notifications = crate::pairs::median(&per_request).context("no rounds")?;
    lines.push(format!("figure disk_notifications {notifications:.2} per request"));
    Ok(lines)
}

/// A disk without holes, on the host's disk.
fn image() -> Result<tempfile::NamedTempFile> {
    let mut image = tempfile::NamedTempFile::new_in("/var/tmp")?;
    let piece = vec![0xa5; 1 << 20];
    for _ in 0..DISK_MIB {
        image.write_all(&piece)?;
    }
    image.as_file().sync_all()?;
    Ok(image)
}

/// The same requests without a guest, through the host's page cache as the VMMs'.
fn on_host(image: &Path) -> Result<Times> {
    let mut times = Times::new();
    for (name, access, depth, requests) in LOADS {
        let output = Command::new(load_program())
            .args([name, "disk", "--cached"])
            .arg(image)
            .args([access, &depth.to_string(), &requests.to_string()])
            .output()
            .context("cannot run husk-load")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        times.extend(guest::parse(&String::from_utf8_lossy(&output.stdout))?);
    }
    Ok(times)
}

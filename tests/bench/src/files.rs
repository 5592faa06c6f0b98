//! Files of a directory that a guest shares with its host: in husk's VMM with husk-fs, and in QEMU
//! with virtiofsd.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::Setup;
use crate::guest::{self, Devices, TAG, in_husk, in_qemu};

/// Name, number of files and bytes in each.
const LOADS: [(&str, u32, u32); 2] = [("empty", 250, 0), ("small", 250, 2000)];

const QEMU: &str = "qemu-microvm and virtiofsd";

/// Compares them.
pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("files: made, looked at and removed in a shared directory");
    let directory = tempfile::tempdir_in("/var/tmp").context("cannot make a directory")?;
    let shared = directory.path();
    fs::create_dir(shared.join("0"))?;
    let loads = LOADS
        .map(|(name, files, bytes)| format!("husk-load {name} names /shared/0 {files} {bytes}\n"));
    let script = format!("mkdir /shared\nmount -t virtiofs {TAG} /shared\n{}", loads.concat());
    let (mut husk, mut qemu) = (Vec::new(), Vec::new());
    for round in 0..=setup.rounds {
        let (times, _) = in_husk(&script, devices(shared))?;
        guest::print(round, "husk-vmm and husk-fs", &times);
        let in_qemu = in_qemu(setup, &script, devices(shared))?;
        guest::print(round, QEMU, &in_qemu);
        // The first round is a warm-up.
        if round > 0 {
            husk.push(times);
            qemu.push(in_qemu);
        }
    }
    guest::throughput("files", &husk, &[("", QEMU, &qemu)])
}

fn devices(shared: &Path) -> Devices<'_> {
    Devices { shared: Some(shared), ..Devices::default() }
}

//! `husk-bench`: husk and its peers, interleaved in one run on one host.
//!
//! What it is for: ratios and counts that hold on a slow, nested or emulated KVM as well. What it is
//! not for: absolute times; those are printed with what they were measured on, and kept nowhere.
//!
//! It runs where `/dev/kvm` is real (the test host) and drives built binaries, as a pod's process
//! would. Every line that counts is `figure NAME VALUE UNIT` or `ratio NAME VALUE vs PEER`.

mod boot;
mod disk;
mod files;
mod guest;
mod in_pod;
mod net;
mod pairs;
mod qemu;
mod run_true;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use husk_cases::place;

/// Measures husk against its peers and prints one line for each result. HUSK_TREE says where the
/// binaries lie (/opt/husk).
#[derive(Debug, Parser)]
struct Options {
    /// Interleaved rounds of each comparison, after one warm-up round.
    #[arg(long, default_value_t = 9)]
    rounds: usize,

    /// Run only the comparison with this name.
    #[arg(long)]
    only: Option<String>,
}

/// What all comparisons work with.
pub(crate) struct Setup {
    pub(crate) rounds: usize,
    pub(crate) husk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) busybox: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let setup = Setup {
        rounds: options.rounds.max(1),
        husk: place::program("husk"),
        kernel: place::kernel(),
        initramfs: place::initramfs(),
        busybox: place::tree().join("images/busybox"),
    };
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let mut results = Vec::new();
    if wanted("boot") {
        results.extend(boot::compare(&setup).context("boot: spawn to init, against QEMU")?);
    }
    if wanted("weight") {
        results.extend(boot::weigh(&setup).context("weight: what a booted VM costs")?);
    }
    if wanted("run") {
        results.extend(run_true::compare(&setup).context("run: husk run, against crun and runc")?);
    }
    if wanted("pod") {
        results.extend(in_pod::compare(&setup).context("pod: inside a running pod, against crun")?);
    }
    if wanted("disk") {
        results.extend(disk::compare(&setup).context("disk: random requests, against QEMU")?);
    }
    if wanted("net") {
        results.extend(net::compare(&setup).context("net: TCP to the host, against QEMU")?);
    }
    if wanted("files") {
        results.extend(files::compare(&setup).context("files: shared ones, against QEMU")?);
    }
    println!();
    for line in results {
        println!("{line}");
    }
    Ok(())
}

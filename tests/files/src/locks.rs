//! Locks between processes, and between descriptors.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;

use crate::{Case, this_program};

pub(crate) const CASES: &[Case] = &[
    ("flock excludes other descriptors", flocks),
    ("a POSIX lock excludes other processes", posix_locks),
];

/// What another process says of a lock that this one holds.
const TAKEN: &str = "taken";
const FREE: &str = "free";

fn flocks(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let one = File::create(&path)?;
    let other = File::open(&path)?;
    flock(&one, FlockOperation::LockExclusive)?;
    let refused = flock(&other, FlockOperation::NonBlockingLockShared);
    ensure!(refused == Err(Errno::WOULDBLOCK), "{refused:?}");
    flock(&one, FlockOperation::Unlock)?;
    flock(&other, FlockOperation::NonBlockingLockShared).context("after it was unlocked")?;
    flock(&one, FlockOperation::NonBlockingLockShared).context("shared")?;
    Ok(())
}

fn posix_locks(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    fcntl_lock(&file, FlockOperation::LockExclusive)?;
    ensure!(said_of(&path)? == TAKEN, "another process gets the lock too");
    fcntl_lock(&file, FlockOperation::Unlock)?;
    ensure!(said_of(&path)? == FREE, "it is still locked");
    Ok(())
}

fn said_of(path: &Path) -> Result<String> {
    let output = Command::new(this_program()?).arg("--lock").arg(path).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The other process.
pub(crate) fn try_lock(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => println!("{FREE}"),
        Err(Errno::WOULDBLOCK | Errno::ACCESS) => println!("{TAKEN}"),
        Err(errno) => return Err(errno.into()),
    }
    Ok(())
}

//! `husk-test-files DIRECTORY`: does on a directory what programs do on file systems, and says of each
//! case whether it came out as POSIX and Linux have it. Run by root, in guests on each kind of volume.
//!
//! Not a test of one file system, but of what lies between a program and its files: what the guest's
//! kernel, husk-fs and the host's kernel make of it together.
#![deny(unsafe_code)]

mod data;
mod locks;
mod names;
mod owners;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

/// A case: gets an empty directory of its own.
type Case = (&'static str, fn(&Path) -> Result<()>);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["--lock", file] => locks::try_lock(Path::new(file)),
        ["--as-member", directory] => owners::as_member(Path::new(directory)),
        [directory] => run(Path::new(directory)),
        _ => Err(anyhow::anyhow!("usage: husk-test-files DIRECTORY")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all cases, whatever some of them come to.
fn run(directory: &Path) -> Result<()> {
    let cases: Vec<Case> = [data::CASES, names::CASES, locks::CASES, owners::CASES].concat();
    let mut failed = 0;
    for (name, case) in &cases {
        let own = directory.join(name.replace(' ', "-"));
        let done = std::fs::create_dir(&own)
            .context("its directory")
            .and_then(|()| case(&own))
            .and_then(|()| std::fs::remove_dir_all(&own).context("removing its directory"));
        if let Err(error) = done {
            failed += 1;
            println!("FAILED {name}: {error:#}");
        }
    }
    anyhow::ensure!(failed == 0, "{failed} of {} cases", cases.len());
    println!("all {} cases hold", cases.len());
    Ok(())
}

/// The program itself, to be run as another process.
fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("its own path")
}

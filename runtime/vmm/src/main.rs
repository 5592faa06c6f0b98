//! `husk-vmm`: one process, one microVM. Started by a pod's process, not by people.
//!
//! It gets its configuration and all descriptors over the socket whose number `--control-fd` says,
//! and opens no path. Everything of interest is in the library.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_vmm::machine;

const HELP: &str = "\
husk-vmm: runs one microVM for a pod's process; started by husk, not by hand

Usage:
  husk-vmm --control-fd N   take the VM's configuration and descriptors from socket N
  husk-vmm --probe-kvm N    prove that the /dev/kvm open as descriptor N runs guests:
                            prints {\"ok\": BOOL, \"detail\": TEXT}, exit code 0 or 1
  husk-vmm --version

HUSK_LOG sets the level of the log on standard error: error, warn (default), info, debug, trace.
Exit codes: 0 guest powered off or VM stopped, 1 failure, 2 usage, 10 guest rebooted,
11 guest kernel panicked, 12 triple fault.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["--control-fd", fd] => match inherited(fd) {
            Some(fd) => {
                start_log();
                code(machine::control::run(fd).code())
            }
            None => usage(&format!("{fd}: not the number of an open descriptor")),
        },
        ["--probe-kvm", fd] => match inherited(fd) {
            Some(fd) => probe(fd),
            None => usage(&format!("{fd}: not the number of an open descriptor")),
        },
        ["--version"] => {
            println!("husk-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--help" | "-h"] => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        _ => usage("see --help"),
    }
}

fn code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("husk-vmm: {problem}");
    ExitCode::from(2)
}

/// Takes over an inherited descriptor, and keeps it from children.
fn inherited(number: &str) -> Option<OwnedFd> {
    let number = number.parse().ok().filter(|n| *n > 2)?;
    // SAFETY: F_SETFD on a number that may or may not be open changes no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: the descriptor is open (fcntl succeeded), was passed to us by the parent for our use,
    // and nothing else in this process, which has just started, owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

fn start_log() {
    let level = std::env::var("HUSK_LOG").ok().and_then(|text| text.parse().ok());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(level.unwrap_or(tracing::level_filters::LevelFilter::WARN))
        .init();
}

fn probe(kvm: OwnedFd) -> ExitCode {
    let result = husk_kvm_probe::run(kvm);
    let detail = match &result {
        Ok(()) => "KVM runs guest code".to_owned(),
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
    };
    println!("{}", serde_json::json!({"ok": result.is_ok(), "detail": detail}));
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

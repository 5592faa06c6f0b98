//! `husk`: runs Kubernetes pods in microVMs, from the command line.
//!
//! What it is for: reading arguments and files, calling the engine, showing what comes of it. What
//! it is not for: anything that another door (containerd's shim, the CRI) would need as well; that
//! is the engine's.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

mod args;
mod check;
mod image;
mod images;
mod pods;
mod progress;
mod run;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command, Global, ImageCommand};

/// Exit code for a failure of husk itself, as opposed to one of a container.
const EXIT_HUSK_FAILED: u8 = 125;

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    start_logging(&global);
    let done = match command {
        Command::Run(args) => run::run(&global, args),
        Command::Ps(args) => pods::ps::run(&global, &args),
        Command::Logs(args) => pods::logs::run(&global, &args),
        Command::Exec(args) => pods::exec::run(&global, args),
        Command::Debug(args) => pods::debug::run(&global, args),
        Command::Attach(args) => pods::attach::run(&global, &args),
        Command::Apply(args) => pods::apply::run(&global, &args),
        Command::Cp(args) => pods::cp::run(&global, &args),
        Command::PortForward(args) => pods::port_forward::run(&global, &args),
        Command::Stop(args) => pods::stop::run(&global, &args),
        Command::Kill(args) => pods::kill::run(&global, &args),
        Command::Wait(args) => pods::wait::run(&global, &args),
        Command::Rm(args) => pods::rm::run(&global, &args),
        Command::Inspect(args) => pods::inspect::run(&global, &args),
        Command::Events(args) => pods::events::run(&global, &args),
        Command::Stats(args) => pods::stats::run(&global, &args),
        Command::Top(args) => pods::top::run(&global, &args),
        Command::Disk(args) => pods::disk::run(&global, &args),
        Command::Pause(args) => pods::pause::pause(&global, &args),
        Command::Unpause(args) => pods::pause::unpause(&global, &args),
        Command::Console(args) => pods::console::run(&global, &args),
        Command::Completion(args) => Ok(pods::completion::run(&args)),
        Command::Hold(args) => run::background::hold(&global, &args),
        Command::Image(args) => image::run(&global, args.command),
        Command::Pull(args) => image::run(&global, ImageCommand::Pull(args)),
        Command::Images(args) => image::run(&global, ImageCommand::Ls(args)),
        Command::Rmi(args) => image::run(&global, ImageCommand::Rm(args)),
        Command::Check(args) => check::run(&global, &args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            // The chain of causes, once, here.
            eprintln!("husk: {error:#}");
            ExitCode::from(EXIT_HUSK_FAILED)
        }
    }
}

/// Diagnostics go to standard error: warnings, unless `-v`, `-q` or HUSK_LOG say otherwise.
fn start_logging(global: &Global) {
    let default = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_env("HUSK_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}

//! `husk-testhost`: the machine in which husk is tested for real.
//!
//! It builds a Debian disk image (once), boots it under QEMU, brings files into it and runs
//! commands and test binaries there. Inside, `/dev/kvm` is real even where this machine's own KVM
//! is not usable. See `tests/harness/README.md`.
//!
//! Not for users of husk: nothing of this is installed.

mod guest;
mod host;
mod kvm;
mod wire;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use host::client::{self, Input};
use host::image::{Image, ensure_built};
use host::instance::{self, BootOptions, Lease, StateDir};
use host::push::{GUEST_ROOT, Plan, push_and_say};
use host::suite::SuiteOptions;
use host::{qemu, suite, supervisor};
use husk_harness::cache::paths;
use husk_harness::debian;
use husk_harness::progress::say;

/// Builds, boots and drives the virtual machine in which husk is tested.
#[derive(Debug, Parser)]
#[command(name = "husk-testhost", version)]
struct Cli {
    /// Which of this checkout's test hosts; several can run beside each other.
    #[arg(long, global = true, env = "HUSK_TESTHOST", default_value = "main")]
    name: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the disk image if the cache does not hold it.
    Build {
        /// Make it anew, with the packages that the mirror holds today.
        #[arg(long)]
        refresh: bool,
    },
    /// Start the test host and keep it running.
    Up {
        #[command(flatten)]
        boot: BootOptions,
    },
    /// Say whether the test host runs, and how.
    Status,
    /// End the test host.
    Down,
    /// Bring files or directories into the test host.
    Push {
        #[command(flatten)]
        boot: BootOptions,
        /// Directory in the test host, absolute or below /opt/husk.
        #[arg(long, default_value = "bin")]
        to: String,
        /// Each appears under its own name in the directory.
        #[arg(required = true)]
        sources: Vec<PathBuf>,
    },
    /// Mirror a product tree's bin, share, images and tests to /opt/husk.
    Sync {
        #[command(flatten)]
        boot: BootOptions,
        /// The tree.
        #[arg(default_value = "target/husk")]
        tree: PathBuf,
    },
    /// Run a command in the test host: its output, signals and exit code become this one's.
    Run {
        #[command(flatten)]
        boot: BootOptions,
        #[command(flatten)]
        run: RunOptions,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
    /// Run test binaries in the test host (or with --native here); fails if any fails.
    Test {
        #[command(flatten)]
        boot: BootOptions,
        #[command(flatten)]
        suite: SuiteOptions,
    },
    /// Copy the test host's logs and core dumps to a directory here.
    Logs {
        #[arg(default_value = "target/testhost-logs")]
        directory: PathBuf,
    },
    /// Open an interactive shell in the test host.
    Shell {
        #[command(flatten)]
        boot: BootOptions,
    },
    /// Say whether this machine's own KVM runs guests; exit code 0 if so.
    NativeOk,
    #[command(hide = true)]
    Supervise(supervisor::Options),
    #[command(hide = true)]
    GuestAgent,
}

#[derive(Debug, clap::Args)]
struct RunOptions {
    /// Working directory in the test host.
    #[arg(long, default_value = "/root")]
    cwd: String,
    /// Environment variable for the command.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Kill the command after this time; the exit code is 124 then.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Give the command no input instead of this one's.
    #[arg(long, short = 'n')]
    no_stdin: bool,
    /// In a test host booted for this command alone and ended with it.
    #[arg(long)]
    once: bool,
    /// First push this file to /opt/husk/bin.
    #[arg(long, short = 'p', value_name = "FILE")]
    push: Vec<PathBuf>,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("husk-testhost: {error:#}");
            if error.is::<client::TimedOut>() {
                return ExitCode::from(client::TimedOut::EXIT_CODE);
            }
            ExitCode::FAILURE
        }
    }
}

/// Where this invocation's test host lies.
struct Place {
    cache: PathBuf,
    checkout: PathBuf,
    state: StateDir,
}

impl Place {
    fn find(name: &str) -> Result<Self> {
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            bail!("the name {name:?} has other characters than letters, digits and '_'");
        }
        let cache = paths::cache_root()?;
        let checkout = paths::checkout()?;
        let state = StateDir::new(paths::state_dir(&cache, &checkout, name));
        Ok(Self { cache, checkout, state })
    }

    fn image(&self) -> Result<Image> {
        let image = ensure_built(&self.cache, &self.checkout, false)?;
        debian::need_packages(&self.checkout, &["qemu-system-x86/backports"])?;
        Ok(image)
    }

    fn up(&self, boot: &BootOptions) -> Result<Lease> {
        instance::up(self.state.clone(), boot, || self.image())
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Action::Supervise(options) => supervisor::supervise(&options)?,
        Action::GuestAgent => guest::serve()?,
        Action::NativeOk => return Ok(native_ok()),
        Action::Build { refresh } => {
            let place = Place::find(&cli.name)?;
            let image = ensure_built(&place.cache, &place.checkout, refresh)?;
            say(format_args!("image in {}", image.dir.display()));
        }
        Action::Up { boot } => {
            let lease = Place::find(&cli.name)?.up(&boot)?;
            say(describe(&lease.state, &lease.instance));
        }
        Action::Status => return status(&Place::find(&cli.name)?),
        Action::Down => {
            let ended = instance::down(&Place::find(&cli.name)?.state)?;
            say(if ended { "ended" } else { "was not running" });
        }
        Action::Push { boot, to, sources } => {
            let plan = plan_push(&sources, &to)?;
            push_and_say(&Place::find(&cli.name)?.up(&boot)?, &plan)?;
        }
        Action::Sync { boot, tree } => {
            let mut plan = Plan::default();
            plan.tree(&tree)?;
            push_and_say(&Place::find(&cli.name)?.up(&boot)?, &plan)?;
        }
        Action::Run { boot, run, argv } => {
            return run_command(&Place::find(&cli.name)?, &boot, run, argv);
        }
        Action::Test { boot, suite } => return test(&Place::find(&cli.name)?, &boot, &suite),
        Action::Logs { directory } => {
            let place = Place::find(&cli.name)?;
            let lease = instance::existing(place.state)?.context("the test host does not run")?;
            suite::collect(&lease, &directory)?;
        }
        Action::Shell { boot } => return shell(&Place::find(&cli.name)?, &boot),
    }
    Ok(ExitCode::SUCCESS)
}

fn native_ok() -> ExitCode {
    match kvm::probe() {
        Ok(()) => {
            println!("yes: this machine's KVM runs guests");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("no: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn describe(state: &StateDir, instance: &instance::Instance) -> String {
    format!(
        "up with {}, process {}, console in {}",
        instance.accelerator,
        instance.supervisor,
        state.console_log().display()
    )
}

fn status(place: &Place) -> Result<ExitCode> {
    Ok(match instance::find(&place.state)? {
        Some(instance) => {
            println!("{}", describe(&place.state, &instance));
            ExitCode::SUCCESS
        }
        None => {
            let (accelerator, reason) = qemu::choose();
            println!("down; would boot with {accelerator} ({reason})");
            ExitCode::FAILURE
        }
    })
}

fn plan_push(sources: &[PathBuf], to: &str) -> Result<Plan> {
    let directory = if to.starts_with('/') { to.to_owned() } else { format!("{GUEST_ROOT}/{to}") };
    let mut plan = Plan::default();
    for source in sources {
        plan.add(source, &format!("{directory}/{}", file_name(source)?))?;
    }
    Ok(plan)
}

/// The last component of a path, also of `.` and `dir/`.
fn file_name(path: &Path) -> Result<String> {
    let full = path.canonicalize().with_context(|| format!("finding {}", path.display()))?;
    let name = path.file_name().or(full.file_name()).and_then(|name| name.to_str());
    name.map(str::to_owned).with_context(|| format!("{} has no usable name", path.display()))
}

fn run_command(
    place: &Place,
    boot: &BootOptions,
    options: RunOptions,
    argv: Vec<String>,
) -> Result<ExitCode> {
    let plan = plan_push(&options.push, "bin")?;
    let lease = if options.once {
        instance::one_shot(&place.state, boot, &place.image()?)?
    } else {
        place.up(boot)?
    };
    if !options.push.is_empty() {
        push_and_say(&lease, &plan)?;
    }
    let command = wire::Command { argv, env: options.env, cwd: options.cwd, terminal: None };
    let input = if options.no_stdin { Input::Empty } else { Input::Forward };
    let timeout = options.timeout.map(std::time::Duration::from_secs);
    let outcome = client::run(&lease.instance, command, input, timeout)?;
    exit_code(outcome)
}

/// In the test host that runs, if one does: an inner loop. Else in one for this run alone, so that
/// nothing stays behind.
fn test(place: &Place, boot: &BootOptions, options: &SuiteOptions) -> Result<ExitCode> {
    let report = if options.native {
        suite::run_native(options)?
    } else {
        let running = if options.once { None } else { instance::existing(place.state.clone())? };
        let lease = match running {
            Some(lease) => lease,
            None => instance::one_shot(&place.state, boot, &place.image()?)?,
        };
        suite::run_in(&lease, options)?
    };
    let (count, failed) = (options.binaries.len(), report.failed.len());
    if failed == 0 {
        say(format_args!("all {count} test binaries passed"));
        return Ok(ExitCode::SUCCESS);
    }
    for failure in &report.failed {
        say(format_args!("failed: {failure}"));
    }
    say(format_args!("{failed} of {count} test binaries failed"));
    Ok(ExitCode::FAILURE)
}

fn exit_code(outcome: wire::Outcome) -> Result<ExitCode> {
    let code = u8::try_from(outcome.code()).context("exit code out of range")?;
    Ok(ExitCode::from(code))
}

fn shell(place: &Place, boot: &BootOptions) -> Result<ExitCode> {
    let lease = place.up(boot)?;
    let size = client::terminal_size().context("standard input is not a terminal")?;
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let command = wire::Command {
        argv: vec!["bash".into(), "-l".into()],
        env: vec![("TERM".into(), term)],
        cwd: "/root".into(),
        terminal: Some(size),
    };
    exit_code(client::run(&lease.instance, command, Input::Forward, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_commands_own_options_are_not_ours() {
        let cli = Cli::try_parse_from(["x", "run", "--env", "A=b=c", "--", "ls", "-n", "--once"]);
        let Action::Run { run, argv, .. } = cli.unwrap().command else { panic!("not run") };
        assert_eq!(argv, ["ls", "-n", "--once"]);
        assert_eq!(run.env, [("A".to_owned(), "b=c".to_owned())]);
        assert!(!run.no_stdin && !run.once);
    }

    #[test]
    fn a_malformed_variable_is_refused() {
        assert!(Cli::try_parse_from(["x", "run", "--env", "=b", "true"]).is_err());
        assert!(Cli::try_parse_from(["x", "run", "--env", "b", "true"]).is_err());
    }
}

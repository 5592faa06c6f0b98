//! The command line's grammar and its help.

mod image;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use husk_engine::paths::{Config, names, shared_file};
use husk_engine::storage::DEFAULT_SCRATCH_BYTES;
use husk_engine::types::Network;

pub(crate) use self::image::{ImageArgs, ImageCommand, ImportArgs, ListArgs, PullArgs, RemoveArgs};
use crate::pods::apply::ApplyArgs;
use crate::pods::attach::AttachArgs;
use crate::pods::completion::CompletionArgs;
use crate::pods::console::ConsoleArgs;
use crate::pods::cp::CpArgs;
use crate::pods::debug::DebugArgs;
use crate::pods::disk::DiskArgs;
use crate::pods::events::EventsArgs;
use crate::pods::exec::ExecArgs;
use crate::pods::inspect::InspectArgs;
use crate::pods::kill::KillArgs;
use crate::pods::logs::LogsArgs;
use crate::pods::pause::{PauseArgs, UnpauseArgs};
use crate::pods::port_forward::PortForwardArgs;
use crate::pods::ps::PsArgs;
use crate::pods::rm::RmArgs;
use crate::pods::stats::StatsArgs;
use crate::pods::stop::StopArgs;
use crate::pods::top::TopArgs;
use crate::pods::wait::WaitArgs;
use crate::run::background::HoldArgs;

/// Run Kubernetes pods in microVMs
///
/// Every pod gets a virtual machine of its own, with a kernel of its own, on this host's KVM.
#[derive(Debug, Parser)]
#[command(
    name = "husk",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_long_help = "Examples:\n  \
        husk check                       see whether this host can run pods\n  \
        husk image import ./nginx-oci    take an image from a directory\n  \
        husk run pod.yaml                run a pod in the foreground\n  \
        husk run -d pod.yaml             run a pod in the background\n  \
        husk exec -it web sh             enter one of its containers\n  \
        kubectl create deploy x --image nginx --dry-run=client -o yaml | ... | husk run -"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    Logs(LogsArgs),
    Exec(ExecArgs),
    Debug(DebugArgs),
    Attach(AttachArgs),
    Cp(CpArgs),
    PortForward(PortForwardArgs),
    Apply(ApplyArgs),
    Stop(StopArgs),
    Kill(KillArgs),
    Wait(WaitArgs),
    Rm(RmArgs),
    Inspect(InspectArgs),
    Events(EventsArgs),
    Stats(StatsArgs),
    Top(TopArgs),
    Disk(DiskArgs),
    Pause(PauseArgs),
    Unpause(UnpauseArgs),
    Console(ConsoleArgs),
    Image(ImageArgs),
    /// The same as `husk image pull`
    Pull(PullArgs),
    /// The same as `husk image ls`
    Images(ListArgs),
    /// The same as `husk image rm`
    Rmi(RemoveArgs),
    Check(CheckArgs),
    Completion(CompletionArgs),
    #[command(hide = true)]
    Hold(HoldArgs),
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where images and disks are kept; on a disk-backed file system
    #[arg(
        long,
        global = true,
        env = "HUSK_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/husk",
        help_heading = "Places"
    )]
    pub(crate) state_dir: PathBuf,
    /// Where running pods keep their small files
    /// [default: /run/husk, or run/ in the state directory if that cannot be written]
    #[arg(long, global = true, env = "HUSK_RUN_DIR", value_name = "DIR", help_heading = "Places")]
    pub(crate) run_dir: Option<PathBuf>,
    /// The guest kernel, an uncompressed vmlinux [default: ../share/husk/vmlinux beside husk]
    #[arg(long, global = true, env = "HUSK_KERNEL", value_name = "FILE", help_heading = "Places")]
    pub(crate) kernel: Option<PathBuf>,
    /// The initramfs that holds the agent [default: ../share/husk/initramfs.cpio beside husk]
    #[arg(
        long,
        global = true,
        env = "HUSK_INITRAMFS",
        value_name = "FILE",
        help_heading = "Places"
    )]
    pub(crate) initramfs: Option<PathBuf>,
    /// The virtual machine monitor [default: husk-vmm beside husk]
    #[arg(long, global = true, env = "HUSK_VMM", value_name = "FILE", help_heading = "Places")]
    pub(crate) vmm: Option<PathBuf>,
    /// The server of files that pods share with the host [default: husk-fs beside husk]
    #[arg(long, global = true, env = "HUSK_FS", value_name = "FILE", help_heading = "Places")]
    pub(crate) file_server: Option<PathBuf>,
    /// KVM's device; another one is of use to tests only
    #[arg(long, global = true, env = "HUSK_KVM", value_name = "FILE", hide = true,
        default_value = husk_engine::vm::kvm::DEVICE)]
    pub(crate) kvm: PathBuf,
    /// Say more: -v what is done, -vv how, -vvv everything (HUSK_LOG selects by module)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say only what failed
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
}

impl Global {
    /// Where things lie: as given, or else as husk is installed.
    pub(crate) fn config(&self) -> anyhow::Result<Config> {
        let executable = std::env::current_exe().context("cannot tell where husk itself lies")?;
        let bin = executable.parent().context("husk lies nowhere")?;
        let given = |path: &Option<PathBuf>, otherwise: PathBuf| path.clone().unwrap_or(otherwise);
        Ok(Config {
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone().unwrap_or_else(|| self.default_run_dir()),
            kernel: given(&self.kernel, shared_file(bin, names::KERNEL)),
            initramfs: given(&self.initramfs, shared_file(bin, names::INITRAMFS)),
            kvm: self.kvm.clone(),
            vmm: given(&self.vmm, bin.join(names::VMM)),
            file_server: given(&self.file_server, bin.join(names::FILE_SERVER)),
            scratch_bytes: DEFAULT_SCRATCH_BYTES,
        })
    }

    /// The same options for another husk, which may be in another directory.
    pub(crate) fn repeated(&self) -> anyhow::Result<Vec<OsString>> {
        let Config {
            state_dir,
            run_dir,
            kernel,
            initramfs,
            kvm,
            vmm,
            file_server,
            scratch_bytes: _,
        } = self.config()?;
        let places = [
            ("--state-dir", state_dir),
            ("--run-dir", run_dir),
            ("--kernel", kernel),
            ("--initramfs", initramfs),
            ("--kvm", kvm),
            ("--vmm", vmm),
            ("--file-server", file_server),
        ];
        let mut options = Vec::new();
        for (option, place) in places {
            let place = std::path::absolute(&place)
                .with_context(|| format!("cannot tell where {} is", place.display()))?;
            options.extend([option.into(), place.into_os_string()]);
        }
        options.extend((0..self.verbose).map(|_| "--verbose".into()));
        options.extend(self.quiet.then(|| "--quiet".into()));
        Ok(options)
    }

    fn default_run_dir(&self) -> PathBuf {
        let system = PathBuf::from("/run/husk");
        // Made by the first who may; whoever may not has a directory with the images.
        match std::fs::create_dir_all(&system) {
            Ok(()) if rustix::fs::access(&system, rustix::fs::Access::WRITE_OK).is_ok() => system,
            _ => self.state_dir.join("run"),
        }
    }
}

/// How results are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// Run the pods of manifests, in the foreground until they end, or in the background
///
/// Each FILE holds one or more Kubernetes v1 Pods in YAML or JSON; `-` is the standard input. All
/// pods run at the same time, each in a virtual machine of its own, which is as large as the pod's
/// limits say.
///
/// What containers write comes out as they write it, line by line, with the container's name in
/// front: their standard output on standard output, their standard error on standard error. What
/// husk itself has to say goes to standard error.
///
/// Ctrl-C stops the pods as Kubernetes would: every container gets its stop signal, and SIGKILL
/// when terminationGracePeriodSeconds are over. A second Ctrl-C kills at once.
///
/// With -d each pod is held by a process of its own that outlives the terminal. husk returns when
/// all containers were started, and prints the pods' names. Such a pod has its name to itself, and
/// stays listed by `husk ps -a`, with its logs, until `husk rm`. `husk logs`, `exec`, `attach`, ...
/// work on pods in the foreground as well.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code:\n  \
    0    every pod Succeeded\n  \
    N    the only pod Failed: the exit code of its first container that failed (126 if a program\n       \
         cannot be executed, 127 if it does not exist, 128+N if signal N ended it)\n  \
    1    one of several pods Failed\n  \
    2    wrong arguments\n  \
    125  a pod could not be run: bad manifest, no image, no KVM, VM lost, ...\n\
    With -d: 0 if the containers of every pod were started, else 125.\n\n\
    Examples:\n  \
    husk run pod.yaml\n  \
    husk run -d --replace pod.yaml\n  \
    husk run a.yaml b.yaml\n  \
    husk run --output json - < pod.yaml > result.json")]
pub(crate) struct RunArgs {
    /// Manifests; - is the standard input
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// With json, one object per pod at the end on standard output, and logs on standard error
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Output,
    /// Seconds a guest may take to become ready, plus one for each GiB of its memory
    #[arg(long, env = "HUSK_START_TIMEOUT", value_name = "SECONDS", default_value_t = 600)]
    pub(crate) start_timeout: u64,
    /// What the pods reach: none, only themselves; default, the first network in /etc/cni/net.d, or a
    /// bridge with addresses of its own if there is none; NAME, that network; /PATH, the interfaces
    /// of a network namespace that is there
    #[arg(long, env = "HUSK_NETWORK", value_name = "NETWORK", default_value = "none")]
    pub(crate) network: NetworkArg,
    /// Size of each pod's disk (containers' writable layers, emptyDirs) in GiB; it is sparse
    #[arg(long, env = "HUSK_DISK_SIZE", value_name = "GIB", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=8192))]
    pub(crate) disk_size: u64,
    /// Do not print the closing table
    #[arg(long)]
    pub(crate) no_summary: bool,
    /// Run the pods in the background and return when their containers were started
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// With -d, remove a pod of the same name that has ended
    #[arg(long)]
    pub(crate) replace: bool,
    /// Size in MiB at which a container's log file is rotated
    #[arg(long, env = "HUSK_LOG_MAX_SIZE", value_name = "MIB", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub(crate) log_max_size: u64,
    /// How many log files a run of a container may have, the current one included
    #[arg(long, env = "HUSK_LOG_MAX_FILES", value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) log_max_files: u32,
    /// Let `husk debug` run the programs of this image beside the containers, with the whole guest
    /// open to them; it is pulled if it is not here
    #[arg(long, value_name = "IMAGE")]
    pub(crate) debug_image: Option<String>,
}

impl RunArgs {
    pub(crate) fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout)
    }

    /// The same options for another husk, without files and what concerns only this one.
    pub(crate) fn repeated(&self) -> Vec<String> {
        let RunArgs {
            files: _,
            output: _,
            start_timeout,
            network,
            disk_size,
            no_summary: _,
            detach: _,
            replace,
            log_max_size,
            log_max_files,
            debug_image,
        } = self;
        let mut options = vec![
            format!("--start-timeout={start_timeout}"),
            format!("--network={network}"),
            format!("--disk-size={disk_size}"),
            format!("--log-max-size={log_max_size}"),
            format!("--log-max-files={log_max_files}"),
        ];
        options.extend(replace.then(|| "--replace".to_owned()));
        options.extend(debug_image.iter().map(|image| format!("--debug-image={image}")));
        options
    }
}

/// What `--network` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetworkArg(pub(crate) Network);

impl std::str::FromStr for NetworkArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(NetworkArg(match text {
            "" => {
                return Err("give none, default, the name of a network or an absolute path".into());
            }
            "none" => Network::Loopback,
            "default" => Network::Cni(None),
            path if path.starts_with('/') => Network::Netns(path.into()),
            path if path.contains('/') => return Err("the path must be absolute".into()),
            name => Network::Cni(Some(name.into())),
        }))
    }
}

impl std::fmt::Display for NetworkArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Network::Loopback => f.write_str("none"),
            Network::Cni(None) => f.write_str("default"),
            Network::Cni(Some(name)) => f.write_str(name),
            Network::Netns(path) => path.display().fmt(f),
        }
    }
}

/// Check what this host has and lacks to run pods
///
/// KVM is proven by running a few instructions in a guest: some hosts let one create virtual
/// machines but cannot run them.
///
/// With PODs it is their networks that are checked, and not the host: whether the network namespace is
/// there, and whether the CNI plugins find in it what they made (CHECK).
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code: 0 if nothing failed (warnings may remain), else 1.")]
pub(crate) struct CheckArgs {
    /// Check the networks of these pods
    #[arg(value_name = "POD")]
    pub(crate) pods: Vec<String>,
    /// How to show the results
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Output,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn networks_are_told_apart_and_repeated_as_they_were() {
        for (text, network) in [
            ("none", Network::Loopback),
            ("default", Network::Cni(None)),
            ("podman", Network::Cni(Some("podman".into()))),
            ("/run/netns/x", Network::Netns("/run/netns/x".into())),
        ] {
            let arg: NetworkArg = text.parse().expect(text);
            assert_eq!((arg.to_string().as_str(), arg.0), (text, network));
        }
        assert!("".parse::<NetworkArg>().is_err() && "a/b".parse::<NetworkArg>().is_err());
    }

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }
}

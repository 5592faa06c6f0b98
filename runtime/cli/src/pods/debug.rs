//! `husk debug`: a process in the guest, beside all containers.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::ExecStart;

use super::exec::{Call, converse};
use super::{Pods, session};
use crate::args::Global;

/// Run a shell or a command in a pod's guest, outside of its containers
///
/// For this the pod must have been started with `husk run --debug-image IMAGE`: the guest itself
/// holds nothing that could be run, so the programs are those of IMAGE. They run as root with every
/// capability and every device, and see the whole guest: the agent as process 1, the processes of
/// all containers, all cgroups, the pod's network, and the guest's own root at /guest. The root of a
/// container is at /proc/PID/root of any of its processes.
///
/// What is changed in the image's files is gone afterwards, and so is everything that the command
/// left running. The pod's status, restarts and statistics do not know of it, and its end does not
/// wait for it. When husk itself is killed, the command is, too.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code:\n  \
    that of the command (128+N if signal N ended it), or\n  \
    126  it cannot be executed\n  \
    127  the image does not have it\n  \
    125  it could not be tried: no such pod, not running, debugging not enabled, ...\n\n\
    Examples:\n  \
    husk run -d --debug-image busybox pod.yaml\n  \
    husk debug -it web\n  \
    husk debug web -- ps\n  \
    husk debug web -- cat /sys/fs/cgroup/memory.stat")]
pub(crate) struct DebugArgs {
    /// Pass on standard input
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
    /// Command and its arguments [default: sh]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) fn run(global: &Global, args: DebugArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let start = ExecStart {
        args: args.command,
        tty: args.tty,
        stdin: args.stdin,
        size: session::window().filter(|_| args.tty),
        ..ExecStart::default()
    };
    converse(found, Call::Debug, start)
}

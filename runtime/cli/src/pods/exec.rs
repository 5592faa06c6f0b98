//! `husk exec`: one more process in a container.

use std::process::ExitCode;

use clap::Args;
use husk_engine::holder::client::messages::exec_request::Message;
use husk_engine::holder::client::messages::{ExecRequest, ExecStart};
use husk_engine::holder::record::Found;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::session::{self, End, Session};
use super::{Pods, block_on, connect, container, refusal, terminal};
use crate::EXIT_HUSK_FAILED;
use crate::args::Global;

/// Run a command in a container
///
/// The command runs beside the container's own process, with its user, environment, working
/// directory and rights unless told otherwise. Without -t, SIGINT, SIGTERM, SIGHUP and SIGQUIT are
/// passed on to it; with -t, everything that is typed is. When husk itself is killed, the command's
/// input ends and its output is thrown away; with -t it is hung up on.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code:\n  \
    that of the command (128+N if signal N ended it), or\n  \
    126  it cannot be executed\n  \
    127  it does not exist\n  \
    125  it could not be tried: no such pod or container, not running, ...\n\n\
    Examples:\n  \
    husk exec -it web sh\n  \
    husk exec web -- ls -l /etc\n  \
    husk exec -u nobody -e LANG=C -w /tmp -c nginx web env\n  \
    tar c dir | husk exec -i web tar x -C /srv")]
pub(crate) struct ExecArgs {
    /// Pass on standard input
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// In this container [default: the first one]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// As this user, by name or number, instead of the container's
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Set a variable; without a value it is taken from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// In this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
    /// Command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

pub(crate) fn run(global: &Global, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let container = container(found, args.container.as_deref())?.to_owned();
    let start = ExecStart {
        container,
        args: args.command,
        env: args.env.into_iter().filter_map(variable).collect(),
        cwd: args.workdir.unwrap_or_default(),
        user: args.user.unwrap_or_default(),
        tty: args.tty,
        stdin: args.stdin,
        size: session::window().filter(|_| args.tty),
    };
    converse(found, Call::Exec, start)
}

/// What the pod's process is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// To run a process in a container.
    Exec,
    /// To run one beside all containers.
    Debug,
}

/// Has a process run, joins its streams with this command's, and returns its exit code.
pub(super) fn converse(found: &Found, call: Call, start: ExecStart) -> anyhow::Result<ExitCode> {
    let (stdin, tty) = (start.stdin, start.tty);
    anyhow::ensure!(
        !(tty && stdin) || terminal::is_ours(),
        "standard input is no terminal; leave -t out"
    );
    let session = Session { stdin, tty, detach: false, signals: true };
    let end = block_on(async {
        let mut pod = connect(found).await?;
        let (to, requests) = mpsc::channel(session::QUEUE);
        let wrap = |message| ExecRequest { message: Some(message) };
        // There is room for it.
        to.send(wrap(Message::Start(start))).await?;
        let requests = ReceiverStream::new(requests);
        let output = match call {
            Call::Exec => pod.exec(requests).await,
            Call::Debug => pod.debug(requests).await,
        };
        let output = output.map_err(refusal)?.into_inner();
        session::join(session, output, to, |input| wrap(Message::Input(input))).await
    })?;
    Ok(match end {
        End::Exited(code) => ExitCode::from(code),
        End::NotExecuted(code, message) => {
            eprintln!("husk: {message}");
            ExitCode::from(code)
        }
        End::Left => ExitCode::from(EXIT_HUSK_FAILED),
    })
}

/// `NAME=VALUE` of what was given; a name alone stands for the variable here, if there is one.
fn variable(given: String) -> Option<String> {
    if given.contains('=') {
        return Some(given);
    }
    let value = std::env::var(&given).ok()?;
    Some(format!("{given}={value}"))
}

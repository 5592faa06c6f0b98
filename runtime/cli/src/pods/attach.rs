//! `husk attach`: joins a container's own process.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use husk_engine::holder::client::messages::attach_request::Message;
use husk_engine::holder::client::messages::{AttachRequest, AttachStart};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::session::{self, End, LAST_WORDS, Session};
use super::{Pods, block_on, connect, container, refusal, terminal};
use crate::args::Global;

/// Join the streams of a container's own process
///
/// What the container writes from now on is shown; what was written before is in `husk logs`. If the
/// manifest says `stdin: true`, what is typed goes to the container. If it says `tty: true`, ctrl-p
/// ctrl-q leaves the container running; without a terminal Ctrl-C does. With `stdinOnce: true` the
/// container's input ends when the first one leaves.
///
/// Whoever does not read for long is cut off, and holds nobody up.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit code: that of the container, or 0 if it was left running.\n\n\
    Examples:\n  \
    husk attach shell\n  \
    husk attach --no-stdin -c nginx web")]
pub(crate) struct AttachArgs {
    /// To this container [default: the first one]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// Only look
    #[arg(long)]
    no_stdin: bool,
    /// Pod
    #[arg(value_name = "POD")]
    pod: String,
}

pub(crate) fn run(global: &Global, args: &AttachArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let name = container(found, args.container.as_deref())?;
    let known = found.pod.containers.iter().find(|container| container.name == name);
    let known = known.context("the container is not in the pod's record")?;
    let stdin = known.stdin && !args.no_stdin;
    let session = Session { stdin, tty: known.tty, detach: true, signals: false };
    let start = AttachStart {
        container: name.to_owned(),
        stdin,
        size: session::window().filter(|_| known.tty && terminal::is_ours()),
    };
    let end = block_on(async {
        let mut pod = connect(found).await?;
        let (to, requests) = mpsc::channel(session::QUEUE);
        let wrap = |message| AttachRequest { message: Some(message) };
        to.send(wrap(Message::Start(start))).await?;
        let output = pod.attach(ReceiverStream::new(requests)).await.map_err(refusal)?;
        let end =
            session::join(session, output.into_inner(), to, |input| wrap(Message::Input(input)))
                .await;
        if matches!(end, Ok(End::Left)) {
            // What was typed last is on its way.
            tokio::time::sleep(LAST_WORDS).await;
        }
        end
    })?;
    Ok(match end {
        End::Exited(code) | End::NotExecuted(code, _) => ExitCode::from(code),
        End::Left => {
            eprintln!("\nhusk: left {name} running");
            ExitCode::SUCCESS
        }
    })
}

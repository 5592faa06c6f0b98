//! The hooks of the OCI runtime specification that belong to the host: `prestart`, `createRuntime`,
//! `poststart` and `poststop`. Those of the container run in the guest: the agent's business.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, State};
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, Command};

/// A point of a container's life at which hooks of the host run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// After the container was made and before its program. Deprecated by the specification, and
    /// run before `CreateRuntime`.
    Prestart,
    /// The same moment.
    CreateRuntime,
    /// After the program has started.
    Poststart,
    /// After the container was deleted.
    Poststop,
}

impl Point {
    /// The field's name.
    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// Whether a failure stops the container, and the hooks after it. Otherwise the specification
    /// asks for a warning.
    fn must_succeed(self) -> bool {
        matches!(self, Self::Prestart | Self::CreateRuntime)
    }
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("hooks.{point}[{index}]: {path}")]
pub struct HookError {
    point: &'static str,
    index: usize,
    path: PathBuf,
    #[source]
    source: Failure,
}

/// How a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Its path is not absolute, or its timeout not positive.
    #[error("{field} must be {must}")]
    Invalid {
        /// The field of the hook.
        field: &'static str,
        /// What the specification demands.
        must: &'static str,
    },
    /// It could not be run, or not be followed.
    #[error("cannot be run")]
    Io(#[from] io::Error),
    /// It ended with an error.
    #[error("{}: {said}", how(*status))]
    Status {
        /// How it ended.
        status: ExitStatus,
        /// The beginning of its standard error.
        said: String,
    },
    /// It took longer than its timeout, and was killed with its process group.
    #[error("not done after {seconds} s: {said}")]
    Timeout {
        /// Its timeout.
        seconds: u64,
        /// The beginning of its standard error.
        said: String,
    },
}

/// How a process ended, in words.
fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Most bytes of a hook's standard error that an error shows.
const MAX_OUTPUT: usize = 1024;

/// Runs the hooks of a point one after another, with the container's state as their input.
///
/// # Errors
/// [`HookError`] for the first that fails, if the point is one at which a failure stops the
/// container; else a failure is a warning in the log.
///
/// # Cancellation
/// A hook that runs when this is dropped is killed.
pub async fn run(point: Point, hooks: &[Hook], state: &State) -> Result<(), HookError> {
    for (index, hook) in hooks.iter().enumerate() {
        let Err(source) = run_one(hook, state).await else { continue };
        let path = hook.path().clone();
        let error = HookError { point: point.name(), index, path, source };
        if point.must_succeed() {
            return Err(error);
        }
        tracing::warn!(
            hook = %error,
            error = %error.source,
            container = state.id().as_str(),
            "a hook failed"
        );
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &State) -> Result<(), Failure> {
    if !hook.path().is_absolute() {
        return Err(Failure::Invalid { field: "path", must: "absolute" });
    }
    let limit = match hook.timeout().map(u64::try_from) {
        None => None,
        Some(Ok(seconds @ 1..)) => Some(seconds),
        Some(_) => return Err(Failure::Invalid { field: "timeout", must: "greater than zero" }),
    };
    let state = serde_json::to_vec(state).map_err(io::Error::from)?;
    let mut command = Command::new(hook.path());
    // A process group of its own, so that a timeout reaches what it started.
    command.env_clear().process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some((first, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(first).args(rest);
    }
    for entry in hook.env().iter().flatten() {
        let Some((key, value)) = entry.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            return Err(Failure::Invalid { field: "env", must: "NAME=VALUE" });
        };
        command.env(OsStr::new(key), OsStr::new(value));
    }
    let mut child = command.spawn()?;
    let mut said = Vec::new();
    let ended = follow(&mut child, &state, &mut said);
    let status = match limit {
        None => Some(ended.await?),
        Some(seconds) => match tokio::time::timeout(Duration::from_secs(seconds), ended).await {
            Ok(status) => Some(status?),
            Err(_) => None,
        },
    };
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Failure::Status { status, said }),
        None => {
            kill(&mut child).await?;
            Err(Failure::Timeout { seconds: limit.unwrap_or_default(), said })
        }
    }
}

/// Feeds a hook, hears what it says, and waits for its end. What it started may go on talking: that
/// is not waited for.
async fn follow(child: &mut Child, state: &[u8], said: &mut Vec<u8>) -> io::Result<ExitStatus> {
    let (input, output) = (child.stdin.take(), child.stderr.take());
    let feed = async {
        let Some(mut input) = input else { return };
        // A hook need not read it.
        if let Err(error) = input.write_all(state).await {
            tracing::debug!(%error, "a hook did not read the state");
        }
    };
    let hear = async {
        if let Some(mut output) = output {
            hear(&mut output, said).await;
        }
    };
    let talk = async {
        tokio::join!(feed, hear);
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        // What it has said before its end comes first.
        biased;
        never = talk => match never {},
        status = child.wait() => status,
    }
}

/// Reads to the end, and keeps up to [`MAX_OUTPUT`] bytes.
async fn hear(output: &mut ChildStderr, said: &mut Vec<u8>) {
    let mut buffer = [0_u8; 512];
    loop {
        match output.read(&mut buffer).await {
            Ok(0) => return,
            Ok(count) => {
                let room = MAX_OUTPUT.saturating_sub(said.len()).min(count);
                said.extend_from_slice(buffer.get(..room).unwrap_or_default());
            }
            Err(error) => {
                tracing::debug!(%error, "a hook's output cannot be read");
                return;
            }
        }
    }
}

/// Kills a hook and its process group, and reaps it.
async fn kill(child: &mut Child) -> io::Result<()> {
    // None if it has been reaped: then its number may be another's.
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
        && let Err(error) = rustix::process::kill_process_group(pid, Signal::KILL)
    {
        tracing::debug!(%error, "a hook's process group has ended");
    }
    child.kill().await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use oci_spec::runtime::{ContainerState, HookBuilder, StateBuilder};

    fn hook(script: &str) -> HookBuilder {
        let args = ["name", "-c", script].map(str::to_owned).to_vec();
        HookBuilder::default().path("/bin/sh").args(args).env(vec!["PATH=/bin:/usr/bin".into()])
    }

    fn state() -> State {
        StateBuilder::default()
            .version("1.2.0")
            .id("c")
            .status(ContainerState::Created)
            .pid(7)
            .bundle("/bundle")
            .build()
            .unwrap()
    }

    async fn error(hook: HookBuilder) -> String {
        let hooks = [hook.build().unwrap()];
        let error = run(Point::CreateRuntime, &hooks, &state()).await.unwrap_err();
        format!("{error}: {}", error.source)
    }

    #[tokio::test]
    async fn hooks_run_in_order_with_the_state_and_their_own_environment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out").display().to_string();
        let first = hook(&format!("cat > {path}; echo >> {path}; echo $0 $HOME. >> {path}"));
        let second = hook(&format!("echo second >> {path}"));
        let hooks = [first.build().unwrap(), second.build().unwrap()];
        run(Point::Prestart, &hooks, &state()).await.unwrap();
        let out = std::fs::read_to_string(&path).unwrap();
        let (json, rest) = out.split_once('\n').unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"ociVersion": "1.2.0", "id": "c", "status": "created", "pid": 7,
                               "bundle": "/bundle"})
        );
        assert_eq!(rest, "name .\nsecond\n");
    }

    #[tokio::test]
    async fn a_failure_names_the_hook_and_says_why() {
        let text = error(hook("echo because >&2; exit 3")).await;
        assert_eq!(text, "hooks.createRuntime[0]: /bin/sh: exit code 3: because");
        assert!(error(hook("kill -9 $$")).await.contains("ended by signal 9"));
        assert!(error(hook("").path("/no/such")).await.contains("/no/such: cannot be run"));
        assert!(error(hook("").path("sh")).await.contains("path must be absolute"));
        assert!(error(hook("").timeout(0)).await.contains("timeout must be greater than zero"));
        assert!(error(hook("").env(vec!["A".into()])).await.contains("env must be NAME=VALUE"));
        let loud = error(hook("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1")).await;
        assert!(loud.len() < 2 * MAX_OUTPUT, "{}", loud.len());
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", path.display());
        // Long enough for a busy machine to have begun.
        let text = error(hook(&script).timeout(5)).await;
        assert!(text.contains("not done after 5 s"), "{text}");
        let pid = std::fs::read_to_string(path).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = async {
            while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(500), gone).await.unwrap();
    }

    #[tokio::test]
    async fn what_a_hook_started_is_not_waited_for() {
        let hooks = [hook("sleep 1000 & exit 0").build().unwrap()];
        let state = state();
        let ended = run(Point::CreateRuntime, &hooks, &state);
        tokio::time::timeout(Duration::from_secs(500), ended).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_failure_stops_the_rest_only_before_the_program() {
        let directory = tempfile::tempdir().unwrap();
        for (point, stops) in [
            (Point::Prestart, true),
            (Point::CreateRuntime, true),
            (Point::Poststart, false),
            (Point::Poststop, false),
        ] {
            let path = directory.path().join(point.name());
            let hooks = [hook("exit 1"), hook(&format!("echo > {}", path.display()))]
                .map(|hook| hook.build().unwrap());
            assert_eq!(run(point, &hooks, &state()).await.is_err(), stops);
            assert_eq!(path.exists(), !stops, "{point:?}");
        }
    }
}

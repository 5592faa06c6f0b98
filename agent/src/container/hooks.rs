//! `hooks`: programs that the specification lets run at points of a container's life.
//!
//! Those of the host (`prestart`, `createRuntime`, `poststart`, `poststop`) are the host's business:
//! here they are only checked. The container's process runs the other two: `createContainer` when its
//! namespaces and mounts are made, with the agent's files still in sight, and `startContainer` as its
//! user, right before its program.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, OFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Deserialize;
use serde_json::json;

use super::process::{StepError, step};
use super::spec::{self, Spec, SpecError};

/// `hooks` as given.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    create_container: Vec<Hook>,
    start_container: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

/// A program, run once.
#[derive(Debug, Clone, Deserialize)]
struct Hook {
    path: String,
    /// With the name of the program first, as for execv(3).
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    /// In seconds.
    timeout: Option<i64>,
}

/// The hooks that run in the guest, and what they are told.
#[derive(Debug, Clone)]
pub(crate) struct HookPlan {
    create_container: Vec<Hook>,
    start_container: Vec<Hook>,
    /// The container's state without status and process ID.
    state: serde_json::Map<String, serde_json::Value>,
}

/// A point of a container's life.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Point {
    CreateContainer,
    StartContainer,
}

/// Most hooks for one point.
const MAX_HOOKS: usize = 64;

/// Most bytes of a hook's output that an error shows.
const MAX_OUTPUT: usize = 1024;

impl HookPlan {
    /// Understands the hooks of container `id`, whose directory is `bundle`.
    ///
    /// # Errors
    /// [`SpecError`] naming the field.
    pub(crate) fn new(id: &str, bundle: &str, spec: &Spec) -> Result<Self, SpecError> {
        let Hooks {
            prestart,
            create_runtime,
            create_container,
            start_container,
            poststart,
            poststop,
        } = &spec.hooks;
        for (name, hooks) in [
            ("prestart", prestart),
            ("createRuntime", create_runtime),
            ("createContainer", create_container),
            ("startContainer", start_container),
            ("poststart", poststart),
            ("poststop", poststop),
        ] {
            check(name, hooks)?;
        }
        let state = json!({
            "ociVersion": spec.oci_version,
            "id": id,
            "bundle": bundle,
            "annotations": spec.annotations,
        });
        Ok(Self {
            create_container: create_container.clone(),
            start_container: start_container.clone(),
            state: state.as_object().cloned().unwrap_or_default(),
        })
    }

    /// Runs the hooks of one point, one after another, up to the first that fails. To be called by
    /// the container's process, which has one thread and whose descriptors are all close-on-exec.
    ///
    /// # Errors
    /// [`StepError`] naming the hook.
    pub(crate) fn run(&self, point: Point) -> Result<(), StepError> {
        let (name, hooks, status) = match point {
            Point::CreateContainer => ("createContainer", &self.create_container, "creating"),
            Point::StartContainer => ("startContainer", &self.start_container, "created"),
        };
        if hooks.is_empty() {
            return Ok(());
        }
        let mut state = self.state.clone();
        state.insert("status".into(), status.into());
        // As the container sees it.
        state.insert("pid".into(), std::process::id().into());
        let state = serde_json::Value::from(state).to_string();
        for (index, hook) in hooks.iter().enumerate() {
            hook.run(&state).map_err(step(format!("hooks.{name}[{index}]: {}", hook.path)))?;
        }
        Ok(())
    }
}

/// What the specification demands of every hook.
fn check(name: &str, hooks: &[Hook]) -> Result<(), SpecError> {
    if hooks.len() > MAX_HOOKS {
        let count = hooks.len().to_string();
        return Err(SpecError::invalid(format!("hooks.{name}"), count, "at most 64 hooks"));
    }
    for (index, hook) in hooks.iter().enumerate() {
        let field = |field: &str| format!("hooks.{name}[{index}].{field}");
        spec::check_path(|| field("path"), &hook.path)?;
        if let Some(timeout) = hook.timeout.filter(|t| *t <= 0) {
            let reason = "must be greater than zero";
            return Err(SpecError::invalid(field("timeout"), timeout.to_string(), reason));
        }
        if let Some(entry) = hook.env.iter().find(|e| e.starts_with('=') || !e.contains('=')) {
            return Err(SpecError::invalid(field("env"), entry, "must be NAME=VALUE"));
        }
        let mut strings = hook.args.iter().chain(&hook.env).chain([&hook.path]);
        if let Some(bad) = strings.find(|s| s.contains('\0')) {
            let field = format!("hooks.{name}[{index}]");
            return Err(SpecError::invalid(field, bad, "must not contain a NUL"));
        }
    }
    Ok(())
}

impl Hook {
    /// Runs the hook with the state as its input.
    fn run(&self, state: &str) -> io::Result<()> {
        let (output, output_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK)?;
        let mut command = Command::new(&self.path);
        // Its own process group, so that a time-out reaches what it started.
        command.env_clear().process_group(0).stdin(input(state)?);
        command.stdout(output_write.try_clone()?).stderr(output_write);
        if let Some((first, rest)) = self.args.split_first() {
            command.arg0(first).args(rest);
        }
        for (key, value) in self.env.iter().filter_map(|entry| entry.split_once('=')) {
            command.env(key, value);
        }
        let child = command.spawn()?;
        // The pipe must end with the hook.
        drop(command);
        let limit = self.timeout.and_then(|s| u64::try_from(s).ok()).map(Duration::from_secs);
        let mut shown = Vec::new();
        let status = wait(child, &output, limit, &mut shown)?;
        if status.is_some_and(|s| s.success()) {
            return Ok(());
        }
        let how = match status {
            None => format!("not done after {} s", self.timeout.unwrap_or_default()),
            Some(status) => match status.signal() {
                Some(signal) => format!("ended by signal {signal}"),
                None => format!("exit code {}", status.code().unwrap_or_default()),
            },
        };
        let said = String::from_utf8_lossy(&shown);
        Err(io::Error::other(format!("{how}: {}", said.trim()).trim_end_matches(": ").to_owned()))
    }
}

/// A file that holds the state, so that nobody has to wait until the hook reads it.
fn input(state: &str) -> io::Result<Stdio> {
    let file = rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(state.as_bytes())?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

/// Waits for the end of a hook, and keeps the beginning of what it says. None if it took too long:
/// then it has been killed, with its process group.
fn wait(
    mut child: Child,
    output: &OwnedFd,
    limit: Option<Duration>,
    shown: &mut Vec<u8>,
) -> io::Result<Option<ExitStatus>> {
    let begin = Instant::now();
    let raw = i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData)?;
    let pid = Pid::from_raw(raw).ok_or(io::ErrorKind::InvalidData)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let mut open = true;
    loop {
        let left = limit.map(|limit| limit.saturating_sub(begin.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            // It may have ended this instant; its number is its own until it is waited for.
            let _ended = rustix::process::kill_process_group(pid, Signal::KILL);
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut watched = vec![PollFd::new(&pidfd, PollFlags::IN)];
        if open {
            watched.push(PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut watched, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = watched.first().is_some_and(|fd| !fd.revents().is_empty());
        let heard = watched.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if heard {
            open = read_some(output, shown)?;
        }
        // Only after its end and when it has nothing more to say; what it started may go on talking.
        if ended && !(heard && open && shown.len() < MAX_OUTPUT) {
            return child.wait().map(Some);
        }
    }
}

/// Reads what is there, and keeps up to [`MAX_OUTPUT`] bytes in all. False at the end.
fn read_some(output: &OwnedFd, shown: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0_u8; 512];
    match rustix::io::read(output, &mut buffer) {
        Ok(0) => Ok(false),
        Ok(count) => {
            let room = MAX_OUTPUT.saturating_sub(shown.len()).min(count);
            shown.extend_from_slice(buffer.get(..room).unwrap_or_default());
            Ok(true)
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["name".into(), "-c".into(), script.into()],
            env: vec!["A=1".into()],
            timeout,
        }
    }

    #[test]
    fn a_hook_gets_the_state_its_arguments_and_its_environment_only() {
        hook("test \"$(cat)\" = state && test $0 = name && test -z \"$HOME\" && test $A = 1", None)
            .run("state")
            .unwrap();
        // One that does not read it is not waited for.
        hook("true", None).run(&"x".repeat(1 << 20)).unwrap();
    }

    #[test]
    fn a_failure_says_how_and_what_the_hook_said() {
        let error = |script: &str| hook(script, None).run("").unwrap_err().to_string();
        assert_eq!(error("echo why >&2; exit 3"), "exit code 3: why");
        assert_eq!(error("kill -9 $$"), "ended by signal 9");
        assert!(error("yes | head -c 1000000; exit 1").len() < 2 * MAX_OUTPUT);
        let missing = Hook { path: "/nope".into(), ..hook("", None) };
        assert_eq!(missing.run("").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", path.display());
        let error = hook(&script, Some(1)).run("").unwrap_err();
        assert_eq!(error.to_string(), "not done after 1 s");
        let pid = std::fs::read_to_string(path).unwrap();
        // Killed; what remains of it, if anything, is a zombie that nobody has reaped yet. It need not
        // have got round to dying.
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            state.is_err() || state.is_ok_and(|s| s.contains(") Z "))
        };
        for _ in 0..1000 {
            if gone() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("process {pid} lives");
    }

    #[test]
    fn a_descendant_that_keeps_the_output_open_is_not_waited_for() {
        let begin = Instant::now();
        hook("sleep 1000 & exit 0", None).run("").unwrap();
        assert!(begin.elapsed() < Duration::from_secs(500));
    }

    #[test]
    fn impossible_hooks_are_refused_by_name() {
        for (hook, field) in [
            (Hook { path: "sh".into(), ..hook("", None) }, "hooks.x[0].path"),
            (hook("", Some(0)), "hooks.x[0].timeout"),
            (hook("", Some(-1)), "hooks.x[0].timeout"),
            (Hook { env: vec!["A".into()], ..hook("", None) }, "hooks.x[0].env"),
            (hook("\0", None), "hooks.x[0]"),
        ] {
            let message = check("x", &[hook]).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
        assert!(check("x", &vec![hook("", None); MAX_HOOKS + 1]).is_err());
    }
}

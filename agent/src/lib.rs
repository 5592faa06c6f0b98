//! The agent of a husk guest, which is its PID 1.
//!
//! What it is for: it makes the guest usable (mounts, cgroups, loopback), connects to the pod's
//! process, and serves [`husk_proto::agent`] on that one connection: the pod's file systems and
//! volumes, and its containers, each from an OCI `config.json`. What it is not for: decisions. It
//! pulls no image, restarts nothing, and knows nothing of Kubernetes.
//!
//! It has one thread, by construction: a current-thread runtime, and nothing that starts another.
//! A process that is cloned from it may therefore use ordinary Rust; [`sys::clone_process`] checks.
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::cast_possible_truncation
    )
)]

mod added;
mod boot;
mod cgroup;
mod container;
mod dial;
mod files;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod host;
mod hotplug;
mod kmsg;
mod log;
mod net;
mod pod;
mod reaper;
mod rpc;
mod stdio;
mod storage;
mod sys;
mod sysctl;
mod transport;

use std::borrow::Cow;
use std::error::Error;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use husk_proto::guest::signal;
use husk_proto::ports;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tracing::Level;

use crate::host::Host;
use crate::rpc::Agent;

/// How long requests that are under way may take to end once the guest is to be powered off.
const LAST_ANSWER_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Most requests at once.
const MAX_REQUESTS: u32 = 65_536;

/// The whole life of the agent. Does not return in a VM.
#[must_use]
pub fn run() -> ExitCode {
    let host = Host::of_environment();
    host.signal(signal::INIT);
    let init_ns = monotonic_ns();
    let outcome = boot::run(&host).map_err(|e| chain(&e)).and_then(|()| {
        start_log();
        container::let_the_containers_go_first().map_err(|e| format!("be scheduled: {e}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| format!("start the runtime: {e}"))?;
        runtime.block_on(serve(&host, init_ns))
    });
    if let Err(error) = &outcome {
        tracing::error!(error, "the agent gives up");
        // The log may not exist yet; the console does, if the kernel has one.
        eprintln!("husk-agent: {error}");
    }
    // Whatever happened: without an agent the guest is of no use, and its end tells the host.
    host.power_off();
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Logs to the kernel's log. Without one the agent is mute but works.
fn start_log() {
    // The kernel drops all but a few lines a second of a process's log otherwise. Not every kernel
    // has the switch.
    let _optional = std::fs::write("/proc/sys/kernel/printk_devkmsg", "on");
    let _mute = log::start(Level::INFO);
}

/// Connects to the pod's process and serves it until it closes the connection or asks for a
/// shutdown.
async fn serve(host: &Host, init_ns: u64) -> Result<(), String> {
    let reaper = reaper::Reaper::default();
    let reaping = tokio::spawn(reaper.clone().run());
    let agent = Agent::new(host.clone(), reaper, init_ns).map_err(|e| format!("start: {e}"))?;
    let shutdown = agent.shutdown_requested();

    let stream = host.transport().connect(ports::CONTROL).await.map_err(|e| chain(&e))?;
    agent.mark_ready(monotonic_ns());
    host.signal(signal::READY);

    let service = TowerToHyperService::new(agent.into_service());
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        // One for each process that is waited for.
        .max_concurrent_streams(MAX_REQUESTS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.notified() => {
            connection.as_mut().graceful_shutdown();
            // The client may keep the connection open: its answer has been sent by then.
            tokio::time::timeout(LAST_ANSWER_LIMIT, connection).await.unwrap_or(Ok(()))
        }
        ended = reaping => {
            return Err(match ended {
                Ok(Err(e)) => format!("reap: {e}"),
                Ok(Ok(())) | Err(_) => "the reaper ended".to_owned(),
            });
        }
    };
    if let Err(error) = result {
        tracing::warn!(%error, "the control connection broke");
    }
    tracing::info!("power off");
    Ok(())
}

/// Time of CLOCK_MONOTONIC in ns.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}

/// ns since the epoch; 0 for a clock that was never set.
pub(crate) fn epoch_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// An error with its chain of causes, as one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// A text of at most `max` bytes: of a longer one the middle is left out, because an error names the
/// field at its beginning, and the reason at its end.
pub(crate) fn shorten(text: &str, max: usize) -> Cow<'_, str> {
    const MARK: &str = " [...] ";
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    let half = max.saturating_sub(MARK.len()) / 2;
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    let start = (0..=half).rev().find(is_boundary).and_then(|at| text.get(..at));
    let tail = text.len().saturating_sub(half)..=text.len();
    let end = tail.into_iter().find(is_boundary).and_then(|at| text.get(at..));
    Cow::Owned([start.unwrap_or_default(), end.unwrap_or_default()].join(MARK))
}

/// Locks. A guard never lives across an `.await`, and there is one thread: it never waits. A panic
/// aborts the agent, so that no poisoned lock can be met.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::shorten;

    #[test]
    fn of_a_long_text_the_middle_is_left_out_between_characters() {
        assert_eq!(shorten("field: reason", 13), "field: reason");
        let long = format!("field: \"{}\" is no name", "\u{e4}".repeat(1000));
        for max in 40..48 {
            let short = shorten(&long, max);
            assert!(short.len() <= max, "{max}: {short}");
            assert!(short.starts_with("field: \"") && short.ends_with("\" is no name"), "{short}");
        }
        assert_eq!(shorten(&long, 0), " [...] ");
    }
}

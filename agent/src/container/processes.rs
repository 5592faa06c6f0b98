//! The processes of a container, as /proc shows them to the agent.

use std::fs;
use std::io::{self, Read};
use std::time::SystemTime;

use husk_proto::agent::ProcessInfo;
use rustix::time::ClockId;

use super::{ContainerError, Runner};
use crate::lock;

/// Most processes in one answer.
const MAX_PROCESSES: usize = 4096;

/// Longest command of one process in bytes, and of all in one answer, which must fit into a message
/// of gRPC (4 MiB). When they are used up, the others show their names only.
const MAX_COMMAND: usize = 4096;
const MAX_COMMANDS: usize = 2 << 20;

/// How many processes are looked at before others have a turn.
const BATCH: usize = 64;

const NS_PER_S: u64 = 1_000_000_000;

impl Runner {
    /// The processes of a container, in the order of their numbers. One that ends meanwhile is left
    /// out.
    ///
    /// # Errors
    /// [`ContainerError`] if there is no such container, or the kernel does not tell.
    pub(crate) async fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, ContainerError> {
        let mut pids = lock(&self.table).container(id)?.remains.cgroup.processes()?;
        // Zero stands for a process that this namespace does not have.
        pids.retain(|pid| *pid > 0);
        pids.sort_unstable();
        pids.dedup();
        pids.truncate(MAX_PROCESSES);
        let boot_ns = boot_time_ns();
        let mut commands = MAX_COMMANDS;
        let mut all = Vec::with_capacity(pids.len());
        for (index, pid) in pids.into_iter().enumerate() {
            let process = match process(pid, boot_ns, commands.min(MAX_COMMAND)) {
                Ok(process) => process,
                Err(e) if is_gone(&e) => continue,
                Err(source) => {
                    return Err(ContainerError::Read { path: format!("/proc/{pid}"), source });
                }
            };
            commands = commands.saturating_sub(process.command.len());
            all.push(process);
            if index % BATCH == BATCH - 1 {
                tokio::task::yield_now().await;
            }
        }
        Ok(all)
    }
}

/// Whether it says that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// When the guest booted, ns since the epoch.
fn boot_time_ns() -> u64 {
    let up = rustix::time::clock_gettime(ClockId::Boottime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    let up_ns = part(up.tv_sec).saturating_mul(NS_PER_S).saturating_add(part(up.tv_nsec));
    crate::epoch_ns(SystemTime::now()).saturating_sub(up_ns)
}

/// Reads what /proc says of a process.
fn process(pid: i32, boot_ns: u64, max_command: usize) -> io::Result<ProcessInfo> {
    let directory = format!("/proc/{pid}");
    let stat = fs::read(format!("{directory}/stat"))?;
    let Stat { name, state, ppid, ticks, started_ticks, pages } =
        Stat::parse(&String::from_utf8_lossy(&stat)).ok_or(io::ErrorKind::InvalidData)?;
    let status = fs::read(format!("{directory}/status"))?;
    let uid = uid(&String::from_utf8_lossy(&status)).ok_or(io::ErrorKind::InvalidData)?;
    let mut arguments = Vec::new();
    // One more than fits, to know that there is more.
    let most = u64::try_from(max_command).unwrap_or(0).saturating_add(1);
    fs::File::open(format!("{directory}/cmdline"))?.take(most).read_to_end(&mut arguments)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(ProcessInfo {
        pid: pid.unsigned_abs(),
        ppid,
        uid,
        state: state.to_string(),
        cpu_us: ticks.saturating_mul(1_000_000 / per_second),
        rss: pages.saturating_mul(u64::try_from(rustix::param::page_size()).unwrap_or(0)),
        started_at_ns: boot_ns.saturating_add(started_ticks.saturating_mul(NS_PER_S / per_second)),
        command: command(&arguments, &name, max_command),
    })
}

/// The arguments separated by spaces, cut to `max` bytes; or the name in brackets if there are none,
/// as of a process that is in the kernel only, or if there is no room for them.
fn command(arguments: &[u8], name: &str, max: usize) -> String {
    let text = String::from_utf8_lossy(arguments);
    let text = text.trim_end_matches('\0').replace('\0', " ");
    if text.is_empty() || max == 0 {
        return format!("[{name}]");
    }
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// The real user of a process, from its `status`.
fn uid(status: &str) -> Option<u32> {
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:")?.split_ascii_whitespace().next()?.parse().ok())
}

/// What is used of /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    ppid: u32,
    /// User and system time.
    ticks: u64,
    /// Since the boot.
    started_ticks: u64,
    pages: u64,
}

impl Stat {
    /// The name is in parentheses and may hold anything, so that the last one ends it.
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let fields: Vec<&str> = after.split_ascii_whitespace().collect();
        // The state is field 3 of the manual page.
        let number = |field: usize| fields.get(field.checked_sub(3)?)?.parse::<u64>().ok();
        Some(Self {
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            ppid: u32::try_from(number(4)?).ok()?,
            ticks: number(14)?.saturating_add(number(15)?),
            started_ticks: number(22)?,
            pages: number(24)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_with_parentheses_does_not_mislead() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4 0 0 0 0 30 12 0 0 20 0 1 0 4321 999 55 18446 1 2";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.name, "a) b (c");
        assert_eq!((stat.state, stat.ppid, stat.ticks), ('S', 1, 42));
        assert_eq!((stat.started_ticks, stat.pages), (4321, 55));
    }

    #[test]
    fn this_process_is_described() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let own = process(pid, boot_time_ns(), MAX_COMMAND).unwrap();
        assert_eq!(own.pid, std::process::id());
        assert!(own.rss > 0 && own.command.starts_with('/'), "{own:?}");
        let now = crate::epoch_ns(SystemTime::now());
        assert!(own.started_at_ns <= now && own.started_at_ns > boot_time_ns(), "{own:?}");
    }

    #[test]
    fn a_command_is_cut_or_replaced_by_the_name() {
        assert_eq!(command(b"sleep\x001000\0", "sleep", 99), "sleep 1000");
        assert_eq!(command(b"sleep\x001000\0", "sleep", 7), "sleep 1");
        assert_eq!(command("ää".as_bytes(), "x", 3), "ä");
        assert_eq!(command(b"", "kthreadd", 99), "[kthreadd]");
        assert_eq!(command(b"sleep\0", "sleep", 0), "[sleep]");
    }

    proptest! {
        #[test]
        fn hostile_names_and_arguments_never_panic(
            text in ".{0,80}", arguments in prop::collection::vec(any::<u8>(), 0..99), max in 0..50_usize,
        ) {
            let _nothing_to_check = Stat::parse(&text);
            prop_assert!(command(&arguments, "x", max).len() <= max.max(3));
        }
    }
}

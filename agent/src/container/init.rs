//! What runs inside a new process, between its clone and its program.
//!
//! The process is a copy of the agent, which has one thread, so that ordinary Rust works here; but
//! it owns nothing: it ends by exec or by [`sys::exit_now`], and never returns.
//!
//! ```text
//!   agent                                   new process
//!   clone3 -------------------------------> namespaces, mounts, identity, look-up
//!   read the report  <--- Ready/Failure --- report pipe
//!   write one byte   --- start pipe ------> read one byte (end of file: the container is deleted)
//!   read the report  <--- Failure or end -- execve (closes the report pipe)
//! ```
//!
//! A process for which there is nothing to wait is not held back: it leaves out the two in the middle.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::DumpableBehavior;
use rustix::pty::OpenptFlags;
use rustix::thread::ThreadNameSpaceType;

use super::hooks::Point;
use super::lookup::{self, StartFailure};
use super::namespaces;
use super::path::{self, Make};
use super::plan::ContainerPlan;
use super::process::{ProcessPlan, StepError, c_strings, step};
use super::report::Report;
use super::rootfs::{self, Overlay};
use super::user::Identity;
use super::user_namespace::{self, Mappings, UserNamespace};
use crate::sys;

/// The descriptors of a new process.
#[derive(Debug)]
pub(crate) struct Pipes {
    /// Standard input, output and error; unused with a terminal.
    pub(crate) stdio: [OwnedFd; 3],
    pub(crate) report: OwnedFd,
    /// For a process that is held back.
    pub(crate) start: Option<OwnedFd>,
}

/// What the new process is to become.
pub(crate) enum Job<'a> {
    /// The first process of a container.
    Container { plan: &'a ContainerPlan, overlay: &'a Overlay, user: Option<&'a UserNamespace> },
    /// One more process, in the namespaces of the process `pidfd`; of these it enters `kinds` itself,
    /// and the user namespace if there is one.
    Exec {
        plan: &'a ProcessPlan,
        pidfd: BorrowedFd<'a>,
        kinds: ThreadNameSpaceType,
        user: Option<&'a Mappings>,
        /// Whether it is held back until the agent says start.
        held: bool,
    },
}

impl Job<'_> {
    fn process(&self) -> &ProcessPlan {
        match self {
            Job::Container { plan, .. } => &plan.process,
            Job::Exec { plan, .. } => plan,
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        match self {
            Job::Container { .. } => true,
            Job::Exec { held, .. } => *held,
        }
    }
}

/// Why a process could not be prepared.
enum Trouble {
    Failure(StartFailure),
    Step(StepError),
}

impl From<StepError> for Trouble {
    fn from(error: StepError) -> Self {
        Self::Step(error)
    }
}

impl From<StartFailure> for Trouble {
    fn from(failure: StartFailure) -> Self {
        Self::Failure(failure)
    }
}

/// The exit code of a process that ended before its program, other than for [`StartFailure`].
const BROKEN: u8 = 255;

/// A program that is ready to be executed.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Prepares the process, reports, waits for the start, and executes the program.
pub(crate) fn run(job: &Job<'_>, pipes: &Pipes) -> ! {
    let program = match prepare(job, pipes) {
        Ok((program, terminal)) => {
            if let Some(start) = &pipes.start {
                let number = terminal.as_ref().map(AsRawFd::as_raw_fd);
                if send(pipes, &Report::Ready(number)).is_err() {
                    sys::exit_now(BROKEN);
                }
                wait_for_start(start);
            }
            // The agent has taken the terminal's master once it says start; it must not stay open
            // here, or the end of the terminal would never be seen.
            drop(terminal);
            program
        }
        Err(trouble) => give_up(pipes, trouble),
    };
    if let Err(error) = last_steps(job) {
        give_up(pipes, Trouble::Step(error));
    }
    let error = sys::execve(&program.path, &program.args, &program.env);
    let path = program.path.to_string_lossy();
    give_up(pipes, Trouble::Failure(lookup::exec_failure(&path, &error)))
}

/// What comes between the word to start and the program.
fn last_steps(job: &Job<'_>) -> Result<(), StepError> {
    if let Job::Container { plan, .. } = job {
        plan.hooks.run(Point::StartContainer)?;
    }
    job.process().apply_seccomp()
}

/// Reports trouble and ends.
fn give_up(pipes: &Pipes, trouble: Trouble) -> ! {
    let (code, report) = match trouble {
        Trouble::Failure(failure) => (failure.exit_code, Report::Failure(failure)),
        Trouble::Step(error) => (BROKEN, Report::Error(crate::chain(&error))),
    };
    // If the agent no longer listens there is nobody to tell.
    let _nobody_listens = send(pipes, &report);
    sys::exit_now(code)
}

fn send(pipes: &Pipes, report: &Report) -> io::Result<()> {
    // At most PIPE_BUF bytes: written as a whole.
    rustix::io::write(&pipes.report, &report.encode())?;
    Ok(())
}

/// Returns when the agent says start; ends the process if the agent closes the pipe instead.
fn wait_for_start(start: &OwnedFd) {
    let mut byte = [0_u8; 1];
    loop {
        match rustix::io::read(start, &mut byte) {
            Ok(0) => sys::exit_now(0),
            Ok(_) => return,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => sys::exit_now(BROKEN),
        }
    }
}

/// Everything up to the program. Returns it, and the terminal's master if there is a terminal.
fn prepare(job: &Job<'_>, pipes: &Pipes) -> Result<(Program, Option<OwnedFd>), Trouble> {
    let mut keep: Vec<i32> = pipes.stdio.iter().map(AsRawFd::as_raw_fd).collect();
    keep.push(pipes.report.as_raw_fd());
    keep.extend(pipes.start.as_ref().map(AsRawFd::as_raw_fd));
    match job {
        Job::Exec { pidfd, .. } => keep.push(pidfd.as_raw_fd()),
        Job::Container { user, .. } => {
            keep.extend(user.iter().flat_map(|user| user.descriptors()));
        }
    }
    sys::close_all_but(&keep).map_err(step("close the agent's descriptors"))?;
    sys::reset_signals();
    rustix::process::setsid().map_err(step("setsid"))?;
    rustix::process::umask(Mode::empty());
    // Other processes of the container must not look into this one while it is still the agent.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("make undumpable"))?;

    let process = job.process();
    process.apply_oom_score()?;
    process.apply_scheduling(matches!(job, Job::Exec { .. }))?;
    match job {
        Job::Container { plan, overlay, user } => make_container(plan, overlay, *user, pipes)?,
        Job::Exec { pidfd, kinds, user, .. } => {
            namespaces::enter_of(*pidfd, *kinds)?;
            if let Some(mappings) = user {
                leave_the_guests_root(process, mappings, pipes)?;
                user_namespace::enter(*pidfd)?;
            }
        }
    }
    let identity = process.identity()?;
    let terminal = match process.terminal {
        Some(size) => {
            Some(make_terminal(identity.uid, size, matches!(job, Job::Container { .. }))?)
        }
        None => {
            for (number, fd) in (0..).zip(&pipes.stdio) {
                give_pipe(fd, &identity).map_err(step("give a stream to the user"))?;
                sys::install_fd(fd.as_fd(), number).map_err(step("install the streams"))?;
            }
            None
        }
    };
    let env = process.environment(identity.uid);
    process.apply_rlimits()?;
    process.apply_identity(&identity)?;
    let name = process.args.first().map(String::as_str).unwrap_or_default();
    let path = lookup::find(name, &env)?;
    let program = Program { path, args: c_strings(&process.args)?, env: c_strings(&env)? };
    sys::close_on_exec_from_3().map_err(step("mark descriptors close-on-exec"))?;
    Ok((program, terminal))
}

/// Makes the container around its first process, and enters it.
fn make_container(
    plan: &ContainerPlan,
    overlay: &Overlay,
    user: Option<&UserNamespace>,
    pipes: &Pipes,
) -> Result<(), StepError> {
    let root = match user {
        None => {
            namespaces::enter_new(plan)?;
            rootfs::make(plan, overlay)?
        }
        Some(user) => {
            user.enter_others(plan)?;
            namespaces::enter_new(plan)?;
            let root = rootfs::make(&user.translate(plan)?, &user.map_layers(overlay)?)?;
            leave_the_guests_root(&plan.process, &user.mappings, pipes)?;
            user.enter()?;
            root
        }
    };
    sys::close_on_exec_from_3().map_err(step("mark descriptors close-on-exec"))?;
    plan.hooks.run(Point::CreateContainer)?;
    rootfs::enter(&root, plan)
}

/// What the root of a user namespace can no longer do.
fn leave_the_guests_root(
    process: &ProcessPlan,
    mappings: &Mappings,
    pipes: &Pipes,
) -> Result<(), StepError> {
    for fd in &pipes.stdio {
        if is_pipe(fd).map_err(step("look at a stream"))? {
            mappings.give(fd).map_err(step("give a stream to the container's root"))?;
        }
    }
    process.apply_rlimits()
}

fn is_pipe(fd: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Fifo)
}

/// Makes a pipe the user's, so that the program can open it again by /dev/stdout and the like.
/// /dev/null stays everybody's.
fn give_pipe(fd: &OwnedFd, identity: &Identity) -> rustix::io::Result<()> {
    if !is_pipe(fd)? {
        return Ok(());
    }
    let (uid, gid) =
        (rustix::fs::Uid::from_raw(identity.uid), rustix::fs::Gid::from_raw(identity.gid));
    rustix::fs::fchown(fd, Some(uid), Some(gid))
}

/// Makes a pseudo-terminal in the container, with its other end as the process's controlling
/// terminal and streams, and returns the master. `console` also puts it at /dev/console.
fn make_terminal(
    uid: u32,
    (columns, rows): (u16, u16),
    console: bool,
) -> Result<OwnedFd, StepError> {
    // The container's own file: not to be waited for, whatever it is. The master comes from the
    // kernel by ioctl, so that a false one is found out.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty())
        .map_err(step("terminal: open /dev/pts/ptmx"))?;
    rustix::pty::unlockpt(&master).map_err(step("terminal: unlock"))?;
    let open = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, open).map_err(step("terminal: open"))?;
    let size =
        rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&slave, size).map_err(step("terminal: set the size"))?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)
        .map_err(step("terminal: give to the user"))?;
    if console {
        bind_console(&slave).map_err(step("terminal: mount at /dev/console"))?;
    }
    rustix::process::ioctl_tiocsctty(&slave).map_err(step("terminal: make controlling"))?;
    for number in 0..3 {
        sys::install_fd(slave.as_fd(), number).map_err(step("terminal: install"))?;
    }
    Ok(master)
}

/// Mounts the terminal at /dev/console.
fn bind_console(slave: &OwnedFd) -> io::Result<()> {
    use rustix::mount::OpenTreeFlags as Flags;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mode = Mode::from_raw_mode(0o755);
    let target = path::open_or_make(root.as_fd(), "/dev/console", Make::File, mode)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) == FileType::Directory {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let flags = Flags::OPEN_TREE_CLONE | Flags::OPEN_TREE_CLOEXEC | Flags::AT_EMPTY_PATH;
    let copy = rustix::mount::open_tree(slave, "", flags)?;
    Ok(rootfs::attach(copy.as_fd(), target.as_fd())?)
}

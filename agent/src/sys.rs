//! The system calls that no safe wrapper exists for, each behind a safe function.
//!
//! The only module of the agent that may contain `unsafe`.
#![allow(unsafe_code)]
// Sizes of structures and constants of the C library, in the widths that its calls want.
#![allow(clippy::cast_possible_truncation)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which side of [`clone_process`] the caller is on.
pub(crate) enum Cloned {
    /// The caller is the new process.
    Child,
    /// The caller is the parent of this process.
    Parent {
        /// The child's process ID in the agent's namespace.
        pid: u32,
        /// A descriptor that names the child even after its ID was reused.
        pidfd: OwnedFd,
    },
}

/// Of linux/sched.h; the constants of the libc crate are too narrow for them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Makes a copy of this process with `clone3(2)`, in the namespaces of `flags` (CLONE_NEW*), and in
/// the cgroup whose directory is `cgroup`.
///
/// The child may use ordinary Rust because the agent has one thread; this is checked, not assumed.
/// The child has none of the agent's signal handlers, which would write to what it shares with the
/// agent. All signals are blocked in it, and stay so until it calls [`reset_signals`].
///
/// # Errors
/// `EDEADLK` if this process has more than one thread; otherwise what the kernel answers, e.g.
/// `EAGAIN` if no process ID is left.
pub(crate) fn clone_process(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is a plain structure of integers for which all zeroes is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(fd.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    }
    // SAFETY: both sets are initialised by sigfillset before they are read.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `all` and `before` are valid for writes; blocking signals has no other precondition.
    unsafe {
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &all, &mut before);
    }
    // SAFETY: without CLONE_VM the child gets a copy of this address space, so nothing is shared
    // but descriptors; with one thread (checked above) no lock can be held by a thread that the
    // child lacks. `args` and `pidfd` outlive the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>()) };
    let result = if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) };
    if matches!(result, Ok(0)) {
        return Ok(Cloned::Child);
    }
    // SAFETY: `before` was filled by the first sigprocmask.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    let pid = u32::try_from(result?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has stored a new descriptor in `pidfd`, and nobody else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid, pidfd })
}

/// Gives every signal its default action and unblocks all, as a program expects to find them.
pub(crate) fn reset_signals() {
    // SAFETY: sigaction and sigset_t are plain structures for which all zeroes is valid: SIG_DFL,
    // no flags, an empty mask.
    let default: libc::sigaction = unsafe { std::mem::zeroed() };
    // Handlers are gone since the clone; what was ignored still is, and Rust ignores this one.
    // SAFETY: `default` is a valid action.
    unsafe { libc::sigaction(libc::SIGPIPE, &default, std::ptr::null_mut()) };
    // SAFETY: sigemptyset initialises the set before it is used.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Replaces the program of this process. Returns only if that failed.
pub(crate) fn execve(path: &CString, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends this process at once: no destructor, no exit handler, no flush.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Closes every descriptor from 3 up that is not in `keep`.
///
/// For a freshly cloned child only: values that own the closed descriptors still exist in it, so it
/// must end by exec or [`exit_now`], never by dropping them.
pub(crate) fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 3_u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: the caller's contract: this child uses none of these descriptors any more.
            let rc = unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0_u32) };
            if rc < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.saturating_add(1).max(first);
    }
    Ok(())
}

/// Marks every descriptor from 3 up close-on-exec, whatever it is.
pub(crate) fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: changes only a flag of descriptors.
    let rc =
        unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Changes of `mount_setattr(2)`: attributes to set and to clear (MOUNT_ATTR_*), and the new
/// propagation type (MS_PRIVATE and so on) or 0.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
}

/// Applies `attr` to the mount `fd`, and to those below it if `recursive`.
pub(crate) fn mount_setattr(
    fd: BorrowedFd<'_>,
    recursive: bool,
    attr: MountAttr,
) -> io::Result<()> {
    set_mount_attr(
        fd,
        recursive,
        libc::mount_attr {
            attr_set: attr.set,
            attr_clr: attr.clear,
            propagation: attr.propagation,
            userns_fd: 0,
        },
    )
}

/// Lets the mount `fd`, which is attached nowhere yet, and those below it if `recursive`, show
/// owners of files by the mappings of a user namespace.
pub(crate) fn mount_set_id_map(
    fd: BorrowedFd<'_>,
    recursive: bool,
    user_namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    let args = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_raw_fd())
            .map_err(|_| io::ErrorKind::InvalidInput)?,
    };
    set_mount_attr(fd, recursive, args)
}

fn set_mount_attr(fd: BorrowedFd<'_>, recursive: bool, args: libc::mount_attr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and `args` is valid for its size.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &args,
            size_of::<libc::mount_attr>(),
        )
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes new files of this process belong to this user and group, without another change of its
/// identity. The kernel does not say whether it has, so that it is asked.
pub(crate) fn set_file_owner(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: changes only IDs of this thread, which is the only one.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        // No ID is -1, so that this changes nothing and tells what is.
        (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX))
    };
    if now == (uid.cast_signed(), gid.cast_signed()) {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Moves this process into new namespaces (CLONE_NEW*).
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: callers pass namespace flags only, never CLONE_FILES, and there is one thread.
    if unsafe { libc::unshare(flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends a signal by number, the real-time signals included.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: u32) -> io::Result<()> {
    // SAFETY: a null siginfo asks for that of kill(2); the others are integers.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0_u32,
        )
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Context ID of the host (`VMADDR_CID_HOST`).
const CID_HOST: u32 = libc::VMADDR_CID_HOST;

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD` of linux/vm_sockets.h, with the kernel's own timeval.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// Starts to connect a non-blocking vsock stream to a port of the host. The kernel gives up after
/// `timeout_s`; the caller waits until the socket is writable and then reads `SO_ERROR`.
pub(crate) fn vsock_connect(port: u32, timeout_s: i64) -> io::Result<OwnedFd> {
    // SAFETY: creates a descriptor.
    let fd = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let timeout = libc::timeval { tv_sec: timeout_s, tv_usec: 0 };
    // SAFETY: `timeout` is valid for its size.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            std::ptr::from_ref(&timeout).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sockaddr_vm is a plain structure for which all zeroes is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = CID_HOST;
    address.svm_port = port;
    // SAFETY: `address` is valid for its size.
    let rc = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    match io::Error::last_os_error() {
        _ if rc == 0 => Ok(fd),
        e if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        e => Err(e),
    }
}

/// Brings the loopback interface of the current network namespace up, by `SIOCSIFFLAGS`: one ioctl,
/// where netlink would bring a library. The kernel adds 127.0.0.1 and ::1 by itself.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: creates a descriptor.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: ifreq is a plain structure for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` names an interface and holds its flags, as SIOCSIFFLAGS wants.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes one byte to an I/O port; false if this process may not.
///
/// The permission is given back at once: processes that are cloned later would inherit it, and with
/// it the power to end the VM.
#[cfg(target_arch = "x86_64")]
pub(crate) fn write_port(port: u16, value: u8) -> bool {
    // SAFETY: asks for permission for one port; has no other effect.
    let permit = |on| unsafe { libc::ioperm(libc::c_ulong::from(port), 1, on) } == 0;
    if !permit(1) {
        return false;
    }
    // SAFETY: the kernel has granted this port, and the device behind it (husk's signal port)
    // accesses no memory of the guest.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack));
    }
    permit(0)
}

/// Other architectures have no I/O ports.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn write_port(_port: u16, _value: u8) -> bool {
    false
}

/// Whether this process may execute the file, by its effective IDs.
pub(crate) fn executable(path: &CString) -> io::Result<()> {
    // SAFETY: the path is a C string.
    let rc =
        unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes `fd` the descriptor `number` of this process, without close-on-exec.
pub(crate) fn install_fd(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: only called with 0, 1 and 2, which no Rust value of the agent owns.
    if unsafe { libc::dup2(fd.as_fd().as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How a process is scheduled: the fields of `struct sched_attr` (linux/sched/types.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchedAttr {
    /// `SCHED_*`
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    /// These three in nanoseconds.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Changes how this process is scheduled.
pub(crate) fn sched_setattr(attr: &SchedAttr) -> io::Result<()> {
    /// SCHED_ATTR_SIZE_VER0.
    #[repr(C)]
    struct Attr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let SchedAttr { policy, flags, nice, priority, runtime, deadline, period } = *attr;
    let size = size_of::<Attr>() as u32;
    let attr = Attr { size, policy, flags, nice, priority, runtime, deadline, period };
    // SAFETY: `attr` is valid for the size that it names.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attr, 0_u32) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the I/O priority of this process: its class from bit 13 up, and the level.
pub(crate) fn ioprio_set(priority: u16) -> io::Result<()> {
    /// IOPRIO_WHO_PROCESS of linux/ioprio.h.
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes integers only.
    let rc =
        unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, libc::c_int::from(priority)) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the execution domain of this process (`PER_*`).
pub(crate) fn personality(domain: u32) -> io::Result<()> {
    // SAFETY: takes an integer only.
    let rc = unsafe { libc::personality(libc::c_ulong::from(domain)) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Installs a seccomp filter on this process. `flags` are `SECCOMP_FILTER_FLAG_*`.
pub(crate) fn install_seccomp_filter(
    program: &[crate::container::FilterInstruction],
    flags: u32,
) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `program` points to as many instructions as it says, each laid out as a sock_filter,
    // and outlives the call.
    let rc =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Loads a BPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE` and attaches it to a cgroup, which
/// keeps it for as long as it exists.
pub(crate) fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: &[crate::cgroup::devices::Instruction],
) -> io::Result<()> {
    /// The first fields of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    /// The fields of `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    /// Each try can be interrupted only by another child's end.
    const BPF_LOAD_TRIES: u32 = 100;

    let number = |fd: RawFd| u32::try_from(fd).map_err(|_| io::ErrorKind::InvalidInput);
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let mut tries = 0;
    let fd = loop {
        // SAFETY: `load` is valid for its size, and what it points to outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &load, size_of::<Load>()) };
        if fd >= 0 {
            break fd;
        }
        let error = io::Error::last_os_error();
        tries += 1;
        // The verifier gives up with EAGAIN when a signal comes, such as SIGCHLD of another
        // container; the signal is handled by the time it is asked again.
        if error.kind() != io::ErrorKind::WouldBlock || tries == BPF_LOAD_TRIES {
            return Err(error);
        }
    };
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let attach = Attach {
        target: number(cgroup.as_raw_fd())?,
        program: number(fd.as_raw_fd())?,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` is valid for its size and holds two live descriptors.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attach, size_of::<Attach>()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the runtime watch a descriptor for readiness.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open, and the same, until it is dropped with the AsyncFd that owns
    // it from here on; nobody takes it out or replaces it (only shared references are handed out).
    Ok(unsafe { tokio::io::unix::AsyncFd::register(fd) }?)
}

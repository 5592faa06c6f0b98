//! The binary interfaces by which a program of an x86-64 guest can make system calls, and their
//! numbers.
//!
//! The numbers of x86-64 and of i386 come from the `syscalls` crate. x32 has those of x86-64 with a
//! bit set, but for the calls whose structures differ. The guest's kernel is built without x32, so
//! that such a call finds nothing there; a profile may speak of it all the same.

use super::profile::{Condition, Test};

/// An interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Abi {
    X86_64,
    X86,
    X32,
}

/// `AUDIT_ARCH_*` of linux/audit.h: what the kernel calls the architecture in `seccomp_data.arch`.
pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
pub(super) const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// The bit by which x32 calls differ from those of x86-64 (`__X32_SYSCALL_BIT`).
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// Names of architectures that cannot make a call on an x86 machine. libseccomp adds them to a
/// filter without effect, and so do we without a trace.
const FOREIGN: [&str; 8] = [
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
];

/// Those of the other byte order: libseccomp, and therefore runc, fails with them.
const BIG_ENDIAN: [&str; 10] = [
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
];

/// Understands the name of an architecture. `Ok(None)` is one that this machine never is.
///
/// # Errors
/// Why the name cannot be accepted.
pub(super) fn named(name: &str) -> Result<Option<Abi>, &'static str> {
    match name {
        "SCMP_ARCH_X86_64" => Ok(Some(Abi::X86_64)),
        "SCMP_ARCH_X86" => Ok(Some(Abi::X86)),
        "SCMP_ARCH_X32" => Ok(Some(Abi::X32)),
        name if FOREIGN.contains(&name) => Ok(None),
        name if BIG_ENDIAN.contains(&name) => {
            Err("is of the other byte order, with which a filter cannot be shared")
        }
        _ => Err("must name an architecture, as SCMP_ARCH_X86_64"),
    }
}

/// A number under which a system call can be made, and, where several calls share a number, the
/// condition that tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    pub(super) number: u32,
    pub(super) selector: Option<Condition>,
}

impl Number {
    fn plain(number: u32) -> Self {
        Self { number, selector: None }
    }
}

/// Calls that x32 has under numbers of its own, from 512 (the kernel's syscall_64.tbl).
const X32_OWN: [(&str, u32); 36] = [
    ("rt_sigaction", 512),
    ("rt_sigreturn", 513),
    ("ioctl", 514),
    ("readv", 515),
    ("writev", 516),
    ("recvfrom", 517),
    ("sendmsg", 518),
    ("recvmsg", 519),
    ("execve", 520),
    ("ptrace", 521),
    ("rt_sigpending", 522),
    ("rt_sigtimedwait", 523),
    ("rt_sigqueueinfo", 524),
    ("sigaltstack", 525),
    ("timer_create", 526),
    ("mq_notify", 527),
    ("kexec_load", 528),
    ("waitid", 529),
    ("set_robust_list", 530),
    ("get_robust_list", 531),
    ("vmsplice", 532),
    ("move_pages", 533),
    ("preadv", 534),
    ("pwritev", 535),
    ("rt_tgsigqueueinfo", 536),
    ("recvmmsg", 537),
    ("sendmmsg", 538),
    ("process_vm_readv", 539),
    ("process_vm_writev", 540),
    ("setsockopt", 541),
    ("getsockopt", 542),
    ("io_setup", 543),
    ("io_submit", 544),
    ("execveat", 545),
    ("preadv2", 546),
    ("pwritev2", 547),
];

/// Calls of x86-64 that x32 lacks.
const X32_LACKS: [&str; 12] = [
    "_sysctl",
    "create_module",
    "epoll_ctl_old",
    "epoll_wait_old",
    "get_kernel_syms",
    "get_thread_area",
    "nfsservctl",
    "query_module",
    "set_thread_area",
    "tuxcall",
    "uselib",
    "vserver",
];

/// What i386's `socketcall(2)` does, by its first argument (linux/net.h).
const SOCKETCALL: [(&str, u64); 20] = [
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];

/// What i386's `ipc(2)` does, by the lower half of its first argument (linux/ipc.h); the upper half
/// is a version.
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// Numbers of i386's two calls that stand for many.
const X86_SOCKETCALL: u32 = 102;
const X86_IPC: u32 = 117;

impl Abi {
    /// Whether registers, and so the arguments that a filter compares, have 64 bits. Those of x32
    /// have, but its programs use the lower half.
    pub(super) fn wide(self) -> bool {
        self == Self::X86_64
    }

    /// Every number under which this interface has the call; none if it does not know the name.
    pub(super) fn numbers(self, name: &str) -> Vec<Number> {
        match self {
            Self::X86_64 => x86_64(name).map(Number::plain).into_iter().collect(),
            Self::X32 => x32(name).map(Number::plain).into_iter().collect(),
            Self::X86 => x86(name),
        }
    }
}

fn x86_64(name: &str) -> Option<u32> {
    let number = name.parse::<syscalls::x86_64::Sysno>().ok()?;
    u32::try_from(number.id()).ok()
}

fn x32(name: &str) -> Option<u32> {
    let own = X32_OWN.iter().find(|(n, _)| *n == name).map(|(_, number)| *number);
    let shared = || x86_64(name).filter(|_| !X32_LACKS.contains(&name));
    Some(own.or_else(shared)? | X32_BIT)
}

/// A call that is both a number of its own and a part of another one can be made either way.
fn x86(name: &str) -> Vec<Number> {
    let own = name.parse::<syscalls::x86::Sysno>().ok().and_then(|n| u32::try_from(n.id()).ok());
    let part = |table: &[(&str, u64)], number, mask| {
        let (_, value) = *table.iter().find(|(n, _)| *n == name)?;
        let selector = Some(Condition { argument: 0, test: Test::MaskedEqual { mask, value } });
        Some(Number { number, selector })
    };
    own.map(Number::plain)
        .into_iter()
        .chain(part(&SOCKETCALL, X86_SOCKETCALL, u64::MAX))
        .chain(part(&IPC, X86_IPC, 0xffff))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(abi: Abi, name: &str) -> Vec<u32> {
        abi.numbers(name).into_iter().filter(|n| n.selector.is_none()).map(|n| n.number).collect()
    }

    #[test]
    fn names_have_the_numbers_of_their_interface() {
        assert_eq!(plain(Abi::X86_64, "execve"), [59]);
        assert_eq!(plain(Abi::X86, "execve"), [11]);
        assert_eq!(plain(Abi::X32, "execve"), [520 | X32_BIT]);
        assert_eq!(plain(Abi::X32, "read"), [X32_BIT]);
        assert_eq!(plain(Abi::X86, "stat64"), [195]);
        assert_eq!(plain(Abi::X86_64, "stat64"), [0_u32; 0]);
        assert_eq!(plain(Abi::X32, "uselib"), [0_u32; 0]);
        assert!(plain(Abi::X86_64, "no_such_call").is_empty());
    }

    #[test]
    fn the_numbers_are_those_of_the_c_library() {
        for (name, number) in [
            ("read", libc::SYS_read),
            ("clone3", libc::SYS_clone3),
            ("openat2", libc::SYS_openat2),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("fchmodat2", libc::SYS_fchmodat2),
            ("umount2", libc::SYS_umount2),
            ("newfstatat", libc::SYS_newfstatat),
        ] {
            assert_eq!(plain(Abi::X86_64, name), [u32::try_from(number).unwrap()], "{name}");
        }
    }

    #[test]
    fn calls_that_share_a_number_are_told_apart() {
        let both = Abi::X86.numbers("socket");
        assert_eq!(both.iter().map(|n| n.number).collect::<Vec<_>>(), [359, X86_SOCKETCALL]);
        assert!(both[0].selector.is_none() && both[1].selector.is_some());
        assert_eq!(plain(Abi::X86, "send"), [0_u32; 0], "only by socketcall");
        assert_eq!(plain(Abi::X86, "socketcall"), [X86_SOCKETCALL]);
        assert_eq!(plain(Abi::X86, "ipc"), [X86_IPC]);
        assert!(Abi::X86.numbers("semtimedop").iter().all(|n| n.number == X86_IPC));
    }

    #[test]
    fn every_architecture_of_the_specification_is_known_or_refused() {
        assert_eq!(named("SCMP_ARCH_X86"), Ok(Some(Abi::X86)));
        assert_eq!(named("SCMP_ARCH_AARCH64"), Ok(None));
        assert!(named("SCMP_ARCH_S390X").unwrap_err().contains("byte order"));
        assert!(named("x86_64").unwrap_err().contains("SCMP_ARCH_X86_64"));
    }
}

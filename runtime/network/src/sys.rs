//! The system calls that no safe wrapper exists for. The only module here that may be `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::lookup::Instruction;

/// Where taps are made.
const TUN: &str = "/dev/net/tun";

/// Puts this thread into a new network namespace.
///
/// # Errors
/// `EPERM` without the capability CAP_SYS_ADMIN, and others.
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: a network namespace belongs to the thread; nothing that other threads share with this
    // one (descriptors, memory, file system) is changed by CLONE_NEWNET.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Makes a queue of the tap of this name in the network namespace of this thread, and the tap if it
/// is its first. The tap is gone when its last queue is closed.
///
/// Frames on it have the header of virtio-net before them, in the size that the kernel begins with
/// (10 bytes): who reads them sets what it wants.
///
/// # Errors
/// `ENOENT` without the device, `EBUSY` if there is such an interface and it is in use, and others.
pub(crate) fn open_tap(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let tap = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
    // SAFETY: ifreq is a plain structure for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len().saturating_sub(1);
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap.into())
}

/// Commands of bpf(2), and what is said with them (linux/bpf.h).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const LINK_DETACH: libc::c_int = 34;
const MAP_OF_SOCKETS: u32 = 15;
const PROGRAM_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// How often a program is offered: the verifier gives up with `EAGAIN` when a signal comes.
const LOAD_TRIES: u32 = 100;

/// Makes a call of bpf(2).
///
/// # Safety
/// `attributes` is the beginning of `union bpf_attr` for the command, and every address in it is
/// valid for what the command does with it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is valid for its size, and the caller vouches for what is in it; the
    // kernel takes what follows as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn number(fd: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Takes a descriptor that the kernel answered.
///
/// # Safety
/// It was made by the call whose result this is, and nobody else has it.
unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(result).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: of the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a map of this many sockets by number, for BPF programs.
pub(crate) fn make_socket_map(entries: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    let create = Create { kind: MAP_OF_SOCKETS, key_size: 4, value_size: 4, entries };
    // SAFETY: there are no addresses in it; the result is a new descriptor.
    unsafe { owned(bpf(MAP_CREATE, &create)?) }
}

/// Puts a socket into such a map. It leaves it when it is closed.
pub(crate) fn put_socket(map: BorrowedFd<'_>, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = number(socket)?;
    let update = Update {
        map: number(map)?,
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: key and value are 4 bytes each, as the map was made, and outlive the call.
    unsafe { bpf(MAP_UPDATE, &update) }.map(drop)
}

/// Loads the program that is made for this map, of those that are asked where a connection goes.
pub(crate) fn load_lookup_program(
    program: impl FnOnce(libc::c_int) -> Vec<Instruction>,
    map: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    /// The fields of `union bpf_attr` up to the last that is needed.
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
        name: [u8; 16],
        interface: u32,
        attach: u32,
    }
    let program = program(map.as_raw_fd());
    let load = Load {
        kind: PROGRAM_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"husk_localhost\0\0",
        interface: 0,
        attach: ATTACH_SK_LOOKUP,
    };
    for _ in 1..LOAD_TRIES {
        // SAFETY: the addresses are those of as many instructions as it says and of a text that ends
        // with a NUL, which outlive the call; the result is a new descriptor.
        match unsafe { bpf(PROGRAM_LOAD, &load) } {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // SAFETY: as above.
            loaded => return unsafe { owned(loaded?) },
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Puts such a program into force in a network namespace, for as long as what is returned is open.
pub(crate) fn link_lookup_program(
    program: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        program: u32,
        target: u32,
        attach: u32,
        flags: u32,
    }
    let (program, target) = (number(program)?, number(netns)?);
    let create = Create { program, target, attach: ATTACH_SK_LOOKUP, flags: 0 };
    // SAFETY: there are no addresses in it; the result is a new descriptor.
    unsafe { owned(bpf(LINK_CREATE, &create)?) }
}

/// Ends what such a link does, at once.
pub(crate) fn end_link(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Detach {
        link: u32,
    }
    let detach = Detach { link: number(link)? };
    // SAFETY: there are no addresses in it.
    unsafe { bpf(LINK_DETACH, &detach) }.map(drop)
}

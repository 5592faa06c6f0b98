//! The host's end of a NIC: the queues of a tap.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::chain::{IoVec, MAX_CHAIN_DESCRIPTORS};
use super::HEADER_LEN;

/// What the host's end of a queue pair must be able to do. Frames are read from and written to its
/// descriptor, one by each system call, behind a `struct virtio_net_hdr_v1`.
pub trait Backend: AsFd + Send + Sync + std::fmt::Debug {
    /// Sets the header's length, and which offloads the guest can take (`TUN_F_*`); for the whole NIC.
    ///
    /// # Errors
    /// The host refused.
    fn negotiate(&self, offloads: u32) -> io::Result<()>;

    /// Whether frames for the guest may come out of this queue. Does nothing where it is so already.
    ///
    /// # Errors
    /// The host refused.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// A descriptor cannot be used as a NIC's.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is no queue of a tap, or the tap is gone.
    #[error("tap descriptor {queue} is not a tap's")]
    NotATap {
        /// Its position.
        queue: usize,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// It was not made as it must be.
    #[error("tap descriptor {queue} has flags {flags:#x}, needed are {needed:#x}")]
    Flags {
        /// Its position.
        queue: usize,
        /// `ifr_flags`.
        flags: u16,
        /// Those of `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, `IFF_MULTI_QUEUE` that are needed.
        needed: u16,
    },
    /// It is another tap's than the first one.
    #[error("tap descriptor {queue} is of {name:?}, the first one of {first:?}")]
    Mixed {
        /// Its position.
        queue: usize,
        /// Its tap.
        name: String,
        /// The first one's tap.
        first: String,
    },
    /// It could not be made non-blocking, or refuses what every tap can.
    #[error("tap descriptor {queue}: cannot {what}")]
    Host {
        /// Its position.
        queue: usize,
        /// What, as an infinitive.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is none.
    #[error("a NIC needs a tap descriptor")]
    None,
}

/// `struct ifreq` (netdevice(7)), as far as taps use it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    /// The rest of the union.
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(flags: u16) -> Self {
        InterfaceRequest { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] }
    }

    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    attached: AtomicBool,
}

impl Tap {
    /// Takes over the queues of one tap, and makes them non-blocking.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn all(fds: Vec<OwnedFd>) -> Result<Vec<Tap>, TapError> {
        let mut needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if fds.len() > 1 {
            needed |= libc::IFF_MULTI_QUEUE;
        }
        let needed = u16::try_from(needed).unwrap_or(u16::MAX);
        let mut first: Option<String> = None;
        for (queue, fd) in fds.iter().enumerate() {
            let mut request = InterfaceRequest::new(0);
            interface_ioctl(fd, libc::TUNGETIFF, &mut request)
                .map_err(|source| TapError::NotATap { queue, source })?;
            let flags = request.flags;
            if flags & needed != needed {
                return Err(TapError::Flags { queue, flags, needed });
            }
            let name = request.name();
            match &first {
                None => first = Some(name),
                Some(first) if *first == name => {}
                Some(first) => return Err(TapError::Mixed { queue, name, first: first.clone() }),
            }
            rustix::io::ioctl_fionbio(fd, true).map_err(|errno| {
                let source = errno.into();
                TapError::Host { queue, what: "make it non-blocking", source }
            })?;
        }
        Ok(fds.into_iter().map(|fd| Tap { fd, attached: AtomicBool::new(true) }).collect())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Backend for Tap {
    fn negotiate(&self, offloads: u32) -> io::Result<()> {
        let header_len = libc::c_int::try_from(HEADER_LEN).unwrap_or(libc::c_int::MAX);
        // SAFETY: TUNSETVNETHDRSZ reads an int from the pointer, which is there for the whole call,
        // and writes no memory of ours.
        let result = unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len)
        };
        check(result)?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
        };
        check(result)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        // One thread at a time changes it, see `Pairs`.
        if self.attached.load(Ordering::SeqCst) == attached {
            return Ok(());
        }
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let flag = u16::try_from(flag).unwrap_or(0);
        interface_ioctl(&self.fd, libc::TUNSETQUEUE, &mut InterfaceRequest::new(flag))?;
        self.attached.store(attached, Ordering::SeqCst);
        Ok(())
    }
}

fn interface_ioctl(
    fd: &OwnedFd,
    request: libc::Ioctl,
    argument: &mut InterfaceRequest,
) -> io::Result<()> {
    // SAFETY: the requests with which this is called (TUNGETIFF, TUNSETQUEUE) read and write at most
    // a `struct ifreq`, which `argument` is, and which is borrowed for the whole call. Of another
    // kind of descriptor than a tap's they are refused, or, should they mean something else there,
    // are of the same size: it is part of their number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads one frame into `pieces`, at most [`MAX_CHAIN_DESCRIPTORS`] of them; returns how long it is.
/// What does not fit is lost.
pub(super) fn read(fd: BorrowedFd<'_>, pieces: &[IoVec<'_>]) -> io::Result<usize> {
    let (iovecs, count) = raw(pieces);
    // SAFETY: see `raw`; the memory of the pieces is guest memory, which the kernel may write like
    // the guest itself, or borrowed mutably by its piece.
    let result = unsafe { libc::readv(fd.as_raw_fd(), iovecs, count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes one frame from `pieces`, at most [`MAX_CHAIN_DESCRIPTORS`] of them.
pub(super) fn write(fd: BorrowedFd<'_>, pieces: &[IoVec<'_>]) -> io::Result<usize> {
    let (iovecs, count) = raw(pieces);
    // SAFETY: see `raw`.
    let result = unsafe { libc::writev(fd.as_raw_fd(), iovecs, count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The arguments of a vectored system call. An [`IoVec`] is a `struct iovec` (transparent), and its
/// memory is mapped as long as it lives, which is longer than the call for which it is borrowed. The
/// count is at most the number of pieces.
fn raw(pieces: &[IoVec<'_>]) -> (*const libc::iovec, libc::c_int) {
    let count = pieces.len().min(MAX_CHAIN_DESCRIPTORS);
    (pieces.as_ptr().cast(), libc::c_int::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_no_taps_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let refused = Tap::all(vec![file.into()]).unwrap_err();
        assert!(matches!(refused, TapError::NotATap { queue: 0, .. }), "{refused:?}");
    }

    #[test]
    fn the_request_is_a_struct_ifreq() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        assert_eq!(std::mem::offset_of!(InterfaceRequest, flags), 16);
        let mut request = InterfaceRequest::new(0);
        request.name[..4].copy_from_slice(b"tap0");
        assert_eq!(request.name(), "tap0");
        request.name = [b'x'; 16];
        assert_eq!(request.name().len(), 16);
    }
}

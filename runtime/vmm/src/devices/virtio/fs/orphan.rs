//! A queue whose server is gone: its requests are answered here, with an error.
//!
//! Linux waits for an answer to each request of virtio-fs for ever, and does not look at
//! `DEVICE_NEEDS_RESET`; a process in such a wait cannot be killed. So each request gets the answer
//! of a FUSE file system whose server has died.

use virtio_queue::{Queue, QueueT};

use super::super::Interrupt;
use super::super::chain::{Chain, GuestFault, Notify, Progress, Virtqueue};
use crate::GuestMemory;

/// Length of `struct fuse_in_header` (Linux: include/uapi/linux/fuse.h).
const IN_HEADER_LEN: u32 = 40;
/// Where in it the request's identity is.
const UNIQUE: u32 = 8;
/// Length of `struct fuse_out_header`.
const OUT_HEADER_LEN: u32 = 16;
/// What every request is answered with: "Transport endpoint is not connected".
pub const ERROR: i32 = -libc::ENOTCONN;

/// A queue without a server.
#[derive(Debug)]
pub struct Orphan(Virtqueue);

impl Orphan {
    /// Takes a queue over, with the requests that its server has not answered. The server answered
    /// in the order of the requests, so these are the last ones.
    ///
    /// # Errors
    /// [`GuestFault::Rings`].
    pub fn adopt(
        memory: GuestMemory,
        mut queue: Queue,
        interrupt: Interrupt,
        features: u64,
    ) -> Result<Orphan, GuestFault> {
        let used = queue
            .used_idx(&memory, std::sync::atomic::Ordering::Acquire)
            .map_err(GuestFault::Rings)?;
        queue.set_next_used(used.0);
        queue.set_next_avail(used.0);
        Ok(Orphan(Virtqueue::new(memory, queue, interrupt, features)))
    }

    /// Answers what there is.
    ///
    /// # Errors
    /// The guest's fault; stop using the queue then.
    pub fn serve(&mut self) -> Result<Progress, GuestFault> {
        self.0.serve(Notify::AtEnd, refuse)
    }
}

fn refuse(chain: Chain<'_>) -> Result<(), GuestFault> {
    // Some requests have no reply (FORGET). What is no request gets none either.
    if chain.writable().len() < OUT_HEADER_LEN || chain.readable().len() < IN_HEADER_LEN {
        return chain.complete(0);
    }
    let unique: u64 = chain.readable().read_obj(UNIQUE)?;
    let (len, error) = (OUT_HEADER_LEN.to_le_bytes(), ERROR.to_le_bytes());
    let header = [len.as_slice(), error.as_slice(), &unique.to_ne_bytes()].concat();
    chain.writable().write_at(0, &header)?;
    chain.complete(OUT_HEADER_LEN)
}

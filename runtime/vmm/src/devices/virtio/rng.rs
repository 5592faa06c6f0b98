//! The entropy device (virtio 1.2, section 5.4): random bytes from the host for the guest's pool.
//!
//! The exemplar: what a device consists of, with as little around it as there can be. A type that
//! implements [`VirtioDevice`] (what the transport asks) and a [`Handler`] (what the worker's thread
//! does). The handler takes chains from [`Virtqueue::serve`], and each is parsed, executed and
//! completed.

use std::io;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::chain::{Chain, GuestFault, Notify, Progress, Virtqueue};
use super::worker::{Handler, Poller, Worker, WorkerError};
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice};

/// Virtio device ID of the entropy device.
pub const DEVICE_ID: u32 = 4;

/// Entries of the one queue. Linux has one request out at a time.
const QUEUE_SIZES: &[u16] = &[64];

/// Most bytes that one request is answered with. A device may return fewer than asked for
/// (virtio 1.2, 5.4.6.2), and this keeps the guest from having the host make gigabytes.
const MAX_REQUEST_LEN: u32 = 64 * 1024;

/// Bytes that are fetched from the host at once; a longer request takes several.
const BLOCK_LEN: usize = 512;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl Rng {
    /// An entropy device that is not active yet.
    #[must_use]
    pub fn new() -> Self {
        Rng::default()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let ([queue], wiring) = activation.split()?;
        self.worker = Some(Worker::spawn("rng", wiring, RngHandler { queue })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct RngHandler {
    queue: Virtqueue,
}

impl Handler for RngHandler {
    fn kicked(&mut self, _queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        self.queue.serve(Notify::AtEnd, answer)
    }
}

/// Fills one request's buffer.
fn answer(chain: Chain<'_>) -> Result<(), WorkerError> {
    let len = requested_len(&chain)?;
    let mut block = [0; BLOCK_LEN];
    let mut done = 0u32;
    while done < len {
        let left = usize::try_from(len.saturating_sub(done)).unwrap_or(BLOCK_LEN);
        let Some(bytes) = block.get_mut(..left.min(BLOCK_LEN)) else { break };
        let got = random(bytes)
            .map_err(|source| WorkerError::Host { what: "get random bytes", source })?;
        chain.writable().write_at(done, bytes.get(..got).unwrap_or_default())?;
        done = done.saturating_add(u32::try_from(got).unwrap_or(0));
    }
    chain.complete(done)?;
    Ok(())
}

/// How many bytes the driver gets. It must not place readable buffers in the queue (virtio 1.2,
/// 5.4.6.1), and at least one byte is to be returned (5.4.6.2), which needs room.
fn requested_len(chain: &Chain<'_>) -> Result<u32, GuestFault> {
    if !chain.readable().is_empty() {
        return Err(GuestFault::Request("an entropy request has a readable buffer"));
    }
    if chain.writable().is_empty() {
        return Err(GuestFault::Request("an entropy request has no writable buffer"));
    }
    Ok(chain.writable().len().min(MAX_REQUEST_LEN))
}

/// Fills `bytes` from the front; returns how many, at least one.
fn random(bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => return Ok(got),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::status;
    use super::super::testing::{Buffer, Driver, activation, interrupt, memory, wait_until};
    use super::*;

    fn active(features: u64) -> (Rng, Driver, super::super::Interrupt) {
        let memory = memory();
        let interrupt = interrupt();
        let driver = Driver::new(&memory, 0, 64);
        let mut rng = Rng::new();
        rng.activate(activation(&[&driver], &interrupt, features)).unwrap();
        (rng, driver, interrupt)
    }

    #[test]
    fn a_request_is_filled_to_its_end_and_not_beyond() {
        let (_rng, mut driver, interrupt) = active(0);
        let at = driver.alloc(1024);
        let head = driver.add(&[Buffer::In(at, 700), Buffer::In(at + 700, 300)]);
        assert_eq!(driver.kick_and_wait(), (head, 1000));
        let bytes = driver.bytes(at, 1024);
        // 1000 random bytes have about 4 zeros; 64 in a row of 100 do not happen.
        assert!(
            bytes[..1000].chunks(100).all(|part| part.iter().filter(|b| **b == 0).count() < 64)
        );
        assert!(bytes[1000..].iter().all(|byte| *byte == 0));
        assert_eq!(interrupt.counters().snapshot().bytes_to_guest, 1000);
        assert_eq!(interrupt.counters().snapshot().kicks, 1);
    }

    #[test]
    fn a_long_request_is_answered_with_the_cap() {
        let (_rng, mut driver, _interrupt) = active(0);
        let at = driver.alloc(0x12000);
        driver.add(&[Buffer::In(at, 0x12000)]);
        assert_eq!(driver.kick_and_wait().1, MAX_REQUEST_LEN);
    }

    #[test]
    fn a_readable_buffer_needs_a_reset_and_the_device_works_after_it() {
        let (mut rng, mut driver, interrupt) = active(0);
        let at = driver.alloc(16);
        driver.add(&[Buffer::Out(at, 16)]);
        driver.kick.write(1).unwrap();
        wait_until(|| interrupt.status() & status::DEVICE_NEEDS_RESET != 0);

        rng.reset();
        interrupt.clear();
        let mut driver = Driver::new(&driver.memory, 1, 64);
        rng.activate(activation(&[&driver], &interrupt, 0)).unwrap();
        let at = driver.alloc(16);
        driver.add(&[Buffer::In(at, 16)]);
        assert_eq!(driver.kick_and_wait().1, 16);
        assert_eq!(interrupt.status(), 0);
    }

    #[test]
    fn more_requests_than_the_budget_are_served_by_one_kick() {
        let (_rng, mut driver, _interrupt) = active(RING_FEATURES);
        let at = driver.alloc(1);
        for _ in 0..64 {
            driver.add(&[Buffer::In(at, 1)]);
        }
        driver.kick.write(1).unwrap();
        for _ in 0..64 {
            assert_eq!(driver.wait_used().1, 1);
        }
    }
}

//! The console device (virtio 1.2, section 5.3): one port, for the guest kernel's log.
//!
//! Output only. The driver's receive buffers stay where they are: there is no input. Without
//! `VIRTIO_CONSOLE_F_MULTIPORT` there are two queues and the configuration space means nothing.

use std::sync::Arc;

use super::chain::{Chain, GuestFault, Notify, Progress, Virtqueue};
use super::worker::{Handler, Poller, Worker, WorkerError};
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice};
use crate::devices::console_log::ConsoleLog;

/// Virtio device ID of the console.
pub const DEVICE_ID: u32 = 3;

/// Entries of the receive and the transmit queue. Linux has one output buffer out at a time.
const QUEUE_SIZES: &[u16] = &[2, 64];

/// The transmit queue's index.
const TRANSMIT: usize = 1;

/// Most bytes that are taken from one chain; the rest of it is not logged. Linux writes at most a
/// page at once.
const MAX_OUTPUT_LEN: u32 = 64 * 1024;

/// Bytes that are copied at once.
const BLOCK_LEN: u32 = 4096;

/// The console device.
#[derive(Debug)]
pub struct Console {
    log: Arc<ConsoleLog>,
    worker: Option<Worker>,
}

impl Console {
    /// A console whose output goes to `log`.
    #[must_use]
    pub fn new(log: Arc<ConsoleLog>) -> Self {
        Console { log, worker: None }
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        "console"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let ([_receive, transmit], wiring) = activation.split()?;
        let handler = ConsoleHandler { transmit, log: self.log.clone() };
        self.worker = Some(Worker::spawn("console", wiring, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct ConsoleHandler {
    transmit: Virtqueue,
    log: Arc<ConsoleLog>,
}

impl Handler for ConsoleHandler {
    fn kicked(&mut self, queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        if queue != TRANSMIT {
            return Ok(Progress::Done);
        }
        let log = &self.log;
        self.transmit.serve(Notify::AtEnd, |chain| Ok(log_output(chain, log)?))
    }
}

/// Copies one chain's bytes to the log.
fn log_output(chain: Chain<'_>, log: &ConsoleLog) -> Result<(), GuestFault> {
    let readable = chain.readable();
    let len = readable.len().min(MAX_OUTPUT_LEN);
    let mut block = [0; BLOCK_LEN as usize];
    let mut done = 0u32;
    while done < len {
        let take = len.saturating_sub(done).min(BLOCK_LEN);
        let bytes = block.get_mut(..usize::try_from(take).unwrap_or(0)).unwrap_or_default();
        readable.read_at(done, bytes)?;
        log.write(bytes);
        done = done.saturating_add(take);
    }
    chain.complete(0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Buffer, Driver, activation, interrupt, memory};
    use super::*;

    fn active() -> (Console, Arc<ConsoleLog>, Driver, Driver) {
        let memory = memory();
        let (receive, transmit) = (Driver::new(&memory, 0, 64), Driver::new(&memory, 1, 64));
        let log = Arc::new(ConsoleLog::new(None, 0));
        let mut console = Console::new(log.clone());
        console.activate(activation(&[&receive, &transmit], &interrupt(), RING_FEATURES)).unwrap();
        (console, log, receive, transmit)
    }

    #[test]
    fn output_reaches_the_log_in_order() {
        let (_console, log, _receive, mut transmit) = active();
        let (a, b) = (transmit.place(b"Hello, "), transmit.place(b"world\n"));
        let head = transmit.add(&[Buffer::Out(a, 7), Buffer::Out(b, 6)]);
        assert_eq!(transmit.kick_and_wait(), (head, 0));
        let c = transmit.place(b"again\n");
        transmit.add(&[Buffer::Out(c, 6)]);
        transmit.kick_and_wait();
        assert_eq!(log.tail_lines(9), "Hello, world\nagain");
    }

    #[test]
    fn receive_buffers_are_left_alone() {
        let (_console, _log, mut receive, mut transmit) = active();
        let at = receive.alloc(64);
        receive.add(&[Buffer::In(at, 64)]);
        receive.kick.write(1).unwrap();
        let a = transmit.place(b"x");
        transmit.add(&[Buffer::Out(a, 1)]);
        transmit.kick_and_wait();
        assert_eq!(receive.used_idx(), 0);
    }

    #[test]
    fn a_huge_buffer_is_cut() {
        let (_console, log, _receive, mut transmit) = active();
        let at = transmit.alloc(2 * MAX_OUTPUT_LEN);
        let end = at + u64::from(MAX_OUTPUT_LEN);
        use vm_memory::{Bytes, GuestAddress};
        transmit.memory.write_slice(b"\nlast\nbeyond", GuestAddress(end - 6)).unwrap();
        transmit.add(&[Buffer::Out(at, 2 * MAX_OUTPUT_LEN)]);
        transmit.kick_and_wait();
        assert_eq!(log.tail_lines(1), "last");
    }
}

//! The control queue (virtio 1.2, 5.1.6.5): the driver says how many queue pairs it uses.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::chain::{Chain, GuestFault, SERVE_BUDGET, Virtqueue};
use super::pairs::Pairs;
use crate::devices::rate_limit::TokenBucket;

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (5.1.6.5.6).
const SET_PAIRS: [u8; 2] = [4, 0];

/// `struct virtio_net_ctrl`: class, command, and of this command the number of pairs; 16 bits.
const SET_PAIRS_LEN: u32 = 4;

/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`.
const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;

/// How many commands are done at once, and per second. Each may have the host wait for a grace period
/// with its lock of all interfaces held: a guest that only sends commands must not slow other pods
/// down. Drivers send one when they start.
const COMMANDS: u64 = 8;

/// A command of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Use so many queue pairs.
    SetPairs(u16),
    /// Nothing that the device knows.
    Unknown,
}

impl Command {
    /// Reads what a chain asks for.
    ///
    /// # Errors
    /// There is no room for the answer.
    pub fn parse(chain: &Chain<'_>) -> Result<Command, GuestFault> {
        if chain.writable().is_empty() {
            return Err(GuestFault::Request("a control command has no room for its answer"));
        }
        let readable = chain.readable();
        if readable.len() != SET_PAIRS_LEN {
            return Ok(Command::Unknown);
        }
        let [class, command, low, high] = readable.read_obj(0)?;
        if [class, command] != SET_PAIRS {
            return Ok(Command::Unknown);
        }
        Ok(Command::SetPairs(u16::from_le_bytes([low, high])))
    }
}

/// How far the control queue was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Served {
    /// To its end; a kick comes with the next command.
    Idle,
    /// The budget is used up.
    More,
    /// There may be more commands, after this time.
    Throttled(Duration),
}

/// The control queue of an active device.
#[derive(Debug)]
pub(super) struct Control {
    queue: Virtqueue,
    pairs: Arc<Pairs>,
    limit: TokenBucket,
    /// Commands that the host did not do.
    failures: u64,
}

impl Control {
    pub(super) fn new(queue: Virtqueue, pairs: Arc<Pairs>, now: Instant) -> Self {
        Control { queue, pairs, limit: TokenBucket::new(COMMANDS, COMMANDS, now), failures: 0 }
    }

    /// Does the commands that are there.
    pub(super) fn serve(&mut self, now: Instant) -> Result<Served, GuestFault> {
        self.queue.disable_notification()?;
        for _ in 0..SERVE_BUDGET {
            if let Some(wait) = self.limit.wait(now) {
                return Ok(Served::Throttled(wait));
            }
            let Some(chain) = self.queue.pop_or_arm()? else { return Ok(Served::Idle) };
            self.limit.take(1, now);
            answer(chain, &self.pairs, &mut self.failures)?;
            self.queue.notify()?;
        }
        Ok(Served::More)
    }
}

fn answer(chain: Chain<'_>, pairs: &Pairs, failures: &mut u64) -> Result<(), GuestFault> {
    let done = match Command::parse(&chain)? {
        Command::SetPairs(count) => pairs.set_in_use(count.into()),
        Command::Unknown => Err(io::ErrorKind::InvalidInput.into()),
    };
    let ack = match done {
        Ok(()) => ACK_OK,
        Err(error) => {
            // The guest's mistakes are not for the host's log, and the host's failures once.
            if error.kind() != io::ErrorKind::InvalidInput {
                *failures = failures.saturating_add(1);
                if *failures == 1 {
                    tracing::warn!(%error, "cannot change how many queues of a tap are used");
                }
            }
            ACK_ERR
        }
    };
    chain.writable().write_at(0, &[ack])?;
    chain.complete(1)
}

//! The network device (virtio 1.2, section 5.1): a NIC of the guest on a tap of the host.
//!
//! - `tap`: the host's end, and the system calls on it;
//! - `pair`: one queue pair: frames from queue to tap and back, without threads;
//! - `control`: the control queue, by which the driver says how many pairs it uses;
//! - `pairs`: what the pairs share;
//! - `handler`: a pair's worker: when it receives and transmits;
//! - here: the device: features, configuration space, activation.
//!
//! Each pair has a thread, so that several vCPUs move frames at the same time
//! (docs/adr/0018-a-thread-per-queue-pair.md).
//!
//! System calls on a tap: `readv`, `writev`, `epoll_ctl`, and ioctl with `TUNGETIFF`, `FIONBIO` (when
//! the device is made), `TUNSETOFFLOAD` (then and at each activation), `TUNSETVNETHDRSZ` (at each
//! activation), `TUNSETQUEUE` (by the control queue).
//!
//! Not for: what frames contain. Header and frame are the guest's word to the host's kernel, which
//! checks them as those of any program that has a tap.

mod control;
mod handler;
mod pair;
mod pairs;
mod tap;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use husk_vmm_api::{MAX_QUEUE_PAIRS, NicConfig, RateLimit};
use rustix::io::Errno;

pub use self::control::Command;
use self::control::Control;
use self::handler::PairHandler;
pub use self::pair::{MAX_FRAME_LEN, Pair, Received, SharedLimit, Transmitted};
use self::pairs::Pairs;
pub use self::tap::{Backend, Tap, TapError};
use super::worker::Worker;
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice, Wiring};

/// Virtio device ID of a network device.
pub const DEVICE_ID: u32 = 1;

/// Length of `struct virtio_net_hdr_v1`, which precedes every frame (5.1.6).
pub const HEADER_LEN: u32 = 12;

/// Where its `num_buffers` is.
const NUM_BUFFERS_OFFSET: u64 = 10;

/// Entries of each queue. Linux fills a receive queue with buffers of 1.5 KiB or a page: 256 of them
/// hold six frames of 64 KiB.
const QUEUE_SIZE: u16 = 256;

/// Two for each pair, and the control queue.
const QUEUE_SIZES: [u16; 2 * MAX_QUEUE_PAIRS + 1] = [QUEUE_SIZE; 2 * MAX_QUEUE_PAIRS + 1];

/// Feature bits (5.1.3; the last three by 5.1.3 of virtio 1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;
}

/// What every tap can do.
const BASE_FEATURES: u64 = RING_FEATURES
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::MTU
    | feature::MAC
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MRG_RXBUF
    | feature::STATUS;

/// UDP segmentation, since Linux 6.2.
const USO_FEATURES: u64 = feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;

/// `VIRTIO_NET_S_LINK_UP` (5.1.4). Whether the host's end is up is not told: frames are then dropped.
const LINK_UP: u16 = 1;

/// A NIC of the guest.
#[derive(Debug)]
pub struct Net {
    name: String,
    config: Vec<u8>,
    features: u64,
    pairs: Arc<Pairs>,
    rx_limit: RateLimit,
    tx_limit: RateLimit,
    workers: Vec<Worker>,
}

impl Net {
    /// The NIC at `position` of the VM, on the descriptors of `config.taps`.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn new(position: usize, config: &NicConfig, taps: Vec<OwnedFd>) -> Result<Self, TapError> {
        let backends = Tap::all(taps)?;
        let backends = backends.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect();
        Net::with_backends(position, config, backends)
    }

    /// As [`Net::new`], on anything that can stand for the queues of a tap.
    ///
    /// # Errors
    /// There is none or more than [`MAX_QUEUE_PAIRS`], or the host has no eventfd.
    pub fn with_backends(
        position: usize,
        config: &NicConfig,
        backends: Vec<Box<dyn Backend>>,
    ) -> Result<Self, TapError> {
        let first = backends.first().ok_or(TapError::None)?;
        let mut features = BASE_FEATURES;
        let failed = |what| move |source| TapError::Host { queue: 0, what, source };
        match first.negotiate(offloads_of(features | USO_FEATURES)) {
            Ok(()) => features |= USO_FEATURES,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {}
            Err(error) => return Err(failed("set its offloads")(error)),
        }
        // Until the guest is there; frames before that come without.
        first.negotiate(0).map_err(failed("set its offloads"))?;
        if backends.len() > 1 {
            features |= feature::CTRL_VQ | feature::MQ;
        }
        let count = backends.len();
        let pairs = Pairs::new(backends).map_err(failed("get an eventfd for it"))?;
        Ok(Net {
            name: format!("net:{position}"),
            config: config_space(config, count),
            features,
            pairs: Arc::new(pairs),
            rx_limit: config.rx_limit.clone(),
            tx_limit: config.tx_limit.clone(),
            workers: Vec::new(),
        })
    }

    /// How many pairs a driver that negotiated `features` can use.
    fn pairs_of(&self, features: u64) -> usize {
        if features & feature::MQ != 0 { self.pairs.len() } else { 1 }
    }

    /// Sets what driver and host agreed on.
    fn negotiate(&self, features: u64) -> io::Result<()> {
        if let Some(first) = self.pairs.backend(0) {
            first.negotiate(offloads_of(features))?;
        }
        if features & feature::MQ != 0 {
            self.pairs.start_with_one();
            return Ok(());
        }
        self.pairs.set_in_use(1)
    }
}

/// The configuration space (5.1.4), up to and with `mtu`.
fn config_space(config: &NicConfig, pairs: usize) -> Vec<u8> {
    let pairs = u16::try_from(pairs).unwrap_or(u16::MAX);
    let numbers = [LINK_UP, pairs, config.mtu].map(u16::to_le_bytes);
    [&config.mac[..], numbers.as_flattened()].concat()
}

/// What a tap may give to a guest with these features (`TUN_F_*`). The others are worth nothing
/// without checksums (5.1.3.1), and the tap takes both kinds of UDP segmentation or none.
fn offloads_of(features: u64) -> u32 {
    const BOTH_USO: u64 = feature::GUEST_USO4 | feature::GUEST_USO6;
    if features & feature::GUEST_CSUM == 0 {
        return 0;
    }
    let table = [
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
        (BOTH_USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let wanted = table.iter().filter(|(bits, _)| features & bits == *bits);
    wanted.fold(libc::TUN_F_CSUM, |offloads, (_, offload)| offloads | offload)
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        let control = usize::from(self.pairs.len() > 1);
        let count = self.pairs.len().saturating_mul(2).saturating_add(control);
        QUEUE_SIZES.get(..count).unwrap_or_default()
    }

    /// The control queue follows the last pair that the driver can use (5.1.2).
    fn queues_in_use(&self, features: u64) -> usize {
        let control = usize::from(features & feature::CTRL_VQ != 0);
        self.pairs_of(features).saturating_mul(2).saturating_add(control)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |what| move |source| ActivateError::Host { what, source };
        let features = activation.features;
        let count = self.pairs_of(features);
        self.negotiate(features).map_err(failed("the tap's offloads and queues"))?;
        let now = Instant::now();
        let limits = (SharedLimit::new(&self.rx_limit, now), SharedLimit::new(&self.tx_limit, now));
        let mergeable = features & feature::MRG_RXBUF != 0;

        let (queues, Wiring { kicks, interrupt, reporter }) = activation.split_all();
        let got = queues.len();
        let mut queues = queues.into_iter().zip(kicks);
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
                return Err(ActivateError::QueueNotReady { queue: got });
            };
            pairs.push((rx, tx));
        }
        let mut control = queues.next();
        for (index, ((rx, rx_kick), (tx, tx_kick))) in pairs.into_iter().enumerate() {
            let mut kicks = vec![rx_kick, tx_kick];
            let control = control.take().map(|(queue, kick)| {
                kicks.push(kick);
                Control::new(queue, self.pairs.clone(), now)
            });
            let (rx_limit, tx_limit) = (limits.0.clone(), limits.1.clone());
            let pair = Pair::new(rx, tx, mergeable, interrupt.counters().clone())
                .limited(rx_limit, tx_limit);
            let handler = PairHandler::new(pair, index, self.pairs.clone(), control)
                .map_err(failed("a timer"))?;
            let wiring = Wiring { kicks, interrupt: interrupt.clone(), reporter: reporter.clone() };
            let name =
                if count == 1 { self.name.clone() } else { format!("{}.{index}", self.name) };
            self.workers.push(Worker::spawn(&name, wiring, handler)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

#[cfg(test)]
mod tests;

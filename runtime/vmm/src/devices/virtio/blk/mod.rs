//! The block device (virtio 1.2, section 5.2): a raw image or a block device of the host.
//!
//! A request is parsed ([`request`]: pure), executed ([`disk`]: straight between the host's file and
//! guest memory) and completed with its status. Each disk has a thread, so that a slow one does not
//! hold up the others, and its input and output are synchronous.
//!
//! Not for: image formats. A format that can name other files is the guest's way to the host's.

pub mod disk;
pub mod request;

use std::fs::File;
use std::sync::Arc;

use self::disk::DiskError;
pub use self::disk::{BlkError, Disk};
use self::request::{Failure, MAX_RANGE_SECTORS, MAX_RANGES, Operation, Request, SECTOR_LEN};
use super::chain::{Chain, GuestFault, Notify, Progress, Virtqueue};
use super::worker::{Handler, Poller, Worker, WorkerError, chain_of};
use super::{ActivateError, Activation, RING_FEATURES, VirtioDevice};

/// Virtio device ID of a block device.
pub const DEVICE_ID: u32 = 2;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];

/// Feature bits (5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Longest segment, in bytes.
const SIZE_MAX: u32 = 256 * 1024;

/// Most segments in a request: a chain as long as the queue, less header and status. Together with
/// [`SIZE_MAX`] just below [`request::MAX_DATA_LEN`].
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// log2 of the sectors in a block that can be written without reading it first: the host's page.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// Sectors to which discards are best aligned: the host's file systems give back whole 4 KiB blocks.
const DISCARD_ALIGNMENT: u32 = 8;

/// Bytes of the configuration space, up to and with `write_zeroes_may_unmap` (5.2.4).
const CONFIG_LEN: usize = 60;

/// A disk of the guest.
#[derive(Debug)]
pub struct Blk {
    name: String,
    disk: Arc<Disk>,
    config: Vec<u8>,
    worker: Option<Worker>,
}

impl Blk {
    /// A disk that the guest knows by `serial`, on a raw image or a block device. `file` must be
    /// open for reading and, unless `read_only`, for writing.
    ///
    /// # Errors
    /// See [`BlkError`].
    pub fn new(serial: &str, file: File, read_only: bool) -> Result<Self, BlkError> {
        let disk = Arc::new(Disk::new(serial, file, read_only)?);
        let config = config_space(disk.sectors());
        Ok(Blk { name: name_of(serial), disk, config, worker: None })
    }
}

/// The device's name of the disk that the guest knows by `serial`.
#[must_use]
pub fn name_of(serial: &str) -> String {
    format!("blk:{serial}")
}

/// The configuration space (5.2.4).
fn config_space(sectors: u64) -> Vec<u8> {
    let topology = [PHYSICAL_BLOCK_EXP, 0];
    let may_unmap = [1, 0, 0, 0];
    let config = [
        &sectors.to_le_bytes()[..],
        &SIZE_MAX.to_le_bytes(),
        &SEG_MAX.to_le_bytes(),
        // Cylinders, heads, sectors: not offered.
        &[0; 4],
        &SECTOR_LEN.to_le_bytes(),
        &topology,
        // Minimal I/O size in blocks, optimal I/O size: not known.
        &[0; 6],
        // Write-back mode cannot be changed, one queue.
        &[0; 2],
        &1_u16.to_le_bytes(),
        &MAX_RANGE_SECTORS.to_le_bytes(),
        &MAX_RANGES.to_le_bytes(),
        &DISCARD_ALIGNMENT.to_le_bytes(),
        &MAX_RANGE_SECTORS.to_le_bytes(),
        &MAX_RANGES.to_le_bytes(),
        &may_unmap,
    ]
    .concat();
    debug_assert_eq!(config.len(), CONFIG_LEN);
    config
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        use feature::{BLK_SIZE, DISCARD, FLUSH, RO, SEG_MAX, SIZE_MAX, TOPOLOGY, WRITE_ZEROES};
        let access = if self.disk.is_read_only() { RO } else { FLUSH | DISCARD | WRITE_ZEROES };
        RING_FEATURES | SIZE_MAX | SEG_MAX | BLK_SIZE | TOPOLOGY | access
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let write_through = activation.features & feature::FLUSH == 0;
        let ([queue], wiring) = activation.split()?;
        let service =
            Service { name: self.name.clone(), disk: self.disk.clone(), write_through, errors: 0 };
        self.worker = Some(Worker::spawn(&self.name, wiring, BlkHandler { queue, service })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct BlkHandler {
    queue: Virtqueue,
    service: Service,
}

impl Handler for BlkHandler {
    fn kicked(&mut self, _queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        let service = &mut self.service;
        self.queue.serve(Notify::EachChain, |chain| Ok(service.answer(chain)?))
    }
}

/// What answers the requests of one disk.
struct Service {
    name: String,
    disk: Arc<Disk>,
    /// The driver cannot flush, so that every write must be flushed (5.2.6.2).
    write_through: bool,
    /// Requests that the host could not do.
    errors: u64,
}

impl Service {
    fn answer(&mut self, chain: Chain<'_>) -> Result<(), GuestFault> {
        let request = Request::parse(&chain)?;
        let result = match &request.operation {
            Ok(operation) => self.execute(operation, &chain),
            Err(failure) => Err(DiskError::Refused(*failure)),
        };
        let (written, status) = match result {
            Ok(written) => (written, request::STATUS_OK),
            Err(DiskError::Refused(failure)) => (0, failure.status()),
            Err(DiskError::Guest(fault)) => return Err(fault),
            Err(error @ DiskError::Host { .. }) => {
                self.note(&error);
                (0, Failure::IoError.status())
            }
        };
        chain.writable().write_at(request.status_offset, &[status])?;
        // The status lies behind the data; it counts where nothing is left out before it (2.7.8.2).
        let status_follows = written == request.status_offset;
        chain.complete(written.saturating_add(status_follows.into()))
    }

    fn execute(&self, operation: &Operation, chain: &Chain<'_>) -> Result<u32, DiskError> {
        let written = self.disk.execute(operation, chain)?;
        let changes = matches!(operation, Operation::Write { .. } | Operation::WriteZeroes(_));
        if self.write_through && changes {
            self.disk.sync()?;
        }
        Ok(written)
    }

    /// Logs the first failure of the host; a full disk has many.
    fn note(&mut self, error: &DiskError) {
        self.errors = self.errors.saturating_add(1);
        if self.errors == 1 {
            let error = chain_of(error);
            tracing::error!(device = self.name, error, "the guest gets an I/O error");
        }
    }
}

#[cfg(test)]
mod tests;

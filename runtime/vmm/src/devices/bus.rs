//! Which device answers at which address. Fixed before the guest runs.

use std::sync::{Arc, Mutex, PoisonError};

use super::BusDevice;

/// Two devices want the same addresses, or a range is empty.
#[derive(Debug, thiserror::Error)]
#[error("device range {start:#x}+{len:#x} is empty or overlaps another")]
pub struct RangeTaken {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

struct Entry {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// An address space (MMIO or ports) with its devices.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start, without overlaps.
    entries: Vec<Entry>,
}

impl Bus {
    /// Adds a device that answers at `start..start + len`.
    ///
    /// # Errors
    /// The range is empty, ends behind the address space, or overlaps another's.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), RangeTaken> {
        let taken = RangeTaken { start, len };
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else { return Err(taken) };
        let overlaps = |e: &Entry| e.start < end && start < e.start.saturating_add(e.len);
        if self.entries.iter().any(overlaps) {
            return Err(taken);
        }
        let at = self.entries.partition_point(|e| e.start < start);
        self.entries.insert(at, Entry { start, len, device });
        Ok(())
    }

    /// The guest reads. Zeros where no device is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        match self.find(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => tracing::trace!(address, len = data.len(), "read where no device is"),
        }
    }

    /// The guest writes. Lost where no device is.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((device, offset)) => lock(device).write(offset, data),
            None => tracing::trace!(address, len = data.len(), "write where no device is"),
        }
    }

    fn find(&self, address: u64) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let before = self.entries.partition_point(|e| e.start <= address).checked_sub(1)?;
        let entry = self.entries.get(before)?;
        let offset = address.checked_sub(entry.start).filter(|o| *o < entry.len)?;
        Some((&*entry.device, offset))
    }
}

/// A device's state is consistent between calls, so a panic elsewhere does not spoil it.
fn lock(device: &Mutex<dyn BusDevice>) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its offset, remembers what is written.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_of_its_range_only() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x10, probe.clone()).unwrap();
        bus.insert(0x1000, 0x10, Arc::new(Mutex::new(Probe::default()))).unwrap();
        for address in [0x1fff, 0x2010, 0x1010, 0, u64::MAX] {
            bus.write(address, &[1]);
            let mut data = [9; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0; 4]);
        }
        bus.write(0x2000, &[1]);
        bus.write(0x200f, &[2, 3]);
        assert_eq!(probe.lock().unwrap().0, [(0, vec![1]), (15, vec![2, 3])]);
        let mut data = [9; 2];
        bus.read(0x2007, &mut data);
        assert_eq!(data, [7, 0]);
    }

    #[test]
    fn ranges_must_not_overlap() {
        let device = || Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x1000, device()).unwrap();
        for (start, len) in
            [(0x1000, 1), (0x1fff, 1), (0xfff, 2), (0, 0x10000), (5, 0), (u64::MAX, 2)]
        {
            assert!(bus.insert(start, len, device()).is_err(), "{start:#x}+{len:#x}");
        }
        bus.insert(0x2000, 1, device()).unwrap();
        bus.insert(0xfff, 1, device()).unwrap();
    }
}

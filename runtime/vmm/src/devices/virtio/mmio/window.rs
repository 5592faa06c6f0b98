//! What a driver reads of a device's registers: memory, not exits.
//!
//! The windows of all devices are pages that KVM maps into the guest read-only, so that a read is only
//! a read; a write still leaves the guest and comes to the transport, which then changes what there is
//! to read (docs/adr/0021). Where nothing is mapped, reads come to the transport as well, and find the
//! same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{MmapRegion, VolatileMemory};

use super::WINDOW_LEN;

/// The windows of all devices, side by side.
#[derive(Debug)]
pub struct Windows(MmapRegion<()>);

impl Windows {
    /// So many windows that read as zeros.
    ///
    /// # Errors
    /// The host has no address space for them.
    pub fn new(count: u32) -> Result<Arc<Windows>, MmapRegionError> {
        let len = u64::from(count).saturating_mul(WINDOW_LEN);
        let len = usize::try_from(len).map_err(|_| MmapRegionError::InvalidOffsetLength)?;
        let region = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()?;
        Ok(Arc::new(Windows(region)))
    }

    /// Where they lie in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Their length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.size() as u64
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them; `None` if there are not so many.
    #[must_use]
    pub fn window(self: &Arc<Self>, index: u32) -> Option<Window> {
        let base = u64::from(index).checked_mul(WINDOW_LEN).filter(|base| *base < self.len())?;
        Some(Window { windows: self.clone(), base: usize::try_from(base).ok()? })
    }
}

/// One device's window. Registers are read and written whole, and in one step.
#[derive(Debug, Clone)]
pub struct Window {
    windows: Arc<Windows>,
    base: usize,
}

impl Window {
    /// A window that no guest sees.
    ///
    /// # Errors
    /// The host has no address space for it.
    pub fn alone() -> Result<Window, MmapRegionError> {
        Ok(Window { windows: Windows::new(1)?, base: 0 })
    }

    /// Does something with a register. Offsets are those of the transport: multiples of 4 in the window.
    fn with(&self, offset: u64, act: impl FnOnce(&AtomicU32) -> u32) -> u32 {
        let at = usize::try_from(offset).ok().filter(|_| offset < WINDOW_LEN);
        let at = at.and_then(|offset| self.base.checked_add(offset));
        let register = at.and_then(|at| self.windows.0.get_atomic_ref(at).ok());
        register.map_or(0, act)
    }

    pub(in crate::devices::virtio) fn get(&self, offset: u64) -> u32 {
        self.with(offset, |register| register.load(Ordering::SeqCst))
    }

    pub(in crate::devices::virtio) fn set(&self, offset: u64, value: u32) {
        self.with(offset, |register| register.swap(value, Ordering::SeqCst));
    }

    pub(in crate::devices::virtio) fn add_bits(&self, offset: u64, bits: u32) {
        self.with(offset, |register| register.fetch_or(bits, Ordering::SeqCst));
    }

    pub(in crate::devices::virtio) fn take_bits(&self, offset: u64, bits: u32) {
        self.with(offset, |register| register.fetch_and(!bits, Ordering::SeqCst));
    }

    pub(in crate::devices::virtio) fn count_up(&self, offset: u64) {
        self.with(offset, |register| register.fetch_add(1, Ordering::SeqCst));
    }

    /// Makes all of it zeros.
    pub(super) fn clear(&self) {
        for offset in (0..WINDOW_LEN).step_by(4) {
            self.set(offset, 0);
        }
    }

    /// What the guest sees at `offset`: zeros behind the end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (0_u64..).zip(data) {
            let at = offset.saturating_add(at);
            let place = usize::try_from(at % 4).unwrap_or_default();
            let register = self.get(at.saturating_sub(at % 4)).to_le_bytes();
            *byte = register.get(place).copied().unwrap_or_default();
        }
    }

    /// Puts bytes at `offset`, a multiple of 4; the rest of the last register becomes zero.
    pub(super) fn put(&self, offset: u64, bytes: &[u8]) {
        for (at, chunk) in (offset..).step_by(4).zip(bytes.chunks(4)) {
            let mut register = [0; 4];
            for (to, from) in register.iter_mut().zip(chunk) {
                *to = *from;
            }
            self.set(at, u32::from_le_bytes(register));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_side_by_side_and_do_not_overlap() {
        let windows = Windows::new(3).unwrap();
        assert_eq!(windows.len(), 3 * WINDOW_LEN);
        let [first, last] = [0, 2].map(|index| windows.window(index).unwrap());
        assert!(windows.window(3).is_none());
        first.set(WINDOW_LEN - 4, 7);
        last.set(0, 8);
        assert_eq!((first.get(WINDOW_LEN - 4), last.get(0)), (7, 8));
        assert_eq!(windows.window(1).unwrap().get(0), 0);
        // Behind its end there is nothing, and not its neighbour.
        first.set(WINDOW_LEN, 9);
        assert_eq!((first.get(WINDOW_LEN), windows.window(1).unwrap().get(0)), (0, 0));
    }

    #[test]
    fn any_bytes_of_it_can_be_read() {
        let window = Window::alone().unwrap();
        window.put(0x100, &[1, 2, 3, 4, 5, 6]);
        let read = |offset, len| {
            let mut data = vec![0xee; len];
            window.read(offset, &mut data);
            data
        };
        assert_eq!(read(0x100, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(read(0x103, 2), [4, 5]);
        assert_eq!(read(WINDOW_LEN - 1, 4), [0; 4]);
        assert_eq!(read(u64::MAX, 4), [0; 4]);
    }

    #[test]
    fn bits_come_and_go_alone() {
        let window = Window::alone().unwrap();
        window.add_bits(0x60, 3);
        window.take_bits(0x60, 2);
        window.count_up(0xfc);
        window.count_up(0xfc);
        assert_eq!((window.get(0x60), window.get(0xfc)), (1, 2));
    }
}

//! A virtio-mmio window under any sequence of accesses: the transport may hand queues to its device
//! only if they are valid, and only between a `DRIVER_OK` and the next reset.
//!
//! The input is a list of accesses, 8 bytes each: kind, length, offset (2), value (4).
#![no_main]

use std::sync::{Arc, Mutex};

use husk_vmm::GuestMemory;
use husk_vmm::devices::BusDevice;
use husk_vmm::devices::virtio::mmio::window::Window;
use husk_vmm::devices::virtio::mmio::{MmioTransport, register};
use husk_vmm::devices::virtio::{
    ActivateError, Activation, F_VERSION_1, RING_FEATURES, VirtioDevice, status,
};
use husk_vmm::machine::report::channel;
use libfuzzer_sys::fuzz_target;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

const MEMORY_LEN: usize = 0x10_0000;
const NEGOTIATED: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

/// A device that only holds what it is given.
struct Holder {
    held: Arc<Mutex<Option<Activation>>>,
}

impl VirtioDevice for Holder {
    fn device_id(&self) -> u32 {
        42
    }

    fn name(&self) -> &str {
        "holder"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &[256, 16]
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for active in &activation.queues {
            assert!(active.queue.is_valid(&activation.memory));
        }
        assert_eq!(activation.features & !(RING_FEATURES | F_VERSION_1), 0);
        let before = self.held.lock().unwrap().replace(activation);
        assert!(before.is_none(), "activated twice");
        Ok(())
    }

    fn reset(&mut self) {
        *self.held.lock().unwrap() = None;
    }
}

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let held = Arc::new(Mutex::new(None));
    let device = Box::new(Holder { held: held.clone() });
    let (reporter, _reports) = channel().unwrap();
    let line = Arc::new(EventFd::new(0).unwrap());
    let mut window =
        MmioTransport::new(memory, device, reporter, (Window::alone().unwrap(), line)).unwrap();
    let write = |window: &mut MmioTransport, offset, value: u32| {
        window.write(offset, &value.to_le_bytes());
    };
    for access in data.chunks_exact(8) {
        let &[kind, len, o0, o1, v0, v1, v2, v3] = access else { unreachable!() };
        let offset = u64::from(u16::from_le_bytes([o0, o1]));
        let value = [v0, v1, v2, v3];
        match kind % 5 {
            0 => window.read(offset, &mut [0; 8][..usize::from(len % 9)]),
            1 => window.write(offset, &[value, value].concat()[..usize::from(len % 9)]),
            2 => window.write(offset & 0xfc, &value),
            // What a driver does in one go, so that the later states are reached.
            3 => {
                write(&mut window, register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
                write(&mut window, register::DRIVER_FEATURES_SEL, 1);
                write(&mut window, register::DRIVER_FEATURES, 1);
                write(&mut window, register::STATUS, NEGOTIATED);
            }
            _ => {
                let base = u32::from_le_bytes(value) % MEMORY_LEN as u32;
                write(&mut window, register::QUEUE_SEL, u32::from(len));
                write(&mut window, register::QUEUE_DESC_LOW, base);
                write(&mut window, register::QUEUE_DRIVER_LOW, base.wrapping_add(0x1000));
                write(&mut window, register::QUEUE_DEVICE_LOW, base.wrapping_add(0x2000));
                write(&mut window, register::QUEUE_READY, 1);
            }
        }
        let mut now = [0; 4];
        window.read(register::STATUS, &mut now);
        let now = u32::from_le_bytes(now);
        let live = now & status::DRIVER_OK != 0 && now & status::DEVICE_NEEDS_RESET == 0;
        assert_eq!(held.lock().unwrap().is_some(), live);
    }
});

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::rng::Rng;
use super::super::status::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, FAILED, FEATURES_OK};
use super::super::testing::{
    Buffer, Driver, MEMORY_LEN, interrupt_line, is_signalled, memory, wait_until,
};
use super::super::{INTERRUPT_CONFIG, INTERRUPT_USED_RING, RING_FEATURES};
use super::*;
use crate::machine::report::channel;

const FEATURE: u64 = 1 << 5;
/// With it the device needs its first queue only.
const FEWER_QUEUES: u64 = 1 << 7;
const NEGOTIATED: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
const LIVE: u32 = NEGOTIATED | DRIVER_OK;

/// What the fake device holds while it is active.
type Held = Arc<Mutex<Option<Activation>>>;

struct Fake {
    held: Held,
    fails: bool,
}

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        42
    }

    fn name(&self) -> &str {
        "fake"
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &[16, 8]
    }

    fn queues_in_use(&self, features: u64) -> usize {
        if features & FEWER_QUEUES != 0 { 1 } else { 2 }
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE | FEWER_QUEUES
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(self.held.lock().unwrap().is_none(), "activated twice");
        if self.fails {
            let source = io::Error::other("none left");
            return Err(ActivateError::Host { what: "a thread", source });
        }
        *self.held.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        *self.held.lock().unwrap() = None;
    }
}

fn window() -> Window {
    Window::alone().unwrap()
}

/// A guest's view of a transport.
struct Guest {
    transport: MmioTransport,
    held: Held,
    line: Arc<EventFd>,
}

impl Guest {
    fn new() -> Self {
        Guest::with(false)
    }

    fn with(fails: bool) -> Self {
        let held = Held::default();
        let device = Box::new(Fake { held: held.clone(), fails });
        let (reporter, _reports) = channel().unwrap();
        let line = interrupt_line();
        let transport =
            MmioTransport::new(memory(), device, reporter, (window(), line.clone())).unwrap();
        Guest { transport, held, line }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(register::STATUS)
    }

    /// Up to `FEATURES_OK`.
    fn negotiate(&mut self, features: u64) {
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        for (selector, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, selector);
            self.write(register::DRIVER_FEATURES, half);
        }
        self.write(register::STATUS, NEGOTIATED);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        let base = 0x1_0000 * (index + 1);
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, size);
        self.write(register::QUEUE_DESC_LOW, base);
        self.write(register::QUEUE_DRIVER_LOW, base + 0x4000);
        self.write(register::QUEUE_DEVICE_LOW, base + 0x8000);
        self.write(register::QUEUE_READY, 1);
    }

    fn activate(&mut self) {
        self.negotiate(F_VERSION_1);
        self.set_up_queue(0, 16);
        self.set_up_queue(1, 8);
        self.write(register::STATUS, LIVE);
    }

    fn is_active(&self) -> bool {
        self.held.lock().unwrap().is_some()
    }
}

#[test]
fn the_identity_registers_say_what_it_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.read(register::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(guest.read(register::VERSION), 2);
    assert_eq!(guest.read(register::DEVICE_ID), 42);
    assert_eq!(guest.read(register::VENDOR_ID).to_le_bytes(), *b"husk");
}

#[test]
fn features_are_read_by_halves_and_include_version_1() {
    let mut guest = Guest::new();
    assert_eq!(
        guest.read(register::DEVICE_FEATURES),
        (RING_FEATURES | FEATURE | FEWER_QUEUES) as u32
    );
    guest.write(register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.read(register::DEVICE_FEATURES), 1);
    guest.write(register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(register::DEVICE_FEATURES), 0);
}

#[test]
fn a_driver_that_follows_the_specification_activates_the_device() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1 | F_EVENT_IDX | FEATURE);
    assert_eq!(guest.status(), NEGOTIATED);
    guest.set_up_queue(0, 16);
    assert_eq!(guest.read(register::QUEUE_READY), 1);
    guest.set_up_queue(1, 4);
    assert!(!guest.is_active());
    guest.write(register::STATUS, LIVE);
    assert_eq!(guest.status(), LIVE);
    let held = guest.held.lock().unwrap();
    let activation = held.as_ref().unwrap();
    assert_eq!(activation.features, F_VERSION_1 | F_EVENT_IDX | FEATURE);
    use virtio_queue::QueueT;
    let queues: Vec<_> = activation.queues.iter().map(|active| &active.queue).collect();
    assert_eq!(queues.iter().map(|queue| queue.size()).collect::<Vec<_>>(), [16, 4]);
    assert_eq!(queues[1].desc_table(), 0x2_0000);
    assert_eq!(queues[1].avail_ring(), 0x2_4000);
    assert_eq!(queues[1].used_ring(), 0x2_8000);
    assert!(queues.iter().all(|queue| queue.is_valid(&activation.memory)));
    assert!(queues.iter().all(|queue| queue.event_idx_enabled()));
}

#[test]
fn features_ok_is_refused_for_what_is_not_offered_or_legacy() {
    for features in [F_VERSION_1 | 1 << 6, F_VERSION_1 | 1 << 63, FEATURE, 0] {
        let mut guest = Guest::new();
        guest.negotiate(features);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        guest.set_up_queue(0, 16);
        assert_eq!(guest.read(register::QUEUE_READY), 0);
    }
}

#[test]
fn features_ok_is_refused_for_bits_beyond_63() {
    let mut guest = Guest::new();
    guest.write(register::STATUS, ACKNOWLEDGE | DRIVER);
    guest.write(register::DRIVER_FEATURES_SEL, 2);
    guest.write(register::DRIVER_FEATURES, 1);
    guest.negotiate(F_VERSION_1);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_are_fixed_by_features_ok() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.write(register::DRIVER_FEATURES_SEL, 0);
    guest.write(register::DRIVER_FEATURES, FEATURE as u32);
    assert_eq!(guest.transport.driver_features, F_VERSION_1);
}

#[test]
fn queue_registers_are_dead_before_features_ok_and_after_driver_ok() {
    let mut guest = Guest::new();
    guest.set_up_queue(0, 8);
    assert_eq!(guest.transport.queues[0], QueueSetup::new(16));
    guest.activate();
    assert!(guest.is_active());
    let before = guest.transport.queues.clone();
    for offset in (register::QUEUE_SIZE..register::CONFIG_GENERATION).step_by(4) {
        if offset != register::STATUS {
            for index in [0, 1, 2, u32::MAX] {
                guest.write(register::QUEUE_SEL, index);
                guest.write(offset, 1);
                guest.write(offset, 0);
            }
        }
    }
    assert_eq!(guest.transport.queues, before);
    assert!(guest.is_active());
}

#[test]
fn queues_that_the_features_make_useless_need_not_be_enabled() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1 | FEWER_QUEUES);
    guest.set_up_queue(0, 16);
    guest.write(register::STATUS, LIVE);
    assert_eq!(guest.status(), LIVE);
    assert_eq!(guest.held.lock().unwrap().as_ref().unwrap().queues.len(), 1);
}

#[test]
fn an_enabled_queue_cannot_be_changed_until_it_is_disabled() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set_up_queue(0, 16);
    let before = guest.transport.queues[0].clone();
    guest.write(register::QUEUE_DESC_LOW, 0x5_0000);
    guest.write(register::QUEUE_SIZE, 8);
    assert_eq!(guest.transport.queues[0], before);
    guest.write(register::QUEUE_READY, 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    guest.write(register::QUEUE_DESC_LOW, 0x5_0000);
    assert_eq!(guest.transport.queues[0].desc, 0x5_0000);
}

#[test]
fn a_queue_out_of_range_reads_zero_and_writes_nothing() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    for index in [2, 0x1_0000, u32::MAX] {
        guest.set_up_queue(index & 0xf, 8);
        guest.write(register::QUEUE_SEL, index);
        guest.write(register::QUEUE_READY, 1);
        assert_eq!(guest.read(register::QUEUE_SIZE_MAX), 0);
        assert_eq!(guest.read(register::QUEUE_READY), 0);
    }
    guest.write(register::QUEUE_SEL, 1);
    assert_eq!(guest.read(register::QUEUE_SIZE_MAX), 8);
}

#[test]
fn a_queue_size_is_a_power_of_two_up_to_the_maximum() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    for size in [0, 3, 17, 32, 0x1_0010, u32::MAX] {
        guest.write(register::QUEUE_SIZE, size);
        assert_eq!(guest.transport.queues[0].size, 16, "{size}");
    }
    for size in [1, 2, 8, 16] {
        guest.write(register::QUEUE_SIZE, size);
        assert_eq!(u32::from(guest.transport.queues[0].size), size);
    }
}

#[test]
fn a_queue_outside_memory_or_not_aligned_is_not_enabled() {
    let end = MEMORY_LEN as u32;
    for (offset, value) in [
        (register::QUEUE_DESC_LOW, 0x1_0008),
        (register::QUEUE_DRIVER_LOW, 0x1_4001),
        (register::QUEUE_DEVICE_LOW, 0x1_8002),
        (register::QUEUE_DESC_LOW, end - 16 * 16 + 16),
        (register::QUEUE_DRIVER_LOW, end - 16 * 2 - 4),
        (register::QUEUE_DEVICE_LOW, end - 16 * 8 - 4),
        (register::QUEUE_DESC_HIGH, 1),
        (register::QUEUE_DRIVER_HIGH, u32::MAX),
        (register::QUEUE_DEVICE_HIGH, u32::MAX),
        (register::QUEUE_DESC_LOW, 0),
        (register::QUEUE_DRIVER_LOW, 0),
        (register::QUEUE_DEVICE_LOW, 0),
    ] {
        let mut guest = Guest::new();
        guest.negotiate(F_VERSION_1);
        guest.set_up_queue(0, 16);
        guest.write(register::QUEUE_READY, 0);
        guest.write(offset, value);
        guest.write(register::QUEUE_READY, 1);
        assert_eq!(guest.read(register::QUEUE_READY), 0, "{offset:#x} = {value:#x}");
    }
}

#[test]
fn a_queue_may_end_where_memory_ends() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set_up_queue(0, 16);
    guest.write(register::QUEUE_READY, 0);
    guest.write(register::QUEUE_DESC_LOW, MEMORY_LEN as u32 - 16 * 16);
    guest.write(register::QUEUE_READY, 1);
    assert_eq!(guest.read(register::QUEUE_READY), 1);
}

#[test]
fn driver_ok_without_all_queues_needs_a_reset() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set_up_queue(0, 16);
    guest.write(register::STATUS, LIVE);
    assert_eq!(guest.status(), LIVE | DEVICE_NEEDS_RESET);
    assert!(!guest.is_active());
    guest.write(register::STATUS, 0);
    guest.activate();
    assert!(guest.is_active());
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let mut guest = Guest::with(true);
    guest.activate();
    assert_eq!(guest.status(), LIVE | DEVICE_NEEDS_RESET);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), INTERRUPT_CONFIG);
    assert!(is_signalled(&guest.line));
}

#[test]
fn a_reset_takes_everything_back() {
    let mut guest = Guest::new();
    guest.activate();
    guest.held.lock().unwrap().as_ref().unwrap().interrupt.signal_needs_reset();
    guest.write(register::QUEUE_NOTIFY, 1);
    guest.write(register::STATUS, 0);
    assert!(!guest.is_active());
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    assert_eq!(guest.transport.queues, [QueueSetup::new(16), QueueSetup::new(8)]);
    assert_eq!(guest.transport.driver_features, 0);
    assert!(!is_signalled(&guest.transport.queue_kicks()[1]));
    guest.activate();
    assert!(guest.is_active());
}

#[test]
fn a_driver_that_failed_gets_no_further() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.write(register::STATUS, NEGOTIATED | FAILED);
    guest.set_up_queue(0, 16);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    guest.write(register::STATUS, LIVE | FAILED);
    assert_eq!(guest.status(), NEGOTIATED | FAILED);
}

#[test]
fn a_notification_kicks_its_queue_only_while_the_device_is_live() {
    let mut guest = Guest::new();
    guest.write(register::QUEUE_NOTIFY, 0);
    assert!(!is_signalled(&guest.transport.queue_kicks()[0]));
    guest.activate();
    guest.write(register::QUEUE_NOTIFY, 1);
    guest.write(register::QUEUE_NOTIFY, 2);
    guest.write(register::QUEUE_NOTIFY, u32::MAX);
    assert!(!is_signalled(&guest.transport.queue_kicks()[0]));
    assert_eq!(guest.transport.queue_kicks()[1].read().unwrap(), 1);
    let held = guest.held.lock().unwrap();
    guest.transport.queue_kicks()[0].write(1).unwrap();
    assert!(is_signalled(&held.as_ref().unwrap().queues[0].kick), "it is the same eventfd");
}

#[test]
fn a_change_of_configuration_is_pending_until_it_is_acknowledged() {
    let mut guest = Guest::new();
    guest.activate();
    let interrupt = guest.held.lock().unwrap().as_ref().unwrap().interrupt.clone();
    interrupt.signal_used();
    interrupt.signal_config();
    assert_eq!(guest.read(register::CONFIG_GENERATION), 1);
    let both = INTERRUPT_USED_RING | INTERRUPT_CONFIG;
    assert_eq!(guest.read(register::INTERRUPT_STATUS), both);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), both);
    // That buffers were used stays said: whoever looks for nothing loses nothing.
    let (at, used_ring) = MmioTransport::USED_RING_ACK;
    guest.write(at, used_ring);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), both);
    guest.write(at, both);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), INTERRUPT_USED_RING);
    assert_eq!(guest.transport.counters().snapshot().interrupts, 2);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn there_is_no_shared_memory() {
    let mut guest = Guest::new();
    for offset in (register::SHM_LEN_LOW..=register::SHM_BASE_HIGH).step_by(4) {
        assert_eq!(guest.read(offset), u32::MAX);
    }
}

#[test]
fn configuration_space_is_read_at_any_width_and_zero_past_its_end() {
    let mut guest = Guest::new();
    let mut read = |offset: u64, len: usize| {
        let mut data = vec![0xaa; len];
        guest.transport.read(register::CONFIG + offset, &mut data);
        data
    };
    assert_eq!(read(0, 1), [1]);
    assert_eq!(read(1, 2), [2, 3]);
    assert_eq!(read(0, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(read(5, 4), [6, 0, 0, 0]);
    assert_eq!(read(6, 4), [0; 4]);
    assert_eq!(read(u64::MAX - register::CONFIG, 4), [0; 4]);
}

#[test]
fn registers_take_only_aligned_32_bit_writes() {
    let mut guest = Guest::new();
    for len in [1, 2, 8] {
        guest.transport.write(register::STATUS, &vec![1; len]);
    }
    guest.transport.write(register::STATUS + 1, &1u32.to_le_bytes());
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_driver_sees_the_same_in_memory_and_by_reads() {
    let (reporter, _reports) = channel().unwrap();
    let device = Box::new(Fake { held: Held::default(), fails: false });
    let window = window();
    let place = (window.clone(), interrupt_line() as Arc<dyn Line>);
    let mut transport = MmioTransport::new(memory(), device, reporter, place).unwrap();
    for (offset, value) in [(register::QUEUE_SEL, 1), (register::DEVICE_FEATURES_SEL, 1)] {
        transport.write(offset, &u32::to_le_bytes(value));
        for at in (0..WINDOW_LEN).step_by(4) {
            let mut data = [0xaa; 4];
            transport.read(at, &mut data);
            assert_eq!(u32::from_le_bytes(data), window.get(at), "{at:#x}");
        }
        assert_eq!(window.get(register::QUEUE_SIZE_MAX), 8);
    }
}

/// Sets up the one queue of a device for `driver` and goes live.
fn go_live(transport: &mut MmioTransport, driver: &Driver) {
    let (size, features) = (u32::from(driver.size), F_VERSION_1 | RING_FEATURES);
    let accesses = [
        (register::STATUS, ACKNOWLEDGE),
        (register::STATUS, ACKNOWLEDGE | DRIVER),
        (register::DRIVER_FEATURES_SEL, 0),
        (register::DRIVER_FEATURES, features as u32),
        (register::DRIVER_FEATURES_SEL, 1),
        (register::DRIVER_FEATURES, (features >> 32) as u32),
        (register::STATUS, NEGOTIATED),
        (register::QUEUE_SEL, 0),
        (register::QUEUE_SIZE, size),
        (register::QUEUE_DESC_LOW, driver.desc as u32),
        (register::QUEUE_DRIVER_LOW, driver.avail as u32),
        (register::QUEUE_DEVICE_LOW, driver.used as u32),
        (register::QUEUE_READY, 1),
        (register::STATUS, LIVE),
    ];
    for (offset, value) in accesses {
        transport.write(offset, &value.to_le_bytes());
    }
}

#[test]
fn a_real_device_answers_and_interrupts_and_does_so_again_after_a_reset() {
    let memory = memory();
    let (reporter, _reports) = channel().unwrap();
    let (line, device) = (interrupt_line(), Box::new(Rng::new()));
    let mut transport =
        MmioTransport::new(memory.clone(), device, reporter.clone(), (window(), line.clone()))
            .unwrap();
    for round in 1..4 {
        let mut driver = Driver::new(&memory, round, 64);
        go_live(&mut transport, &driver);
        let at = driver.alloc(32);
        let head = driver.add_indirect(&[Buffer::In(at, 32)]);
        transport.write(register::QUEUE_NOTIFY, &0_u32.to_le_bytes());
        assert_eq!(driver.wait_used(), (head, 32));
        wait_until(|| is_signalled(&line));
        let mut pending = [0; 4];
        transport.read(register::INTERRUPT_STATUS, &mut pending);
        assert_eq!(u32::from_le_bytes(pending), INTERRUPT_USED_RING);
        line.read().unwrap();
        transport.write(register::STATUS, &[0; 4]);
    }
    let counts = transport.counters().snapshot();
    assert_eq!((counts.kicks, counts.interrupts, counts.bytes_to_guest), (3, 3, 96));
    assert_eq!(reporter.ending(), None);
}

#[test]
fn resets_in_the_middle_of_work_lose_nothing_of_the_host() {
    let memory = memory();
    let (reporter, _reports) = channel().unwrap();
    let device = Box::new(Rng::new());
    let mut transport =
        MmioTransport::new(memory.clone(), device, reporter.clone(), (window(), interrupt_line()))
            .unwrap();
    for round in 0..100_u16 {
        // The rings are used again, as a new driver leaves them.
        memory.write_slice(&[0; 0x1_0000], GuestAddress(0x1_0000)).unwrap();
        let mut driver = Driver::new(&memory, 0, 64);
        go_live(&mut transport, &driver);
        let at = driver.alloc(4096);
        for _ in 0..64 {
            driver.add(&[Buffer::In(at, 4096)]);
        }
        transport.write(register::QUEUE_NOTIFY, &0_u32.to_le_bytes());
        // From 'at once' to 'after a while'.
        std::thread::sleep(std::time::Duration::from_micros(u64::from(round) * 4));
        transport.write(register::STATUS, &[0; 4]);
        let used = driver.used_idx();
        assert!(used <= 64);
        std::thread::yield_now();
        assert_eq!(driver.used_idx(), used, "nobody touches the rings after a reset");
    }
    assert_eq!(reporter.ending(), None);
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Register(u64, u32),
    /// What a well-behaved driver does in one go, so that all states are reached.
    Negotiate,
    SetUp(u32),
    GoLive,
    NeedsReset,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = || prop_oneof![4 => (0..70_u64).prop_map(|n| n * 4), 1 => any::<u64>()];
    let value = || {
        prop_oneof![
            4 => 0..20_u32,
            2 => Just(LIVE),
            2 => (1..64_u32).prop_map(|n| n * 0x1_0000),
            1 => any::<u32>(),
        ]
    };
    prop_oneof![
        2 => (offset(), prop_oneof![Just(1usize), Just(2), Just(4), Just(8)])
            .prop_map(|(offset, len)| Access::Read(offset, len)),
        1 => (offset(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Access::Write(offset, data)),
        6 => (offset(), value()).prop_map(|(offset, value)| Access::Register(offset, value)),
        2 => Just(Access::Negotiate),
        3 => (0..3_u32).prop_map(Access::SetUp),
        2 => Just(Access::GoLive),
        1 => Just(Access::NeedsReset),
    ]
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_keeps_the_invariants(
        accesses in prop::collection::vec(access(), 1..120)
    ) {
        let mut guest = Guest::new();
        for access in accesses {
            let frozen = guest.is_active().then(|| guest.transport.queues.clone());
            match access {
                Access::Read(offset, len) => guest.transport.read(offset, &mut vec![0; len]),
                Access::Write(offset, data) => guest.transport.write(offset, &data),
                Access::Register(offset, value) => guest.write(offset, value),
                Access::Negotiate => guest.negotiate(F_VERSION_1),
                Access::SetUp(index) => guest.set_up_queue(index, 8),
                Access::GoLive => guest.write(register::STATUS, LIVE),
                Access::NeedsReset => {
                    if let Some(activation) = &*guest.held.lock().unwrap() {
                        activation.interrupt.signal_needs_reset();
                    }
                }
            }
            let status = guest.status();
            let active = guest.is_active();
            prop_assert_eq!(active, guest.transport.active);
            if active {
                prop_assert!(status::is_live(status));
                if let Some(before) = frozen {
                    prop_assert_eq!(&guest.transport.queues, &before);
                }
            } else {
                prop_assert!(!status::is_live(status) || status & DEVICE_NEEDS_RESET != 0);
            }
            if status & FEATURES_OK != 0 {
                prop_assert!(guest.transport.features_acceptable());
            } else {
                prop_assert!(guest.transport.queues.iter().all(|queue| !queue.is_ready()));
            }
            for queue in guest.transport.queues.iter().filter(|queue| queue.is_ready()) {
                use virtio_queue::QueueT;
                prop_assert!(queue.queue(false).unwrap().is_valid(&guest.transport.memory));
            }
        }
    }
}

#[test]
fn a_place_is_a_placeholder_until_a_device_comes_and_after_it_went() {
    let window = window();
    let mut slot = slot::Slot::new(window.clone());
    let read = |slot: &mut slot::Slot, offset| {
        let mut data = [0xaa; 4];
        slot.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    let placeholder = |slot: &mut slot::Slot| {
        slot.write(register::STATUS, &ACKNOWLEDGE.to_le_bytes());
        let identity = [register::MAGIC_VALUE, register::VERSION, register::DEVICE_ID];
        assert_eq!(identity.map(|offset| read(slot, offset)), [MAGIC, VERSION, 0]);
        assert!((register::VENDOR_ID..WINDOW_LEN).step_by(4).all(|at| read(slot, at) == 0));
        assert!(slot.is_empty());
    };
    placeholder(&mut slot);
    for _ in 0..2 {
        let held = Held::default();
        let device = Box::new(Fake { held: held.clone(), fails: false });
        let place = (window.clone(), interrupt_line() as Arc<dyn Line>);
        let transport = MmioTransport::new(memory(), device, channel().unwrap().0, place);
        slot.fill(transport.unwrap());
        assert!(!slot.is_empty());
        assert_eq!(read(&mut slot, register::DEVICE_ID), 42);
        slot.write(register::STATUS, &ACKNOWLEDGE.to_le_bytes());
        assert_eq!(read(&mut slot, register::STATUS), ACKNOWLEDGE);
        slot.clear();
        assert!(held.lock().unwrap().is_none());
        placeholder(&mut slot);
    }
}

#[test]
fn a_place_that_is_emptied_ends_the_device_at_once() {
    let mut guest = Guest::new();
    guest.negotiate(0);
    guest.set_up_queue(0, 16);
    guest.set_up_queue(1, 8);
    guest.activate();
    assert!(guest.is_active());
    let mut slot = slot::Slot::new(guest.transport.window.clone());
    slot.fill(guest.transport);
    slot.clear();
    assert!(guest.held.lock().unwrap().is_none());
}

#[test]
fn a_late_device_looks_like_a_placeholder_until_it_is_shown() {
    let mut guest = Guest::new();
    let hidden = slot::Hidden::new(&guest.transport);
    assert_eq!(guest.read(register::DEVICE_ID), 0);
    assert_eq!(guest.read(register::MAGIC_VALUE), MAGIC);
    hidden.show();
    assert_eq!(guest.read(register::DEVICE_ID), 42);
}

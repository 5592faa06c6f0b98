//! The IO-APIC: turns the lines of devices into messages for the local APICs (Intel 82093AA).
//!
//! KVM keeps the local APICs; this half of the interrupt controller is here, because a guest without
//! KVM's other half has no 8259 either, and then leaves most of its inputs alone on its way up
//! (docs/adr/0019). It has as many inputs as there are lines. All are edge-triggered, as the MP table
//! says: an interrupt is one message, and nothing is remembered until its end.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{BusDevice, Line};

/// Size of its window.
pub const WINDOW_LEN: u64 = 0x1000;

/// Most inputs: their numbers and their registers' have one byte.
pub const MAX_INPUTS: u32 = 120;

/// Offset of the register that chooses what [`DATA`] is.
const INDEX: u64 = 0x00;
const DATA: u64 = 0x10;

/// Registers, by index.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
/// The first of the redirection table, two for each input.
const TABLE: u8 = 0x10;

/// The bits of the ID register that there are.
const ID_BITS: u32 = 0x0f00_0000;
/// The version of the 82093AA, which KVM's has too.
const VERSION_82093AA: u32 = 0x11;

/// Bits of an entry of the redirection table.
mod entry {
    pub(super) const DELIVERY_STATUS: u64 = 1 << 12;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const MASKED: u64 = 1 << 16;
    pub(super) const LOGICAL: u64 = 1 << 11;
    /// Vector and delivery mode, which a message has at the same place.
    pub(super) const VECTOR_AND_MODE: u64 = 0x7ff;
    pub(super) const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
}

/// A message-signalled interrupt (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where it is written: which local APICs it is for.
    pub address: u32,
    /// What is written: the vector, and how it is delivered.
    pub data: u32,
}

impl Message {
    fn of(entry: u64) -> Message {
        const BASE: u32 = 0xfee0_0000;
        let [.., destination] = entry.to_le_bytes();
        let logical = u32::from(entry & entry::LOGICAL != 0) << 2;
        let [data, _] = halves(entry & entry::VECTOR_AND_MODE);
        Message { address: BASE | u32::from(destination) << 12 | logical, data }
    }
}

/// Takes messages to the local APICs.
pub trait Messages: Debug + Send + Sync {
    /// Delivers one. What is not deliverable is lost, as on a bus.
    fn send(&self, message: Message);
}

/// An input, and with it the line of a device.
#[derive(Debug)]
struct Input {
    entry: AtomicU64,
    /// An edge that came while the input was masked: delivered when it no longer is.
    raised: AtomicBool,
    messages: Arc<dyn Messages>,
}

impl Input {
    fn new(messages: Arc<dyn Messages>) -> Input {
        let (entry, raised) = (AtomicU64::new(entry::MASKED), AtomicBool::new(false));
        Input { entry, raised, messages }
    }

    /// Delivers what is there, unless the input is masked. Whoever changes one of the two looks at
    /// both afterwards, so that no edge is lost between them; and only one delivers it.
    fn deliver(&self) {
        let entry = self.entry.load(Ordering::SeqCst);
        if entry & entry::MASKED == 0 && self.raised.swap(false, Ordering::SeqCst) {
            self.messages.send(Message::of(entry));
        }
    }
}

impl Line for Input {
    fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        self.deliver();
    }
}

/// See the module.
#[derive(Debug)]
pub struct IoApic {
    messages: Arc<dyn Messages>,
    inputs: Vec<Arc<Input>>,
    index: u8,
    id: u32,
}

impl IoApic {
    /// One without inputs.
    #[must_use]
    pub fn new(messages: Arc<dyn Messages>) -> IoApic {
        IoApic { messages, inputs: Vec::new(), index: 0, id: 0 }
    }

    /// The line that leads to an input, which is added if it is not there. `None` from
    /// [`MAX_INPUTS`] on.
    pub fn line(&mut self, number: u32) -> Option<Arc<dyn Line>> {
        let at = usize::try_from(number).ok().filter(|_| number < MAX_INPUTS)?;
        while self.inputs.len() <= at {
            self.inputs.push(Arc::new(Input::new(self.messages.clone())));
        }
        self.inputs.get(at).map(|input| input.clone() as Arc<dyn Line>)
    }

    /// Number of inputs.
    #[must_use]
    pub fn inputs(&self) -> u8 {
        // At most MAX_INPUTS.
        u8::try_from(self.inputs.len()).unwrap_or(u8::MAX)
    }

    /// The input that a register belongs to, and which half of its entry it is.
    fn of_table(&self, register: u8) -> Option<(&Input, usize)> {
        let at = register.checked_sub(TABLE)?;
        let input = self.inputs.get(usize::from(at >> 1))?;
        Some((input, usize::from(at & 1)))
    }

    fn read_register(&self) -> u32 {
        match self.index {
            ID | ARBITRATION => self.id,
            VERSION => u32::from(self.inputs().saturating_sub(1)) << 16 | VERSION_82093AA,
            register => self.of_table(register).map_or(0, |(input, half)| {
                let [low, high] = halves(input.entry.load(Ordering::SeqCst));
                if half == 0 { low } else { high }
            }),
        }
    }

    fn write_register(&mut self, value: u32) {
        match self.index {
            ID => self.id = value & ID_BITS,
            register => {
                let Some((input, half)) = self.of_table(register) else { return };
                let [low, high] = halves(input.entry.load(Ordering::SeqCst));
                let (low, high) = if half == 0 { (value, high) } else { (low, value) };
                let entry = u64::from(low) | u64::from(high) << 32;
                input.entry.store(entry & !entry::READ_ONLY, Ordering::SeqCst);
                input.deliver();
            }
        }
    }
}

/// The two registers of an entry, the lower first.
fn halves(entry: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = entry.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// Registers are read and written whole (82093AA, 3.1); other accesses read zeros and change nothing.
impl BusDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        *data = match offset {
            INDEX => u32::from(self.index).to_le_bytes(),
            DATA => self.read_register().to_le_bytes(),
            _ => return,
        };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        match offset {
            INDEX => [self.index, ..] = data,
            DATA => self.write_register(u32::from_le_bytes(data)),
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<Message>>);

    impl Seen {
        fn take(&self) -> Vec<Message> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    impl Messages for Seen {
        fn send(&self, message: Message) {
            self.0.lock().unwrap().push(message);
        }
    }

    fn with_inputs(count: u32) -> (IoApic, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let mut ioapic = IoApic::new(seen.clone());
        ioapic.line(count - 1).unwrap();
        (ioapic, seen)
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(INDEX, &u32::from(register).to_le_bytes());
        let mut data = [0xee; 4];
        ioapic.read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(INDEX, &u32::from(register).to_le_bytes());
        ioapic.write(DATA, &value.to_le_bytes());
    }

    #[test]
    fn it_says_how_many_inputs_it_has() {
        let (mut ioapic, _) = with_inputs(9);
        assert_eq!(read(&mut ioapic, VERSION), 0x0008_0011);
        assert_eq!(ioapic.inputs(), 9);
        assert!(ioapic.line(MAX_INPUTS - 1).is_some());
        assert!(ioapic.line(MAX_INPUTS).is_none());
        assert_eq!(ioapic.inputs(), 120);
        write(&mut ioapic, ID, u32::MAX);
        assert_eq!([read(&mut ioapic, ID), read(&mut ioapic, ARBITRATION)], [ID_BITS; 2]);
    }

    #[test]
    fn every_input_starts_masked() {
        let (mut ioapic, seen) = with_inputs(2);
        assert_eq!([read(&mut ioapic, TABLE), read(&mut ioapic, TABLE + 1)], [1 << 16, 0]);
        ioapic.line(0).unwrap().raise();
        assert_eq!(seen.take(), []);
    }

    #[test]
    fn an_edge_becomes_the_message_of_its_entry() {
        let (mut ioapic, seen) = with_inputs(3);
        let line = ioapic.line(2).unwrap();
        // Lowest priority to a logical destination.
        write(&mut ioapic, TABLE + 5, 0x0300_0000);
        write(&mut ioapic, TABLE + 4, 0x0000_0931);
        line.raise();
        line.raise();
        let message = Message { address: 0xfee0_3004, data: 0x131 };
        assert_eq!(seen.take(), [message, message]);
        // Fixed, to a physical one.
        write(&mut ioapic, TABLE + 4, 0x44);
        line.raise();
        assert_eq!(seen.take(), [Message { address: 0xfee0_3000, data: 0x44 }]);
        ioapic.line(1).unwrap().raise();
        assert_eq!(seen.take(), []);
    }

    #[test]
    fn an_edge_while_masked_is_delivered_once_when_unmasked() {
        let (mut ioapic, seen) = with_inputs(1);
        let line = ioapic.line(0).unwrap();
        line.raise();
        line.raise();
        write(&mut ioapic, TABLE, 0x1_0055);
        assert_eq!(seen.take(), []);
        write(&mut ioapic, TABLE, 0x55);
        assert_eq!(seen.take(), [Message { address: 0xfee0_0000, data: 0x55 }]);
        write(&mut ioapic, TABLE, 0x55);
        assert_eq!(seen.take(), []);
    }

    #[test]
    fn status_bits_are_not_the_guests() {
        let (mut ioapic, _) = with_inputs(1);
        write(&mut ioapic, TABLE, u32::MAX);
        assert_eq!(read(&mut ioapic, TABLE), !(1 << 12 | 1 << 14));
    }

    #[test]
    fn no_edge_is_lost_between_masking_and_raising() {
        let (mut ioapic, seen) = with_inputs(1);
        let line = ioapic.line(0).unwrap();
        for _ in 0..2000 {
            write(&mut ioapic, TABLE, 0x1_0055);
            std::thread::scope(|scope| {
                scope.spawn(|| line.raise());
                write(&mut ioapic, TABLE, 0x55);
            });
            assert_eq!(seen.take().len(), 1);
        }
    }

    proptest! {
        #[test]
        fn no_access_makes_it_panic_or_grow(
            accesses in proptest::collection::vec((any::<bool>(), 0_u64..0x50, any::<u32>(), 0_usize..9), 0..100),
        ) {
            let (mut ioapic, _) = with_inputs(5);
            for (is_write, offset, value, len) in accesses {
                let mut data = [value.to_le_bytes(), value.to_le_bytes()].concat();
                data.truncate(len);
                if is_write {
                    ioapic.write(offset, &data);
                } else {
                    ioapic.read(offset, &mut data);
                }
            }
            prop_assert_eq!(ioapic.inputs(), 5);
            for input in 0..5 {
                prop_assert_eq!(read(&mut ioapic, TABLE + 2 * input) & (1 << 12 | 1 << 14), 0);
            }
        }
    }
}

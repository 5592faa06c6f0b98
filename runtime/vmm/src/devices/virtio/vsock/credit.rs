//! Credit-based flow control (virtio 1.2, section 5.10.6.3), both ways. The counters run freely and
//! wrap; only their differences mean anything.

use super::packet::Credit;

/// Bytes of the guest's that one connection holds at most while the host does not take them, and so
/// the `buf_alloc` that the guest is told: two packets of the greatest size, so that the guest can
/// fill one while the other is on its way.
pub(super) const WINDOW: u32 = 128 * 1024;

/// The guest is told of new room once what it knows of falls to this.
const LOW_WATER: u32 = WINDOW / 2;

/// What the guest may still send: the room in our buffer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ReceiveWindow {
    /// Bytes that came from the guest.
    received: u32,
    /// Bytes that left for the host: our `fwd_cnt`.
    forwarded: u32,
    /// The `forwarded` that the guest knows of.
    told: u32,
}

impl ReceiveWindow {
    /// Takes note of `len` bytes from the guest; `false`, and no note, if it had no credit for them.
    #[must_use]
    pub(super) fn receive(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = held.checked_add(len).is_some_and(|held| held <= WINDOW);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// `len` bytes left for the host.
    pub(super) fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest should be told of room that it does not know of.
    pub(super) fn update_due(&self) -> bool {
        let known_held = self.received.wrapping_sub(self.told);
        self.told != self.forwarded && WINDOW.saturating_sub(known_held) <= LOW_WATER
    }

    /// What to say in a packet that is about to go to the guest.
    pub(super) fn tell(&mut self) -> Credit {
        self.told = self.forwarded;
        Credit { buf_alloc: WINDOW, fwd_cnt: self.forwarded }
    }
}

/// What we may still send: the room in the guest's buffer, by its own words.
#[derive(Debug, Clone, Copy)]
pub(super) struct SendCredit {
    sent: u32,
    guest: Credit,
    /// Whether the guest was asked for credit since it last had some.
    asked: bool,
}

impl SendCredit {
    pub(super) fn new(guest: Credit) -> Self {
        SendCredit { sent: 0, guest, asked: false }
    }

    /// Takes in what a packet of the guest's says.
    pub(super) fn update(&mut self, guest: Credit) {
        self.guest = guest;
        if self.available() > 0 {
            self.asked = false;
        }
    }

    /// How many bytes may be sent. A guest that counts wrongly stops its own connection, no more.
    pub(super) fn available(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest.fwd_cnt);
        self.guest.buf_alloc.saturating_sub(in_flight)
    }

    /// `len` bytes, of those available, are being sent.
    pub(super) fn consume(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Whether to ask the guest for credit: once each time that it runs out, or an answer of 'still
    /// none' would be asked again without end.
    pub(super) fn ask(&mut self) -> bool {
        let ask = self.available() == 0 && !self.asked;
        self.asked |= ask;
        ask
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_guest_may_fill_the_window_and_not_a_byte_more() {
        let mut window = ReceiveWindow::default();
        assert!(window.receive(WINDOW));
        assert!(!window.receive(1));
        assert!(window.receive(0));
        window.forward(10);
        assert!(!window.receive(11));
        assert!(!window.receive(u32::MAX));
        assert!(window.receive(10));
    }

    #[test]
    fn updates_come_when_half_of_the_window_is_used_and_only_if_they_say_something_new() {
        let mut window = ReceiveWindow::default();
        assert!(window.receive(LOW_WATER));
        assert!(!window.update_due(), "nothing left the buffer");
        window.forward(1);
        assert!(window.update_due());
        assert_eq!(window.tell(), Credit { buf_alloc: WINDOW, fwd_cnt: 1 });
        assert!(!window.update_due());
    }

    #[test]
    fn counters_wrap() {
        let near_end = u32::MAX - 3;
        let mut window = ReceiveWindow { received: near_end, forwarded: near_end, told: near_end };
        assert!(window.receive(10));
        window.forward(10);
        assert_eq!(window.tell().fwd_cnt, 6);
        assert!(window.receive(WINDOW));

        let mut credit = SendCredit {
            sent: near_end,
            guest: Credit { buf_alloc: 100, fwd_cnt: near_end },
            asked: false,
        };
        credit.consume(40);
        assert_eq!(credit.available(), 60);
        credit.update(Credit { buf_alloc: 100, fwd_cnt: 36 });
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn a_shrinking_or_lying_guest_gives_no_credit() {
        let mut credit = SendCredit::new(Credit { buf_alloc: 100, fwd_cnt: 0 });
        credit.consume(80);
        credit.update(Credit { buf_alloc: 10, fwd_cnt: 0 });
        assert_eq!(credit.available(), 0);
        credit.update(Credit { buf_alloc: 100, fwd_cnt: 81 });
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn credit_is_asked_for_once_until_there_is_some() {
        let mut credit = SendCredit::new(Credit { buf_alloc: 5, fwd_cnt: 0 });
        assert!(!credit.ask());
        credit.consume(5);
        assert!(credit.ask());
        assert!(!credit.ask());
        credit.update(Credit { buf_alloc: 5, fwd_cnt: 0 });
        assert!(!credit.ask(), "still none: no second question");
        credit.update(Credit { buf_alloc: 5, fwd_cnt: 1 });
        credit.consume(1);
        assert!(credit.ask());
    }

    proptest! {
        #[test]
        fn held_bytes_never_exceed_the_window(steps in proptest::collection::vec((any::<u32>(), 0..WINDOW), 0..100)) {
            let mut window = ReceiveWindow::default();
            let mut held = 0;
            for (receive, forward) in steps {
                let len = receive % (2 * WINDOW);
                if window.receive(len) {
                    held += len;
                }
                prop_assert!(held <= WINDOW);
                let forward = forward.min(held);
                window.forward(forward);
                held -= forward;
            }
        }
    }
}

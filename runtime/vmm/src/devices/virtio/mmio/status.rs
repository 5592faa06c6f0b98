//! The device status machine (virtio 1.2, sections 2.1 and 3.1).
//!
//! ```text
//!             ACKNOWLEDGE      DRIVER       FEATURES_OK        DRIVER_OK
//!    reset ──────────────▶ · ─────────▶ · ──────────────▶ · ─────────────▶ live
//!      ▲                        features      queues are        the worker runs
//!      │                     are negotiated     set up
//!      └── 0, from everywhere              (FAILED: nothing but 0 has an effect)
//! ```
//!
//! The status is the register's bits. They come in this order and are never taken back, except by
//! writing 0. `DEVICE_NEEDS_RESET` is the device's, beside all this.

use super::super::status::{
    ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK,
};

/// The bits that the driver sets, without `FAILED`, in the order in which it must.
const LADDER: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// What a write to `Status` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// The driver resets the device.
    Reset,
    /// These bits are new and are to be set.
    Add(u32),
    /// `DRIVER_OK` is new: the device is to be activated.
    Activate,
    /// Nothing changes, nothing is wrong.
    Same,
    /// The write breaks the rules and changes nothing.
    Refuse(Refusal),
}

/// Why a write to `Status` is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A bit that is set is missing, or a bit that no driver sets is there.
    #[error("a bit is taken back or does not exist")]
    Bits,
    /// A bit comes before the one that must precede it, or two that need a look between them come
    /// together.
    #[error("a step is left out")]
    Order,
    /// The features are not on offer, or `VIRTIO_F_VERSION_1` is missing. The driver sees that
    /// `FEATURES_OK` stays clear (virtio 1.2, 3.1.1, step 6).
    #[error("the features are not on offer")]
    Features,
    /// The driver gave up on the device: only a reset helps.
    #[error("the driver has set FAILED")]
    Failed,
}

/// What the driver's write of `written` to `Status` does when the register holds `status` (with or
/// without `DEVICE_NEEDS_RESET`) and the features that it accepted are acceptable or not.
#[must_use]
pub fn transition(status: u32, written: u32, features_acceptable: bool) -> Transition {
    let driver_bits = LADDER.iter().fold(FAILED, |bits, bit| bits | bit);
    // The driver writes back what it read, the device's own bit included.
    let written_bits = written & !DEVICE_NEEDS_RESET;
    let current = status & driver_bits;
    if written == 0 {
        return Transition::Reset;
    }
    if written_bits & !driver_bits != 0 || current & !written_bits != 0 {
        return Transition::Refuse(Refusal::Bits);
    }
    let new = written_bits & !current;
    if new == 0 {
        return Transition::Same;
    }
    if current & FAILED != 0 {
        return Transition::Refuse(Refusal::Failed);
    }
    // Giving up is always allowed; what else is in the same write no longer matters.
    if new & FAILED != 0 {
        return Transition::Add(FAILED);
    }
    if !is_ladder(written_bits) {
        return Transition::Refuse(Refusal::Order);
    }
    match new {
        DRIVER_OK => Transition::Activate,
        FEATURES_OK if features_acceptable => Transition::Add(FEATURES_OK),
        FEATURES_OK => Transition::Refuse(Refusal::Features),
        // Between these two nothing happens, so they may come in one write.
        new if new & !(ACKNOWLEDGE | DRIVER) == 0 => Transition::Add(new),
        _ => Transition::Refuse(Refusal::Order),
    }
}

/// Whether no bit is set without those that must precede it.
fn is_ladder(bits: u32) -> bool {
    let mut may_follow = true;
    LADDER.iter().all(|bit| {
        let set = bits & bit != 0;
        let allowed = may_follow || !set;
        may_follow = set;
        allowed
    })
}

/// Whether the driver may write features: it has found its driver and not yet fixed them.
#[must_use]
pub fn can_negotiate(status: u32) -> bool {
    is_at(status, ACKNOWLEDGE | DRIVER)
}

/// Whether the driver may set up queues: the features are fixed and the device is not live.
#[must_use]
pub fn can_set_up_queues(status: u32) -> bool {
    is_at(status, ACKNOWLEDGE | DRIVER | FEATURES_OK)
}

/// Whether the driver has set the device live. (It may need a reset nevertheless.)
#[must_use]
pub fn is_live(status: u32) -> bool {
    status & DRIVER_OK != 0
}

/// Whether exactly these of the driver's bits are set.
fn is_at(status: u32, bits: u32) -> bool {
    status & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) == bits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: u32 = ACKNOWLEDGE;
    const AD: u32 = ACKNOWLEDGE | DRIVER;
    const ADF: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    const LIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    #[test]
    fn a_driver_that_follows_the_specification_gets_its_device() {
        assert_eq!(transition(0, A, false), Transition::Add(ACKNOWLEDGE));
        assert_eq!(transition(A, AD, false), Transition::Add(DRIVER));
        assert_eq!(transition(AD, ADF, true), Transition::Add(FEATURES_OK));
        assert_eq!(transition(ADF, LIVE, true), Transition::Activate);
        assert_eq!(transition(LIVE, 0, true), Transition::Reset);
    }

    #[test]
    fn a_driver_may_take_the_first_two_steps_at_once() {
        assert_eq!(transition(0, AD, false), Transition::Add(AD));
    }

    #[test]
    fn steps_cannot_be_left_out_or_joined() {
        for (status, written) in
            [(0, DRIVER), (0, ADF), (A, A | FEATURES_OK), (AD, LIVE), (A, LIVE), (0, DRIVER_OK)]
        {
            assert_eq!(
                transition(status, written, true),
                Transition::Refuse(Refusal::Order),
                "{status:#x} -> {written:#x}"
            );
        }
    }

    #[test]
    fn bits_cannot_be_taken_back_or_made_up() {
        for (status, written) in [(AD, A), (LIVE, ADF), (0, 16), (0, 1 << 31), (AD, AD | 32)] {
            assert_eq!(
                transition(status, written, true),
                Transition::Refuse(Refusal::Bits),
                "{status:#x} -> {written:#x}"
            );
        }
    }

    #[test]
    fn features_that_are_not_acceptable_leave_features_ok_clear() {
        assert_eq!(transition(AD, ADF, false), Transition::Refuse(Refusal::Features));
    }

    #[test]
    fn giving_up_is_final_until_a_reset() {
        assert_eq!(transition(A, A | FAILED, false), Transition::Add(FAILED));
        let failed = AD | FAILED;
        assert_eq!(transition(failed, ADF | FAILED, true), Transition::Refuse(Refusal::Failed));
        assert_eq!(transition(failed, 0, true), Transition::Reset);
    }

    #[test]
    fn the_devices_own_bit_does_not_get_in_the_way() {
        assert_eq!(transition(LIVE | DEVICE_NEEDS_RESET, LIVE, true), Transition::Same);
        assert_eq!(transition(LIVE, LIVE | DEVICE_NEEDS_RESET, true), Transition::Same);
        let gave_up = LIVE | DEVICE_NEEDS_RESET | FAILED;
        assert_eq!(transition(LIVE | DEVICE_NEEDS_RESET, gave_up, true), Transition::Add(FAILED));
    }

    proptest! {
        /// From every state that can be reached, whatever is written.
        #[test]
        fn every_reachable_status_is_a_ladder(
            writes in prop::collection::vec(
                (prop_oneof![3 => 0..16_u32, 1 => any::<u32>()], any::<bool>()), 1..40)
        ) {
            let mut status = 0;
            for (written, acceptable) in writes {
                let before = status;
                match transition(status, written, acceptable) {
                    Transition::Reset => status = 0,
                    Transition::Add(bits) => {
                        prop_assert_eq!(status & bits, 0);
                        status |= bits;
                    }
                    Transition::Activate => {
                        prop_assert!(can_set_up_queues(before));
                        status |= DRIVER_OK;
                    }
                    Transition::Same | Transition::Refuse(_) => {}
                }
                prop_assert!(is_ladder(status & !FAILED));
                let stages =
                    [can_negotiate(status), can_set_up_queues(status), is_live(status)];
                prop_assert!(stages.iter().filter(|yes| **yes).count() <= 1);
                prop_assert!(!is_live(status) || is_live(before) || can_set_up_queues(before));
            }
        }
    }
}

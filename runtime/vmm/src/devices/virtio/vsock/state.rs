//! The life of a connection: one enum and one total, pure [`transition`].
//!
//! ```text
//!   host connects                      guest connects, host takes it
//!        |                                        |
//!        v           RESPONSE                     v
//!   Connecting ----------------------------->   Open  <--+  SHUTDOWN by the guest, or end of the
//!        |                                      |  | |   |  host's socket, in one direction:
//!        |          both directions over        |  | +---+  remembered, the other goes on
//!        |          (say SHUTDOWN)              |  |
//!        |                        +-------------+  |  SHUTDOWN of both by the guest
//!        |                        v                v
//!        |                     Closing -------> Draining
//!        |  RST, time-out,        |  RST,          |  the host has the last byte (say RST);
//!        |  violation             |  time-out,     |  RST, violation
//!        v                        v  violation     v
//!      Closed <-------------------+----------------+
//! ```

/// What one side of a connection is done with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Directions {
    /// It sends no more.
    pub(super) send: bool,
    /// It receives no more.
    pub(super) receive: bool,
}

impl Directions {
    pub(super) const BOTH: Directions = Directions { send: true, receive: true };

    fn with(self, more: Directions) -> Directions {
        Directions { send: self.send || more.send, receive: self.receive || more.receive }
    }
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The host connects: `REQUEST` is on its way, the guest's `RESPONSE` is not there yet.
    Connecting,
    /// Bytes flow in each direction that neither side has shut.
    Open {
        /// What the guest has shut. Permanent (virtio 1.2, 5.10.6.5).
        guest: Directions,
        /// What the host has shut, and the guest was or is being told.
        host: Directions,
    },
    /// Nothing is left to be carried and the guest was told; its `RST` is awaited for a bounded
    /// time, since it may still be reading what it has.
    Closing,
    /// The guest has shut both directions. It is told `RST` once the host has taken its last byte, so
    /// that a guest that waits for it (`SO_LINGER`) may then power off and lose nothing.
    Draining,
    /// The guest knows no such connection any more.
    Closed,
}

/// What can happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest sent `REQUEST` for a pair of ports that is in use.
    Request,
    /// The guest accepted.
    Response,
    /// The guest sent bytes.
    Data,
    /// The guest told or asked for credit.
    Credit,
    /// The guest sent `SHUTDOWN`.
    GuestShut(Directions),
    /// The guest sent `RST`.
    Reset,
    /// The host's process closed its socket, or a direction of it; everything that it had written
    /// in a direction that it has shut was passed on.
    HostShut(Directions),
    /// Nothing of the guest's waits for the host (any more).
    Drained,
    /// The time for the guest's answer is over.
    Expired,
}

/// What a transition asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    None,
    /// Tell the host that its connection stands.
    Connected,
    /// Pass the guest's bytes to the host.
    Deliver,
    /// The host reads no more, which the guest may not know yet: take the bytes and forget them.
    Discard,
    /// Tell the guest what the host has shut.
    TellShutdown(Directions),
    /// Say [`Event::Drained`] as soon as it is so.
    Drain,
    /// Everything is over in good order: send `RST` (virtio 1.2, 5.10.6.5), but let the host have
    /// what it has not read yet.
    ResetAfterShutdown,
    /// The guest ended it. Let the host have what it has not read yet.
    Finish,
    /// The guest broke the protocol, or never answered: send `RST` and close at once.
    Abort,
}

/// The next state and what is to be done. Total: every event has an answer in every state.
pub(super) fn transition(state: State, event: Event) -> (State, Action) {
    match (state, event) {
        (State::Closed, _) => (State::Closed, Action::None),
        (_, Event::Reset) => (State::Closed, Action::Finish),
        (_, Event::Request) => (State::Closed, Action::Abort),

        (State::Connecting, Event::Expired) => (State::Closed, Action::Abort),
        (State::Open { .. } | State::Draining, Event::Expired) => (state, Action::None),
        // The guest has everything; what the host has not, it still gets.
        (State::Closing, Event::Expired) => (State::Closed, Action::ResetAfterShutdown),

        (State::Connecting, Event::Response) => (
            State::Open { guest: Directions::default(), host: Directions::default() },
            Action::Connected,
        ),
        // Nothing is read from the host before the guest has answered, and so no end is seen.
        (State::Connecting, Event::HostShut(_) | Event::Drained) => (state, Action::None),
        (State::Connecting, Event::Data | Event::Credit | Event::GuestShut(_)) => {
            (State::Closed, Action::Abort)
        }

        (State::Open { .. } | State::Closing | State::Draining, Event::Response) => {
            (State::Closed, Action::Abort)
        }
        (State::Open { guest, .. }, Event::Data) if guest.send => (State::Closed, Action::Abort),
        (State::Open { host, .. }, Event::Data) if host.receive => (state, Action::Discard),
        (State::Open { .. }, Event::Data) => (state, Action::Deliver),
        (State::Open { .. }, Event::Credit | Event::Drained) => (state, Action::None),
        (State::Open { guest, host }, Event::GuestShut(more)) => {
            settle(guest.with(more), host, false)
        }
        (State::Open { guest, host }, Event::HostShut(more)) => {
            settle(guest, host.with(more), host.with(more) != host)
        }

        // Sent before the guest saw our SHUTDOWN.
        (State::Closing, Event::Data) => (State::Closing, Action::Discard),
        (State::Closing, Event::GuestShut(Directions::BOTH)) => (State::Draining, Action::Drain),
        (
            State::Closing,
            Event::Credit | Event::HostShut(_) | Event::GuestShut(_) | Event::Drained,
        ) => (state, Action::None),

        (State::Draining, Event::Data) => (State::Closed, Action::Abort),
        (State::Draining, Event::Drained) => (State::Closed, Action::ResetAfterShutdown),
        (State::Draining, Event::Credit | Event::GuestShut(_) | Event::HostShut(_)) => {
            (state, Action::None)
        }
    }
}

/// Where an open connection goes when the sides have shut these directions. `news`: the guest does
/// not know yet what the host has shut.
fn settle(guest: Directions, host: Directions, news: bool) -> (State, Action) {
    if guest == Directions::BOTH {
        return (State::Draining, Action::Drain);
    }
    let to_host_over = guest.send || host.receive;
    let to_guest_over = host.send || guest.receive;
    if to_host_over && to_guest_over {
        return (State::Closing, Action::TellShutdown(Directions::BOTH));
    }
    let action = if news { Action::TellShutdown(host) } else { Action::None };
    (State::Open { guest, host }, action)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONE: Directions = Directions { send: false, receive: false };
    const SEND: Directions = Directions { send: true, receive: false };
    const RECEIVE: Directions = Directions { send: false, receive: true };
    const OPEN: State = State::Open { guest: NONE, host: NONE };

    fn run(state: State, events: &[Event]) -> (State, Action) {
        events.iter().fold((state, Action::None), |(state, _), event| transition(state, *event))
    }

    #[test]
    fn a_response_opens_and_anything_else_refuses() {
        assert_eq!(transition(State::Connecting, Event::Response), (OPEN, Action::Connected));
        for event in [Event::Data, Event::Credit, Event::GuestShut(SEND), Event::Expired] {
            assert_eq!(transition(State::Connecting, event), (State::Closed, Action::Abort));
        }
        assert_eq!(transition(State::Connecting, Event::Reset), (State::Closed, Action::Finish));
    }

    #[test]
    fn the_guest_may_shut_one_direction_and_use_the_other() {
        let (state, action) = transition(OPEN, Event::GuestShut(RECEIVE));
        assert_eq!(action, Action::None);
        assert_eq!(transition(state, Event::Data), (state, Action::Deliver));

        let (state, _) = transition(OPEN, Event::GuestShut(SEND));
        assert_eq!(transition(state, Event::Credit), (state, Action::None));
        assert_eq!(transition(state, Event::Data), (State::Closed, Action::Abort));
    }

    #[test]
    fn shutdown_of_both_in_one_or_two_steps_is_answered_when_the_host_has_it_all() {
        let draining = (State::Draining, Action::Drain);
        assert_eq!(transition(OPEN, Event::GuestShut(Directions::BOTH)), draining);
        assert_eq!(run(OPEN, &[Event::GuestShut(SEND), Event::GuestShut(RECEIVE)]), draining);
        // Later packets with a bit clear do not take it back.
        assert_eq!(
            run(OPEN, &[Event::GuestShut(SEND), Event::GuestShut(NONE), Event::GuestShut(RECEIVE)]),
            draining
        );
        assert_eq!(
            transition(State::Draining, Event::Drained),
            (State::Closed, Action::ResetAfterShutdown)
        );
        assert_eq!(transition(State::Draining, Event::Reset), (State::Closed, Action::Finish));
        assert_eq!(transition(State::Draining, Event::Data), (State::Closed, Action::Abort));
    }

    #[test]
    fn the_guest_is_told_once_what_the_host_has_shut() {
        let (state, action) = transition(OPEN, Event::HostShut(SEND));
        assert_eq!(action, Action::TellShutdown(SEND));
        assert_eq!(transition(state, Event::HostShut(SEND)), (state, Action::None));
        assert_eq!(transition(state, Event::Data), (state, Action::Deliver));
    }

    #[test]
    fn a_host_that_reads_no_more_has_its_bytes_discarded() {
        let (state, action) = transition(OPEN, Event::HostShut(RECEIVE));
        assert_eq!(action, Action::TellShutdown(RECEIVE));
        assert_eq!(transition(state, Event::Data), (state, Action::Discard));
    }

    #[test]
    fn closing_waits_for_the_guest_and_not_for_ever() {
        for events in [
            [Event::HostShut(SEND), Event::HostShut(RECEIVE)],
            [Event::GuestShut(SEND), Event::HostShut(SEND)],
            [Event::HostShut(RECEIVE), Event::GuestShut(RECEIVE)],
        ] {
            let (state, _) = run(OPEN, &events);
            assert_eq!(state, State::Closing, "{events:?}");
        }
        assert_eq!(transition(State::Closing, Event::Data), (State::Closing, Action::Discard));
        assert_eq!(transition(State::Closing, Event::Reset), (State::Closed, Action::Finish));
        assert_eq!(
            transition(State::Closing, Event::Expired),
            (State::Closed, Action::ResetAfterShutdown)
        );
        assert_eq!(
            transition(State::Closing, Event::GuestShut(Directions::BOTH)),
            (State::Draining, Action::Drain)
        );
    }

    #[test]
    fn a_second_request_or_response_is_a_violation() {
        assert_eq!(transition(OPEN, Event::Request), (State::Closed, Action::Abort));
        assert_eq!(transition(OPEN, Event::Response), (State::Closed, Action::Abort));
        assert_eq!(transition(State::Connecting, Event::Request), (State::Closed, Action::Abort));
    }

    fn directions() -> impl Strategy<Value = Directions> {
        any::<(bool, bool)>().prop_map(|(send, receive)| Directions { send, receive })
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Request),
            Just(Event::Response),
            Just(Event::Data),
            Just(Event::Credit),
            directions().prop_map(Event::GuestShut),
            Just(Event::Reset),
            directions().prop_map(Event::HostShut),
            Just(Event::Drained),
            Just(Event::Expired),
        ]
    }

    proptest! {
        #[test]
        fn closed_is_final_and_always_announced(events in proptest::collection::vec(event(), 0..40)) {
            for start in [State::Connecting, OPEN] {
                let mut state = start;
                for event in &events {
                    let (next, action) = transition(state, *event);
                    let ends = matches!(
                        action,
                        Action::Abort | Action::Finish | Action::ResetAfterShutdown
                    );
                    prop_assert_eq!(ends, state != State::Closed && next == State::Closed);
                    if state == State::Closed {
                        prop_assert_eq!((next, action), (State::Closed, Action::None));
                    }
                    state = next;
                }
            }
        }
    }
}

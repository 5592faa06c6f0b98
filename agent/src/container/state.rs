//! The states of a container, and which events may happen in which.
//!
//! ```text
//!             Ready            Start            Exited
//!  Creating ---------> Created ------> Running ---------> Stopped
//!     |                   |                                  |
//!     | Exited            | Exited                           | Delete
//!     v                   v                                  v
//!  Stopped             Stopped                            Deleting
//!                         ^
//!                         |  Delete of a Created container kills it first: it was never started,
//!                         +- so it counts as not running.
//! ```

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its process exists and prepares the container.
    Creating,
    /// Only the program remains to be started.
    Created,
    /// The program runs (or its start is under way).
    Running,
    /// Its process has ended.
    Stopped,
    /// Its remains are being removed.
    Deleting,
}

/// What can happen to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The process says that the container is prepared.
    Ready,
    /// A client asks to start the program.
    Start,
    /// A client asks for one more process.
    Exec,
    /// A client sends a signal to a process.
    Signal,
    /// The kernel says that the container's process has ended.
    Exited,
    /// A client asks to remove the container.
    Delete,
}

/// An event that a state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} is not possible while the container is {state:?}")]
pub(crate) struct Refused {
    pub(crate) state: State,
    pub(crate) event: Event,
}

/// The state that follows, for every pair of state and event.
///
/// # Errors
/// [`Refused`] if the event is not possible in this state.
pub(crate) fn transition(state: State, event: Event) -> Result<State, Refused> {
    use {Event as E, State as S};
    match (state, event) {
        (S::Creating, E::Ready) => Ok(S::Created),
        (S::Created, E::Start) => Ok(S::Running),
        (S::Running, E::Exec) => Ok(S::Running),
        (S::Created | S::Running, E::Signal) => Ok(state),
        (S::Creating | S::Created | S::Running, E::Exited) => Ok(S::Stopped),
        // A deleted container's process may still have to be reaped.
        (S::Deleting, E::Exited) => Ok(S::Deleting),
        (S::Created | S::Stopped, E::Delete) => Ok(S::Deleting),
        (
            S::Creating | S::Created | S::Running | S::Stopped | S::Deleting,
            E::Ready | E::Start | E::Exec | E::Signal | E::Exited | E::Delete,
        ) => Err(Refused { state, event }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 5] =
        [State::Creating, State::Created, State::Running, State::Stopped, State::Deleting];
    const EVENTS: [Event; 6] =
        [Event::Ready, Event::Start, Event::Exec, Event::Signal, Event::Exited, Event::Delete];

    #[test]
    fn a_container_lives_from_creating_to_deleting() {
        let mut state = State::Creating;
        for (event, next) in [
            (Event::Ready, State::Created),
            (Event::Start, State::Running),
            (Event::Exec, State::Running),
            (Event::Signal, State::Running),
            (Event::Exited, State::Stopped),
            (Event::Delete, State::Deleting),
        ] {
            state = transition(state, event).unwrap();
            assert_eq!(state, next);
        }
    }

    #[test]
    fn exactly_the_allowed_pairs_are_allowed() {
        let allowed: Vec<_> = STATES
            .into_iter()
            .flat_map(|s| EVENTS.into_iter().map(move |e| (s, e)))
            .filter(|&(s, e)| transition(s, e).is_ok())
            .collect();
        assert_eq!(
            allowed,
            [
                (State::Creating, Event::Ready),
                (State::Creating, Event::Exited),
                (State::Created, Event::Start),
                (State::Created, Event::Signal),
                (State::Created, Event::Exited),
                (State::Created, Event::Delete),
                (State::Running, Event::Exec),
                (State::Running, Event::Signal),
                (State::Running, Event::Exited),
                (State::Stopped, Event::Delete),
                (State::Deleting, Event::Exited),
            ]
        );
    }

    #[test]
    fn a_refusal_names_the_state_and_the_event() {
        let refused = transition(State::Running, Event::Delete).unwrap_err();
        assert_eq!(refused.to_string(), "Delete is not possible while the container is Running");
    }
}

//! The states of a container, and which events may happen in which.
//!
//! ```text
//!             Ready            Start            Exited
//!  Creating ---------> Created ------> Running ---------> Stopped
//!     |                |  | ^          |   ^                 |
//!     | Exited   Exited|  | | Resume   |   | Resume          | Delete
//!     v                |  v |     Pause v   |                 v
//!  Stopped <-----------+ CreatedPaused Paused            Deleting
//!     ^                    |              |
//!     |       Exited       |              |
//!     +--------------------+--------------+
//!
//!  Delete of a Created container kills it first: it was never started, so it counts as not running.
//! ```

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its process exists and prepares the container.
    Creating,
    /// Only the program remains to be started.
    Created,
    /// As Created, and its process stands still.
    CreatedPaused,
    /// The program runs (or its start is under way).
    Running,
    /// Its processes stand still, or are about to.
    Paused,
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
    /// A client asks for files of it, or brings some.
    Copy,
    /// A client asks for a file system in it, or to take one away.
    Mount,
    /// A client sends a signal to a process.
    Signal,
    /// A client asks to stop all processes by the freezer.
    Pause,
    /// A client asks to let them go on.
    Resume,
    /// A client asks for other resources.
    Update,
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
        (S::Running, E::Exec | E::Copy | E::Mount) => Ok(S::Running),
        (S::Created, E::Pause) => Ok(S::CreatedPaused),
        (S::Running, E::Pause) => Ok(S::Paused),
        (S::CreatedPaused, E::Resume) => Ok(S::Created),
        (S::Paused, E::Resume) => Ok(S::Running),
        // A signal to a paused process waits there for it; SIGKILL ends it at once.
        (S::Created | S::CreatedPaused | S::Running | S::Paused, E::Signal | E::Update) => {
            Ok(state)
        }
        (S::Creating | S::Created | S::CreatedPaused | S::Running | S::Paused, E::Exited) => {
            Ok(S::Stopped)
        }
        // A deleted container's process may still have to be reaped.
        (S::Deleting, E::Exited) => Ok(S::Deleting),
        (S::Created | S::Stopped, E::Delete) => Ok(S::Deleting),
        (
            S::Creating
            | S::Created
            | S::CreatedPaused
            | S::Running
            | S::Paused
            | S::Stopped
            | S::Deleting,
            E::Ready
            | E::Start
            | E::Exec
            | E::Copy
            | E::Mount
            | E::Signal
            | E::Pause
            | E::Resume
            | E::Update
            | E::Exited
            | E::Delete,
        ) => Err(Refused { state, event }),
    }
}

impl State {
    /// Whether a client has asked for the processes to stand still.
    pub(crate) fn is_paused(self) -> bool {
        matches!(self, Self::CreatedPaused | Self::Paused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 7] = [
        State::Creating,
        State::Created,
        State::CreatedPaused,
        State::Running,
        State::Paused,
        State::Stopped,
        State::Deleting,
    ];
    const EVENTS: [Event; 11] = [
        Event::Ready,
        Event::Start,
        Event::Exec,
        Event::Copy,
        Event::Mount,
        Event::Signal,
        Event::Pause,
        Event::Resume,
        Event::Update,
        Event::Exited,
        Event::Delete,
    ];

    #[test]
    fn a_container_lives_from_creating_to_deleting() {
        let mut state = State::Creating;
        for (event, next) in [
            (Event::Ready, State::Created),
            (Event::Start, State::Running),
            (Event::Exec, State::Running),
            (Event::Signal, State::Running),
            (Event::Pause, State::Paused),
            (Event::Update, State::Paused),
            (Event::Resume, State::Running),
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
                (State::Created, Event::Pause),
                (State::Created, Event::Update),
                (State::Created, Event::Exited),
                (State::Created, Event::Delete),
                (State::CreatedPaused, Event::Signal),
                (State::CreatedPaused, Event::Resume),
                (State::CreatedPaused, Event::Update),
                (State::CreatedPaused, Event::Exited),
                (State::Running, Event::Exec),
                (State::Running, Event::Copy),
                (State::Running, Event::Mount),
                (State::Running, Event::Signal),
                (State::Running, Event::Pause),
                (State::Running, Event::Update),
                (State::Running, Event::Exited),
                (State::Paused, Event::Signal),
                (State::Paused, Event::Resume),
                (State::Paused, Event::Update),
                (State::Paused, Event::Exited),
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

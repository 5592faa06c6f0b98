//! The terminal of whoever runs a command: raw while a process at the other end has one of its own.
//!
//! However the command ends, the terminal is as it was before: by leaving the guard, by a signal
//! (which the commands turn into leaving it), or by a panic.

use std::io::IsTerminal;
use std::sync::{Mutex, Once, PoisonError};

use anyhow::Context;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What the terminal was before it was made raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Makes it as it was.
fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before
        && let Err(error) = tcsetattr(std::io::stdin(), OptionalActions::Now, &before)
    {
        tracing::warn!(%error, "the terminal could not be made as it was");
    }
}

/// The standard input's terminal in raw mode: what is typed is passed on and not interpreted. Ends
/// with this.
#[derive(Debug)]
pub(super) struct Raw(());

impl Raw {
    /// Makes it raw.
    pub(super) fn enter() -> anyhow::Result<Raw> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        let context = "cannot make the terminal raw";
        let mut attributes = tcgetattr(std::io::stdin()).context(context)?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(attributes.clone());
        let raw = Raw(());
        attributes.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &attributes).context(context)?;
        Ok(raw)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the standard input is a terminal.
pub(super) fn is_ours() -> bool {
    std::io::stdin().is_terminal()
}

/// The terminal's width and height in characters; `None` if there is none or it does not know.
pub(super) fn size() -> Option<(u32, u32)> {
    let known = tcgetwinsize(std::io::stdin()).or_else(|_| tcgetwinsize(std::io::stdout()));
    let size = known.ok().filter(|size| size.ws_col > 0 && size.ws_row > 0)?;
    Some((size.ws_col.into(), size.ws_row.into()))
}

/// Looks for the keys that detach, ctrl-p ctrl-q, in what is typed.
#[derive(Debug, Default)]
pub(super) struct DetachKeys {
    /// Whether the last key was the first of the two; it is held back.
    held: bool,
}

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

impl DetachKeys {
    /// What of this is to be passed on, and whether the keys were among it.
    pub(super) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len().saturating_add(1));
        for &byte in typed {
            if std::mem::take(&mut self.held) {
                if byte == CTRL_Q {
                    return (passed, true);
                }
                passed.push(CTRL_P);
            }
            if byte == CTRL_P {
                self.held = true;
            } else {
                passed.push(byte);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_keys_detach_and_nothing_else_does() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"a\x10b"), (b"a\x10b".to_vec(), false));
        assert_eq!(keys.filter(b"\x10"), (vec![], false), "held back");
        assert_eq!(keys.filter(b"\x10"), (vec![CTRL_P], false));
        assert_eq!(keys.filter(b"x"), (b"\x10x".to_vec(), false));
        assert_eq!(keys.filter(b"\x11"), (vec![CTRL_Q], false));
        assert_eq!(keys.filter(b"last\x10"), (b"last".to_vec(), false));
        assert_eq!(keys.filter(b"\x11lost"), (vec![], true));
    }
}

//! Text of a guest on somebody's terminal: it could be anything.

use std::fmt::Write;

/// A line as text: control characters but the tab, and bytes that are no UTF-8, are shown as `\xNN`,
/// as the kernel does.
pub(super) fn escape(line: &[u8]) -> String {
    let mut text = String::with_capacity(line.len());
    for chunk in line.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() && c != '\t' {
                number(&mut text, u32::from(c));
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            number(&mut text, u32::from(*byte));
        }
    }
    text
}

fn number(text: &mut String, value: u32) {
    // Writing to a String cannot fail.
    let _infallible = write!(text, "\\x{value:02x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(escape("plain, \u{e4}\tand \\x1b".as_bytes()), "plain, \u{e4}\tand \\x1b");
        assert_eq!(escape(b"\x1b[2J\x07\r\n\x7f\0"), "\\x1b[2J\\x07\\x0d\\x0a\\x7f\\x00");
        // CSI as one character, as a byte, and in the middle of a broken one.
        assert_eq!(escape("\u{9b}2J".as_bytes()), "\\x9b2J");
        assert_eq!(escape(b"\x9b2J \xc3( \xe2\x82"), "\\x9b2J \\xc3( \\xe2\\x82");
    }
}

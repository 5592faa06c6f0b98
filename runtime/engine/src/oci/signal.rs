//! The signal that asks a container to end.

use oci_spec::image::ImageConfiguration;

/// SIGTERM.
pub const DEFAULT: u32 = 15;

/// First and last real-time signal of the kernel as the C library numbers them.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Signals by their names, as on x86-64 and AArch64 (signal(7)).
const NAMES: &[(&str, u32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", RTMIN),
    ("RTMAX", RTMAX),
];

/// The signal that ends containers of this image: its `StopSignal`, or [`DEFAULT`] if it has none
/// or one that does not exist (which is what containerd does).
#[must_use]
pub fn stop_signal(image: &ImageConfiguration) -> u32 {
    let name = image.config().as_ref().and_then(|config| config.stop_signal().as_deref());
    name.and_then(parse).unwrap_or(DEFAULT)
}

/// A signal by its number or its name, with or without `SIG`, e.g. `SIGQUIT`, `3`, `RTMIN+3`.
#[must_use]
pub fn parse(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str| text.parse::<u32>().ok().filter(|n| *n <= RTMAX.abs_diff(RTMIN));
    if let Some(above) = name.strip_prefix("RTMIN+") {
        return offset(above).map(|above| RTMIN.saturating_add(above));
    }
    if let Some(below) = name.strip_prefix("RTMAX-") {
        return offset(below).map(|below| RTMAX.saturating_sub(below));
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (text, expected) in [
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("RTMIN+30", Some(64)),
            ("RTMIN+31", None),
            ("RTMIN+99999999999", None),
            ("0", None),
            ("65", None),
            ("-1", None),
            ("", None),
            ("SIG", None),
            ("SIGNAL", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}

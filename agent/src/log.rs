//! Log events as lines of the kernel's log, which the VMM shows: the guest has no other place.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line in bytes: the kernel refuses longer ones (LOG_LINE_MAX less its prefix).
const MAX_BYTES: usize = 960;

/// The descriptor to which the agent logs.
static DESCRIPTOR: OnceLock<RawFd> = OnceLock::new();

/// The descriptor of the agent's log, if it has one: a process that closes what it has of the agent
/// must keep it, or else what it logs goes to whatever has its number next.
pub(crate) fn descriptor() -> Option<RawFd> {
    DESCRIPTOR.get().copied()
}

/// Logs events of `level` and above for the rest of the agent's life.
///
/// # Errors
/// If the device cannot be opened.
pub(crate) fn start(level: Level) -> std::io::Result<()> {
    let log = KernelLog::new(level)?;
    let descriptor = log.device.as_raw_fd();
    if tracing::subscriber::set_global_default(log).is_ok() {
        // As that, it can be done only once.
        let _only_once = DESCRIPTOR.set(descriptor);
    }
    Ok(())
}

/// A subscriber that writes events and knows no spans: the agent opens none, and a fuller one would
/// be a noticeable part of the binary.
struct KernelLog {
    device: File,
    level: Level,
}

impl KernelLog {
    /// Logs events of `level` and above to `/dev/kmsg`.
    ///
    /// # Errors
    /// If the device cannot be opened.
    fn new(level: Level) -> std::io::Result<Self> {
        Ok(Self { device: File::options().write(true).open("/dev/kmsg")?, level })
    }
}

/// The line of an event: the message, then `name=value` for each field.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _infallible = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Subscriber for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The libraries' own events are of no use to who reads the guest's log.
        metadata.is_event()
            && *metadata.level() <= self.level
            && metadata.target().starts_with("husk_agent")
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        // syslog priorities of the facility "daemon".
        let priority = match *event.metadata().level() {
            Level::ERROR => 3 << 3 | 3,
            Level::WARN => 3 << 3 | 4,
            Level::INFO => 3 << 3 | 6,
            Level::DEBUG | Level::TRACE => 3 << 3 | 7,
        };
        let text = format!("<{priority}>husk-agent: {}{}", line.message, line.fields);
        let mut bytes = text.replace('\n', " ").into_bytes();
        bytes.truncate(MAX_BYTES);
        // Without it the kernel would wait for the rest of the line, and show it to nobody before.
        bytes.push(b'\n');
        // A log that cannot be written cannot be complained about.
        let _lost = (&self.device).write_all(&bytes);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

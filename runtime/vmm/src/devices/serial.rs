//! A 16550 serial port, output only: the kernel's console before any driver, for debugging.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use super::console_log::ConsoleLog;
use super::{BusDevice, Line};

/// Raises the port's interrupt line.
struct Raise(Arc<dyn Line>);

impl Trigger for Raise {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

struct Log(Arc<ConsoleLog>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first serial port.
pub struct SerialPort(Serial<Raise, NoEvents, Log>);

impl SerialPort {
    /// A port that writes to `log` and interrupts by `line`.
    #[must_use]
    pub fn new(line: Arc<dyn Line>, log: Arc<ConsoleLog>) -> Self {
        SerialPort(Serial::new(Raise(line), Log(log)))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let ([byte], Ok(register)) = (data, u8::try_from(offset)) else { return };
        if let Err(error) = self.0.write(register, *byte) {
            tracing::debug!(?error, "the serial port cannot interrupt");
        }
    }
}

//! The port by which the agent tells the VMM what only the VMM can know or do: when PID 1 ran its
//! first instruction, when it is ready, and that the machine shall be off.
//!
//! The guest's kernel has no ACPI, so there is no other way to power off.

use std::sync::Arc;

use husk_proto::guest::signal;
use husk_vmm_api::Phase;

use super::BusDevice;
use crate::counters::ExitCounters;
use crate::devices::virtio::mmio::slot::Hidden;
use crate::machine::report::{Ending, Reporter};

/// The signal port (`husk_proto::guest::SIGNAL_PORT`).
pub struct SignalPort {
    reporter: Reporter,
    exits: Arc<ExitCounters>,
    late: Vec<Hidden>,
}

impl SignalPort {
    /// A port that reports what the agent writes, each thing once. The `late` devices are shown to the
    /// guest when the agent is ready.
    #[must_use]
    pub fn new(reporter: Reporter, exits: Arc<ExitCounters>, late: Vec<Hidden>) -> Self {
        SignalPort { reporter, exits, late }
    }
}

impl BusDevice for SignalPort {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data {
            [signal::INIT] => self.reporter.phase(Phase::Init),
            [signal::READY] => {
                self.exits.mark_agent_ready();
                self.reporter.phase(Phase::AgentReady);
                // Here and not by who hears of it: the agent may look for them at once.
                self.late.drain(..).for_each(|device| device.show());
            }
            [signal::POWER_OFF] => self.reporter.end(Ending::PowerOff),
            [signal::REBOOT] => self.reporter.end(Ending::Reboot),
            _ => tracing::debug!(?data, "the guest wrote an unknown signal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::report::{self, VmEvent};

    #[test]
    fn a_guest_that_repeats_itself_is_heard_once() {
        let (reporter, reports) = report::channel().unwrap();
        let mut port = SignalPort::new(reporter, Arc::default(), Vec::new());
        for _ in 0..1000 {
            port.write(0, &[signal::INIT]);
            port.write(0, &[signal::READY]);
            port.write(0, &[0xee]);
            port.write(0, &[signal::INIT, signal::INIT]);
        }
        let phases: Vec<_> = reports
            .drain()
            .into_iter()
            .map(|event| match event {
                VmEvent::Phase { phase, .. } => phase,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(phases, [Phase::Init, Phase::AgentReady]);
    }

    #[test]
    fn the_first_end_counts() {
        let (reporter, reports) = report::channel().unwrap();
        let mut port = SignalPort::new(reporter, Arc::default(), Vec::new());
        port.write(0, &[signal::POWER_OFF]);
        port.write(0, &[signal::REBOOT]);
        assert_eq!(reports.drain(), [VmEvent::Ended(Ending::PowerOff)]);
    }
}

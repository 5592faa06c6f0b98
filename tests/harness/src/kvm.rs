//! Whether this machine's KVM runs a guest.

use std::error::Error;
use std::fs::OpenOptions;

/// What the probe found, worded for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable(pub(crate) String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Runs a few instructions in a guest, as its kernel.
///
/// # Errors
/// Which step failed, or what the guest did instead of running at ring 0.
pub(crate) fn probe() -> Result<(), Unusable> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| Unusable(format!("opening /dev/kvm: {error}")))?;
    husk_kvm_probe::run(device.into()).map_err(|error| match error.source() {
        Some(cause) => Unusable(format!("{error}: {cause}")),
        None => Unusable(error.to_string()),
    })
}

/// Whether a guest of this KVM can itself have a KVM.
pub(crate) fn nested() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y" | "y"))
    })
}

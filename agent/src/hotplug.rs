//! Devices that come while the guest runs.
//!
//! The kernel knows the places of all devices from its command line, and calls them `virtio-mmio.N`. A
//! place where it found only a placeholder has no driver; told to look again, the driver finds what the
//! VMM has put there since (docs/adr/0023).

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// The driver of the places.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// All devices that have a place by the command line or another table.
const DEVICES: &str = "/sys/bus/platform/devices";
/// What the kernel calls a place, before its number.
const PREFIX: &str = "virtio-mmio.";

/// How long after a container has started the devices that need not be there for it are looked for.
const LATE: Duration = Duration::from_secs(1);

fn tell_driver(what: &str, device: &str) -> io::Result<()> {
    fs::write(Path::new(DRIVER).join(what), device)
}

/// Finds the devices that the VMM shows only once the agent is ready, so that a start does not wait for
/// them. The pod works without them.
pub(crate) async fn find_late_devices() {
    tokio::time::sleep(LATE).await;
    let places = match places_without_driver() {
        Ok(places) => places,
        Err(error) => return tracing::warn!(%error, "cannot look for devices"),
    };
    for place in places {
        match tell_driver("bind", &place) {
            Ok(()) => tracing::debug!(place, "found a device"),
            // A placeholder, as most of them are.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => tracing::warn!(place, %error, "a device is of no use"),
        }
        // It takes a moment, in which others may have something to do.
        tokio::task::yield_now().await;
    }
}

fn places_without_driver() -> io::Result<Vec<String>> {
    let mut places = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) && !entry.path().join("driver").exists() {
            places.push(name);
        }
    }
    Ok(places)
}

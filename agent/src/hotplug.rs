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

/// Has the driver look at a place again. One whose device it has already is as it is to be: the look
/// for late devices can be the first to find it.
///
/// # Errors
/// The kernel's; ENODEV if there is no device.
pub(crate) fn bind(number: u32) -> io::Result<()> {
    match tell_driver("bind", &format!("{PREFIX}{number}")) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        told => told,
    }
}

/// Has the driver let go of the device in a place.
///
/// # Errors
/// The kernel's; ENODEV if it had not taken it.
pub(crate) fn unbind(number: u32) -> io::Result<()> {
    tell_driver("unbind", &format!("{PREFIX}{number}"))
}

/// The place of the device whose directory in sysfs this is, or is in.
pub(crate) fn place_of(device: &Path) -> Option<u32> {
    let names = device.iter().filter_map(|part| part.to_str());
    names.filter_map(|name| name.strip_prefix(PREFIX)).find_map(|number| number.parse().ok())
}

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
        match bind(place) {
            Ok(()) => tracing::debug!(place, "found a device"),
            // A placeholder, as most of them are.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => tracing::warn!(place, %error, "a device is of no use"),
        }
        // It takes a moment, in which others may have something to do.
        tokio::task::yield_now().await;
    }
}

fn places_without_driver() -> io::Result<Vec<u32>> {
    let mut places = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        if let Some(place) = place_of(Path::new(&entry.file_name()))
            && !entry.path().join("driver").exists()
        {
            places.push(place);
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_says_in_which_place_it_is() {
        let device = "/sys/devices/platform/virtio-mmio-cmdline/virtio-mmio.17/virtio9";
        assert_eq!(place_of(Path::new(device)), Some(17));
        for other in ["/sys/devices/virtual/block/loop0", "/sys/virtio-mmio.x/virtio-mmio", "/"] {
            assert_eq!(place_of(Path::new(other)), None);
        }
    }
}

//! Reads `volumeDevices` of a container: disks that it has as block devices.

use super::names;
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::types::{ContainerSpec, VolumeDevice, VolumeSource, VolumeSpec};

/// The block devices of a container of a pod with these volumes; what is wrong is noted.
pub(super) fn read_all(
    view: &View<'_>,
    volumes: &[VolumeSpec],
    problems: &mut Problems,
) -> Vec<VolumeDevice> {
    let mut devices: Vec<VolumeDevice> = Vec::new();
    for view in view.objects(problems) {
        let name = view.get("name");
        let volume = name.required_text(problems).unwrap_or_default();
        let found = volumes.iter().find(|other| other.name == volume);
        match found.map(|volume| &volume.source) {
            _ if volume.is_empty() => {}
            None => name.invalid(volume, "there is no such volume in spec.volumes", problems),
            Some(VolumeSource::Disk { .. }) => {}
            Some(_) => {
                let reason = "is no disk: only a csi volume can be a block device";
                name.invalid(volume, reason, problems);
            }
        }
        if !volume.is_empty() && devices.iter().any(|other| other.volume == volume) {
            name.invalid(volume, "this container has it as a device already", problems);
        }
        let path = view.get("devicePath");
        let text = path.required_text(problems).unwrap_or_default();
        check(&path, text, names::absolute_path, problems);
        let clean = if text.starts_with('/') { names::clean_path(text) } else { String::new() };
        if text.starts_with('/')
            && let Err(reason) = check_place(&clean)
        {
            path.invalid(text, reason, problems);
        } else if devices.iter().any(|other| other.device_path == clean) && !clean.is_empty() {
            path.invalid(text, "another device of this container is there", problems);
        }
        devices.push(VolumeDevice { volume: volume.into(), device_path: clean });
    }
    devices
}

/// Whether a node can be made at a clean path.
fn check_place(path: &str) -> Result<(), &'static str> {
    let mut parts = path.split('/').skip(1);
    match (parts.next(), parts.next()) {
        (None, _) => Err("a device cannot be the root"),
        (Some("proc" | "sys"), _) => Err("must not be in /proc or /sys, which are the kernel's"),
        (Some("dev"), None) => Err("must name a file"),
        _ => Ok(()),
    }
}

/// Notes volumes that are block devices and mounted too, in whatever containers, and devices at paths
/// of mounts of the same container.
pub(super) fn check_uses(
    containers: &[ContainerSpec],
    init_views: &[View<'_>],
    main_views: &[View<'_>],
    problems: &mut Problems,
) {
    let mounted = |volume: &str| {
        containers.iter().find(|c| c.volume_mounts.iter().any(|m| m.volume == volume))
    };
    // The containers were read from these views, in this order.
    for (container, view) in containers.iter().zip(init_views.iter().chain(main_views)) {
        let views = view.get("volumeDevices").objects(&mut problems.fork());
        for (device, view) in container.volume_devices.iter().zip(views) {
            let VolumeDevice { volume, device_path } = device;
            if let Some(other) = mounted(volume).filter(|_| !volume.is_empty()) {
                let reason = format!(
                    "container {} mounts it (volumeMounts): a volume is either a device or a file \
                     system",
                    other.name
                );
                view.get("name").invalid(volume, reason, problems);
            }
            let at_path = |mount: &str| mount == device_path && !device_path.is_empty();
            if container.volume_mounts.iter().any(|mount| at_path(&mount.mount_path)) {
                let reason = "a volume of this container is mounted there";
                view.get("devicePath").invalid(device_path, reason, problems);
            }
        }
    }
}

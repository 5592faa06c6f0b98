//! Disks as block devices of containers.

use super::*;

const VOLUMES: &str = "  volumes:
  - {name: d, csi: {driver: disk.husk.dev, volumeAttributes: {path: /srv/d.img}}}
  - {name: e, csi: {driver: disk.husk.dev, readOnly: true, volumeAttributes: {path: /srv/e.img}}}
  - {name: dir, emptyDir: {}}
";

fn with_devices(devices: &str) -> String {
    container_with(&format!("    volumeDevices: {devices}\n{VOLUMES}"))
}

#[test]
fn a_device_has_a_volume_and_a_path() {
    let pod = one(&with_devices(
        "[{name: d, devicePath: /dev//xvda}, {name: e, devicePath: /data/./raw/}]",
    ));
    let device =
        |volume: &str, path: &str| VolumeDevice { volume: volume.into(), device_path: path.into() };
    let expected = [device("d", "/dev/xvda"), device("e", "/data/raw")];
    assert_eq!(pod.containers[0].volume_devices, expected);
    assert!(pod.containers[0].volume_mounts.is_empty());
}

#[test]
fn what_cannot_be_a_device_is_named() {
    let at = "spec.containers[0].volumeDevices";
    for (device, complaint) in [
        ("{devicePath: /dev/a}", "[0].name: required".to_owned()),
        (
            "{name: x, devicePath: /dev/a}",
            "[0].name: x: there is no such volume in spec.volumes".into(),
        ),
        (
            "{name: dir, devicePath: /dev/a}",
            "[0].name: dir: is no disk: only a csi volume can be a block device".into(),
        ),
        ("{name: d}", "[0].devicePath: required".into()),
        ("{name: d, devicePath: a}", "[0].devicePath: a: must be an absolute path".into()),
        ("{name: d, devicePath: /a/../b}", "[0].devicePath: /a/../b: must not contain '..'".into()),
        ("{name: d, devicePath: //}", "[0].devicePath: //: a device cannot be the root".into()),
        ("{name: d, devicePath: /dev}", "[0].devicePath: /dev: must name a file".into()),
        (
            "{name: d, devicePath: /proc/x}",
            "[0].devicePath: /proc/x: must not be in /proc or /sys, which are the kernel's".into(),
        ),
        (
            "{name: d, devicePath: /./sys/x}",
            "[0].devicePath: /./sys/x: must not be in /proc or /sys, which are the kernel's".into(),
        ),
        (
            "{name: d, devicePath: /dev/a}, {name: d, devicePath: /dev/b}",
            "[1].name: d: this container has it as a device already".into(),
        ),
        (
            "{name: d, devicePath: /dev/a}, {name: e, devicePath: /dev//a}",
            "[1].devicePath: /dev//a: another device of this container is there".into(),
        ),
    ] {
        refused(&with_devices(&format!("[{device}]")), &[&format!("{at}{complaint}")]);
    }
    one(&with_devices("[{name: d, devicePath: /process/x}]"));
}

#[test]
fn a_volume_is_either_a_device_or_a_file_system_in_all_containers() {
    let pod = |first: &str, second: &str| {
        pod_with(&format!(
            "  initContainers:\n  - {{name: setup, image: 'localhost/i:1', {first}}}\n  \
             containers:\n  - {{name: main, image: 'localhost/i:1', {second}}}\n{VOLUMES}"
        ))
    };
    let (mount, device) = (
        "volumeMounts: [{name: d, mountPath: /x}]",
        "volumeDevices: [{name: d, devicePath: /dev/a}]",
    );
    let either = |name| {
        format!(
            "name: d: container {name} mounts it (volumeMounts): a volume is either a device or a file system"
        )
    };
    refused(
        &pod(mount, device),
        &[&format!("spec.containers[0].volumeDevices[0].{}", either("setup"))],
    );
    refused(
        &pod(device, mount),
        &[&format!("spec.initContainers[0].volumeDevices[0].{}", either("main"))],
    );
    refused(
        &pod("", &format!("{mount}, {device}")),
        &[&format!("spec.containers[0].volumeDevices[0].{}", either("main"))],
    );
    // Containers may share a device.
    one(&pod(device, device));

    let there = "volumeMounts: [{name: dir, mountPath: /dev/a}]";
    refused(
        &pod(there, &format!("{there}, {device}")),
        &["spec.containers[0].volumeDevices[0].devicePath: /dev/a: a volume of this container is \
           mounted there"],
    );
    one(&pod(there, device));
}

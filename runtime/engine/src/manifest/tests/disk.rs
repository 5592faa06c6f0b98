//! Volumes that are disks of the host.

use super::*;
use crate::storage::host_disk::FsType;

fn with_csi(csi: &str) -> String {
    container_with(&format!("  volumes:\n  - name: d\n    csi: {csi}\n"))
}

#[test]
fn a_disk_has_a_path_a_file_system_and_an_access() {
    let source = |csi: &str| one(&with_csi(csi)).volumes[0].source.clone();
    let path = || "/srv/a.img".into();
    assert_eq!(
        source("{driver: disk.husk.dev, volumeAttributes: {path: /srv/a.img}}"),
        VolumeSource::Disk { path: path(), fstype: FsType::Ext4, read_only: false }
    );
    assert_eq!(
        source(
            "{driver: disk.husk.dev, fsType: erofs, readOnly: true, \
             volumeAttributes: {path: /srv/a.img}}"
        ),
        VolumeSource::Disk { path: path(), fstype: FsType::Erofs, read_only: true }
    );
}

#[test]
fn what_is_no_disk_is_named() {
    let at = "spec.volumes[0].csi";
    refused(
        &with_csi("{driver: ebs.csi.aws.com, volumeAttributes: {path: /a}}"),
        &[&format!(
            "{at}.driver: ebs.csi.aws.com: there are no CSI drivers here; \
             disk.husk.dev stands for image files and block devices of the host"
        )],
    );
    refused(
        &with_csi("{driver: disk.husk.dev, fsType: xfs, volumeAttributes: {path: /a}}"),
        &[&format!("{at}.fsType: xfs: must be one of: ext4, erofs, \"\"")],
    );
    refused(
        &with_csi("{driver: disk.husk.dev, fsType: erofs, volumeAttributes: {path: /a}}"),
        &[&format!("{at}.fsType: erofs: it can only be read: set readOnly: true")],
    );
    let relative = complaints(&with_csi("{driver: disk.husk.dev, volumeAttributes: {path: a}}"));
    assert!(relative[0].contains(&format!("{at}.volumeAttributes.path: ")), "{relative:?}");
    let missing = complaints(&with_csi("{driver: disk.husk.dev}"));
    assert!(missing[0].contains("path"), "{missing:?}");
    let other =
        complaints(&with_csi("{driver: disk.husk.dev, volumeAttributes: {path: /a, b: c}}"));
    assert!(other[0].contains("no such attribute"), "{other:?}");
}

//! Reads volumes that are disks of the host. A Pod has no field for those: Kubernetes gives them by
//! claims, for which there is nobody here. The form is that of an inline CSI volume, whose driver is a
//! name that stands for husk itself.

use super::names;
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::storage::host_disk::FsType;
use crate::types::VolumeSource;

/// The driver that stands for image files and block devices of this host.
pub(super) const DRIVER: &str = "disk.husk.dev";

/// The volume that a `csi` object describes.
pub(super) fn read_disk(view: &View<'_>, problems: &mut Problems) -> VolumeSource {
    let driver = view.get("driver");
    let named = driver.required_text(problems).unwrap_or(DRIVER);
    if named != DRIVER {
        let reason = format!(
            "there are no CSI drivers here; {DRIVER} stands for image files and block devices of the \
             host"
        );
        driver.invalid(named, reason, problems);
    }
    let fstypes = [("ext4", FsType::Ext4), ("erofs", FsType::Erofs), ("", FsType::Ext4)];
    let fstype_view = view.get("fsType");
    let fstype = fstype_view.one_of(&fstypes, problems).unwrap_or(FsType::Ext4);
    let read_only = view.get("readOnly").boolean(problems).unwrap_or_default();
    if fstype == FsType::Erofs && !read_only {
        fstype_view.invalid(fstype.name(), "it can only be read: set readOnly: true", problems);
    }
    let attributes = view.get("volumeAttributes");
    for (key, value) in attributes.entries(problems) {
        if key != "path" {
            value.invalid(key, format!("{DRIVER} has no such attribute, only path"), problems);
        }
    }
    let path_view = attributes.get("path");
    let path = path_view.required_text(problems).unwrap_or_default();
    check(&path_view, path, names::absolute_path, problems);
    VolumeSource::Disk { path: path.into(), fstype, read_only }
}

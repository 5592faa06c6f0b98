//! Disks for a running pod.

use std::path::PathBuf;

use husk_proto::pod as wire;
use tonic::Status;

use super::refusal::refused;
use crate::pod::{DiskAttachment, PodAccess};
use crate::storage::host_disk::FsType;

pub(super) async fn attach(
    access: &PodAccess,
    request: wire::AttachDiskRequest,
) -> Result<wire::AttachDiskResponse, Status> {
    let wire::AttachDiskRequest { name, path, read_only, fstype, container, mount_path } = request;
    let fstype = match fstype.as_str() {
        "" => None,
        named => Some(FsType::named(named).ok_or_else(|| {
            let text = format!("fstype: {named:?} must be \"ext4\" or \"erofs\", or empty");
            super::refusal::status(tonic::Code::InvalidArgument, &text)
        })?),
    };
    let path = PathBuf::from(path);
    let disk = DiskAttachment { name, path, read_only, fstype, container, mount_path };
    let fstype = access.attach_disk(disk).await.map_err(|error| refused(&error))?;
    Ok(wire::AttachDiskResponse { fstype: fstype.name().to_owned() })
}

pub(super) async fn detach(
    access: &PodAccess,
    request: wire::DetachDiskRequest,
) -> Result<wire::DetachDiskResponse, Status> {
    let wire::DetachDiskRequest { name } = request;
    access.detach_disk(&name).await.map_err(|error| refused(&error))?;
    Ok(wire::DetachDiskResponse {})
}

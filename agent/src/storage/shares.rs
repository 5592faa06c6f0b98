//! What the host shares: one virtio-fs device for all volumes that are files or directories of the
//! host, mounted when the first of them is made.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::{StorageError, attach, failed};
use crate::container::rootfs;
use crate::host::Host;

/// By what the device is known.
const TAG: &str = "husk";

/// Where all shares are, by their numbers. Containers see only those that are volumes of theirs.
const SHARES: &str = "/run/husk/shares";

/// Makes share `number` the volume of this name.
///
/// # Errors
/// [`StorageError`].
pub(super) fn bind(
    host: &Host,
    number: u32,
    name: &str,
    target: &Path,
) -> Result<(), StorageError> {
    let shares = Path::new(SHARES);
    if !shares.exists() {
        mount(host, shares).map_err(failed("mount the files of the host for volume", name))?;
    }
    let source = shares.join(number.to_string());
    let is_directory = match fs::metadata(&source) {
        Ok(metadata) => metadata.is_dir(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StorageError::NoShare { number, volume: name.to_owned() });
        }
        Err(error) => return Err(failed("look at the share of volume", name)(error)),
    };
    if is_directory {
        fs::create_dir_all(target).map_err(failed("make volume", name))?;
    } else {
        // Something for the file to be mounted on.
        let made = target.parent().map_or(Ok(()), fs::create_dir_all);
        made.and_then(|()| File::create(target).map(drop)).map_err(failed("make volume", name))?;
    }
    rustix::mount::mount_bind(&source, target).map_err(failed("bind volume", name))
}

fn mount(host: &Host, target: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(target)?;
    match host {
        // A device node on the host stands for a device of the host: its number means another one here.
        Host::Vm => rootfs::new_filesystem("virtiofs", TAG, &[], libc::MOUNT_ATTR_NODEV)
            .and_then(|mount| attach(&mount, target)),
        Host::Test(directory) => Ok(rustix::mount::mount_bind(directory.join("shares"), target)?),
    }
}

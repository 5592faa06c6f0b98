//! Disks that are added to a running VM, and taken away.

use husk_vmm_api::{DiskConfig, FdIndex, Request};
use tokio::sync::oneshot;

use super::{Disk, Vm, VmError, lock};

/// What the VMM answers: the device's number where a disk was added, or why it refuses.
pub(super) type Answer = Result<Option<u32>, String>;

impl Vm {
    /// Adds a disk. Returns the number of the device, by which the guest's driver knows where to look.
    ///
    /// # Errors
    /// [`VmError::Disk`]: all places are taken, the serial is another disk's, or the image is none.
    /// [`VmError::Ended`].
    pub async fn add_disk(&self, disk: Disk) -> Result<u32, VmError> {
        let Disk { serial, image, read_only } = disk;
        let config = DiskConfig { serial: serial.clone(), fd: FdIndex(0), read_only };
        let request = |id| Request::AddDisk { id, disk: config };
        let number = self.change_disk(request, vec![image], &serial).await?;
        number.ok_or_else(|| VmError::Disk { serial, reason: "the VMM gave it no place".into() })
    }

    /// Takes a disk away that [`Vm::add_disk`] added, and of which the guest has let go. When this
    /// returns the VMM has closed it.
    ///
    /// # Errors
    /// [`VmError::Disk`] if there is no such disk; [`VmError::Ended`].
    pub async fn remove_disk(&self, serial: &str) -> Result<(), VmError> {
        let request = |id| Request::RemoveDisk { id, serial: serial.to_owned() };
        self.change_disk(request, Vec::new(), serial).await.map(drop)
    }

    async fn change_disk(
        &self,
        request: impl FnOnce(u32) -> Request,
        fds: Vec<std::os::fd::OwnedFd>,
        serial: &str,
    ) -> Result<Option<u32>, VmError> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut disks = lock(&self.shared.disks);
            disks.last_id = disks.last_id.wrapping_add(1);
            let id = disks.last_id;
            disks.waiting.insert(id, sender);
            id
        };
        self.send(request(id), fds);
        let answer = tokio::select! {
            // An answer that came counts, also if the VM has ended since.
            biased;
            Ok(answer) = answer => answer,
            exit = self.exited() => return Err(VmError::Ended(exit)),
        };
        answer.map_err(|reason| VmError::Disk { serial: serial.to_owned(), reason })
    }
}

/// Who waits for which answer.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    last_id: u32,
    waiting: std::collections::HashMap<u32, oneshot::Sender<Answer>>,
}

impl Waiting {
    /// Hands an answer to who waits for it.
    pub(super) fn answered(&mut self, id: u32, answer: Answer) {
        let told = self.waiting.remove(&id).map(|waiter| waiter.send(answer));
        if !matches!(told, Some(Ok(()))) {
            tracing::debug!(id, "nobody waits for this answer");
        }
    }

    /// No answer will come.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}

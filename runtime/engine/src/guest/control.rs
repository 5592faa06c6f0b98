//! What people ask of a running guest, as opposed to what the life of its pod needs: a signal for one
//! process, sizes of windows, lists of processes, pauses, archives.

use husk_proto::agent as proto;
use tonic::Code;

use super::{Guest, GuestError, clean};
use crate::vm::Accept;

/// Most processes of a container that are told of.
const MAX_PROCESSES: usize = 4096;

impl Guest {
    /// Sends a signal to a container's first process, or to one that was started in it (`exec`).
    ///
    /// # Errors
    /// [`GuestError`]; of a process that has ended `Refused` with the code `NotFound`.
    pub async fn signal_process(
        &self,
        container: &str,
        exec: Option<&str>,
        signal: u32,
    ) -> Result<(), GuestError> {
        let request = proto::SignalProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            signal,
            all: false,
        };
        let proto::SignalProcessResponse {} =
            call!(self, signal_process, "SignalProcess", request)?;
        Ok(())
    }

    /// Sets the window size of a process's terminal, in characters. One that has ended has none,
    /// and that is no error.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn resize_terminal(
        &self,
        container: &str,
        exec: Option<&str>,
        (width, height): (u32, u32),
    ) -> Result<(), GuestError> {
        let request = proto::ResizeTerminalRequest {
            container_id: container.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            width,
            height,
        };
        match call!(self, resize_terminal, "ResizeTerminal", request) {
            Ok(proto::ResizeTerminalResponse {})
            | Err(GuestError::Refused { code: Code::NotFound, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the files of a volume of files, all at once.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn update_volume(&self, name: &str, files: proto::Files) -> Result<(), GuestError> {
        let request = proto::UpdateVolumeRequest { name: name.to_owned(), files: Some(files) };
        let proto::UpdateVolumeResponse {} = call!(self, update_volume, "UpdateVolume", request)?;
        Ok(())
    }

    /// Has the guest find a disk that the VM was given, and show its file system to a container.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn add_filesystem(
        &self,
        request: proto::AddFilesystemRequest,
    ) -> Result<(), GuestError> {
        let proto::AddFilesystemResponse {} =
            call!(self, add_filesystem, "AddFilesystem", request)?;
        Ok(())
    }

    /// Has the guest let go of a file system that was added, and of its disk.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn remove_filesystem(&self, name: &str) -> Result<(), GuestError> {
        let request = proto::RemoveFilesystemRequest { name: name.to_owned() };
        let proto::RemoveFilesystemResponse {} =
            call!(self, remove_filesystem, "RemoveFilesystem", request)?;
        Ok(())
    }

    /// The processes of a container. Their texts are cleaned.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn list_processes(
        &self,
        container: &str,
    ) -> Result<Vec<proto::ProcessInfo>, GuestError> {
        let request = proto::ListProcessesRequest { container_id: container.to_owned() };
        let proto::ListProcessesResponse { mut processes } =
            call!(self, list_processes, "ListProcesses", request)?;
        processes.truncate(MAX_PROCESSES);
        for process in &mut processes {
            process.state = clean(&process.state);
            process.command = clean(&process.command);
        }
        Ok(processes)
    }

    /// Stops every process of a container, or lets them go on.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn set_paused(&self, container: &str, paused: bool) -> Result<(), GuestError> {
        let id = container.to_owned();
        if paused {
            let proto::PauseContainerResponse {} = call!(
                self,
                pause_container,
                "PauseContainer",
                proto::PauseContainerRequest { id }
            )?;
        } else {
            let proto::ResumeContainerResponse {} = call!(
                self,
                resume_container,
                "ResumeContainer",
                proto::ResumeContainerRequest { id }
            )?;
        }
        Ok(())
    }

    /// Expects one more connection of the agent: its port, and the connection.
    #[must_use]
    pub fn expect_stream(&self) -> (u32, Accept) {
        let port = self.fresh_port();
        (port, self.vm().accept(port))
    }

    /// Has the agent write a file or tree of a container as a tar archive to its connection to
    /// `port`. Returns when all is written: the archive's size in bytes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn copy_out(
        &self,
        container: &str,
        path: &str,
        port: u32,
    ) -> Result<u64, GuestError> {
        let (container_id, path) = (container.to_owned(), path.to_owned());
        let request = proto::CopyOutRequest { container_id, path, port };
        let proto::CopyOutResponse { bytes } = call!(self, copy_out, "CopyOut", request)?;
        Ok(bytes)
    }

    /// Has the agent read a tar archive from its connection to `port` into a directory of a
    /// container. Returns when all is read: the archive's size in bytes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn copy_in(&self, container: &str, path: &str, port: u32) -> Result<u64, GuestError> {
        let (container_id, path) = (container.to_owned(), path.to_owned());
        let request = proto::CopyInRequest { container_id, path, port };
        let proto::CopyInResponse { bytes } = call!(self, copy_in, "CopyIn", request)?;
        Ok(bytes)
    }
}

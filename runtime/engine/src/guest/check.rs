//! What the life of a pod asks of its guest about containers: last words.

use husk_proto::agent as proto;

use super::{Guest, GuestError};

impl Guest {
    /// The end, at most `max_bytes`, of a file that was bound into a container, which may have
    /// ended.
    ///
    /// # Errors
    /// [`GuestError`]; if there is no such file, `Refused` with the code `NotFound`.
    pub async fn read_file(
        &self,
        container: &str,
        path: &str,
        max_bytes: u32,
    ) -> Result<Vec<u8>, GuestError> {
        let request = proto::ReadFileRequest {
            container_id: container.to_owned(),
            path: path.to_owned(),
            max_bytes,
        };
        let proto::ReadFileResponse { content } = call!(self, read_file, "ReadFile", request)?;
        let end = content.len().saturating_sub(max_bytes.try_into().unwrap_or(usize::MAX));
        Ok(content.get(end..).unwrap_or_default().to_vec())
    }
}

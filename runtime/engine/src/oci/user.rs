//! As whom a container runs.

use oci_spec::OciSpecError;
use oci_spec::runtime::{User, UserBuilder};

use super::SpecError;
use crate::types::{ContainerSpec, PodSpec};

/// Longest user of an image, in bytes.
const MAX_USER_LEN: usize = 256;

/// Why the user of a container is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// `runAsNonRoot` with `runAsUser: 0`.
    #[error("runAsNonRoot is set, and runAsUser is 0")]
    RunAsRoot,
    /// `runAsNonRoot` with an image that runs as root.
    #[error("runAsNonRoot is set, and the image runs as root")]
    ImageRoot,
    /// `runAsNonRoot` with an image whose user has a name, which could be root's.
    #[error("runAsNonRoot is set, and the image's user {user:?} is no number: set runAsUser")]
    ImageUserName {
        /// The image's user.
        user: String,
    },
    /// The image's user is not of the form `USER[:GROUP]`.
    #[error("the image's user {user:?} is not of the form USER[:GROUP]")]
    Malformed {
        /// The image's user.
        user: String,
    },
}

/// The user of a container: the pod's settings, or else the image's `USER[:GROUP]`, or else root.
///
/// The number of a user does not say its groups, and a name not even its number: `username` then
/// carries `USER[:GROUP]`, each a name or a number, to be resolved against the container's own
/// files by the agent. `uid` and `gid` hold what is known without them, else 0.
pub(super) fn user(
    pod: &PodSpec,
    container: &ContainerSpec,
    image_user: &str,
) -> Result<User, SpecError> {
    let security = &container.security;
    let (image_name, image_group) = match image_user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (image_user, None),
    };
    if security.run_as_user.is_none() {
        let malformed = image_user.len() > MAX_USER_LEN
            || image_user.contains(|c: char| c.is_control() || c.is_whitespace())
            || (image_name.is_empty() && image_group.is_some())
            || image_group.is_some_and(|group| group.is_empty() || group.contains(':'));
        if malformed {
            return Err(UserError::Malformed { user: image_user.into() }.into());
        }
    }
    if security.run_as_non_root {
        check_non_root(security.run_as_user, image_name)?;
    }
    let (name, group) = match (security.run_as_user, security.run_as_group) {
        (Some(user), group) => (user.to_string(), group.map(|group| group.to_string())),
        (None, Some(group)) => (image_name.to_owned(), Some(group.to_string())),
        (None, None) => (image_name.to_owned(), image_group.map(str::to_owned)),
    };
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    let mut builder = UserBuilder::default()
        .uid(number(&name))
        .gid(group.as_deref().map(number).unwrap_or_default())
        .additional_gids(additional_groups(pod));
    if !name.is_empty() {
        builder = builder.username(match group {
            Some(group) => format!("{name}:{group}"),
            None => name,
        });
    }
    builder.build().map_err(|error: OciSpecError| SpecError::Build(error))
}

/// As the kubelet: without the image's /etc/passwd a name cannot be told from root.
fn check_non_root(run_as_user: Option<u32>, image_name: &str) -> Result<(), UserError> {
    match (run_as_user, image_name.parse::<u32>()) {
        (Some(0), _) => Err(UserError::RunAsRoot),
        (Some(_), _) => Ok(()),
        (None, Ok(0)) => Err(UserError::ImageRoot),
        (None, Ok(_)) => Ok(()),
        (None, Err(_)) if image_name.is_empty() => Err(UserError::ImageRoot),
        (None, Err(_)) => Err(UserError::ImageUserName { user: image_name.into() }),
    }
}

/// The pod's supplemental groups and its fsGroup, each once.
fn additional_groups(pod: &PodSpec) -> Vec<u32> {
    let mut groups = Vec::new();
    for group in pod.supplemental_groups.iter().chain(&pod.fs_group) {
        if !groups.contains(group) {
            groups.push(*group);
        }
    }
    groups
}

//! The configuration of a debug container: the opposite of the others', for it is to hide nothing of
//! the guest.

use std::path::PathBuf;

use husk_proto::guest;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    LinuxBuilder, LinuxDeviceCgroupBuilder, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use super::{OCI_VERSION, SpecError, capability, environment, mounts, open_files};
use crate::types::{PodSpec, SecurityContext};

/// Where a debug container sees the guest's own root.
pub(super) const GUEST_ROOT: &str = "/guest";

/// What is run unless something else is asked for.
const SHELL: &str = "sh";

/// First to be killed when the guest's memory runs out: looking at a container must not cost it its
/// life.
const OOM_SCORE_ADJ: i32 = 1000;

/// The configuration of the debug container `id`, which runs a shell as root in a root made from an
/// image of this configuration.
///
/// It has no namespace of its own but the one of mounts, which its root needs: it sees the agent as
/// process 1, the processes of all containers, all cgroups, the pod's network and its host name. It
/// has every capability, may use every device, and finds the guest's own root at [`GUEST_ROOT`].
///
/// # Errors
/// If the image's environment is not one.
pub(crate) fn debug_spec(
    pod: &PodSpec,
    image: &ImageConfiguration,
    id: &str,
) -> Result<Spec, SpecError> {
    let image = image.config().clone().unwrap_or_default();
    let privileged = SecurityContext { privileged: true, ..SecurityContext::default() };
    let env = environment::complete(pod, false, &image, &environment::Declared::default())?;
    let process = ProcessBuilder::default()
        .user(UserBuilder::default().uid(0_u32).gid(0_u32).build()?)
        .args(vec![SHELL.to_owned()])
        .env(env)
        .cwd(PathBuf::from("/"))
        .capabilities(capability::sets(&privileged)?)
        .rlimits(vec![open_files()?])
        .no_new_privileges(false)
        .oom_score_adj(OOM_SCORE_ADJ)
        .build()?;
    let mount = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Mount).build()?;
    let all_devices = LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build()?;
    let linux = LinuxBuilder::default()
        .namespaces(vec![mount])
        .resources(LinuxResourcesBuilder::default().devices(vec![all_devices]).build()?)
        .devices(mounts::privileged_devices()?)
        .masked_paths(Vec::new())
        .readonly_paths(Vec::new())
        .build()?;
    let root = PathBuf::from(format!("{}/{id}/rootfs", guest::CONTAINERS));
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(RootBuilder::default().path(root).readonly(false).build()?)
        .process(process)
        .mounts(mounts::debug()?)
        .linux(linux)
        .build()?;
    // The builder sets them.
    spec.set_hostname(None);
    spec.set_annotations(None);
    Ok(spec)
}

//! What [`crate::fuzzing`] needs of the runner: a request's way up to where something is made.

use husk_proto::guest;
use serde_json::json;

use super::ContainerError;
pub(crate) use super::create::check_layers;
use super::plan::ContainerPlan;
pub(crate) use super::plan::check_disks;
use super::process::ProcessPlan;
use super::spec::{self, SpecError};

/// Understands a `config.json`. Its `root.path` is taken to be the container's, so that the fuzzer
/// need not find that out.
pub(crate) fn plan(id: &str, bytes: &[u8], hostname: &str) -> Result<ContainerPlan, SpecError> {
    let mut spec = spec::parse(bytes)?;
    spec.root.path = format!("{}/{id}/rootfs", guest::CONTAINERS);
    ContainerPlan::new(id, &spec, hostname)
}

/// Understands the process of an exec in a minimal container.
pub(crate) fn exec(id: &str, bytes: &[u8]) -> Result<ProcessPlan, ContainerError> {
    let given = spec::parse_process(bytes)?;
    let container = json!({
        "ociVersion": "1.2.0",
        "process": {"cwd": "/", "args": ["true"]},
        "root": {"path": ""},
        "linux": {"namespaces": [{"type": "mount"}]},
    });
    Ok(plan(id, container.to_string().as_bytes(), "pod")?.exec(given)?)
}

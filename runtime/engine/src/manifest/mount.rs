//! Reads `volumeMounts` of a container.

use super::names;
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::types::{MountPropagation, SubPath, VolumeMount, VolumeSource, VolumeSpec};

/// The mounts of a container of a pod with these volumes; what is wrong is noted.
pub(super) fn read_all(
    view: &View<'_>,
    volumes: &[VolumeSpec],
    privileged: bool,
    problems: &mut Problems,
) -> Vec<VolumeMount> {
    let mut mounts: Vec<VolumeMount> = Vec::new();
    for view in view.objects(problems) {
        let name = view.get("name");
        let volume = name.required_text(problems).unwrap_or_default();
        if !volume.is_empty() && !volumes.iter().any(|other| other.name == volume) {
            name.invalid(volume, "there is no such volume in spec.volumes", problems);
        }
        let path = view.get("mountPath");
        let text = path.required_text(problems).unwrap_or_default();
        check(&path, text, names::absolute_path, problems);
        let clean = if text.starts_with('/') { names::clean_path(text) } else { String::new() };
        if text.starts_with('/') && clean.is_empty() {
            path.invalid(text, "a volume cannot be the root", problems);
        } else if mounts.iter().any(|other| other.mount_path == clean) && !clean.is_empty() {
            let reason = "another volume of this container is mounted there";
            path.invalid(text, reason, problems);
        }
        let read_only = view.get("readOnly").boolean(problems).unwrap_or_default();
        let of_host = volumes.iter().any(|other| {
            other.name == volume && matches!(other.source, VolumeSource::HostPath { .. })
        });
        let propagation =
            read_propagation(&view.get("mountPropagation"), privileged, of_host, problems);
        let recursive = view.get("recursiveReadOnly");
        mounts.push(VolumeMount {
            volume: volume.into(),
            mount_path: clean,
            read_only,
            recursive_read_only: read_recursive(&recursive, read_only, propagation, problems),
            sub_path: read_sub_path(&view, problems),
            propagation,
        });
    }
    mounts
}

fn read_propagation(
    view: &View<'_>,
    privileged: bool,
    of_host: bool,
    problems: &mut Problems,
) -> MountPropagation {
    let kinds = [
        ("None", MountPropagation::None),
        ("HostToContainer", MountPropagation::HostToContainer),
        ("Bidirectional", MountPropagation::Bidirectional),
    ];
    let propagation = view.one_of(&kinds, problems).unwrap_or_default();
    if propagation == MountPropagation::Bidirectional && !privileged {
        let reason = "only for containers that are privileged";
        view.invalid("Bidirectional", reason, problems);
    }
    if propagation != MountPropagation::None && of_host {
        let reason = "not for a hostPath: mounts do not spread between the kernels of the host and of \
                      the pod";
        view.invalid(view.text(&mut problems.fork()).unwrap_or_default(), reason, problems);
    }
    propagation
}

/// Whether what is mounted inside is read-only too. The guest's kernel can do it, so that
/// `IfPossible` means the same as `Enabled`.
fn read_recursive(
    view: &View<'_>,
    read_only: bool,
    propagation: MountPropagation,
    problems: &mut Problems,
) -> bool {
    let kinds = [("Disabled", false), ("IfPossible", true), ("Enabled", true)];
    let recursive = view.one_of(&kinds, problems).unwrap_or_default();
    let text = view.text(&mut problems.fork()).unwrap_or_default();
    if recursive && !read_only {
        view.invalid(text, "only where readOnly is true", problems);
    }
    if recursive && propagation != MountPropagation::None {
        view.invalid(text, "only where mountPropagation is None", problems);
    }
    recursive
}

fn read_sub_path(view: &View<'_>, problems: &mut Problems) -> Option<SubPath> {
    let (path_view, expr_view) = (view.get("subPath"), view.get("subPathExpr"));
    let given = |view: &View<'_>, problems: &mut Problems| {
        let text = view.text(problems).filter(|text| !text.is_empty()).map(str::to_owned);
        check(view, text.as_deref().unwrap_or_default(), names::sub_path, problems);
        text
    };
    match (given(&path_view, problems), given(&expr_view, problems)) {
        (Some(_), Some(expr)) => {
            expr_view.invalid(expr, "there is a subPath as well", problems);
            None
        }
        (Some(path), None) => {
            let path = names::clean_path(&path);
            // Such as `./`, which is all of it.
            (!path.is_empty()).then(|| SubPath::Path(path.trim_start_matches('/').to_owned()))
        }
        (None, expr) => expr.map(SubPath::Expr),
    }
}

//! Reads `spec.volumes`.

use std::collections::BTreeSet;

use super::names;
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::types::{Medium, VolumeSource, VolumeSpec};

/// All volumes of a pod, those with something wrong included.
pub(super) fn read_all(view: &View<'_>, problems: &mut Problems) -> Vec<VolumeSpec> {
    let mut volumes = Vec::new();
    let mut seen = BTreeSet::new();
    for view in view.objects(problems) {
        let name_view = view.get("name");
        let name = name_view.required_text(problems).unwrap_or_default();
        check(&name_view, name, names::label, problems);
        if !name.is_empty() && !seen.insert(name) {
            name_view.invalid(name, "another volume of this pod has this name", problems);
        }
        let source = read_source(&view, name, problems);
        volumes.push(VolumeSpec { name: name.into(), source });
    }
    volumes
}

fn read_source(view: &View<'_>, name: &str, problems: &mut Problems) -> VolumeSource {
    let empty_dir = view.get("emptyDir");
    // A source of another kind is not supported, which has been said. No source at all has not.
    if !empty_dir.is_present() && !view.has_other_fields(&["name", "emptyDir"]) {
        view.invalid(name, "has no source, such as emptyDir: {}", problems);
    }
    if !empty_dir.is_object(problems) {
        return VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: None };
    }
    let medium = empty_dir
        .get("medium")
        .one_of(&[("", Medium::Disk), ("Memory", Medium::Memory)], problems)
        .unwrap_or_default();
    let size_limit = empty_dir.get("sizeLimit").quantity(problems);
    VolumeSource::EmptyDir {
        medium,
        size_limit: size_limit.map(|(quantity, _)| quantity.units()).filter(|bytes| *bytes > 0),
    }
}

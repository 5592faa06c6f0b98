//! Reads `spec.volumes`.

use std::collections::BTreeSet;

use super::container::check_container;
use super::disk::read_disk;
use super::env::{VOLUME_FIELDS, read_field_ref, read_resource_ref};
use super::names;
use super::objects::{Kind, Scope, read_reference};
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::downward;
use crate::types::{
    ContainerSpec, FileContent, FileSpec, Hidden, HostPathType, Medium, PodMetadata, VolumeSource,
    VolumeSpec,
};

/// Most bytes of all files of a pod's volumes together, names included: they travel to the guest in
/// one message, and stay in its memory.
const MAX_FILES_LEN: usize = 3 * 1024 * 1024;

/// Permissions of a file without its own, as in Kubernetes.
const DEFAULT_MODE: u32 = 0o644;

/// All volumes of a pod, those with something wrong included.
pub(super) fn read_all(
    view: &View<'_>,
    scope: Scope<'_>,
    metadata: &PodMetadata,
    problems: &mut Problems,
) -> Vec<VolumeSpec> {
    let mut volumes = Vec::new();
    let mut seen = BTreeSet::new();
    for view in view.objects(problems) {
        let name_view = view.get("name");
        let name = name_view.required_text(problems).unwrap_or_default();
        check(&name_view, name, names::label, problems);
        if !name.is_empty() && !seen.insert(name) {
            name_view.invalid(name, "another volume of this pod has this name", problems);
        }
        let source = read_source(&view, name, scope, problems);
        volumes.push(VolumeSpec { name: name.into(), source });
    }
    let len: usize = volumes.iter().flat_map(files_of).map(|file| len(file, metadata)).sum();
    if len > MAX_FILES_LEN {
        let reason = format!(
            "the files of a pod's configMap, secret, downwardAPI and projected volumes have at most \
             3 MiB ({MAX_FILES_LEN} bytes) together"
        );
        view.invalid(format!("{len} bytes"), reason, problems);
    }
    volumes
}

fn files_of(volume: &VolumeSpec) -> &[FileSpec] {
    match &volume.source {
        VolumeSource::Files(files) => files,
        VolumeSource::EmptyDir { .. }
        | VolumeSource::HostPath { .. }
        | VolumeSource::Disk { .. } => &[],
    }
}

fn len(file: &FileSpec, metadata: &PodMetadata) -> usize {
    /// About what the message needs besides, and a short field of the pod.
    const OVERHEAD: usize = 64;
    let content = match &file.content {
        FileContent::Bytes(Hidden(bytes)) => bytes.len(),
        FileContent::Field(field) => {
            downward::metadata_field(field, metadata, "").map_or(0, |t| t.len())
        }
        FileContent::Resource(_) => 0,
    };
    content.saturating_add(file.path.len()).saturating_add(OVERHEAD)
}

fn read_source(
    view: &View<'_>,
    name: &str,
    scope: Scope<'_>,
    problems: &mut Problems,
) -> VolumeSource {
    const SOURCES: [&str; 7] =
        ["emptyDir", "configMap", "secret", "downwardAPI", "projected", "hostPath", "csi"];
    let present: Vec<_> = SOURCES.into_iter().filter(|name| view.get(name).is_present()).collect();
    let none = VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: None };
    match present.as_slice() {
        [] => {
            // A source of another kind is not supported, which has been said. No source at all has
            // not.
            if !view.has_other_fields(&["name"]) {
                view.invalid(name, "has no source, such as emptyDir: {}", problems);
            }
            none
        }
        [source] => {
            let source_view = view.get(source);
            match *source {
                _ if !source_view.is_object(problems) => none,
                "emptyDir" => read_empty_dir(&source_view, problems),
                "hostPath" => read_host_path(&source_view, problems),
                "csi" => read_disk(&source_view, problems),
                kind => {
                    let paths = BTreeSet::new();
                    let mut files = Files { scope, mode: DEFAULT_MODE, list: Vec::new(), paths };
                    files.read(&source_view, kind, "secretName", problems);
                    VolumeSource::Files(files.list)
                }
            }
        }
        _ => {
            view.invalid(name, "must have one source, not several", problems);
            none
        }
    }
}

fn read_empty_dir(view: &View<'_>, problems: &mut Problems) -> VolumeSource {
    let medium = view
        .get("medium")
        .one_of(&[("", Medium::Disk), ("Memory", Medium::Memory)], problems)
        .unwrap_or_default();
    let size_limit = view.get("sizeLimit").quantity(problems);
    VolumeSource::EmptyDir {
        medium,
        size_limit: size_limit.map(|(quantity, _)| quantity.units()).filter(|bytes| *bytes > 0),
    }
}

fn read_host_path(view: &View<'_>, problems: &mut Problems) -> VolumeSource {
    let path = view.get("path");
    let text = path.required_text(problems).unwrap_or_default();
    check(&path, text, names::absolute_path, problems);
    let kind = view.get("type");
    let given = kind.text(&mut problems.fork()).unwrap_or_default();
    let reason = match given {
        "Socket" => Some(
            "a pod has a kernel of its own, from which no server of the host can be reached by a \
             socket in a file system",
        ),
        "CharDevice" => {
            Some("a pod has a kernel of its own, which does not have the host's devices")
        }
        "BlockDevice" => Some(
            "a pod has a kernel of its own, which does not have the host's devices; husk disk attach \
             gives a running pod a disk",
        ),
        _ => None,
    };
    if let Some(reason) = reason {
        kind.invalid(given, reason, problems);
        return VolumeSource::HostPath { path: text.into(), kind: HostPathType::Any };
    }
    let kinds = [
        ("", HostPathType::Any),
        ("DirectoryOrCreate", HostPathType::DirectoryOrCreate),
        ("Directory", HostPathType::Directory),
        ("FileOrCreate", HostPathType::FileOrCreate),
        ("File", HostPathType::File),
    ];
    let kind = kind.one_of(&kinds, problems).unwrap_or_default();
    VolumeSource::HostPath { path: text.into(), kind }
}

/// The files of a volume, as they are read.
struct Files<'a> {
    scope: Scope<'a>,
    mode: u32,
    list: Vec<FileSpec>,
    paths: BTreeSet<String>,
}

impl Files<'_> {
    /// Reads a source of this kind. `secret_field` is how it calls the name of a Secret.
    fn read(&mut self, view: &View<'_>, kind: &str, secret_field: &str, problems: &mut Problems) {
        if let Some(mode) = read_mode(&view.get("defaultMode"), problems) {
            self.mode = mode;
        }
        match kind {
            "configMap" => self.read_object(view, "name", Kind::ConfigMap, problems),
            "secret" => self.read_object(view, secret_field, Kind::Secret, problems),
            "downwardAPI" => self.read_downward(view, problems),
            _ => self.read_projected(view, problems),
        }
    }

    fn read_projected(&mut self, view: &View<'_>, problems: &mut Problems) {
        for source in view.get("sources").objects(problems) {
            let kinds = ["configMap", "secret", "downwardAPI"];
            let present: Vec<_> =
                kinds.into_iter().filter(|kind| source.get(kind).is_present()).collect();
            match present.as_slice() {
                // Others have been refused by the table.
                [] if source.has_other_fields(&[]) => {}
                [kind] => {
                    let inner = source.get(kind);
                    if inner.is_object(problems) {
                        self.read(&inner, kind, "name", problems);
                    }
                }
                _ => source.invalid("sources", "each must have one kind of source", problems),
            }
        }
    }

    /// All values of an object, or those that `items` lists.
    fn read_object(
        &mut self,
        view: &View<'_>,
        name_field: &str,
        kind: Kind,
        problems: &mut Problems,
    ) {
        let reference = read_reference(view, name_field, kind, self.scope, problems);
        let Some(items) = reference.items else { return };
        let bytes = |bytes: &[u8]| FileContent::Bytes(Hidden(bytes.to_vec()));
        let wanted = view.get("items").objects(problems);
        if wanted.is_empty() {
            for (key, item) in items {
                self.add(view, key, self.mode, bytes(&item.bytes), problems);
            }
        }
        for want in &wanted {
            let key_view = want.get("key");
            let key = key_view.required_text(problems).unwrap_or_default();
            match items.get(key) {
                Some(item) => self.read_item(want, bytes(&item.bytes), problems),
                None if reference.optional || key.is_empty() => {}
                None => {
                    let reason = format!("{} {} has no such key", kind.as_str(), reference.name);
                    key_view.invalid(key, reason, problems);
                }
            }
        }
    }

    fn read_downward(&mut self, view: &View<'_>, problems: &mut Problems) {
        for item in view.get("items").objects(problems) {
            let (field, resource) = (item.get("fieldRef"), item.get("resourceFieldRef"));
            let content = match (field.is_present(), resource.is_present()) {
                (true, false) => {
                    read_field_ref(&field, VOLUME_FIELDS, problems).map(FileContent::Field)
                }
                (false, true) => {
                    read_resource_ref(&resource, None, problems).map(FileContent::Resource)
                }
                _ => {
                    let reason = "each must have either fieldRef or resourceFieldRef";
                    item.invalid("items", reason, problems);
                    None
                }
            };
            if let Some(content) = content {
                self.read_item(&item, content, problems);
            }
        }
    }

    /// Reads the path and the mode of an item with this content.
    fn read_item(&mut self, item: &View<'_>, content: FileContent, problems: &mut Problems) {
        let mode = read_mode(&item.get("mode"), problems).unwrap_or(self.mode);
        let path_view = item.get("path");
        let Some(path) = path_view.required_text(problems) else { return };
        match names::volume_path(path) {
            Ok(()) => {
                let path = names::clean_path(path);
                self.add(&path_view, path.trim_start_matches('/'), mode, content, problems);
            }
            Err(reason) => path_view.invalid(path, reason, problems),
        }
    }

    /// Adds a file, unless one is in its way.
    fn add(
        &mut self,
        view: &View<'_>,
        path: &str,
        mode: u32,
        content: FileContent,
        problems: &mut Problems,
    ) {
        let mut outer = std::iter::successors(Some(path), |path| Some(path.rsplit_once('/')?.0));
        let above = outer.find(|path| self.paths.contains(*path));
        let first_inner = || self.paths.range(format!("{path}/")..).next();
        let below = || first_inner().filter(|inner| inner.starts_with(&format!("{path}/")));
        if let Some(other) = above.or_else(|| below().map(String::as_str)) {
            let reason = format!("the volume has a file {other} already");
            view.invalid(path, reason, problems);
            return;
        }
        self.paths.insert(path.to_owned());
        self.list.push(FileSpec { path: path.to_owned(), mode, content });
    }
}

fn read_mode(view: &View<'_>, problems: &mut Problems) -> Option<u32> {
    view.integer(0..=0o777, problems)
}

/// Notes references of volumes to containers that are not there.
pub(super) fn check_references(
    volumes: &View<'_>,
    containers: &[ContainerSpec],
    problems: &mut Problems,
) {
    let mut unnoted = problems.fork();
    for volume in volumes.objects(&mut unnoted) {
        let projected = volume.get("projected").get("sources").objects(&mut unnoted);
        for owner in [volume].iter().chain(&projected) {
            for item in owner.get("downwardAPI").get("items").objects(&mut unnoted) {
                let name = item.get("resourceFieldRef").get("containerName");
                check_container(&name, containers, problems);
            }
        }
    }
}

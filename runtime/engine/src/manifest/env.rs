//! Reads the environment of a container. Its values are found at every start: [`crate::oci`].

use super::names;
use super::objects::{Item, Kind, Scope, read_reference};
use super::pod::check;
use super::problem::{ProblemKind, Problems};
use super::view::View;
use crate::types::{EnvValue, EnvVar, FieldRef, Hidden, ResourceField, ResourceFieldRef};

/// All variables of the container of this name: those of whole objects, then its own in their
/// order.
pub(super) fn read_all(
    container_view: &View<'_>,
    container: &str,
    scope: Scope<'_>,
    problems: &mut Problems,
) -> Vec<EnvVar> {
    let mut variables = Vec::new();
    for view in container_view.get("envFrom").objects(problems) {
        read_from(&view, scope, &mut variables, problems);
    }
    for view in container_view.get("env").objects(problems) {
        variables.extend(read(&view, container, scope, problems));
    }
    variables
}

/// The variables of a whole ConfigMap or Secret. Values of `binaryData` are none.
fn read_from(
    view: &View<'_>,
    scope: Scope<'_>,
    variables: &mut Vec<EnvVar>,
    problems: &mut Problems,
) {
    let prefix_view = view.get("prefix");
    let prefix = prefix_view.text(problems).unwrap_or_default();
    check(&prefix_view, prefix, names::variable, problems);
    let (config_map, secret) = (view.get("configMapRef"), view.get("secretRef"));
    let (source, kind) = match (config_map.is_present(), secret.is_present()) {
        (true, false) => (config_map, Kind::ConfigMap),
        (false, true) => (secret, Kind::Secret),
        (both, _) => {
            let reason = if both { "must have one source, not two" } else { "has no source" };
            return view.invalid("envFrom", reason, problems);
        }
    };
    if !source.is_object(problems) {
        return;
    }
    let reference = read_reference(&source, "name", kind, scope, problems);
    for (key, item) in reference.items.into_iter().flatten().filter(|(_, item)| !item.binary) {
        let value = verbatim(&source, kind, &reference.name, key, item, problems);
        variables.extend(value.map(|value| EnvVar { name: format!("{prefix}{key}"), value }));
    }
}

/// A value of an object as that of a variable, which is text.
fn verbatim(
    view: &View<'_>,
    kind: Kind,
    object: &str,
    key: &str,
    item: &Item,
    problems: &mut Problems,
) -> Option<EnvValue> {
    match std::str::from_utf8(&item.bytes) {
        Ok(text) if !text.contains('\0') => Some(EnvValue::Verbatim(Hidden(text.to_owned()))),
        _ => {
            let reason = format!(
                "this value of {} {object} is no text without NUL bytes, as a variable must be",
                kind.as_str()
            );
            view.invalid(key, reason, problems);
            None
        }
    }
}

/// A variable; `None` if it comes from an optional value that is not there.
fn read(
    view: &View<'_>,
    container: &str,
    scope: Scope<'_>,
    problems: &mut Problems,
) -> Option<EnvVar> {
    let name_view = view.get("name");
    let name = name_view.required_text(problems).unwrap_or_default();
    check(&name_view, name, names::variable, problems);
    let value = view.get("value");
    let text = value.text(problems).unwrap_or_default();
    if text.contains('\0') {
        value.invalid(text, "must not contain a NUL byte", problems);
    }
    let from = view.get("valueFrom");
    let value = if from.is_present() && from.is_object(problems) {
        if !text.is_empty() {
            from.invalid(name, "has a value already", problems);
        }
        read_source(&from, name, container, scope, problems)?
    } else {
        EnvValue::Literal(text.into())
    };
    Some(EnvVar { name: name.into(), value })
}

/// `None` if it is optional and not there, or wrong, which is noted.
fn read_source(
    from: &View<'_>,
    name: &str,
    container: &str,
    scope: Scope<'_>,
    problems: &mut Problems,
) -> Option<EnvValue> {
    const SOURCES: [&str; 4] = ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef"];
    let present: Vec<_> = SOURCES.into_iter().filter(|name| from.get(name).is_present()).collect();
    match present.as_slice() {
        [] => {
            // Other sources are not supported, which has been said.
            if !from.has_other_fields(&[]) {
                from.invalid(name, "has no source", problems);
            }
            None
        }
        [source] => {
            let view = from.get(source);
            match *source {
                "fieldRef" => read_field_ref(&view, ENV_FIELDS, problems).map(EnvValue::Field),
                "resourceFieldRef" => {
                    read_resource_ref(&view, Some(container), problems).map(EnvValue::Resource)
                }
                "configMapKeyRef" => read_key_ref(&view, Kind::ConfigMap, scope, problems),
                _ => read_key_ref(&view, Kind::Secret, scope, problems),
            }
        }
        _ => {
            from.invalid(name, "must have one source, not several", problems);
            None
        }
    }
}

/// One value of an object.
fn read_key_ref(
    view: &View<'_>,
    kind: Kind,
    scope: Scope<'_>,
    problems: &mut Problems,
) -> Option<EnvValue> {
    if !view.is_object(problems) {
        return None;
    }
    let reference = read_reference(view, "name", kind, scope, problems);
    let key_view = view.get("key");
    let key = key_view.required_text(problems)?;
    let items = reference.items?;
    let Some(item) = items.get(key).filter(|item| !item.binary) else {
        if !reference.optional {
            let reason = format!("{} {} has no such key", kind.as_str(), reference.name);
            key_view.invalid(key, reason, problems);
        }
        return None;
    };
    verbatim(view, kind, &reference.name, key, item, problems)
}

/// Fields of the pod that can be variables.
const ENV_FIELDS: FieldSet = FieldSet {
    allows: |field| !matches!(field, FieldRef::Labels | FieldRef::Annotations),
    names: "metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], \
            metadata.annotations['KEY'], spec.nodeName, spec.serviceAccountName, status.hostIP, \
            status.hostIPs, status.podIP, status.podIPs",
};

/// Fields of the pod that can be files.
pub(super) const VOLUME_FIELDS: FieldSet = FieldSet {
    allows: |field| {
        matches!(
            field,
            FieldRef::Name
                | FieldRef::Namespace
                | FieldRef::Uid
                | FieldRef::Labels
                | FieldRef::Annotations
                | FieldRef::Label(_)
                | FieldRef::Annotation(_)
        )
    },
    names: "metadata.name, metadata.namespace, metadata.uid, metadata.labels, \
            metadata.annotations, metadata.labels['KEY'], metadata.annotations['KEY']",
};

/// Some of the fields of a pod.
#[derive(Clone, Copy)]
pub(super) struct FieldSet {
    allows: fn(&FieldRef) -> bool,
    names: &'static str,
}

pub(super) fn read_field_ref(
    view: &View<'_>,
    fields: FieldSet,
    problems: &mut Problems,
) -> Option<FieldRef> {
    if !view.is_object(problems) {
        return None;
    }
    let version = view.get("apiVersion");
    if let Some(text) = version.text(problems).filter(|text| *text != "v1" && !text.is_empty()) {
        version.invalid(text, "must be v1", problems);
    }
    let path = view.get("fieldPath");
    let text = path.required_text(problems)?;
    let field = field_ref(text).filter(fields.allows);
    if field.is_none() {
        path.invalid(text, format!("must be one of: {}", fields.names), problems);
    }
    field
}

/// The field of this path.
fn field_ref(path: &str) -> Option<FieldRef> {
    let key = |prefix| {
        let key = path.strip_prefix(prefix)?.strip_suffix("']")?;
        names::qualified(key).ok().map(|()| key.to_owned())
    };
    match path {
        "metadata.name" => Some(FieldRef::Name),
        "metadata.namespace" => Some(FieldRef::Namespace),
        "metadata.uid" => Some(FieldRef::Uid),
        "metadata.labels" => Some(FieldRef::Labels),
        "metadata.annotations" => Some(FieldRef::Annotations),
        "spec.nodeName" => Some(FieldRef::NodeName),
        "spec.serviceAccountName" => Some(FieldRef::ServiceAccountName),
        "status.hostIP" => Some(FieldRef::HostIp),
        "status.hostIPs" => Some(FieldRef::HostIps),
        "status.podIP" => Some(FieldRef::PodIp),
        "status.podIPs" => Some(FieldRef::PodIps),
        _ => key("metadata.labels['")
            .map(FieldRef::Label)
            .or_else(|| key("metadata.annotations['").map(FieldRef::Annotation)),
    }
}

/// A resource of a container: of `default` unless it names another. Without a default it must.
pub(super) fn read_resource_ref(
    view: &View<'_>,
    default: Option<&str>,
    problems: &mut Problems,
) -> Option<ResourceFieldRef> {
    if !view.is_object(problems) {
        return None;
    }
    let name_view = view.get("containerName");
    let name = match default {
        Some(_) => name_view.text(problems).filter(|name| !name.is_empty()),
        None => name_view.required_text(problems),
    };
    let resource_view = view.get("resource");
    resource_view.require(problems);
    let resource = resource_view.one_of(
        &[
            ("limits.cpu", ResourceField::LimitsCpu),
            ("limits.memory", ResourceField::LimitsMemory),
            ("requests.cpu", ResourceField::RequestsCpu),
            ("requests.memory", ResourceField::RequestsMemory),
        ],
        problems,
    )?;
    let divisor = read_divisor(&view.get("divisor"), resource, problems)?;
    Some(ResourceFieldRef { container: name.or(default)?.to_owned(), resource, divisor })
}

/// The unit, in thousandths of a CPU or in bytes. Kubernetes allows these values, and 0 for 1.
fn read_divisor(view: &View<'_>, resource: ResourceField, problems: &mut Problems) -> Option<u64> {
    const MEMORY: &[&str] =
        &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let is_cpu = matches!(resource, ResourceField::LimitsCpu | ResourceField::RequestsCpu);
    let one = if is_cpu { 1000 } else { 1 };
    if !view.is_present() {
        return Some(one);
    }
    let (quantity, text) = view.quantity(problems)?;
    let allowed: &[&str] = if is_cpu { &["1", "1m"] } else { MEMORY };
    if text == "0" {
        Some(one)
    } else if !allowed.contains(&text.as_str()) {
        let reason = format!("must be one of: {}", allowed.join(", "));
        view.problem(ProblemKind::Invalid { value: text, reason }, problems);
        None
    } else {
        Some(if is_cpu { quantity.millis() } else { quantity.units() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_paths_are_those_of_the_downward_api() {
        assert_eq!(field_ref("metadata.name"), Some(FieldRef::Name));
        assert_eq!(
            field_ref("metadata.labels['app.kubernetes.io/name']"),
            Some(FieldRef::Label("app.kubernetes.io/name".into()))
        );
        assert_eq!(field_ref("metadata.annotations['a']"), Some(FieldRef::Annotation("a".into())));
        for path in
            ["", "metadata", "metadata.label", "metadata.labels['']", "metadata.labels['a", "spec"]
        {
            assert_eq!(field_ref(path), None, "{path}");
        }
    }
}

//! Reads the environment of a container. Its values are found at every start: [`crate::oci`].

use super::names;
use super::pod::check;
use super::problem::{ProblemKind, Problems};
use super::view::View;
use crate::types::{EnvValue, EnvVar, FieldRef, ResourceField, ResourceFieldRef};

/// All variables of the container of this name, in their order.
pub(super) fn read_all(view: &View<'_>, container: &str, problems: &mut Problems) -> Vec<EnvVar> {
    let views = view.objects(problems);
    views.iter().map(|view| read(view, container, problems)).collect()
}

fn read(view: &View<'_>, container: &str, problems: &mut Problems) -> EnvVar {
    let name_view = view.get("name");
    let name = name_view.required_text(problems).unwrap_or_default();
    check(&name_view, name, names::variable, problems);
    let value = view.get("value");
    let text = value.text(problems).unwrap_or_default();
    if text.contains('\0') {
        value.invalid(text, "must not contain a NUL byte", problems);
    }
    let from = view.get("valueFrom");
    let source = if from.is_present() && from.is_object(problems) {
        if !text.is_empty() {
            from.invalid(name, "has a value already", problems);
        }
        read_source(&from, name, container, problems)
    } else {
        None
    };
    let value = source.unwrap_or_else(|| EnvValue::Literal(text.into()));
    EnvVar { name: name.into(), value }
}

fn read_source(
    from: &View<'_>,
    name: &str,
    container: &str,
    problems: &mut Problems,
) -> Option<EnvValue> {
    let field = from.get("fieldRef");
    let resource = from.get("resourceFieldRef");
    match (field.is_present(), resource.is_present()) {
        (true, true) => {
            from.invalid(name, "must have one source, not two", problems);
            None
        }
        (true, false) => read_field_ref(&field, problems).map(EnvValue::Field),
        (false, true) => read_resource_ref(&resource, container, problems).map(EnvValue::Resource),
        // Other sources are not supported, which has been said.
        (false, false) => {
            if !from.has_other_fields(&[]) {
                from.invalid(name, "has no source", problems);
            }
            None
        }
    }
}

fn read_field_ref(view: &View<'_>, problems: &mut Problems) -> Option<FieldRef> {
    if !view.is_object(problems) {
        return None;
    }
    let version = view.get("apiVersion");
    if let Some(text) = version.text(problems).filter(|text| *text != "v1" && !text.is_empty()) {
        version.invalid(text, "must be v1", problems);
    }
    let path = view.get("fieldPath");
    let text = path.required_text(problems)?;
    let field = field_ref(text);
    if field.is_none() {
        path.invalid(
            text,
            "must be one of: metadata.name, metadata.namespace, metadata.uid, \
             metadata.labels['KEY'], metadata.annotations['KEY'], spec.nodeName, \
             spec.serviceAccountName, status.hostIP, status.hostIPs, status.podIP, status.podIPs",
            problems,
        );
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

fn read_resource_ref(
    view: &View<'_>,
    container: &str,
    problems: &mut Problems,
) -> Option<ResourceFieldRef> {
    if !view.is_object(problems) {
        return None;
    }
    let name = view.get("containerName").text(problems).filter(|name| !name.is_empty());
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
    Some(ResourceFieldRef { container: name.unwrap_or(container).to_owned(), resource, divisor })
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
            ["", "metadata", "metadata.labels", "metadata.labels['']", "metadata.labels['a", "spec"]
        {
            assert_eq!(field_ref(path), None, "{path}");
        }
    }
}

//! The downward API: what a container is told of its own pod, as the kubelet words it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::types::{FieldRef, PodMetadata, PodSpec, ResourceField, ResourceFieldRef, Resources};

/// A field of the metadata of a pod with this `uid`, given or made; `None` if the field is another
/// one.
pub(crate) fn metadata_field(
    field: &FieldRef,
    metadata: &PodMetadata,
    uid: &str,
) -> Option<String> {
    let of_map = |map: &BTreeMap<String, String>, key: &str| map.get(key).cloned();
    match field {
        FieldRef::Name => Some(metadata.name.clone()),
        FieldRef::Namespace => Some(metadata.namespace.clone()),
        FieldRef::Uid => Some(uid.to_owned()),
        FieldRef::Label(key) => Some(of_map(&metadata.labels, key).unwrap_or_default()),
        FieldRef::Annotation(key) => Some(of_map(&metadata.annotations, key).unwrap_or_default()),
        FieldRef::Labels => Some(format_map(&metadata.labels)),
        FieldRef::Annotations => Some(format_map(&metadata.annotations)),
        FieldRef::NodeName
        | FieldRef::ServiceAccountName
        | FieldRef::HostIp
        | FieldRef::HostIps
        | FieldRef::PodIp
        | FieldRef::PodIps => None,
    }
}

/// The amount in units of the divisor, rounded up; `None` if the pod has no such container.
pub(crate) fn resource(reference: &ResourceFieldRef, pod: &PodSpec) -> Option<String> {
    let ResourceFieldRef { container, resource, divisor } = reference;
    let Resources { requests, limits } = &pod.container(container)?.resources;
    let vm_cpu = u64::from(pod.vm.vcpus).saturating_mul(1000);
    let vm_memory = u64::from(pod.vm.memory_mib).saturating_mul(1024 * 1024);
    let amount = match resource {
        ResourceField::LimitsCpu => limits.cpu_millis.unwrap_or(vm_cpu),
        ResourceField::LimitsMemory => limits.memory.unwrap_or(vm_memory),
        ResourceField::RequestsCpu => requests.cpu_millis.unwrap_or(0),
        ResourceField::RequestsMemory => requests.memory.unwrap_or(0),
    };
    Some(amount.div_ceil((*divisor).max(1)).to_string())
}

/// Lines `KEY="VALUE"`, the last without its end: `k8s.io/kubernetes/pkg/fieldpath.FormatMap`.
fn format_map(map: &BTreeMap<String, String>) -> String {
    let lines: Vec<String> =
        map.iter().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    lines.join("\n")
}

/// A text in quotes, with escapes as Go's `%q` makes them.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{b}' => quoted.push_str("\\v"),
            ' ' => quoted.push(c),
            c if !c.is_control() && !c.is_whitespace() => quoted.push(c),
            // Writing to a String cannot fail.
            c if c.is_ascii() => drop(write!(quoted, "\\x{:02x}", u32::from(c))),
            c => drop(write!(quoted, "\\u{:04x}", u32::from(c))),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_lines_of_quoted_values_in_the_order_of_their_keys() {
        let map = [("b", "x \"y\"\n\u{1}\u{e4}\u{a0}\\"), ("a", "1")];
        let map = map.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        assert_eq!(format_map(&map), "a=\"1\"\nb=\"x \\\"y\\\"\\n\\x01\u{e4}\\u00a0\\\\\"");
        assert_eq!(format_map(&BTreeMap::new()), "");
    }
}

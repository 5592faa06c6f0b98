//! Reads the Pod itself: metadata and what its containers share.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::fields::POD;
use super::objects::{ObjectKey, Objects, Scope};
use super::problem::Problems;
use super::tree::Node;
use super::view::View;
use super::{container, device, dns, names, schema, security, volume};
use crate::sizing::{SizeError, vm_size};
use crate::types::{
    ContainerKind, ContainerSpec, Network, PodMetadata, PodSpec, RestartPolicy, VmSize,
};

/// What Kubernetes takes for `terminationGracePeriodSeconds` if there is none.
const DEFAULT_GRACE_S: u64 = 30;

/// Most bytes of all annotations together, as in Kubernetes.
const MAX_ANNOTATIONS_LEN: usize = 256 * 1024;

/// Reads one document. `None` if anything in it is wrong; then that has been noted.
pub(super) fn read(document: &Node, objects: &Objects, problems: &mut Problems) -> Option<PodSpec> {
    read_noting(document, objects, &RefCell::default(), problems)
}

/// The same, and notes what objects it refers to.
pub(super) fn read_noting(
    document: &Node,
    objects: &Objects,
    wanted: &RefCell<BTreeSet<ObjectKey>>,
    problems: &mut Problems,
) -> Option<PodSpec> {
    let mut own = problems.fork();
    let pod = read_document(&View::root(document), document, (objects, wanted), &mut own);
    let fine = own.is_empty();
    problems.append(own);
    pod.filter(|_| fine)
}

/// The namespace and the name of a document that says that it is a Pod, which is noted if it does
/// not.
pub(super) fn who<'n>(document: &'n Node, problems: &mut Problems) -> Option<(&'n str, &'n str)> {
    let root = View::root(document);
    if !root.is_object(problems) || !is_pod(&root, problems) {
        return None;
    }
    let (name, namespace) = read_object_name(&root.get("metadata"), problems);
    Some((namespace, name))
}

fn read_document(
    root: &View<'_>,
    document: &Node,
    (objects, wanted): (&Objects, &RefCell<BTreeSet<ObjectKey>>),
    problems: &mut Problems,
) -> Option<PodSpec> {
    if !root.is_object(problems) || !is_pod(root, problems) {
        return None;
    }
    schema::check(document, "", POD, problems);
    let metadata = read_metadata(&root.get("metadata"), problems);
    let spec = root.get("spec");
    spec.require(problems);
    if !spec.is_present() || !spec.is_object(problems) {
        return None;
    }
    let scope = Scope { objects, namespace: &metadata.namespace, wanted };
    let volumes_view = spec.get("volumes");
    let volumes = volume::read_all(&volumes_view, scope, &metadata, problems);
    let pod_security = security::PodSecurity::read(&spec.get("securityContext"), problems);
    let grace_s = spec
        .get("terminationGracePeriodSeconds")
        .integer(0..=i32::MAX.into(), problems)
        .unwrap_or(DEFAULT_GRACE_S);
    let shared = container::Shared { volumes: &volumes, security: &pod_security, scope, grace_s };

    let mut containers = Vec::new();
    let init_views = spec.get("initContainers").objects(problems);
    let main_views = spec.get("containers").objects(problems);
    let containers_view = spec.get("containers");
    containers_view.require(problems);
    if containers_view.is_empty_list() {
        containers_view.invalid("[]", "must have at least one container", problems);
    }
    let mut seen = BTreeSet::new();
    for (view, is_init) in init_views
        .iter()
        .map(|view| (view, true))
        .chain(main_views.iter().map(|view| (view, false)))
    {
        let container = container::read(view, is_init, &shared, problems);
        if !container.name.is_empty() && !seen.insert(container.name.clone()) {
            view.get("name").invalid(
                &container.name,
                "another container of this pod has this name",
                problems,
            );
        }
        containers.push(container);
    }
    container::check_references(&containers, &init_views, &main_views, problems);
    device::check_uses(&containers, &init_views, &main_views, problems);
    container::check_host_ports(&init_views, &main_views, problems);
    volume::check_references(&volumes_view, &containers, problems);
    let (init_containers, containers): (Vec<_>, Vec<_>) =
        containers.into_iter().partition(|container| container.kind != ContainerKind::Main);
    let vm = if containers.is_empty() {
        None
    } else {
        size(&spec, &init_containers, &containers, problems)
    };

    Some(PodSpec {
        hostname: read_hostname(&spec.get("hostname"), &metadata, problems),
        metadata,
        restart_policy: spec
            .get("restartPolicy")
            .one_of(
                &[
                    ("Always", RestartPolicy::Always),
                    ("OnFailure", RestartPolicy::OnFailure),
                    ("Never", RestartPolicy::Never),
                ],
                problems,
            )
            .unwrap_or_default(),
        termination_grace_s: grace_s,
        active_deadline_s: spec.get("activeDeadlineSeconds").integer(1..=i32::MAX.into(), problems),
        init_containers,
        containers,
        volumes,
        vm: vm?,
        fs_group: pod_security.fs_group,
        supplemental_groups: pod_security.supplemental_groups,
        sysctls: pod_security.sysctls,
        service_account: read_service_account(&spec, problems),
        network: Network::Loopback,
        dns: dns::read(&spec, problems),
        host_aliases: dns::read_host_aliases(&spec.get("hostAliases"), problems),
    })
}

/// Whether it says that it is a v1 Pod. If not, nothing else in it is worth a message.
fn is_pod(root: &View<'_>, problems: &mut Problems) -> bool {
    let mut is = |field, expected: &str, others: &str| {
        let view = root.get(field);
        let text = view.required_text(problems);
        let reason = format!("must be {expected}{others}: husk runs Pods");
        if let Some(text) = text.filter(|text| *text != expected) {
            view.invalid(text, reason, problems);
        }
        text == Some(expected)
    };
    let kind = is("kind", "Pod", ", ConfigMap or Secret");
    is("apiVersion", "v1", "") && kind
}

fn read_metadata(view: &View<'_>, problems: &mut Problems) -> PodMetadata {
    let fine = view.is_object(problems);
    if !fine {
        return PodMetadata::default();
    }
    let (text, namespace_text) = read_object_name(view, problems);
    let uid = view.get("uid");
    let uid_text = uid.text(problems);
    if let Some(text) = uid_text {
        let rule = |text: &str| {
            let fine = !text.is_empty() && text.len() <= 128 && !text.contains(char::is_control);
            fine.then_some(()).ok_or("must be 1 to 128 bytes without control characters")
        };
        check(&uid, text, rule, problems);
    }
    let labels = read_map(&view.get("labels"), Some(names::label_value), problems);
    let annotations = read_map(&view.get("annotations"), None, problems);
    let len: usize = annotations.iter().map(|(k, v)| k.len().saturating_add(v.len())).sum();
    if len > MAX_ANNOTATIONS_LEN {
        let reason = format!("must have at most {MAX_ANNOTATIONS_LEN} bytes together");
        view.get("annotations").invalid(format!("{len} bytes"), reason, problems);
    }
    PodMetadata {
        name: text.into(),
        namespace: namespace_text.into(),
        uid: uid_text.map(str::to_owned),
        labels,
        annotations,
    }
}

/// The name and the namespace of an object with this metadata.
pub(super) fn read_object_name<'n>(view: &View<'n>, problems: &mut Problems) -> (&'n str, &'n str) {
    let name = view.get("name");
    let text = name.required_text(problems).unwrap_or_default();
    check(&name, text, names::subdomain, problems);
    let namespace = view.get("namespace");
    let namespace_text = namespace.text(problems).unwrap_or("default");
    check(&namespace, namespace_text, names::label, problems);
    (text, namespace_text)
}

/// A rule of [`names`].
pub(super) type Rule = fn(&str) -> Result<(), &'static str>;

/// Notes if `text`, the value of `view`, breaks a rule. An empty text is a matter of its own.
pub(super) fn check(view: &View<'_>, text: &str, rule: Rule, problems: &mut Problems) {
    if view.is_present()
        && let Err(reason) = rule(text)
        && !text.is_empty()
    {
        view.invalid(text, reason, problems);
    }
}

/// Labels or annotations.
fn read_map(
    view: &View<'_>,
    value_rule: Option<Rule>,
    problems: &mut Problems,
) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    for (key, value) in view.entries(problems) {
        if let Err(reason) = names::qualified(key) {
            value.invalid(key, reason, problems);
        }
        if !value.is_present() {
            map.insert(key.to_owned(), String::new());
        } else if let Some(text) = value.text(problems) {
            if let Some(rule) = value_rule {
                check(&value, text, rule, problems);
            }
            map.insert(key.to_owned(), text.to_owned());
        }
    }
    map
}

fn read_hostname(view: &View<'_>, metadata: &PodMetadata, problems: &mut Problems) -> String {
    match view.text(problems) {
        Some(text) if !text.is_empty() => {
            check(view, text, names::label, problems);
            text.to_owned()
        }
        _ => names::hostname_of(&metadata.name),
    }
}

/// `serviceAccountName`, or its old name; if both are there, they must agree.
fn read_service_account(spec: &View<'_>, problems: &mut Problems) -> String {
    let (view, old) = (spec.get("serviceAccountName"), spec.get("serviceAccount"));
    let name = view.text(problems).filter(|text| !text.is_empty());
    let old_name = old.text(problems).filter(|text| !text.is_empty());
    if let (Some(name), Some(old_name)) = (name, old_name)
        && name != old_name
    {
        old.invalid(old_name, format!("must be as serviceAccountName, {name}"), problems);
    }
    let chosen = name.or(old_name).unwrap_or("default");
    check(if name.is_some() { &view } else { &old }, chosen, names::subdomain, problems);
    chosen.to_owned()
}

/// The size of the VM; `None` if there is none for these limits, which is noted at the limit, or
/// at the containers if it is their sum.
fn size(
    spec: &View<'_>,
    init_containers: &[ContainerSpec],
    containers: &[ContainerSpec],
    problems: &mut Problems,
) -> Option<VmSize> {
    let error = match vm_size(init_containers, containers) {
        Ok(size) => return Some(size),
        Err(error) => error,
    };
    let (resource, amount) = match error {
        SizeError::MemoryTooSmall { memory } | SizeError::MemoryTooLarge { memory } => {
            ("memory", show_memory(memory))
        }
        SizeError::TooManyCpus { cpu_millis } => ("cpu", show_cpu(cpu_millis)),
    };
    let all = spec.get("containers");
    let only_one = init_containers.is_empty() && containers.len() == 1;
    if only_one && let Some(container) = all.objects(&mut problems.fork()).first() {
        let resources = container.get("resources");
        let limit = resources.get("limits").get(resource);
        let field =
            if limit.is_present() { limit } else { resources.get("requests").get(resource) };
        field.invalid(amount, error.to_string(), problems);
    } else {
        let field = all.renamed(format!("{}[*].resources.limits.{resource}", all.path()));
        field.invalid(format!("{amount} in total"), error.to_string(), problems);
    }
    None
}

/// Bytes as a quantity.
pub(super) fn show_memory(bytes: u64) -> String {
    for (shift, suffix) in [(30, "Gi"), (20, "Mi"), (10, "Ki")] {
        if bytes.trailing_zeros() >= shift && bytes > 0 {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Thousandths of a CPU as a quantity.
pub(super) fn show_cpu(millis: u64) -> String {
    if millis.is_multiple_of(1000) { (millis / 1000).to_string() } else { format!("{millis}m") }
}

//! Reads one container.

use std::collections::BTreeSet;
use std::net::IpAddr;

use husk_image::{Reference, ReferenceError};

use super::objects::Scope;
use super::pod::{check, show_cpu, show_memory};
use super::problem::Problems;
use super::view::View;
use super::{device, dns, env, mount, names, probe, security};
use crate::types::{
    Amounts, ContainerKind, ContainerPort, ContainerSpec, Protocol, PullPolicy, Resources, Rootfs,
    TerminationMessage, VolumeSpec,
};

/// What the containers of a pod share.
pub(super) struct Shared<'a> {
    pub(super) volumes: &'a [VolumeSpec],
    pub(super) security: &'a security::PodSecurity,
    pub(super) scope: Scope<'a>,
    /// The pod's grace period in seconds.
    pub(super) grace_s: u64,
}

/// Reads a container, of `spec.initContainers` if `is_init`. What is wrong is noted, and something
/// harmless put in its place.
pub(super) fn read(
    view: &View<'_>,
    is_init: bool,
    shared: &Shared<'_>,
    problems: &mut Problems,
) -> ContainerSpec {
    let name_view = view.get("name");
    let name = name_view.required_text(problems).unwrap_or_default();
    check(&name_view, name, names::label, problems);
    // Any other policy of a single container has been refused by the table.
    let restarts = view.get("restartPolicy").is_present();
    let kind = match (is_init, restarts) {
        (true, true) => ContainerKind::Sidecar,
        (true, false) => ContainerKind::Init,
        (false, _) => ContainerKind::Main,
    };
    let working_dir_view = view.get("workingDir");
    let working_dir = working_dir_view.text(problems).filter(|text| !text.is_empty());
    check(&working_dir_view, working_dir.unwrap_or_default(), names::absolute_path, problems);
    let ports = read_ports(&view.get("ports"), problems);
    let probes = probe::read_all(view, kind, &ports, problems);
    let lifecycle =
        probe::read_lifecycle(&view.get("lifecycle"), kind, &ports, shared.grace_s, problems);
    let security = security::read(&view.get("securityContext"), shared.security, problems);
    let mut flag = |name| view.get(name).boolean(problems).unwrap_or_default();
    let (tty, stdin, stdin_once) = (flag("tty"), flag("stdin"), flag("stdinOnce"));
    ContainerSpec {
        name: name.into(),
        kind,
        rootfs: read_rootfs(view, problems),
        command: read_arguments(&view.get("command"), problems),
        args: read_arguments(&view.get("args"), problems),
        env: env::read_all(view, name, shared.scope, problems),
        working_dir: working_dir.map(str::to_owned),
        ports,
        resources: read_resources(&view.get("resources"), problems),
        volume_mounts: mount::read_all(
            &view.get("volumeMounts"),
            shared.volumes,
            security.privileged,
            problems,
        ),
        volume_devices: device::read_all(&view.get("volumeDevices"), shared.volumes, problems),
        security,
        tty,
        stdin,
        stdin_once,
        probes,
        lifecycle,
        termination_message: read_termination_message(view, problems),
    }
}

fn read_termination_message(view: &View<'_>, problems: &mut Problems) -> TerminationMessage {
    let mut message = TerminationMessage::default();
    let path = view.get("terminationMessagePath");
    if let Some(text) = path.text(problems).filter(|text| !text.is_empty()) {
        check(&path, text, names::absolute_path, problems);
        if names::clean_path(text).is_empty() {
            path.invalid(text, "must name a file", problems);
        }
        message.path = names::clean_path(text);
    }
    let policies = [("File", false), ("FallbackToLogsOnError", true)];
    message.fall_back_to_logs =
        view.get("terminationMessagePolicy").one_of(&policies, problems).unwrap_or_default();
    message
}

/// Notes references of one container to another that is not there.
pub(super) fn check_references(
    containers: &[ContainerSpec],
    init_views: &[View<'_>],
    main_views: &[View<'_>],
    problems: &mut Problems,
) {
    for view in init_views.iter().chain(main_views) {
        for variable in view.get("env").objects(&mut problems.fork()) {
            let name = variable.get("valueFrom").get("resourceFieldRef").get("containerName");
            check_container(&name, containers, problems);
        }
    }
}

/// Notes if there is a name in this field, and no container of it.
pub(super) fn check_container(
    name: &View<'_>,
    containers: &[ContainerSpec],
    problems: &mut Problems,
) {
    // A name that is no text has been noted when it was read.
    if let Some(text) = name.text(&mut problems.fork()).filter(|text| !text.is_empty())
        && !containers.iter().any(|container| container.name == text)
    {
        name.invalid(text, "there is no such container in this pod", problems);
    }
}

fn read_rootfs(view: &View<'_>, problems: &mut Problems) -> Rootfs {
    let image = view.get("image");
    let reference = image.required_text(problems).unwrap_or_default();
    let parsed = reference.parse::<Reference>();
    if let Err(error) = &parsed
        && !reference.is_empty()
    {
        let reason = match error {
            ReferenceError::Syntax { text: _, reason } => (*reason).to_owned(),
            ReferenceError::TooLong { .. } => error.to_string(),
            ReferenceError::Digest { text: _, source } => source.to_string(),
        };
        image.invalid(reference, format!("not an image reference: {reason}"), problems);
    }
    let is_latest = parsed.is_ok_and(|reference| reference.tag() == Some("latest"));
    let default = if is_latest { PullPolicy::Always } else { PullPolicy::IfNotPresent };
    let pull_policy = view.get("imagePullPolicy").one_of(
        &[
            ("Always", PullPolicy::Always),
            ("IfNotPresent", PullPolicy::IfNotPresent),
            ("Never", PullPolicy::Never),
        ],
        problems,
    );
    Rootfs::Image { reference: reference.into(), pull_policy: pull_policy.unwrap_or(default) }
}

fn read_arguments(view: &View<'_>, problems: &mut Problems) -> Vec<String> {
    let arguments = view.texts(problems);
    for argument in arguments.iter().filter(|argument| argument.contains('\0')) {
        view.invalid(argument, "must not contain a NUL byte", problems);
    }
    arguments
}

fn read_ports(view: &View<'_>, problems: &mut Problems) -> Vec<ContainerPort> {
    let mut ports = Vec::new();
    let mut seen = BTreeSet::new();
    for view in view.objects(problems) {
        let name_view = view.get("name");
        let name = name_view.text(problems).filter(|name| !name.is_empty());
        if let Some(name) = name {
            check(&name_view, name, names::port, problems);
            if !seen.insert(name) {
                let reason = "another port of this container has this name";
                name_view.invalid(name, reason, problems);
            }
        }
        let port = view.get("containerPort");
        port.require(problems);
        ports.push(ContainerPort {
            name: name.map(str::to_owned),
            port: port.integer(1..=u16::MAX.into(), problems).unwrap_or(1),
            protocol: view
                .get("protocol")
                .one_of(
                    &[("TCP", Protocol::Tcp), ("UDP", Protocol::Udp), ("SCTP", Protocol::Sctp)],
                    problems,
                )
                .unwrap_or_default(),
            host_port: view
                .get("hostPort")
                .integer::<u16>(0..=u16::MAX.into(), problems)
                .filter(|port| *port > 0),
            host_ip: read_host_ip(&view.get("hostIP"), problems),
        });
    }
    ports
}

/// As in Kubernetes, an empty text is none.
fn read_host_ip(view: &View<'_>, problems: &mut Problems) -> Option<IpAddr> {
    let text = view.text(&mut problems.fork()).unwrap_or("-");
    (!text.is_empty()).then(|| dns::read_ip(view, problems)).flatten()
}

/// Notes ports of the host that would lead to two places.
pub(super) fn check_host_ports(
    init_views: &[View<'_>],
    main_views: &[View<'_>],
    problems: &mut Problems,
) {
    let mut seen = BTreeSet::new();
    for container in init_views.iter().chain(main_views) {
        for port in read_ports(&container.get("ports"), &mut problems.fork()) {
            let Some(number) = port.host_port else { continue };
            let protocol = format!("{:?}", port.protocol);
            if !seen.insert((number, protocol, port.host_ip)) {
                let reason = "another port of this pod has this hostPort";
                let view = container.get("ports");
                let view = view.renamed(format!("{}[*].hostPort", view.path()));
                view.invalid(number.to_string(), reason, problems);
            }
        }
    }
}

fn read_resources(view: &View<'_>, problems: &mut Problems) -> Resources {
    if !view.is_object(problems) {
        return Resources::default();
    }
    let (limits_view, requests_view) = (view.get("limits"), view.get("requests"));
    let limits = read_amounts(&limits_view, problems);
    let given = read_amounts(&requests_view, problems);
    let requests = Amounts {
        cpu_millis: given.cpu_millis.or(limits.cpu_millis),
        memory: given.memory.or(limits.memory),
    };
    let mut compare = |name, request: Option<u64>, limit: Option<u64>, show: fn(u64) -> String| {
        if let (Some(request), Some(limit)) = (request, limit)
            && request > limit
        {
            let reason = format!("must be at most the limit, {}", show(limit));
            requests_view.get(name).invalid(show(request), reason, problems);
        }
    };
    compare("cpu", requests.cpu_millis, limits.cpu_millis, show_cpu);
    compare("memory", requests.memory, limits.memory, show_memory);
    Resources { requests, limits }
}

fn read_amounts(view: &View<'_>, problems: &mut Problems) -> Amounts {
    if !view.is_object(problems) {
        return Amounts::default();
    }
    let cpu = view.get("cpu").quantity(problems).map(|(quantity, _)| quantity.millis());
    let memory = view.get("memory").quantity(problems).map(|(quantity, _)| quantity.units());
    Amounts { cpu_millis: cpu.filter(|n| *n > 0), memory: memory.filter(|n| *n > 0) }
}

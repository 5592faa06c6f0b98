//! Whole manifests: what they become, and what is said of those that are refused.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::types::*;

/// A Pod whose `spec` is this YAML (indented by two spaces).
fn pod_with(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n{spec}\n")
}

/// A Pod whose only container has this YAML besides name and image (indented by four spaces).
fn container_with(fields: &str) -> String {
    pod_with(&format!("  containers:\n  - name: main\n    image: localhost/i:1\n{fields}"))
}

fn one(text: &str) -> PodSpec {
    let mut pods = parse(text, "test.yaml").unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(pods.len(), 1);
    pods.remove(0)
}

/// All that is wrong with a manifest, without the places.
fn complaints(text: &str) -> Vec<String> {
    match parse(text, "test.yaml") {
        Err(ManifestError::Invalid(problems)) => {
            problems.list().iter().map(|p| format!("{}: {}", p.path, p.kind)).collect()
        }
        Err(other) => vec![other.to_string()],
        Ok(pods) => panic!("accepted: {pods:?}"),
    }
}

#[track_caller]
fn refused(text: &str, expected: &[&str]) {
    assert_eq!(complaints(text), expected, "{text}");
}

mod apply;
mod checks;
mod device;
mod disk;
mod network;
mod objects;
mod volumes;

#[test]
fn defaults_are_those_of_an_api_server() {
    let pod = one(&container_with(""));
    assert_eq!(pod.metadata.name, "web");
    assert_eq!(pod.metadata.namespace, "default");
    assert_eq!(pod.metadata.uid, None);
    assert_eq!(pod.hostname, "web");
    assert_eq!(pod.restart_policy, RestartPolicy::Always);
    assert_eq!(pod.termination_grace_s, 30);
    assert_eq!(pod.service_account, "default");
    assert_eq!(pod.vm, VmSize { vcpus: 1, memory_mib: 512 });
    assert_eq!(pod.network, Network::Loopback);
    let container = &pod.containers[0];
    assert_eq!(container.kind, ContainerKind::Main);
    let mut security = SecurityContext { allow_privilege_escalation: true, ..Default::default() };
    assert_eq!(container.security, security);
    security.privileged = true;
    let text = container_with("    securityContext: {privileged: true}\n");
    assert_eq!(one(&text).containers[0].security, security);
}

#[test]
fn the_pull_policy_follows_from_the_tag() {
    let digest = format!("i@sha256:{}", "a".repeat(64));
    for (image, expected) in [
        ("nginx", PullPolicy::Always),
        ("nginx:latest", PullPolicy::Always),
        ("localhost:5000/nginx", PullPolicy::Always),
        ("localhost:5000/nginx:1.27", PullPolicy::IfNotPresent),
        ("nginx:1.27", PullPolicy::IfNotPresent),
        (&digest, PullPolicy::IfNotPresent),
    ] {
        let text = pod_with(&format!("  containers: [{{name: a, image: \"{image}\"}}]"));
        let Rootfs::Image { reference, pull_policy } = one(&text).containers[0].rootfs.clone();
        assert_eq!((reference.as_str(), pull_policy), (image, expected));
    }
    let text = container_with("    imagePullPolicy: Never\n");
    let Rootfs::Image { pull_policy, .. } = one(&text).containers[0].rootfs.clone();
    assert_eq!(pull_policy, PullPolicy::Never);
}

#[test]
fn a_full_pod_is_read_completely() {
    let pod = one(include_str!("../../testdata/full-pod.yaml"));
    assert_eq!(pod.metadata.namespace, "shop");
    assert_eq!(pod.metadata.uid.as_deref(), Some("6a7c"));
    assert_eq!(pod.metadata.labels["app"], "web");
    assert_eq!(pod.metadata.annotations["example.com/a"], "x y");
    assert_eq!(pod.hostname, "front");
    assert_eq!(pod.restart_policy, RestartPolicy::OnFailure);
    assert_eq!(pod.termination_grace_s, 5);
    assert_eq!(pod.service_account, "builder");
    assert_eq!(pod.fs_group, Some(2000));
    assert_eq!(pod.supplemental_groups, [4000, 5000]);
    assert_eq!(pod.sysctls["net.core.somaxconn"], "1024");
    assert_eq!(pod.vm, VmSize { vcpus: 2, memory_mib: 192 });
    let kinds: Vec<_> = pod.all_containers().map(|c| (c.name.as_str(), c.kind)).collect();
    let expected = [
        ("setup", ContainerKind::Init),
        ("proxy", ContainerKind::Sidecar),
        ("main", ContainerKind::Main),
    ];
    assert_eq!(kinds, expected);
    let disk = VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: None };
    let memory = VolumeSource::EmptyDir { medium: Medium::Memory, size_limit: Some(16 << 20) };
    assert_eq!(
        pod.volumes,
        [
            VolumeSpec { name: "data".into(), source: disk },
            VolumeSpec { name: "cache".into(), source: memory },
        ]
    );

    let main = pod.container("main").unwrap();
    assert_eq!(main.command, ["sh", "-c"]);
    assert_eq!(main.args, ["echo $(GREETING)", "0x10"]);
    assert_eq!(main.working_dir.as_deref(), Some("/srv"));
    assert!(main.tty && main.stdin && main.stdin_once);
    assert_eq!(
        main.ports,
        [
            ContainerPort {
                name: Some("http".into()),
                port: 80,
                protocol: Protocol::Tcp,
                host_port: None,
                host_ip: None,
            },
            ContainerPort {
                name: None,
                port: 53,
                protocol: Protocol::Udp,
                host_port: None,
                host_ip: None,
            },
        ]
    );
    let limits = Amounts { cpu_millis: Some(1500), memory: Some(128 << 20) };
    let requests = Amounts { cpu_millis: Some(250), memory: Some(128 << 20) };
    assert_eq!(main.resources, Resources { requests, limits });
    assert_eq!(
        main.volume_mounts,
        [
            VolumeMount {
                volume: "data".into(),
                mount_path: "/data".into(),
                read_only: false,
                recursive_read_only: false,
                sub_path: None,
                propagation: MountPropagation::None,
            },
            VolumeMount {
                volume: "cache".into(),
                mount_path: "/var/cache".into(),
                read_only: true,
                recursive_read_only: false,
                sub_path: None,
                propagation: MountPropagation::None,
            },
        ]
    );
    assert_eq!(
        main.security,
        SecurityContext {
            run_as_user: Some(1001),
            run_as_group: Some(3000),
            run_as_non_root: true,
            read_only_root: true,
            privileged: false,
            allow_privilege_escalation: false,
            capabilities: CapabilityChanges {
                add: vec!["NET_BIND_SERVICE".into()],
                drop: vec!["ALL".into()],
            },
            proc_mount: ProcMount::Default,
        }
    );
    assert_eq!(pod.container("setup").unwrap().security.run_as_user, Some(1000));

    let literal = |text: &str| EnvValue::Literal(text.into());
    let resource = |container: &str, resource, divisor| {
        EnvValue::Resource(ResourceFieldRef { container: container.into(), resource, divisor })
    };
    let env: Vec<_> = main.env.iter().map(|var| (var.name.as_str(), var.value.clone())).collect();
    assert_eq!(
        env,
        [
            ("GREETING", literal("hello")),
            ("EMPTY", literal("")),
            ("GREETING", literal("$(GREETING) again")),
            ("NAME", EnvValue::Field(FieldRef::Name)),
            ("APP", EnvValue::Field(FieldRef::Label("app".into()))),
            ("CPUS", resource("main", ResourceField::LimitsCpu, 1000)),
            ("PROXY_MIB", resource("proxy", ResourceField::RequestsMemory, 1 << 20)),
        ]
    );
}

#[test]
fn what_kubectl_prints_of_a_pod_is_accepted() {
    let pod = one(include_str!("../../testdata/kubectl-get.yaml"));
    assert_eq!(pod.metadata.name, "plain");
    assert_eq!(pod.service_account, "default");
}

#[test]
fn every_example_is_accepted() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut count = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = std::fs::read_to_string(&path).unwrap();
            let pods = parse(&text, &path.to_string_lossy());
            assert!(pods.is_ok_and(|pods| !pods.is_empty()), "{}", path.display());
            count += 1;
        }
    }
    assert!(count >= 5, "{count} examples");
}

#[test]
fn json_and_several_documents_are_read() {
    let json = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},
                   "spec":{"containers":[{"name":"c","image":"i"}]}}"#;
    assert_eq!(one(json).metadata.name, "a");
    let two = format!("---\n{json}\n---\n---\n{}", container_with(""));
    let names: Vec<_> =
        parse(&two, "x").unwrap().into_iter().map(|pod| pod.metadata.name).collect();
    assert_eq!(names, ["a", "web"]);
    refused(
        &format!("{}---\n{}", container_with(""), container_with("")),
        &["metadata.name: web: an earlier document is a Pod of this name in this namespace"],
    );
}

#[test]
fn malformed_yaml_is_refused_with_its_place() {
    for (text, place) in [
        ("a: [1, 2\nb: 3\n", "x.yaml:"),
        ("a: 1\n b: 2\n", "x.yaml:2:"),
        ("a: 1\na: 2\n", "x.yaml:2:1: "),
        ("a: *nowhere\n", "x.yaml:1:4: "),
        ("a: \"x\n", "x.yaml:"),
    ] {
        let error = parse(text, "x.yaml").unwrap_err();
        assert!(matches!(error, ManifestError::Yaml { .. }), "{text}: {error}");
        let message = error.to_string();
        assert!(message.starts_with(place) && !message.contains('\n'), "{text}: {message}");
    }
}

#[test]
fn problems_are_all_reported_with_their_places() {
    let text = container_with("    imagee: x\n    restartPolicyRules: [{name: x}]\n");
    let error = parse(&text, "x.yaml").unwrap_err();
    assert_eq!(
        error.to_string(),
        "x.yaml:8:5: spec.containers[0].imagee: unknown field, did you mean image?\n\
         x.yaml:9:5: spec.containers[0].restartPolicyRules: not supported yet"
    );
}

#[test]
fn the_number_of_reported_problems_is_bounded() {
    let fields: String = (0..80).map(|i| format!("    x{i}: 1\n")).collect();
    let error = parse(&container_with(&fields), "x.yaml").unwrap_err();
    let message = error.to_string();
    assert_eq!(message.lines().count(), 51);
    assert!(message.ends_with("\nx.yaml: and 30 more problems"), "{message}");
}

#[test]
fn what_is_no_pod_is_refused() {
    assert!(matches!(parse("", "x"), Err(ManifestError::Empty { .. })));
    assert!(matches!(parse("# nothing\n---\n---\n", "x"), Err(ManifestError::Empty { .. })));
    refused(
        "kind: Deployment\napiVersion: apps/v1\nspec: {x: 1}\n",
        &[
            "kind: Deployment: must be Pod, ConfigMap or Secret: husk runs Pods",
            "apiVersion: apps/v1: must be v1: husk runs Pods",
        ],
    );
    refused("{}", &["kind: required", "apiVersion: required"]);
    refused("- a", &["document: must be a mapping, but is a list"]);
    refused("hello", &["document: must be a mapping, but is the text hello"]);
    refused("kind: Pod\napiVersion: v1\n", &["metadata.name: required", "spec: required"]);
    refused(
        "kind: Pod\napiVersion: v1\nmetadata: {generateName: a-}\nspec: {containers: []}",
        &["metadata.name: required", "spec.containers: []: must have at least one container"],
    );
}

#[test]
fn wrong_types_are_named() {
    refused(
        &pod_with("  containers: {name: a}\n  hostname: 5\n  terminationGracePeriodSeconds: x"),
        &[
            "spec.containers: must be a list, but is a mapping",
            "spec.hostname: must be a text (put it in quotes), but is the number 5",
            "spec.terminationGracePeriodSeconds: must be a whole number, but is the text x",
        ],
    );
    refused(
        &container_with(
            "    env: [{name: A, value: 5432}, {name: B, value: yes}, 7, ~]\n    tty: 1",
        ),
        &[
            "spec.containers[0].env[0].value: must be a text (put it in quotes), but is the number 5432",
            "spec.containers[0].env[1].value: must be a text (put it in quotes), but is the boolean true",
            "spec.containers[0].env[2]: must be a mapping, but is the number 7",
            "spec.containers[0].env[3]: required",
            "spec.containers[0].tty: must be true or false, but is the number 1",
        ],
    );
}

#[test]
fn names_are_checked_and_must_be_unique() {
    let text = pod_with(
        "  initContainers: [{name: a, image: i}]\n  \
         containers: [{name: a, image: i}, {name: B_, image: i}, {image: 'x y'}]\n  \
         volumes: [{name: v, emptyDir: {}}, {name: v, emptyDir: {}}, {name: w}]",
    );
    let label = "must be a DNS label: at most 63 of a-z, 0-9 and '-', beginning and ending with a \
                 letter or a digit";
    refused(
        &text,
        &[
            "spec.containers[0].name: a: another container of this pod has this name",
            &format!("spec.containers[1].name: B_: {label}"),
            "spec.containers[2].name: required",
            "spec.containers[2].image: x y: not an image reference: the repository must be lowercase \
             letters and digits, with single separators",
            "spec.volumes[1].name: v: another volume of this pod has this name",
            "spec.volumes[2]: w: has no source, such as emptyDir: {}",
        ],
    );
    refused(
        "kind: Pod\napiVersion: v1\nmetadata: {name: A, namespace: a.b, labels: {a b: c, d: '-'}}\nspec: {containers: [{name: a, image: i}]}",
        &[
            "metadata.name: A: must be a DNS subdomain name: at most 253 of a-z, 0-9, '-' and '.', every part beginning and ending with a letter or a digit",
            &format!("metadata.namespace: a.b: {label}"),
            "metadata.labels['a b']: a b: must be NAME or PREFIX/NAME: a name of at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit; a prefix that is a DNS subdomain name",
            "metadata.labels['d']: -: must be empty or at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit",
        ],
    );
}

#[test]
fn mounts_are_checked() {
    let text = container_with(
        "    volumeMounts: [{name: x, mountPath: /a}, {name: v, mountPath: a}, \
         {name: v, mountPath: /b/}, {name: v, mountPath: //b}, {name: v, mountPath: /}, \
         {name: v, mountPath: /c/../d}, {name: v, mountPath: /e, subPath: /s}, \
         {name: v, mountPath: /f, subPath: a/../..}, {name: v, mountPath: /g, subPathExpr: s, subPath: t}, \
         {name: v, mountPath: /h, subPathExpr: /$(A)}, \
         {name: v, mountPath: /i, mountPropagation: Bidirectional}, \
         {name: v, mountPath: /j, recursiveReadOnly: Enabled}, \
         {name: v, mountPath: /k, readOnly: true, mountPropagation: HostToContainer, \
         recursiveReadOnly: IfPossible}, {name: v, mountPath: /l, mountPropagation: Both}]\n  \
         volumes: [{name: v, emptyDir: {}}]",
    );
    let at = |i: usize, field: &str| format!("spec.containers[0].volumeMounts[{i}].{field}");
    refused(
        &text,
        &[
            &format!("{}: x: there is no such volume in spec.volumes", at(0, "name")),
            &format!("{}: a: must be an absolute path", at(1, "mountPath")),
            &format!(
                "{}: //b: another volume of this container is mounted there",
                at(3, "mountPath")
            ),
            &format!("{}: /: a volume cannot be the root", at(4, "mountPath")),
            &format!("{}: /c/../d: must not contain '..'", at(5, "mountPath")),
            &format!("{}: /s: must be a relative path", at(6, "subPath")),
            &format!("{}: a/../..: must not contain '..'", at(7, "subPath")),
            &format!("{}: s: there is a subPath as well", at(8, "subPathExpr")),
            &format!("{}: /$(A): must be a relative path", at(9, "subPathExpr")),
            &format!(
                "{}: Bidirectional: only for containers that are privileged",
                at(10, "mountPropagation")
            ),
            &format!("{}: Enabled: only where readOnly is true", at(11, "recursiveReadOnly")),
            &format!(
                "{}: IfPossible: only where mountPropagation is None",
                at(12, "recursiveReadOnly")
            ),
            &format!(
                "{}: Both: must be one of: None, HostToContainer, Bidirectional",
                at(13, "mountPropagation")
            ),
        ],
    );
}

#[test]
fn limits_that_make_no_machine_are_refused() {
    refused(
        &container_with("    resources: {limits: {memory: 8Mi}}"),
        &["spec.containers[0].resources.limits.memory: 8Mi: the guest needs at least 48Mi"],
    );
    refused(
        &container_with("    resources: {limits: {memory: 2Ti, cpu: 65}}"),
        &[
            "spec.containers[0].resources.limits.memory: 2048Gi: a virtual machine has at most 1048576Mi",
        ],
    );
    refused(
        &container_with("    resources: {limits: {cpu: 64.5}}"),
        &["spec.containers[0].resources.limits.cpu: 64500m: a virtual machine has at most 64 CPUs"],
    );
    refused(
        &container_with("    resources: {requests: {cpu: 100}}"),
        &["spec.containers[0].resources.requests.cpu: 100: a virtual machine has at most 64 CPUs"],
    );
    let small = "{resources: {limits: {memory: 16Mi}}, image: i, name: ";
    refused(
        &pod_with(&format!("  containers: [{small}a}}, {small}b}}]")),
        &[
            "spec.containers[*].resources.limits.memory: 32Mi in total: the guest needs at least 48Mi",
        ],
    );
}

#[test]
fn resources_are_checked() {
    let text = container_with(
        "    resources: {limits: {memory: 64mb, cpu: -1, nvidia.com/gpu: 1, memmory: 1}, \
         requests: {hugepages-2Mi: 2Mi, ephemeral-storage: 1Gi}}",
    );
    let at = |field: &str| format!("spec.containers[0].resources.{field}");
    refused(
        &text,
        &[
            &format!(
                "{}: 64mb: not a quantity: a number with an optional suffix (m, k, M, G, T, P, E, Ki, \
             Mi, Gi, Ti, Pi, Ei) or exponent is expected, such as 500m, 64Mi or 1.5",
                at("limits.memory")
            ),
            &format!("{}: -1: must not be negative", at("limits.cpu")),
            &format!("{}: not supported yet", at("limits['nvidia.com/gpu']")),
            &format!("{}: unknown field, did you mean memory?", at("limits.memmory")),
            &format!("{}: not supported yet", at("requests.hugepages-2Mi")),
            &format!("{}: not supported yet", at("requests.ephemeral-storage")),
        ],
    );
    refused(
        &container_with(
            "    resources: {limits: {memory: 64Mi, cpu: 1}, requests: {memory: 1Gi, cpu: 1.5}}",
        ),
        &[
            "spec.containers[0].resources.requests.memory: 1Gi: must be at most the limit, 64Mi",
            "spec.containers[0].resources.requests.cpu: 1500m: must be at most the limit, 1",
        ],
    );
    let zero = one(&container_with("    resources: {limits: {memory: 0, cpu: 0}}"));
    assert_eq!(zero.containers[0].resources, Resources::default());
}

#[test]
fn what_a_microvm_does_not_share_is_refused_with_the_reason() {
    refused(
        &container_with("  hostNetwork: true\n  hostPID: true\n  nodeName: n\n  priority: 5"),
        &[
            "spec.hostNetwork: true: only false is supported: a pod has a kernel of its own, which cannot have the host's interfaces",
            "spec.hostPID: true: only false is supported: a pod never sees the host's processes, it has its VM's",
            "spec.nodeName: not supported yet",
            "spec.priority: 5: only 0 is supported: nothing is scheduled",
        ],
    );
    one(&container_with(
        "  hostNetwork: false\n  nodeSelector: {}\n  hostAliases: []\n  affinity:",
    ));
}

#[test]
fn unsupported_volumes_and_sources_are_named_once() {
    refused(
        &container_with("  volumes: [{name: a, nfs: {server: x}}, {name: b, iscsi: {lun: 0}}]"),
        &["spec.volumes[0].nfs: not supported yet", "spec.volumes[1].iscsi: not supported yet"],
    );
    let text = container_with(
        "    env: [{name: A, valueFrom: {fileKeyRef: {volumeName: s, key: k}}}, {name: B, valueFrom: {}}, \
         {name: C, value: x, valueFrom: {fieldRef: {fieldPath: spec.x}}}, \
         {name: D, valueFrom: {resourceFieldRef: {resource: limits.cpu, containerName: z, divisor: 1Mi}}}, \
         {name: E, valueFrom: {resourceFieldRef: {resource: limits.cpu, containerName: z}}}, {name: F=}]",
    );
    let found = complaints(&text);
    let at = |i: usize, rest: &str| format!("spec.containers[0].env[{i}].{rest}");
    for (message, expected) in found.iter().zip([
        at(0, "valueFrom.fileKeyRef: not supported yet"),
        at(1, "valueFrom: B: has no source"),
        at(2, "valueFrom: C: has a value already"),
        at(2, "valueFrom.fieldRef.fieldPath: spec.x: must be one of: metadata.name, "),
        at(
            3,
            "valueFrom.resourceFieldRef.containerName: z: there is no such container in this pod",
        ),
        at(3, "valueFrom.resourceFieldRef.divisor: 1Mi: must be one of: 1, 1m"),
        at(
            4,
            "valueFrom.resourceFieldRef.containerName: z: there is no such container in this pod",
        ),
        at(5, "name: F=: must be printable ASCII without '='"),
    ]) {
        assert!(message.starts_with(&expected), "{message}\n{expected}");
    }
    assert_eq!(found.len(), 8, "{found:?}");
}

#[test]
fn security_contexts_are_checked() {
    let text = container_with(
        "    securityContext: {runAsUser: -1, runAsGroup: 2147483648, \
         capabilities: {add: [CAP_NET_ADMIN, FLY], drop: [all]}, \
         seccompProfile: {type: RuntimeDefault}, privileged: true, allowPrivilegeEscalation: false}\n  \
         securityContext: {sysctls: [{name: vm.swappiness, value: '1'}]}",
    );
    let at = |field: &str| format!("spec.containers[0].securityContext.{field}");
    refused(
        &text,
        &[
            &format!("{}: -1: must be 0 to 2147483647", at("runAsUser")),
            &format!("{}: 2147483648: must be 0 to 2147483647", at("runAsGroup")),
            &format!(
                "{}: CAP_NET_ADMIN: no such capability, did you mean NET_ADMIN?",
                at("capabilities.add[0]")
            ),
            &format!("{}: FLY: no such capability", at("capabilities.add[1]")),
            &format!("{}: all: no such capability", at("capabilities.drop[0]")),
            &format!(
                "{}: RuntimeDefault: only Unconfined is supported: profiles are not supported yet",
                at("seccompProfile.type")
            ),
            &format!(
                "{}: false: must be true with privileged: true",
                at("allowPrivilegeEscalation")
            ),
            "spec.securityContext.sysctls[0].name: vm.swappiness: not the name of a namespaced sysctl: must be kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* or net.*",
        ],
    );
}

#[test]
fn restart_policies_of_single_containers_make_sidecars_only() {
    refused(
        &pod_with(
            "  initContainers: [{name: a, image: i, restartPolicy: Never}]\n  containers: [{name: b, image: i, restartPolicy: Always}]",
        ),
        &[
            "spec.initContainers[0].restartPolicy: Never: only Always is supported: it makes a sidecar; other policies of single containers are not supported yet",
            "spec.containers[0].restartPolicy: not supported yet",
        ],
    );
}

#[test]
fn bombs_are_bounded() {
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let previous = format!("*a{}, ", i - 1).repeat(10);
        laughs.push_str(&format!("a{i}: &a{i} [{previous}]\n"));
    }
    let deep = "[".repeat(100_000);
    let deep_block: String =
        (0..5000).map(|i| format!("{}a:\n", " ".repeat(i))).take(600).collect();
    let wide = "- 1\n".repeat(600_000);
    let documents = "---\na: 1\n".repeat(10_000);
    for (name, text) in [
        ("laughs", laughs),
        ("deep", deep),
        ("deep_block", deep_block),
        ("wide", wide),
        ("documents", documents),
    ] {
        let error = parse(&text, "x").unwrap_err();
        assert!(matches!(error, ManifestError::Yaml { .. }), "{name}: {error}");
        assert!(error.to_string().len() < 300, "{name}: {error}");
    }
    let long = " ".repeat(MAX_LEN + 1);
    assert!(matches!(parse(&long, "x"), Err(ManifestError::TooLong { len, .. }) if len > MAX_LEN));
    let long_key = format!("{}---\n? {}\n: 1\n", container_with(""), "k".repeat(1_000_000));
    assert!(parse(&long_key, "x").unwrap_err().to_string().len() < 1000);
}

/// YAML that resembles a Pod, with anything at any place.
fn near_pod() -> impl Strategy<Value = String> {
    let names = prop::sample::select(vec![
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        "name",
        "labels",
        "containers",
        "initContainers",
        "volumes",
        "image",
        "env",
        "valueFrom",
        "fieldRef",
        "resources",
        "limits",
        "memory",
        "cpu",
        "emptyDir",
        "sizeLimit",
        "securityContext",
        "capabilities",
        "add",
        "volumeMounts",
        "mountPath",
        "ports",
        "command",
        "x",
        "restartPolicy",
        "runAsUser",
    ]);
    let leaf = prop_oneof![
        Just("~".to_owned()),
        Just("Pod".to_owned()),
        Just("v1".to_owned()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| n.to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        "[a-z0-9./:-]{1,12}",
        "[^\\PC\"\\\\]{0,12}".prop_map(|text| format!("\"{text}\"")),
    ];
    let value = leaf.prop_recursive(6, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(|l| format!("[{}]", l.join(", "))),
            prop::collection::btree_map(names.clone(), inner, 0..6).prop_map(|map| {
                let list: Vec<_> = map.iter().map(|(k, v)| format!("\"{k}\": {v}")).collect();
                format!("{{{}}}", list.join(", "))
            }),
        ]
    });
    (value.clone(), value).prop_map(|(metadata, spec)| {
        format!("{{apiVersion: v1, kind: Pod, metadata: {metadata}, spec: {spec}}}")
    })
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "\\PC{0,200}") {
        let _answer = parse(&text, "x");
    }

    #[test]
    fn any_yaml_like_text_is_answered(text in "[a-c:\\[\\]{}\\-&*!|>'\"# \n,?%~0-9]{0,120}") {
        let _answer = parse(&text, "x");
    }

    #[test]
    fn anything_at_any_place_of_a_pod_is_answered(text in near_pod()) {
        if let Err(error) = parse(&text, "x") {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn a_pod_cut_anywhere_is_answered(cut in 0_usize..3000) {
        let text = include_str!("../../testdata/full-pod.yaml");
        let _answer = parse(text.get(..cut).unwrap_or(text), "x");
    }
}

//! Whole configurations, from manifests and image configurations.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder};
use serde_json::{Value, json};

use super::*;
use crate::manifest;

const POD_IPS: &[IpAddr] = &[
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5)),
];

const CONTEXT: StartContext<'static> = StartContext {
    container_id: "main-0",
    pod_uid: "made-up",
    node_name: "host1",
    host_ips: &[IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))],
    pod_ips: POD_IPS,
};

/// A pod named `web` whose `spec` is this YAML.
fn pod(spec: &str) -> PodSpec {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, labels: {{app: shop}}, \
         annotations: {{note: remark}}}}\nspec: {spec}"
    );
    let mut pods = manifest::parse(&text, "test").unwrap_or_else(|error| panic!("{error}\n{text}"));
    pods.remove(0)
}

/// A pod whose only container, `main`, has these fields.
fn main_with(fields: &str) -> PodSpec {
    pod(&format!("{{containers: [{{name: main, image: i, {fields}}}]}}"))
}

fn image(config: ConfigBuilder) -> ImageConfiguration {
    ImageConfigurationBuilder::default().config(config.build().unwrap()).build().unwrap()
}

/// An image as most are.
fn busybox() -> ImageConfiguration {
    image(ConfigBuilder::default().cmd(vec!["sh".to_owned()]))
}

fn spec_of(pod: &PodSpec, image: &ImageConfiguration) -> Result<Value, SpecError> {
    let container = pod.container("main").unwrap();
    container_spec(pod, container, image, &CONTEXT).map(|spec| serde_json::to_value(spec).unwrap())
}

fn spec(pod: &PodSpec, image: &ImageConfiguration) -> Value {
    spec_of(pod, image).unwrap_or_else(|error| panic!("{error}"))
}

fn set(of: &Value) -> Vec<&str> {
    let mut names: Vec<&str> =
        of.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    names.sort_unstable();
    names
}

/// The message and its causes.
fn message(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", message(source)),
        None => error.to_string(),
    }
}

#[test]
fn a_plain_container_gets_what_containerd_gives() {
    let mut got = spec(&main_with(""), &busybox());
    let capabilities = got["process"]["capabilities"].take();
    let default = [
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ];
    for name in ["bounding", "effective", "permitted"] {
        assert_eq!(set(&capabilities[name]), default, "{name}");
    }
    assert_eq!(set(&capabilities["ambient"]), [""; 0]);
    assert_eq!(set(&capabilities["inheritable"]), [""; 0]);
    let hidden = json!(["nosuid", "noexec", "nodev"]);
    let file = |name: &str| {
        json!({"destination": format!("/etc/{name}"), "type": "bind",
               "source": format!("/run/husk/etc/{name}"), "options": ["rbind", "rprivate", "rw"]})
    };
    assert_eq!(
        got,
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/run/husk/containers/main-0/rootfs", "readonly": false},
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0, "additionalGids": []},
                "args": ["sh"],
                "env": [
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "HOSTNAME=web",
                ],
                "cwd": "/",
                "capabilities": null,
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524_288}],
                "noNewPrivileges": false,
                "oomScoreAdj": 1000,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": hidden},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620",
                             "gid=5"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": hidden},
                {"destination": "/dev/shm", "type": "bind", "source": "/run/husk/shm",
                 "options": ["rbind", "rprivate", "rw", "nosuid", "noexec", "nodev"]},
                file("hostname"),
                file("hosts"),
                file("resolv.conf"),
                {"destination": "/dev/termination-log", "type": "bind",
                 "source": "/run/husk/containers/main-0/termination-log",
                 "options": ["rbind", "rprivate", "rw"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            ],
            "linux": {
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "cpu": {"shares": 2},
                },
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}],
                "maskedPaths": [
                    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                    "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                    "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                    "/sys/devices/virtual/powercap",
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
                ],
            },
        })
    );
}

#[test]
fn command_and_arguments_replace_those_of_the_image() {
    let both = || {
        image(
            ConfigBuilder::default()
                .entrypoint(vec!["/entry".to_owned(), "e".to_owned()])
                .cmd(vec!["c".to_owned()]),
        )
    };
    for (fields, expected) in [
        ("", json!(["/entry", "e", "c"])),
        ("args: [a]", json!(["/entry", "e", "a"])),
        ("command: [/cmd]", json!(["/cmd"])),
        ("command: [/cmd], args: [a, b]", json!(["/cmd", "a", "b"])),
        (
            "env: [{name: A, value: x}], command: ['$(A)', '$$(A)', '$(PATH)']",
            json!(["x", "$(A)", "$(PATH)"]),
        ),
    ] {
        assert_eq!(spec(&main_with(fields), &both())["process"]["args"], expected, "{fields}");
    }
    let none = image(ConfigBuilder::default());
    assert!(matches!(spec_of(&main_with(""), &none), Err(SpecError::NoCommand)));
    assert!(matches!(spec_of(&main_with("command: ['']"), &none), Err(SpecError::NoCommand)));
    assert_eq!(spec(&main_with("args: [a]"), &none)["process"]["args"], json!(["a"]));
}

#[test]
fn the_environment_is_merged_and_expanded_in_order() {
    let image =
        image(ConfigBuilder::default().cmd(vec!["x".to_owned()]).env(
            ["PATH=/img", "LANG=C", "A=image", "novalue", "EQ=a=b"].map(String::from).to_vec(),
        ));
    let pod = main_with(
        "tty: true, env: [{name: A, value: '1'}, {name: B, value: '$(A)$(LATER)$(LANG)'}, \
         {name: A, value: '$(A)2'}, {name: LATER, value: '$(B)'}, {name: HOSTNAME, value: h}, \
         {name: SELF, value: '$(SELF)'}]",
    );
    assert_eq!(
        spec(&pod, &image)["process"]["env"],
        json!([
            "PATH=/img",
            "TERM=xterm",
            "HOSTNAME=h",
            "LANG=C",
            "A=12",
            "EQ=a=b",
            "B=1$(LATER)$(LANG)",
            "LATER=1$(LATER)$(LANG)",
            "SELF=$(SELF)",
        ])
    );
}

#[test]
fn fields_and_resources_are_resolved_at_the_start() {
    let field = |name: &str, path: &str| {
        format!("{{name: {name}, valueFrom: {{fieldRef: {{fieldPath: \"{path}\"}}}}}}")
    };
    let resource = |name: &str, what: &str| {
        format!("{{name: {name}, valueFrom: {{resourceFieldRef: {{{what}}}}}}}")
    };
    let env = [
        field("NAME", "metadata.name"),
        field("NAMESPACE", "metadata.namespace"),
        field("UID", "metadata.uid"),
        field("APP", "metadata.labels['app']"),
        field("NONE", "metadata.labels['none']"),
        field("NOTE", "metadata.annotations['note']"),
        field("NODE", "spec.nodeName"),
        field("SA", "spec.serviceAccountName"),
        field("IP", "status.podIP"),
        field("IPS", "status.podIPs"),
        field("HOST", "status.hostIP"),
        field("HOSTS", "status.hostIPs"),
        "{name: URL, value: 'http://$(IP)/'}".to_owned(),
        resource("CPU", "resource: limits.cpu"),
        resource("MILLIS", "resource: limits.cpu, divisor: 1m"),
        resource("MIB", "resource: limits.memory, divisor: 1Mi"),
        resource("MB", "resource: limits.memory, divisor: 1M"),
        resource("REQUEST", "resource: requests.cpu, divisor: 1m"),
        resource("FREE_CPU", "resource: limits.cpu, containerName: free"),
        resource("FREE_MEMORY", "resource: limits.memory, containerName: free"),
        resource("FREE_REQUEST", "resource: requests.memory, containerName: free"),
    ];
    let pod = pod(&format!(
        "{{containers: [{{name: free, image: i}}, {{name: main, image: i, \
         resources: {{limits: {{cpu: 1500m, memory: 100Mi}}}}, env: [{}]}}]}}",
        env.join(", ")
    ));
    let got = spec(&pod, &busybox());
    let got: Vec<_> =
        got["process"]["env"].as_array().unwrap().iter().map(|e| e.as_str().unwrap()).collect();
    assert_eq!(
        got[2..],
        [
            "NAME=web",
            "NAMESPACE=default",
            "UID=made-up",
            "APP=shop",
            "NONE=",
            "NOTE=remark",
            "NODE=host1",
            "SA=default",
            "IP=10.0.0.5",
            "IPS=10.0.0.5,fd00::5",
            "HOST=192.0.2.1",
            "HOSTS=192.0.2.1",
            "URL=http://10.0.0.5/",
            "CPU=2",
            "MILLIS=1500",
            "MIB=100",
            "MB=105",
            "REQUEST=1500",
            "FREE_CPU=2",
            "FREE_MEMORY=536870912",
            "FREE_REQUEST=0",
        ]
    );
    let nowhere = StartContext { pod_ips: &[], ..CONTEXT };
    let error =
        container_spec(&pod, pod.container("main").unwrap(), &busybox(), &nowhere).unwrap_err();
    assert_eq!(
        message(&error),
        "cannot make the environment: IP: status.podIP is not known: the pod has no address"
    );
}

#[test]
fn variables_that_double_each_other_are_bounded() {
    let double = |i: u32| format!("{{name: A{}, value: '$(A{i})$(A{i})'}}", i + 1);
    let doubling: Vec<_> = (0..40).map(double).collect();
    let pod = main_with(&format!("env: [{{name: A0, value: xx}}, {}]", doubling.join(", ")));
    let error = spec_of(&pod, &busybox()).unwrap_err();
    assert!(
        matches!(error, SpecError::Env(EnvError::TooLong { ref name }) if name == "A16"),
        "{error:?}"
    );

    let many = (0..100).map(|i| format!("{{name: B{i}, value: '$(A)'}}")).collect::<Vec<_>>();
    let long = "x".repeat(100_000);
    let pod = main_with(&format!("env: [{{name: A, value: {long}}}, {}]", many.join(", ")));
    assert!(matches!(spec_of(&pod, &busybox()), Err(SpecError::Env(EnvError::TooMuch))));
    let args = vec!["$(A)"; 100].join(", ");
    let pod = main_with(&format!("env: [{{name: A, value: {long}}}], args: [{args}]"));
    assert!(matches!(spec_of(&pod, &busybox()), Err(SpecError::Env(EnvError::TooMuch))));
}

#[test]
fn the_working_directory_is_the_containers_or_the_images() {
    for (fields, of_image, expected) in [
        ("", None, "/"),
        ("", Some(""), "/"),
        ("", Some("/srv"), "/srv"),
        ("", Some("srv"), "/srv"),
        ("workingDir: /w", Some("/srv"), "/w"),
    ] {
        let mut config = ConfigBuilder::default().cmd(vec!["x".to_owned()]);
        if let Some(dir) = of_image {
            config = config.working_dir(dir);
        }
        let got = spec(&main_with(fields), &image(config));
        assert_eq!(got["process"]["cwd"], expected, "{fields} {of_image:?}");
    }
}

fn user_of(security: &str, image_user: &str) -> Result<Value, SpecError> {
    let image = image(ConfigBuilder::default().cmd(vec!["x".to_owned()]).user(image_user));
    let pod = main_with(&format!("securityContext: {{{security}}}"));
    spec_of(&pod, &image).map(|mut spec| {
        let mut user = spec["process"]["user"].take();
        user.as_object_mut().unwrap().remove("additionalGids");
        user
    })
}

#[test]
fn users_come_from_the_pod_or_the_image() {
    for (security, image_user, uid, gid, username) in [
        ("", "", 0, 0, None),
        ("", "www-data", 0, 0, Some("www-data")),
        ("", "www-data:www", 0, 0, Some("www-data:www")),
        ("", "101", 101, 0, Some("101")),
        ("", "101:102", 101, 102, Some("101:102")),
        ("", "www:102", 0, 102, Some("www:102")),
        ("runAsUser: 7", "www:102", 7, 0, Some("7")),
        ("runAsUser: 7", "not a user", 7, 0, Some("7")),
        ("runAsUser: 7, runAsGroup: 8", "www", 7, 8, Some("7:8")),
        ("runAsUser: 0", "www", 0, 0, Some("0")),
        ("runAsGroup: 8", "www:w", 0, 8, Some("www:8")),
        ("runAsGroup: 8", "", 0, 8, None),
        ("runAsNonRoot: true, runAsUser: 7", "root", 7, 0, Some("7")),
        ("runAsNonRoot: true", "7", 7, 0, Some("7")),
    ] {
        let mut expected = json!({"uid": uid, "gid": gid});
        if let Some(username) = username {
            expected["username"] = username.into();
        }
        assert_eq!(user_of(security, image_user).unwrap(), expected, "{security} {image_user}");
    }
}

#[test]
fn root_is_refused_where_it_may_not_be() {
    let refused = |security, image_user| match user_of(security, image_user) {
        Err(SpecError::User(error)) => error,
        other => panic!("{security} {image_user}: {other:?}"),
    };
    assert_eq!(refused("runAsNonRoot: true, runAsUser: 0", "7"), UserError::RunAsRoot);
    assert_eq!(refused("runAsNonRoot: true", ""), UserError::ImageRoot);
    assert_eq!(refused("runAsNonRoot: true", "0:7"), UserError::ImageRoot);
    assert_eq!(refused("runAsNonRoot: true", "00"), UserError::ImageRoot);
    let user = String::from("www");
    assert_eq!(refused("runAsNonRoot: true", "www"), UserError::ImageUserName { user });
    for user in [":7", "a:", "a:b:c", "a b", "a\nb"] {
        assert_eq!(refused("", user), UserError::Malformed { user: user.into() });
    }
}

#[test]
fn groups_of_the_pod_are_added_once() {
    let pod = pod("{containers: [{name: main, image: i}], \
         securityContext: {fsGroup: 20, supplementalGroups: [30, 20, 30]}}");
    assert_eq!(spec(&pod, &busybox())["process"]["user"]["additionalGids"], json!([30, 20]));
}

#[test]
fn a_restricted_container_has_nothing_and_a_privileged_one_everything() {
    let restricted = spec(
        &main_with(
            "securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, \
             capabilities: {drop: [ALL]}}",
        ),
        &busybox(),
    );
    assert_eq!(restricted["root"]["readonly"], true);
    assert_eq!(restricted["process"]["noNewPrivileges"], true);
    assert_eq!(set(&restricted["process"]["capabilities"]["bounding"]), [""; 0]);
    let options_of = |spec: &Value, destination: &str| {
        let mounts = spec["mounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["destination"] == destination);
        mount.unwrap_or_else(|| panic!("no {destination}"))["options"].to_string()
    };
    assert_eq!(options_of(&restricted, "/etc/hosts"), r#"["rbind","rprivate","ro"]"#);

    let privileged = spec(&main_with("securityContext: {privileged: true}"), &busybox());
    assert_eq!(set(&privileged["process"]["capabilities"]["bounding"]).len(), 41);
    assert_eq!(privileged["process"]["noNewPrivileges"], false);
    assert_eq!(privileged["linux"]["maskedPaths"], json!([]));
    assert_eq!(privileged["linux"]["readonlyPaths"], json!([]));
    assert_eq!(
        privileged["linux"]["resources"]["devices"],
        json!([{"allow": true, "access": "rwm"}])
    );
    assert_eq!(
        privileged["linux"]["devices"][0],
        json!({
            "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666,
            "uid": 0, "gid": 0,
        })
    );
    for destination in ["/sys", "/sys/fs/cgroup"] {
        assert!(options_of(&privileged, destination).ends_with(r#""rw"]"#), "{destination}");
    }

    let unmasked = spec(&main_with("securityContext: {procMount: Unmasked}"), &busybox());
    assert_eq!(unmasked["linux"]["maskedPaths"], json!([]));
    assert_eq!(set(&unmasked["process"]["capabilities"]["bounding"]).len(), 14);
}

#[test]
fn volumes_are_bound_where_they_belong_and_parents_come_first() {
    let pod = pod("{volumes: [{name: a, emptyDir: {}}, {name: b, emptyDir: {}}], \
         containers: [{name: main, image: i, volumeMounts: [{name: a, mountPath: /x/y}, \
         {name: b, mountPath: /x, readOnly: true}, {name: a, mountPath: /dev/shm}, \
         {name: b, mountPath: /etc}, {name: a, mountPath: /etc/hosts}]}]}");
    let got = spec(&pod, &busybox());
    let got: Vec<_> = got["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|mount| mount["type"] == "bind")
        .map(|mount| {
            let text = |name: &str| mount[name].as_str().unwrap().to_owned();
            (text("destination"), text("source"), mount["options"][2].as_str().unwrap().to_owned())
        })
        .collect();
    let expected = [
        ("/x", "/run/husk/volumes/b", "ro"),
        ("/etc", "/run/husk/volumes/b", "rw"),
        ("/etc/hostname", "/run/husk/etc/hostname", "rw"),
        ("/etc/resolv.conf", "/run/husk/etc/resolv.conf", "rw"),
        ("/dev/termination-log", "/run/husk/containers/main-0/termination-log", "rw"),
        ("/x/y", "/run/husk/volumes/a", "rw"),
        ("/dev/shm", "/run/husk/volumes/a", "rw"),
        ("/etc/hosts", "/run/husk/volumes/a", "rw"),
    ]
    .map(|(destination, source, access)| (destination.into(), source.into(), access.into()));
    assert_eq!(got, expected);
}

#[test]
fn a_part_of_a_volume_is_bound_and_volumes_of_files_only_for_reading() {
    let pod = pod("{volumes: [{name: a, emptyDir: {}}, {name: b, downwardAPI: {items: []}}], \
         containers: [{name: main, image: i, volumeMounts: [\
         {name: a, mountPath: /x, subPath: ./p//q/}, {name: b, mountPath: /y, subPath: f}]}]}");
    let got = spec(&pod, &busybox());
    let find = |destination: &str| {
        let all = got["mounts"].as_array().unwrap();
        all.iter().find(|mount| mount["destination"] == destination).unwrap().clone()
    };
    assert_eq!(find("/x")["source"], "/run/husk/volumes/a/p/q");
    assert_eq!(find("/x")["options"][2], "rw");
    assert_eq!(find("/y")["source"], "/run/husk/volumes/b/f");
    assert_eq!(find("/y")["options"][2], "ro");
}

#[test]
fn mounts_spread_and_are_read_only_as_deep_as_they_are_told() {
    let pod = pod("{volumes: [{name: a, emptyDir: {}}], \
         containers: [{name: main, image: i, securityContext: {privileged: true}, volumeMounts: [\
         {name: a, mountPath: /n, mountPropagation: None}, \
         {name: a, mountPath: /h, mountPropagation: HostToContainer, readOnly: true}, \
         {name: a, mountPath: /b, mountPropagation: Bidirectional}, \
         {name: a, mountPath: /r, readOnly: true, recursiveReadOnly: Enabled}, \
         {name: a, mountPath: /d, readOnly: true, recursiveReadOnly: Disabled}]}]}");
    let got = spec(&pod, &busybox());
    for (destination, options) in [
        ("/n", ["rbind", "rprivate", "rw"]),
        ("/h", ["rbind", "rslave", "ro"]),
        ("/b", ["rbind", "rshared", "rw"]),
        ("/r", ["rbind", "rprivate", "rro"]),
        ("/d", ["rbind", "rprivate", "ro"]),
    ] {
        let all = got["mounts"].as_array().unwrap();
        let mount = all.iter().find(|mount| mount["destination"] == destination).unwrap();
        assert_eq!(mount["options"], json!(options), "{destination}");
    }
    assert_eq!(got["linux"]["rootfsPropagation"], "rshared");
    assert!(spec(&main_with(""), &busybox())["linux"].get("rootfsPropagation").is_none());
}

#[test]
fn a_part_of_a_volume_can_be_named_by_variables() {
    let with = |expr: &str| {
        let pod = pod(&format!(
            "{{volumes: [{{name: a, emptyDir: {{}}}}], containers: [{{name: main, image: i, \
             env: [{{name: POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}, \
             {{name: UP, value: ../x}}, {{name: ABS, value: /x}}, {{name: NONE, value: ''}}], \
             volumeMounts: [{{name: a, mountPath: /x, subPathExpr: '{expr}'}}]}}]}}"
        ));
        let got = spec_of(&pod, &busybox()).map_err(|error| message(&error))?;
        let all = got["mounts"].as_array().unwrap().clone();
        let mount = all.iter().find(|mount| mount["destination"] == "/x").unwrap();
        Ok::<_, String>(mount["source"].as_str().unwrap().to_owned())
    };
    for (expr, source) in [
        ("$(POD)/logs", "/run/husk/volumes/a/web/logs"),
        ("$$(POD)", "/run/husk/volumes/a/$(POD)"),
        ("$(NONE)", "/run/husk/volumes/a"),
        ("$POD", "/run/husk/volumes/a/$POD"),
    ] {
        assert_eq!(with(expr).unwrap(), source);
    }
    for (expr, why) in [
        ("$(OTHER)/$(POD)", "/x: subPathExpr \"$(OTHER)/$(POD)\": there is no variable OTHER"),
        ("a/$(UP)", "becomes \"a/../x\": it must be relative, without .. and NUL bytes"),
        ("$(ABS)", "becomes \"/x\": it must be relative"),
    ] {
        let message = with(expr).unwrap_err();
        assert!(message.starts_with("cannot mount a part of a volume: /x: "), "{message}");
        assert!(message.contains(why), "{message}");
    }
    assert!(with(&"$(POD)".repeat(1500)).unwrap_err().contains("too long for a path"));
}

#[test]
fn values_of_objects_are_not_expanded_but_can_be_referred_to() {
    let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {A: $(B), B: b}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: main, image: i, \
         envFrom: [{secretRef: {name: s}}], env: [{name: C, value: <$(A)>}, {name: B, value: mine}]}]}";
    let pod = manifest::parse(text, "test").unwrap().remove(0);
    let env = spec(&pod, &busybox())["process"]["env"].take();
    let env: Vec<&str> = env.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    for expected in ["A=$(B)", "B=mine", "C=<$(B)>"] {
        assert!(env.contains(&expected), "{expected} in {env:?}");
    }
    assert!(!format!("{pod:?}").contains("$(B)"), "a secret is shown");
}

#[test]
fn limits_and_requests_size_the_cgroup() {
    let of = |resources: &str| {
        let pod = main_with(&format!("resources: {{{resources}}}"));
        spec(&pod, &busybox())["linux"]["resources"].take()
    };
    let both = of("limits: {cpu: 1500m, memory: 64Mi}, requests: {cpu: 250m}");
    assert_eq!(both["cpu"], json!({"shares": 256, "quota": 150_000, "period": 100_000}));
    assert_eq!(both["memory"], json!({"limit": 64 << 20}));
    let tiny = of("limits: {cpu: 1m}");
    assert_eq!(tiny["cpu"], json!({"shares": 2, "quota": 1000, "period": 100_000}));
    assert_eq!(of("requests: {memory: 64Mi}").get("memory"), None);
}

/// The kubelet's rule, with the VM's memory for the node's.
#[test]
fn the_oom_score_follows_from_the_quality_of_service() {
    let adj = |pod: &PodSpec| spec(pod, &busybox())["process"]["oomScoreAdj"].as_i64().unwrap();
    assert_eq!(adj(&main_with("resources: {limits: {cpu: 1, memory: 64Mi}}")), -997);
    assert_eq!(adj(&main_with("")), 1000);
    assert_eq!(adj(&main_with("resources: {limits: {cpu: 1}}")), 999);
    assert_eq!(adj(&main_with("resources: {requests: {memory: 128Mi}}")), 750);
    assert_eq!(adj(&main_with("resources: {limits: {memory: 128Mi}}")), 3);
    let sidecar = pod("{initContainers: [{name: main, image: i, restartPolicy: Always}], \
         containers: [{name: a, image: i, resources: {requests: {memory: 256Mi}}}, \
         {name: b, image: i, resources: {requests: {memory: 128Mi}}}]}");
    assert_eq!(adj(&sidecar), 750);
}

#[test]
fn a_debug_container_has_the_whole_guest_before_it() {
    let pod = main_with("tty: true");
    let config = ConfigBuilder::default()
        .cmd(vec!["server".to_owned()])
        .user("nobody".to_owned())
        .env(vec!["PATH=/tools".to_owned()]);
    let spec = debug::debug_spec(&pod, &image(config), "husk.debug-0").unwrap();
    let spec = serde_json::to_value(spec).unwrap();
    assert_eq!(spec["root"]["path"], "/run/husk/containers/husk.debug-0/rootfs");
    assert_eq!(spec["linux"]["namespaces"], json!([{"type": "mount"}]));
    assert_eq!(
        spec["linux"]["resources"],
        json!({"devices": [{"allow": true, "access": "rwm"}]}),
        "every device, and no limit"
    );
    assert!(spec["linux"]["maskedPaths"].as_array().is_none_or(Vec::is_empty));
    assert!(spec["linux"]["readonlyPaths"].as_array().is_none_or(Vec::is_empty));
    assert_eq!(spec["linux"]["seccomp"], Value::Null);
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["sh"]), "not what the image would run");
    assert_eq!((&process["user"]["uid"], &process["user"]["username"]), (&json!(0), &Value::Null));
    assert_eq!(process["env"], json!(["PATH=/tools", "HOSTNAME=web"]));
    let bounding = set(&process["capabilities"]["bounding"]);
    assert!(bounding.contains(&"CAP_SYS_ADMIN") && bounding.contains(&"CAP_SYS_PTRACE"));
    let mounts = spec["mounts"].as_array().unwrap();
    let of = |path: &str| mounts.iter().find(|mount| mount["destination"] == path).unwrap();
    assert_eq!(of("/guest")["source"], "/");
    assert_eq!(of("/guest")["options"], json!(["rbind", "rslave", "rw"]));
    assert!(of("/sys")["options"].as_array().unwrap().contains(&json!("rw")));
}

//! Volumes of the host.

use super::*;

fn host_path(fields: &str, mount: &str) -> String {
    container_with(&format!(
        "    volumeMounts: [{{name: v, mountPath: /v, {mount}}}]\n  \
         volumes: [{{name: v, hostPath: {fields}}}]"
    ))
}

#[test]
fn paths_of_the_host_have_a_type() {
    for (fields, kind) in [
        ("{path: /srv/a}", HostPathType::Any),
        ("{path: /srv/a, type: ''}", HostPathType::Any),
        ("{path: /srv/a, type: DirectoryOrCreate}", HostPathType::DirectoryOrCreate),
        ("{path: /srv/a, type: Directory}", HostPathType::Directory),
        ("{path: /srv/a, type: FileOrCreate}", HostPathType::FileOrCreate),
        ("{path: /srv/a, type: File}", HostPathType::File),
    ] {
        let pod = one(&host_path(fields, "readOnly: true"));
        let source = VolumeSource::HostPath { path: "/srv/a".into(), kind };
        assert_eq!(pod.volumes, [VolumeSpec { name: "v".into(), source }], "{fields}");
    }
}

#[test]
fn what_cannot_be_shared_between_kernels_is_refused_with_the_reason() {
    let at = "spec.volumes[0].hostPath";
    for (fields, complaint) in [
        ("{}", format!("{at}.path: required")),
        ("{path: srv}", format!("{at}.path: srv: must be an absolute path")),
        ("{path: /srv/../etc}", format!("{at}.path: /srv/../etc: must not contain '..'")),
        ("{path: /a, typ: File}", format!("{at}.typ: unknown field, did you mean type?")),
        (
            "{path: /a, type: Disk}",
            format!(
                "{at}.type: Disk: must be one of: \"\", DirectoryOrCreate, Directory, FileOrCreate, File"
            ),
        ),
    ] {
        refused(&host_path(fields, ""), &[&complaint]);
    }
    for (kind, words) in [
        ("Socket", "no server of the host can be reached"),
        ("CharDevice", "does not have the host's devices"),
        ("BlockDevice", "husk disk attach gives"),
    ] {
        let complaints = complaints(&host_path(&format!("{{path: /a, type: {kind}}}"), ""));
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        let start = format!("{at}.type: {kind}: a pod has a kernel of its own");
        assert!(
            complaints[0].starts_with(&start) && complaints[0].contains(words),
            "{complaints:?}"
        );
    }
    let spread = host_path("{path: /a}", "mountPropagation: HostToContainer");
    refused(
        &spread,
        &[
            "spec.containers[0].volumeMounts[0].mountPropagation: HostToContainer: not for a hostPath: \
           mounts do not spread between the kernels of the host and of the pod",
        ],
    );
}

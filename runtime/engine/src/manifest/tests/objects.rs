//! ConfigMaps and Secrets, and what of Pods refers to them.

use super::*;

const OBJECTS: &str = "\
apiVersion: v1
kind: ConfigMap
metadata: {name: web, labels: {app: web}}
immutable: true
data:
  color: blue
  site.conf: |
    listen 80;
binaryData:
  logo: AAH/
---
apiVersion: v1
kind: Secret
metadata: {name: login}
type: Opaque
data:
  user: |
    YWRt
    aW4=
  pass: b2xk
stringData: {pass: new}
---
";

/// A Pod in the same namespace as [`OBJECTS`], whose only container has these fields.
fn beside(fields: &str) -> String {
    format!("{OBJECTS}{}", container_with(fields))
}

fn values(pod: &PodSpec) -> Vec<(&str, &str)> {
    let value = |var: &EnvVar| match &var.value {
        EnvValue::Verbatim(Hidden(text)) | EnvValue::Literal(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    let env = &pod.containers[0].env;
    env.iter().map(|var| (var.name.as_str(), &*value(var).leak())).collect()
}

fn files(pod: &PodSpec, volume: usize) -> Vec<(&str, u32, &[u8])> {
    let VolumeSource::Files(files) = &pod.volumes[volume].source else { panic!("{pod:?}") };
    let content = |file: &FileSpec| match &file.content {
        FileContent::Bytes(Hidden(bytes)) => bytes.clone(),
        other => format!("{other:?}").into_bytes(),
    };
    files.iter().map(|file| (file.path.as_str(), file.mode, &*content(file).leak())).collect()
}

#[test]
fn variables_come_from_objects() {
    let pod = one(&beside(
        "    envFrom: [{configMapRef: {name: web}, prefix: W_}, {secretRef: {name: login}}, \
         {secretRef: {name: none, optional: true}}]\n    \
         env: [{name: C, valueFrom: {configMapKeyRef: {name: web, key: color}}}, \
         {name: P, valueFrom: {secretKeyRef: {name: login, key: pass}}}, \
         {name: Z, valueFrom: {secretKeyRef: {name: login, key: none, optional: true}}}, \
         {name: O, valueFrom: {configMapKeyRef: {name: none, key: k, optional: true}}}, \
         {name: L, value: literal}]",
    ));
    assert_eq!(
        values(&pod),
        [
            ("W_color", "blue"),
            ("W_site.conf", "listen 80;\n"),
            ("pass", "new"),
            ("user", "admin"),
            ("C", "blue"),
            ("P", "new"),
            ("L", "literal"),
        ]
    );
}

#[test]
fn volumes_come_from_objects_and_fields() {
    let pod = one(&beside(
        "  volumes:\n  - {name: a, configMap: {name: web}}\n  \
         - {name: b, secret: {secretName: login, defaultMode: 0400, \
            items: [{key: user, path: ./who/name, mode: 0440}, {key: pass, path: pass}]}}\n  \
         - {name: c, configMap: {name: none, optional: true}}\n  \
         - name: d\n    projected:\n      defaultMode: 256\n      sources:\n      \
         - configMap: {name: web, items: [{key: color, path: c/color}, \
            {key: none, path: x}], optional: true}\n      \
         - secret: {name: login}\n      \
         - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, \
            {path: cpu, resourceFieldRef: {containerName: main, resource: limits.cpu}}]}",
    ));
    let logo: &[u8] = &[0, 1, 255];
    assert_eq!(
        files(&pod, 0),
        [
            ("color", 0o644, &b"blue"[..]),
            ("logo", 0o644, logo),
            ("site.conf", 0o644, b"listen 80;\n")
        ]
    );
    assert_eq!(files(&pod, 1), [("who/name", 0o440, &b"admin"[..]), ("pass", 0o400, b"new")]);
    assert_eq!(files(&pod, 2), []);
    let names: Vec<_> = files(&pod, 3).iter().map(|file| (file.0, file.1)).collect();
    let expected =
        [("c/color", 0o400), ("pass", 0o400), ("user", 0o400), ("labels", 0o400), ("cpu", 0o400)];
    assert_eq!(names, expected);
    let VolumeSource::Files(list) = &pod.volumes[3].source else { panic!() };
    assert_eq!(list[3].content, FileContent::Field(FieldRef::Labels));
}

#[test]
fn objects_are_of_a_namespace_and_may_follow_their_pods() {
    let pod = container_with("    envFrom: [{configMapRef: {name: web}}]");
    assert_eq!(values(&one(&format!("{pod}---\n{}", OBJECTS.trim_end_matches("---\n")))).len(), 2);
    let elsewhere = pod.replace("name: web}\nspec", "name: web, namespace: other}\nspec");
    refused(
        &format!("{OBJECTS}{elsewhere}"),
        &["spec.containers[0].envFrom[0].configMapRef.name: web: there is no ConfigMap of this \
           name in namespace other beside this Pod"],
    );
    assert!(matches!(
        parse(OBJECTS.trim_end_matches("---\n"), "x"),
        Err(ManifestError::Empty { .. })
    ));
}

#[test]
fn what_is_missing_or_twice_is_named() {
    refused(
        &beside(
            "    envFrom: [{configMapRef: {name: none}}, {}, {secretRef: {name: login}, prefix: a=}]\n    \
             env: [{name: A, valueFrom: {configMapKeyRef: {name: web, key: logo}}}, \
             {name: B, valueFrom: {secretKeyRef: {name: login}}}, \
             {name: C, valueFrom: {secretKeyRef: {name: login, key: x}, fieldRef: {fieldPath: metadata.uid}}}]\n  \
             volumes:\n  - {name: a, configMap: {name: none}}\n  \
             - {name: b, secret: {secretName: login, items: [{key: x, path: y}, {key: user, path: ../y}, \
               {key: user, path: z/y, mode: 01000}, {key: pass, path: z}]}}\n  \
             - {name: c, secret: {}}\n  \
             - {name: d, emptyDir: {}, configMap: {name: web}}\n  \
             - {name: e, downwardAPI: {items: [{path: a, fieldRef: {fieldPath: spec.nodeName}}, {path: b}, \
               {path: c, resourceFieldRef: {resource: limits.cpu}}, \
               {path: d, resourceFieldRef: {resource: limits.cpu, containerName: absent}}]}}\n  \
             - {name: f, projected: {sources: [{serviceAccountToken: {path: t}}, \
               {configMap: {name: web}, secret: {name: login}}]}}",
        ),
        &[
            "spec.containers[0].envFrom[0].configMapRef.name: none: there is no ConfigMap of this name in namespace default beside this Pod",
            "spec.containers[0].envFrom[1]: envFrom: has no source",
            "spec.containers[0].envFrom[2].prefix: a=: must be printable ASCII without '='",
            "spec.containers[0].env[0].valueFrom.configMapKeyRef.key: logo: ConfigMap web has no such key",
            "spec.containers[0].env[1].valueFrom.secretKeyRef.key: required",
            "spec.containers[0].env[2].valueFrom: C: must have one source, not several",
            "spec.volumes[0].configMap.name: none: there is no ConfigMap of this name in namespace default beside this Pod",
            "spec.volumes[1].secret.items[0].key: x: Secret login has no such key",
            "spec.volumes[1].secret.items[1].path: ../y: must not have a part that begins with '..'",
            "spec.volumes[1].secret.items[2].mode: 512: must be 0 to 511",
            "spec.volumes[1].secret.items[3].path: z: the volume has a file z/y already",
            "spec.volumes[2].secret.secretName: required",
            "spec.volumes[3]: d: must have one source, not several",
            "spec.volumes[4].downwardAPI.items[0].fieldRef.fieldPath: spec.nodeName: must be one of: metadata.name, metadata.namespace, metadata.uid, metadata.labels, metadata.annotations, metadata.labels['KEY'], metadata.annotations['KEY']",
            "spec.volumes[4].downwardAPI.items[1]: items: each must have either fieldRef or resourceFieldRef",
            "spec.volumes[4].downwardAPI.items[2].resourceFieldRef.containerName: required",
            "spec.volumes[4].downwardAPI.items[3].resourceFieldRef.containerName: absent: there is no such container in this pod",
            "spec.volumes[5].projected.sources[0].serviceAccountToken: not supported yet",
            "spec.volumes[5].projected.sources[1]: sources: each must have one kind of source",
        ],
    );
}

#[test]
fn objects_are_checked_themselves() {
    let object = |kind: &str, fields: &str| {
        let pod = container_with("");
        format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: x}}\n{fields}\n---\n{pod}")
    };
    refused(
        &object(
            "ConfigMap",
            "data: {a b: x, ..c: y, d: 5, e: f}\nbinaryData: {e: '?', f: ''}\nspec: {}",
        ),
        &[
            "data['a b']: a b: must be at most 253 letters, digits, '-', '_' and '.', and not begin with '..'",
            "data['..c']: ..c: must be at most 253 letters, digits, '-', '_' and '.', and not begin with '..'",
            "data['d']: must be a text (put it in quotes), but is the number 5",
            "binaryData['e']: value: is not base64: Invalid symbol 63, offset 0.",
            "spec: unknown field",
        ],
    );
    refused(
        &object(
            "Secret",
            "data: {a: aGk=}\n---\napiVersion: v2\nkind: Secret\nmetadata: {name: x}",
        ),
        &[
            "apiVersion: v2: must be v1",
            "metadata.name: x: an earlier document is a Secret of this name in this namespace",
        ],
    );
    let large = "x".repeat(600 * 1024);
    refused(
        &object("ConfigMap", &format!("data: {{a: {large}, b: {large}}}")),
        &["data: 1228800 bytes: a ConfigMap has at most 1 MiB (1048576 bytes)"],
    );
    let text = object("Secret", "data: {a: /w==}")
        .replace("spec:\n", "spec:\n  hostname: h\n")
        .replace("image: localhost/i:1\n", "image: i\n    envFrom: [{secretRef: {name: x}}]\n");
    refused(
        &text,
        &[
            "spec.containers[0].envFrom[0].secretRef: a: this value of Secret x is no text without NUL bytes, as a variable must be",
        ],
    );
}

#[test]
fn all_files_of_a_pod_have_a_bound() {
    let large = "x".repeat(900 * 1024);
    let object =
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\ndata: {{a: {large}}}\n");
    let volumes: String =
        (0..4).map(|i| format!("\n  - {{name: v{i}, configMap: {{name: x}}}}")).collect();
    let found =
        complaints(&format!("{object}---\n{}", container_with(&format!("  volumes:{volumes}"))));
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("at most 3 MiB"), "{}", found[0]);
}

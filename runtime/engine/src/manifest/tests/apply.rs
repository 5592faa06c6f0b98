//! Documents that a running pod takes over, or refuses.

use super::*;

const RUNNING: &str = "\
apiVersion: v1
kind: ConfigMap
metadata: {name: config}
data: {color: blue}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: fixed}
immutable: true
data: {a: b}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: unused}
data: {a: b}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {tier: front}}
spec:
  containers:
  - name: main
    image: localhost/i:1
    env: [{name: COLOR, valueFrom: {configMapKeyRef: {name: config, key: color}}}]
  volumes:
  - {name: v, configMap: {name: config, items: [{key: color, path: c}]}}
  - {name: f, configMap: {name: fixed}}
  - {name: o, secret: {secretName: later, optional: true}}
  - {name: d, downwardAPI: {items: [{path: l, fieldRef: {fieldPath: metadata.labels}}]}}
";

/// The Pod's own document, changed.
fn own(from: &str, to: &str) -> String {
    let (_, pod) = RUNNING.rsplit_once("---\n").unwrap();
    assert!(pod.contains(from));
    pod.replace(from, to)
}

fn config_map(name: &str, rest: &str) -> String {
    format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n{rest}\n---\n")
}

fn running() -> Documents {
    Documents::read(RUNNING, "run.yaml", ("default", "web")).unwrap().expect("it is in it")
}

fn apply(text: &str) -> Option<Applied> {
    running().apply(text, "new.yaml").unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Why the documents are refused.
fn refusal(text: &str) -> String {
    running().apply(text, "new.yaml").expect_err(text).to_string()
}

fn contents(pod: &PodSpec, volume: usize) -> Vec<(&str, &[u8])> {
    let VolumeSource::Files(files) = &pod.volumes[volume].source else { panic!("{pod:?}") };
    let content = |file: &'_ FileSpec| match &file.content {
        FileContent::Bytes(Hidden(bytes)) => &*bytes.clone().leak(),
        other => panic!("{other:?}"),
    };
    files.iter().map(|file| (file.path.as_str(), content(file))).collect()
}

#[test]
fn new_values_reach_files_and_variables_and_are_remembered() {
    let Applied { documents, pod } = apply(&config_map("config", "data: {color: red}")).unwrap();
    assert_eq!(contents(&pod, 0), [("c", &b"red"[..])]);
    let red = EnvValue::Verbatim(Hidden("red".into()));
    assert_eq!(pod.containers[0].env[0].value, red);

    // An object that was not there, and a Pod that says what it said, in other words.
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: later}\nstringData: {k: s}\n---\n";
    let same = own("name: web, ", "name: web, namespace: default, annotations: {a/b: c}, ");
    let new = format!("{secret}{}", same.replace("spec:\n", "spec:\n  restartPolicy: Always\n"));
    let Applied { documents, pod } = documents.apply(&new, "2.yaml").unwrap().unwrap();
    assert_eq!(contents(&pod, 0), [("c", &b"red"[..])], "what came before stays");
    assert_eq!(contents(&pod, 2), [("k", &b"s"[..])]);
    assert_eq!(pod.metadata.annotations["a/b"], "c");
    assert_eq!(format!("{documents:?}"), "Documents { source_name: \"2.yaml\", .. }");

    let labels = own("tier: front", "tier: back, x: v");
    let Applied { documents: _, pod } = documents.apply(&labels, "3.yaml").unwrap().unwrap();
    assert_eq!(pod.metadata.labels.len(), 2);
    assert!(pod.metadata.annotations.is_empty(), "the Pod's document replaces the one before");
}

#[test]
fn what_does_not_concern_the_pod_changes_nothing() {
    for text in [
        config_map("unused", "data: {a: c}"),
        config_map("other", "data: {a: c}"),
        config_map("config, namespace: other", "data: {color: red}"),
        own("name: web", "name: other"),
        own("name: web", "namespace: other, name: web"),
    ] {
        assert!(apply(&text).is_none(), "{text}");
    }
    assert!(Documents::read(RUNNING, "run.yaml", ("default", "x")).unwrap().is_none());
}

#[test]
fn a_pod_that_would_be_another_one_is_refused_field_by_field() {
    let text = own("image: localhost/i:1", "image: localhost/i:2\n    tty: true")
        .replace("name: v, ", "name: w, ")
        .replace("tier: front", "tier: back");
    assert_eq!(
        refusal(&text),
        "new.yaml:7:12: spec.containers[0].image: localhost/i:2: must stay localhost/i:1: of a Pod \
         that runs only metadata.labels and metadata.annotations can change\n\
         new.yaml:8:5: spec.containers[0].tty: true: must stay unset: of a Pod that runs only \
         metadata.labels and metadata.annotations can change\n\
         new.yaml:11:12: spec.volumes[0].name: w: must stay v: of a Pod that runs only \
         metadata.labels and metadata.annotations can change"
    );
    let fewer = own("  - {name: o, secret: {secretName: later, optional: true}}\n", "");
    let refused = refusal(&fewer);
    assert!(refused.contains("spec.volumes[3]: unset: must stay a mapping"), "{refused}");
    let uid = own("name: web", "name: web, uid: x");
    assert!(refusal(&uid).starts_with("new.yaml:3:23: metadata.uid: x: must stay unset"), "{uid}");
}

#[test]
fn immutable_objects_stay_what_they_are() {
    let same = config_map("fixed", "immutable: true\ndata: {a: b}");
    assert!(apply(&same).is_some());
    assert_eq!(
        refusal(&config_map("fixed", "immutable: true\ndata: {a: c}")),
        "new.yaml:5:7: data: changed: ConfigMap fixed of the running pod is immutable: start the pod \
         anew with another one"
    );
    let freed = refusal(&config_map("fixed", "binaryData: {a: Yg==}"));
    assert!(freed.contains("binaryData: changed: ") && freed.contains("immutable: changed: "));
    // Of another pod it is none of this one's business.
    assert!(apply(&config_map("fixed, namespace: other", "data: {a: c}")).is_none());
}

#[test]
fn what_the_pod_could_not_have_started_with_is_refused_and_forgotten() {
    assert_eq!(
        refusal(&config_map("config", "data: {colour: red}")),
        "run.yaml:24:74: spec.containers[0].env[0].valueFrom.configMapKeyRef.key: color: ConfigMap \
         config has no such key\n\
         run.yaml:26:55: spec.volumes[0].configMap.items[0].key: color: ConfigMap config has no such \
         key"
    );
    let huge = config_map("config", &format!("data: {{color: '{}'}}", "x".repeat((1 << 20) + 1)));
    assert!(refusal(&huge).contains("at most 1 MiB"));
    for (text, words) in [
        ("", "new.yaml: no ConfigMap, Secret or Pod in it"),
        ("kind: [", "new.yaml:1:7: "),
        ("apiVersion: apps/v1\nkind: Deployment\n", "must be Pod, ConfigMap or Secret"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n",
            "an earlier document is a Pod of this name",
        ),
        (&config_map("config", "dota: {}"), "did you mean data?"),
    ] {
        let refused = refusal(text);
        assert!(refused.contains(words), "{refused}");
        assert_eq!(check_applicable(text, "new.yaml").unwrap_err().to_string(), refused);
    }
}

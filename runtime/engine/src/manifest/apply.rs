//! What of a pod's documents may change while it runs: its ConfigMaps and Secrets, and its own labels
//! and annotations.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use super::objects::{Kind, Object, ObjectKey, Objects};
use super::problem::{ManifestError, Problem, ProblemKind, Problems, quoted};
use super::schema::join;
use super::tree::{Entry, Node, Place, Value};
use super::view::View;
use super::{pod, sort, tree};
use crate::types::PodSpec;

/// The documents from which a running pod is made, as they are now: its own, and the objects to which
/// it refers.
#[derive(Clone)]
pub struct Documents {
    source_name: String,
    pod: Node,
    objects: Objects,
}

impl fmt::Debug for Documents {
    /// Without their content, of which some is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Documents").field("source_name", &self.source_name).finish_non_exhaustive()
    }
}

/// What documents that a pod took over make of it.
#[derive(Debug, Clone)]
pub struct Applied {
    /// All of its documents, with those that are new.
    pub documents: Documents,
    /// The pod that they describe. It differs from the one that runs in labels, annotations, and in
    /// what comes of ConfigMaps and Secrets, and in nothing else.
    pub pod: PodSpec,
}

/// Checks what can be checked of documents that are to be applied without knowing to which pods.
///
/// # Errors
/// [`ManifestError`], as for [`super::parse`].
pub fn check_applicable(text: &str, source_name: &str) -> Result<(), ManifestError> {
    let documents = tree::read(text, source_name)?;
    let mut problems = Problems::new(source_name);
    let (objects, pods) = sort(&documents, &mut problems);
    let mut seen = BTreeSet::new();
    for document in &pods {
        if let Some(who) = pod::who(document, &mut problems)
            && !seen.insert(who)
        {
            let reason = "an earlier document is a Pod of this name in this namespace";
            let view = View::root(document).get("metadata").get("name");
            view.invalid(who.1, reason, &mut problems);
        }
    }
    if !problems.is_empty() {
        problems.sort();
        return Err(ManifestError::Invalid(problems));
    }
    if pods.is_empty() && objects.0.is_empty() {
        return Err(ManifestError::Nothing { source_name: source_name.into() });
    }
    Ok(())
}

impl Documents {
    /// The documents of one pod of a manifest; `None` if it is not in it.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn read(
        text: &str,
        source_name: &str,
        (namespace, name): (&str, &str),
    ) -> Result<Option<Self>, ManifestError> {
        let all = tree::read(text, source_name)?;
        let mut problems = Problems::new(source_name);
        let (mut objects, pods) = sort(&all, &mut problems);
        let is_it =
            |document: &&&Node| pod::who(document, &mut problems.fork()) == Some((namespace, name));
        let Some(&document) = pods.iter().find(is_it) else { return Ok(None) };
        let wanted = RefCell::default();
        let read = pod::read_noting(document, &objects, &wanted, &mut problems);
        if read.is_none() || !problems.is_empty() {
            return Err(ManifestError::Invalid(problems));
        }
        let wanted = wanted.into_inner();
        objects.0.retain(|key, _| wanted.contains(key));
        Ok(Some(Documents { source_name: source_name.into(), pod: document.clone(), objects }))
    }

    /// Takes over what in these documents concerns the pod; `None` if nothing does.
    ///
    /// # Errors
    /// [`ManifestError`]: nothing is taken over if anything is wrong, which includes that the pod
    /// would not be what it is.
    pub fn apply(&self, text: &str, source_name: &str) -> Result<Option<Applied>, ManifestError> {
        check_applicable(text, source_name)?;
        let new = tree::read(text, source_name)?;
        let mut problems = Problems::new(source_name);
        let (objects, pods) = sort(&new, &mut problems);

        let me = pod::who(&self.pod, &mut problems.fork());
        let is_me = |document: &&Node| pod::who(document, &mut problems.fork()) == me;
        let own = pods.iter().copied().find(is_me);
        let mut all = self.objects.clone();
        all.0.extend(objects.0.clone());
        let wanted = RefCell::default();
        let mut of_old = Problems::new(&self.source_name);
        let before = pod::read_noting(&self.pod, &all, &wanted, &mut of_old);
        let wanted = wanted.into_inner();
        if own.is_none() && !wanted.iter().any(|key| objects.0.contains_key(key)) {
            return Ok(None);
        }
        for document in &new {
            self.check_immutable(document, &objects, &wanted, &mut problems);
        }
        let after = match own {
            Some(document) => pod::read(document, &all, &mut problems),
            None => before.clone(),
        };
        if !problems.is_empty() {
            problems.sort();
            return Err(ManifestError::Invalid(problems));
        }
        let (Some(before), Some(after)) = (before, after) else {
            of_old.sort();
            return Err(ManifestError::Invalid(of_old));
        };
        if let Some(document) = own
            && !is_same_pod(before, &after)
        {
            differences(&self.pod, document, "", &mut problems);
            if problems.is_empty() {
                View::root(document).invalid("Pod", "is not the one that runs", &mut problems);
            }
            problems.sort();
            return Err(ManifestError::Invalid(problems));
        }
        all.0.retain(|key, _| wanted.contains(key));
        let mut documents = Documents { objects: all, ..self.clone() };
        if let Some(document) = own {
            documents.source_name = source_name.into();
            documents.pod = document.clone();
        }
        Ok(Some(Applied { documents, pod: after }))
    }

    /// Notes if a document changes an object of the pod that says that it never changes.
    fn check_immutable(
        &self,
        document: &Node,
        new: &Objects,
        wanted: &BTreeSet<ObjectKey>,
        problems: &mut Problems,
    ) {
        let root = View::root(document);
        let mut unnoted = problems.fork();
        let Some(kind) = root.get("kind").text(&mut unnoted).and_then(Kind::of) else { return };
        let (name, namespace) = pod::read_object_name(&root.get("metadata"), &mut unnoted);
        let key = (kind, namespace.to_owned(), name.to_owned());
        let (Some(old), Some(new)) = (self.objects.0.get(&key), new.0.get(&key)) else { return };
        if !old.immutable || !wanted.contains(&key) {
            return;
        }
        let Object { items, immutable } = new;
        let fields = ["data", "stringData", "binaryData"];
        let mut changed: Vec<_> = Vec::new();
        if *items != old.items {
            let present = fields.iter().find(|field| root.get(field).is_present());
            changed.push(*present.unwrap_or(&"data"));
        }
        if !immutable {
            changed.push("immutable");
        }
        for field in changed {
            let reason = format!(
                "{} {name} of the running pod is immutable: start the pod anew with another one",
                kind.as_str()
            );
            root.get(field).invalid("changed", reason, problems);
        }
    }
}

/// Whether two pods differ in nothing but labels and annotations.
fn is_same_pod(mut before: PodSpec, after: &PodSpec) -> bool {
    before.metadata.labels.clone_from(&after.metadata.labels);
    before.metadata.annotations.clone_from(&after.metadata.annotations);
    before == *after
}

/// What may differ, by its path.
const MAY_CHANGE: [&str; 3] = ["metadata.labels", "metadata.annotations", "status"];

/// Notes every field that is not the same in both documents of a Pod. A field that is null or empty
/// is the same as one that is not there.
fn differences(old: &Node, new: &Node, path: &str, problems: &mut Problems) {
    match (&old.value, &new.value) {
        (Value::Map(olds), Value::Map(news)) => {
            let find = |map: &[Entry], key: &str| {
                let entry = map.iter().find(|entry| entry.key == key);
                entry.map(|entry| entry.node.clone()).filter(|node| !node.value.is_empty())
            };
            for entry in news {
                let path = join(path, &entry.key);
                match find(olds, &entry.key) {
                    Some(old) => differences(&old, &entry.node, &path, problems),
                    None => different(None, Some(&entry.node), entry.key_place, &path, problems),
                }
            }
            for entry in olds.iter().filter(|entry| find(news, &entry.key).is_none()) {
                let path = join(path, &entry.key);
                different(Some(&entry.node), None, new.place, &path, problems);
            }
        }
        (Value::List(olds), Value::List(news)) => {
            for (i, item) in news.iter().enumerate() {
                let path = format!("{path}[{i}]");
                match olds.get(i) {
                    Some(old) => differences(old, item, &path, problems),
                    None => different(None, Some(item), item.place, &path, problems),
                }
            }
            for (i, old) in olds.iter().enumerate().skip(news.len()) {
                different(Some(old), None, new.place, &format!("{path}[{i}]"), problems);
            }
        }
        (old_value, new_value) if same(old_value, new_value) => {}
        _ => different(Some(old), Some(new), new.place, path, problems),
    }
}

/// Whether two values without parts are the same.
fn same(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Float(a), Value::Float(b)) => a.total_cmp(b).is_eq(),
        (Value::Text(a), Value::Text(b)) => a == b,
        (a, b) => a.is_empty() && b.is_empty(),
    }
}

fn different(
    old: Option<&Node>,
    new: Option<&Node>,
    place: Place,
    path: &str,
    problems: &mut Problems,
) {
    let is_empty = |node: Option<&Node>| node.is_none_or(|node| node.value.is_empty());
    let is_of = |field: &str| {
        path.strip_prefix(field).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    if (is_empty(old) && is_empty(new)) || MAY_CHANGE.into_iter().any(is_of) {
        return;
    }
    let describe = |node: Option<&Node>| match node.map(|node| &node.value) {
        None => "unset".to_owned(),
        Some(Value::Text(text)) => quoted(text),
        Some(Value::Bool(value)) => value.to_string(),
        Some(Value::Int(value)) => value.to_string(),
        Some(other) => other.describe(),
    };
    let reason = format!(
        "must stay {}: of a Pod that runs only metadata.labels and metadata.annotations can change",
        describe(old)
    );
    let Place { line, column } = place;
    let kind = ProblemKind::Invalid { value: describe(new), reason };
    problems.push(Problem { line, column, path: path.to_owned(), kind });
}

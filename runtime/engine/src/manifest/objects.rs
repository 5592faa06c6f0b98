//! Reads the ConfigMaps and Secrets that stand beside the Pods of a source.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::fields::{CONFIG_MAP, SECRET};
use super::pod::{check, read_object_name};
use super::problem::Problems;
use super::tree::Node;
use super::view::View;
use super::{names, schema};

/// Most bytes of all values of one object, as in Kubernetes.
const MAX_OBJECT_LEN: usize = 1024 * 1024;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ConfigMap,
    Secret,
}

impl Kind {
    /// The kind of this name.
    pub(super) fn of(name: &str) -> Option<Self> {
        [Kind::ConfigMap, Kind::Secret].into_iter().find(|kind| kind.as_str() == name)
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Kind::ConfigMap => "ConfigMap",
            Kind::Secret => "Secret",
        }
    }
}

/// One value of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) bytes: Vec<u8>,
    /// Whether it is of `binaryData`, which only volumes see.
    pub(super) binary: bool,
}

/// The values of an object by their keys.
pub(super) type Items = BTreeMap<String, Item>;

/// A ConfigMap or Secret.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) items: Items,
    /// Whether it says that it never changes.
    pub(super) immutable: bool,
}

/// What an object is called: its kind, namespace and name.
pub(super) type ObjectKey = (Kind, String, String);

/// All ConfigMaps and Secrets of a source.
#[derive(Debug, Clone, Default)]
pub(super) struct Objects(pub(super) BTreeMap<ObjectKey, Object>);

/// The objects that a Pod can name: those of its namespace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) objects: &'a Objects,
    pub(super) namespace: &'a str,
    /// Those that were looked for, whether they are there or not.
    pub(super) wanted: &'a RefCell<BTreeSet<ObjectKey>>,
}

impl<'a> Scope<'a> {
    pub(super) fn find(&self, kind: Kind, name: &str) -> Option<&'a Items> {
        let key = (kind, self.namespace.to_owned(), name.to_owned());
        let found = self.objects.0.get(&key).map(|object| &object.items);
        self.wanted.borrow_mut().insert(key);
        found
    }
}

impl Objects {
    /// Reads a document that is an object of this kind. One with something wrong is kept too, so
    /// that what refers to it is not called wrong for that.
    pub(super) fn add(&mut self, document: &Node, kind: Kind, problems: &mut Problems) {
        let root = View::root(document);
        let table = if kind == Kind::ConfigMap { CONFIG_MAP } else { SECRET };
        schema::check(document, "", table, problems);
        let version = root.get("apiVersion");
        if let Some(text) = version.required_text(problems).filter(|text| *text != "v1") {
            version.invalid(text, "must be v1", problems);
        }
        let (name, namespace) = read_object_name(&root.get("metadata"), problems);
        let items = match kind {
            Kind::ConfigMap => read_config_map(&root, problems),
            Kind::Secret => read_secret(&root, problems),
        };
        let len: usize = items.values().map(|item| item.bytes.len()).sum();
        if len > MAX_OBJECT_LEN {
            let reason = format!("a {} has at most 1 MiB ({MAX_OBJECT_LEN} bytes)", kind.as_str());
            let field = if root.get("data").is_present() { "data" } else { "stringData" };
            root.get(field).invalid(format!("{len} bytes"), reason, problems);
        }
        let immutable = root.get("immutable").boolean(problems).unwrap_or_default();
        let object = Object { items, immutable };
        if self.0.insert((kind, namespace.to_owned(), name.to_owned()), object).is_some() {
            let reason = format!(
                "an earlier document is a {} of this name in this namespace",
                kind.as_str()
            );
            root.get("metadata").get("name").invalid(name, reason, problems);
        }
    }
}

fn read_config_map(root: &View<'_>, problems: &mut Problems) -> Items {
    let mut items = Items::new();
    for (key, bytes, _) in read_texts(&root.get("data"), problems) {
        items.insert(key, Item { bytes, binary: false });
    }
    for (key, bytes, view) in read_base64(&root.get("binaryData"), problems) {
        if items.insert(key.clone(), Item { bytes, binary: true }).is_some() {
            view.invalid(key, "is a key of data already", problems);
        }
    }
    items
}

fn read_secret(root: &View<'_>, problems: &mut Problems) -> Items {
    let encoded = read_base64(&root.get("data"), problems);
    // What is given as text wins.
    let texts = read_texts(&root.get("stringData"), problems);
    let all = encoded.into_iter().chain(texts);
    all.map(|(key, bytes, _)| (key, Item { bytes, binary: false })).collect()
}

type Read<'n> = (String, Vec<u8>, View<'n>);

fn read_texts<'n>(view: &View<'n>, problems: &mut Problems) -> Vec<Read<'n>> {
    read_values(view, problems, |text, _, _| Some(text.as_bytes().to_vec()))
}

fn read_base64<'n>(view: &View<'n>, problems: &mut Problems) -> Vec<Read<'n>> {
    read_values(view, problems, |text, view, problems| {
        // Line ends are allowed anywhere in it, as in Go's decoder.
        let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
        let decoded = STANDARD.decode(&text);
        if let Err(error) = &decoded {
            // The value may be a secret, so that it is not repeated.
            view.invalid("value", format!("is not base64: {error}"), problems);
        }
        decoded.ok()
    })
}

fn read_values<'n>(
    view: &View<'n>,
    problems: &mut Problems,
    decode: impl Fn(&str, &View<'n>, &mut Problems) -> Option<Vec<u8>>,
) -> Vec<Read<'n>> {
    let mut values = Vec::new();
    for (key, view) in view.entries(problems) {
        if let Err(reason) = names::data_key(key) {
            view.invalid(key, reason, problems);
            continue;
        }
        // Null is the empty text, as for the API server.
        let text = if view.is_present() { view.text(problems) } else { Some("") };
        if let Some(bytes) = text.and_then(|text| decode(text, &view, problems)) {
            values.push((key.to_owned(), bytes, view));
        }
    }
    values
}

/// A reference to an object by its name, as several fields have it.
pub(super) struct Reference<'a> {
    /// Its values; `None` if it is not there, which has been noted unless it is optional.
    pub(super) items: Option<&'a Items>,
    /// Whether the object, or a key of it, may be missing.
    pub(super) optional: bool,
    pub(super) name: String,
}

/// Reads `name` (or another field of that meaning) and `optional`.
pub(super) fn read_reference<'a>(
    view: &View<'_>,
    name_field: &str,
    kind: Kind,
    scope: Scope<'a>,
    problems: &mut Problems,
) -> Reference<'a> {
    let name_view = view.get(name_field);
    let name = name_view.required_text(problems).unwrap_or_default();
    check(&name_view, name, names::subdomain, problems);
    let optional = view.get("optional").boolean(problems).unwrap_or_default();
    let items = scope.find(kind, name);
    if items.is_none() && !optional && !name.is_empty() {
        let reason = format!(
            "there is no {} of this name in namespace {} beside this Pod",
            kind.as_str(),
            scope.namespace
        );
        name_view.invalid(name, reason, problems);
    }
    Reference { items, optional, name: name.to_owned() }
}

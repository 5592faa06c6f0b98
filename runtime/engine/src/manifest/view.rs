//! Typed reading of a document: a node, its path, and every problem noted instead of returned, so
//! that one run reports them all.

use super::problem::{Problem, ProblemKind, Problems, quoted};
use super::quantity::Quantity;
use super::schema::join;
use super::tree::{Entry, Node, Place, Value};

/// A field that may be there, with the path by which messages name it.
#[derive(Debug, Clone)]
pub(super) struct View<'n> {
    /// `None` if it is absent or null.
    node: Option<&'n Node>,
    /// Its place; of an absent field, the place of the object that lacks it.
    place: Place,
    path: String,
}

impl<'n> View<'n> {
    /// The document itself.
    pub(super) fn root(node: &'n Node) -> Self {
        View { node: Some(node), place: node.place, path: String::new() }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// The same under another path: for what concerns several fields.
    pub(super) fn renamed(&self, path: String) -> View<'n> {
        View { path, ..self.clone() }
    }

    /// Whether the object has fields beside these that are not null or empty.
    pub(super) fn has_other_fields(&self, names: &[&str]) -> bool {
        match self.node.map(|node| &node.value) {
            Some(Value::Map(entries)) => entries
                .iter()
                .any(|entry| !names.contains(&entry.key.as_str()) && !entry.node.value.is_empty()),
            _ => false,
        }
    }

    pub(super) fn is_present(&self) -> bool {
        self.node.is_some()
    }

    /// The field of this object. Of a repeated key the parser has complained already.
    pub(super) fn get(&self, name: &str) -> View<'n> {
        let entry = match self.node.map(|node| &node.value) {
            Some(Value::Map(entries)) => entries.iter().find(|entry| entry.key == name),
            _ => None,
        };
        let path = join(&self.path, name);
        match entry {
            Some(entry) => self.at(&entry.node, path),
            None => View { node: None, place: self.place, path },
        }
    }

    fn at(&self, node: &'n Node, path: String) -> View<'n> {
        let present = !matches!(node.value, Value::Null);
        View { node: present.then_some(node), place: node.place, path }
    }

    pub(super) fn problem(&self, kind: ProblemKind, problems: &mut Problems) {
        let Place { line, column } = self.place;
        let path = if self.path.is_empty() { "document".into() } else { self.path.clone() };
        problems.push(Problem { line, column, path, kind });
    }

    /// Notes that `value` is not allowed here.
    pub(super) fn invalid(
        &self,
        value: impl AsRef<str>,
        reason: impl Into<String>,
        problems: &mut Problems,
    ) {
        let (value, reason) = (quoted(value.as_ref()), reason.into());
        self.problem(ProblemKind::Invalid { value, reason }, problems);
    }

    fn wrong_type(&self, expected: &'static str, problems: &mut Problems) {
        if let Some(node) = self.node {
            let found = node.value.describe();
            self.problem(ProblemKind::WrongType { expected, found }, problems);
        }
    }

    /// Notes if it is absent.
    pub(super) fn require(&self, problems: &mut Problems) {
        if self.node.is_none() {
            self.problem(ProblemKind::Required, problems);
        }
    }

    pub(super) fn text(&self, problems: &mut Problems) -> Option<&'n str> {
        match &self.node?.value {
            Value::Text(text) => Some(text),
            Value::List(_) | Value::Map(_) => {
                self.wrong_type("a text", problems);
                None
            }
            // As the API server, which does not guess what was meant by `value: 5432`.
            _ => {
                self.wrong_type("a text (put it in quotes)", problems);
                None
            }
        }
    }

    /// A text that must be there.
    pub(super) fn required_text(&self, problems: &mut Problems) -> Option<&'n str> {
        self.require(problems);
        match self.text(problems) {
            Some("") => {
                self.problem(ProblemKind::Required, problems);
                None
            }
            text => text,
        }
    }

    /// A text that must be one of these names.
    pub(super) fn one_of<T: Copy>(
        &self,
        values: &[(&str, T)],
        problems: &mut Problems,
    ) -> Option<T> {
        let text = self.text(problems)?;
        let found = values.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let names: Vec<String> = values.iter().map(|(name, _)| quoted(name)).collect();
            self.invalid(text, format!("must be one of: {}", names.join(", ")), problems);
        }
        found
    }

    pub(super) fn boolean(&self, problems: &mut Problems) -> Option<bool> {
        match &self.node?.value {
            Value::Bool(value) => Some(*value),
            _ => {
                self.wrong_type("true or false", problems);
                None
            }
        }
    }

    /// A whole number in this range.
    pub(super) fn integer<T: TryFrom<i128>>(
        &self,
        range: std::ops::RangeInclusive<i128>,
        problems: &mut Problems,
    ) -> Option<T> {
        let Value::Int(value) = &self.node?.value else {
            self.wrong_type("a whole number", problems);
            return None;
        };
        let fits = range.contains(value).then(|| T::try_from(*value).ok()).flatten();
        if fits.is_none() {
            let reason = format!("must be {} to {}", range.start(), range.end());
            self.invalid(value.to_string(), reason, problems);
        }
        fits
    }

    /// A quantity: text or, as Kubernetes has it, a number.
    pub(super) fn quantity(&self, problems: &mut Problems) -> Option<(Quantity, String)> {
        let text = match &self.node?.value {
            Value::Text(text) => text.clone(),
            Value::Int(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            _ => {
                self.wrong_type("a quantity", problems);
                return None;
            }
        };
        match Quantity::parse(&text) {
            Ok(quantity) => Some((quantity, text)),
            Err(error) => {
                self.invalid(&text, error.to_string(), problems);
                None
            }
        }
    }

    /// The items of a list; none if it is absent.
    pub(super) fn items(&self, problems: &mut Problems) -> Vec<View<'n>> {
        match self.node.map(|node| &node.value) {
            None => Vec::new(),
            Some(Value::List(items)) => items
                .iter()
                .enumerate()
                .map(|(i, node)| self.at(node, format!("{}[{i}]", self.path)))
                .collect(),
            Some(_) => {
                self.wrong_type("a list", problems);
                Vec::new()
            }
        }
    }

    /// As [`View::items`], of objects: what is not one is noted and left out.
    pub(super) fn objects(&self, problems: &mut Problems) -> Vec<View<'n>> {
        let mut items = self.items(problems);
        items.retain(|item| {
            item.require(problems);
            item.is_present() && item.is_object(problems)
        });
        items
    }

    /// Whether it is a mapping or absent; anything else is noted.
    pub(super) fn is_object(&self, problems: &mut Problems) -> bool {
        let fine = matches!(self.node.map(|node| &node.value), None | Some(Value::Map(_)));
        if !fine {
            self.wrong_type("a mapping", problems);
        }
        fine
    }

    pub(super) fn is_empty_list(&self) -> bool {
        matches!(self.node.map(|node| &node.value), Some(Value::List(items)) if items.is_empty())
    }

    /// The texts of a list.
    pub(super) fn texts(&self, problems: &mut Problems) -> Vec<String> {
        let items = self.items(problems);
        items
            .iter()
            .filter_map(|item| {
                item.require(problems);
                item.text(problems).map(str::to_owned)
            })
            .collect()
    }

    /// The entries of a mapping with free keys, each with its path and place.
    pub(super) fn entries(&self, problems: &mut Problems) -> Vec<(&'n str, View<'n>)> {
        match self.node.map(|node| &node.value) {
            None => Vec::new(),
            Some(Value::Map(entries)) => entries
                .iter()
                .map(|Entry { key, node, .. }| {
                    let path = format!("{}['{}']", self.path, quoted(key));
                    (key.as_str(), self.at(node, path))
                })
                .collect(),
            Some(_) => {
                self.wrong_type("a mapping", problems);
                Vec::new()
            }
        }
    }
}

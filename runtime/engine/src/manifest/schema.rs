//! The shape of a Pod as a table: which fields Kubernetes has, and what husk does with each.
//!
//! One table ([`super::fields`]) drives the check of every manifest and the reference in
//! `docs/pod-manifest.md`, so neither can say what the other does not.

use super::problem::{Problem, ProblemKind, Problems, quoted};
use super::tree::{Entry, Node, Place, Value};

/// One field of an object.
#[derive(Debug)]
pub(super) struct Field {
    /// Its name; `*` at its beginning or end stands for any text (used for names of resources).
    pub(super) name: &'static str,
    pub(super) support: Support,
    pub(super) shape: Shape,
}

/// What husk does with a field. The notes are for the reference (`docs.rs`, a test).
#[derive(Debug)]
#[cfg_attr(not(test), allow(dead_code))]
pub(super) enum Support {
    /// It is honoured. With what is to be said about how.
    Yes(&'static str),
    /// It is accepted with any value, and changes nothing, for this reason.
    NoEffect(&'static str),
    /// Only these values are accepted, for this reason.
    Only(&'static [Literal], &'static str),
    /// Not supported yet.
    NotYet,
}

/// A value in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Literal {
    Bool(bool),
    Int(i128),
    Text(&'static str),
}

/// What a field that is honoured contains.
#[derive(Debug)]
pub(super) enum Shape {
    /// A value whose type is checked where it is read; also a mapping with free keys.
    Value,
    Object(&'static [Field]),
    List(&'static [Field]),
}

pub(super) const fn yes(name: &'static str, note: &'static str) -> Field {
    Field { name, support: Support::Yes(note), shape: Shape::Value }
}

pub(super) const fn object(
    name: &'static str,
    fields: &'static [Field],
    note: &'static str,
) -> Field {
    Field { name, support: Support::Yes(note), shape: Shape::Object(fields) }
}

pub(super) const fn list(
    name: &'static str,
    fields: &'static [Field],
    note: &'static str,
) -> Field {
    Field { name, support: Support::Yes(note), shape: Shape::List(fields) }
}

pub(super) const fn no_effect(name: &'static str, why: &'static str) -> Field {
    Field { name, support: Support::NoEffect(why), shape: Shape::Value }
}

pub(super) const fn only(
    name: &'static str,
    values: &'static [Literal],
    why: &'static str,
) -> Field {
    Field { name, support: Support::Only(values, why), shape: Shape::Value }
}

pub(super) const fn not_yet(name: &'static str) -> Field {
    Field { name, support: Support::NotYet, shape: Shape::Value }
}

impl Literal {
    fn is(self, value: &Value) -> bool {
        match (self, value) {
            (Literal::Bool(a), Value::Bool(b)) => a == *b,
            (Literal::Int(a), Value::Int(b)) => a == *b,
            (Literal::Text(a), Value::Text(b)) => a == b,
            _ => false,
        }
    }
}

impl std::fmt::Display for Literal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Literal::Bool(value) => write!(f, "{value}"),
            Literal::Int(value) => write!(f, "{value}"),
            Literal::Text(value) => f.write_str(value),
        }
    }
}

impl Field {
    fn matches(&self, key: &str) -> bool {
        match (self.name.strip_prefix('*'), self.name.strip_suffix('*')) {
            (Some(_), Some(_)) => key.contains(self.name.trim_matches('*')),
            (None, Some(prefix)) => key.starts_with(prefix),
            (Some(suffix), None) => key.ends_with(suffix),
            (None, None) => key == self.name,
        }
    }
}

/// Reports every field below `node` that is unknown or cannot be honoured. What is not a mapping
/// or a list where one is expected is left to the reader.
pub(super) fn check(node: &Node, path: &str, fields: &'static [Field], problems: &mut Problems) {
    let Value::Map(entries) = &node.value else {
        return;
    };
    for entry in entries {
        let path = join(path, &entry.key);
        match fields.iter().find(|field| field.matches(&entry.key)) {
            Some(field) => check_field(field, entry, path, problems),
            None => problems.push(Problem {
                line: entry.key_place.line,
                column: entry.key_place.column,
                path,
                kind: ProblemKind::UnknownField { suggestion: nearest(&entry.key, fields) },
            }),
        }
    }
}

fn check_field(field: &'static Field, entry: &Entry, path: String, problems: &mut Problems) {
    let Entry { node, .. } = entry;
    if matches!(node.value, Value::Null) {
        return;
    }
    let mut refuse = |place: Place, kind| {
        problems.push(Problem { line: place.line, column: place.column, path: path.clone(), kind });
    };
    match &field.support {
        Support::NoEffect(_) => {}
        Support::NotYet if node.value.is_empty() => {}
        Support::NotYet => refuse(entry.key_place, ProblemKind::NotSupported),
        Support::Only(values, _) if values.iter().any(|value| value.is(&node.value)) => {}
        Support::Only(values, why) => {
            let value = match &node.value {
                Value::Text(text) => quoted(text),
                Value::Bool(value) => value.to_string(),
                Value::Int(value) => value.to_string(),
                other => other.describe(),
            };
            refuse(
                node.place,
                ProblemKind::ValueNotSupported {
                    value,
                    reason: format!("only {} is supported: {why}", or_list(values)),
                },
            );
        }
        Support::Yes(_) => match (&field.shape, &node.value) {
            (Shape::Object(fields), _) => check(node, &path, fields, problems),
            (Shape::List(fields), Value::List(items)) => {
                for (i, item) in items.iter().enumerate() {
                    check(item, &format!("{path}[{i}]"), fields, problems);
                }
            }
            _ => {}
        },
    }
}

/// `a`, `a or b`, `a or b or c`.
pub(super) fn or_list(values: &[Literal]) -> String {
    values.iter().map(Literal::to_string).collect::<Vec<_>>().join(" or ")
}

/// The path of a field of the object at `path`.
pub(super) fn join(path: &str, key: &str) -> String {
    match (path.is_empty(), key.contains(['.', '/', '[', ' '])) {
        (true, _) => quoted(key),
        (false, false) => format!("{path}.{}", quoted(key)),
        (false, true) => format!("{path}['{}']", quoted(key)),
    }
}

/// The name that the writer of an unknown one probably meant: at most a third of it differs.
fn nearest(key: &str, fields: &'static [Field]) -> Option<&'static str> {
    const LONGEST: usize = 64;
    if key.len() > LONGEST {
        return None;
    }
    let key = key.to_lowercase();
    fields
        .iter()
        .filter(|field| !field.name.contains('*'))
        .map(|field| (distance(&key, &field.name.to_lowercase()), field.name))
        .min()
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3).min(3))
        .map(|(_, name)| name)
}

/// Damerau-Levenshtein distance with adjacent transpositions (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, &ca) in a.iter().enumerate() {
        let mut row = vec![i.saturating_add(1)];
        for (j, &cb) in b.iter().enumerate() {
            let at = |row: &[usize], column: usize| row.get(column).copied().unwrap_or(usize::MAX);
            let next = j.saturating_add(1);
            let mut best = at(&last, next)
                .saturating_add(1)
                .min(at(&row, j).saturating_add(1))
                .min(at(&last, j).saturating_add(usize::from(ca != cb)));
            if let (Some(i1), Some(j1)) = (i.checked_sub(1), j.checked_sub(1))
                && a.get(i1) == Some(&cb)
                && b.get(j1) == Some(&ca)
            {
                best = best.min(at(&before_last, j1).saturating_add(1));
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits_and_transpositions() {
        for (a, b, expected) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("image", "imagee", 1),
            ("image", "imgae", 1),
            ("command", "comand", 1),
            ("args", "env", 4),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn a_near_name_is_suggested_and_a_far_one_is_not() {
        const FIELDS: &[Field] = &[yes("image", ""), yes("imagePullPolicy", ""), yes("env", "")];
        assert_eq!(nearest("imagee", FIELDS), Some("image"));
        assert_eq!(nearest("ImagePullpolicy", FIELDS), Some("imagePullPolicy"));
        assert_eq!(nearest("environment", FIELDS), None);
        assert_eq!(nearest(&"e".repeat(100_000), FIELDS), None);
    }

    #[test]
    fn patterns_match_names_of_resources() {
        assert!(not_yet("hugepages-*").matches("hugepages-2Mi"));
        assert!(!not_yet("hugepages-*").matches("hugepage"));
        assert!(not_yet("*/*").matches("nvidia.com/gpu"));
        assert!(!not_yet("*/*").matches("cpu"));
    }
}

//! JSON, read strictly and within bounds.

use serde::Deserialize;
use serde_json::Value;

use super::SpecError;

/// Most values of a document, and most lists and objects among them. A document in memory is many
/// times as large as its text (an object of six bytes takes more than 600), and the text can have
/// 4 MiB, the largest message of gRPC. A container's arguments and environment have about 200,000
/// words at most, if each has one letter (they must fit into a quarter of its stack); a profile of
/// as many rules as are accepted has 50,000 lists and objects.
const MAX_VALUES: usize = 262_144;
const MAX_COLLECTIONS: usize = 65_536;

/// Deserialises, and refuses every field that was not read.
pub(super) fn strict<'de, T: Deserialize<'de>>(json: &[u8]) -> Result<T, SpecError> {
    check_size(json)?;
    let mut value: Value = serde_json::from_slice(json).map_err(SpecError::Json)?;
    prune(&mut value);
    check_nul(&value)?;
    let mut unread = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unread.push(field_name(&path.to_string()));
    let checked = serde_ignored::Deserializer::new(value, &mut note);
    let parsed = serde_path_to_error::deserialize(checked).map_err(|e| {
        let path = field_name(&e.path().to_string());
        SpecError::Value { path, source: e.into_inner() }
    })?;
    if unread.is_empty() { Ok(parsed) } else { Err(SpecError::Unsupported(unread)) }
}

/// How many values a document has at most, and how many of them are lists and objects.
fn count(json: &[u8]) -> (usize, usize) {
    // The document itself, and then one value after each of these.
    let (mut values, mut collections) = (1_usize, 0_usize);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                collections = collections.saturating_add(1);
                values = values.saturating_add(1);
            }
            b',' => values = values.saturating_add(1),
            b'"' => skip_string(&mut bytes),
            _ => {}
        }
    }
    (values, collections)
}

/// Refuses a document that would take too much memory, before it takes any.
fn check_size(json: &[u8]) -> Result<(), SpecError> {
    let (values, collections) = count(json);
    for (what, count, most) in
        [("lists and objects", collections, MAX_COLLECTIONS), ("values", values, MAX_VALUES)]
    {
        if count > most {
            return Err(SpecError::TooLarge { what, count, most });
        }
    }
    Ok(())
}

/// Goes on behind the end of a string, or to the end of what is no JSON.
fn skip_string<'a>(bytes: &mut impl Iterator<Item = &'a u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
}

/// Refuses NULs: nothing that the kernel is given by name can have one. Annotations are not given to
/// it, and must not be an error.
fn check_nul(document: &Value) -> Result<(), SpecError> {
    let found = match document {
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, _)| *name != "annotations")
            .find_map(|(name, value)| nul_in_field(name, value, name.clone())),
        other => find_nul(other, String::new()),
    };
    match found {
        None => Ok(()),
        Some((path, text)) => Err(SpecError::invalid(path, text, "must not contain a NUL")),
    }
}

/// The path of a string or name with a NUL, and its text. Its depth is that of the document.
fn find_nul(value: &Value, path: String) -> Option<(String, String)> {
    match value {
        Value::String(text) => text.contains('\0').then(|| (path, text.clone())),
        Value::Array(items) => items.iter().enumerate().find_map(|(index, item)| match item {
            // Most are: then there is no need for a path.
            Value::String(text) if !text.contains('\0') => None,
            item => find_nul(item, format!("{path}[{index}]")),
        }),
        Value::Object(fields) => fields
            .iter()
            .find_map(|(name, value)| nul_in_field(name, value, format!("{path}.{name}"))),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn nul_in_field(name: &str, value: &Value, path: String) -> Option<(String, String)> {
    if name.contains('\0') {
        return Some((path.replace('\0', "\\0"), name.to_owned()));
    }
    find_nul(value, path)
}

/// The path of a field as people write it: `mounts[7].source`, without the marks that the library
/// puts for `Option`, and with a word for the whole.
fn field_name(path: &str) -> String {
    match path {
        "." => "the document".to_owned(),
        path => {
            let is_index =
                |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
            let join = |path: String, part: &str| match path.is_empty() {
                true => part.to_owned(),
                false if is_index(part) => format!("{path}[{part}]"),
                false => format!("{path}.{part}"),
            };
            path.replace(".?", "").split('.').fold(String::new(), join)
        }
    }
}

/// Removes what means the same as absent: nulls and empty arrays. Its depth is that of the parsed
/// document, which serde_json bounds.
fn prune(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, v| !v.is_null() && !v.as_array().is_some_and(Vec::is_empty));
            fields.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn size(json: &str) -> String {
        check_size(json.as_bytes()).map_or_else(|e| e.to_string(), |()| "fits".to_owned())
    }

    #[test]
    fn a_document_that_would_fill_the_memory_is_refused_by_its_text() {
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        assert_eq!(size(&list("0", MAX_VALUES - 1)), "fits");
        let words = "the document has 262145 values; must be at most 262144";
        assert_eq!(size(&list("0", MAX_VALUES)), words);
        assert_eq!(size(&list("{}", MAX_COLLECTIONS - 1)), "fits");
        let words = "the document has 65537 lists and objects; must be at most 65536";
        assert_eq!(size(&list("{}", MAX_COLLECTIONS)), words);
        assert!(size(&"[".repeat(1 << 20)).contains("lists and objects"));
    }

    #[test]
    fn what_is_in_strings_does_not_count() {
        assert_eq!(size(&format!("[\"{}\"]", "[{,\\\"".repeat(1 << 18))), "fits");
        assert_eq!(size("\"unfinished \\"), "fits");
    }

    #[test]
    fn a_nul_is_named_by_its_path() {
        let message = |value: Value| check_nul(&value).unwrap_err().to_string();
        let list = json!({"a": [{"b": ["x", "y\0"]}]});
        assert_eq!(message(list), "`a[0].b[1]`: must not contain a NUL, but it is \"y\\0\"");
        assert!(
            message(json!({"linux": {"sysctl": {"k\0": "v"}}})).contains("`linux.sysctl.k\\0`")
        );
        check_nul(&json!({"annotations": {"a\0": "b\0"}, "x": [1, null, "y"]})).unwrap();
    }

    proptest! {
        /// The count must not be lower than what serde_json makes of the text.
        #[test]
        fn no_value_escapes_the_count(text in "[\\[{}\\],:\"\\\\a0]{0,40}") {
            fn really(value: &Value) -> (usize, usize) {
                let (inner, own): (Vec<_>, usize) = match value {
                    Value::Array(items) => (items.iter().map(really).collect(), 1),
                    Value::Object(fields) => (fields.values().map(really).collect(), 1),
                    _ => (Vec::new(), 0),
                };
                inner.iter().fold((1, own), |(v, c), (values, lists)| (v + values, c + lists))
            }
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let ((values, lists), counted) = (really(&value), count(text.as_bytes()));
                prop_assert!(values <= counted.0 && lists <= counted.1, "{counted:?}");
            }
        }
    }
}

//! The reference in `docs/pod-manifest.md` is made from the table of fields. This test keeps it
//! true; `HUSK_UPDATE_DOCS=1 cargo test -p husk-engine docs` writes it anew.

use std::fmt::Write as _;
use std::path::Path;

use super::fields::{CONFIG_MAP, POD, SECRET};
use super::schema::{Field, Shape, Support, or_list};

const BEGIN: &str = "<!-- fields: made by runtime/engine/src/manifest/docs.rs; do not edit -->\n";
const END: &str = "<!-- end of fields -->\n";

#[derive(Default)]
struct Reference {
    honoured: String,
    fixed: String,
    no_effect: String,
    not_yet: String,
}

impl Reference {
    fn add(&mut self, fields: &[Field], prefix: &str) {
        // That of ConfigMaps and Secrets is that of Pods, and most of it has no effect there.
        if matches!(prefix, "ConfigMap.metadata" | "Secret.metadata") {
            return;
        }
        let mut refused = Vec::new();
        // The fields of init containers are those of containers, with one exception.
        let is_init = prefix == "spec.initContainers[]";
        for Field { name, support, shape } in fields {
            if is_init && *name != "restartPolicy" {
                continue;
            }
            let path = if prefix.is_empty() { (*name).into() } else { format!("{prefix}.{name}") };
            match (support, shape) {
                (Support::NotYet, _) => refused.push(format!("`{name}`")),
                (Support::NoEffect(why), _) => row(&mut self.no_effect, &path, why),
                (Support::Only(values, why), _) => {
                    let why = format!("`{}` | {why}", or_list(values).replace(" or ", "`, `"));
                    row(&mut self.fixed, &path, &why);
                }
                (Support::Yes(note), Shape::Value) => row(&mut self.honoured, &path, note),
                (Support::Yes(note), Shape::Object(fields)) => {
                    if !note.is_empty() {
                        row(&mut self.honoured, &path, note);
                    }
                    self.add(fields, &path);
                }
                (Support::Yes(note), Shape::List(fields)) => {
                    let path = format!("{path}[]");
                    if !note.is_empty() {
                        row(&mut self.honoured, &path, note);
                    }
                    self.add(fields, &path);
                }
            }
        }
        if !refused.is_empty() {
            row(&mut self.not_yet, prefix, &refused.join(", "));
        }
    }
}

fn row(table: &mut String, path: &str, text: &str) {
    writeln!(table, "| `{path}` | {text} |").expect("a String takes everything");
}

fn reference() -> String {
    let mut reference = Reference::default();
    reference.add(POD, "");
    reference.add(CONFIG_MAP, "ConfigMap");
    reference.add(SECRET, "Secret");
    let Reference { honoured, fixed, no_effect, not_yet } = reference;
    format!(
        "{BEGIN}\n\
         ### Honoured\n\n| Field | |\n|---|---|\n{honoured}\n\
         ### Honoured with some values only\n\n\
         Any other value is refused.\n\n\
         | Field | Values | Why |\n|---|---|---|\n{fixed}\n\
         ### Accepted, without effect\n\n| Field | Why |\n|---|---|\n{no_effect}\n\
         ### Not supported yet\n\n\
         Refused unless null or empty.\n\n\
         | In | Fields |\n|---|---|\n{not_yet}\n{END}"
    )
}

#[test]
fn the_reference_says_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/pod-manifest.md");
    let text = std::fs::read_to_string(&path).expect("docs/pod-manifest.md is there");
    let (before, rest) = text.split_once(BEGIN).expect("the reference begins");
    let (_, after) = rest.split_once(END).expect("the reference ends");
    let expected = format!("{before}{}{after}", reference());
    if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).expect("docs/pod-manifest.md can be written");
        return;
    }
    assert!(
        text == expected,
        "docs/pod-manifest.md is out of date: HUSK_UPDATE_DOCS=1 cargo test -p husk-engine docs"
    );
}

//! `docs/oci-conformance.md`, made from the rows.

use std::fmt::Write;

use crate::case::{Case, Expect};
use crate::cases::Row;
use crate::fields::SECTIONS;

const HEAD: &str = "\
# Conformance to the OCI runtime specification

Generated from `agent/tests/conformance`; do not edit. Each row is a test that passes: it runs the
same `config.json` in husk's agent and under the other runtime, and compares what a process in the
container prints. A test fails if a field of the specification's `config.json` (1.2.1, Linux) is in
no row, if a row does not set the fields that it names, or if this page is out of date.

- **as runc**, **as crun**: the process sees exactly the same under that runtime. It is runc unless
  its version in Debian 13 (1.1) does not know the field.
- **differs**: it sees something else, on purpose, for the reason given.
- **alone**: the outcome is checked, but no other runtime can be compared, for the reason given.
- **refused**: the container is not created, and the error names the field. No field is ever ignored
  unless this page says so.

Run one: `cargo test -p husk-agent --features runner-tests --test conformance TEST` as root.
";

/// The whole document.
pub(crate) fn render(rows: &[Row]) -> String {
    let mut text = HEAD.to_owned();
    for section in SECTIONS {
        let own: Vec<String> = section.paths().collect();
        // A row stands in each chapter of which it is about a field.
        let here = |row: &&Row| row.case.covered().iter().any(|path| own.contains(path));
        writeln!(text, "\n## {} ({})\n", section.title, section.file).unwrap();
        text.push_str("| Fields | husk | What is checked | Test |\n|---|---|---|---|\n");
        for Row { name, case } in rows.iter().filter(here) {
            let (verdict, why) = verdict(case);
            let checks = case.checks;
            let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
            writeln!(text, "| {} | {verdict} | {checks}{why} | `{name}` |", fields(case)).unwrap();
        }
    }
    text
}

/// The fields of a row, with the values of the specification's lists that it sets.
fn fields(case: &Case) -> String {
    let values = case.covered_values();
    let describe = |path: String| {
        let own: Vec<_> =
            values.iter().filter(|(f, _)| *f == path).map(|(_, v)| format!("`{v}`")).collect();
        if own.is_empty() { format!("`{path}`") } else { format!("`{path}`: {}", own.join(" ")) }
    };
    case.covered().into_iter().map(describe).collect::<Vec<_>>().join("<br>")
}

/// What husk does, and why if that needs a reason.
fn verdict(case: &Case) -> (String, &'static str) {
    match &case.expect {
        Expect::Same(reference, _) => (format!("as {}", reference.name()), ""),
        Expect::Differs { reference, why, .. } => {
            (format!("differs from {}", reference.name()), why)
        }
        Expect::Alone { why, .. } => ("alone".into(), why),
        Expect::Refused { why, .. } => ("refused".into(), why),
    }
}

//! The runner's conformance to the OCI runtime specification 1.2: every field of its `config.json` in
//! at least one row of a table, from which `docs/oci-conformance.md` is made.
//!
//! A row runs the same configuration in husk's agent (on this machine's own kernel, as `runner.rs`
//! does) and under runc or crun, and compares what a process prints. With the feature `runner-tests`
//! each row is a test of its own, which needs root, a static busybox and cgroup v2:
//! `cargo test -p husk-agent --features runner-tests --test conformance process::rlimits`.
//! Without the feature only the table itself is checked: that it is complete, that each row sets the
//! fields that it claims to be about, and that the document is up to date.
//!
//! Where a runtime is not in PATH, or the kernel has no such controller, the test says so on its
//! standard error; with `HUSK_CONFORMANCE_STRICT` set it fails.
#![allow(missing_docs)]
// What only the running of a row needs.
#![cfg_attr(not(feature = "runner-tests"), allow(dead_code))]

mod case;
mod cases;
mod document;
mod fields;
// Its other user is runner.rs: not everything is needed by both.
#[cfg(feature = "runner-tests")]
#[allow(dead_code)]
#[path = "../guest/mod.rs"]
mod guest;
#[cfg(feature = "runner-tests")]
mod reference;
#[cfg(feature = "runner-tests")]
mod run;

use std::collections::BTreeSet;

use cases::Row;
use fields::{SECTIONS, VALUES};

#[test]
fn every_field_of_the_specification_is_in_a_row() {
    let covered: BTreeSet<String> =
        cases::all().iter().flat_map(|row| row.case.covered()).collect();
    let missing: Vec<String> = SECTIONS
        .iter()
        .flat_map(|section| section.paths())
        .filter(|path| !covered.contains(path))
        .collect();
    assert_eq!(missing, [] as [String; 0], "these are in no row of agent/tests/conformance/cases");
}

#[test]
fn every_listed_value_of_the_specification_is_in_a_row() {
    let rows = cases::all();
    let covered: BTreeSet<_> = rows.iter().flat_map(|row| row.case.covered_values()).collect();
    let all = VALUES.iter().flat_map(|(field, values)| values.iter().map(move |v| (*field, *v)));
    let missing: Vec<_> = all.filter(|value| !covered.contains(value)).collect();
    assert_eq!(missing, [], "no row sets these values");
}

#[test]
fn every_row_sets_the_fields_that_it_is_about_and_could_fail() {
    for Row { name, case } in cases::all() {
        assert_eq!(case.faults(), [] as [String; 0], "{name}");
    }
}

#[test]
fn names_of_rows_are_unique() {
    let rows = cases::all();
    let names: BTreeSet<_> = rows.iter().map(|row| &row.name).collect();
    assert_eq!(names.len(), rows.len());
}

#[test]
fn the_document_is_up_to_date() {
    let expected = document::render(&cases::all());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/oci-conformance.md");
    if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
        std::fs::write(path, &expected).unwrap();
        return;
    }
    // As it was when this was compiled: the test may run where there is no checkout.
    let written = include_str!("../../../docs/oci-conformance.md");
    assert!(
        written == expected,
        "docs/oci-conformance.md is out of date: \
         HUSK_UPDATE_DOCS=1 cargo test -p husk-agent --test conformance"
    );
}

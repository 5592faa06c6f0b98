//! The rows, by chapter of the specification.

mod hooks;
mod kernel;
mod mounts;
mod namespaces;
mod process;
mod resources;
mod root;
mod seccomp;

use crate::case::Case;

/// A row and the test that runs it.
pub(crate) struct Row {
    /// As the test's own name, without `cases::`.
    pub(crate) name: String,
    pub(crate) case: Case,
}

/// Makes each `name => case` a row and, with the feature `runner-tests`, a test of that name.
macro_rules! rows {
    ($($name:ident => $case:expr;)*) => {
        pub(super) fn rows() -> Vec<(&'static str, $crate::case::Case)> {
            vec![$((stringify!($name), $case)),*]
        }

        $(
            #[cfg(feature = "runner-tests")]
            #[tokio::test]
            async fn $name() {
                $crate::run::check(stringify!($name), $case).await;
            }
        )*
    };
}
use rows;

/// Every row.
pub(crate) fn all() -> Vec<Row> {
    let modules = [
        ("root", root::rows()),
        ("mounts", mounts::rows()),
        ("process", process::rows()),
        ("hooks", hooks::rows()),
        ("namespaces", namespaces::rows()),
        ("resources", resources::rows()),
        ("seccomp", seccomp::rows()),
        ("kernel", kernel::rows()),
    ];
    modules.into_iter().flat_map(|(module, rows)| named(module, rows)).collect()
}

fn named(module: &str, rows: Vec<(&str, Case)>) -> impl Iterator<Item = Row> {
    rows.into_iter().map(move |(name, case)| Row { name: format!("{module}::{name}"), case })
}

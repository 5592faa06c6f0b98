//! What can be wrong with a manifest, and how it is said.

use std::fmt;

/// Most problems that are reported of one source; of the rest, only the number.
const MAX_PROBLEMS: usize = 50;

/// Longest value that is quoted, in characters.
const MAX_QUOTED: usize = 80;

/// Why a manifest cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is longer than [`super::MAX_LEN`].
    #[error("{source_name}: {len} bytes long; a manifest has at most {} bytes", super::MAX_LEN)]
    TooLong {
        /// Where the manifest came from.
        source_name: String,
        /// Its length in bytes.
        len: usize,
    },
    /// It is not YAML, or YAML that would take too much to read.
    #[error("{source_name}:{line}:{column}: {reason}")]
    Yaml {
        /// Where the manifest came from.
        source_name: String,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: u64,
        /// What is wrong there.
        reason: String,
    },
    /// There is no document in it.
    #[error("{source_name}: no Pod in it")]
    Empty {
        /// Where the manifest came from.
        source_name: String,
    },
    /// There is nothing in it that a running pod can take over.
    #[error("{source_name}: no ConfigMap, Secret or Pod in it")]
    Nothing {
        /// Where it came from.
        source_name: String,
    },
    /// Documents in it are not Pods that husk can run.
    #[error("{0}")]
    Invalid(Problems),
}

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line of the field, or of the object that lacks it, from 1.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
    /// The field, e.g. `spec.containers[0].image`.
    pub path: String,
    /// What is wrong with it.
    pub kind: ProblemKind,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProblemKind {
    /// Kubernetes has no such field.
    #[error("unknown field{}", .suggestion.map(|s| format!(", did you mean {s}?")).unwrap_or_default())]
    UnknownField {
        /// A field of the same object with nearly that name.
        suggestion: Option<&'static str>,
    },
    /// Kubernetes has the field, husk does not honour it.
    #[error("not supported yet")]
    NotSupported,
    /// Kubernetes has the field, husk honours only some of its values.
    #[error("{value}: {reason}")]
    ValueNotSupported {
        /// The value.
        value: String,
        /// Why not, and what would be.
        reason: String,
    },
    /// A field that must be there is not.
    #[error("required")]
    Required,
    /// The value is of the wrong type.
    #[error("must be {expected}, but is {found}")]
    WrongType {
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The value is not allowed.
    #[error("{value}: {reason}")]
    Invalid {
        /// The value.
        value: String,
        /// Why not.
        reason: String,
    },
}

/// All that is wrong with the documents of one source, in their order. Displayed one per line, as
/// `SOURCE:LINE:COLUMN: PATH: PROBLEM`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    source_name: String,
    list: Vec<Problem>,
    more: usize,
}

impl Problems {
    pub(super) fn new(source_name: &str) -> Self {
        Problems { source_name: source_name.into(), list: Vec::new(), more: 0 }
    }

    pub(super) fn push(&mut self, problem: Problem) {
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(problem);
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// An empty list of the same source.
    pub(super) fn fork(&self) -> Self {
        Problems::new(&self.source_name)
    }

    pub(super) fn append(&mut self, other: Self) {
        for problem in other.list {
            self.push(problem);
        }
        self.more = self.more.saturating_add(other.more);
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The problems, at most 50 of them.
    #[must_use]
    pub fn list(&self) -> &[Problem] {
        &self.list
    }

    /// Sorts by place, so that a reader meets the problems in the order of the document.
    pub(super) fn sort(&mut self) {
        self.list.sort_by_key(|problem| (problem.line, problem.column));
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Problem { line, column, path, kind }) in self.list.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{}:{line}:{column}: {path}: {kind}", self.source_name)?;
        }
        if self.more > 0 {
            write!(f, "\n{}: and {} more problems", self.source_name, self.more)?;
        }
        Ok(())
    }
}

/// A text as part of a message: control characters escaped, the end of a long one left out.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for c in text.chars().take(MAX_QUOTED) {
        if c.is_control() {
            quoted.extend(c.escape_default());
        } else {
            quoted.push(c);
        }
    }
    if text.chars().nth(MAX_QUOTED).is_some() {
        quoted.push_str("...");
    }
    if quoted.is_empty() { "\"\"".into() } else { quoted }
}

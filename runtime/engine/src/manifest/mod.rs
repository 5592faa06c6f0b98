//! Pod manifests: YAML (or JSON) of Kubernetes v1 Pods, made into [`PodSpec`]s.
//!
//! A manifest that husk cannot run as Kubernetes would is refused, and every reason is named by the
//! path of its field: nothing is dropped silently. What is supported is one table (`fields`), from
//! which `docs/pod-manifest.md` is made.
//!
//! ```text
//!  text --tree--> nodes with places --schema--> unknown and unsupported fields
//!                        |
//!                        +---pod, container, env, security---> PodSpec, or what is wrong
//! ```

mod apply;
mod container;
mod device;
mod disk;
mod dns;
#[cfg(test)]
mod docs;
mod env;
mod fields;
mod mount;
mod names;
mod objects;
mod pod;
mod probe;
mod problem;
mod quantity;
mod schema;
mod security;
#[cfg(test)]
mod tests;
mod tree;
mod view;
mod volume;

use std::collections::BTreeSet;

use self::objects::{Kind, Objects};
use self::tree::Node;
use crate::types::PodSpec;

pub use apply::{Applied, Documents, check_applicable};
pub use problem::{ManifestError, Problem, ProblemKind, Problems};
pub use quantity::{MAX_FRACTION_DIGITS, Quantity, QuantityError};
pub use tree::MAX_LEN;

/// Reads all Pods of a manifest, with the defaults that an API server would set. ConfigMaps and
/// Secrets of the same manifest, wherever they stand in it, are what the Pods can refer to.
///
/// `source_name` is how messages call the manifest, usually the path of its file.
///
/// # Errors
/// If the text is not YAML, holds no document, or anything in any document is wrong. All problems
/// are in the error (up to 50).
pub fn parse(text: &str, source_name: &str) -> Result<Vec<PodSpec>, ManifestError> {
    let documents = tree::read(text, source_name)?;
    if documents.is_empty() {
        return Err(ManifestError::Empty { source_name: source_name.into() });
    }
    let mut problems = Problems::new(source_name);
    let (objects, pod_documents) = sort(&documents, &mut problems);
    if pod_documents.is_empty() && problems.is_empty() {
        return Err(ManifestError::Empty { source_name: source_name.into() });
    }
    let mut pods = Vec::new();
    let mut seen = BTreeSet::new();
    for document in pod_documents {
        let Some(pod) = pod::read(document, &objects, &mut problems) else {
            continue;
        };
        let name = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
        if !seen.insert(name) {
            let view = view::View::root(document).get("metadata").get("name");
            let reason = "an earlier document is a Pod of this name in this namespace";
            view.invalid(&pod.metadata.name, reason, &mut problems);
        }
        pods.push(pod);
    }
    if problems.is_empty() {
        return Ok(pods);
    }
    problems.sort();
    Err(ManifestError::Invalid(problems))
}

/// The ConfigMaps and Secrets of a source, and what else is in it: what should be Pods.
fn sort<'d>(documents: &'d [Node], problems: &mut Problems) -> (Objects, Vec<&'d Node>) {
    let mut objects = Objects::default();
    let mut others = Vec::new();
    for document in documents {
        let kind = view::View::root(document).get("kind").text(&mut problems.fork());
        match kind.and_then(Kind::of) {
            Some(kind) => objects.add(document, kind, problems),
            None => others.push(document),
        }
    }
    (objects, others)
}

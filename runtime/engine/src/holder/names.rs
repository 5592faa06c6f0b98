//! How a person names a pod: `name`, `namespace/name`, or the beginning of its uid.

use super::record::Found;

/// Least length of the beginning of a uid.
const MIN_PREFIX: usize = 4;

/// Why a name does not lead to a pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// To none.
    #[error("there is no pod {name:?}; `husk ps -a` lists them all")]
    NotFound {
        /// The name.
        name: String,
    },
    /// To several.
    #[error("{name:?} is the name of several pods; say which by the beginning of its uid: {}", candidates.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// What it may mean: names and uids.
        candidates: Vec<String>,
    },
}

/// The pod of this name among these. A bare name is looked for in the namespace `default` first,
/// and then in all others; a name wins over the beginning of a uid, and a pod that runs over those
/// of its name that have ended.
///
/// # Errors
/// [`NameError`].
pub fn resolve<'a>(pods: &'a [Found], wanted: &str) -> Result<&'a Found, NameError> {
    let attempts: [&dyn Fn(&Found) -> bool; 3] = match wanted.split_once('/') {
        Some((namespace, name)) => [
            &move |found| found.pod.namespace == namespace && found.pod.name == name,
            &|_| false,
            &|_| false,
        ],
        None => [
            &|found| found.pod.namespace == "default" && found.pod.name == wanted,
            &|found| found.pod.name == wanted,
            &|found| wanted.len() >= MIN_PREFIX && found.pod.uid.starts_with(wanted),
        ],
    };
    for matches in attempts {
        let all: Vec<&Found> = pods.iter().filter(|found| matches(found)).collect();
        let held: Vec<&Found> = all.iter().copied().filter(|found| found.held).collect();
        match (held.as_slice(), all.as_slice()) {
            ([], []) => {}
            ([only], _) | ([], [only]) => return Ok(only),
            ([], several) | (several, _) => {
                return Err(NameError::Ambiguous {
                    name: wanted.to_owned(),
                    candidates: several
                        .iter()
                        .map(|found| format!("{} ({})", found.pod.full_name(), found.pod.uid))
                        .collect(),
                });
            }
        }
    }
    Err(NameError::NotFound { name: wanted.to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::record::tests::found;
    use super::*;

    #[test]
    fn names_lead_to_pods() {
        let pods = [
            found("default", "web", "aaaa-1", true),
            found("other", "web", "bbbb-1", true),
            found("other", "db", "bbbb-2", false),
        ];
        let uid = |name: &str| resolve(&pods, name).map(|found| found.pod.uid.clone());
        assert_eq!(uid("web").as_deref(), Ok("aaaa-1"), "default comes first");
        assert_eq!(uid("other/web").as_deref(), Ok("bbbb-1"));
        assert_eq!(uid("db").as_deref(), Ok("bbbb-2"), "the only one of its name");
        assert_eq!(uid("aaaa").as_deref(), Ok("aaaa-1"));
        assert_eq!(uid("bbbb").as_deref(), Ok("bbbb-1"), "the one that runs");
        assert!(matches!(uid("aaa"), Err(NameError::NotFound { .. })), "too short");
        assert!(matches!(uid("default/db"), Err(NameError::NotFound { .. })));
    }

    #[test]
    fn several_that_run_are_not_chosen_from() {
        let pods = [found("default", "p", "aaaa-1", true), found("default", "p", "aaaa-2", true)];
        let Err(NameError::Ambiguous { candidates, .. }) = resolve(&pods, "p") else {
            panic!("one was chosen");
        };
        assert_eq!(candidates, ["default/p (aaaa-1)", "default/p (aaaa-2)"]);
        assert_eq!(resolve(&pods, "aaaa-2").unwrap().pod.uid, "aaaa-2");
    }
}

//! A row of the table: a configuration, what the process then sees, and what that is compared with.

use serde_json::{Map, Value, json};

use crate::fields::{SECTIONS, VALUES};

/// Another runtime, whose process must see the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reference {
    Runc,
    /// For what runc 1.1, which Debian 13 has, does not know yet.
    Crun,
}

impl Reference {
    /// Its program.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }
}

/// What becomes of a case.
#[derive(Debug)]
pub(crate) enum Expect {
    /// The process prints this, and exactly the same under the reference.
    Same(Reference, &'static str),
    /// The process prints `husk`, but `other` under the reference, and this is why.
    Differs { reference: Reference, husk: &'static str, other: &'static str, why: &'static str },
    /// The process prints this; no other runtime can run it, and this is why.
    Alone { prints: &'static str, why: &'static str },
    /// The container is not created, and the error names the field.
    Refused { named: &'static str, why: &'static str },
}

/// A row.
#[derive(Debug)]
pub(crate) struct Case {
    /// What is checked, in words, for the document.
    pub(crate) checks: &'static str,
    /// The fields that it is about; one that ends in `.` or `[]` stands for all below it.
    pub(crate) fields: &'static [&'static str],
    /// What it changes in [`base`]. An object is merged, anything else replaced, except that `key+`
    /// appends to the array `key`. `{volume}` is a directory with a file `file`, `{layer}` one with
    /// the image, both in the runtime's view; `{disk major}` and `{disk minor}` are the numbers of a
    /// disk.
    pub(crate) sets: Value,
    /// The script that the process runs; empty if `sets` has arguments.
    pub(crate) probe: &'static str,
    /// Controllers of cgroup v2 without which it cannot run.
    pub(crate) needs: &'static [&'static str],
    pub(crate) expect: Expect,
}

/// Shell functions for probes. `mnt PATH`: a mount's point, options, propagation and type, without
/// what differs from one machine to the next: the numbers of peer groups, and whether it receives
/// from one, which is so only if the machine shares the mount's source. `super PATH`: the options of
/// its file system.
const FUNCTIONS: &str = r#"
mnt() {
  for p in "$@"; do
    awk -v p="$p" '$5 == p {
      o = ""
      for (i = 7; $i != "-"; i++) if ($i ~ /^(shared|unbindable)/) { sub(/:.*/, "", $i); o = o " " $i }
      print $5, $6 o, "-", $(i + 1)
    }' /proc/self/mountinfo
  done
}
super() { awk -v p="$1" '$5 == p { sub(/,inode64/, "", $NF); print $5, $NF }' /proc/self/mountinfo; }
"#;

/// A `config.json` that both runtimes take, with namespaces of its own.
fn base() -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
        "root": {"path": "rootfs"},
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts",
                  &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=1024k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "cgroupsPath": "{cgroup}",
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"},
                           {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

/// Changes `to` as [`Case::sets`] says.
fn merge(to: &mut Value, from: &Value) {
    let Value::Object(changes) = from else {
        *to = from.clone();
        return;
    };
    if !to.is_object() {
        *to = Value::Object(Map::new());
    }
    for (key, change) in changes {
        match (key.strip_suffix('+'), change) {
            (Some(key), Value::Array(more)) => {
                to[key].as_array_mut().expect("an array to append to").extend(more.clone());
            }
            _ => merge(&mut to[key.as_str()], change),
        }
    }
}

/// Replaces placeholders in all strings; a string that is nothing but one may become a number.
fn fill_in(value: &mut Value, places: &[(&str, &str)]) {
    match value {
        Value::String(text) => {
            for (name, place) in places {
                if text == name
                    && let Ok(number) = place.parse::<u64>()
                {
                    *value = json!(number);
                    return;
                }
                *text = text.replace(name, place);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| fill_in(item, places)),
        Value::Object(fields) => fields.values_mut().for_each(|field| fill_in(field, places)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Values at a path in a change, e.g. `process.rlimits[].soft`: none if it does not have that field.
fn at<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![value];
    for part in path.split('.') {
        let (key, elements) = match part.strip_suffix("[]") {
            Some(key) => (key, true),
            None => (part, false),
        };
        found = found
            .into_iter()
            .filter_map(Value::as_object)
            .flat_map(|object| {
                object.iter().filter(|(k, _)| key == "*" || k.trim_end_matches('+') == key)
            })
            .map(|(_, value)| value)
            .collect();
        if elements {
            found = found.into_iter().filter_map(Value::as_array).flatten().collect();
        }
    }
    found
}

impl Case {
    /// The whole `config.json`, with these in the places of its placeholders.
    pub(crate) fn config(&self, places: &[(&str, &str)]) -> Value {
        let mut config = base();
        merge(&mut config, &self.sets);
        let script = format!("{FUNCTIONS}{}", self.probe);
        let args = &mut config["process"]["args"];
        if args.is_null() {
            *args = json!(["sh", "-c", script]);
        }
        fill_in(&mut config, places);
        config
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.sets["process"]["terminal"] == true
    }

    /// The fields of the specification that it is about.
    pub(crate) fn covered(&self) -> Vec<String> {
        let stands_for = |given: &str, path: &str| match given.strip_suffix('.') {
            Some(object) => path.starts_with(object) && path[object.len()..].starts_with('.'),
            None if given.ends_with("[]") => path.starts_with(&format!("{given}.")),
            None => path == given,
        };
        SECTIONS
            .iter()
            .flat_map(|section| section.paths())
            .filter(|path| self.fields.iter().any(|given| stands_for(given, path)))
            .collect()
    }

    /// The values of the specification's lists that it sets, as (field, value).
    pub(crate) fn covered_values(&self) -> Vec<(&'static str, &'static str)> {
        let covered = self.covered();
        let mut all = Vec::new();
        for (field, values) in VALUES.iter().filter(|(f, _)| covered.iter().any(|c| c == f)) {
            let given = at(&self.sets, field);
            let has = |wanted: &str| {
                given.iter().any(|value| match value {
                    Value::Array(items) => items.iter().any(|item| item == wanted),
                    value => *value == wanted,
                })
            };
            all.extend(values.iter().filter(|value| has(value)).map(|value| (*field, *value)));
        }
        all
    }

    /// What is wrong with the row itself: a claim that it does not keep.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let covered = self.covered();
        for given in self.fields {
            let prefix = given.trim_end_matches('.');
            if !covered.iter().any(|path| path.starts_with(prefix)) {
                faults.push(format!("{given} is no field of the specification"));
            }
        }
        let not_set = covered.iter().filter(|path| at(&self.sets, path).is_empty());
        faults.extend(not_set.map(|path| format!("its configuration does not set {path}")));
        if covered.is_empty() {
            faults.push("it is about no field".into());
        }
        let has_arguments = !self.sets["process"]["args"].is_null();
        let runs = !matches!(self.expect, Expect::Refused { .. });
        if runs && has_arguments != self.probe.is_empty() {
            faults.push("it must have either a probe or arguments".into());
        }
        if !runs && !self.probe.is_empty() {
            faults.push("it has a probe that never runs".into());
        }
        let silent = match &self.expect {
            Expect::Same(_, prints) | Expect::Alone { prints, .. } => prints.trim().is_empty(),
            Expect::Differs { husk, other, .. } => husk.trim().is_empty() || husk == other,
            Expect::Refused { named, .. } => named.is_empty(),
        };
        if silent {
            faults.push("it expects nothing that could fail".into());
        }
        faults
    }
}

/// Whether `text` is as `pattern` says, line by line; `*` in a line is anything.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let line = |pattern: &str, mut text: &str| {
        let mut parts = pattern.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(rest) = text.strip_prefix(first) else { return false };
        text = rest;
        let parts: Vec<&str> = parts.collect();
        let Some((last, middle)) = parts.split_last() else { return text.is_empty() };
        for part in middle {
            match text.split_once(part) {
                Some((_, rest)) => text = rest,
                None => return false,
            }
        }
        text.ends_with(last)
    };
    let (wanted, given): (Vec<&str>, Vec<&str>) =
        (pattern.lines().collect(), text.lines().collect());
    wanted.len() == given.len() && wanted.iter().zip(given).all(|(p, t)| line(p, t))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_whole_lines() {
        assert!(matches("a*c\nd", "abbc\nd\n"));
        assert!(matches("*", "anything"));
        assert!(matches("ab", "ab"));
        for text in ["abc\nd\ne", "abc", "xabc\nd", "abcx\nd"] {
            assert!(!matches("a*c\nd", text), "{text:?}");
        }
    }

    #[test]
    fn a_change_appends_replaces_and_is_found_by_its_path() {
        let mut config = base();
        let change = json!({"mounts+": [{"destination": "/x"}], "process": {"env": ["A=1"]}});
        merge(&mut config, &change);
        assert_eq!(config["mounts"].as_array().unwrap().len(), 8);
        assert_eq!(config["process"]["env"], json!(["A=1"]));
        assert_eq!(config["process"]["cwd"], "/");
        assert_eq!(at(&change, "mounts[].destination"), [&json!("/x")]);
        assert_eq!(at(&change, "mounts[].source"), [] as [&Value; 0]);
        assert_eq!(at(&json!({"rdma": {"mlx": {"n": 1}}}), "rdma.*.n"), [&json!(1)]);
    }

    #[test]
    fn a_row_that_claims_what_it_does_not_set_is_at_fault() {
        let mut case = Case {
            checks: "x",
            fields: &["process.user.", "linux.nonsense"],
            sets: json!({"process": {"user": {"uid": 1}}}),
            probe: "id",
            needs: &[],
            expect: Expect::Same(Reference::Runc, "1"),
        };
        let faults = case.faults().join("\n");
        assert!(faults.contains("linux.nonsense is no field"), "{faults}");
        assert!(faults.contains("does not set process.user.gid"), "{faults}");
        case.fields = &["process.user.uid"];
        assert_eq!(case.faults(), [] as [String; 0]);
        case.probe = "";
        assert_eq!(case.faults().len(), 1);
    }
}

//! Writing resources into a cgroup: when it is made, and while its processes run.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::values::{IfAbsent, Setting, settings};
use super::{Cgroup, CgroupError};
use crate::container::spec::Resources;

/// An update of resources that was not made. The cgroup is as it was before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpdateError {
    #[error(transparent)]
    Spec(#[from] crate::container::spec::SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(
        "`linux.resources.memory.limit`: {limit} is below the {usage} bytes that are in use, and \
         `checkBeforeUpdate` is set"
    )]
    InUse { limit: u64, usage: u64 },
}

/// A file that was written, and what it held before.
pub(super) struct Written {
    path: PathBuf,
    value: String,
    before: String,
}

impl Cgroup {
    /// Changes the limits: all that `resources` gives, or none.
    ///
    /// # Errors
    /// [`UpdateError`]; what had been written is taken back.
    pub(crate) fn update(&self, resources: &Resources) -> Result<(), UpdateError> {
        let mut resources = resources.clone();
        let cpu = &mut resources.cpu;
        if cpu.quota.unwrap_or(0) == 0 && cpu.period.unwrap_or(0) != 0 {
            // One file holds both: the quota stays what it is.
            let max = self.text("cpu.max")?.unwrap_or_default();
            cpu.quota = max.split(' ').next().and_then(|quota| quota.parse().ok());
        }
        let settings = settings(&resources)?;
        let limit = resources.memory.limit.and_then(|limit| u64::try_from(limit).ok());
        if let Some(limit) = limit.filter(|l| *l != 0 && resources.memory.check_before_update) {
            let usage = self.number("memory.current")?;
            if usage > limit {
                return Err(UpdateError::InUse { limit, usage });
            }
        }
        let mut written = Vec::new();
        let result = write_all(&self.path, &settings, Some(&mut written));
        if result.is_err() {
            written.iter().rev().for_each(take_back);
        }
        Ok(result?)
    }
}

/// Writes `settings` in their order. With `written`, notes what each file held before.
pub(super) fn write_all(
    path: &Path,
    settings: &[Setting],
    mut written: Option<&mut Vec<Written>>,
) -> Result<(), CgroupError> {
    let mut burst = None;
    for setting in settings {
        match write_one(path, setting, written.as_deref_mut()) {
            // The kernel wants burst and quota to fit each other at every moment: which of the two
            // must be first depends on what they are now.
            Err(CgroupError::Setting { source, .. })
                if setting.file == "cpu.max.burst"
                    && is_invalid(&source)
                    && settings.iter().any(|s| s.file == "cpu.max") =>
            {
                burst = Some(setting);
            }
            result => result?,
        }
        if setting.file == "cpu.max"
            && let Some(burst) = burst.take()
        {
            write_one(path, burst, written.as_deref_mut())?;
        }
    }
    Ok(())
}

/// Whether the kernel did not like the value.
fn is_invalid(error: &CgroupError) -> bool {
    matches!(error, CgroupError::Write { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
}

/// Writes one setting, or what it means where its file is absent.
fn write_one(
    path: &Path,
    setting: &Setting,
    written: Option<&mut Vec<Written>>,
) -> Result<(), CgroupError> {
    let Setting { field, file, value, if_absent } = setting;
    let failed = |source| CgroupError::Setting { field: field.clone(), source: Box::new(source) };
    let (mut file, mut value) = (file, value);
    let there = |file: &str| path.join(file).exists();
    if !there(file) {
        match if_absent {
            IfAbsent::Skip => return Ok(()),
            IfAbsent::Instead { file: other, value: converted } if there(other) => {
                (file, value) = (other, converted);
            }
            IfAbsent::Instead { .. } | IfAbsent::Refuse => {
                return Err(failed(CgroupError::NoController { file: file.clone() }));
            }
        }
    }
    let directory = path;
    let path = directory.join(file);
    if let Some(written) = written {
        if file == "cpu.idle" {
            // A cgroup that ceases to be idle has the default weight: the one that it has now is to
            // be put back after the idleness.
            let path = directory.join("cpu.weight");
            let before = fs::read_to_string(&path)
                .map_err(|source| failed(CgroupError::WriteOnly { path: path.clone(), source }))?;
            written.push(Written { path, value: String::new(), before });
        }
        let before = fs::read_to_string(&path)
            .map_err(|source| failed(CgroupError::WriteOnly { path: path.clone(), source }))?;
        write_existing(&path, value).map_err(failed)?;
        written.push(Written { path, value: value.clone(), before });
        return Ok(());
    }
    write_existing(&path, value).map_err(failed)
}

/// Writes a file that must exist, at once.
fn write_existing(path: &Path, value: &str) -> Result<(), CgroupError> {
    let write = || -> io::Result<()> {
        // An empty write would not reach the kernel.
        let value = if value.is_empty() { "\n" } else { value };
        OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
    };
    write().map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// Puts back what a file held.
fn take_back(written: &Written) {
    let Written { path, value, before } = written;
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(value) = restoring(&file, before, value)
        && let Err(error) = write_existing(path, &value)
    {
        tracing::error!(error = crate::chain(&error), "an update is not wholly taken back");
    }
}

/// What is to be written so that `file` reads `before` again, as it did before `value` was written;
/// None for nothing.
fn restoring(file: &str, before: &str, value: &str) -> Option<String> {
    let device = value.split_once(' ').map(|(key, _)| key).filter(|key| key.contains(':'));
    if let Some(device) = device {
        let line = before.lines().find(|l| l.split(' ').next() == Some(device));
        return Some(match line {
            Some(line) => line.to_owned(),
            None if file == "io.max" => {
                format!("{device} rbps=max wbps=max riops=max wiops=max")
            }
            None => format!("{device} default"),
        });
    }
    if let Some(line) = before.lines().find(|l| l.starts_with("default ")) {
        return Some(line.to_owned());
    }
    match (file, before.trim()) {
        // That of an idle cgroup, which becomes idle again next.
        ("cpu.weight", "0") => None,
        (_, before) => Some(before.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(file: &str, value: &str, if_absent: IfAbsent) -> Setting {
        Setting { field: format!("f.{file}"), file: file.into(), value: value.into(), if_absent }
    }

    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn a_file_that_is_absent_is_refused_skipped_or_replaced() {
        let directory = cgroup(&[("io.weight", "default 100\n")]);
        let path = directory.path();
        let instead = IfAbsent::Instead { file: "io.weight".into(), value: "4950".into() };
        let error =
            write_all(path, &[setting("memory.max", "1", IfAbsent::Refuse)], None).unwrap_err();
        assert!(crate::chain(&error).starts_with("`f.memory.max`: "), "{error}");
        assert!(!path.join("memory.max").exists(), "it must not be made");
        write_all(path, &[setting("memory.swap.max", "1", IfAbsent::Skip)], None).unwrap();
        write_all(path, &[setting("io.bfq.weight", "500", instead)], None).unwrap();
        assert!(fs::read_to_string(path.join("io.weight")).unwrap().starts_with("4950"));
    }

    #[test]
    fn what_was_written_before_a_failure_is_known() {
        let directory = cgroup(&[("a", "1"), ("b", "2")]);
        let settings = ["a", "b", "c"].map(|file| setting(file, "9", IfAbsent::Refuse));
        let mut written = Vec::new();
        write_all(directory.path(), &settings, Some(&mut written)).unwrap_err();
        written.iter().rev().for_each(take_back);
        for (file, value) in [("a", "1"), ("b", "2")] {
            assert_eq!(fs::read_to_string(directory.path().join(file)).unwrap(), value);
        }
    }

    #[test]
    fn every_kind_of_file_can_be_restored() {
        for (file, before, value, expected) in [
            ("memory.max", "max\n", "7", Some("max")),
            ("cpuset.cpus", "\n", "0", Some("")),
            ("cpu.weight", "0\n", "7", None),
            ("io.weight", "default 100\n8:0 50\n", "7", Some("default 100")),
            ("io.weight", "default 100\n8:0 50\n", "8:0 7", Some("8:0 50")),
            ("io.weight", "default 100\n", "8:0 7", Some("8:0 default")),
            ("io.max", "8:0 rbps=1 wbps=max\n", "8:0 rbps=7", Some("8:0 rbps=1 wbps=max")),
            (
                "io.max",
                "8:0 rbps=1\n",
                "8:16 rbps=7",
                Some("8:16 rbps=max wbps=max riops=max wiops=max"),
            ),
        ] {
            assert_eq!(restoring(file, before, value).as_deref(), expected, "{file} {value}");
        }
    }
}

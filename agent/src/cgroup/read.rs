//! Reading a cgroup's files. What a controller would give that is absent is 0 or no limit; a file
//! that is there and cannot be read is an error.

use std::fs;
use std::io;

use super::{Cgroup, CgroupError, MAX_DEPTH, processes};

impl Cgroup {
    /// The text of a file; None if there is none.
    pub(super) fn text(&self, file: &str) -> Result<Option<String>, CgroupError> {
        let path = self.path.join(file);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CgroupError::io("read", &path)(e)),
        }
    }

    /// The number that a file holds; 0 if there is no such file.
    pub(crate) fn number(&self, file: &str) -> Result<u64, CgroupError> {
        Ok(self.limit(file)?.unwrap_or(0))
    }

    /// The limit that a file holds; None for `max`, and if there is no such file.
    pub(crate) fn limit(&self, file: &str) -> Result<Option<u64>, CgroupError> {
        let Some(text) = self.text(file)? else { return Ok(None) };
        match text.trim() {
            "max" => Ok(None),
            number => number.parse().map(Some).map_err(|_| self.nonsense(file)),
        }
    }

    /// The numbers of a file of lines `key number`.
    pub(crate) fn keyed(&self, file: &str) -> Result<Keyed, CgroupError> {
        Ok(Keyed(self.text(file)?.unwrap_or_default()))
    }

    /// The sums of a file of lines `device key=number key=number...` over all devices, in the order
    /// of `keys`.
    pub(crate) fn sums<const N: usize>(
        &self,
        file: &str,
        keys: [&str; N],
    ) -> Result<[u64; N], CgroupError> {
        let text = self.text(file)?.unwrap_or_default();
        Ok(keys.map(|key| sum_of(&text, key)))
    }

    /// How many of its processes the kernel has killed for memory.
    pub(crate) fn oom_kills(&self) -> Result<u64, CgroupError> {
        Ok(self.keyed("memory.events")?.get("oom_kill"))
    }

    /// Whether every process in it stands still.
    pub(crate) fn is_frozen(&self) -> Result<bool, CgroupError> {
        Ok(self.keyed("cgroup.events")?.get("frozen") == 1)
    }

    /// Its processes and those of the cgroups inside it.
    pub(crate) fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        processes(&self.path, MAX_DEPTH, &mut pids)
            .map_err(CgroupError::io("list the processes of", &self.path))?;
        Ok(pids)
    }

    fn nonsense(&self, file: &str) -> CgroupError {
        CgroupError::io("read a number from", &self.path.join(file))(
            io::ErrorKind::InvalidData.into(),
        )
    }
}

/// Lines of `key number`.
pub(crate) struct Keyed(String);

impl Keyed {
    /// The number after `key`; 0 if there is none.
    pub(crate) fn get(&self, key: &str) -> u64 {
        value_of(&self.0, key).unwrap_or(0)
    }
}

/// The number after `key` in lines of `key number`.
fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The sum of what follows `key=` in all lines.
fn sum_of(text: &str, key: &str) -> u64 {
    let number = |word: &str| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok();
    text.split_ascii_whitespace().filter_map(number).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "low 0\nhigh 1\noom 2\noom_kill 3\noom_group_kill 4\n";
        assert_eq!(value_of(text, "oom_kill"), Some(3));
        assert_eq!(value_of(text, "oom"), Some(2));
        assert_eq!(value_of(text, "kill"), None);
    }

    #[test]
    fn devices_are_summed() {
        let text = "254:0 rbytes=10 wbytes=1 rios=2 wios=0\n254:16 rbytes=5 dbytes=7\n";
        assert_eq!(sum_of(text, "rbytes"), 15);
        assert_eq!(sum_of(text, "wbytes"), 1);
        assert_eq!(sum_of(text, "bytes"), 0);
    }
}

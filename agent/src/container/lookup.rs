//! Finds the program of a process as runc does, with runc's words when it is not there.

use std::ffi::CString;
use std::io;
use std::path::Path;

use crate::sys;

/// Why a program cannot be executed: the exit code that a shell and runc give, and runc's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StartFailure {
    /// 127 if the program does not exist, else 126.
    pub(crate) exit_code: u8,
    pub(crate) message: String,
}

/// Does not exist.
const NOT_FOUND: u8 = 127;
/// Exists, but cannot be executed.
const NOT_EXECUTABLE: u8 = 126;

/// What Go's os package, and therefore runc, calls an error.
fn words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "no such file or directory".into(),
        Some(libc::EACCES) => "permission denied".into(),
        Some(libc::ENOEXEC) => "exec format error".into(),
        Some(libc::ENOTDIR) => "not a directory".into(),
        Some(libc::EISDIR) => "is a directory".into(),
        Some(libc::E2BIG) => "argument list too long".into(),
        Some(libc::ELOOP) => "too many levels of symbolic links".into(),
        Some(libc::ENAMETOOLONG) => "file name too long".into(),
        Some(libc::ETXTBSY) => "text file busy".into(),
        Some(libc::EPERM) => "operation not permitted".into(),
        _ => error.to_string(),
    }
}

/// The exit code for an error of looking up or executing a program.
fn code(error: &io::Error) -> u8 {
    if error.raw_os_error() == Some(libc::ENOENT) { NOT_FOUND } else { NOT_EXECUTABLE }
}

/// The failure of `execve` of `path`.
pub(crate) fn exec_failure(path: &str, error: &io::Error) -> StartFailure {
    StartFailure { exit_code: code(error), message: format!("exec {path}: {}", words(error)) }
}

/// Checks one candidate: it must exist, be no directory, and be executable by this process.
fn check(path: &str) -> Result<CString, io::Error> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    let path = CString::new(path)?;
    sys::executable(&path)?;
    Ok(path)
}

/// Finds the program `name`, in the process's own root, directory and identity: as it is if it
/// contains a slash, else in the directories of `PATH` in `env` (the last one of that name).
///
/// # Errors
/// [`StartFailure`].
pub(crate) fn find(name: &str, env: &[String]) -> Result<CString, StartFailure> {
    if name.contains('/') {
        return check(name).map_err(|e| {
            let what = if e.raw_os_error() == Some(libc::EACCES) && name_exists(name)
                || e.raw_os_error() == Some(libc::EISDIR)
            {
                words(&e)
            } else {
                format!("stat {name}: {}", words(&e))
            };
            StartFailure { exit_code: code(&e), message: format!("exec: {name:?}: {what}") }
        });
    }
    let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or("");
    // An empty element means the current directory, which Go (and therefore runc) refuses to use.
    let found = path
        .split(':')
        .filter(|directory| !directory.is_empty() && !name.is_empty())
        .find_map(|directory| check(&format!("{directory}/{name}")).ok());
    found.ok_or_else(|| StartFailure {
        exit_code: NOT_FOUND,
        message: format!("exec: {name:?}: executable file not found in $PATH"),
    })
}

/// Whether the file can be looked at, so that what is denied is its execution.
fn name_exists(name: &str) -> bool {
    Path::new(name).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_name_is_searched_in_path() {
        let env = ["PATH=/nowhere:/bin".to_owned()];
        assert_eq!(find("sh", &env).unwrap().to_str().unwrap(), "/bin/sh");
    }

    #[test]
    fn a_name_that_is_nowhere_fails_as_in_runc() {
        let missing = StartFailure {
            exit_code: 127,
            message: r#"exec: "foo": executable file not found in $PATH"#.into(),
        };
        assert_eq!(find("foo", &["PATH=/bin".to_owned()]).unwrap_err(), missing);
        assert_eq!(find("foo", &[]).unwrap_err(), missing);
    }

    #[test]
    fn a_path_that_does_not_exist_fails_as_in_runc() {
        assert_eq!(
            find("/nope", &[]).unwrap_err(),
            StartFailure {
                exit_code: 127,
                message: r#"exec: "/nope": stat /nope: no such file or directory"#.into()
            }
        );
    }

    #[test]
    fn a_directory_and_a_file_without_permission_fail_with_126() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data").to_str().unwrap().to_owned();
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(
            find(&path, &[]).unwrap_err(),
            StartFailure { exit_code: 126, message: format!("exec: {path:?}: permission denied") }
        );
        let failure = find("/tmp", &[]).unwrap_err();
        assert_eq!(failure.exit_code, 126);
        assert_eq!(failure.message, r#"exec: "/tmp": is a directory"#);
    }

    #[test]
    fn a_failed_exec_is_worded_as_in_runc() {
        let failure = exec_failure("/bin/arm", &io::Error::from_raw_os_error(libc::ENOEXEC));
        assert_eq!(failure.message, "exec /bin/arm: exec format error");
        assert_eq!(failure.exit_code, 126);
    }
}

//! The forms of names in Kubernetes: `k8s.io/apimachinery/pkg/util/validation`.

/// RFC 1123 label: longest, in bytes.
pub(super) const LABEL_MAX: usize = 63;
const SUBDOMAIN_MAX: usize = 253;

fn is_label(text: &str) -> bool {
    let ends_well =
        |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.len() <= LABEL_MAX
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && ends_well(text.chars().next())
        && ends_well(text.chars().next_back())
}

/// A DNS label (RFC 1123).
pub(super) fn label(text: &str) -> Result<(), &'static str> {
    is_label(text).then_some(()).ok_or(
        "must be a DNS label: at most 63 of a-z, 0-9 and '-', beginning and ending with a letter or \
         a digit",
    )
}

/// A DNS subdomain name (RFC 1123). Its parts may be longer than a label.
pub(super) fn subdomain(text: &str) -> Result<(), &'static str> {
    let part = |part: &str| {
        let alphanumeric = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
        part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && alphanumeric(part.bytes().next())
            && alphanumeric(part.bytes().next_back())
    };
    (text.len() <= SUBDOMAIN_MAX && text.split('.').all(part)).then_some(()).ok_or(
        "must be a DNS subdomain name: at most 253 of a-z, 0-9, '-' and '.', every part beginning \
         and ending with a letter or a digit",
    )
}

fn is_qualified_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    text.len() <= LABEL_MAX
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && alphanumeric(bytes.first())
        && alphanumeric(bytes.last())
}

/// The key of a label or an annotation: `name` or `prefix/name`.
pub(super) fn qualified(text: &str) -> Result<(), &'static str> {
    let fine = match text.split_once('/') {
        Some((prefix, name)) => subdomain(prefix).is_ok() && is_qualified_part(name),
        None => is_qualified_part(text),
    };
    fine.then_some(()).ok_or(
        "must be NAME or PREFIX/NAME: a name of at most 63 letters, digits, '-', '_' and '.', \
         beginning and ending with a letter or a digit; a prefix that is a DNS subdomain name",
    )
}

/// The value of a label.
pub(super) fn label_value(text: &str) -> Result<(), &'static str> {
    (text.is_empty() || is_qualified_part(text)).then_some(()).ok_or(
        "must be empty or at most 63 letters, digits, '-', '_' and '.', beginning and ending with a \
         letter or a digit",
    )
}

/// The name of a variable of the environment.
pub(super) fn variable(text: &str) -> Result<(), &'static str> {
    (!text.is_empty() && text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'='))
        .then_some(())
        .ok_or("must be printable ASCII without '='")
}

/// The key of a value of a ConfigMap or a Secret, which becomes the name of a file.
pub(super) fn data_key(text: &str) -> Result<(), &'static str> {
    let fine = !text.is_empty()
        && text.len() <= SUBDOMAIN_MAX
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text != "."
        && !text.starts_with("..");
    fine.then_some(())
        .ok_or("must be at most 253 letters, digits, '-', '_' and '.', and not begin with '..'")
}

/// A path in a volume: relative, of parts that do not begin with `..`.
pub(super) fn volume_path(text: &str) -> Result<(), &'static str> {
    if text.starts_with('/') {
        Err("must be a relative path")
    } else if text.split('/').any(|part| part.starts_with("..")) {
        Err("must not have a part that begins with '..'")
    } else if text.contains('\0') {
        Err("must not contain a NUL byte")
    } else if clean_path(text).is_empty() {
        Err("must name a file")
    } else {
        Ok(())
    }
}

/// The name of a port (IANA service name, RFC 6335).
pub(super) fn port(text: &str) -> Result<(), &'static str> {
    const MAX: usize = 15;
    let fine = text.len() <= MAX
        && is_label(text)
        && !text.contains("--")
        && text.bytes().any(|b| b.is_ascii_lowercase());
    fine.then_some(()).ok_or(
        "must be at most 15 of a-z, 0-9 and single '-', with a letter, beginning and ending with a \
         letter or a digit",
    )
}

/// A path in a container: absolute, without `..`, without a NUL byte.
pub(super) fn absolute_path(text: &str) -> Result<(), &'static str> {
    if !text.starts_with('/') {
        Err("must be an absolute path")
    } else if text.split('/').any(|part| part == "..") {
        Err("must not contain '..'")
    } else if text.contains('\0') {
        Err("must not contain a NUL byte")
    } else {
        Ok(())
    }
}

/// A path inside a volume: relative, without `..`, without a NUL byte.
pub(super) fn sub_path(text: &str) -> Result<(), &'static str> {
    if text.starts_with('/') {
        Err("must be a relative path")
    } else {
        absolute_path(&format!("/{text}"))
    }
}

/// `path` with single slashes, without `.` and without one at its end.
pub(super) fn clean_path(path: &str) -> String {
    let parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    parts.fold(String::new(), |path, part| path + "/" + part)
}

/// The host name of a pod without one of its own, as the kubelet cuts it.
pub(super) fn hostname_of(pod_name: &str) -> String {
    let cut = pod_name.get(..LABEL_MAX).unwrap_or(pod_name);
    cut.trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_those_of_kubernetes() {
        type Rule = fn(&str) -> Result<(), &'static str>;
        let longest = "a".repeat(63);
        let too_long = "a".repeat(64);
        let cases: &[(Rule, &[&str], &[&str])] = &[
            (
                label,
                &["a", "a-b", "0", "a--b", &longest],
                &["", "-a", "a-", "A", "a.b", "a_b", "\u{e4}", &too_long],
            ),
            (subdomain, &["a.b", "a", "1.2", &too_long], &["", ".a", "a.", "a..b", "a.-b", "A.b"]),
            (
                qualified,
                &["app", "App_1.x", "k8s.io/name", "a/B"],
                &["", "/a", "a/", "a/b/c", "-a", "a b", &too_long],
            ),
            (label_value, &["", "v1.2_3", "A"], &["-", "a ", "a/b", &too_long]),
            (variable, &["A", "a.b-c", "0", "A B"], &["", "A=B", "\u{e4}", "a\n"]),
            (port, &["http", "a-1", "8080a"], &["", "8080", "a--b", "Http", "abcdefghijklmnop"]),
            (data_key, &["a.b", "A_-", ".a"], &["", ".", "..", "...", "a/b", "a b"]),
            (volume_path, &["a", "a/b.c", "./a"], &["", "/a", "a/..", "..a", ".", "a\0"]),
            (absolute_path, &["/", "/a/b", "/a/..b"], &["", "a", "./a", "/a/../b", "/..", "/a\0"]),
        ];
        for (rule, good, bad) in cases {
            for text in *good {
                assert_eq!(rule(text), Ok(()), "{text:?}");
            }
            for text in *bad {
                assert!(rule(text).is_err(), "{text:?}");
            }
        }
    }

    #[test]
    fn a_long_pod_name_is_cut_to_a_host_name() {
        assert_eq!(hostname_of("web"), "web");
        assert_eq!(hostname_of(&format!("{}-x", "a".repeat(62))), "a".repeat(62));
        assert_eq!(hostname_of(&"b".repeat(100)), "b".repeat(63));
    }

    #[test]
    fn equal_paths_have_one_clean_form() {
        assert_eq!(clean_path("//a/./b//"), "/a/b");
        assert_eq!(clean_path("/"), "");
    }
}

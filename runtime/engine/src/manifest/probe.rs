//! Reads the probes and the lifecycle hooks of a container.

use std::net::IpAddr;

use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::probe::url::escaped;
use crate::types::{
    Check, ContainerKind, ContainerPort, Hook, HttpGet, Lifecycle, Probe, Probes, Scheme, TcpSocket,
};

/// Kubernetes' defaults.
const PERIOD_S: u32 = 10;
const TIMEOUT_S: u32 = 1;
const FAILURES: u32 = 3;

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Startup,
    Liveness,
    Readiness,
}

/// All probes of a container.
pub(super) fn read_all(
    container: &View<'_>,
    kind: ContainerKind,
    ports: &[ContainerPort],
    problems: &mut Problems,
) -> Probes {
    let mut read = |field, purpose| {
        let view = container.get(field);
        let fine = allowed(&view, kind, problems);
        fine.then(|| read_probe(&view, purpose, ports, problems)).flatten()
    };
    Probes {
        startup: read("startupProbe", Purpose::Startup),
        liveness: read("livenessProbe", Purpose::Liveness),
        readiness: read("readinessProbe", Purpose::Readiness),
    }
}

/// Both hooks of a container whose pod has this grace period, in seconds.
pub(super) fn read_lifecycle(
    view: &View<'_>,
    kind: ContainerKind,
    ports: &[ContainerPort],
    grace_s: u64,
    problems: &mut Problems,
) -> Lifecycle {
    if !allowed(view, kind, problems) {
        return Lifecycle::default();
    }
    let mut read = |field| read_hook(&view.get(field), ports, grace_s, problems);
    Lifecycle { post_start: read("postStart"), pre_stop: read("preStop") }
}

/// Whether there is something that a container of this kind can have.
fn allowed(view: &View<'_>, kind: ContainerKind, problems: &mut Problems) -> bool {
    if !view.is_present() || !view.is_object(problems) {
        return false;
    }
    let fine = kind != ContainerKind::Init || !view.has_other_fields(&[]);
    if !fine {
        let reason = "only init containers with restartPolicy: Always can have it";
        view.invalid("init container", reason, problems);
    }
    fine
}

fn read_probe(
    view: &View<'_>,
    purpose: Purpose,
    ports: &[ContainerPort],
    problems: &mut Problems,
) -> Option<Probe> {
    // 0 is the default, as for the API server.
    let mut number = |field, default: u32| {
        let given = view.get(field).integer(0..=i32::MAX.into(), problems);
        given.filter(|number| *number > 0).unwrap_or(default)
    };
    let initial_delay_s = number("initialDelaySeconds", 0);
    let period_s = number("periodSeconds", PERIOD_S);
    let timeout_s = number("timeoutSeconds", TIMEOUT_S);
    let success_threshold = number("successThreshold", 1);
    let failure_threshold = number("failureThreshold", FAILURES);
    if success_threshold != 1 && purpose != Purpose::Readiness {
        let reason = "must be 1, unless for a readinessProbe";
        view.get("successThreshold").invalid(success_threshold.to_string(), reason, problems);
    }
    let grace = view.get("terminationGracePeriodSeconds");
    if grace.is_present() && purpose == Purpose::Readiness {
        grace.invalid("readinessProbe", "it does not end the container", problems);
    }
    let termination_grace_s = grace.integer(1..=i32::MAX.into(), problems);
    Some(Probe {
        check: read_check(view, ports, problems)?,
        initial_delay_s,
        period_s,
        timeout_s,
        success_threshold,
        failure_threshold,
        termination_grace_s,
    })
}

fn read_hook(
    view: &View<'_>,
    ports: &[ContainerPort],
    grace_s: u64,
    problems: &mut Problems,
) -> Option<Hook> {
    if !view.is_present() || !view.is_object(problems) {
        return None;
    }
    let sleep = view.get("sleep");
    if !sleep.is_present() {
        return read_check(view, ports, problems).map(Hook::Check);
    }
    if view.has_other_fields(&["sleep"]) {
        view.invalid("hook", "must do one thing, not several", problems);
    }
    let seconds = sleep.get("seconds");
    seconds.require(problems);
    let seconds_given = seconds.integer::<u64>(0..=i64::MAX.into(), problems)?;
    if seconds_given > grace_s {
        let reason = format!("must be at most terminationGracePeriodSeconds, {grace_s}");
        seconds.invalid(seconds_given.to_string(), reason, problems);
    }
    Some(Hook::Sleep(seconds_given))
}

/// What is asked, by the one field of these that is there.
fn read_check(view: &View<'_>, ports: &[ContainerPort], problems: &mut Problems) -> Option<Check> {
    const CHECKS: [&str; 4] = ["exec", "httpGet", "tcpSocket", "grpc"];
    let present: Vec<_> = CHECKS.into_iter().filter(|name| view.get(name).is_present()).collect();
    let [name] = present.as_slice() else {
        let reason = if present.is_empty() {
            "does nothing: there is no exec or httpGet or the like"
        } else {
            "must do one thing, not several"
        };
        let what = view.path().rsplit('.').next().unwrap_or_default().to_owned();
        view.invalid(what, reason, problems);
        return None;
    };
    let inner = view.get(name);
    if !inner.is_object(problems) {
        return None;
    }
    match *name {
        "exec" => {
            let command = inner.get("command");
            command.require(problems);
            let words = command.texts(problems);
            if words.is_empty() || words.iter().any(|word| word.contains('\0')) {
                command.invalid("command", "must be words without NUL bytes", problems);
            }
            Some(Check::Exec(words))
        }
        "httpGet" => Some(Check::HttpGet(HttpGet {
            scheme: read_scheme(&inner.get("scheme"), problems),
            host: read_host(&inner, problems),
            port: read_port(&inner, ports, problems)?,
            path: encoded_path(inner.get("path").text(problems).unwrap_or_default()),
            headers: read_headers(&inner.get("httpHeaders"), problems),
        })),
        "tcpSocket" => Some(Check::TcpSocket(TcpSocket {
            host: read_host(&inner, problems),
            port: read_port(&inner, ports, problems)?,
        })),
        _ => {
            let port = inner.get("port");
            port.require(problems);
            let port = port.integer(1..=u16::MAX.into(), problems)?;
            let service = inner.get("service").text(problems).unwrap_or_default().to_owned();
            Some(Check::Grpc { port, service })
        }
    }
}

fn read_scheme(view: &View<'_>, problems: &mut Problems) -> Scheme {
    let schemes = [("HTTP", Scheme::Http), ("HTTPS", Scheme::Https)];
    view.one_of(&schemes, problems).unwrap_or(Scheme::Http)
}

fn read_host(view: &View<'_>, problems: &mut Problems) -> String {
    let host = view.get("host");
    let text = host.text(problems).unwrap_or_default();
    check(&host, text, host_name, problems);
    text.to_owned()
}

/// An address, or a name that a resolver could know.
fn host_name(text: &str) -> Result<(), &'static str> {
    let letter = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    let label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(letter);
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_name = name.len() <= 253 && name.split('.').all(label);
    (is_name || text.parse::<IpAddr>().is_ok())
        .then_some(())
        .ok_or("must be an address, or a name: letters, digits, '-' and '_' between dots")
}

/// A port by its number, or by the name that the container gives it.
fn read_port(view: &View<'_>, ports: &[ContainerPort], problems: &mut Problems) -> Option<u16> {
    let port = view.get("port");
    port.require(problems);
    let Some(name) = port.text(&mut problems.fork()) else {
        return port.integer(1..=u16::MAX.into(), problems);
    };
    let named = ports.iter().find(|port| port.name.as_deref() == Some(name));
    if named.is_none() {
        port.invalid(name, "this container has no port of this name", problems);
    }
    named.map(|port| port.port)
}

fn read_headers(view: &View<'_>, problems: &mut Problems) -> Vec<(String, String)> {
    let mut headers = Vec::new();
    for view in view.objects(problems) {
        let (name_view, value_view) = (view.get("name"), view.get("value"));
        let name = name_view.required_text(problems).unwrap_or_default();
        check(&name_view, name, header_name, problems);
        let value = value_view.text(problems).unwrap_or_default();
        check(&value_view, value, header_value, problems);
        headers.push((name.to_owned(), value.to_owned()));
    }
    headers
}

/// A `token` of RFC 9110.
fn header_name(text: &str) -> Result<(), &'static str> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    (!text.is_empty() && text.bytes().all(token))
        .then_some(())
        .ok_or("must be the name of an HTTP header: letters, digits and '-', mostly")
}

fn header_value(text: &str) -> Result<(), &'static str> {
    text.bytes()
        .all(|b| b == b'\t' || (b >= b' ' && b != 0x7f))
        .then_some(())
        .ok_or("must not contain control characters")
}

/// A path and query as a request carries it: with a slash before it, without a fragment, and with
/// everything escaped that would end it.
fn encoded_path(text: &str) -> String {
    let (text, _fragment) = text.split_once('#').unwrap_or((text, ""));
    let slash = if text.starts_with('/') { "" } else { "/" };
    format!("{slash}{}", escaped(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_fit_for_a_request() {
        for (text, expected) in [
            ("", "/"),
            ("healthz", "/healthz"),
            ("/a?b=c&d", "/a?b=c&d"),
            ("/a b\r\nX: y", "/a%20b%0D%0AX:%20y"),
            ("/\u{e4}#part", "/%C3%A4"),
            ("/a{b}<c>`", "/a%7Bb%7D%3Cc%3E%60"),
            ("//a/../%zz?x=[1]", "//a/../%zz?x=[1]"),
        ] {
            assert_eq!(encoded_path(text), expected);
        }
    }

    #[test]
    fn hosts_are_addresses_or_names() {
        let long = ["a".repeat(63).as_str(); 4].join(".");
        for host in ["localhost", "::1", "1.2.3.4", "a-b.example.com.", "under_score", &long[2..]] {
            assert!(host_name(host).is_ok(), "{host}");
        }
        for host in
            ["a b", "a/b", "a:80", "[::1]", "a..b", ".", ".a", "fe80::1%lo", "a\0", "\u{e4}", &long]
        {
            assert!(host_name(host).is_err(), "{host}");
        }
        assert!(host_name(&"a".repeat(64)).is_err());
    }

    #[test]
    fn headers_cannot_carry_others() {
        assert!(header_name("X-Custom").is_ok() && header_value("a b\tc").is_ok());
        for name in ["", "a b", "a:", "a\n"] {
            assert!(header_name(name).is_err(), "{name:?}");
        }
        assert!(header_value("a\r\nb: c").is_err());
    }
}

//! Where a request goes, and where an answer redirects it to. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::uri::{Authority, PathAndQuery};

use crate::types::{HttpGet, Scheme};

/// The URL of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) scheme: Scheme,
    /// As the kubelet compares it: an IPv6 address has no brackets.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) path: PathAndQuery,
}

/// What an answer redirects to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Redirect {
    /// Another URL of the same host.
    Within(Url),
    /// Another host, or nothing that could be asked.
    Elsewhere,
}

impl Url {
    /// That of a probe. `None` if its path is none.
    pub(super) fn of(HttpGet { scheme, host, port, path, headers: _ }: &HttpGet) -> Option<Self> {
        // The pod's own address is the loopback's, as long as it has no other.
        let host = if host.is_empty() { Ipv4Addr::LOCALHOST.to_string() } else { host.clone() };
        Some(Url { scheme: *scheme, host, port: *port, path: path_and_query(path)? })
    }

    /// As the header `Host` has it: always with the port, as from the kubelet.
    pub(super) fn authority(&self) -> String {
        let Url { host, port, .. } = self;
        match host.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        }
    }

    /// Resolves a `Location` (RFC 3986, section 5.2).
    pub(super) fn redirected(&self, location: &[u8]) -> Redirect {
        let location = escaped(location);
        let (reference, _fragment) = location.split_once('#').unwrap_or((&location, ""));
        self.resolved(reference).map_or(Redirect::Elsewhere, Redirect::Within)
    }

    fn resolved(&self, reference: &str) -> Option<Url> {
        let (scheme, rest) = match split_scheme(reference) {
            Some((name, rest)) if name.eq_ignore_ascii_case("http") => (Scheme::Http, rest),
            Some((name, rest)) if name.eq_ignore_ascii_case("https") => (Scheme::Https, rest),
            Some(_) => return None,
            None => (self.scheme, reference),
        };
        if let Some(rest) = rest.strip_prefix("//") {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at_checked(end)?;
            let (host, port) = split_authority(authority)?;
            // As for the kubelet: the host's name decides, the port and the scheme may be others.
            if host != self.host {
                return None;
            }
            let port = port.unwrap_or(match scheme {
                Scheme::Http => 80,
                Scheme::Https => 443,
            });
            let path = path_and_query(&without_dots(path))?;
            return Some(Url { scheme, host, port, path });
        }
        if rest.len() < reference.len() {
            // A scheme without a host.
            return None;
        }
        let path = match rest.chars().next() {
            None => return Some(self.clone()),
            Some('/') => without_dots(rest),
            Some('?') => format!("{}{rest}", self.path.path()),
            Some(_) => {
                let directory = self.path.path().rsplit_once('/').map_or("", |(start, _)| start);
                without_dots(&format!("{directory}/{rest}"))
            }
        };
        Some(Url { path: path_and_query(&path)?, ..self.clone() })
    }
}

fn path_and_query(path: &str) -> Option<PathAndQuery> {
    path.starts_with('/').then(|| PathAndQuery::try_from(path).ok()).flatten()
}

/// A scheme and what follows its colon.
fn split_scheme(reference: &str) -> Option<(&str, &str)> {
    let (name, rest) = reference.split_once(':')?;
    let rest_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    let is_scheme =
        name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(rest_of_name);
    is_scheme.then_some((name, rest))
}

/// The host, without brackets, and the port of an authority.
fn split_authority(authority: &str) -> Option<(String, Option<u16>)> {
    let parsed: Authority = authority.parse().ok()?;
    let port = match parsed.port() {
        Some(port) => Some(port.as_u16()),
        // A colon with nothing behind it is no port; with something else it is no authority.
        None if authority.ends_with(':')
            || !authority.contains(':')
            || authority.ends_with(']') =>
        {
            None
        }
        None => return None,
    };
    let host = parsed.host().trim_start_matches('[').trim_end_matches(']');
    Some((host.to_owned(), port))
}

/// A path, with its query, without the components `.` and `..` (RFC 3986, section 5.2.4).
fn without_dots(path_and_query: &str) -> String {
    let (path, query) = match path_and_query.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path_and_query, None),
    };
    let mut kept: Vec<&str> = Vec::new();
    let mut parts = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        match part {
            "." => {}
            ".." => drop(kept.pop()),
            part => {
                kept.push(part);
                continue;
            }
        }
        if last {
            kept.push("");
        }
    }
    let path = format!("/{}", kept.join("/"));
    match query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    }
}

/// A text in which everything is escaped that must not stand in a path and query.
pub(crate) fn escaped(text: &[u8]) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text {
        if byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(byte) {
            path.push(char::from(*byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn url(scheme: Scheme, host: &str, port: u16, path: &str) -> Url {
        let get =
            HttpGet { scheme, host: host.into(), port, path: path.into(), headers: Vec::new() };
        Url::of(&get).unwrap()
    }

    #[test]
    fn an_authority_has_always_a_port() {
        for (host, expected) in [
            ("", "127.0.0.1:80"),
            ("::1", "[::1]:80"),
            ("example.com", "example.com:80"),
            ("localhost", "localhost:80"),
        ] {
            assert_eq!(url(Scheme::Http, host, 80, "/").authority(), expected);
        }
    }

    #[test]
    fn redirects_stay_within_the_host() {
        use Scheme::{Http, Https};
        let from = url(Http, "", 8000, "/a/b?c");
        for (location, scheme, port, path) in [
            ("/x", Http, 8000, "/x"),
            ("x?y#z", Http, 8000, "/a/x?y"),
            ("?y", Http, 8000, "/a/b?y"),
            ("", Http, 8000, "/a/b?c"),
            ("#z", Http, 8000, "/a/b?c"),
            ("../x/./y/..", Http, 8000, "/x/"),
            ("../../../x", Http, 8000, "/x"),
            ("/x/../y?../z", Http, 8000, "/y?../z"),
            ("x:y", Http, 8000, ""),
            ("./x:y", Http, 8000, "/a/x:y"),
            ("/a b\u{e4}\"", Http, 8000, "/a%20b%C3%A4%22"),
            ("//127.0.0.1/x", Http, 80, "/x"),
            ("http://127.0.0.1:8080/x", Http, 8080, "/x"),
            ("HTTP://127.0.0.1", Http, 80, "/"),
            ("http://127.0.0.1?q", Http, 80, "/?q"),
            ("http://127.0.0.1:/", Http, 80, "/"),
            ("https://127.0.0.1/", Https, 443, "/"),
            ("https://127.0.0.1:8443/x", Https, 8443, "/x"),
            ("http://u:p@127.0.0.1:81/", Http, 81, "/"),
        ] {
            let expected = match path {
                "" => Redirect::Elsewhere,
                path => Redirect::Within(url(scheme, "", port, path)),
            };
            assert_eq!(from.redirected(location.as_bytes()), expected, "{location}");
        }
        for location in [
            "http://other/",
            "https://other/",
            "//other/x",
            "http://127.0.0.1:x/",
            "http://127.0.0.1:65536/",
            "http://localhost/",
            "http:x",
            "http://",
            "ftp://127.0.0.1/",
            "javascript:void(0)",
        ] {
            assert_eq!(from.redirected(location.as_bytes()), Redirect::Elsewhere, "{location}");
        }
        let from = url(Https, "::1", 443, "/");
        let to = Redirect::Within(url(Http, "::1", 80, "/x"));
        assert_eq!(from.redirected(b"http://[::1]/x"), to);
        let to = Redirect::Within(url(Https, "::1", 444, "/x"));
        assert_eq!(from.redirected(b"//[::1]:444/x"), to);
        let from = url(Https, "example.com", 443, "/");
        let to = Redirect::Within(url(Https, "example.com", 443, "/x"));
        assert_eq!(from.redirected(b"https://example.com/x"), to);
        assert_eq!(from.redirected(b"https://www.example.com/x"), Redirect::Elsewhere);
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_sends_leads_to_another_host(
            location in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "(http:|https:|x:)?(//)?(127\\.0\\.0\\.1|\\[::1\\]|other)?(:[0-9]{0,6})?[/.?#a:@%-]{0,20}"
                    .prop_map(String::into_bytes),
            ],
        ) {
            let from = url(Scheme::Http, "", 80, "/a/b");
            if let Redirect::Within(to) = from.redirected(&location) {
                prop_assert_eq!(&to.host, &from.host);
                prop_assert!(to.path.as_str().starts_with('/'));
                prop_assert!(to.path.as_str().bytes().all(|b| b.is_ascii_graphic()));
            }
        }
    }
}

//! HTTP/1.1 GET (RFC 9112), as much as a probe needs: one request per connection, redirects within
//! the host, the beginning of the body. Parsing is pure.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Answer, MAX_MESSAGE, ProbeError, connect};

/// Longest head of an answer in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// Most bytes of an answer's body that are read.
const MAX_BODY: usize = MAX_MESSAGE;

/// Most requests of one probe, redirects included: Go's, and so the kubelet's.
const MAX_REQUESTS: usize = 10;

/// Most interim answers (1xx) before the final one.
const MAX_INTERIM: usize = 16;

/// Set unless the probe sets them.
const DEFAULTS: [(&str, &str); 2] = [("User-Agent", "kube-probe/husk"), ("Accept", "*/*")];

/// A request that can be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    host: String,
    address: SocketAddr,
    path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// A request for `path` to the server at `address`, which `host` names if it is not empty.
    ///
    /// # Errors
    /// [`ProbeError`] for what would make another request of it.
    pub(super) fn new(
        host: String,
        address: SocketAddr,
        path: String,
        headers: Vec<(String, String)>,
    ) -> Result<Self, ProbeError> {
        if !is_path(&path) {
            return Err(ProbeError::Path(path));
        }
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let text = |b: u8| b == b'\t' || (b >= b' ' && b != 0x7f);
        let good = |(name, value): &&(String, String)| {
            !name.is_empty() && name.bytes().all(token) && value.bytes().all(text)
        };
        if let Some((name, _)) = headers.iter().find(|header| !good(header)) {
            return Err(ProbeError::Header(name.clone()));
        }
        Ok(Request { host, address, path, headers })
    }

    /// As it is sent.
    fn encode(&self) -> String {
        let given = |name: &str| self.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        let mut text = format!("GET {} HTTP/1.1\r\n", self.path);
        if !given("Host") {
            text.push_str(&format!("Host: {}\r\n", self.address));
        }
        for (name, value) in DEFAULTS.iter().filter(|(name, _)| !given(name)) {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        for (name, value) in &self.headers {
            // An empty value of these means: without it.
            let is_default = DEFAULTS.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
            if !(is_default && value.is_empty()) {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        text.push_str("Connection: close\r\n\r\n");
        text
    }

    /// The request to which an answer redirects; `None` if that is of another host.
    fn redirected(&self, location: &str) -> Option<Request> {
        let mut next = self.clone();
        if let Some(rest) = strip_prefix_ignoring_case(location, "http://") {
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at_checked(end)?;
            let (host, port) = split_port(authority)?;
            // As the kubelet: the host's name decides, the port may be another.
            let same =
                host == self.host || host.trim_matches(['[', ']']) == self.address.ip().to_string();
            if !same {
                return None;
            }
            next.address.set_port(port);
            next.path = path.to_owned();
        } else if location.contains("://") || location.starts_with("//") {
            return None;
        } else if location.starts_with('/') {
            next.path = location.to_owned();
        } else {
            let (own, _) = self.path.split_once(['?', '#']).unwrap_or((&self.path, ""));
            let directory = own.rsplit_once('/').map_or("", |(directory, _)| directory);
            next.path = format!("{directory}/{location}");
        }
        let (path, _fragment) = next.path.split_once('#').unwrap_or((&next.path, ""));
        next.path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        is_path(&next.path).then_some(next)
    }
}

fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}

fn strip_prefix_ignoring_case<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// The host and the port of an authority.
fn split_port(authority: &str) -> Option<(&str, u16)> {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => Some((host, port.parse().ok()?)),
        _ => Some((authority, 80)),
    }
}

/// The head of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Head {
    status: u16,
    location: Option<String>,
    length: Option<usize>,
    chunked: bool,
}

/// Reads the head of an answer, without the empty line after it. `None` if it is none.
fn parse_head(head: &[u8]) -> Option<Head> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split('\n').map(|line| line.trim_end_matches('\r'));
    let rest = lines.next()?.strip_prefix("HTTP/1.")?;
    let (_minor, rest) = rest.split_once(' ')?;
    let digits = rest.get(..3)?;
    let status = digits.parse().ok().filter(|status| (100..1000).contains(status))?;
    let mut head = Head { status, location: None, length: None, chunked: false };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "location" => head.location = Some(value.to_owned()),
            "content-length" => head.length = value.parse().ok(),
            "transfer-encoding" => head.chunked = value.to_ascii_lowercase().ends_with("chunked"),
            _ => {}
        }
    }
    Some(head)
}

/// What of a chunked body has come, without the sizes between, and whether that is all.
fn dechunk(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = raw.iter().position(|b| *b == b'\n') else { return (body, false) };
        let line = String::from_utf8_lossy(raw.get(..end).unwrap_or_default()).into_owned();
        let size = line.split(';').next().unwrap_or_default().trim();
        let Ok(size) = usize::from_str_radix(size, 16) else { return (body, true) };
        raw = raw.get(end.saturating_add(1)..).unwrap_or_default();
        if size == 0 {
            return (body, true);
        }
        body.extend_from_slice(raw.get(..size.min(raw.len())).unwrap_or_default());
        match raw.get(size..).and_then(|rest| rest.strip_prefix(b"\r\n")) {
            Some(rest) => raw = rest,
            None => return (body, false),
        }
    }
}

/// Sends a request, follows redirects within the host, and judges the answer.
pub(super) async fn get(mut request: Request, any_status: bool) -> Answer {
    for _ in 0..MAX_REQUESTS {
        let (head, body) = match exchange(&request).await {
            Ok(answer) => answer,
            Err(answer) => return answer,
        };
        let redirected = match head.status {
            301 | 302 | 303 | 307 | 308 => {
                head.location.as_deref().map(|location| request.redirected(location))
            }
            _ => None,
        };
        match redirected {
            Some(Some(next)) => request = next,
            // To another host: as the kubelet, that is a success.
            Some(None) => return Answer::success("Probe terminated redirects"),
            None if any_status || (200..400).contains(&head.status) => {
                return Answer::success(String::from_utf8_lossy(&body));
            }
            None => {
                let status = head.status;
                return Answer::failure(format!("HTTP probe failed with statuscode: {status}"));
            }
        }
    }
    Answer::failure(format!("stopped after {MAX_REQUESTS} redirects"))
}

/// One request and its answer, as much of it as is wanted.
async fn exchange(request: &Request) -> Result<(Head, Vec<u8>), Answer> {
    let broken = |e: std::io::Error| Answer::failure(format!("read the answer: {e}"));
    let mut stream = connect(request.address).await?;
    let sent = stream.write_all(request.encode().as_bytes()).await;
    sent.map_err(|e| Answer::failure(format!("send the request: {e}")))?;
    let mut raw = Vec::new();
    for _ in 0..MAX_INTERIM {
        let head = read_head(&mut stream, &mut raw).await?;
        if head.status < 200 {
            continue;
        }
        let body = read_body(&mut stream, raw, &head).await.map_err(broken)?;
        return Ok((head, body));
    }
    Err(Answer::failure("too many interim answers"))
}

/// Reads up to the end of a head, and takes it out of `raw`.
async fn read_head(stream: &mut TcpStream, raw: &mut Vec<u8>) -> Result<Head, Answer> {
    loop {
        if let Some((end, next)) = head_end(raw) {
            let head = parse_head(raw.get(..end).unwrap_or_default());
            raw.drain(..next);
            return head.ok_or_else(|| Answer::failure("the answer is no HTTP/1"));
        }
        if raw.len() > MAX_HEAD {
            return Err(Answer::failure("the answer's head is too long"));
        }
        match stream.read_buf(raw).await {
            Ok(0) => return Err(Answer::failure("the server closed the connection: EOF")),
            Ok(_) => {}
            Err(e) => return Err(Answer::failure(format!("read the answer: {e}"))),
        }
    }
}

/// Where a head ends, and where what follows it begins.
fn head_end(raw: &[u8]) -> Option<(usize, usize)> {
    let find = |pattern: &[u8]| raw.windows(pattern.len()).position(|window| window == pattern);
    let long = find(b"\r\n\r\n").map(|at| (at, at.saturating_add(4)));
    let short = find(b"\n\n").map(|at| (at, at.saturating_add(2)));
    [long, short].into_iter().flatten().min()
}

async fn read_body(
    stream: &mut TcpStream,
    mut raw: Vec<u8>,
    head: &Head,
) -> std::io::Result<Vec<u8>> {
    loop {
        let (mut body, mut complete) =
            if head.chunked { dechunk(&raw) } else { (raw.clone(), false) };
        if matches!(head.status, 204 | 304) {
            return Ok(Vec::new());
        }
        complete |= !head.chunked && head.length.is_some_and(|length| body.len() >= length);
        // The sizes between the chunks count too, so that tiny chunks have an end.
        if !complete && raw.len() < MAX_BODY && stream.read_buf(&mut raw).await? > 0 {
            continue;
        }
        body.truncate(MAX_BODY.min(head.length.unwrap_or(MAX_BODY)));
        return Ok(body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(path: &str, headers: &[(&str, &str)]) -> Result<Request, ProbeError> {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let address = "127.0.0.1:80".parse().unwrap();
        Request::new(String::new(), address, path.to_owned(), headers)
    }

    #[test]
    fn a_request_is_what_the_kubelet_sends() {
        let text = request("/a?b", &[("X-A", "b"), ("accept", "")]).unwrap().encode();
        assert_eq!(
            text,
            "GET /a?b HTTP/1.1\r\nHost: 127.0.0.1:80\r\nUser-Agent: kube-probe/husk\r\nX-A: b\r\n\
             Connection: close\r\n\r\n"
        );
        let text = request("/", &[("host", "a.example")]).unwrap().encode();
        assert!(text.contains("host: a.example\r\n") && !text.contains("Host: "));
    }

    #[test]
    fn a_request_cannot_carry_another() {
        assert!(matches!(request("/a b", &[]), Err(ProbeError::Path(_))));
        assert!(matches!(request("a", &[]), Err(ProbeError::Path(_))));
        assert!(matches!(request("/\r\nX: y", &[]), Err(ProbeError::Path(_))));
        assert!(matches!(request("/", &[("a:", "b")]), Err(ProbeError::Header(_))));
        assert!(matches!(request("/", &[("a", "b\r\nc: d")]), Err(ProbeError::Header(_))));
    }

    #[test]
    fn redirects_stay_within_the_host() {
        let from = request("/a/b?c", &[]).unwrap();
        for (location, port, path) in [
            ("/x", 80, "/x"),
            ("x?y#z", 80, "/a/x?y"),
            ("http://127.0.0.1:8080/x", 8080, "/x"),
            ("HTTP://127.0.0.1", 80, "/"),
            ("http://127.0.0.1?q", 80, "/?q"),
        ] {
            let next = from.redirected(location).unwrap();
            assert_eq!((next.address.port(), next.path.as_str()), (port, path), "{location}");
        }
        for location in ["http://other/", "https://127.0.0.1/", "//other/x", "http://127.0.0.1:x/"]
        {
            assert_eq!(from.redirected(location), None, "{location}");
        }
    }

    #[test]
    fn heads_are_read() {
        let head =
            parse_head(b"HTTP/1.0 302 Found\r\nLOCATION:  /x \r\nContent-Length: 3").unwrap();
        let location = Some("/x".into());
        assert_eq!(head, Head { status: 302, location, length: Some(3), chunked: false });
        assert!(parse_head(b"HTTP/1.1 200\nTransfer-Encoding: gzip, Chunked").unwrap().chunked);
        for bad in [&b""[..], b"HTTP/2 200 OK", b"HTTP/1.1 20", b"HTTP/1.1 abc", b"SSH-2.0-x"] {
            assert_eq!(parse_head(bad), None);
        }
    }

    #[test]
    fn chunks_are_put_together() {
        assert_eq!(dechunk(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"), (b"abcde".to_vec(), true));
        assert_eq!(dechunk(b"3\r\nabc\r\n5\r\nde"), (b"abcde".to_vec(), false));
        assert_eq!(dechunk(b"zz\r\n"), (Vec::new(), true));
        assert_eq!(dechunk(b"ffffffffffffffff\r\nx"), (b"x".to_vec(), false));
    }

    /// A server that gives each connection the next of these answers; and its address.
    async fn serve(answers: Vec<String>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while head_end(&request).is_none() {
                    stream.read_buf(&mut request).await.unwrap();
                }
                // It may have heard enough before the end.
                let _sent = stream.write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    async fn ask(answers: &[&str], any_status: bool) -> Answer {
        let address = serve(answers.iter().map(|text| (*text).to_owned()).collect()).await;
        let request = Request::new(String::new(), address, "/".into(), Vec::new()).unwrap();
        get(request, any_status).await
    }

    #[tokio::test]
    async fn the_status_decides_and_redirects_are_followed() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi, and more";
        let away = |to: &str| format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n");
        assert_eq!(ask(&[ok], false).await, Answer::success("hi"));
        let interim = format!("HTTP/1.1 100 Continue\r\n\r\n{ok}");
        assert_eq!(ask(&[&interim], false).await, Answer::success("hi"));
        assert_eq!(ask(&[&away("/x"), ok], false).await, Answer::success("hi"));
        assert!(ask(&[&away("http://other/")], false).await.success);
        assert!(ask(&["HTTP/1.1 399 ?\r\n\r\n"], false).await.success);
        let failed = ask(&["HTTP/1.1 404 Not Found\r\n\r\n"], false).await;
        assert_eq!(failed, Answer::failure("HTTP probe failed with statuscode: 404"));
        assert!(ask(&["HTTP/1.1 500 Oh\r\n\r\n"], true).await.success);
        let circle = away("/");
        let failed = ask(&[circle.as_str(); MAX_REQUESTS], false).await;
        assert_eq!(failed, Answer::failure("stopped after 10 redirects"));
    }

    #[tokio::test]
    async fn answers_without_end_have_one() {
        let long = "x".repeat(MAX_HEAD);
        let body = ask(&[&format!("HTTP/1.1 200 OK\r\n\r\n{long}")], false).await;
        assert_eq!((body.success, body.message.len()), (true, MAX_BODY));
        let head = ask(&[&format!("HTTP/1.1 200 OK\r\nX: {long}{long}")], false).await;
        assert_eq!(head, Answer::failure("the answer's head is too long"));
        assert_eq!(ask(&["SSH-2.0-x\r\n\r\n"], false).await.message, "the answer is no HTTP/1");
        assert!(ask(&[""], false).await.message.contains("EOF"));
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_sends_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (parse_head(&bytes), dechunk(&bytes), head_end(&bytes));
            let text = String::from_utf8_lossy(&bytes);
            if let Some(next) = request("/a", &[]).unwrap().redirected(&text) {
                prop_assert!(is_path(&next.path));
            }
        }
    }
}

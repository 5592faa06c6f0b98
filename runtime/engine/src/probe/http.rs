//! HTTP/1.1 GET as the kubelet's probes make it: one request per connection, redirects within the
//! host, the beginning of the body.

use std::future::poll_fn;
use std::pin::{Pin, pin};

use http::header::{
    ACCEPT, CONNECTION, CONTENT_LENGTH, HOST, LOCATION, TRANSFER_ENCODING, USER_AGENT,
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::url::{Redirect, Url};
use super::{Answer, Dialer, Fault, MAX_MESSAGE, Route, tls};
use crate::pod::chain;
use crate::types::{HttpGet, Scheme};

/// Longest head of an answer in bytes, and most header lines in it.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 1000;

/// Most requests of one probe, redirects included: Go's, and so the kubelet's.
const MAX_REQUESTS: usize = 10;

/// What came back.
#[derive(Debug)]
struct Reply {
    status: StatusCode,
    location: Option<HeaderValue>,
    /// Its beginning.
    body: Vec<u8>,
}

/// Sends a request, follows redirects within the host, and judges the answer.
pub(super) async fn get<D: Dialer>(
    route: &Route<'_, D>,
    get: &HttpGet,
    any_status: bool,
) -> Result<Answer, Fault> {
    let bad = |what: &str| Fault::Server(format!("the request is none: {what}"));
    let mut url = Url::of(get).ok_or_else(|| bad("path"))?;
    let mut headers = headers(&get.headers).map_err(|name| bad(&name))?;
    for _ in 0..MAX_REQUESTS {
        let Reply { status, location, body } = exchange(route, &url, &headers).await?;
        let redirected = match status.as_u16() {
            301 | 302 | 303 | 307 | 308 => {
                location.map(|location| url.redirected(location.as_bytes()))
            }
            _ => None,
        };
        match redirected {
            Some(Redirect::Within(next)) => {
                // As Go: the name that the probe gives the server is for its own place.
                if next.authority() != url.authority() {
                    headers.remove(HOST);
                }
                url = next;
            }
            // As for the kubelet, that is a success.
            Some(Redirect::Elsewhere) => return Ok(success("Probe terminated redirects")),
            None if any_status || (200..400).contains(&status.as_u16()) => {
                return Ok(success(&String::from_utf8_lossy(&body)));
            }
            None => {
                let status = status.as_u16();
                return Err(Fault::Server(format!("HTTP probe failed with statuscode: {status}")));
            }
        }
    }
    Err(Fault::Server(format!("stopped after {MAX_REQUESTS} redirects")))
}

fn success(message: &str) -> Answer {
    Answer { success: true, message: message.to_owned() }
}

/// The headers of a request, but for the host. An empty value of what is there by default means:
/// without it.
fn headers(given: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in given {
        let bad = || name.clone();
        let parsed = HeaderName::try_from(name).map_err(|_| bad())?;
        let value = HeaderValue::try_from(value).map_err(|_| bad())?;
        // As Go: these say how the request is sent, and that is not the probe's to say; and there is
        // one host.
        let may_be = parsed != HOST || (!headers.contains_key(HOST) && !value.is_empty());
        if may_be && ![CONTENT_LENGTH, TRANSFER_ENCODING].contains(&parsed) {
            headers.try_append(parsed, value).map_err(|_| bad())?;
        }
    }
    for (name, default) in [(USER_AGENT, super::USER_AGENT), (ACCEPT, "*/*")] {
        match headers.get(&name) {
            None => drop(headers.insert(name, HeaderValue::from_static(default))),
            Some(value) if value.is_empty() => drop(headers.remove(name)),
            Some(_) => {}
        }
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(headers)
}

/// One request and its answer, as much of it as is wanted.
async fn exchange<D: Dialer>(
    route: &Route<'_, D>,
    url: &Url,
    headers: &HeaderMap,
) -> Result<Reply, Fault> {
    let mut request = Request::new(String::new());
    *request.uri_mut() = url.path.clone().into();
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(HOST) {
        let host = HeaderValue::try_from(url.authority());
        let host = host.map_err(|error| Fault::Server(format!("host: {error}")))?;
        request.headers_mut().insert(HOST, host);
    }
    let stream = route.dial(url.port).await?;
    let reply = match url.scheme {
        Scheme::Http => converse(stream, request).await,
        Scheme::Https => match tls::begin(stream, &url.host).await {
            Ok(stream) => converse(stream, request).await,
            Err(why) => Err(why),
        },
    };
    reply.map_err(Fault::Server)
}

/// Speaks HTTP over a connection, which is closed then.
async fn converse<S>(stream: S, request: Request<String>) -> Result<Reply, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        // As Go sends them. Some servers know headers only so.
        .title_case_headers(true)
        .ignore_invalid_headers_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| explain(&error))?;
    let ask = async {
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let location = head.headers.get(LOCATION).cloned();
        Ok(Reply { status: head.status, location, body: beginning(body).await? })
    };
    let (mut ask, connection) = (pin!(ask), pin!(connection));
    let reply: Result<Reply, hyper::Error> = tokio::select! {
        biased;
        reply = &mut ask => reply,
        ended = connection => match (ask.await, ended) {
            // That it ended is told to both; why, to one of them.
            (Err(error), Err(cause)) if error.is_canceled() => Err(cause),
            (reply, _) => reply,
        },
    };
    reply.map_err(|error| explain(&error))
}

/// Reads a body to its end, but no more than is told of it.
async fn beginning(mut body: Incoming) -> Result<Vec<u8>, hyper::Error> {
    let mut kept = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let Ok(data) = frame?.into_data() else { continue };
        let room = MAX_MESSAGE.saturating_sub(kept.len());
        kept.extend(data.iter().take(room));
        if data.len() >= room {
            break;
        }
    }
    Ok(kept)
}

fn explain(error: &hyper::Error) -> String {
    if error.is_parse_too_large() {
        "the answer's head is too long".into()
    } else if error.is_parse() {
        "the answer is no HTTP/1".into()
    } else if error.is_incomplete_message() {
        "the server closed the connection: EOF".into()
    } else {
        format!("read the answer: {}", chain(error))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn given(list: &[(&str, &str)]) -> Result<HeaderMap, String> {
        let list: Vec<_> = list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        headers(&list)
    }

    #[test]
    fn headers_are_those_of_the_kubelet_unless_they_are_given() {
        let plain = given(&[]).unwrap();
        assert!(plain[USER_AGENT].to_str().unwrap().starts_with("kube-probe/"));
        assert_eq!(
            (&plain[ACCEPT], &plain[CONNECTION]),
            (&"*/*".parse().unwrap(), &"close".parse().unwrap())
        );
        let other =
            given(&[("X-A", "b"), ("x-a", "c"), ("accept", ""), ("User-Agent", "me")]).unwrap();
        assert_eq!(other.get_all("X-A").iter().collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!((other.get(ACCEPT), &other[USER_AGENT]), (None, &"me".parse().unwrap()));
        let framing = given(&[("Content-Length", "7"), ("Transfer-Encoding", "chunked")]).unwrap();
        assert!(!framing.contains_key(CONTENT_LENGTH) && !framing.contains_key(TRANSFER_ENCODING));
        let hosts = given(&[("host", ""), ("Host", "a"), ("HOST", "b")]).unwrap();
        assert_eq!(hosts.get_all(HOST).iter().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn a_request_cannot_carry_another() {
        for (name, value) in [("a:", "b"), ("", "b"), ("a b", "c"), ("a", "b\r\nc: d"), ("a", "\0")]
        {
            assert_eq!(given(&[(name, value)]), Err(name.to_owned()), "{name:?}: {value:?}");
        }
        let get = |path: &str| HttpGet {
            scheme: Scheme::Http,
            host: String::new(),
            port: 80,
            path: path.into(),
            headers: Vec::new(),
        };
        for path in ["", "a", "*", "/a b", "/\r\nX: y", "/a\0"] {
            assert_eq!(Url::of(&get(path)), None, "{path:?}");
        }
    }
}

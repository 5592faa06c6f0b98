//! Questions to servers of the pod, put from within its network namespace, which is the guest's.
//!
//! The servers are the containers', so that whatever they answer is hostile: it is read within
//! bounds of size and time.

mod grpc;
mod http;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use husk_proto::agent::{Grpc, HttpGet, HttpHeader, ProbeRequest, TcpSocket, probe_request};
use tokio::net::TcpStream;

/// Most bytes of an answer that are told, as in the kubelet.
const MAX_MESSAGE: usize = 10 * 1024;

/// Longest time that a question may take.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// A question that cannot be put.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProbeError {
    #[error("check: there is none")]
    NoCheck,
    #[error("timeout_ms: {0} must be 1 to 86400000")]
    Timeout(u64),
    #[error("port: {0} must be 1 to 65535")]
    Port(u32),
    #[error("host: {0:?} must be an address, localhost or empty")]
    Host(String),
    #[error("scheme: {0:?} must be HTTP: there is no TLS here")]
    Scheme(String),
    #[error("path: {0:?} must begin with a slash, without spaces and control characters")]
    Path(String),
    #[error("headers: {0:?} is none")]
    Header(String),
}

/// What came of a question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) success: bool,
    pub(crate) message: String,
}

impl Answer {
    fn success(message: impl Into<String>) -> Self {
        Answer { success: true, message: cut(message.into()) }
    }

    fn failure(message: impl Into<String>) -> Self {
        Answer { success: false, message: cut(message.into()) }
    }
}

/// The beginning of a text, at most [`MAX_MESSAGE`] bytes.
fn cut(mut text: String) -> String {
    let end = (0..=MAX_MESSAGE.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

/// Puts a question and waits for the answer, or for the time to be over.
///
/// # Errors
/// [`ProbeError`] if it cannot be put. That there is no answer is one.
pub(crate) async fn put(request: ProbeRequest) -> Result<Answer, ProbeError> {
    let ProbeRequest { check, timeout_ms } = request;
    let limit = Duration::from_millis(timeout_ms);
    if limit.is_zero() || limit > MAX_TIMEOUT {
        return Err(ProbeError::Timeout(timeout_ms));
    }
    let ask = async {
        match check.ok_or(ProbeError::NoCheck)? {
            probe_request::Check::TcpSocket(TcpSocket { host, port }) => {
                Ok(match connect(address(&host, port)?).await {
                    Ok(_) => Answer::success(""),
                    Err(answer) => answer,
                })
            }
            probe_request::Check::HttpGet(get) => {
                let HttpGet { host, port, path, scheme, headers, any_status } = get;
                if !matches!(scheme.as_str(), "" | "HTTP") {
                    return Err(ProbeError::Scheme(scheme));
                }
                let address = address(&host, port)?;
                let headers = headers.into_iter().map(|HttpHeader { name, value }| (name, value));
                let request = http::Request::new(host, address, path, headers.collect())?;
                Ok(http::get(request, any_status).await)
            }
            probe_request::Check::Grpc(Grpc { port, service }) => {
                Ok(grpc::check(address("", port)?, &service).await)
            }
        }
    };
    match tokio::time::timeout(limit, ask).await {
        Ok(answer) => answer,
        Err(_) => Ok(Answer::failure(format!("no answer in {limit:?}"))),
    }
}

/// Where a server is. The pod's own address is the loopback's, as long as it has no other.
fn address(host: &str, port: u32) -> Result<SocketAddr, ProbeError> {
    let port = match u16::try_from(port) {
        Ok(port @ 1..) => port,
        _ => return Err(ProbeError::Port(port)),
    };
    let ip = match host {
        "" | "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        text => text.parse().map_err(|_| ProbeError::Host(text.to_owned()))?,
    };
    Ok(SocketAddr::new(ip, port))
}

async fn connect(address: SocketAddr) -> Result<TcpStream, Answer> {
    let failed = |e: std::io::Error| Answer::failure(format!("connect to {address}: {e}"));
    TcpStream::connect(address).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_are_reached() {
        assert_eq!(address("", 80).unwrap().to_string(), "127.0.0.1:80");
        assert_eq!(address("::1", 65535).unwrap().to_string(), "[::1]:65535");
        assert_eq!(address("example.com", 1), Err(ProbeError::Host("example.com".into())));
        assert_eq!(address("", 0), Err(ProbeError::Port(0)));
        assert_eq!(address("", 65536), Err(ProbeError::Port(65536)));
    }

    #[tokio::test]
    async fn what_cannot_be_asked_is_told_apart_from_a_failure() {
        let tcp =
            |port| Some(probe_request::Check::TcpSocket(TcpSocket { host: String::new(), port }));
        let put = async |check, timeout_ms| put(ProbeRequest { check, timeout_ms }).await;
        assert_eq!(put(None, 1).await, Err(ProbeError::NoCheck));
        assert_eq!(put(tcp(1), 0).await, Err(ProbeError::Timeout(0)));
        assert_eq!(put(tcp(1), u64::MAX).await, Err(ProbeError::Timeout(u64::MAX)));
        assert_eq!(put(tcp(0), 1000).await, Err(ProbeError::Port(0)));
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let refused = put(tcp(port.into()), 60_000).await.unwrap();
        assert!(!refused.success && refused.message.contains("refused"), "{refused:?}");
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_is_given_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port().into();
        let get = HttpGet { port, path: "/".into(), ..HttpGet::default() };
        let check = Some(probe_request::Check::HttpGet(get));
        let answer = put(ProbeRequest { check, timeout_ms: 50 }).await.unwrap();
        assert_eq!(answer, Answer::failure("no answer in 50ms"));
        let check =
            Some(probe_request::Check::TcpSocket(TcpSocket { host: "localhost".into(), port }));
        assert!(put(ProbeRequest { check, timeout_ms: 60_000 }).await.unwrap().success);
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let text = format!("{}\u{e4}", "x".repeat(MAX_MESSAGE - 1));
        assert_eq!(cut(text).len(), MAX_MESSAGE - 1);
    }
}

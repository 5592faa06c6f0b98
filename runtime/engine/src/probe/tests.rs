//! Questions to real servers, good and hostile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::*;
use crate::types::Scheme;

const LONG: Duration = Duration::from_secs(100);

/// Most of an answer that goes into a message: [`clean`]'s bound.
const TOLD: usize = 4096;

/// The pod's network is this machine's.
#[derive(Debug)]
struct Here;

impl Dialer for Here {
    type Stream = TcpStream;

    async fn dial(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<TcpStream, String>, GuestError> {
        let address = address.unwrap_or([127, 0, 0, 1].into());
        let connected = tokio::time::timeout(limit, TcpStream::connect((address, port))).await;
        Ok(match connected {
            Ok(connected) => connected.map_err(|error| format!("connect: {error}")),
            Err(_) => Err("connect: too late".into()),
        })
    }

    async fn knock(
        &self,
        address: Option<IpAddr>,
        port: u16,
        limit: Duration,
    ) -> Result<Result<(), String>, GuestError> {
        Ok(self.dial(address, port, limit).await?.map(drop))
    }
}

fn failure(message: &str) -> Answer {
    Answer { success: false, message: message.into() }
}

fn success(message: &str) -> Answer {
    Answer { success: true, message: message.into() }
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Where nobody listens: a port that was free a moment ago.
async fn nobody() -> u16 {
    listen().await.1
}

fn get(scheme: Scheme, host: &str, port: u16) -> HttpGet {
    HttpGet { scheme, host: host.into(), port, path: "/".into(), headers: Vec::new() }
}

async fn ask(get: &HttpGet, any_status: bool, limit: Duration) -> Answer {
    put(&Here, Question::Http { get, any_status }, limit).await.unwrap()
}

/// A certificate that nobody would take: its own, for another name.
fn tls() -> TlsAcceptor {
    let made = rcgen::generate_simple_self_signed(["other.example".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// What a server saw: the name that it was called by in TLS, and the request.
type Seen = mpsc::UnboundedReceiver<(Option<String>, String)>;

/// A server that gives each connection the next of these answers.
async fn serve(tls: Option<TlsAcceptor>, answers: Vec<String>) -> (u16, Seen) {
    let (listener, port) = listen().await;
    let (sender, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for answer in answers {
            let (stream, _) = listener.accept().await.unwrap();
            match &tls {
                None => drop(sender.send((None, reply(stream, &answer).await))),
                Some(acceptor) => {
                    let Ok(stream) = acceptor.accept(stream).await else { continue };
                    let name = stream.get_ref().1.server_name().map(str::to_owned);
                    drop(sender.send((name, reply(stream, &answer).await)));
                }
            }
        }
    });
    (port, seen)
}

/// Reads a request, and answers it, as far as the client wants to hear it.
async fn reply(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &str) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
            break;
        }
    }
    if stream.write_all(answer.as_bytes()).await.is_ok() {
        drop(stream.shutdown().await);
    }
    String::from_utf8(request).unwrap()
}

/// Asks a server with these answers without TLS.
async fn ask_for(answers: &[&str], any_status: bool) -> Answer {
    let answers = answers.iter().map(|text| (*text).to_owned()).collect();
    let (port, _seen) = serve(None, answers).await;
    ask(&get(Scheme::Http, "", port), any_status, LONG).await
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";

fn away(to: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n")
}

#[tokio::test]
async fn a_request_is_what_the_kubelet_sends() {
    let (port, mut seen) = serve(None, vec![OK.into(), OK.into()]).await;
    let mut probe = get(Scheme::Http, "", port);
    probe.path = "/a?b".into();
    probe.headers = vec![("X-A".into(), "b".into()), ("accept".into(), String::new())];
    assert_eq!(ask(&probe, false, LONG).await, success("hi"));
    let (_, request) = seen.recv().await.unwrap();
    let mut lines: Vec<_> = request.trim_end().split("\r\n").collect();
    assert_eq!(lines.remove(0), "GET /a?b HTTP/1.1");
    lines.sort_unstable();
    let agent = format!("User-Agent: {USER_AGENT}");
    let host = format!("Host: 127.0.0.1:{port}");
    assert_eq!(lines, ["Connection: close", host.as_str(), agent.as_str(), "X-A: b"]);

    probe.headers = vec![("host".into(), "a.example".into())];
    assert_eq!(ask(&probe, false, LONG).await, success("hi"));
    let (_, request) = seen.recv().await.unwrap();
    assert!(request.contains("\r\nHost: a.example\r\n"), "{request}");
    assert_eq!(request.matches("Host: ").count(), 1, "{request}");
}

#[tokio::test]
async fn the_status_decides_and_redirects_are_followed() {
    let more = format!("{OK}, and more");
    assert_eq!(ask_for(&[&more], false).await, success("hi"));
    let interim = format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nX: y\r\n\r\n{OK}");
    assert_eq!(ask_for(&[&interim], false).await, success("hi"));
    assert_eq!(ask_for(&[&away("/x"), OK], false).await, success("hi"));
    assert_eq!(ask_for(&["HTTP/1.0 200 OK\n\nold"], false).await, success("old"));
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                   3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n";
    assert_eq!(ask_for(&[chunked], false).await, success("abcde"));
    let elsewhere = ask_for(&[&away("http://other/")], false).await;
    assert_eq!(elsewhere, success("Probe terminated redirects"));
    assert!(ask_for(&["HTTP/1.1 302 Found\r\n\r\n"], false).await.success);
    assert!(ask_for(&["HTTP/1.1 399 ?\r\n\r\n"], false).await.success);
    assert!(ask_for(&["HTTP/1.1 204 No Content\r\n\r\n"], false).await.success);
    let failed = ask_for(&["HTTP/1.1 404 Not Found\r\n\r\n"], false).await;
    assert_eq!(failed, failure("HTTP probe failed with statuscode: 404"));
    assert!(ask_for(&["HTTP/1.1 500 Oh\r\n\r\n"], true).await.success);
    let circle = away("/");
    let failed = ask_for(&[circle.as_str(); 10], false).await;
    assert_eq!(failed, failure("stopped after 10 redirects"));
}

#[tokio::test]
async fn answers_without_end_have_one() {
    let long = "x".repeat(300 * 1024);
    let body = ask_for(&[&format!("HTTP/1.1 200 OK\r\n\r\n{long}")], false).await;
    assert_eq!((body.success, body.message.len()), (true, TOLD));
    let head = ask_for(&[&format!("HTTP/1.1 200 OK\r\nX: {long}")], false).await;
    assert_eq!(head, failure("the answer's head is too long"));
    let heads = "X: y\r\n".repeat(5000);
    let head = ask_for(&[&format!("HTTP/1.1 200 OK\r\n{heads}\r\n")], false).await;
    assert_eq!(head, failure("the answer's head is too long"));
    let too_much = "the server sends more than 262144 bytes";
    let interim = "HTTP/1.1 100 Continue\r\n\r\n".repeat(20_000);
    let got = ask_for(&[&interim], false).await;
    assert!(!got.success && got.message.ends_with(too_much), "{got:?}");
    let chunk = "1;x\r\nx\r\n".repeat(100_000);
    let chunks = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}");
    assert!(ask_for(&[&chunks], false).await.success);
    let extension = "a".repeat(300 * 1024);
    let chunks = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;{extension}\r\nx");
    assert!(!ask_for(&[&chunks], false).await.success);
}

#[tokio::test]
async fn what_is_no_answer_is_a_failure() {
    for (answer, words) in [
        ("SSH-2.0-x\r\n\r\n", "the answer is no HTTP/1"),
        ("HTTP/2 200 OK\r\n\r\n", "the answer is no HTTP/1"),
        ("HTTP/1.1 20\r\n\r\n", "the answer is no HTTP/1"),
        ("HTTP/1.1 abc\r\n\r\n", "the answer is no HTTP/1"),
        ("", "the server closed the connection: EOF"),
        ("HTTP/1.1 200 OK\r\nX", "the server closed the connection: EOF"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "read the answer: "),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "read the answer: "),
    ] {
        let got = ask_for(&[answer], false).await;
        assert!(!got.success && got.message.starts_with(words), "{answer:?}: {got:?}");
    }
}

#[tokio::test]
async fn any_certificate_is_taken_and_only_names_are_told() {
    let (port, mut seen) = serve(Some(tls()), vec![OK.into(); 3]).await;
    for (host, name) in [("", None), ("127.0.0.1", None), ("localhost", Some("localhost"))] {
        assert_eq!(ask(&get(Scheme::Https, host, port), false, LONG).await, success("hi"));
        let (told, request) = seen.recv().await.unwrap();
        assert_eq!(told.as_deref(), name);
        let host = name.unwrap_or("127.0.0.1");
        assert!(request.contains(&format!("\r\nHost: {host}:{port}\r\n")), "{request}");
    }
}

/// Python's servers do so.
#[tokio::test]
async fn a_server_of_https_may_just_close_the_connection() {
    let (listener, port) = listen().await;
    let acceptor = tls();
    tokio::spawn(async move {
        for answer in
            ["HTTP/1.0 200 OK\r\n\r\nold", "HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\ncut"]
        {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            let (mut stream, _) = stream.into_inner();
            stream.shutdown().await.unwrap();
            // A reset would take the answer along.
            drop(stream.read_to_end(&mut Vec::new()).await);
        }
    });
    let probe = get(Scheme::Https, "", port);
    assert_eq!(ask(&probe, false, LONG).await, success("old"));
    assert!(!ask(&probe, false, LONG).await.success);
}

#[tokio::test]
async fn redirects_lead_from_http_to_https_and_back() {
    let (last, _seen) = serve(None, vec![OK.into()]).await;
    let (second, _seen) =
        serve(Some(tls()), vec![away(&format!("http://127.0.0.1:{last}/x"))]).await;
    let (first, _seen) = serve(None, vec![away(&format!("https://127.0.0.1:{second}/"))]).await;
    assert_eq!(ask(&get(Scheme::Http, "", first), false, LONG).await, success("hi"));
}

#[tokio::test]
async fn the_name_that_a_probe_gives_a_server_stays_there() {
    let (last, mut seen) = serve(None, vec![OK.into()]).await;
    let answers = vec![away("/same"), away(&format!("//127.0.0.1:{last}/"))];
    let (first, mut first_seen) = serve(None, answers).await;
    let mut probe = get(Scheme::Http, "", first);
    probe.headers = vec![("Host".into(), "a.example".into())];
    assert_eq!(ask(&probe, false, LONG).await, success("hi"));
    for path in ["/", "/same"] {
        let (_, request) = first_seen.recv().await.unwrap();
        assert!(request.starts_with(&format!("GET {path} ")), "{request}");
        assert!(request.contains("\r\nHost: a.example\r\n"), "{request}");
    }
    let (_, request) = seen.recv().await.unwrap();
    assert!(request.contains(&format!("\r\nHost: 127.0.0.1:{last}\r\n")), "{request}");
}

#[tokio::test]
async fn tls_with_one_that_has_none_is_a_failure_and_so_is_the_reverse() {
    let (port, _seen) = serve(None, vec![OK.into()]).await;
    let (listener, silent) = listen().await;
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream.read_to_end(&mut Vec::new()).await);
    });
    let got = ask(&get(Scheme::Https, "", silent), false, LONG).await;
    assert!(!got.success && got.message.starts_with("TLS: "), "{got:?}");
    // One that waits for the end of a request that never comes.
    let got = ask(&get(Scheme::Https, "", port), false, Duration::from_millis(200)).await;
    assert_eq!(got, failure("no answer in 200ms"));
    let (port, _seen) = serve(Some(tls()), vec![OK.into()]).await;
    assert!(!ask(&get(Scheme::Http, "", port), false, LONG).await.success);
}

#[tokio::test]
async fn a_server_that_does_not_accept_or_answer_is_a_failure() {
    let port = nobody().await;
    let socket = TcpSocket { host: String::new(), port };
    let refused = put(&Here, Question::Tcp(&socket), LONG).await.unwrap();
    assert!(!refused.success && refused.message.contains("refused"), "{refused:?}");
    let refused = ask(&get(Scheme::Http, "localhost", port), true, LONG).await;
    assert!(!refused.success && refused.message.contains("refused"), "{refused:?}");

    let (_listener, port) = listen().await;
    let silent = ask(&get(Scheme::Http, "", port), true, Duration::from_millis(50)).await;
    assert_eq!(silent, failure("no answer in 50ms"));
    let socket = TcpSocket { host: "localhost".into(), port };
    assert!(put(&Here, Question::Tcp(&socket), LONG).await.unwrap().success);
    // Its label is too long for any resolver.
    let socket = TcpSocket { host: "a".repeat(64), port };
    let unknown = put(&Here, Question::Tcp(&socket), LONG).await.unwrap();
    assert!(!unknown.success && unknown.message.starts_with("look up aaa"), "{unknown:?}");
}

#[tokio::test]
async fn a_name_with_several_addresses_is_reached_by_the_one_that_accepts() {
    let (_listener, port) = listen().await;
    let route = |addresses: &[&str]| Route {
        dialer: &Here,
        addresses: addresses.iter().map(|address| address.parse().ok()).collect(),
        deadline: Instant::now() + LONG,
    };
    route(&["127.0.0.2", "127.0.0.3", "127.0.0.1"]).knock(port).await.unwrap();
    match route(&["127.0.0.2", "127.0.0.3"]).knock(port).await {
        Err(Fault::Server(why)) => assert!(why.contains("refused"), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// The agent that refuses, or the guest that is lost, is no failure of the server.
#[tokio::test]
async fn what_the_guest_cannot_do_is_no_answer() {
    struct Nowhere;
    impl Dialer for Nowhere {
        type Stream = TcpStream;
        async fn dial(
            &self,
            _: Option<IpAddr>,
            _: u16,
            _: Duration,
        ) -> Result<Result<TcpStream, String>, GuestError> {
            Err(GuestError::Nonsense { rpc: "Dial", what: "x" })
        }
        async fn knock(
            &self,
            _: Option<IpAddr>,
            _: u16,
            _: Duration,
        ) -> Result<Result<(), String>, GuestError> {
            Err(GuestError::Nonsense { rpc: "Dial", what: "x" })
        }
    }
    let (http, tcp) = (get(Scheme::Http, "", 1), TcpSocket { host: String::new(), port: 1 });
    for question in [
        Question::Http { get: &http, any_status: true },
        Question::Tcp(&tcp),
        Question::Grpc { port: 1, service: "" },
    ] {
        let got = put(&Nowhere, question, LONG).await;
        assert!(matches!(got, Err(GuestError::Nonsense { .. })), "{got:?}");
    }
}

/// A server of gRPC that answers one question with this data and code, and is told when the client
/// goes.
async fn serve_grpc(data: Vec<u8>, code: &'static str) -> (u16, tokio::task::JoinHandle<()>) {
    let (listener, port) = listen().await;
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        let agent = request.headers()["user-agent"].to_str().unwrap();
        assert!(agent.starts_with(USER_AGENT), "{agent}");
        let response = ::http::Response::builder().header("content-type", "application/grpc");
        let mut send = respond.send_response(response.body(()).unwrap(), false).unwrap();
        send.send_data(data.into(), false).unwrap();
        let mut trailers = ::http::HeaderMap::new();
        trailers.insert("grpc-status", code.parse().unwrap());
        send.send_trailers(trailers).unwrap();
        while let Some(Ok(_)) = connection.accept().await {}
    });
    (port, served)
}

async fn ask_grpc(port: u16) -> Answer {
    put(&Here, Question::Grpc { port, service: "a" }, LONG).await.unwrap()
}

#[tokio::test]
async fn only_a_service_that_serves_is_healthy() {
    let status = |status: u8| vec![0, 0, 0, 0, 2, 8, status];
    for (data, code, expected) in [
        (status(1), "0", success("service healthy")),
        (status(2), "0", failure("service unhealthy: NOT_SERVING")),
        (status(9), "0", failure("service unhealthy: ?")),
        // The default value is no byte at all.
        (vec![0; 5], "0", failure("service unhealthy: UNKNOWN")),
        (vec![], "12", failure("this server does not implement the grpc health protocol")),
        (vec![], "5", failure("gRPC status 5: ")),
    ] {
        let (port, served) = serve_grpc(data, code).await;
        assert_eq!(ask_grpc(port).await, expected);
        // Nothing of the connection is left.
        tokio::time::timeout(LONG, served).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_answer_of_grpc_that_makes_no_sense_is_a_failure() {
    let long = [&[0, 0, 0, 8, 0][..], &[0; 2048]].concat();
    for data in [vec![], vec![0, 0, 0], vec![1, 0, 0, 0, 2, 8, 1], vec![0, 0, 0, 0, 1, 8], long] {
        let (port, _served) = serve_grpc(data.clone(), "0").await;
        let got = ask_grpc(port).await;
        assert!(!got.success && got.message.starts_with("gRPC"), "{data:?}: {got:?}");
    }
    // A server of something else.
    let (port, _seen) = serve(None, vec!["HTTP/1.1 400 Bad Request\r\n\r\n".into()]).await;
    let got = ask_grpc(port).await;
    assert!(!got.success && got.message.starts_with("gRPC: "), "{got:?}");
}

/// A server that takes nothing and says nothing holds nobody, and the end is told at once.
#[tokio::test]
async fn of_a_question_that_is_given_up_no_connection_is_left() {
    let (listener, port) = listen().await;
    let http = get(Scheme::Http, "", port);
    let https = get(Scheme::Https, "", port);
    for question in [
        Question::Http { get: &http, any_status: false },
        Question::Http { get: &https, any_status: false },
        Question::Grpc { port, service: "" },
    ] {
        let answer = put(&Here, question, Duration::from_millis(100));
        let (answer, (mut stream, _)): (_, (TcpStream, SocketAddr)) =
            tokio::join!(answer, async { listener.accept().await.unwrap() });
        assert_eq!(answer.unwrap(), failure("no answer in 100ms"));
        let end = tokio::time::timeout(LONG, stream.read_to_end(&mut Vec::new())).await;
        assert!(end.unwrap().is_ok());
    }
}

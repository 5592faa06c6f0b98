//! Connections to servers in containers, carried to the host.

use std::time::Duration;

use husk_proto::agent as wire;
use husk_proto::agent::dial_response::Result::{Connected, Failure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::guest::{Guest, LIMIT, Options, base_spec};

/// Far longer than any server takes.
const LONG_MS: u64 = 60_000;

/// As `agent.proto` says.
const MAX_CONNECTIONS: usize = 128;

type Call = JoinHandle<Result<wire::DialResponse, tonic::Status>>;

fn request(port: u32, stream_port: u32) -> wire::DialRequest {
    wire::DialRequest { host: String::new(), port, stream_port, timeout_ms: LONG_MS }
}

fn dial(guest: &Guest, request: wire::DialRequest) -> Call {
    let mut client = guest.client();
    tokio::spawn(async move { client.dial(request).await.map(tonic::Response::into_inner) })
}

/// A connection to a server that accepts.
async fn tunnel(guest: &Guest, port: u32) -> (UnixStream, Call) {
    let (stream_port, listener) = guest.listen();
    let call = dial(guest, request(port, stream_port));
    let accepted = tokio::time::timeout(LIMIT, listener.accept()).await;
    (accepted.expect("the agent came").unwrap().0, call)
}

/// Whether a server accepts, or else why not.
async fn knock(guest: &Guest, port: u32) -> Result<(), String> {
    match dial(guest, request(port, 0)).await.unwrap().unwrap().result {
        Some(Connected(wire::Connected {})) => Ok(()),
        Some(Failure(why)) => Err(why),
        None => panic!("an empty answer"),
    }
}

async fn start(guest: &Guest, id: &str, script: &str) {
    let script = format!("{script}\nsleep 100000");
    guest.start(id, base_spec(&["sh", "-c", &script]), Options::default()).await;
}

async fn listens(guest: &Guest, port: u32) {
    let wait = async {
        while knock(guest, port).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("the server listens");
}

#[tokio::test]
async fn a_server_in_a_container_is_reached_from_the_host() {
    let guest = Guest::boot().await;
    start(&guest, "a", "mkdir /www && echo fine > /www/ok && httpd -p 8080 -h /www").await;
    listens(&guest, 8080).await;
    let before = guest.count_left();

    let (mut stream, call) = tunnel(&guest, 8080).await;
    stream.write_all(b"GET /ok HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(" 200 OK") && answer.ends_with("\r\n\r\nfine\n"), "{answer}");
    // The server is done, and the host is when it closes.
    drop(stream);
    let answer = call.await.unwrap().unwrap();
    assert_eq!(answer.result, Some(Connected(wire::Connected {})));

    // Nothing comes to the host if nobody listens.
    let (stream_port, listener) = guest.listen();
    let refused = dial(&guest, request(9, stream_port)).await.unwrap().unwrap().result;
    assert!(matches!(&refused, Some(Failure(why)) if why.contains("refused")), "{refused:?}");
    let nobody = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
    assert!(nobody.is_err());
    assert!(knock(&guest, 9).await.unwrap_err().contains("refused"));
    drop(listener);
    assert_eq!(guest.count_left(), before);
    guest.signal_all("a", 9).await.unwrap();
}

#[tokio::test]
async fn the_end_of_one_direction_leaves_the_other() {
    let guest = Guest::boot().await;
    // It answers only after all of the question.
    start(&guest, "a", "nc -ll -p 8080 -e sh -c 'wc -c; echo done' &").await;
    listens(&guest, 8080).await;
    let (mut stream, call) = tunnel(&guest, 8080).await;
    stream.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "1048576\ndone\n");
    assert!(call.await.unwrap().is_ok());
    guest.signal_all("a", 9).await.unwrap();
}

#[tokio::test]
async fn a_host_that_reads_nothing_grows_nothing_in_the_agent() {
    let guest = Guest::boot().await;
    start(&guest, "a", "nc -ll -p 8080 -e dd if=/dev/zero bs=65536 count=1024 &").await;
    listens(&guest, 8080).await;
    let (mut stream, call) = tunnel(&guest, 8080).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = guest.stats().await.agent_rss;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = guest.stats().await.agent_rss;
    assert!(after <= before + (1 << 20), "{before} -> {after}");
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => break,
            count => total += count,
        }
    }
    assert_eq!(total, 64 << 20);
    drop(stream);
    assert!(call.await.unwrap().is_ok());
    guest.signal_all("a", 9).await.unwrap();
}

#[tokio::test]
async fn there_are_only_so_many_and_those_that_are_given_up_leave_nothing() {
    let guest = Guest::boot().await;
    start(&guest, "a", "nc -ll -p 8080 -e sleep 100000 &").await;
    listens(&guest, 8080).await;
    let descriptors = |guest: &Guest| guest.count_left()[3];
    let before = descriptors(&guest);
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        held.push(tunnel(&guest, 8080).await);
    }
    let refused = dial(&guest, request(8080, 0)).await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    for (_, call) in &held {
        call.abort();
    }
    // The server never closes, and the host's ends are open: it is the call's end that counts.
    for (stream, call) in &mut held {
        assert!(call.await.unwrap_err().is_cancelled());
        let end = tokio::time::timeout(LIMIT, stream.read(&mut [0])).await;
        assert_eq!(end.expect("the connection ends").unwrap(), 0);
    }
    assert_eq!(descriptors(&guest), before);
    listens(&guest, 8080).await;
    guest.signal_all("a", 9).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_connections() {
    let mut guest = Guest::boot().await;
    start(&guest, "a", "nc -ll -p 8080 -e sh -c 'echo hi; sleep 100000' &").await;
    listens(&guest, 8080).await;
    let (mut stream, call) = tunnel(&guest, 8080).await;
    // From here on it is a process's, and ends with that: the host's side is still open then.
    stream.read_exact(&mut [0; 3]).await.unwrap();
    guest.client().shutdown(wire::ShutdownRequest {}).await.unwrap();
    let ended = call.await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::FailedPrecondition, "{ended}");
    assert!(guest.ended().await.success());
}

//! Connections through an agent that a test plays.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use husk_vmm_api::Channel;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tonic::Code;
use tonic::{Request, Response, Status};

use super::*;
use crate::guest::MAX_FORWARDS;
use crate::vm::tests::{connection, vm_in_hand};

const LIMIT: Duration = Duration::from_secs(100);

/// What the agent does about a request: connects to its port, or not; what it answers, and when.
#[derive(Clone)]
struct Plan {
    connects: bool,
    answer: Result<Option<Wire>, Code>,
    /// When the answer comes.
    when: Arc<Notify>,
    /// Told when a request was given up or answered.
    over: Arc<Notify>,
    /// Hosts of which it says at once that they do not accept.
    refuses: &'static [&'static str],
}

impl Plan {
    fn new(connects: bool, answer: Result<Option<Wire>, Code>) -> Self {
        Plan { connects, answer, when: Arc::default(), over: Arc::default(), refuses: &[] }
    }

    /// Answers at once.
    fn at_once(self) -> Self {
        self.when.notify_one();
        self
    }
}

fn connected() -> Result<Option<Wire>, Code> {
    Ok(Some(Wire::Connected(Connected {})))
}

struct NotifyOnDrop(Arc<Notify>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// A guest whose agent follows a plan. Returns also where the guest's ends of its connections and
/// the requests come.
async fn guest(plan: Plan) -> (Guest, tokio::sync::mpsc::UnboundedReceiver<(StdUnixStream, u32)>) {
    let (vm, vmm) = vm_in_hand().await;
    let vmm: Arc<Channel> = Arc::new(vmm);
    let accept = Guest::expect(&vm);
    let stream = connection(&vmm, husk_proto::ports::CONTROL);
    stream.set_nonblocking(true).unwrap();
    let stream = UnixStream::from_std(stream).unwrap();
    let (made, connections) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let dial = move |request: Request<proto::DialRequest>| {
            let (plan, vmm, made) = (plan.clone(), vmm.clone(), made.clone());
            async move {
                let _over = NotifyOnDrop(plan.over.clone());
                let proto::DialRequest { host, port, stream_port, timeout_ms } =
                    request.into_inner();
                let limit = if host == "192.0.2.7" { 100_000 } else { 60_000 };
                assert_eq!((port, timeout_ms), (80, limit), "{host}");
                if plan.refuses.contains(&host.as_str()) {
                    let result = Some(Wire::Failure(format!("{host} refused")));
                    return Ok(Response::new(proto::DialResponse { result }));
                }
                if plan.connects {
                    made.send((connection(&vmm, stream_port), stream_port)).unwrap();
                }
                plan.when.notified().await;
                match plan.answer {
                    Ok(result) => Ok(Response::new(proto::DialResponse { result })),
                    Err(code) => Err(Status::new(code, "no")),
                }
            }
        };
        let answer = tower::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let dial = tower::service_fn(dial.clone());
            async move {
                let codec = tonic_prost::ProstCodec::default();
                let answer = tonic::server::Grpc::new(codec).unary(dial, request).await;
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(answer));
        // It breaks when the test has ended.
        drop(connection.await);
    });
    (Guest::connect(vm, accept, LIMIT).await.unwrap(), connections)
}

async fn dial(guest: &Guest) -> Result<Result<Tunnel, String>, GuestError> {
    guest.dial(Some("192.0.2.7".parse().unwrap()), 80, LIMIT).await
}

#[tokio::test]
async fn bytes_go_both_ways_and_the_call_ends_with_the_tunnel() {
    let plan = Plan::new(true, connected());
    let over = plan.over.clone();
    let (guest, mut connections) = guest(plan).await;
    let mut tunnel = dial(&guest).await.unwrap().unwrap();
    let (theirs, _) = connections.recv().await.unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut theirs = UnixStream::from_std(theirs).unwrap();
    tunnel.write_all(b"question").await.unwrap();
    tunnel.shutdown().await.unwrap();
    let mut text = String::new();
    theirs.read_to_string(&mut text).await.unwrap();
    theirs.write_all(b"answer").await.unwrap();
    theirs.shutdown().await.unwrap();
    tunnel.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "questionanswer");
    drop(tunnel);
    over.notified().await;
}

#[tokio::test]
async fn a_connection_that_ends_before_it_is_known_is_one() {
    let (guest, mut connections) = guest(Plan::new(true, connected()).at_once()).await;
    let mut tunnel = dial(&guest).await.unwrap().unwrap();
    drop(connections.recv().await.unwrap());
    assert_eq!(tunnel.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_server_that_does_not_accept_is_told_apart_from_an_agent_that_refuses() {
    let failure = || Ok(Some(Wire::Failure("connect: refused\x1b".into())));
    for (answer, expected) in [
        (failure(), Ok("connect: refused\u{fffd}")),
        (Err(Code::ResourceExhausted), Err(Some(Code::ResourceExhausted))),
        (Ok(None), Err(None)),
    ] {
        let (guest, _connections) = guest(Plan::new(false, answer.clone()).at_once()).await;
        let dialled = dial(&guest).await.map(|dialled| dialled.unwrap_err());
        match (dialled, expected) {
            (Ok(why), Ok(expected)) => assert_eq!(why, expected),
            (Err(GuestError::Refused { code, .. }), Err(Some(expected))) => {
                assert_eq!(code, expected);
            }
            (Err(GuestError::Nonsense { .. }), Err(None)) => {}
            (other, _) => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_forwarded_connection_goes_to_the_loopback_address_that_accepts() {
    for (refuses, first, refusal) in [
        (&[][..], Loopback::V4, None),
        (&["127.0.0.1"][..], Loopback::V4, None),
        (&["::1"][..], Loopback::V6, None),
        (&["127.0.0.1", "::1"][..], Loopback::V4, Some("127.0.0.1 refused; ::1 refused")),
        (&["127.0.0.1", "::1"][..], Loopback::V6, Some("::1 refused; 127.0.0.1 refused")),
    ] {
        let plan = Plan { refuses, ..Plan::new(true, connected()) };
        let (guest, _connections) = guest(plan).await;
        let forwarded = guest.forward(80, first).await.unwrap();
        assert_eq!(forwarded.err().as_deref(), refusal);
    }
}

#[tokio::test]
async fn forwarded_connections_leave_room_for_probes() {
    let (guest, _connections) = guest(Plan::new(true, connected())).await;
    let mut all = Vec::new();
    for _ in 0..MAX_FORWARDS {
        all.push(guest.forward(80, Loopback::V4).await.unwrap().unwrap());
    }
    let refused = guest.forward(80, Loopback::V4).await;
    assert!(matches!(refused, Err(GuestError::TooManyForwards)), "{refused:?}");
    dial(&guest).await.unwrap().unwrap();
    all.pop();
    guest.forward(80, Loopback::V4).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_is_finished_when_the_agent_says_so() {
    let plan = Plan::new(true, connected());
    let when = plan.when.clone();
    let (guest, mut connections) = guest(plan).await;
    let mut tunnel = dial(&guest).await.unwrap().unwrap();
    drop(connections.recv().await.unwrap());
    assert_eq!(tunnel.read(&mut [0]).await.unwrap(), 0);
    let mut finished = tokio::spawn(tunnel.finish());
    let early = tokio::time::timeout(Duration::from_millis(50), &mut finished).await;
    assert!(early.is_err(), "{early:?}");
    when.notify_one();
    finished.await.unwrap().unwrap();
}

#[tokio::test]
async fn to_knock_makes_no_connection() {
    let (guest, mut connections) = guest(Plan::new(false, connected()).at_once()).await;
    let address = Some("192.0.2.7".parse().unwrap());
    assert_eq!(guest.knock(address, 80, LIMIT).await.unwrap(), Ok(()));
    assert!(connections.try_recv().is_err());
}

#[tokio::test]
async fn a_wait_that_is_given_up_gives_the_call_up() {
    let plan = Plan::new(false, connected());
    let over = plan.over.clone();
    let (guest, _connections) = guest(plan).await;
    tokio::select! {
        _ = dial(&guest) => panic!("it is answered"),
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
    }
    over.notified().await;
}

#[test]
fn a_time_out_is_one_that_the_agent_takes() {
    let timeout = |limit| request(None, 1, 0, limit).timeout_ms;
    assert_eq!(timeout(Duration::ZERO), 1);
    assert_eq!(timeout(Duration::MAX), MAX_TIMEOUT_MS);
    assert_eq!(timeout(Duration::from_millis(1500)), 1500);
    assert_eq!(request(None, 1, 0, LIMIT).host, "");
}

//! Every call of the pod's service before the pod runs, while its guest refuses everything, and after
//! its end; twice; for what does not exist; and messages of absurd size. The calls are those of the
//! protocol's own text, so that a new one needs a row.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use husk_proto::pod::pod_client::PodClient;
use tonic::transport::Channel;

use super::*;
use crate::guest::Guest;
use crate::pod::{ContainerState, ContainerStatus, PodPhase, stand_in};
use crate::types::{ContainerKind, PodSpec};
use crate::vm::tests::{connection, vm_in_hand};

/// The protocol: what has to be in the table.
const PROTOCOL: &str = include_str!("../../../../../proto/pod.proto");

/// What the guest answers everything with.
const WORDS: &str = "container \"main\": this is not possible while the container is Sleeping";

/// Where a pod can be when a call comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its guest is not ready.
    Starting,
    /// Its container runs, and its guest refuses everything.
    Refusing,
    /// It has ended, and its process is about to.
    Ended,
}

const STATES: [State; 3] = [State::Starting, State::Refusing, State::Ended];

/// What a call comes to.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Ok,
    /// It is not answered before the pod has ended.
    Waits,
    Refused(Code, &'static str),
}

/// Every call, and what it comes to in each of [`STATES`]. Nothing changes by them: once more they
/// come to the same.
const TABLE: &[(&str, [Answer; 3])] = {
    use Answer::{Ok, Refused, Waits};
    const GONE: Answer =
        Refused(Code::Unavailable, "the pod's virtual machine does not run (yet, or any more)");
    const BY_GUEST: Answer = Refused(Code::FailedPrecondition, WORDS);
    const OF_GUEST: [Answer; 3] = [GONE, BY_GUEST, GONE];
    const IDLE: Answer = Refused(Code::FailedPrecondition, "container main does not run");
    &[
        ("Stop", [Ok; 3]),
        ("Wait", [Waits, Waits, Ok]),
        ("Signal", OF_GUEST),
        ("Exec", OF_GUEST),
        ("Debug", [GONE, Refused(Code::FailedPrecondition, "debugging is not enabled"), GONE]),
        ("Attach", [IDLE, Ok, IDLE]),
        ("Stats", OF_GUEST),
        ("ListProcesses", OF_GUEST),
        ("KernelLog", OF_GUEST),
        ("Pause", OF_GUEST),
        ("Resume", OF_GUEST),
        (
            "AttachDisk",
            [GONE, Refused(Code::FailedPrecondition, "cannot open disk /no/such/disk: "), GONE],
        ),
        ("DetachDisk", [GONE, Refused(Code::NotFound, "the pod has no disk \"x\""), GONE]),
        ("CopyOut", OF_GUEST),
        ("CopyIn", OF_GUEST),
        ("PortForward", OF_GUEST),
        ("Apply", OF_GUEST),
    ]
};

/// The calls of the protocol, each with the text of its request's fields.
fn protocol() -> Vec<(&'static str, &'static str)> {
    let calls = PROTOCOL.lines().filter_map(|line| line.trim().strip_prefix("rpc "));
    let call = |line: &'static str| {
        let (name, rest) = line.split_once('(').unwrap();
        let request = rest.split_once(')').unwrap().0.trim_start_matches("stream ");
        let start = format!("\nmessage {request} {{");
        let (_, body) = PROTOCOL.split_once(&start).expect("its request is in the text");
        (name, body.split_once('}').unwrap().0)
    };
    calls.map(call).collect()
}

#[test]
fn every_call_of_the_protocol_is_in_the_table() {
    let all: BTreeSet<_> = protocol().iter().map(|(name, _)| *name).collect();
    let rows: BTreeSet<_> = TABLE.iter().map(|(name, _)| *name).collect();
    assert!(all.len() > 10 && rows.len() == TABLE.len(), "{all:?}");
    assert_eq!(rows, all, "pod.proto and the table");
}

/// What the agent of a guest does about every call.
#[derive(Debug, Clone, Copy)]
enum Agent {
    Refuses(&'static str),
    IsSilent,
}

/// A guest, and the VMM's end of its control socket.
async fn guest(agent: Agent) -> (Guest, husk_vmm_api::Channel) {
    let (vm, vmm) = vm_in_hand().await;
    let accept = Guest::expect(&vm);
    let stream = connection(&vmm, husk_proto::ports::CONTROL);
    stream.set_nonblocking(true).unwrap();
    let stream = UnixStream::from_std(stream).unwrap();
    tokio::spawn(async move {
        let answer = tower::service_fn(move |_: http::Request<hyper::body::Incoming>| async move {
            match agent {
                Agent::Refuses(words) => {
                    let status = Status::failed_precondition(words);
                    Ok::<_, Infallible>(status.into_http::<String>())
                }
                Agent::IsSilent => std::future::pending().await,
            }
        });
        let service = TowerToHyperService::new(answer);
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        // It breaks when the test has ended.
        drop(connection.await);
    });
    (Guest::connect(vm, accept, Duration::from_secs(100)).await.unwrap(), vmm)
}

/// The manifest of the pod, whose ConfigMap is `color`.
fn manifest(color: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: config}}\ndata: {{color: {color}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  \
         containers: [{{name: main, image: x, command: [sh]}}]\n  \
         volumes: [{{name: files, configMap: {{name: config}}}}]\n"
    )
}

fn spec() -> PodSpec {
    crate::manifest::parse(&manifest("blue"), "x").unwrap().remove(0)
}

/// What takes over documents for the pod, and the directory of those with which it was started.
fn applier(access: &PodAccess) -> (Applier, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manifest.yaml");
    std::fs::write(&path, manifest("blue")).unwrap();
    (Applier::new(access.clone(), path, ("default".into(), "web".into())), directory)
}

/// A pod with one container, `main`, and a command's connection to its process.
struct Pod {
    client: PodClient<Channel>,
    ended: watch::Sender<Option<StatusRecord>>,
    _manifest: Option<tempfile::TempDir>,
}

impl Pod {
    async fn new(guest: Option<Guest>) -> Pod {
        let state = match &guest {
            Some(_) => ContainerState::Running { started_at: SystemTime::UNIX_EPOCH },
            None => ContainerState::Waiting { reason: "ContainerCreating", message: String::new() },
        };
        let main = ContainerStatus {
            name: "main".into(),
            kind: ContainerKind::Main,
            state,
            last: None,
            restarts: 0,
            started: guest.is_some(),
            ready: guest.is_some(),
        };
        let status = PodStatus {
            phase: PodPhase::Running,
            reason: String::new(),
            message: String::new(),
            pod_ips: Vec::new(),
            warnings: Vec::new(),
            containers: vec![main],
        };
        let (ended, end) = watch::channel(None);
        let access = stand_in::access(Arc::new(spec()), guest);
        let (applier, manifest) = applier(&access);
        let served = Served {
            applier,
            access,
            stopper: stand_in::stopper(),
            status: watch::channel(status).1,
            taps: Taps::new(["main"].into_iter()),
            ended: end,
        };
        let (theirs, ours) = UnixStream::pair().unwrap();
        // Not `serve_one`, which does not answer any more once the pod has ended.
        tokio::spawn(async move {
            let service = TowerToHyperService::new(service(served));
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(theirs), service);
            drop(connection.await);
        });
        let client =
            PodClient::new(crate::channel::over(ours, crate::channel::nameless()).await.unwrap());
        Pod { client, ended, _manifest: Some(manifest) }
    }

    fn end(&self) {
        self.ended
            .send_replace(Some(StatusRecord { phase: "Failed".into(), ..Default::default() }));
    }

    /// Makes one call; of a stream, up to its first answer.
    async fn call(&self, rpc: &str, name: &str) -> Result<(), Status> {
        let mut client = self.client.clone();
        let container = name.to_owned();
        let (containers, path) = (vec![container.clone()], "/".to_owned());
        match rpc {
            "Stop" => drop(client.stop(wire::StopRequest { grace_ms: Some(0) }).await?),
            "Wait" => {
                let answer = client.wait(wire::WaitRequest {}).await?.into_inner();
                assert!(answer.status.contains("\"Failed\""), "{}", answer.status);
            }
            "Signal" => {
                let request = wire::SignalRequest { container, signal: 15, all: false };
                drop(client.signal(request).await?);
            }
            "Exec" => {
                let start = wire::ExecStart { container, args: vec!["sh".into()], ..start() };
                return self.exec(vec![first(start)]).await;
            }
            "Debug" => {
                let request = first(wire::ExecStart { container: String::new(), ..start() });
                let answers = client.debug(tokio_stream::iter([request])).await?;
                drop(answers.into_inner().message().await?.expect("an answer"));
            }
            "Attach" => {
                let start = wire::AttachStart { container, stdin: false, size: None };
                let message = Some(wire::attach_request::Message::Start(start));
                let requests = tokio_stream::iter([wire::AttachRequest { message }]);
                let answers = client.attach(requests).await?;
                drop(answers.into_inner().message().await?.expect("an answer"));
            }
            "Stats" => drop(client.stats(wire::StatsRequest {}).await?),
            "ListProcesses" => {
                drop(client.list_processes(wire::ListProcessesRequest { container }).await?);
            }
            "KernelLog" => {
                drop(client.kernel_log(wire::KernelLogRequest { follow: false }).await?);
            }
            "Pause" => drop(client.pause(wire::PauseRequest { containers }).await?),
            "Resume" => drop(client.resume(wire::ResumeRequest { containers }).await?),
            "AttachDisk" => {
                let request = wire::AttachDiskRequest {
                    name: "x".into(),
                    path: "/no/such/disk".into(),
                    container,
                    mount_path: "/mnt".into(),
                    ..Default::default()
                };
                drop(client.attach_disk(request).await?);
            }
            "DetachDisk" => {
                drop(client.detach_disk(wire::DetachDiskRequest { name: "x".into() }).await?);
            }
            "CopyOut" => {
                let answers = client.copy_out(wire::CopyOutRequest { container, path }).await?;
                drop(answers.into_inner().message().await?.expect("an answer"));
            }
            "CopyIn" => {
                let requests = [copy_start(name)];
                drop(client.copy_in(tokio_stream::iter(requests)).await?);
            }
            "PortForward" => {
                let answers = client.port_forward(tokio_stream::iter([forward_start(80)])).await?;
                drop(answers.into_inner().message().await?.expect("an answer"));
            }
            "Apply" => {
                let request = wire::ApplyRequest {
                    manifest: manifest("red"),
                    source_name: "new.yaml".into(),
                };
                drop(client.apply(request).await?);
            }
            other => panic!("no way to make the call {other}: add one"),
        }
        Ok(())
    }

    async fn exec(&self, requests: Vec<wire::ExecRequest>) -> Result<(), Status> {
        let answers = self.client.clone().exec(tokio_stream::iter(requests)).await?;
        drop(answers.into_inner().message().await?.expect("an answer"));
        Ok(())
    }
}

fn start() -> wire::ExecStart {
    wire::ExecStart::default()
}

fn first(start: wire::ExecStart) -> wire::ExecRequest {
    wire::ExecRequest { message: Some(wire::exec_request::Message::Start(start)) }
}

fn forward_start(port: u32) -> wire::PortForwardRequest {
    let start = wire::PortForwardStart { port };
    wire::PortForwardRequest { message: Some(wire::port_forward_request::Message::Start(start)) }
}

fn copy_start(name: &str) -> wire::CopyInRequest {
    let start = wire::CopyInStart { container: name.to_owned(), path: "/".into() };
    wire::CopyInRequest { message: Some(wire::copy_in_request::Message::Start(start)) }
}

fn assert_refused(got: Result<(), Status>, code: Code, words: &str, place: &str) {
    let status = got.expect_err(place);
    let text: String = status.message().chars().take(300).collect();
    assert_eq!(status.code(), code, "{place}: {text}");
    assert!(status.message().contains(words), "{place}: {text}");
    assert!(status.message().len() <= 3100, "{place}: {} bytes", status.message().len());
}

#[tokio::test]
async fn every_call_in_every_state_and_again() {
    for (column, state) in STATES.into_iter().enumerate() {
        let (guest, _vmm) = match state {
            State::Refusing => guest(Agent::Refuses(WORDS)).await,
            State::Starting | State::Ended => {
                let pod = Pod::new(None).await;
                all_calls(&pod, column, state).await;
                continue;
            }
        };
        all_calls(&Pod::new(Some(guest)).await, column, state).await;
    }
}

async fn all_calls(pod: &Pod, column: usize, state: State) {
    if state == State::Ended {
        pod.end();
    }
    for (rpc, answers) in TABLE {
        for turn in ["once", "again"] {
            let place = format!("{rpc} while {state:?}, {turn}");
            match answers[column] {
                Answer::Ok => pod.call(rpc, "main").await.expect(&place),
                Answer::Refused(code, words) => {
                    assert_refused(pod.call(rpc, "main").await, code, words, &place);
                }
                Answer::Waits => tokio::select! {
                    biased;
                    answered = pod.call(rpc, "main") => panic!("{place}: {answered:?}"),
                    // An answer that came later has come.
                    stopped = pod.call("Stop", "main") => stopped.unwrap(),
                },
            }
        }
    }
    // Of all containers, none runs: that is no success.
    if state != State::Refusing {
        let request = wire::PauseRequest { containers: Vec::new() };
        let refused = pod.client.clone().pause(request).await.map(drop);
        assert_refused(refused, Code::Unavailable, "does not run", "pause of all");
    }
    let wait = pod.call("Wait", "main");
    pod.end();
    wait.await.unwrap();
}

#[tokio::test]
async fn a_container_that_the_pod_does_not_have_is_not_found_whatever_its_name() {
    const OF_THE_POD: [&str; 7] =
        ["Stop", "Wait", "Stats", "KernelLog", "PortForward", "Apply", "DetachDisk"];
    let (guest, _vmm) = guest(Agent::Refuses("the guest was asked")).await;
    let pod = Pod::new(Some(guest)).await;
    let long = "\u{20ac}".repeat(1 << 18);
    for name in ["", "other", "..", "../main", "main/..", "main\0", "MAIN", "husk.debug-0", &long] {
        for (rpc, _) in TABLE.iter().filter(|(rpc, _)| !OF_THE_POD.contains(rpc)) {
            let place = format!("{rpc} {:?}", name.chars().take(20).collect::<String>());
            if *rpc == "Debug" {
                let request = first(wire::ExecStart { container: name.to_owned(), ..start() });
                let answer = pod.client.clone().debug(tokio_stream::iter([request])).await;
                let (code, words) = match name {
                    "" => (Code::FailedPrecondition, "debugging is not enabled"),
                    _ => (Code::InvalidArgument, "container: must be empty"),
                };
                assert_refused(answer.map(drop), code, words, &place);
            } else {
                let got = pod.call(rpc, name).await;
                assert_refused(got, Code::NotFound, "the pod has no container \"", &place);
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_does_not_begin_with_its_start_is_refused() {
    let pod = Pod::new(None).await;
    let input = wire::Input { input: Some(wire::input::Input::Signal(9)) };
    let input = wire::ExecRequest { message: Some(wire::exec_request::Message::Input(input)) };
    let words = "the first message must be the start";
    for requests in [vec![], vec![wire::ExecRequest { message: None }], vec![input]] {
        let place = format!("{requests:?}");
        assert_refused(pod.exec(requests).await, Code::InvalidArgument, words, &place);
    }
    let none = vec![first(wire::ExecStart { container: "main".into(), ..start() })];
    assert_refused(pod.exec(none).await, Code::InvalidArgument, "args: ", "no arguments");
    let mut client = pod.client.clone();
    let attach = client.attach(tokio_stream::iter([wire::AttachRequest { message: None }])).await;
    assert_refused(attach.map(drop), Code::InvalidArgument, words, "attach");
    let data =
        wire::CopyInRequest { message: Some(wire::copy_in_request::Message::Data(b"x".to_vec())) };
    let copy = client.copy_in(tokio_stream::iter([data])).await;
    assert_refused(copy.map(drop), Code::InvalidArgument, words, "copy");
    let none = wire::PortForwardRequest { message: None };
    let forward = client.port_forward(tokio_stream::iter([none])).await;
    assert_refused(forward.map(drop), Code::InvalidArgument, words, "forward");
    for port in [0, 65536, u32::MAX] {
        let forward = client.port_forward(tokio_stream::iter([forward_start(port)])).await;
        assert_refused(forward.map(drop), Code::InvalidArgument, "port: ", "a port");
    }
}

#[tokio::test]
async fn a_message_of_absurd_size_is_refused() {
    let (guest, vmm) = guest(Agent::IsSilent).await;
    let pod = Pod::new(Some(guest)).await;
    let huge = "a".repeat(100 << 20);
    let words = "the limit is: 4194304 bytes";
    for rpc in ["Signal", "ListProcesses", "Pause", "Resume", "CopyOut", "CopyIn", "Attach", "Exec"]
    {
        assert_refused(pod.call(rpc, &huge).await, Code::OutOfRange, words, rpc);
    }
    // A piece of an archive, for which the agent has connected.
    let data = |size| wire::CopyInRequest {
        message: Some(wire::copy_in_request::Message::Data(vec![0; size])),
    };
    let requests = tokio_stream::iter([copy_start("main"), data(64 << 10), data((64 << 10) + 1)]);
    let mut client = pod.client.clone();
    let copy = client.copy_in(requests);
    let connect = async {
        let mut streams = Vec::new();
        loop {
            // It is closed as long as nobody waits for it. One for each refused call came before.
            for port in 0..16 {
                streams.push(connection(&vmm, husk_proto::ports::FIRST_STREAM + port));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let refused = tokio::select! {
        answer = copy => answer.map(drop),
        () = connect => Ok(()),
    };
    assert_refused(refused, Code::InvalidArgument, "data: 65537 bytes", "a piece");
    pod.call("Stop", "main").await.unwrap();
}

/// The end comes while calls wait: they are answered, and no new one is.
#[tokio::test]
async fn the_end_of_the_pod_answers_who_waits_and_nobody_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (ended, end) = watch::channel(None);
    let status = PodStatus {
        phase: PodPhase::Pending,
        reason: String::new(),
        message: String::new(),
        pod_ips: Vec::new(),
        warnings: Vec::new(),
        containers: Vec::new(),
    };
    let access = stand_in::access(Arc::new(spec()), None);
    let (applier, _manifest) = applier(&access);
    let server = tokio::spawn(serve(
        listener,
        Served {
            applier,
            access,
            stopper: stand_in::stopper(),
            status: watch::channel(status).1,
            taps: Taps::new(["main"].into_iter()),
            ended: end,
        },
    ));
    let connect = async || {
        let stream = UnixStream::connect(&path).await.unwrap();
        let client =
            PodClient::new(crate::channel::over(stream, crate::channel::nameless()).await.unwrap());
        Pod { client, ended: watch::channel(None).0, _manifest: None }
    };
    let (first, second) = (connect().await, connect().await);
    first.call("Stop", "").await.unwrap();
    let waits = tokio::spawn(async move { first.call("Wait", "").await });
    second.call("Stop", "").await.unwrap();
    ended.send_replace(Some(StatusRecord { phase: "Failed".into(), ..Default::default() }));
    waits.await.unwrap().unwrap();
    server.await.unwrap();
    let late = second.call("Stats", "").await.unwrap_err();
    assert!(matches!(late.code(), Code::Unavailable | Code::Unknown | Code::Cancelled), "{late}");
    assert!(UnixStream::connect(&path).await.is_err(), "nobody listens");
}

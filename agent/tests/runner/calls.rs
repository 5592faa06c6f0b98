//! Every call of the agent's service in every state: out of order, twice, at once, and for what does
//! not exist. The calls are those of the protocol's own text, so that a new one needs a row.

use std::collections::BTreeSet;

use husk_proto::agent as wire;
use husk_proto::agent::container::State as Listed;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::copy::{bring, entry, out};
use crate::guest::{self, Guest, Options, config, exec_process, files, setup_request};

/// The protocol: what has to be in the tables.
const PROTOCOL: &str = include_str!("../../../proto/agent.proto");

/// Where a container can be when a call comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Never made, or deleted.
    Absent,
    Created,
    CreatedPaused,
    Running,
    Paused,
    Stopped,
}

const STATES: [State; 6] = [
    State::Absent,
    State::Created,
    State::CreatedPaused,
    State::Running,
    State::Paused,
    State::Stopped,
];

/// What a call comes to.
#[derive(Debug, Clone, Copy)]
enum Answer {
    /// It succeeds, and the state stays.
    Stays,
    /// It succeeds, and this is the state then.
    Moves(State),
    /// It succeeds, and the guest ends.
    Ends,
    /// FAILED_PRECONDITION: this is not possible in the state, which is named.
    Impossible(&'static str),
    /// An error that says this; `{id}` is the container's.
    Refused(Code, &'static str),
}

use Answer::{Ends, Impossible, Moves, Refused, Stays};
use State::{Absent, Created, CreatedPaused, Paused, Running, Stopped};

const ABSENT: Answer = Refused(Code::NotFound, "container \"{id}\" does not exist");
const EXISTS: Answer = Refused(Code::AlreadyExists, "container \"{id}\" exists already");
const ENDED: Answer = Refused(Code::NotFound, "process \"\" of container \"{id}\" has ended");
const NOT_ADDED: Answer = Refused(Code::NotFound, "no file system \"nothing\" was added");
const SET_UP: Answer = Refused(Code::FailedPrecondition, "the pod has been set up before");

/// For a container that can have more processes only while it runs.
const fn only_running(event: &'static str) -> [Answer; 6] {
    let no = Impossible(event);
    [ABSENT, no, no, Stays, no, no]
}

/// Every call, and what it comes to for a container in each of [`STATES`].
const TABLE: &[(&str, [Answer; 6])] = &[
    ("SetupPod", [SET_UP; 6]),
    ("UpdateNetwork", [Stays; 6]),
    ("CreateContainer", [Moves(Created), EXISTS, EXISTS, EXISTS, EXISTS, EXISTS]),
    ("StartContainer", {
        let no = Impossible("Start");
        [ABSENT, Moves(Running), no, no, no, no]
    }),
    ("ExecProcess", only_running("Exec")),
    ("WaitProcess", {
        let ends = Moves(Stopped);
        [ABSENT, ends, ends, ends, ends, Stays]
    }),
    ("SignalProcess", {
        let ends = Moves(Stopped);
        [ABSENT, ends, ends, ends, ends, ENDED]
    }),
    ("ResizeTerminal", [ABSENT, Stays, Stays, Stays, Stays, ENDED]),
    ("DeleteContainer", {
        let no = Impossible("Delete");
        [ABSENT, Moves(Absent), no, no, no, Moves(Absent)]
    }),
    ("PauseContainer", {
        let no = Impossible("Pause");
        [ABSENT, Moves(CreatedPaused), no, Moves(Paused), no, no]
    }),
    ("ResumeContainer", {
        let no = Impossible("Resume");
        [ABSENT, no, Moves(Created), no, Moves(Running), no]
    }),
    ("UpdateContainer", [ABSENT, Stays, Stays, Stays, Stays, Impossible("Update")]),
    ("ListContainers", [Stays; 6]),
    ("Stats", [Stays; 6]),
    ("ListProcesses", [ABSENT, Stays, Stays, Stays, Stays, Stays]),
    ("WatchEvents", [Stays; 6]),
    ("KernelLog", [Stays; 6]),
    ("Dial", [Stays; 6]),
    ("ReadFile", [ABSENT, Stays, Stays, Stays, Stays, Stays]),
    ("UpdateVolume", [Stays; 6]),
    ("AddFilesystem", only_running("Mount")),
    ("RemoveFilesystem", [NOT_ADDED; 6]),
    ("CopyOut", only_running("Copy")),
    ("CopyIn", only_running("Copy")),
    ("Shutdown", [Ends; 6]),
];

/// The same calls when there is no pod: before it is set up, and after that has failed.
const NO_POD: &[(&str, [Answer; 2])] = {
    const NOT_YET: Answer = Refused(Code::FailedPrecondition, "the pod is not set up");
    const NEVER: Answer = Refused(Code::FailedPrecondition, "the pod could not be set up");
    &[
        ("SetupPod", [Stays, SET_UP]),
        ("UpdateNetwork", [NOT_YET, NEVER]),
        ("CreateContainer", [NOT_YET, NEVER]),
        ("StartContainer", [ABSENT; 2]),
        ("ExecProcess", [ABSENT; 2]),
        ("WaitProcess", [ABSENT; 2]),
        ("SignalProcess", [ABSENT; 2]),
        ("ResizeTerminal", [ABSENT; 2]),
        ("DeleteContainer", [ABSENT; 2]),
        ("PauseContainer", [ABSENT; 2]),
        ("ResumeContainer", [ABSENT; 2]),
        ("UpdateContainer", [ABSENT; 2]),
        ("ListContainers", [Stays; 2]),
        ("Stats", [Stays; 2]),
        ("ListProcesses", [ABSENT; 2]),
        ("WatchEvents", [Stays; 2]),
        ("KernelLog", [Stays; 2]),
        ("Dial", [Stays; 2]),
        ("ReadFile", [ABSENT; 2]),
        ("UpdateVolume", [NOT_YET, NEVER]),
        ("AddFilesystem", [NOT_YET, NEVER]),
        ("RemoveFilesystem", [NOT_YET, NEVER]),
        ("CopyOut", [ABSENT; 2]),
        ("CopyIn", [ABSENT; 2]),
        ("Shutdown", [Ends; 2]),
    ]
};

/// Where a process beside a container's first one can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exec {
    /// Never made, in a running container.
    None,
    Running,
    /// It runs, and its container is paused.
    Paused,
    /// In a container that runs.
    Ended,
    /// With its container.
    EndedWithContainer,
    /// Its container has been deleted.
    Deleted,
}

const EXECS: [Exec; 6] =
    [Exec::None, Exec::Running, Exec::Paused, Exec::Ended, Exec::EndedWithContainer, Exec::Deleted];

/// Every call that names a process, and for a process in each of [`EXECS`] what it comes to twice:
/// `None` is success.
type Twice = [Option<(Code, &'static str)>; 2];
const PROCESSES: &[(&str, [Twice; 6])] = {
    const OK: Twice = [None, None];
    const fn both(code: Code, words: &'static str) -> Twice {
        [Some((code, words)), Some((code, words))]
    }
    const NONE: Twice = both(Code::NotFound, "container \"{id}\" has no process \"e\"");
    const ENDED: Twice = both(Code::NotFound, "process \"e\" of container \"{id}\" has ended");
    const DELETED: Twice = both(Code::NotFound, "container \"{id}\" does not exist");
    const EXISTS: Twice =
        both(Code::AlreadyExists, "container \"{id}\" has a process \"e\" already");
    const ONCE: Twice = [None, ENDED[1]];
    &[
        (
            "ExecProcess",
            [
                [None, EXISTS[1]],
                EXISTS,
                both(
                    Code::FailedPrecondition,
                    "Exec is not possible while the container is Paused",
                ),
                EXISTS,
                both(
                    Code::FailedPrecondition,
                    "Exec is not possible while the container is Stopped",
                ),
                DELETED,
            ],
        ),
        ("WaitProcess", [NONE, OK, OK, OK, OK, DELETED]),
        ("SignalProcess", [NONE, ONCE, ONCE, ENDED, ENDED, DELETED]),
        ("ResizeTerminal", [NONE, OK, OK, ENDED, ENDED, DELETED]),
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

fn names<T>(table: &[(&'static str, T)]) -> BTreeSet<&'static str> {
    let names: BTreeSet<_> = table.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), table.len(), "a call has two rows");
    names
}

#[test]
fn every_call_of_the_protocol_is_in_the_tables() {
    let all: BTreeSet<_> = protocol().iter().map(|(name, _)| *name).collect();
    assert!(all.len() > 20, "{all:?}");
    assert_eq!(names(TABLE), all, "agent.proto and the table of states");
    assert_eq!(names(NO_POD), all, "agent.proto and the table without a pod");
    let of_processes = protocol().into_iter().filter(|(_, fields)| fields.contains(" exec_id "));
    let of_processes: BTreeSet<_> = of_processes.map(|(name, _)| name).collect();
    assert_eq!(names(PROCESSES), of_processes, "agent.proto and the table of processes");
}

/// The calls that take a container's identifier.
pub(crate) fn calls_of_a_container() -> Vec<&'static str> {
    let of_a_container =
        |fields: &str| fields.contains("string id ") || fields.contains("container_id");
    protocol().into_iter().filter(|(_, fields)| of_a_container(fields)).map(|c| c.0).collect()
}

/// A container that lives until it is killed, has a terminal, and a file for its last words.
fn spec(id: &str) -> Value {
    config(&["sleep", "100000"], |spec| {
        spec["process"]["terminal"] = json!(true);
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/dev/words", "type": "bind", "options": ["bind"],
            "source": format!("/run/husk/containers/{id}/termination-log")}));
    })
}

fn terminal() -> Options {
    Options { terminal: true, ..Options::default() }
}

fn exec_spec() -> Value {
    let mut process = exec_process(&["sleep", "100000"]);
    process["terminal"] = json!(true);
    process
}

/// Makes one call about a container, or a process of it. A wait for what is alive ends by a kill.
pub(crate) async fn call(guest: &Guest, rpc: &str, id: &str, exec: &str) -> Result<(), Status> {
    let mut client = guest.client();
    let (name, container_id, exec_id) = (id.to_owned(), id.to_owned(), exec.to_owned());
    match rpc {
        "SetupPod" => drop(client.setup_pod(setup_request(None)).await?),
        "CreateContainer" => drop(guest.try_create(id, spec(id), terminal()).await?),
        "StartContainer" => {
            guest.try_start(id).await?.unwrap();
        }
        "ExecProcess" => {
            let exec = if exec.is_empty() { "x" } else { exec };
            drop(guest.start_exec(id, exec, exec_spec(), terminal()).await?);
        }
        "WaitProcess" => {
            let request = wire::WaitProcessRequest { container_id, exec_id };
            let wait = tokio::spawn(async move { client.wait_process(request).await });
            if !guest.list().await.is_empty() {
                // What has ended already takes no signal.
                drop(guest.signal(id, exec, 9).await);
            }
            let answer = wait.await.unwrap()?.into_inner();
            assert_eq!((answer.exit_code, answer.signal), (137, 9));
        }
        "SignalProcess" => {
            guest.signal(id, exec, 9).await?;
            guest.wait(id, exec).await;
        }
        "ResizeTerminal" => {
            let (width, height) = (80, 25);
            let request = wire::ResizeTerminalRequest { container_id, exec_id, width, height };
            drop(client.resize_terminal(request).await?);
        }
        "DeleteContainer" => drop(client.delete_container(guest::id(id)).await?),
        "PauseContainer" => {
            drop(client.pause_container(wire::PauseContainerRequest { id: name }).await?);
        }
        "ResumeContainer" => {
            drop(client.resume_container(wire::ResumeContainerRequest { id: name }).await?);
        }
        "UpdateContainer" => {
            let request = wire::UpdateContainerRequest { id: name, resources: b"{}".to_vec() };
            drop(client.update_container(request).await?);
        }
        "ListContainers" => drop(client.list_containers(wire::ListContainersRequest {}).await?),
        "Stats" => drop(client.stats(wire::StatsRequest {}).await?),
        "ListProcesses" => {
            drop(client.list_processes(wire::ListProcessesRequest { container_id }).await?);
        }
        "WatchEvents" => drop(client.watch_events(wire::WatchEventsRequest {}).await?),
        "KernelLog" => {
            let log = client.kernel_log(wire::KernelLogRequest { follow: true }).await?;
            drop(log.into_inner().message().await?.expect("it has a beginning"));
        }
        "Dial" => {
            let host = String::new();
            let request = wire::DialRequest { host, port: 9, stream_port: 0, timeout_ms: 60_000 };
            // Nobody listens there, which is an answer.
            let answer = client.dial(request).await?.into_inner();
            assert!(matches!(answer.result, Some(wire::dial_response::Result::Failure(_))));
        }
        "ReadFile" => {
            let path = "/dev/words".into();
            drop(
                client
                    .read_file(wire::ReadFileRequest { container_id, path, max_bytes: 9 })
                    .await?,
            );
        }
        "UpdateNetwork" => {
            let lo = wire::Interface { name: "lo".into(), ..Default::default() };
            let request = wire::UpdateNetworkRequest { interfaces: vec![lo], ..Default::default() };
            drop(client.update_network(request).await?);
        }
        "UpdateVolume" => {
            let files = Some(files(&[("a", "x", 0o644)]));
            let request = wire::UpdateVolumeRequest { name: "files".into(), files };
            drop(client.update_volume(request).await?);
        }
        "AddFilesystem" => {
            let name = "late".to_owned();
            let filesystem = wire::Filesystem {
                name: name.clone(),
                disk_serial: "late".into(),
                fstype: "ext4".into(),
                read_only: false,
            };
            let request = wire::AddFilesystemRequest {
                filesystem: Some(filesystem),
                device: 0,
                container_id: id.into(),
                path: "/late".into(),
            };
            drop(client.add_filesystem(request.clone()).await?);
            let twice = client.add_filesystem(request).await.unwrap_err();
            assert_eq!(twice.code(), Code::AlreadyExists);
            // So that nothing is left of it.
            drop(client.remove_filesystem(wire::RemoveFilesystemRequest { name }).await?);
        }
        "RemoveFilesystem" => {
            let request = wire::RemoveFilesystemRequest { name: "nothing".into() };
            drop(client.remove_filesystem(request).await?);
        }
        "CopyOut" => drop(out(guest, id, "/etc/passwd").await?),
        "CopyIn" => {
            let archive = entry(tar::EntryType::Regular, "f", "", b"x");
            bring(guest, id, "/tmp", archive).await?;
        }
        "Shutdown" => drop(client.shutdown(wire::ShutdownRequest {}).await?),
        other => panic!("no way to make the call {other}: add one"),
    }
    Ok(())
}

/// Brings a new container into a state, by the calls of the table.
async fn bring_into(guest: &Guest, id: &str, state: State) {
    let calls: &[&str] = match state {
        Absent => &[],
        Created => &["CreateContainer"],
        CreatedPaused => &["CreateContainer", "PauseContainer"],
        Running => &["CreateContainer", "StartContainer"],
        Paused => &["CreateContainer", "StartContainer", "PauseContainer"],
        Stopped => &["CreateContainer", "StartContainer", "SignalProcess"],
    };
    for rpc in calls {
        call(guest, rpc, id, "").await.unwrap();
    }
    assert_listed(guest, id, state).await;
}

async fn assert_listed(guest: &Guest, id: &str, state: State) {
    let expected = match state {
        Absent => None,
        Created => Some(Listed::Created),
        CreatedPaused | Paused => Some(Listed::Paused),
        Running => Some(Listed::Running),
        Stopped => Some(Listed::Stopped),
    };
    let listed = guest.list().await.iter().find(|c| c.id == id).map(|c| c.state());
    assert_eq!(listed, expected, "{id}: it should be {state:?}");
}

/// Removes a container in whatever state it is.
async fn remove(guest: &Guest, id: &str, state: State) {
    if matches!(state, CreatedPaused | Running | Paused) {
        call(guest, "SignalProcess", id, "").await.unwrap();
    }
    if state != Absent {
        guest.delete(id).await;
    }
}

/// Compares an answer with what the table says; the state that follows.
fn check(place: &str, id: &str, state: State, expected: Answer, got: Result<(), Status>) -> State {
    let (code, words) = match expected {
        Stays | Moves(_) | Ends => {
            got.unwrap_or_else(|status| panic!("{place}: {status}"));
            return if let Moves(next) = expected { next } else { state };
        }
        Impossible(event) => {
            let words = format!("{event} is not possible while the container is {state:?}");
            (Code::FailedPrecondition, format!("container \"{id}\": {words}"))
        }
        Refused(code, words) => (code, words.replace("{id}", id)),
    };
    let status = got.expect_err(place);
    assert_eq!((status.code(), status.message()), (code, words.as_str()), "{place}");
    state
}

#[tokio::test]
async fn every_call_in_every_state_and_again() {
    let guest = Guest::boot().await;
    bring_into(&guest, "warm", Stopped).await;
    remove(&guest, "warm", Stopped).await;
    let before = guest.count_left();
    for (rpc, answers) in TABLE.iter().filter(|(_, answers)| !matches!(answers[0], Ends)) {
        for (state, expected) in STATES.into_iter().zip(*answers) {
            let id = format!("{rpc}-{state:?}");
            bring_into(&guest, &id, state).await;
            let once = call(&guest, rpc, &id, "").await;
            let next = check(&id, &id, state, expected, once);
            assert_listed(&guest, &id, next).await;
            // An exec of the same name is another matter: see the table of processes.
            if *rpc == "ExecProcess" && next == Running {
                remove(&guest, &id, next).await;
                continue;
            }
            let again = call(&guest, rpc, &id, "").await;
            let expected = answers[STATES.iter().position(|s| *s == next).unwrap()];
            let last = check(&format!("{id}, again"), &id, next, expected, again);
            assert_listed(&guest, &id, last).await;
            remove(&guest, &id, last).await;
            assert!(guest.nothing_left(&id), "{id}");
        }
    }
    assert_eq!(guest.count_left(), before);
}

#[tokio::test]
async fn a_shutdown_in_every_state_ends_the_guest_also_if_asked_twice() {
    for state in STATES {
        let mut guest = Guest::boot().await;
        bring_into(&guest, "a", state).await;
        let (once, again) =
            tokio::join!(call(&guest, "Shutdown", "a", ""), call(&guest, "Shutdown", "a", ""));
        once.unwrap();
        again.unwrap();
        assert!(guest.ended().await.success(), "{state:?}");
    }
}

#[tokio::test]
async fn without_a_pod_nothing_can_be_made_and_nothing_is_there() {
    for (column, name) in ["new", "failed"].into_iter().enumerate() {
        let mut guest = Guest::boot_without_pod().await;
        if name == "failed" {
            let mut request = setup_request(None);
            request.hostname = "../x".into();
            let refused = guest.client().setup_pod(request).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().contains("hostname: \"../x\""), "{refused}");
        }
        // What changes the guest comes last.
        let last = |rpc: &str| matches!(rpc, "SetupPod" | "Shutdown");
        let (changing, first): (Vec<_>, Vec<_>) = NO_POD.iter().partition(|row| last(row.0));
        for (rpc, answers) in first.into_iter().chain(changing) {
            let place = format!("{rpc}, {name}");
            check(&place, "a", Absent, answers[column], call(&guest, rpc, "a", "").await);
        }
        assert!(guest.ended().await.success());
    }
}

/// Brings the process `e` of a new container into a state.
async fn bring_exec_into(guest: &Guest, id: &str, exec: Exec) {
    bring_into(guest, id, Running).await;
    if exec != Exec::None {
        call(guest, "ExecProcess", id, "e").await.unwrap();
    }
    match exec {
        Exec::None | Exec::Running => {}
        Exec::Paused => call(guest, "PauseContainer", id, "").await.unwrap(),
        Exec::Ended => call(guest, "SignalProcess", id, "e").await.unwrap(),
        Exec::EndedWithContainer | Exec::Deleted => {
            call(guest, "SignalProcess", id, "").await.unwrap();
            guest.wait(id, "e").await;
            if exec == Exec::Deleted {
                guest.delete(id).await;
            }
        }
    }
}

#[tokio::test]
async fn every_call_about_a_process_in_every_state_and_again() {
    let guest = Guest::boot().await;
    for (rpc, columns) in PROCESSES {
        for (exec, twice) in EXECS.into_iter().zip(columns) {
            let id = format!("{rpc}-{exec:?}");
            bring_exec_into(&guest, &id, exec).await;
            for (turn, expected) in ["once", "again"].into_iter().zip(twice) {
                let got = call(&guest, rpc, &id, "e").await;
                let got = got.as_ref().err().map(|s| (s.code(), s.message().to_owned()));
                match (&got, expected) {
                    (None, None) => {}
                    (Some((code, words)), Some((expected, part))) => {
                        assert_eq!(code, expected, "{id}, {turn}: {words}");
                        let part = part.replace("{id}", &id);
                        assert!(words.contains(&part), "{id}, {turn}: {words}");
                    }
                    _ => panic!("{id}, {turn}: {got:?} instead of {expected:?}"),
                }
            }
            let state = match exec {
                Exec::Deleted => Absent,
                Exec::EndedWithContainer => Stopped,
                Exec::Paused => Paused,
                Exec::None | Exec::Running | Exec::Ended => Running,
            };
            remove(&guest, &id, state).await;
            assert!(guest.nothing_left(&id), "{id}");
        }
    }
}

/// What changes a state is asked for four times at once: one of them succeeds.
#[tokio::test]
async fn of_the_same_call_many_times_at_once_one_succeeds() {
    let guest = Guest::boot().await;
    for (rpc, state, next) in [
        ("CreateContainer", Absent, Created),
        ("StartContainer", Created, Running),
        ("ExecProcess", Running, Running),
        ("PauseContainer", Running, Paused),
        ("ResumeContainer", Paused, Running),
        ("PauseContainer", Created, CreatedPaused),
        ("ResumeContainer", CreatedPaused, Created),
        ("DeleteContainer", Created, Absent),
        ("DeleteContainer", Stopped, Absent),
    ] {
        let id = format!("{rpc}-{state:?}");
        bring_into(&guest, &id, state).await;
        let one = || call(&guest, rpc, &id, "");
        let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
        let (refused, done): (Vec<_>, Vec<_>) = [a, b, c, d].into_iter().partition(Result::is_err);
        assert_eq!(done.len(), 1, "{id}: {refused:?}");
        for status in refused.into_iter().filter_map(Result::err) {
            let expected = [Code::AlreadyExists, Code::FailedPrecondition, Code::NotFound];
            assert!(expected.contains(&status.code()), "{id}: {status}");
            assert!(status.message().contains(&id), "{id}: {status}");
        }
        assert_listed(&guest, &id, next).await;
        remove(&guest, &id, next).await;
        assert!(guest.nothing_left(&id), "{id}");
    }
}

//! Pausing, resuming, and looking at processes.

use std::time::Duration;

use husk_proto::agent::container::State;
use husk_proto::agent::{
    ListProcessesRequest, PauseContainerRequest, ProcessInfo, ResumeContainerRequest,
};
use serde_json::json;
use tonic::{Code, Status};

use crate::guest::{self, Guest, Options, base_spec, exec_process};

async fn pause(guest: &Guest, id: &str) -> Result<(), Status> {
    let request = PauseContainerRequest { id: id.into() };
    guest.client().pause_container(request).await.map(|_| ())
}

async fn resume(guest: &Guest, id: &str) -> Result<(), Status> {
    let request = ResumeContainerRequest { id: id.into() };
    guest.client().resume_container(request).await.map(|_| ())
}

async fn processes(guest: &Guest, id: &str) -> Vec<ProcessInfo> {
    let request = ListProcessesRequest { container_id: id.into() };
    guest.client().list_processes(request).await.unwrap().into_inner().processes
}

async fn state(guest: &Guest, id: &str) -> State {
    guest.list().await.iter().find(|c| c.id == id).expect("it is listed").state()
}

/// Time that all processes of a container have used.
async fn cpu_us(guest: &Guest, id: &str) -> u64 {
    processes(guest, id).await.iter().map(|p| p.cpu_us).sum()
}

async fn until_busier(guest: &Guest, id: &str, than: u64) {
    let busier = async {
        while cpu_us(guest, id).await <= than {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(100), busier).await.expect("it runs");
}

#[tokio::test]
async fn a_paused_container_stands_still_until_it_is_resumed() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sh", "-c", "while :; do :; done"]), Options::default()).await;
    until_busier(&guest, "a", 0).await;
    pause(&guest, "a").await.unwrap();
    assert_eq!(state(&guest, "a").await, State::Paused);
    let before = cpu_us(&guest, "a").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(cpu_us(&guest, "a").await, before, "it stands still");

    let exec = guest.exec("a", "e", exec_process(&["true"])).await.unwrap_err();
    assert_eq!(exec.code(), Code::FailedPrecondition);
    assert!(exec.message().contains("Exec is not possible while the container is Paused"));
    assert_eq!(pause(&guest, "a").await.unwrap_err().code(), Code::FailedPrecondition);
    let delete = guest.client().delete_container(guest::id("a")).await.unwrap_err();
    assert_eq!(delete.code(), Code::FailedPrecondition);

    resume(&guest, "a").await.unwrap();
    assert_eq!(state(&guest, "a").await, State::Running);
    until_busier(&guest, "a", before).await;
    assert_eq!(resume(&guest, "a").await.unwrap_err().code(), Code::FailedPrecondition);
    // The name is not taken by the refused one.
    guest.exec("a", "e", exec_process(&["true"])).await.unwrap();
}

#[tokio::test]
async fn a_signal_waits_for_a_paused_process_but_sigkill_does_not() {
    let guest = Guest::boot().await;
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    for (id, all) in [("one", false), ("all", true)] {
        let mut streams =
            guest.start(id, base_spec(&["sh", "-c", script]), Options::default()).await;
        streams.read_until("ready").await;
        pause(&guest, id).await.unwrap();
        guest.signal(id, "", 15).await.unwrap();
        let mut client = guest.client();
        let request =
            husk_proto::agent::WaitProcessRequest { container_id: id.into(), exec_id: "".into() };
        let wait = client.wait_process(request);
        assert!(tokio::time::timeout(Duration::from_millis(300), wait).await.is_err());
        assert_eq!(state(&guest, id).await, State::Paused);
        if all {
            guest.signal_all(id, 9).await.unwrap();
            assert_eq!(guest.wait(id, "").await.signal, 9);
        } else {
            resume(&guest, id).await.unwrap();
            assert_eq!(guest.wait(id, "").await.exit_code, 9);
        }
        assert_eq!(pause(&guest, id).await.unwrap_err().code(), Code::FailedPrecondition);
        guest.delete(id).await;
        assert!(guest.nothing_left(id));
    }
    guest.start("main", base_spec(&["sleep", "1000"]), Options::default()).await;
    pause(&guest, "main").await.unwrap();
    guest.signal("main", "", 9).await.unwrap();
    assert_eq!(guest.wait("main", "").await.exit_code, 137);
}

#[tokio::test]
async fn a_created_container_can_be_paused_and_is_created_again_when_resumed() {
    let guest = Guest::boot().await;
    assert_eq!(pause(&guest, "a").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(resume(&guest, "a").await.unwrap_err().code(), Code::NotFound);
    guest.create("a", base_spec(&["sh", "-c", "exit 4"]), Options::default()).await;
    pause(&guest, "a").await.unwrap();
    assert_eq!(state(&guest, "a").await, State::Paused);
    let start = guest.try_start("a").await.unwrap_err();
    assert_eq!(start.code(), Code::FailedPrecondition);
    resume(&guest, "a").await.unwrap();
    assert_eq!(state(&guest, "a").await, State::Created);
    guest.try_start("a").await.unwrap().unwrap();
    assert_eq!(guest.wait("a", "").await.exit_code, 4);
}

#[tokio::test]
async fn a_shutdown_ends_paused_containers() {
    let mut guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    pause(&guest, "a").await.unwrap();
    // An open stream of events does not hold it up.
    let request = husk_proto::agent::WatchEventsRequest {};
    let mut events = guest.client().watch_events(request).await.unwrap().into_inner();
    guest.client().shutdown(husk_proto::agent::ShutdownRequest {}).await.unwrap();
    assert!(events.message().await.is_ok_and(|event| event.is_none()), "the stream ends");
    assert!(guest.ended().await.success());
}

#[tokio::test]
async fn the_processes_of_a_container_are_listed_with_what_they_are() {
    let guest = Guest::boot().await;
    guest.start("other", base_spec(&["sleep", "2000"]), Options::default()).await;
    let mut spec = base_spec(&["sh", "-c", "sleep 1000 & echo ready; wait"]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 33});
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("ready").await;
    let mut process = exec_process(&["sh", "-c", "echo ready; exec cat"]);
    process["env"] = json!(["PATH=/bin", "SECRET=1"]);
    let options = Options { stdin: Some(Vec::new()), ..Options::default() };
    let mut streams = guest.start_exec("a", "e", process, options).await.unwrap();
    streams.read_until("ready").await;
    let expected = [("sh -c sleep 1000 & echo ready; wait", 33), ("sleep 1000", 33), ("cat", 0)];
    let shown = async {
        loop {
            let all = processes(&guest, "a").await;
            let commands: Vec<_> = all.iter().map(|p| (p.command.as_str(), p.uid)).collect();
            // A shell forks first, and becomes the command then.
            if commands == expected {
                return all;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let all = tokio::time::timeout(Duration::from_secs(100), shown).await.expect("they show");
    let (shell, sleep) = (&all[0], &all[1]);
    let listed = guest.list().await;
    assert_eq!(listed.iter().find(|c| c.id == "a").unwrap().pid, shell.pid);
    assert_eq!(sleep.ppid, shell.pid);
    assert!(shell.started_at_ns <= sleep.started_at_ns && shell.rss > 0);
    assert_eq!(shell.state, "S");
    let none = ListProcessesRequest { container_id: "none".into() };
    assert_eq!(guest.client().list_processes(none).await.unwrap_err().code(), Code::NotFound);
    guest.run("ended", &["true"]).await;
    assert_eq!(processes(&guest, "ended").await, []);
}

#[tokio::test]
async fn very_many_processes_with_very_long_commands_fit_into_an_answer() {
    let guest = Guest::boot().await;
    // 600 commands of 5 KiB each: more than an answer may hold.
    let script = "mkfifo /tmp/f; x=$(head -c 5000 /dev/zero | tr '\\0' x); \
                  for i in $(seq 600); do sh -c 'read x < /tmp/f' $x & done; echo ready; wait";
    let mut streams = guest.start("a", base_spec(&["sh", "-c", script]), Options::default()).await;
    streams.read_until("ready").await;
    // Each has its long command only once it is executed.
    let all_executed = async {
        loop {
            let all = processes(&guest, "a").await;
            if all.iter().any(|p| p.command.starts_with('[')) {
                break all;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let all = tokio::time::timeout(guest::LIMIT, all_executed).await;
    let all = all.expect("the last show their names");
    assert!(all.len() > 600, "{}", all.len());
    assert!(all.iter().all(|p| p.command.len() <= 4096));
    assert!(all.iter().map(|p| p.command.len()).sum::<usize>() < 3 << 20);
    guest.signal("a", "", 9).await.unwrap();
    guest.wait("a", "").await;
}

#[tokio::test]
async fn statistics_have_the_interfaces_and_a_time() {
    let guest = Guest::boot().await;
    // Nobody listens there, but packets go both ways.
    guest.run("a", &["nc", "127.0.0.1", "9"]).await;
    let stats = guest.stats().await;
    let lo = stats.interfaces.iter().find(|i| i.name == "lo").expect("the loopback interface");
    assert!(lo.rx_packets > 0 && lo.rx_bytes > 0 && lo.tx_packets == lo.rx_packets, "{lo:?}");
    assert!(stats.at_ns > 0 && stats.memory_total > stats.memory_available);
    assert_eq!(stats.containers.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), ["a"]);
}

/// The process that could not be started may still have to be reaped when its name is taken again.
#[tokio::test]
async fn a_name_that_is_free_again_is_not_taken_for_what_had_it_before() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    for round in 0..30 {
        let name = format!("e{round}");
        assert_eq!(guest.exec_failure("a", &name, exec_process(&["nope"])).await.exit_code, 127);
        let run = guest.exec("a", &name, exec_process(&["echo", "x"])).await.unwrap();
        assert_eq!((run.stdout.as_str(), run.exit.exit_code), ("x\n", 0));
        assert_eq!(guest.create_failure("b", base_spec(&["nope"])).await.exit_code, 127);
        assert_eq!(guest.run("b", &["echo", "y"]).await.stdout, "y\n");
        guest.delete("b").await;
    }
}

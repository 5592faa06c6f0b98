//! Streams that are long, slow, many, or left alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_proto::agent::container::State;
use serde_json::json;

use crate::guest::{Guest, Options, base_spec, exec_process};

/// Bytes that are different everywhere.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0] & 0x7f
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A specification with the volume at /data.
fn with_volume(script: &str) -> serde_json::Value {
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/run/husk/volumes/v", "options": ["rbind"],
    }));
    spec
}

async fn until_stopped(guest: &Guest, id: &str) {
    let stopped = async {
        while guest.list().await.iter().find(|c| c.id == id).unwrap().state() != State::Stopped {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(200), stopped).await.expect("it stops");
}

#[tokio::test]
async fn a_gibibyte_to_a_reader_that_stops_grows_nothing_and_is_complete() {
    let guest = Guest::boot().await;
    let spec = base_spec(&["sh", "-c", "dd if=/dev/zero bs=65536 count=16384 2>/dev/null"]);
    let streams = guest.start("a", spec, Options::default()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = guest.stats().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = guest.stats().await;
    assert!(after.agent_rss <= before.agent_rss + (1 << 20), "the agent");
    // Where the memory controller is absent this is 0 = 0.
    let used = |stats: &husk_proto::agent::StatsResponse| stats.containers[0].memory_current;
    assert!(used(&after) <= used(&before) + (1 << 20), "the container");
    assert_eq!(streams.drain_output().await, 1 << 30);
    assert_eq!(guest.wait("a", "").await.exit_code, 0);
}

/// The reader takes nothing for longer than a descendant may hold the output open. What the process
/// wrote before its end is in buffers then, and must still come.
#[tokio::test]
async fn output_that_a_slow_reader_has_not_taken_yet_is_not_lost() {
    let guest = Guest::boot().await;
    std::fs::write(guest.root().join("run/husk/volumes/v/bytes"), pattern(1 << 20)).unwrap();
    // How much all buffers between a process and its reader hold.
    let script = "i=0; while head -c 4096 /data/bytes; do i=$((i+1)); echo $i > /data/n; done";
    let _stopped = guest.start("measure", with_volume(script), Options::default()).await;
    let count = || {
        let text = std::fs::read_to_string(guest.root().join("run/husk/volumes/v/n"));
        text.unwrap_or_default().trim().parse::<usize>().unwrap_or(0)
    };
    let mut held = count();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        if held > 0 && count() == held {
            break;
        }
        held = count();
    }
    // Nearly as much: the process can end, and its pipe is not empty.
    let bytes = (held - 2) * 4096;
    let script = format!("head -c {bytes} /data/bytes");
    let streams = guest.start("a", with_volume(&script), Options::default()).await;
    until_stopped(&guest, "a").await;
    tokio::time::sleep(Duration::from_secs(13)).await;
    assert_eq!(streams.rest().await.into_bytes(), pattern(bytes));
    assert_eq!(guest.wait("a", "").await.exit_code, 0);
}

/// A descendant holds the output and goes on writing, and the reader reads: the end comes all the same.
#[tokio::test]
async fn a_descendant_that_writes_for_ever_does_not_delay_the_exit_for_ever() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let process = exec_process(&["sh", "-c", "yes & echo first"]);
    let streams = guest.start_exec("a", "e", process, Options::default()).await.unwrap();
    assert!(streams.drain_output().await > "first\n".len());
    assert_eq!(guest.wait("a", "e").await.exit_code, 0);
    // The agent lives, and the container too.
    assert_eq!(guest.exec("a", "f", exec_process(&["echo", "x"])).await.unwrap().stdout, "x\n");
}

#[tokio::test]
async fn a_reader_that_goes_away_does_not_stop_the_program() {
    let guest = Guest::boot().await;
    let script = "dd if=/dev/zero bs=65536 count=64 2>/dev/null; echo done > /data/done; exit 3";
    let streams = guest.start("a", with_volume(script), Options::default()).await;
    drop(streams);
    assert_eq!(guest.wait("a", "").await.exit_code, 3);
    assert!(guest.root().join("run/husk/volumes/v/done").exists());
}

#[tokio::test]
async fn input_of_any_size_arrives_whole_and_ends() {
    let guest = Guest::boot().await;
    let input = pattern(3 << 20);
    let expected = String::from_utf8(input.clone()).unwrap();
    let options = Options { stdin: Some(input), ..Options::default() };
    let run = guest.run_with("a", base_spec(&["cat"]), options).await;
    assert!(run.stdout == expected, "{} of {} bytes", run.stdout.len(), expected.len());
    // One that reads a line only, and then ends, is not waited for.
    let options = Options { stdin: Some(b"line\n".to_vec()), ..Options::default() };
    let run = guest.run_with("b", base_spec(&["head", "-n", "1"]), options).await;
    assert_eq!((run.stdout.as_str(), run.exit.exit_code), ("line\n", 0));
}

/// A system call that a signal interrupts has neither failed nor ended.
#[tokio::test]
async fn output_is_complete_however_many_children_end_meanwhile() {
    let guest = Guest::boot().await;
    let agent = guest.agent().file_name().unwrap().to_str().unwrap().parse().unwrap();
    let agent = rustix::process::Pid::from_raw(agent).unwrap();
    let count = 8 << 20;
    let args = ["head", "-c", &count.to_string(), "/dev/zero"];
    for round in 0..10 {
        let id = format!("a{round}");
        let streams = guest.start(&id, base_spec(&args), Options::default()).await;
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let signals = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                rustix::process::kill_process(agent, rustix::process::Signal::CHILD).unwrap();
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        assert_eq!(streams.drain_output().await, count);
        over.store(true, Ordering::Relaxed);
        signals.join().unwrap();
        assert_eq!(guest.wait(&id, "").await.exit_code, 0);
        guest.delete(&id).await;
    }
}

/// Runs every fourth container from `first` on.
async fn write_and_check(guest: Arc<Guest>, expected: Arc<String>, first: usize, count: usize) {
    for number in (first..count).step_by(4) {
        let id = format!("many-{number}");
        let script = format!("cat /data/bytes; exit {}", number % 100);
        let run = guest.run_with(&id, with_volume(&script), Options::default()).await;
        assert!(run.stdout == *expected, "{id}: {} bytes", run.stdout.len());
        assert_eq!(run.exit.exit_code as usize, number % 100);
        guest.delete(&id).await;
    }
}

/// A thousand: about a minute on a machine of its own, and three in the test host. HUSK_TEST_CONTAINERS
/// says how many if not that.
#[tokio::test]
async fn many_short_containers_write_a_mebibyte_each_to_the_byte() {
    let guest = Arc::new(Guest::boot().await);
    let count = std::env::var("HUSK_TEST_CONTAINERS").map_or(1000, |n| n.parse().unwrap());
    let expected = Arc::new(String::from_utf8(pattern(1 << 20)).unwrap());
    std::fs::write(guest.root().join("run/husk/volumes/v/bytes"), expected.as_bytes()).unwrap();
    guest.run_with("warm", with_volume("cat /data/bytes"), Options::default()).await;
    guest.delete("warm").await;
    let before = guest.count_left();
    let all: Vec<_> = (0..4)
        .map(|first| tokio::spawn(write_and_check(guest.clone(), expected.clone(), first, count)))
        .collect();
    for task in all {
        task.await.unwrap();
    }
    assert_eq!(guest.count_left(), before);
}

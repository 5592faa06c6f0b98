//! The kernel's log: that of the machine on which this runs, to which every test may write.

use std::fs;

use husk_proto::agent as wire;

use crate::guest::{Guest, LIMIT};

/// For the whole of a test: what one of them floods the log with would overwrite another's lines.
static LOG: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A line that no other test writes, and no other run of this one.
fn line(name: &str) -> String {
    format!("husk-test {name} of process {}", std::process::id())
}

fn say(level: u32, text: &str) {
    fs::write("/dev/kmsg", format!("<{level}>{text}\n")).unwrap();
}

async fn open(guest: &Guest, follow: bool) -> tonic::Streaming<wire::KernelLogRecords> {
    guest.client().kernel_log(wire::KernelLogRequest { follow }).await.unwrap().into_inner()
}

/// Reads until a record has this text.
async fn until(
    log: &mut tonic::Streaming<wire::KernelLogRecords>,
    text: &str,
) -> wire::KernelLogRecord {
    let read = async {
        loop {
            let piece = log.message().await.unwrap().expect("the log has not ended");
            assert!(!piece.records.is_empty());
            if let Some(record) = piece.records.into_iter().find(|r| r.text == text) {
                return record;
            }
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("it is told")
}

#[tokio::test]
async fn the_log_is_whole_and_ends_or_goes_on() {
    let _alone = LOG.lock().await;
    let mut guest = Guest::boot_without_pod().await;
    let first = format!("{} \u{e4}\\\x1b[31m", line("first"));
    say(4, &first);
    let mut log = open(&guest, false).await;
    let mut records = Vec::new();
    while let Some(piece) = log.message().await.unwrap() {
        records.extend(piece.records);
    }
    let told: Vec<_> = records.iter().filter(|r| r.text == first).collect();
    let [told] = told[..] else { panic!("{} times", told.len()) };
    // Who writes is a user, unless a facility is named: LOG_USER is 1.
    assert_eq!((told.level, told.facility), (4, 1));
    assert!(records.iter().skip(1).all(|record| record.lost == 0), "none is left out");

    let mut log = open(&guest, true).await;
    assert_eq!(until(&mut log, &first).await.at_us, told.at_us);
    let second = line("second");
    say(6, &second);
    assert_eq!(until(&mut log, &second).await.level, 6);

    // One who follows does not hold the guest's end up.
    guest.client().shutdown(wire::ShutdownRequest {}).await.unwrap();
    let rest = async { while log.message().await.unwrap().is_some() {} };
    tokio::time::timeout(LIMIT, rest).await.expect("the log ends with the guest");
    assert!(guest.ended().await.success());
}

/// What the kernel says of the agent's memory, in KiB. The agent itself cannot be asked while what
/// it told fills the connection's window.
fn agent_rss(guest: &Guest) -> u64 {
    let status = fs::read_to_string(guest.agent().join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// One who follows and reads nothing grows nothing in the agent, and is told what was missed.
#[tokio::test]
async fn a_slow_reader_is_told_how_many_records_were_overwritten() {
    let _alone = LOG.lock().await;
    let guest = Guest::boot_without_pod().await;
    let mut slow = open(&guest, true).await;
    let first = slow.message().await.unwrap().expect("it has a beginning");
    let before = agent_rss(&guest);
    // More than the log's and all other buffers hold.
    let text = "x".repeat(900);
    for number in 0..4096 {
        say(7, &format!("{} {number} {text}", line("flood")));
    }
    let last = line("last");
    say(7, &last);
    let after = agent_rss(&guest);
    assert!(after <= before + 1024, "{before} KiB, then {after}");
    // What was lost before the very first record, nobody could have read.
    let mut lost: u64 = first.records.iter().skip(1).map(|record| record.lost).sum();
    let read = async {
        loop {
            let piece = slow.message().await.unwrap().expect("the log has not ended");
            for record in piece.records {
                lost += record.lost;
                if record.text == last {
                    return;
                }
            }
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("the last one is told");
    assert!(lost > 0);
}

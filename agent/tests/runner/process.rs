//! The `process` object: how the kernel schedules the container's processes.

use serde_json::json;
use tonic::Code;

use crate::guest::{Guest, Options, base_spec, exec_process};

/// Nice value, real-time priority and policy, by /proc/PID/stat.
const SCHEDULED: &str = "cut -d ' ' -f 19,40,41 /proc/self/stat";

#[tokio::test]
async fn the_scheduler_is_that_of_the_specification() {
    let guest = Guest::boot().await;
    for (id, scheduler, expected) in [
        ("other", json!({"policy": "SCHED_OTHER", "nice": -5}), "-5 0 0\n"),
        ("batch", json!({"policy": "SCHED_BATCH", "nice": 7}), "7 0 3\n"),
        ("idle", json!({"policy": "SCHED_IDLE"}), "0 0 5\n"),
        ("rr", json!({"policy": "SCHED_RR", "priority": 3}), "0 3 2\n"),
    ] {
        let mut spec = base_spec(&["sh", "-c", SCHEDULED]);
        spec["process"]["scheduler"] = scheduler;
        spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        let run = guest.run_with(id, spec, Options::default()).await;
        assert_eq!(run.stdout, expected, "{}", run.stderr);
    }
}

#[tokio::test]
async fn without_a_scheduler_the_agents_own_is_not_inherited() {
    let guest = Guest::boot().await;
    let spec = base_spec(&["sh", "-c", &format!("{SCHEDULED}; sleep 1000")]);
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("0 0 0\n").await;
    let run = guest.exec("a", "e", exec_process(&["sh", "-c", SCHEDULED])).await.unwrap();
    assert_eq!(run.stdout, "0 0 0\n", "{}", run.stderr);
}

#[tokio::test]
async fn an_exec_is_scheduled_as_its_container_unless_it_says_otherwise() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sleep", "1000"]);
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    guest.start("a", spec, Options::default()).await;
    let script = format!("{SCHEDULED}; ionice");
    let mut process = exec_process(&["sh", "-c", &script]);
    let run = guest.exec("a", "same", process.clone()).await.unwrap();
    assert_eq!(run.stdout, "3 0 3\nbest-effort: prio 6\n", "{}", run.stderr);
    process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 1});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    let run = guest.exec("a", "own", process).await.unwrap();
    assert_eq!(run.stdout, "1 0 0\nidle\n", "{}", run.stderr);
}

#[tokio::test]
async fn an_exec_runs_on_the_cpus_of_its_affinity() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let process = exec_process(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
    let free = guest.exec("a", "free", process.clone()).await.unwrap().stdout;
    let mut bound = process.clone();
    bound["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    let run = guest.exec("a", "bound", bound).await.unwrap();
    assert_eq!(run.stdout, "Cpus_allowed_list:\t0\n");
    // The agent is where it was.
    assert_eq!(guest.exec("a", "again", process.clone()).await.unwrap().stdout, free);
    for field in ["initial", "final"] {
        let mut nowhere = process.clone();
        nowhere["execCPUAffinity"] = json!({ field: "1000" });
        let error = guest.exec("a", field, nowhere).await.unwrap_err();
        assert!(error.message().contains(&format!("execCPUAffinity.{field}")), "{error}");
    }
}

#[tokio::test]
async fn the_personality_holds_for_the_container_and_its_execs() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sh", "-c", "uname -m; sleep 1000"]);
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("i686\n").await;
    let run = guest.exec("a", "e", exec_process(&["uname", "-m"])).await.unwrap();
    assert_eq!(run.stdout, "i686\n");
}

#[tokio::test]
async fn labels_are_refused_by_name_unless_they_are_empty() {
    let guest = Guest::boot().await;
    for field in ["apparmorProfile", "selinuxLabel"] {
        let mut spec = base_spec(&["true"]);
        spec["process"][field] = json!("");
        assert_eq!(guest.run_with(field, spec.clone(), Options::default()).await.exit.exit_code, 0);
        spec["process"][field] = json!("some:label");
        let error = guest.try_create("a", spec, Options::default()).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(&format!("process.{field}")), "{error}");
    }
}

#[tokio::test]
async fn no_signal_is_ignored_blocked_or_caught_at_a_programs_start() {
    let guest = Guest::boot().await;
    // grep itself changes none.
    let grep = ["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"];
    guest.start("b", base_spec(&["sleep", "1000"]), Options::default()).await;
    let of_container = guest.run("a", &grep).await.stdout;
    let of_exec = guest.exec("b", "e", exec_process(&grep)).await.unwrap().stdout;
    for status in [of_container, of_exec] {
        let masks: Vec<u64> = status
            .lines()
            .map(|line| u64::from_str_radix(line.split_once('\t').unwrap().1, 16).unwrap())
            .collect();
        // But the two of glibc, which nobody can give an action: whoever runs the tests has theirs.
        const GLIBC: u64 = 0b11 << 31;
        assert_eq!(masks.len(), 3, "{status}");
        assert!(masks.iter().all(|mask| mask & !GLIBC == 0), "{status}");
    }
}

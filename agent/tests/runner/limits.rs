//! Resources. These need the controllers of cgroup v2.

use std::time::Duration;

use husk_proto::agent::agent_event::Event;
use husk_proto::agent::{AgentEvent, UpdateContainerRequest, WatchEventsRequest};
use serde_json::{Value, json};
use tonic::{Code, Status, Streaming};

use crate::guest::{Guest, Options, base_spec, config, exec_process};

async fn update(guest: &Guest, id: &str, resources: Value) -> Result<(), Status> {
    let resources = serde_json::to_vec(&resources).unwrap();
    let request = UpdateContainerRequest { id: id.into(), resources };
    guest.client().update_container(request).await.map(|_| ())
}

/// Files of a container's cgroup, as its processes see them.
async fn files(guest: &Guest, id: &str, exec: &str, names: &[&str]) -> Vec<String> {
    let script = names.iter().map(|n| format!("cat {n} 2>&1 | tr '\\n' ';'; echo;"));
    let script = format!("cd /sys/fs/cgroup; {}", script.collect::<String>());
    let run = guest.exec(id, exec, exec_process(&["sh", "-c", &script])).await.unwrap();
    run.stdout.lines().map(|l| l.trim_end_matches(';').to_owned()).collect()
}

async fn events(guest: &Guest) -> Streaming<AgentEvent> {
    guest.client().watch_events(WatchEventsRequest {}).await.unwrap().into_inner()
}

/// The container of the next kill for memory.
async fn next_oom_kill(events: &mut Streaming<AgentEvent>) -> String {
    let next = tokio::time::timeout(Duration::from_secs(200), events.message()).await;
    let event = next.expect("an event comes").unwrap().expect("the stream goes on");
    assert_eq!(event.lost, 0);
    let Some(Event::OomKill(kill)) = event.event else { panic!("{event:?}") };
    kill.container_id
}

/// Grows until it is killed.
const GROW: &str = "x=$(tr '\\0' x < /dev/zero)";

#[tokio::test]
async fn limits_are_those_of_the_specification() {
    let guest = Guest::boot().await;
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low cpu.weight cpu.max pids.max \
                  memory.oom.group memory.high";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "reservation": 1_048_576},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000},
        "pids": {"limit": 50},
        "unified": {"memory.high": "66060288"},
    });
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(
        run.stdout, "67108864\n1048576\n39\n50000 100000\n50\n1\n66060288\n",
        "{}",
        run.stderr
    );
}

#[tokio::test]
async fn a_container_that_exceeds_its_memory_is_killed_alone() {
    let guest = Guest::boot().await;
    guest.start("other", base_spec(&["sleep", "1000"]), Options::default()).await;
    let script = "x=$(tr '\\0' x < /dev/zero)";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}});
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!((run.exit.exit_code, run.exit.oom_killed), (137, true));
    guest.exec("other", "e", exec_process(&["true"])).await.unwrap();
}

#[tokio::test]
async fn a_limit_too_low_to_start_with_is_told() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["true"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 65_536, "swap": 65_536}});
    let error = guest.try_create("a", spec, Options::default()).await.unwrap_err();
    assert!(error.message().contains("the limit is too low"), "{error}");
    assert!(guest.nothing_left("a"));
}

#[tokio::test]
async fn a_container_cannot_reach_a_disk() {
    let guest = Guest::boot().await;
    let script = "mknod /tmp/d b 7 0 && dd if=/tmp/d of=/dev/null count=1";
    let spec = config(&["sh", "-c", script], |spec| {
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_MKNOD"],
            "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"]});
    });
    let run = guest.run_with("a", spec, Options::default()).await;
    assert!(run.stderr.contains("Operation not permitted"), "{}", run.stderr);
}

#[tokio::test]
async fn every_resource_reaches_its_file() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "cpu": {"shares": 2, "quota": 20_000, "period": 50_000, "burst": 10_000, "cpus": "0",
                "mems": "0"},
        "memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 0},
        "pids": {"limit": -1},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}],
        "unified": {"memory.high": "60000000", "cgroup.max.descendants": "3"},
    });
    guest.start("a", spec, Options::default()).await;
    let names = [
        "cpu.weight",
        "cpu.max",
        "cpu.max.burst",
        "cpuset.cpus",
        "cpuset.mems",
        "pids.max",
        "memory.high",
        "memory.low",
        "memory.max",
        "cgroup.max.descendants",
        "memory.oom.group",
        "hugetlb.2MB.max",
        "hugetlb.2MB.rsvd.max",
    ];
    assert_eq!(
        files(&guest, "a", "e", &names).await,
        [
            "1",
            "20000 50000",
            "10000",
            "0",
            "0",
            "max",
            "59998208",
            "0",
            "67108864",
            "3",
            "1",
            "4194304",
            "4194304"
        ]
    );
    let mut idle = base_spec(&["cat", "/sys/fs/cgroup/cpu.idle"]);
    idle["linux"]["resources"] = json!({"cpu": {"idle": 1, "shares": 512}});
    assert_eq!(guest.run_with("b", idle, Options::default()).await.stdout, "1\n");
}

#[tokio::test]
async fn resources_that_the_kernel_does_not_take_are_refused_by_name() {
    let guest = Guest::boot().await;
    for (resources, field) in [
        (json!({"unified": {"memory.max": "x"}}), "linux.resources.unified"),
        (json!({"unified": {"nothing.max": "1"}}), "linux.resources.unified"),
        (json!({"unified": {"cgroup.procs": "1"}}), "linux.resources.unified"),
        (json!({"unified": {"../memory.max": "1"}}), "linux.resources.unified"),
        (json!({"cpu": {"cpus": "4096"}}), "linux.resources.cpu.cpus"),
        (json!({"cpu": {"quota": 10_000, "burst": 20_000}}), "linux.resources.cpu.quota"),
        (json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}), "hugepageLimits[0]"),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 9, "rate": 1}]}}),
            "linux.resources.blockIO.throttleReadBpsDevice[0]",
        ),
        (json!({"rdma": {"mlx": {}}}), "linux.resources.rdma"),
        (json!({"cpu": {"realtimePeriod": 1}}), "linux.resources.cpu.realtimePeriod"),
    ] {
        let mut spec = base_spec(&["true"]);
        spec["linux"]["resources"] = resources;
        let error = guest.try_create("refused", spec, Options::default()).await.unwrap_err();
        assert!(error.message().contains(field), "{field}: {error}");
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(guest.nothing_left("refused"));
    }
}

/// The numbers of a disk that this machine has.
fn disk() -> (u32, u32) {
    let numbers = std::fs::read_dir("/sys/block")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("device").exists())
        .filter(|path| std::fs::read_to_string(path.join("size")).unwrap().trim() != "0")
        .find_map(|path| std::fs::read_to_string(path.join("dev")).ok())
        .expect("a disk");
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    (major.parse().unwrap(), minor.parse().unwrap())
}

#[tokio::test]
async fn rules_of_devices_are_the_specifications() {
    let guest = Guest::boot().await;
    // The kernel's log, which is not among the devices that every container has. Only opened: no
    // byte is read or written.
    let script = "(: < /dev/d) && echo r; (: >> /dev/d) && echo w; \
                  for d in null zero full random urandom tty; do test -c /dev/$d || echo $d; done; \
                  head -c 4 /dev/zero | wc -c; mknod /tmp/n b 7 99 && echo node";
    let (major, minor) = (1, 11);
    let allow = |kind: &str, numbers: Value, access: &str| {
        let mut rule = json!({"allow": true, "type": kind, "access": access});
        rule.as_object_mut().unwrap().extend(numbers.as_object().unwrap().clone());
        rule
    };
    let deny_all = json!({"allow": false, "access": "rwm"});
    let this = json!({"major": major, "minor": minor});
    for (number, (rules, read, write)) in [
        (json!([]), false, false),
        (json!([deny_all]), false, false),
        (json!([deny_all, allow("c", json!({"major": major}), "r")]), true, false),
        (json!([deny_all, allow("c", json!({"major": major, "minor": -1}), "rw")]), true, true),
        (json!([deny_all, allow("c", json!({"minor": minor}), "r")]), true, false),
        (json!([deny_all, allow("b", this.clone(), "rwm")]), false, false),
        (json!([allow("c", this.clone(), "rwm"), deny_all]), false, false),
        (json!([allow("a", json!({}), "rwm")]), true, true),
        (
            json!([allow("a", json!({}), "rwm"),
                   {"allow": false, "type": "c", "major": major, "minor": minor, "access": "w"}]),
            true,
            false,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let mut spec = base_spec(&["sh", "-c", script]);
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_MKNOD", "CAP_SYSLOG"],
            "effective": ["CAP_MKNOD", "CAP_SYSLOG"], "permitted": ["CAP_MKNOD", "CAP_SYSLOG"]});
        spec["linux"]["devices"] =
            json!([{"type": "c", "path": "/dev/d", "major": major, "minor": minor}]);
        spec["linux"]["resources"] = json!({ "devices": rules });
        let run = guest.run_with(&format!("c{number}"), spec, Options::default()).await;
        let expected =
            format!("{}{}4\nnode\n", if read { "r\n" } else { "" }, if write { "w\n" } else { "" });
        assert_eq!(run.stdout, expected, "{rules}: {}", run.stderr);
    }
}

#[tokio::test]
async fn disks_are_weighed_and_throttled() {
    let guest = Guest::boot().await;
    let (major, minor) = disk();
    let disk = format!("{major}:{minor}");
    let device = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let mut spec = base_spec(&["sleep", "1000"]);
    spec["linux"]["resources"]["blockIO"] = json!({
        "throttleReadBpsDevice": device(1_048_576), "throttleWriteIOPSDevice": device(200),
    });
    guest.start("a", spec, Options::default()).await;
    assert_eq!(
        files(&guest, "a", "e1", &["io.max"]).await,
        [format!("{disk} rbps=1048576 wbps=max riops=max wiops=200")]
    );
    let read = json!({"blockIO": {"throttleReadBpsDevice": device(7_340_032)}});
    update(&guest, "a", read).await.unwrap();
    // The whole of an update is taken back, entries of a file of several keys too.
    let bad =
        json!({"blockIO": {"throttleWriteBpsDevice": device(1)}, "unified": {"memory.max": "x"}});
    update(&guest, "a", bad).await.unwrap_err();
    assert_eq!(
        files(&guest, "a", "e2", &["io.max"]).await,
        [format!("{disk} rbps=7340032 wbps=max riops=max wiops=200")]
    );
    let mut spec = base_spec(&["sh", "-c", "cat /sys/fs/cgroup/io*.weight"]);
    spec["linux"]["resources"]["blockIO"] = json!({"weight": 500});
    match guest.try_create("b", spec, Options::default()).await {
        Ok(_) => {
            let mut spec = base_spec(&["sh", "-c", "cat /sys/fs/cgroup/io*.weight"]);
            spec["linux"]["resources"]["blockIO"] = json!({"weight": 500});
            let run = guest.run_with("c", spec, Options::default()).await;
            let words: Vec<_> = run.stdout.split_whitespace().collect();
            assert!(words.contains(&"500") || words.contains(&"4950"), "{}", run.stdout);
        }
        // A kernel without either weight says so.
        Err(error) => assert!(error.message().contains("blockIO.weight"), "{error}"),
    }
}

#[tokio::test]
async fn an_update_changes_what_it_gives_and_nothing_else() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 67_108_864}, "cpu": {"quota": 50_000, "period": 100_000},
    });
    guest.create("a", spec.clone(), Options::default()).await;
    // While it is created, runs, and is paused.
    update(&guest, "a", json!({"pids": {"limit": 40}})).await.unwrap();
    guest.try_start("a").await.unwrap().unwrap();
    let names = ["memory.max", "memory.low", "cpu.max", "cpu.max.burst", "cpu.weight", "pids.max"];
    update(&guest, "a", json!({"memory": {"limit": 50_331_648}})).await.unwrap();
    update(&guest, "a", json!({"cpu": {"period": 200_000}})).await.unwrap();
    assert_eq!(
        files(&guest, "a", "e1", &names).await,
        ["50331648", "0", "50000 200000", "0", "100", "40"]
    );
    // Quota and burst grow and shrink together, in whatever order the kernel wants them.
    for (quota, burst) in [(100_000, 90_000), (20_000, 10_000)] {
        update(&guest, "a", json!({"cpu": {"quota": quota, "burst": burst}})).await.unwrap();
    }
    let pause = husk_proto::agent::PauseContainerRequest { id: "a".into() };
    guest.client().pause_container(pause).await.unwrap();
    update(&guest, "a", json!({"cpu": {"shares": 1024}})).await.unwrap();
    let resume = husk_proto::agent::ResumeContainerRequest { id: "a".into() };
    guest.client().resume_container(resume).await.unwrap();
    assert_eq!(
        files(&guest, "a", "e2", &names).await,
        ["50331648", "0", "20000 200000", "10000", "39", "40"]
    );
}

#[tokio::test]
async fn an_update_that_fails_changes_nothing_and_names_what_failed() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 67_108_864, "reservation": 4096}, "pids": {"limit": 30},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0"},
    });
    guest.start("a", spec, Options::default()).await;
    let names = [
        "memory.max",
        "memory.low",
        "memory.high",
        "cpu.max",
        "cpu.weight",
        "cpu.idle",
        "cpuset.cpus",
        "pids.max",
    ];
    let before = files(&guest, "a", "before", &names).await;
    let good = json!({
        "memory": {"limit": 134_217_728, "reservation": 8192}, "pids": {"limit": 20},
        "cpu": {"shares": 2048, "quota": 70_000, "period": 90_000, "cpus": "0"},
    });
    let with = |field: &str, value: Value| {
        let mut resources = good.clone();
        resources[field] = value;
        resources
    };
    for (number, (resources, field)) in [
        (with("unified", json!({"memory.high": "nonsense"})), "memory.high"),
        (with("unified", json!({"memory.reclaim": "1"})), "memory.reclaim"),
        (with("hugepageLimits", json!([{"pageSize": "3MB", "limit": 1}])), "hugepageLimits[0]"),
        (with("network", json!({"classID": 1})), "linux.resources.network"),
        (with("devices", json!([{"allow": true, "access": "rwm"}])), "linux.resources.devices"),
        (
            json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}),
            "linux.resources.memory.limit",
        ),
        (json!({"memory": {"swap": 4096}}), "linux.resources.memory.swap"),
        (json!({"cpu": {"idle": 1, "cpus": "4096"}, "memory": {"limit": -1}}), "cpu.cpus"),
    ]
    .into_iter()
    .enumerate()
    {
        let error = update(&guest, "a", resources).await.unwrap_err();
        assert!(error.message().contains(field), "{field}: {error}");
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        let after = files(&guest, "a", &format!("e{number}"), &names).await;
        assert_eq!(after, before, "{field}");
    }
    // The rules that are in force may be repeated, as containerd does.
    let same = with("devices", json!([{"allow": false, "access": "rwm"}]));
    update(&guest, "a", same).await.unwrap();
    guest.signal("a", "", 9).await.unwrap();
    guest.wait("a", "").await;
    let late = update(&guest, "a", good.clone()).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert_eq!(update(&guest, "b", good).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_kill_for_memory_is_told_before_the_exit() {
    let guest = Guest::boot().await;
    let mut events = events(&guest).await;
    guest.start("other", base_spec(&["sleep", "1000"]), Options::default()).await;
    for round in 0..3 {
        let killed: Vec<String> = (0..round).map(|round| format!("a{round}")).collect();
        let id = format!("a{round}");
        let mut spec = base_spec(&["sh", "-c", GROW]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}});
        guest.start(&id, spec, Options::default()).await;
        // Whichever comes first is taken; the event must have come when the answer has.
        let told = async {
            // The kernel kills the processes of a container one by one, and can be seen at it: there
            // may be one more word of the container before.
            let mut container = next_oom_kill(&mut events).await;
            while container != id {
                assert!(killed.contains(&container), "{container}");
                container = next_oom_kill(&mut events).await;
            }
        };
        let exit = guest.wait(&id, "");
        let mut first = Vec::new();
        tokio::pin!(told, exit);
        let (mut is_told, mut ended) = (false, false);
        while !(is_told && ended) {
            tokio::select! {
                biased;
                () = &mut told, if !is_told => {
                    is_told = true;
                    first.push("event");
                }
                exit = &mut exit, if !ended => {
                    assert!(exit.oom_killed);
                    ended = true;
                    first.push("exit");
                }
            }
        }
        assert_eq!(first, ["event", "exit"]);
    }
    let stats = guest.stats().await;
    let kills = |id: &str| stats.containers.iter().find(|c| c.id == id).unwrap().oom_kills;
    assert!(kills("a0") > 0);
    assert_eq!(kills("other"), 0);
    guest.exec("other", "e", exec_process(&["true"])).await.unwrap();
}

#[tokio::test]
async fn a_kill_of_a_process_that_nobody_follows_is_told_too() {
    let guest = Guest::boot().await;
    let mut events = events(&guest).await;
    // The container wants its processes to be killed one by one, and its first one survives.
    let script = format!("sh -c \"{GROW}\"; echo $?; sleep 1000").replace("$(", "\\$(");
    let mut spec = base_spec(&["sh", "-c", &script]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 16_777_216, "swap": 16_777_216},
        "unified": {"memory.oom.group": "0"}});
    let mut streams = guest.start("a", spec, Options::default()).await;
    assert_eq!(next_oom_kill(&mut events).await, "a");
    streams.read_until("137").await;
    let listed = guest.list().await;
    assert_eq!(listed[0].state(), husk_proto::agent::container::State::Running);
}

#[tokio::test]
async fn the_agent_is_no_victim_and_containers_can_be_run_after_many_kills() {
    let guest = Guest::boot().await;
    guest.start("other", base_spec(&["sleep", "1000"]), Options::default()).await;
    let grow = async |number: usize| {
        let mut spec = base_spec(&["sh", "-c", GROW]);
        spec["process"]["oomScoreAdj"] = json!(-997);
        spec["linux"]["resources"] = json!({"memory": {"limit": 12_582_912, "swap": 12_582_912}});
        let run = guest.run_with(&format!("c{number}"), spec, Options::default()).await;
        (run.exit.exit_code, run.exit.oom_killed)
    };
    for number in 0..3 {
        assert_eq!(grow(number).await, (137, true));
    }
    guest.exec("other", "e", exec_process(&["true"])).await.unwrap();
    assert_eq!(guest.run("last", &["echo", "x"]).await.stdout, "x\n");
    assert_eq!(guest.agent_oom_score_adj(), "-1000");
}

#[tokio::test]
async fn statistics_are_those_of_the_cgroup() {
    let guest = Guest::boot().await;
    let script = "dd if=/dev/zero of=/tmp/f bs=1M count=4 2>/dev/null; sync; \
                  for i in 1 2 3 4 5 6 7 8; do x=$x$(seq 2000); done; sleep 1000 & echo ready; wait";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864}, "pids": {"limit": 30},
        "cpu": {"quota": 20_000, "period": 100_000},
    });
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("ready").await;
    let free = base_spec(&["sleep", "1000"]);
    guest.start("b", free, Options::default()).await;
    let stats = guest.stats().await;
    let of = |id: &str| stats.containers.iter().find(|c| c.id == id).unwrap();
    let a = of("a");
    assert_eq!((a.memory_limit, a.pids_limit), (Some(67_108_864), Some(30)));
    assert_eq!((of("b").memory_limit, of("b").pids_limit), (None, None));
    assert!(a.cpu_usage_us > 0 && a.cpu_user_us + a.cpu_system_us > 0, "{a:?}");
    assert!(a.cpu_usage_us.abs_diff(a.cpu_user_us + a.cpu_system_us) <= 1, "{a:?}");
    assert!(a.cpu_periods > 0 && a.cpu_throttled_periods > 0 && a.cpu_throttled_us > 0, "{a:?}");
    assert!(a.memory_current > 0 && a.memory_peak >= a.memory_current, "{a:?}");
    assert!(a.memory_anon > 0 && a.memory_kernel > 0 && a.page_faults > 0, "{a:?}");
    assert!(a.memory_file >= 4 << 20 && a.memory_inactive_file + a.memory_active_file > 0, "{a:?}");
    assert_eq!(a.pids, 2, "the shell and its sleep");
    assert_eq!((a.oom_kills, a.swap_current), (0, 0));
}

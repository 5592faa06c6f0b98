//! Mounts: what the process sees of them.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, Run, base_spec};

const VOLUME: &str = "/run/husk/volumes/v";

/// Runs a script in a container with these mounts beside the usual ones.
async fn run(guest: &Guest, id: &str, script: &str, mounts: Value) -> Run {
    let mut spec = base_spec(&["sh", "-c", script]);
    let all = spec["mounts"].as_array_mut().unwrap();
    all.extend(mounts.as_array().unwrap().iter().cloned());
    guest.run_with(id, spec, Options::default()).await
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// What `mountinfo` says of the mount at `place`: its options, its propagation, its type, and the
/// options of its file system.
struct Seen {
    options: BTreeSet<String>,
    propagation: Vec<String>,
    fstype: String,
    fs_options: BTreeSet<String>,
}

fn seen(mountinfo: &str, place: &str) -> Seen {
    let line = mountinfo
        .lines()
        .rfind(|l| l.split(' ').nth(4) == Some(place))
        .unwrap_or_else(|| panic!("{place} is not in {mountinfo}"));
    let (before, after) = line.split_once(" - ").unwrap();
    let (before, after): (Vec<_>, Vec<_>) =
        (before.split(' ').collect(), after.split(' ').collect());
    let set = |text: &str| text.split(',').map(str::to_owned).collect();
    Seen {
        options: set(before[5]),
        propagation: before[6..]
            .iter()
            .map(|field| field.split(':').next().unwrap().to_owned())
            .collect(),
        fstype: after[0].to_owned(),
        fs_options: set(after[2]),
    }
}

fn set(options: &[&str]) -> BTreeSet<String> {
    options.iter().map(|o| (*o).to_owned()).collect()
}

#[tokio::test]
async fn every_option_of_a_bind_mount_is_seen() {
    let guest = Guest::boot().await;
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("/m/plain", &["bind"], &["rw", "relatime"]),
        ("/m/ro", &["bind", "ro"], &["ro", "relatime"]),
        (
            "/m/all",
            &["rbind", "ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"],
            &["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"],
        ),
        (
            "/m/rec",
            &["rbind", "rro", "rnosuid", "rnodev", "rnoexec", "rnoatime"],
            &["ro", "nosuid", "nodev", "noexec", "noatime"],
        ),
        ("/m/strict", &["bind", "strictatime"], &["rw"]),
        ("/m/nosymfollow", &["bind", "nosymfollow"], &["rw", "relatime", "nosymfollow"]),
        ("/m/undone", &["bind", "ro", "noexec", "rw", "exec"], &["rw", "relatime"]),
    ];
    let mounts: Vec<_> = cases.iter().map(|(at, given, _)| bind(VOLUME, at, given)).collect();
    let run = run(&guest, "a", "cat /proc/self/mountinfo", json!(mounts)).await;
    for (at, given, expected) in cases {
        assert_eq!(seen(&run.stdout, at).options, set(expected), "{at} {given:?}");
    }
}

#[tokio::test]
async fn recursive_attributes_reach_the_mounts_below_and_others_do_not() {
    let guest = Guest::boot().await;
    // Below the volume the first container mounts nothing: what is below comes from the agent.
    let source = "/dev";
    let script = "cat /proc/self/mountinfo; touch /one/pts/x; touch /all/x";
    let mounts = json!([
        bind(source, "/one", &["rbind", "ro", "noexec"]),
        bind(source, "/all", &["rbind", "rro", "rnoatime"]),
    ]);
    let run = run(&guest, "a", script, mounts).await;
    assert!(seen(&run.stdout, "/one").options.contains("ro"));
    assert!(!seen(&run.stdout, "/one/pts").options.contains("ro"));
    for at in ["/all", "/all/pts", "/all/mqueue"] {
        let options = seen(&run.stdout, at).options;
        assert!(options.contains("ro") && options.contains("noatime"), "{at}: {options:?}");
    }
    // What a mount had stays: the agent's own are nosuid.
    for at in ["/one", "/all", "/all/mqueue"] {
        assert!(seen(&run.stdout, at).options.contains("nosuid"), "{at}");
    }
}

#[tokio::test]
async fn new_file_systems_have_the_options_that_are_given() {
    let guest = Guest::boot().await;
    let mount = |kind: &str, at: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
    let mounts = json!([
        mount("tmpfs", "/t", &["size=1m", "nr_inodes=7", "mode=1707", "uid=5", "gid=6", "noexec"]),
        mount("tmpfs", "/tro", &["ro", "nosuid"]),
        mount("proc", "/proc", &["hidepid=invisible", "subset=pid", "nosuid"]),
        mount("sysfs", "/sys2", &["ro"]),
        mount("mqueue", "/mq", &["noexec"]),
        mount("devpts", "/pts2", &["newinstance", "ptmxmode=0600", "mode=0640", "gid=9"]),
        mount("cgroup", "/cg", &["ro"]),
    ]);
    let script = "cat /proc/self/mountinfo; stat -c %a:%u:%g /t; touch /tro/x; ls /proc | head -3; \
                  ls /proc/meminfo; stat -c %a /pts2/ptmx; ls /cg/cgroup.procs; mkdir /cg/x; \
                  dd if=/dev/zero of=/t/f bs=1k count=2k";
    let run = run(&guest, "a", script, mounts).await;
    let at = |place: &str| seen(&run.stdout, place);
    let tmpfs = at("/t");
    assert_eq!(tmpfs.fstype, "tmpfs");
    assert!(tmpfs.options.contains("noexec"));
    for option in ["size=1024k", "nr_inodes=7", "mode=1707", "uid=5", "gid=6"] {
        assert!(tmpfs.fs_options.contains(option), "{option}: {:?}", tmpfs.fs_options);
    }
    assert!(run.stdout.contains("\n1707:5:6\n"), "{}", run.stdout);
    assert_eq!(at("/tro").options, set(&["ro", "nosuid", "relatime"]));
    assert!(run.stderr.contains("touch: /tro/x: Read-only file system"), "{}", run.stderr);
    let proc = at("/proc");
    assert!(
        proc.fs_options.contains("hidepid=invisible") && proc.fs_options.contains("subset=pid")
    );
    assert!(run.stderr.contains("/proc/meminfo: No such file"), "{}", run.stderr);
    assert_eq!((at("/sys2").fstype.as_str(), at("/mq").fstype.as_str()), ("sysfs", "mqueue"));
    let pts = at("/pts2");
    for option in ["gid=9", "mode=640", "ptmxmode=600"] {
        assert!(pts.fs_options.contains(option), "{option}: {:?}", pts.fs_options);
    }
    assert!(run.stdout.contains("\n600\n"), "{}", run.stdout);
    assert_eq!(at("/cg").fstype, "cgroup2");
    assert!(run.stdout.contains("/cg/cgroup.procs"), "{}", run.stdout);
    assert!(
        run.stderr.contains("mkdir: can't create directory '/cg/x': Read-only"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("No space left on device"), "{}", run.stderr);
}

#[tokio::test]
async fn a_bad_option_is_refused_with_the_number_of_the_mount() {
    let guest = Guest::boot().await;
    let cases = [
        json!({"destination": "/x", "type": "nfs", "source": "x"}),
        json!({"destination": "/x", "type": "bind", "source": VOLUME, "options": ["size=1"]}),
        json!({"destination": "/x", "type": "tmpfs", "options": ["size=none"]}),
        json!({"destination": "/x", "type": "proc", "options": ["hidepid=7"]}),
        json!({"destination": "/proc/self", "type": "tmpfs"}),
        json!({"destination": "/proc", "type": "tmpfs"}),
        json!({"destination": "/x", "type": "bind", "source": VOLUME, "options": ["bind", "idmap"]}),
        json!({"destination": "/x", "type": "overlay", "options": ["lowerdir=/no/such"]}),
    ];
    for mount in cases {
        let mut spec = base_spec(&["true"]);
        let number = spec["mounts"].as_array().unwrap().len();
        spec["mounts"].as_array_mut().unwrap().push(mount.clone());
        let error = guest.try_create("a", spec, Options::default()).await.unwrap_err();
        assert!(error.message().contains(&format!("mounts[{number}]")), "{mount}: {error}");
        assert!(matches!(error.code(), Code::InvalidArgument | Code::Internal), "{error}");
        assert!(guest.nothing_left("a"));
    }
    // Links in the image do not help: this one leads to /proc.
    let mut spec = base_spec(&["true"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/links/up/../proc/self", "type": "tmpfs", "source": "x"}));
    let error = guest.try_create("a", spec, Options::default()).await.unwrap_err();
    assert!(error.message().contains("inside /proc"), "{error}");
    // What tools replace there is allowed.
    let run = run(
        &guest,
        "b",
        "cat /proc/uptime",
        json!([bind(&format!("{VOLUME}/file"), "/proc/uptime", &["bind"])]),
    )
    .await;
    assert_eq!(run.stdout, "volume\n");
}

#[tokio::test]
async fn propagation_is_as_asked_for_mounts_and_for_the_root() {
    let guest = Guest::boot().await;
    let cases: &[(&str, &[&str])] = &[
        ("private", &[]),
        ("rprivate", &[]),
        ("shared", &["shared"]),
        ("rshared", &["shared"]),
        ("unbindable", &["unbindable"]),
        ("runbindable", &["unbindable"]),
    ];
    let mounts: Vec<_> = cases
        .iter()
        .map(|(option, _)| bind(VOLUME, &format!("/m/{option}"), &["rbind", option]))
        .collect();
    let all = run(&guest, "a", "cat /proc/self/mountinfo", json!(mounts)).await;
    for (option, expected) in cases {
        let mut propagation = seen(&all.stdout, &format!("/m/{option}")).propagation;
        // A copy of a volume, which is shared, may be its slave as well as shared itself.
        if *expected == ["shared"] {
            propagation.retain(|p| p != "master");
        }
        assert_eq!(propagation, *expected, "{option}");
    }
    for (number, (option, expected)) in cases.iter().enumerate() {
        let mut spec = base_spec(&["cat", "/proc/self/mountinfo"]);
        spec["linux"]["rootfsPropagation"] = json!(option);
        let run = guest.run_with(&format!("r{number}"), spec, Options::default()).await;
        assert_eq!(seen(&run.stdout, "/").propagation, *expected, "{option}: {}", run.stderr);
    }
    // What a container mounts below a shared mount is seen by the other, which is its slave; never
    // the other way round.
    let before = guest.count_left();
    let mut spec = base_spec(&[
        "sh",
        "-c",
        "mount -t tmpfs x /data/sub && echo done; grep -c ' /data/sub ' /proc/self/mountinfo",
    ]);
    spec["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_ADMIN"],
        "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]});
    spec["mounts"].as_array_mut().unwrap().push(bind(VOLUME, "/data", &["rbind", "rslave"]));
    std::fs::create_dir_all(guest.root().join("run/husk/volumes/v/sub")).unwrap();
    let run = guest.run_with("slave", spec, Options::default()).await;
    assert_eq!(run.stdout, "done\n1\n", "{}", run.stderr);
    guest.delete("slave").await;
    assert_eq!(guest.count_left(), before, "nothing is mounted in the agent's namespace");
}

#[tokio::test]
async fn a_mount_that_copies_up_holds_what_the_image_has_there() {
    let guest = Guest::boot().await;
    let tmpfs = |at: &str, options: &[&str]| json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options});
    let script = "cat /etc/group; stat -c %a /etc /fresh /tmp /links; readlink /links/up; \
                  echo new > /etc/new && echo written; grep ' /etc ' /proc/self/mountinfo | wc -l; \
                  ls -a /bare";
    let run = run(
        &guest,
        "a",
        script,
        json!([
            tmpfs("/etc", &["tmpcopyup"]),
            tmpfs("/links", &["tmpcopyup", "mode=711"]),
            tmpfs("/fresh", &[]),
            tmpfs("/tmp", &["size=1m"]),
            tmpfs("/bare", &["tmpcopyup"]),
        ]),
    )
    .await;
    // Without a mode a tmpfs has that of what it covers, and 1777 where there was nothing.
    assert_eq!(
        run.stdout,
        "root:x:0:\nw:x:33:\nextra:x:44:w\n755\n1777\n755\n711\n../../../../etc\nwritten\n1\n.\n..\n",
        "{}",
        run.stderr
    );
}

#[tokio::test]
async fn an_overlay_joins_directories_of_a_volume() {
    let guest = Guest::boot().await;
    let volume = guest.root().join("run/husk/volumes/v");
    for directory in ["low1", "low2", "up", "work"] {
        std::fs::create_dir_all(volume.join(directory)).unwrap();
    }
    std::fs::write(volume.join("low1/f"), "upper\n").unwrap();
    std::fs::write(volume.join("low2/f"), "lower\n").unwrap();
    std::fs::write(volume.join("low2/g"), "g\n").unwrap();
    let overlay = |options: String| json!({"destination": "/o", "type": "overlay", "source": "overlay", "options": options.split(';').collect::<Vec<_>>()});
    let read_only = overlay(format!("lowerdir={VOLUME}/low1:{VOLUME}/low2"));
    let run1 = run(&guest, "a", "cat /o/f /o/g; touch /o/x", json!([read_only])).await;
    assert_eq!(run1.stdout, "upper\ng\n");
    assert!(run1.stderr.contains("Read-only file system"), "{}", run1.stderr);
    let writable = overlay(format!(
        "lowerdir={VOLUME}/low1:{VOLUME}/low2;upperdir={VOLUME}/up;workdir={VOLUME}/work"
    ));
    let run2 = run(&guest, "b", "echo x > /o/x && rm /o/g && ls /o", json!([writable])).await;
    assert_eq!(run2.stdout, "f\nx\n", "{}", run2.stderr);
    assert!(volume.join("up/x").exists() && volume.join("low2/g").exists());
}

#[tokio::test]
async fn an_idmapped_mount_shows_other_owners() {
    let guest = Guest::boot().await;
    let volume = guest.root().join("run/husk/volumes/v");
    std::os::unix::fs::chown(volume.join("file"), Some(7), Some(8)).unwrap();
    let map = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 100}]);
    let mounts = json!([
        {"destination": "/m", "type": "bind", "source": VOLUME, "options": ["bind"],
         "uidMappings": map(1000), "gidMappings": map(2000)},
        {"destination": "/r", "type": "bind", "source": VOLUME, "options": ["rbind", "ridmap"],
         "uidMappings": map(3000), "gidMappings": map(4000)},
        bind(VOLUME, "/plain", &["bind"]),
    ]);
    let script = "stat -c %u:%g /m/file /r/file /plain/file; cat /proc/[0-9]*/comm | grep -c husk; \
                  grep ' /m ' /proc/self/mountinfo | grep -c idmapped";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["mounts"].as_array_mut().unwrap().extend(mounts.as_array().unwrap().iter().cloned());
    match guest.try_create("a", spec.clone(), Options::default()).await {
        // A disk in a test may be of a kind that cannot be mapped: then that is told.
        Err(error) if error.message().contains("Invalid argument") => {
            assert!(error.message().contains("bind"), "{error}");
            assert!(guest.nothing_left("a"));
        }
        Err(error) => panic!("{error}"),
        Ok(_) => {
            let run = guest.run_with("b", spec, Options::default()).await;
            // The process that made the mappings is gone, its remains too.
            assert_eq!(run.stdout, "1007:2008\n3007:4008\n7:8\n0\n1\n", "{}", run.stderr);
        }
    }
}

#[tokio::test]
async fn files_and_missing_destinations_can_be_mounted_on() {
    let guest = Guest::boot().await;
    let file = format!("{VOLUME}/file");
    let run = run(
        &guest,
        "a",
        "cat /etc/passwd /new/deep/file /links/dangling; ls -d /new/dir; echo x > /etc/passwd",
        json!([
            bind(&file, "/etc/passwd", &["bind", "ro"]),
            bind(&file, "/new/deep/file", &["bind"]),
            bind(&file, "/links/dangling", &["bind"]),
            bind(VOLUME, "/new/dir", &["rbind"]),
        ]),
    )
    .await;
    assert_eq!(run.stdout, "volume\nvolume\nvolume\n/new/dir\n", "{}", run.stderr);
    assert!(run.stderr.contains("/etc/passwd: Read-only file system"), "{}", run.stderr);
    // A directory does not go onto a file.
    let mut spec = base_spec(&["true"]);
    spec["mounts"].as_array_mut().unwrap().push(bind(VOLUME, "/etc/passwd", &["bind"]));
    let error = guest.try_create("b", spec, Options::default()).await.unwrap_err();
    assert!(error.message().contains("to /etc/passwd"), "{error}");
    assert!(guest.nothing_left("b"));
}

#[tokio::test]
async fn a_read_only_root_still_has_its_mounts() {
    let guest = Guest::boot().await;
    let mut spec = base_spec(&[
        "sh",
        "-c",
        "touch /x; touch /tmp/x; touch /data/x && touch /dev/x && echo ok; grep ' / ' /proc/self/mountinfo",
    ]);
    spec["root"]["readonly"] = json!(true);
    spec["mounts"].as_array_mut().unwrap().push(bind(VOLUME, "/data", &["bind"]));
    let run = guest.run_with("a", spec, Options::default()).await;
    assert!(run.stdout.starts_with("ok\n"), "{}", run.stderr);
    assert!(seen(&run.stdout, "/").options.contains("ro"));
    assert_eq!(run.stderr.matches("Read-only file system").count(), 2, "{}", run.stderr);
}

#[tokio::test]
async fn masked_and_read_only_paths_are_so_whatever_they_are() {
    let guest = Guest::boot().await;
    let script = "cat /etc/passwd | wc -c; ls /links | wc -l; touch /links/x; echo x > /etc/group; \
                  touch /bin/x; touch /tmp/ok && echo ok";
    let mut spec = base_spec(&["sh", "-c", script]);
    spec["linux"]["maskedPaths"] = json!(["/etc/passwd", "/links", "/not/there"]);
    spec["linux"]["readonlyPaths"] = json!(["/etc/group", "/bin", "/not/there/either"]);
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(run.stdout, "0\n0\nok\n", "{}", run.stderr);
    assert_eq!(run.stderr.matches("Read-only file system").count(), 3, "{}", run.stderr);
}

/// One container swaps a link in a shared volume for a directory and back, as fast as it can, while
/// others are made with mounts on and from below it.
#[tokio::test]
async fn a_link_that_is_swapped_meanwhile_never_leads_outside() {
    let guest = Guest::boot().await;
    let up = "../../../../../../../..";
    let script = format!(
        "cd /data; mkdir real; while :; do ln -s {up} a; rm -f a; ln -s /tmp a; rm -f a; \
         mv real a 2>/dev/null; mv a real 2>/dev/null; done"
    );
    let mut attacker = base_spec(&["sh", "-c", &script]);
    attacker["mounts"].as_array_mut().unwrap().push(bind(VOLUME, "/data", &["rbind"]));
    guest.start("attacker", attacker, Options::default()).await;
    let left = |path: &str| {
        std::fs::read_dir(guest.root().join(path))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect::<BTreeSet<_>>()
    };
    let places = ["", "run", "run/husk", "tmp", "run/husk/volumes"];
    let before = places.map(left);
    let mut made = 0;
    for round in 0..60 {
        let id = format!("c{round}");
        let mut spec = base_spec(&["sh", "-c", "ls -A /sub; ls -A /data/a/made"]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(bind(VOLUME, "/data", &["rbind"]));
        mounts.push(bind(&format!("{VOLUME}/file"), "/data/a/made", &["bind"]));
        mounts.push(bind(&format!("{VOLUME}/a/{round}"), "/sub", &["rbind"]));
        // It may fail, because what was there is not there any more; but it fails inside.
        match guest.try_create(&id, spec, Options::default()).await {
            Ok(_) => {
                made += 1;
                guest.delete(&id).await;
            }
            Err(error) => assert!(error.message().contains("mounts["), "{error}"),
        }
        assert!(guest.nothing_left(&id));
    }
    println!("{made} of 60 containers could be made");
    assert_eq!(places.map(left), before, "something was made outside");
    assert_eq!(guest.run("last", &["echo", "x"]).await.stdout, "x\n");
}

#[tokio::test]
async fn an_idmapped_mount_has_the_mappings_of_the_container_unless_it_has_its_own() {
    let guest = Guest::boot().await;
    let volume = guest.root().join("run/husk/volumes/v");
    std::os::unix::fs::chown(volume.join("file"), Some(7), Some(8)).unwrap();
    let mut spec =
        base_spec(&["sh", "-c", "stat -c %u:%g /mapped/file /plain/file; touch /mapped/x"]);
    let namespaces = ["mount", "pid", "ipc", "uts", "cgroup", "user"];
    spec["linux"]["namespaces"] = namespaces.iter().map(|kind| json!({ "type": kind })).collect();
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(bind(VOLUME, "/mapped", &["bind", "idmap"]));
    mounts.push(bind(VOLUME, "/plain", &["bind"]));
    let run = guest.run_with("a", spec, Options::default()).await;
    // Without a mapping the owner is somebody whom the container does not have.
    assert_eq!(run.stdout, "7:8\n65534:65534\n", "{}", run.stderr);
    let made = std::fs::metadata(volume.join("x")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 0, "root's on the disk too");
}

//! Records in a directory of their own.

use std::os::unix::fs::PermissionsExt;

use super::*;

pub(crate) fn record(name: &str, uid: &str, background: bool) -> PodRecord {
    PodRecord {
        version: VERSION,
        husk_version: "0".into(),
        namespace: "default".into(),
        name: name.into(),
        uid: uid.into(),
        created_at: "2026-01-02T15:04:05.000000000Z".into(),
        background,
        pid: 1,
        run_dir: "/run/husk".into(),
        vcpus: 1,
        memory_mib: 128,
        containers: vec![ContainerInfo {
            name: "main".into(),
            image: "i".into(),
            tty: false,
            stdin: false,
        }],
    }
}

pub(crate) fn found(namespace: &str, name: &str, uid: &str, held: bool) -> Found {
    let pod = PodRecord { namespace: namespace.into(), ..record(name, uid, true) };
    let dir = RecordDir(PathBuf::from("/nowhere"));
    Found { dir, pod, status: StatusRecord::default(), held }
}

fn running() -> StatusRecord {
    StatusRecord { phase: "Running".into(), ..StatusRecord::default() }
}

fn records() -> (tempfile::TempDir, Records) {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::new(dir.path().join("pods"));
    (dir, records)
}

#[test]
fn a_record_is_private_found_and_abandoned_with_its_owner() {
    let (_dir, records) = records();
    assert!(records.list().unwrap().0.is_empty());
    let own = records.create(&record("p", "u1", true), "kind: Pod", &running(), false).unwrap();
    let mode = std::fs::metadata(own.dir().path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(std::fs::read_to_string(own.dir().manifest()).unwrap(), "kind: Pod");
    assert!(own.dir().container("main").is_dir());
    let (found, broken) = records.list().unwrap();
    assert!(found[0].held && broken.is_empty());
    assert_eq!(found[0].status.phase, "Running");
    assert!(matches!(records.remove(&found[0]), Err(RecordError::Runs { .. })));
    drop(own);
    let found = records.look_again(&found[0].dir).unwrap().unwrap();
    assert!(!found.held);
    assert_eq!(found.status.reason, super::super::status::ABANDONED);
    records.remove(&found).unwrap();
    assert!(records.look_again(&found.dir).unwrap().is_none());
    assert!(records.list().unwrap().0.is_empty());
}

#[test]
fn the_last_status_is_kept() {
    let (_dir, records) = records();
    let own = records.create(&record("p", "u1", true), "", &running(), false).unwrap();
    let last = StatusRecord { phase: "Succeeded".into(), ..StatusRecord::default() };
    own.write_status(&last).unwrap();
    drop(own);
    assert_eq!(records.list().unwrap().0[0].status, last);
}

#[test]
fn in_the_background_a_name_is_used_once() {
    let (_dir, records) = records();
    let create = |uid: &str, background, replace| {
        records.create(&record("p", uid, background), "", &running(), replace)
    };
    let first = create("u1", true, false).unwrap();
    assert!(matches!(create("u2", true, true), Err(RecordError::Exists { .. })), "it runs");
    let foreground = create("u3", false, false).unwrap();
    foreground.remove().unwrap();
    drop(first);
    assert!(matches!(create("u4", true, false), Err(RecordError::Exists { .. })));
    drop(create("u5", true, true).unwrap());
    let (found, _) = records.list().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].pod.uid, "u5");
    // The same uid again, whoever holds it.
    assert!(matches!(create("u5", false, false), Err(RecordError::Exists { .. })));
}

#[test]
fn what_a_newer_husk_made_and_what_is_broken_is_told_and_can_be_removed() {
    let (_dir, records) = records();
    let newer = PodRecord { version: VERSION + 1, ..record("new", "u1", true) };
    drop(records.create(&newer, "", &running(), false).unwrap());
    std::fs::create_dir(records.root().join("default_torn_u2")).unwrap();
    let (found, broken) = records.list().unwrap();
    assert!(found.is_empty());
    assert_eq!(broken.len(), 2);
    assert!(broken.iter().any(|b| matches!(b.error, RecordError::Newer { version: 2, .. })));
    for broken in &broken {
        records.remove_broken(broken).unwrap();
    }
    assert!(records.list().unwrap().1.is_empty());
}

#[test]
fn names_cannot_lead_elsewhere() {
    let (_dir, records) = records();
    for uid in ["", "..", "a/b", ".x", "a b"] {
        let created = records.create(&record("p", uid, false), "", &running(), false);
        assert!(matches!(created, Err(RecordError::BadName { .. })), "{uid:?}");
    }
}

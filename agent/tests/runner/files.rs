//! Volumes of files, what the host shares, and the last words of containers.

use husk_proto::agent as wire;
use serde_json::{Value, json};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec, config, files, setup_request};

/// A configuration with bind mounts beside the usual ones: destination, source, `ro` or `rw`.
fn with_binds(args: &[&str], binds: &[(&str, &str, &str)]) -> Value {
    config(args, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (destination, source, access) in binds {
            mounts.push(json!({"destination": destination, "type": "bind", "source": source,
                               "options": ["rbind", "rprivate", access]}));
        }
    })
}

const VOLUME: (&str, &str, &str) = ("/f", "/run/husk/volumes/files", "ro");

async fn update(guest: &Guest, name: &str, files: wire::Files) -> Result<(), tonic::Status> {
    let request = wire::UpdateVolumeRequest { name: name.into(), files: Some(files) };
    guest.client().update_volume(request).await.map(drop)
}

async fn read_file(guest: &Guest, id: &str, path: &str, max: u32) -> Result<String, Code> {
    let (container_id, path) = (id.into(), path.into());
    let request = wire::ReadFileRequest { container_id, path, max_bytes: max };
    let answer = guest.client().read_file(request).await.map_err(|status| status.code())?;
    Ok(String::from_utf8(answer.into_inner().content).unwrap())
}

#[tokio::test]
async fn files_of_a_volume_belong_to_the_pods_group_and_cannot_be_written() {
    let guest = Guest::boot().await;
    let script = "cat /f/a /f/d/b /one; readlink /f/a; stat -L -c '%a %g' /f/a /f/d/b /f/d/ | tr '\\n' ,; \
                  echo x 2>/dev/null >/f/a || echo refused; cat /f/none/x 2>/dev/null || echo none";
    let part = ("/one", "/run/husk/volumes/files/d/b", "ro");
    let mut spec = with_binds(&["sh", "-c", script], &[VOLUME, part]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 33, "additionalGids": [1234]});
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(run.stderr, "");
    assert_eq!(run.stdout, "one\ntwo\ntwo\n..data/a\n644 1234,440 1234,2755 1234,refused\nnone\n");
}

#[tokio::test]
async fn an_update_is_seen_at_once_and_whole_except_through_a_part() {
    let guest = Guest::boot().await;
    // The watch is on the volume's root: the rename of ..data is what tells of an update.
    let script = "echo ready; while [ ! -e /f/c ]; do sleep 0.05; done; cat /f/a /f/c /one; \
                  [ -e /f/d ] || echo gone; ls -A /f | grep -c '^\\.\\.'";
    let part = ("/one", "/run/husk/volumes/files/d/b", "ro");
    let spec = with_binds(&["sh", "-c", script], &[VOLUME, part]);
    let mut streams = guest.start("a", spec, Options::default()).await;
    streams.read_until("ready\n").await;
    update(&guest, "files", files(&[("a", "new\n", 0o644), ("c", "more\n", 0o644)])).await.unwrap();
    // As in Kubernetes: who mounts one file keeps the one that was there.
    assert_eq!(streams.rest().await, "ready\nnew\nmore\ntwo\ngone\n2\n");
    assert_eq!(guest.wait("a", "").await.exit_code, 0);
}

#[tokio::test]
async fn thousands_of_small_files_can_be_replaced() {
    let guest = Guest::boot().await;
    let many = |content: &str| {
        let file = |n: usize| wire::VolumeFile {
            path: format!("key-{n}"),
            content: content.into(),
            mode: 0o644,
        };
        wire::Files { files: (0..4000).map(file).collect() }
    };
    for content in ["old", "new"] {
        update(&guest, "files", many(content)).await.unwrap();
    }
    let script = "ls /f | wc -l; cat /f/* | tr -d '\\n' | wc -c; cat /f/key-3999";
    let run = guest.run_with("a", with_binds(&["sh", "-c", script], &[VOLUME]), Options::default());
    assert_eq!(run.await.stdout, "4000\n12000\nnew");
}

#[tokio::test]
async fn updates_that_cannot_be_are_refused_and_change_nothing() {
    let guest = Guest::boot().await;
    let code = async |name: &str, path: &str| {
        update(&guest, name, files(&[(path, "x", 0o644)])).await.unwrap_err().code()
    };
    assert_eq!(code("none", "a").await, Code::NotFound);
    assert_eq!(code("v", "a").await, Code::NotFound, "a volume of another kind");
    assert_eq!(code("../x", "a").await, Code::NotFound);
    for path in ["../a", "/a", "..data", "a//b", ""] {
        assert_eq!(code("files", path).await, Code::InvalidArgument, "{path:?}");
    }
    let run = guest.run_with("a", with_binds(&["cat", "/f/a"], &[VOLUME]), Options::default());
    assert_eq!(run.await.stdout, "one\n");
}

#[tokio::test]
async fn last_words_can_be_read_until_the_container_is_deleted() {
    let guest = Guest::boot().await;
    let words = ("/dev/words", "/run/husk/containers/a/termination-log", "rw");
    let mut spec = with_binds(&["sh", "-c", "echo -n it is over > /dev/words; exit 3"], &[words]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 33});
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!((run.stderr.as_str(), run.exit.exit_code), ("", 3));
    assert_eq!(read_file(&guest, "a", "/dev/words", 4096).await.unwrap(), "it is over");
    assert_eq!(read_file(&guest, "a", "/dev/words", 4).await.unwrap(), "over");
    for (id, path, max, code) in [
        ("a", "/dev/other", 1, Code::NotFound),
        ("a", "/proc", 1, Code::NotFound),
        ("a", "dev/words", 1, Code::InvalidArgument),
        ("a", "/dev/words", 65537, Code::InvalidArgument),
        ("b", "/dev/words", 1, Code::NotFound),
    ] {
        assert_eq!(read_file(&guest, id, path, max).await.unwrap_err(), code, "{id} {path}");
    }
    guest.delete("a").await;
    assert_eq!(read_file(&guest, "a", "/dev/words", 1).await.unwrap_err(), Code::NotFound);
    assert!(guest.nothing_left("a"));
    // The next one of that name begins with an empty file.
    guest.run_with("a", base_spec(&["true"]), Options::default()).await;
}

fn share(name: &str, number: u32) -> wire::Volume {
    let source = Some(wire::volume::Source::Share(number));
    wire::Volume { name: name.into(), source, mode: 0o700, fs_group: Some(1234) }
}

#[tokio::test]
async fn what_the_host_shares_is_written_both_ways_and_keeps_its_owners() {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    let guest = Guest::boot_without_pod().await;
    let shares = guest.shares();
    fs::create_dir_all(shares.join("0/d")).unwrap();
    fs::write(shares.join("0/f"), "from the host\n").unwrap();
    fs::write(shares.join("1"), "one file\n").unwrap();
    fs::write(shares.join("2"), "of nobody's volume\n").unwrap();
    fs::set_permissions(shares.join("0"), fs::Permissions::from_mode(0o751)).unwrap();
    let mut request = setup_request(None);
    request.volumes.extend([share("dir", 0), share("file", 1)]);
    guest.client().setup_pod(request).await.unwrap();

    let script = "cat /d/f /one /part/g 2>&1; stat -c '%a %g' /d; echo guest > /d/new; \
                  echo more >> /one";
    let binds = [
        ("/d", "/run/husk/volumes/dir", "rw"),
        ("/one", "/run/husk/volumes/file", "rw"),
        ("/part", "/run/husk/volumes/dir/d", "ro"),
    ];
    fs::write(shares.join("0/d/g"), "in a part\n").unwrap();
    let spec = with_binds(&["sh", "-c", script], &binds);
    let run = guest.run_with("a", spec, Options::default()).await;
    assert_eq!(run.stdout, "from the host\none file\nin a part\n751 0\n", "{}", run.stderr);
    assert_eq!(fs::read_to_string(shares.join("0/new")).unwrap(), "guest\n");
    assert_eq!(fs::read_to_string(shares.join("1")).unwrap(), "one file\nmore\n");
    assert_eq!(fs::metadata(shares.join("0")).unwrap().mode() & 0o7777, 0o751);
}

#[tokio::test]
async fn a_share_that_the_host_does_not_have_is_named() {
    let guest = Guest::boot_without_pod().await;
    std::fs::create_dir_all(guest.shares().join("0")).unwrap();
    let mut request = setup_request(None);
    request.volumes.extend([share("dir", 0), share("other", 7)]);
    let refused = guest.client().setup_pod(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let words = "volumes.source.share: the host has no share 7 (volume \"other\")";
    assert!(refused.message().contains(words), "{}", refused.message());
}

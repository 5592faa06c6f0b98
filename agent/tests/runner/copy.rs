//! Archives out of containers and into them.

use std::os::unix::fs::MetadataExt;

use husk_proto::agent as wire;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};

use crate::guest::{FS_GROUP, Guest, Options, base_spec};
use crate::user_namespaces::confined;

/// Takes something out; the archive, and what the agent says of its size.
pub(crate) async fn out(guest: &Guest, id: &str, path: &str) -> Result<(Vec<u8>, u64), Status> {
    let (port, listener) = guest.listen();
    let reading = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut archive = Vec::new();
        stream.read_to_end(&mut archive).await.unwrap();
        archive
    });
    let request = wire::CopyOutRequest { container_id: id.into(), path: path.into(), port };
    let answer = guest.client().copy_out(request).await?;
    Ok((reading.await.unwrap(), answer.into_inner().bytes))
}

/// Brings an archive in.
pub(crate) async fn bring(
    guest: &Guest,
    id: &str,
    path: &str,
    archive: Vec<u8>,
) -> Result<u64, Status> {
    let (port, listener) = guest.listen();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // An archive that is refused need not be read to its end.
        let _sent = stream.write_all(&archive).await;
    });
    let request = wire::CopyInRequest { container_id: id.into(), path: path.into(), port };
    guest.client().copy_in(request).await.map(|answer| answer.into_inner().bytes)
}

pub(crate) fn entry(kind: tar::EntryType, path: &str, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_mode(0o640);
    header.set_uid(7);
    header.set_gid(8);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let padding = content.len().next_multiple_of(512) - content.len();
    [header.as_bytes(), content, &vec![0; padding]].concat()
}

#[tokio::test]
async fn files_go_in_and_come_out_as_they_are() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let content = vec![9; 300_000];
    let archive = entry(tar::EntryType::Regular, "d/file", "", &content);
    let size = archive.len() as u64;
    assert_eq!(bring(&guest, "a", "/tmp", archive).await.unwrap(), size);
    let script = "stat -c '%a %u %g %s' /tmp/d/file; stat -c %a /tmp/d";
    let seen = guest.exec("a", "e", crate::exec_process(&["sh", "-c", script])).await.unwrap();
    assert_eq!(seen.stdout, "640 7 8 300000\n755\n");
    let (archive, size) = out(&guest, "a", "/tmp/d").await.unwrap();
    assert_eq!(archive.len() as u64, size);
    let mut archive = tar::Archive::new(archive.as_slice());
    let paths: Vec<_> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(paths, ["d/", "d/file"]);
}

/// A host that takes nothing of an archive holds nobody else up: what the process that copies has of
/// the agent is not another one's input.
#[tokio::test]
async fn an_input_ends_while_an_archive_is_carried() {
    let guest = Guest::boot().await;
    guest.start("a", base_spec(&["sleep", "1000"]), Options::default()).await;
    let fill = crate::exec_process(&["dd", "if=/dev/zero", "of=/tmp/large", "bs=1M", "count=4"]);
    assert_eq!(guest.exec("a", "fill", fill).await.unwrap().exit.exit_code, 0);
    let options = Options { stdin: Some(Vec::new()), ..Options::default() };
    let cat = guest.start_exec("a", "cat", crate::exec_process(&["cat"]), options).await.unwrap();

    let (port, listener) = guest.listen();
    let request =
        wire::CopyOutRequest { container_id: "a".into(), path: "/tmp/large".into(), port };
    let mut client = guest.client();
    let copy = tokio::spawn(async move { client.copy_out(request).await });
    let (stalled, _) = listener.accept().await.unwrap();
    stalled.readable().await.unwrap();
    assert_eq!(cat.finish(Some(b"all".to_vec())).await.0, "all");
    assert_eq!(guest.wait("a", "cat").await.exit_code, 0);
    assert!(!copy.is_finished(), "nobody has read the archive");
    drop(stalled);
    copy.await.unwrap().unwrap_err();
}

/// In a user namespace the owners are those that the container sees, in both directions, on its root
/// and in a volume that is mapped as that is.
#[tokio::test]
async fn owners_are_as_the_container_sees_them() {
    let guest = Guest::boot().await;
    let mut spec = confined(&["sleep", "1000"]);
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/mapped", "type": "bind", "source": "/run/husk/volumes/v",
         "options": ["bind", "idmap"]}));
    guest.start("a", spec, Options::default()).await;
    let archive = || entry(tar::EntryType::Regular, "d/file", "", b"x");
    for (directory, group, on_disk) in [
        ("tmp", 0, guest.layer("a").join("upper/tmp/d/file")),
        // What is made there gets the group of the volume.
        ("mapped", FS_GROUP, guest.volume().join("d/file")),
    ] {
        bring(&guest, "a", &format!("/{directory}"), archive()).await.unwrap();
        let script = format!("cd /{directory}; stat -c '%a %u %g' d/file; stat -c '%u %g' d");
        let exec = crate::exec_process(&["sh", "-c", &script]);
        let seen = guest.exec("a", directory, exec).await.unwrap();
        assert_eq!(seen.stdout, format!("640 7 8\n0 {group}\n"), "{directory}");
        let (archive, _) = out(&guest, "a", &format!("/{directory}/d")).await.unwrap();
        let mut archive = tar::Archive::new(archive.as_slice());
        let owners: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().header().clone())
            .map(|header| (header.uid().unwrap(), header.gid().unwrap()))
            .collect();
        assert_eq!(owners, [(0, group.into()), (7, 8)], "{directory}");
        let on_disk = std::fs::metadata(on_disk).unwrap();
        assert_eq!(
            (on_disk.uid(), on_disk.gid()),
            (7, 8),
            "the disk holds what the container says"
        );
    }
    // What the container's root may not do, an archive may not either: this is nobody's there.
    std::fs::create_dir(guest.volume().join("others")).unwrap();
    let refused = bring(&guest, "a", "/v/others", archive()).await.unwrap_err();
    assert!(refused.message().contains("Permission denied"), "{refused}");
    let mut foreign = archive();
    // Of 65536 mapped users there is none of this number.
    foreign[108..116].copy_from_slice(b"0200000\0");
    let sum: u32 = foreign[..512]
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
        .sum();
    foreign[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let refused = bring(&guest, "a", "/tmp", foreign).await.unwrap_err();
    assert!(refused.message().contains("d/file"), "{refused}");
}

#[tokio::test]
async fn no_path_and_no_archive_leads_out_of_the_container() {
    let guest = Guest::boot().await;
    let script = "ln -s /../../../../etc /tmp/up; echo inside > /etc/mine; sleep 1000";
    guest.start("a", base_spec(&["sh", "-c", script]), Options::default()).await;
    for _ in 0..100 {
        if out(&guest, "a", "/etc/mine").await.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let (archive, _) = out(&guest, "a", "/tmp/up/mine").await.unwrap();
    let text = String::from_utf8_lossy(&archive).into_owned();
    assert!(text.contains("inside"), "the container's own file");
    for (path, code) in [
        ("/no/such", Code::NotFound),
        ("relative", Code::InvalidArgument),
        ("/a\0b", Code::InvalidArgument),
        ("", Code::InvalidArgument),
    ] {
        assert_eq!(out(&guest, "a", path).await.unwrap_err().code(), code, "{path:?}");
    }
    use tar::EntryType as Kind;
    for (archive, words) in [
        (entry(Kind::Regular, "../x", "", b""), "leads outside"),
        (
            [entry(Kind::Symlink, "l", "/etc", b""), entry(Kind::Regular, "l/x", "", b"")].concat(),
            "in the way",
        ),
        (entry(Kind::Char, "dev", "", b""), "device"),
        (entry(Kind::Regular, "cut", "", &[1; 2000])[..1500].to_vec(), "ends inside"),
        (vec![b'x'; 5000], "no tar header"),
    ] {
        let error = bring(&guest, "a", "/tmp", archive).await.unwrap_err();
        assert!(error.message().contains(words), "{words}: {}", error.message());
    }
    let error = bring(&guest, "a", "/etc/mine", Vec::new()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{}", error.message());
    let gone = wire::CopyOutRequest { container_id: "b".into(), path: "/".into(), port: 1 };
    assert_eq!(guest.client().copy_out(gone).await.unwrap_err().code(), Code::NotFound);
}

//! Archives out of containers and into them.

use husk_proto::agent as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

use crate::guest::{Guest, Options, base_spec};

/// Takes something out; the archive, and what the agent says of its size.
async fn out(guest: &Guest, path: &str) -> Result<(Vec<u8>, u64), Code> {
    let (port, listener) = guest.listen();
    let reading = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut archive = Vec::new();
        stream.read_to_end(&mut archive).await.unwrap();
        archive
    });
    let request = wire::CopyOutRequest { container_id: "a".into(), path: path.into(), port };
    let answer = guest.client().copy_out(request).await.map_err(|status| status.code())?;
    Ok((reading.await.unwrap(), answer.into_inner().bytes))
}

/// Brings an archive in.
async fn bring(guest: &Guest, path: &str, archive: Vec<u8>) -> Result<u64, tonic::Status> {
    let (port, listener) = guest.listen();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // An archive that is refused need not be read to its end.
        let _sent = stream.write_all(&archive).await;
    });
    let request = wire::CopyInRequest { container_id: "a".into(), path: path.into(), port };
    guest.client().copy_in(request).await.map(|answer| answer.into_inner().bytes)
}

fn entry(kind: tar::EntryType, path: &str, link: &str, content: &[u8]) -> Vec<u8> {
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
    assert_eq!(bring(&guest, "/tmp", archive).await.unwrap(), size);
    let script = "stat -c '%a %u %g %s' /tmp/d/file; stat -c %a /tmp/d";
    let seen = guest.exec("a", "e", crate::exec_process(&["sh", "-c", script])).await.unwrap();
    assert_eq!(seen.stdout, "640 7 8 300000\n755\n");
    let (archive, size) = out(&guest, "/tmp/d").await.unwrap();
    assert_eq!(archive.len() as u64, size);
    let mut archive = tar::Archive::new(archive.as_slice());
    let paths: Vec<_> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(paths, ["d/", "d/file"]);
}

#[tokio::test]
async fn no_path_and_no_archive_leads_out_of_the_container() {
    let guest = Guest::boot().await;
    let script = "ln -s /../../../../etc /tmp/up; echo inside > /etc/mine; sleep 1000";
    guest.start("a", base_spec(&["sh", "-c", script]), Options::default()).await;
    for _ in 0..100 {
        if out(&guest, "/etc/mine").await.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let (archive, _) = out(&guest, "/tmp/up/mine").await.unwrap();
    let text = String::from_utf8_lossy(&archive).into_owned();
    assert!(text.contains("inside"), "the container's own file");
    for (path, code) in [
        ("/no/such", Code::NotFound),
        ("relative", Code::InvalidArgument),
        ("/a\0b", Code::InvalidArgument),
        ("", Code::InvalidArgument),
    ] {
        assert_eq!(out(&guest, path).await.unwrap_err(), code, "{path:?}");
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
        let error = bring(&guest, "/tmp", archive).await.unwrap_err();
        assert!(error.message().contains(words), "{words}: {}", error.message());
    }
    let error = bring(&guest, "/etc/mine", Vec::new()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{}", error.message());
    let gone = wire::CopyOutRequest { container_id: "b".into(), path: "/".into(), port: 1 };
    assert_eq!(guest.client().copy_out(gone).await.unwrap_err().code(), Code::NotFound);
}

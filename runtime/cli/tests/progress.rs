//! What is told of pulls while a pod is brought to the background, without KVM: on the stand-in for
//! the VMM, and one for a registry.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use serde_json::Value;

use common::{Host, pod, text};

/// Serves an OCI layout as the image `test/image` of a registry. Returns the registry's name.
fn serve(layout: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let layout = layout.clone();
            std::thread::spawn(move || answer(connection.unwrap(), &layout));
        }
    });
    name
}

fn answer(mut connection: TcpStream, layout: &Path) {
    let mut requests = BufReader::new(connection.try_clone().unwrap());
    loop {
        let mut request = String::new();
        if requests.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
        let mut header = request.clone();
        while !header.trim().is_empty() {
            header.clear();
            requests.read_line(&mut header).unwrap();
        }
        let path = request.split(' ').nth(1).unwrap();
        let index = std::fs::read(layout.join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let (kind, digest) = match path.rsplit_once('/').unwrap() {
            (before, _) if before.ends_with("/manifests") => {
                let manifest = &index["manifests"][0];
                (&manifest["mediaType"], manifest["digest"].as_str().unwrap())
            }
            (_, digest) => (&Value::Null, digest),
        };
        let kind = kind.as_str().unwrap_or("application/octet-stream");
        let hex = digest.trim_start_matches("sha256:");
        let (status, body) = match std::fs::read(layout.join("blobs/sha256").join(hex)) {
            Ok(body) if !hex.is_empty() => ("200 OK", body),
            _ if path == "/v2/" => ("200 OK", b"{}".to_vec()),
            _ => ("404 Not Found", Vec::new()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let body = if request.starts_with("HEAD") { Vec::new() } else { body };
        if connection.write_all(&[head.into_bytes(), body].concat()).is_err() {
            return;
        }
    }
}

/// A host whose registry has an image that the host has not; the pod is killed at the test's end.
struct Fresh {
    host: Host,
    image: String,
    /// The beginning of its only layer's digest.
    layer: String,
}

impl Fresh {
    fn new() -> Self {
        let host = Host::with_image();
        std::fs::remove_dir_all(host.path("state/images")).unwrap();
        let image = format!("{}/test/image", serve(host.path("layout")));
        let layer = std::fs::read_dir(host.path("layout/blobs/sha256"))
            .unwrap()
            .map(|entry| entry.unwrap())
            // A tar archive is by far the largest blob.
            .max_by_key(|entry| entry.metadata().unwrap().len())
            .map(|entry| entry.file_name().to_string_lossy()[..12].to_owned())
            .unwrap();
        Fresh { host, image, layer }
    }

    fn manifest(&self) -> String {
        pod("web", &[("main", "sleep 60")])
            .replace("test/image", &self.image)
            .replace("\"Never\",\"name", "\"IfNotPresent\",\"name")
    }

    /// Returns when nobody can write to its output any more, although the pod runs.
    fn run(&self, args: &[&str]) -> Output {
        self.host.start(args, &self.manifest()).wait_with_output().unwrap()
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.host.output(&["rm", "-f", "web"]);
    }
}

#[test]
fn a_pull_in_the_background_is_told_in_lines() {
    let fresh = Fresh::new();
    let output = fresh.run(&["-d"]);
    let told = text(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(text(&output.stdout), "web\n");
    let (image, layer) = (&fresh.image, &fresh.layer);
    assert!(told.starts_with(&format!("husk: pulling {image}\nhusk: layer {layer}: ")), "{told}");
    assert!(told.ends_with(&format!("husk: layer {layer}: done\n")), "{told}");
}

#[test]
fn quiet_is_quiet() {
    let fresh = Fresh::new();
    let output = fresh.run(&["-d", "-q"]);
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}

#[test]
fn a_pull_in_the_background_is_shown_on_a_terminal() {
    let fresh = Fresh::new();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let person = openpt(flags).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let terminal = File::from(ioctl_tiocgptpeer(&person, flags).unwrap());
    let manifest = fresh.host.path("pod.json");
    std::fs::write(&manifest, fresh.manifest()).unwrap();
    let mut command = fresh.host.husk(&["run", "-d", manifest.to_str().unwrap()]);
    command.env("TERM", "xterm").stdout(Stdio::piped()).stderr(terminal);
    let mut child = command.spawn().unwrap();
    // Its copy of the terminal.
    drop(command);
    let mut shown = Vec::new();
    // Ends with an error (EIO) when nobody has the terminal any more, although the pod runs.
    let ended = File::from(person).read_to_end(&mut shown);
    let shown = text(&shown);
    assert!(ended.is_err(), "{shown}");
    assert!(child.wait().unwrap().success(), "{shown}");
    assert!(shown.contains(&format!("{} [", fresh.layer)) && shown.contains("done"), "{shown:?}");
    assert!(!shown.contains("husk: "), "{shown:?}");
}

#[test]
fn several_pods_do_not_draw_over_each_other() {
    let fresh = Fresh::new();
    let manifest = fresh.manifest();
    let both = format!("{manifest}\n---\n{}", manifest.replace("\"web\"", "\"other\""));
    let output = fresh.host.start(&["-d"], &both).wait_with_output().unwrap();
    fresh.host.output(&["rm", "-f", "other"]);
    let told = text(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(text(&output.stdout), "web\nother\n");
    assert!(told.contains(&format!("husk: layer {}: done\n", fresh.layer)), "{told}");
    assert!(told.lines().all(|line| line.starts_with("husk: ")), "{told}");
}

//! `husk image` against a real registry and real images, and pods from what it stored.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result, ensure};
use husk_cases::place;
use husk_cases::pods::{self, Husk};
use husk_cases::registry::{Registry, disk_dir};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Exit code of husk's own failures.
const HUSK_FAILED: Option<i32> = Some(125);

/// Runs `husk image ARGS`, which must succeed; returns its standard output.
fn image(husk: &Husk, args: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = husk.output(&[&["image"], args].concat())?;
    ensure!(status.success(), "{args:?}: {status}: {}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8(stdout)?)
}

/// Runs `husk image ARGS`, which must fail as husk fails, saying all of `words`.
fn refused(husk: &Husk, args: &[&str], words: &[&str]) -> Result<()> {
    let Output { status, stdout, stderr } = husk.output(&[&["image"], args].concat())?;
    let text = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), HUSK_FAILED, "{args:?}: {text}");
    assert_eq!(String::from_utf8_lossy(&stdout), "", "{args:?}");
    // After the lines of progress.
    assert!(text.lines().any(|line| line.starts_with("husk: cannot ")), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no {word:?} in {text}");
    }
    Ok(())
}

/// All files of a husk's store. Without the locks, which hold nothing and stay.
fn files(husk: &Husk) -> Result<Vec<PathBuf>> {
    let (mut found, mut directories) = (Vec::new(), vec![husk.state().join("images")]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else if entry.path().extension() != Some("lock".as_ref()) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The store's layers.
fn layers(husk: &Husk) -> Result<Vec<PathBuf>> {
    let erofs = |path: &PathBuf| path.extension() == Some("erofs".as_ref());
    Ok(files(husk)?.into_iter().filter(erofs).collect())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// A test image's OCI layout.
fn layout(name: &str) -> PathBuf {
    place::tree().join("images").join(name)
}

fn blob_in(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Digests in a layout: of its only manifest, of the configuration, and of the lowest layer.
fn digests(layout: &Path) -> Result<[String; 3]> {
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no digest");
    let manifest = text(&json(&layout.join("index.json"))?["manifests"][0]["digest"])?;
    let document = json(&blob_in(layout, &manifest))?;
    Ok([manifest, text(&document["config"]["digest"])?, text(&document["layers"][0]["digest"])?])
}

/// A pod of one container of `image`.
fn pod_of(image: &str, policy: &str, script: &str, more: &str) -> String {
    let more = format!("    imagePullPolicy: {policy}\n{more}");
    pods::one("busybox", script, &more).replace("localhost/husk/busybox:test", image)
}

/// Flips one bit in the middle of a file.
fn damage(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path)?;
    let middle = bytes.len() / 2;
    *bytes.get_mut(middle).context("an empty file")? ^= 1;
    // The layouts of the test images are read-only, and so are copies.
    fs::remove_file(path)?;
    Ok(fs::write(path, bytes)?)
}

/// A copy of an OCI layout that can be changed.
fn copy_of(layout: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.join("blobs/sha256"))?;
    for name in ["oci-layout", "index.json"] {
        fs::copy(layout.join(name), to.join(name))?;
    }
    for blob in fs::read_dir(layout.join("blobs/sha256"))? {
        let blob = blob?;
        fs::copy(blob.path(), to.join("blobs/sha256").join(blob.file_name()))?;
    }
    Ok(())
}

#[test]
fn a_pod_runs_from_what_it_pulled() -> Result<()> {
    let (registry, state) = (Registry::start(&[])?, disk_dir()?);
    let husk = Husk::at(state.path());
    let reference = registry.image("busybox");
    // By digest of the manifest too.
    let [manifest, ..] = digests(&layout("busybox"))?;
    for reference in [reference.clone(), format!("{reference}@{manifest}")] {
        let pod = husk.run(&pod_of(&reference, "Always", "echo I am a $(uname)", ""))?;
        assert_eq!(pod.succeeded()?.log("main"), ["I am a Linux"]);
    }
    assert_eq!(layers(&husk)?.len(), 1);
    // Without the registry, Always cannot be kept, and what is here is enough for the others.
    drop(registry);
    let pod = husk.run(&pod_of(&reference, "Always", "true", ""))?;
    assert_eq!(pod.code, HUSK_FAILED, "{}", pod.text);
    assert!(format!("{}{}", pod.text, pod.report).contains(&reference), "{}", pod.text);
    husk.run(&pod_of(&reference, "IfNotPresent", "true", ""))?.succeeded()?;
    husk.run(&pod_of(&reference, "Never", "true", ""))?.succeeded()?;
    Ok(())
}

#[test]
fn a_second_pull_downloads_no_layer() -> Result<()> {
    let (registry, state, other) = (Registry::start(&[])?, disk_dir()?, disk_dir()?);
    let husk = Husk::at(state.path());
    let reference = registry.image("busybox");
    let [manifest, _, layer] = digests(&layout("busybox"))?;
    let line = format!("{reference}:latest  {manifest}\n");
    assert_eq!(image(&husk, &["pull", &reference])?, line);
    let before = files(&husk)?;
    // The registry can give the layer no more: whoever does not have it fails, and says which.
    fs::remove_file(registry.blob(&layer))?;
    let empty = Husk::at(other.path());
    refused(&empty, &["pull", &reference], &[&reference, &layer, "404"])?;
    assert_eq!(files(&empty)?, Vec::<PathBuf>::new());
    assert_eq!(image(&husk, &["pull", &reference])?, line);
    assert_eq!(files(&husk)?, before);
    Ok(())
}

#[test]
fn a_damaged_blob_of_a_registry_is_refused() -> Result<()> {
    let (registry, state) = (Registry::start(&[])?, disk_dir()?);
    let husk = Husk::at(state.path());
    let [_, config, layer] = digests(&layout("busybox"))?;
    for digest in [&layer, &config] {
        damage(&registry.blob(digest))?;
        refused(&husk, &["pull", &registry.image("busybox")], &[digest])?;
        assert_eq!(files(&husk)?, Vec::<PathBuf>::new());
    }
    Ok(())
}

#[test]
fn a_certificate_must_be_trusted() -> Result<()> {
    let (registry, state) = (Registry::start(&["--tls"])?, disk_dir()?);
    let husk = Husk::at(state.path());
    let reference = registry.image("busybox");
    let words = ["certificate", "--ca-file"];
    refused(&husk, &["pull", "--plain-http=false", &reference], &words)?;
    // To loopback http is spoken unless told otherwise, which this registry does not.
    refused(
        &husk,
        &["pull", &reference],
        &["HTTP request to an HTTPS server", "--plain-http=false"],
    )?;
    let dir = tempfile::tempdir()?;
    let empty = dir.path().join("empty.pem");
    fs::write(&empty, "no certificate\n")?;
    for (file, words) in
        [(empty.as_path(), "holds no certificate"), (Path::new("/no/ca"), "/no/ca")]
    {
        refused(&husk, &["pull", "--ca-file", utf8(file)?, &reference], &[words])?;
    }
    assert_eq!(files(&husk)?, Vec::<PathBuf>::new());
    let certificate = registry.certificate();
    image(&husk, &["pull", "--ca-file", utf8(&certificate)?, &reference])?;
    assert_eq!(layers(&husk)?.len(), 1);
    Ok(())
}

#[test]
fn credentials_are_asked_for_and_checked() -> Result<()> {
    let (registry, state) = (Registry::start(&["--auth", "ann:s3cret"])?, disk_dir()?);
    let husk = Husk::at(state.path());
    let reference = registry.image("busybox");
    refused(&husk, &["pull", &reference], &["wants a user name and a password", "--user"])?;
    for user in ["ann:wrong", "bob:s3cret"] {
        let words = ["401", "user name and the password", "refused"];
        refused(&husk, &["pull", "--user", user, &reference], &words)?;
    }
    assert_eq!(files(&husk)?, Vec::<PathBuf>::new());
    image(&husk, &["pull", "--user", "ann:s3cret", &reference])?;
    assert_eq!(layers(&husk)?.len(), 1);
    // The password from a file.
    image(&husk, &["rm", &reference])?;
    let dir = tempfile::tempdir()?;
    let password = dir.path().join("password");
    fs::write(&password, "s3cret\n")?;
    let mut pull = husk.command(&["image", "pull", "--user", "ann", &reference]);
    let output = pull.stdin(fs::File::open(&password)?).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(layers(&husk)?.len(), 1);
    Ok(())
}

#[test]
fn what_the_registry_does_not_have_is_named() -> Result<()> {
    let (registry, state) = (Registry::start(&[])?, disk_dir()?);
    let husk = Husk::at(state.path());
    let absent = format!("sha256:{}", "0".repeat(64));
    for reference in [
        registry.image("nope"),
        format!("{}:no-such-tag", registry.image("busybox")),
        format!("{}@{absent}", registry.image("busybox")),
    ] {
        refused(&husk, &["pull", &reference], &[&reference, "404", "unknown"])?;
    }
    refused(&husk, &["pull", "Not A Name"], &["Not A Name"])?;
    let arm = ["pull", "--platform", "linux/arm64", &registry.image("busybox")];
    refused(&husk, &arm, &["the image is for linux/amd64, not for linux/arm64"])?;
    let layout = layout("busybox");
    let arm = ["import", "--platform", "linux/arm64", utf8(&layout)?, "arm"];
    refused(&husk, &arm, &["no image for linux/arm64", "linux/amd64"])?;
    assert_eq!(files(&husk)?, Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn images_are_listed_and_removed_with_their_layers() -> Result<()> {
    let state = disk_dir()?;
    let husk = Husk::at(state.path());
    assert_eq!(image(&husk, &["ls", "--output", "json"])?.trim(), "[]");
    let archive = place::tree().join("images/busybox.tar");
    let layout = layout("busybox");
    let [manifest, config, _] = digests(&layout)?;
    // The same image in both forms: one layer for three names.
    image(&husk, &["import", utf8(&layout)?, "localhost/one"])?;
    image(&husk, &["import", utf8(&layout)?, "localhost/two:v2"])?;
    let printed = image(&husk, &["import", utf8(&archive)?])?;
    let archived = printed.split_whitespace().next().context("nothing printed")?.to_owned();
    assert_eq!(layers(&husk)?.len(), 1);

    let list: Value = serde_json::from_str(&image(&husk, &["ls", "--output", "json"])?)?;
    let list = list.as_array().context("no list")?;
    assert_eq!(list.len(), 3);
    let one = list.iter().find(|i| i["reference"] == "localhost/one:latest").context("no one")?;
    assert_eq!(one["manifestDigest"], *manifest);
    assert_eq!(one["configDigest"], *config);
    assert_eq!((&one["platform"], &one["layers"]), (&"linux/amd64".into(), &1.into()));
    let size = fs::metadata(layers(&husk)?.first().context("no layer")?)?.len();
    assert_eq!(one["sizeBytes"], size);
    let text = image(&husk, &["ls"])?;
    let mut lines = text.lines();
    let head: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(head, ["IMAGE", "ID", "PLATFORM", "LAYERS", "SIZE", "STORED"]);
    let row = lines.find(|line| line.contains("localhost/two:v2")).context("no two")?;
    let id = config.trim_start_matches("sha256:").get(..12).context("a short digest")?;
    assert!(row.contains(id) && row.contains("linux/amd64"), "{row}");

    refused(&husk, &["rm", "localhost/three"], &["localhost/three", "not in the store"])?;
    image(&husk, &["rm", "localhost/one", "localhost/two:v2"])?;
    assert_eq!(layers(&husk)?.len(), 1);
    image(&husk, &["rm", &archived])?;
    let left = files(&husk)?;
    assert!(left.iter().all(|path| path.ends_with("refs.json")), "{left:?}");
    assert_eq!(image(&husk, &["ls", "--output", "json"])?.trim(), "[]");
    Ok(())
}

#[test]
fn an_archive_of_docker_save_runs() -> Result<()> {
    let state = disk_dir()?;
    let husk = Husk::at(state.path());
    let archive = place::tree().join("images/busybox.tar");
    image(&husk, &["import", utf8(&archive)?, "localhost/archived:1"])?;
    let pod = husk.run(&pod_of("localhost/archived:1", "Never", "echo from an archive", ""))?;
    assert_eq!(pod.succeeded()?.log("main"), ["from an archive"]);
    Ok(())
}

#[test]
fn damaged_images_are_refused_and_leave_nothing() -> Result<()> {
    let (state, dir) = (disk_dir()?, disk_dir()?);
    let husk = Husk::at(state.path());
    // An image that is there already stays as it is.
    let sound = layout("debian");
    image(&husk, &["import", utf8(&sound)?, "localhost/debian"])?;
    let before = files(&husk)?;

    let archive = fs::read(place::tree().join("images/busybox.tar"))?;
    let mut cases = Vec::new();
    for (name, len) in [("empty", 0), ("short", 700), ("half", archive.len() / 2)] {
        let path = dir.path().join(name);
        fs::write(&path, archive.get(..len).context("a small archive")?)?;
        cases.push(path);
    }
    // In the layer, which is nearly all of it.
    let flipped = dir.path().join("flipped.tar");
    fs::write(&flipped, &archive)?;
    damage(&flipped)?;
    cases.push(flipped);
    let text = dir.path().join("text");
    fs::write(&text, "not an archive\n".repeat(1000))?;
    cases.push(text);
    let layout = layout("busybox");
    for digest in digests(&layout)? {
        let hash = digest.trim_start_matches("sha256:").to_owned();
        let (broken, cut, gone) = (
            dir.path().join(format!("broken-{hash}")),
            dir.path().join(format!("cut-{hash}")),
            dir.path().join(format!("gone-{hash}")),
        );
        for copy in [&broken, &cut, &gone] {
            copy_of(&layout, copy)?;
        }
        damage(&blob_in(&broken, &digest))?;
        let blob = blob_in(&cut, &digest);
        let bytes = fs::read(&blob)?;
        fs::remove_file(&blob)?;
        fs::write(&blob, bytes.get(..bytes.len() / 2).unwrap_or_default())?;
        fs::remove_file(blob_in(&gone, &digest))?;
        cases.extend([broken, cut, gone]);
    }
    for case in &cases {
        refused(&husk, &["import", utf8(case)?, "localhost/bad"], &[utf8(case)?])?;
        assert_eq!(files(&husk)?, before, "{}", case.display());
    }
    let list: Value = serde_json::from_str(&image(&husk, &["ls", "--output", "json"])?)?;
    assert_eq!(list.as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn a_layer_in_use_outlives_its_image() -> Result<()> {
    let state = disk_dir()?;
    let husk = Husk::at(state.path());
    let layout = layout("busybox");
    image(&husk, &["import", utf8(&layout)?, "localhost/used"])?;
    // At the end it reads the whole layer anew, from the disk.
    let script = "trap 'echo 3 > /proc/sys/vm/drop_caches && cat /bin/busybox > /tmp/copy && \
                  cmp /bin/busybox /tmp/copy && echo all is here; exit 0' TERM\n\
                  echo ready to wait\nwhile :; do sleep 0.2; done";
    let privileged = "    securityContext: {privileged: true}";
    let mut child = husk.start(&pod_of("localhost/used", "Never", script, privileged))?;
    let mut stderr = child.stderr.take().context("no standard error")?;
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(b"ready to wait") {
        let read = stderr.read(&mut byte)?;
        ensure!(read == 1, "not ready: {}", String::from_utf8_lossy(&seen));
        seen.extend(byte);
    }
    let before = layers(&husk)?;
    image(&husk, &["rm", "localhost/used"])?;
    assert_eq!(layers(&husk)?, before);
    kill_process(Pid::from_raw(child.id().try_into()?).context("PID 0")?, Signal::INT)?;
    stderr.read_to_end(&mut seen)?;
    child.wait()?;
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.contains("all is here"), "{seen}");
    // The next removal finds it unused.
    image(&husk, &["import", utf8(&layout)?, "localhost/again"])?;
    image(&husk, &["rm", "localhost/again"])?;
    assert_eq!(layers(&husk)?, Vec::<PathBuf>::new());
    Ok(())
}

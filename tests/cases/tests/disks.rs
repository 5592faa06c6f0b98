//! Disks that running pods are given and give back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use husk_cases::background::{Pod, text};

const CONTAINER: &str = "
  - name: main
    image: localhost/husk/busybox:test
    command: [sleep, '100000']
    resources: {limits: {memory: 128Mi, cpu: 1}}
";

/// As many disks as a running VM can be given.
const PLACES: usize = 8;

fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output()?;
    ensure!(output.status.success(), "{program} {args:?}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

/// An image with an ext4 file system, in which there is a file `hello` and 4 MiB of `noise`.
fn image(dir: &Path, name: &str) -> Result<PathBuf> {
    let (path, content) = (dir.join(name), dir.join("content"));
    std::fs::create_dir_all(&content)?;
    std::fs::write(content.join("hello"), format!("from {name}\n"))?;
    std::fs::write(content.join("noise"), vec![0x5a; 4 << 20])?;
    File::create(&path)?.set_len(16 << 20)?;
    let (path_text, content) = (path.display().to_string(), content.display().to_string());
    run("mkfs.ext4", &["-q", "-F", "-d", &content, &path_text])?;
    Ok(path)
}

/// What was refused, in words.
fn refused(pod: &Pod, args: &[&str]) -> Result<String> {
    let output = pod.husk.output(args)?;
    ensure!(!output.status.success(), "{args:?} was not refused: {}", text(&output.stdout));
    Ok(text(&output.stderr))
}

fn shell(pod: &Pod, script: &str) -> Result<String> {
    let output = pod.exec(&["sh", "-c", script])?;
    ensure!(output.status.success(), "{script}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

#[test]
fn a_running_pod_gets_disks_and_gives_them_back() -> Result<()> {
    let pod = Pod::up("case-disks", CONTAINER, &[])?;
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "data.img")?;
    let path = path.to_str().unwrap_or_default();
    let attach = ["disk", "attach", pod.name, path, "--mount", "main:/mnt/data"];
    for round in 0..2 {
        ensure!(pod.ok(&attach)? == "data\n");
        ensure!(shell(&pod, "cat /mnt/data/hello")? == "from data.img\n");
        shell(&pod, &format!("echo {round} > /mnt/data/round"))?;

        // One user that writes.
        let again =
            ["disk", "attach", pod.name, path, "--mount", "/x", "--name", "x", "--read-only"];
        let holder = pod.holder()?.as_raw_nonzero();
        let words = refused(&pod, &again)?;
        ensure!(words.contains(&format!("{path} is in use by process {holder} (")), "{words}");

        // A disk that is in use stays.
        shell(&pod, "cd /mnt/data; sleep 1000 > /dev/null 2>&1 & echo $! > /tmp/user")?;
        let words = refused(&pod, &["disk", "detach", pod.name, "data"])?;
        ensure!(words.contains("is in use"), "{words}");
        shell(&pod, "cat /mnt/data/hello && kill $(cat /tmp/user)")?;
        pod.until("the disk is free", |pod| {
            Ok(pod.husk.output(&["disk", "detach", pod.name, "data"])?.status.success())
        })?;
        ensure!(shell(&pod, "ls /mnt/data")?.is_empty());
        // Nobody has it open, and what was written is on it.
        ensure!(run("debugfs", &["-R", "cat /round", path])? == format!("{round}\n"));
        run("e2fsck", &["-f", "-n", path])?;
        let words = refused(&pod, &["disk", "detach", pod.name, "data"])?;
        ensure!(words.contains("the pod has no disk \"data\""), "{words}");
    }
    pod.ok(&["stop", pod.name])?;
    pod.gone()
}

#[test]
fn disks_beyond_the_last_place_and_what_is_no_disk_are_refused() -> Result<()> {
    let pod = Pod::up("case-places", CONTAINER, &[])?;
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "shared.img")?;
    let attach = |name: &str, path: &Path| -> Vec<String> {
        let (path, mount) = (path.display().to_string(), format!("/mnt/{name}"));
        ["disk", "attach", pod.name, &path, "--read-only", "--name", name, "--mount", &mount]
            .map(str::to_owned)
            .to_vec()
    };
    let with = |args: Vec<String>, act: &dyn Fn(&[&str]) -> Result<String>| {
        act(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let ok = |args: &[&str]| pod.ok(args);
    let no = |args: &[&str]| refused(&pod, args);

    let xfs = dir.path().join("xfs.img");
    File::create(&xfs)?.write_all_at(b"XFSB", 0)?;
    File::options().write(true).open(&xfs)?.set_len(1 << 20)?;
    let words = with(attach("xfs", &xfs), &no)?;
    ensure!(words.contains("holds xfs; husk mounts ext4 and erofs"), "{words}");
    let words = with(attach("null", Path::new("/dev/null")), &no)?;
    ensure!(words.contains("neither a regular file nor a block device"), "{words}");

    // Any number may read one disk.
    for place in 0..PLACES {
        with(attach(&format!("d{place}"), &path), &ok)?;
    }
    let words = with(attach("more", &path), &no)?;
    ensure!(words.contains(&format!("all {PLACES} places")), "{words}");
    let all = shell(&pod, "cat /mnt/d*/hello; touch /mnt/d0/x 2>&1 || true")?;
    ensure!(all.matches("from shared.img").count() == PLACES, "{all}");
    ensure!(all.contains("Read-only file system"), "{all}");
    pod.ok(&["disk", "detach", pod.name, "d3"])?;
    with(attach("more", &path), &ok)?;
    ensure!(shell(&pod, "cat /mnt/more/hello")? == "from shared.img\n");
    Ok(())
}

#[test]
fn a_disk_that_is_truncated_gives_errors_and_the_pod_lives_on() -> Result<()> {
    let pod = Pod::up("case-truncated", CONTAINER, &[])?;
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "short.img")?;
    let path_text = path.to_str().unwrap_or_default();
    pod.ok(&["disk", "attach", pod.name, path_text, "--read-only", "--mount", "/mnt"])?;
    File::options().write(true).open(&path)?.set_len(64 << 10)?;
    let words = shell(&pod, "cat /mnt/noise 2>&1 > /dev/null || true")?;
    ensure!(words.contains("Input/output error") || words.contains("I/O error"), "{words}");
    ensure!(shell(&pod, "echo alive")? == "alive\n");
    pod.ok(&["disk", "detach", pod.name, "short"])?;
    ensure!(shell(&pod, "ls /mnt; echo alive")? == "alive\n");
    Ok(())
}

/// A container with the disk at `path` as a volume.
fn with_volume(path: &Path, more: &str) -> String {
    format!(
        "
  - name: main
    image: localhost/husk/busybox:test
    command: [sleep, '100000']
    resources: {{limits: {{memory: 128Mi, cpu: 1}}}}
    volumeMounts: [{{name: disk, mountPath: /disk}}]
  volumes:
  - name: disk
    csi: {{driver: disk.husk.dev{more}, volumeAttributes: {{path: {}}}}}
",
        path.display()
    )
}

#[test]
fn a_volume_of_a_disk_has_one_pod_that_writes_or_many_that_read() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "volume.img")?;
    let pod = Pod::up("case-volume-1", &with_volume(&path, ""), &[])?;
    ensure!(
        shell(&pod, "cat /disk/hello; ls -d /disk/lost+found; echo new > /disk/new")?
            == "from volume.img\n/disk/lost+found\n"
    );

    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: case-volume-2}\nspec:\n  \
                    restartPolicy: Never\n  containers:\n"
        .to_owned();
    let second = pod.husk.run(&(manifest + &with_volume(&path, ", readOnly: true")))?;
    let holder = pod.holder()?.as_raw_nonzero();
    let words = format!("{} is in use by process {holder} (", path.display());
    let told = format!("{}{}", second.text, second.report);
    ensure!(second.phase() != "Succeeded" && told.contains(&words), "{told}");

    pod.ok(&["stop", pod.name])?;
    pod.ok(&["rm", pod.name])?;
    let path_text = path.to_str().unwrap_or_default();
    ensure!(run("debugfs", &["-R", "cat /new", path_text])? == "new\n");
    run("e2fsck", &["-f", "-n", path_text])?;

    let readers = ["case-reader-1", "case-reader-2"]
        .map(|name| Pod::up(name, &with_volume(&path, ", readOnly: true"), &[]));
    for reader in readers {
        let words = shell(&reader?, "cat /disk/new; touch /disk/x 2>&1 || true")?;
        ensure!(words.starts_with("new\n") && words.contains("Read-only file system"), "{words}");
    }
    Ok(())
}

/// A container with the disk at `path` as a block device.
fn with_device(path: &Path, more: &str) -> String {
    format!(
        "
  - name: main
    image: localhost/husk/busybox:test
    command: [sleep, '100000']
    resources: {{limits: {{memory: 128Mi, cpu: 1}}}}
    volumeDevices: [{{name: raw, devicePath: /dev/xvda}}]
  volumes:
  - name: raw
    csi: {{driver: disk.husk.dev{more}, volumeAttributes: {{path: {}}}}}
",
        path.display()
    )
}

#[test]
fn a_raw_disk_is_written_through_its_node_and_a_read_only_one_is_not() -> Result<()> {
    const LEN: usize = 4 << 20;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("raw.img");
    // No file system, and a mark at each end.
    let mut bytes = vec![0; LEN];
    bytes[..5].copy_from_slice(b"first");
    bytes[LEN - 4..].copy_from_slice(b"last");
    std::fs::write(&path, &bytes)?;

    let pod = Pod::up("case-raw-1", &with_device(&path, ""), &[])?;
    ensure!(shell(&pod, "stat -c '%F %a' /dev/xvda")? == "block special file 660\n");
    ensure!(shell(&pod, "head -c 5 /dev/xvda")? == "first");
    ensure!(shell(&pod, "tail -c 4 /dev/xvda")? == "last");
    ensure!(shell(&pod, "grep -c xvda /proc/mounts || true")? == "0\n");
    // Of the other disks of the VM, of which the pod's own is one, it can make a node but not open it.
    let others = "for n in /sys/block/vd*; do d=$(cat $n/dev); mknod /dev/n b ${d%:*} ${d#*:}; \
                  head -c 1 /dev/n > /dev/null 2>&1 && echo ${n##*/}; rm /dev/n; done; true";
    ensure!(shell(&pod, others)?.lines().count() == 1);
    shell(
        &pod,
        "yes pattern | head -c 8192 | dd of=/dev/xvda bs=4096 seek=3 conv=notrunc,fsync 2> /dev/null",
    )?;
    pod.ok(&["stop", pod.name])?;
    pod.ok(&["rm", pod.name])?;
    let pattern = b"pattern\n".repeat(8192 / 8);
    bytes[3 * 4096..3 * 4096 + 8192].copy_from_slice(&pattern);
    ensure!(std::fs::read(&path)? == bytes, "the image holds something else");

    let reader = Pod::up("case-raw-2", &with_device(&path, ", readOnly: true"), &[])?;
    ensure!(shell(&reader, "head -c 5 /dev/xvda")? == "first");
    let words =
        shell(&reader, "dd if=/dev/zero of=/dev/xvda bs=512 count=1 conv=notrunc 2>&1 || true")?;
    ensure!(words.contains("Operation not permitted"), "{words}");
    pod.ok(&["stop", reader.name])?;
    ensure!(std::fs::read(&path)? == bytes, "the image was written");
    Ok(())
}

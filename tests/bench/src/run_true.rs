//! The whole command: `husk run` of one busybox container that does `true`, against `crun run` and
//! `runc run` of the same.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Setup;
use crate::pairs::{self, Contender};

const MANIFEST: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: bench-true}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: localhost/husk/busybox:bench
    command: ['true']
";

pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("run: one busybox container doing `true`, the whole command");
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let manifest = dir.path().join("true.yaml");
    fs::write(&manifest, MANIFEST)?;
    let husk = |args: &[&str]| {
        let mut command = Command::new(&setup.husk);
        command.arg("--state-dir").arg(&state).args(args);
        command
    };
    let layout = setup.busybox.to_str().context("the layout's path is not UTF-8")?;
    run(husk(&["image", "import", layout, "localhost/husk/busybox:bench"]))?;
    let bundle = dir.path().join("bundle");
    make_bundle(&setup.busybox, &bundle)?;

    let manifest = manifest.to_str().context("the manifest's path is not UTF-8")?;
    let oci = |runtime: &'static str| {
        let bundle = bundle.clone();
        let mut round = 0;
        move || {
            round += 1;
            let mut command = Command::new(runtime);
            command.args(["run", "--bundle"]).arg(&bundle).arg(format!("bench-{round}"));
            run(command)
        }
    };
    let mut contenders = [
        Contender { name: "husk", once: Box::new(|| run(husk(&["run", manifest]))) },
        Contender { name: "crun", once: Box::new(oci("crun")) },
        Contender { name: "runc", once: Box::new(oci("runc")) },
    ];
    let samples = pairs::interleave(setup.rounds, || Ok(()), &mut contenders)?;
    let against = |peer: usize| pairs::ratio(&samples[0], &samples[peer]).context("no samples");
    Ok(vec![
        format!("ratio run_true {:.2} vs crun", against(1)?),
        format!("ratio run_true {:.2} vs runc", against(2)?),
    ])
}

/// Runs a command to its end; it must succeed.
fn run(mut command: Command) -> Result<Duration> {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {command:?}"))?;
    let took = started.elapsed();
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}\n{text}", output.status);
    Ok(took)
}

/// A runtime bundle of the image's root file system, for the peers.
pub(crate) fn make_bundle(layout: &Path, bundle: &Path) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs)?;
    let read = |path: &Path| -> Result<serde_json::Value> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    };
    let blob = |digest: &serde_json::Value| -> Result<std::path::PathBuf> {
        let digest = digest.as_str().context("a digest is missing")?;
        Ok(layout.join("blobs").join(digest.replace(':', "/")))
    };
    let index = read(&layout.join("index.json"))?;
    let manifest = read(&blob(&index["manifests"][0]["digest"])?)?;
    for layer in manifest["layers"].as_array().context("the manifest has no layers")? {
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&rootfs).arg("-xf").arg(blob(&layer["digest"])?);
        run(tar)?;
    }
    let mut spec = Command::new("runc");
    spec.args(["spec", "--bundle"]).arg(bundle);
    run(spec)?;
    let path = bundle.join("config.json");
    let mut config = read(&path)?;
    config["process"]["args"] = serde_json::json!(["true"]);
    config["process"]["terminal"] = false.into();
    fs::write(path, config.to_string())?;
    Ok(())
}

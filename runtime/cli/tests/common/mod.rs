//! A host without KVM on which `husk` runs: a state directory, an image, and the stand-in for the VMM
//! (`examples/fake_vmm.rs`).
#![allow(dead_code, unreachable_pub)] // each test file uses a part of it

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use assert_cmd::cargo::CommandCargoExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A state directory with files that look like a kernel and an initramfs, and an image.
pub struct Host {
    pub dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Enough of an ELF file to pass for a kernel that is complete.
        let mut elf = vec![0; 120];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let machine: u8 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
        (elf[18], elf[32], elf[54], elf[56], elf[64]) = (machine, 64, 56, 1, 1);
        std::fs::write(dir.path().join("vmlinux"), elf).unwrap();
        std::fs::write(dir.path().join("initramfs"), b"070701 TRAILER!!!").unwrap();
        // What stands for /dev/kvm need only be there.
        std::fs::write(dir.path().join("kvm"), b"").unwrap();
        Host { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn husk(&self, args: &[&str]) -> Command {
        let mut command = Command::cargo_bin("husk").unwrap();
        command
            .env_remove("HUSK_LOG")
            .env("HUSK_STATE_DIR", self.path("state"))
            .env("HUSK_RUN_DIR", self.path("run"))
            .env("HUSK_KERNEL", self.path("vmlinux"))
            .env("HUSK_INITRAMFS", self.path("initramfs"))
            .env("HUSK_KVM", self.path("kvm"))
            .env("HUSK_VMM", fake_vmm())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.husk(args).output().unwrap()
    }

    /// Imports an image with one layer and this configuration.
    pub fn import(&self, name: &str, config: Value) {
        let layout = self.path("layout");
        let blobs = layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let blob = |bytes: &[u8]| -> Value {
            let digest = hex::encode(Sha256::digest(bytes));
            std::fs::write(blobs.join(&digest), bytes).unwrap();
            json!({"digest": format!("sha256:{digest}"), "size": bytes.len()})
        };
        let mut layer = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        layer.append_data(&mut header, "etc/hello", &b"hello"[..]).unwrap();
        let mut layer = blob(&layer.into_inner().unwrap());
        layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let mut config = blob(&serde_json::to_vec(&config).unwrap());
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": [layer],
        });
        let mut manifest = blob(&serde_json::to_vec(&manifest).unwrap());
        manifest["mediaType"] = json!("application/vnd.oci.image.manifest.v1+json");
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        std::fs::write(layout.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let output = self.output(&["image", "import", layout.to_str().unwrap(), name]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    pub fn with_image() -> Self {
        let host = Host::new();
        host.import("test/image", json!({"Env": ["PATH=/usr/bin:/bin"]}));
        host
    }

    /// Starts `husk run` on a manifest, with its output in pipes.
    pub fn start(&self, args: &[&str], manifest: &str) -> Child {
        let mut command = self.husk(&["run"]);
        command.args(args).arg("-").stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
        child
    }

    /// Runs a manifest to its end and returns its report as well.
    pub fn json(&self, manifest: &str) -> (Output, Value) {
        let output = self.start(&["--output", "json"], manifest).wait_with_output().unwrap();
        let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output, report)
    }

    pub fn nothing_is_left(&self) {
        for dir in ["run/pods", "state/scratch"] {
            let left: Vec<_> = std::fs::read_dir(self.path(dir))
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .filter(|name| name != ".lock")
                .collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

fn fake_vmm() -> PathBuf {
    // target/PROFILE/deps/cli-... -> target/PROFILE/examples/fake_vmm
    let test = std::env::current_exe().unwrap();
    let fake = test.parent().unwrap().parent().unwrap().join("examples/fake_vmm");
    assert!(fake.exists(), "run `cargo build -p husk --examples` first");
    fake
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A pod that is not restarted, with these containers: (name, shell script).
pub fn pod(name: &str, containers: &[(&str, &str)]) -> String {
    let containers: Vec<Value> = containers
        .iter()
        .map(|(name, script)| {
            json!({"name": name, "image": "test/image", "imagePullPolicy": "Never",
                   "command": ["/bin/sh", "-c", script]})
        })
        .collect();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
           "spec": {"restartPolicy": "Never", "containers": containers}})
    .to_string()
}

pub fn command_pod(command: &[&str]) -> String {
    let mut pod: Value = serde_json::from_str(&pod("p", &[("main", "")])).unwrap();
    pod["spec"]["containers"][0]["command"] = json!(command);
    pod.to_string()
}

impl Host {
    /// As [`Host::nothing_is_left`], for when no disk was made.
    pub fn nothing_is_left_to_run(&self) {
        std::fs::create_dir_all(self.path("state/scratch")).unwrap();
        self.nothing_is_left();
    }
}

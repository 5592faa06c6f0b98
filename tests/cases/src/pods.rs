//! `husk` as a person uses it: pods from manifests, in the foreground.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::place;

/// Images that every test may use: as `localhost/husk/NAME:test`, and without a tag for the examples,
/// which say `imagePullPolicy: IfNotPresent`.
const IMAGES: [&str; 4] = ["busybox", "debian", "nginx", "redis"];

/// An installed husk with the test images in its store.
#[derive(Debug)]
pub struct Husk {
    state: PathBuf,
}

impl Husk {
    /// The one that all tests of a machine share. The first imports the images.
    ///
    /// # Errors
    /// An image cannot be imported.
    pub fn shared() -> Result<&'static Husk> {
        static SHARED: OnceLock<Husk> = OnceLock::new();
        if let Some(husk) = SHARED.get() {
            return Ok(husk);
        }
        let husk = Husk { state: PathBuf::from("/var/lib/husk-cases") };
        std::fs::create_dir_all(&husk.state)?;
        husk.import(&IMAGES)?;
        Ok(SHARED.get_or_init(|| husk))
    }

    /// Imports test images, unless they are there: those that few tests need.
    ///
    /// # Errors
    /// One cannot be imported.
    pub fn import(&self, images: &[&str]) -> Result<()> {
        // Test binaries of one machine may run at the same time.
        let lock = File::create(self.state.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        for image in images {
            let marker = self.state.join(format!("{image}.imported"));
            if !marker.exists() {
                let layout = place::tree().join("images").join(image);
                let layout = layout.to_str().context("the tree's path is not UTF-8")?;
                for name in
                    [format!("localhost/husk/{image}"), format!("localhost/husk/{image}:test")]
                {
                    let output = self.output(&["image", "import", layout, &name])?;
                    let text = String::from_utf8_lossy(&output.stderr);
                    ensure!(output.status.success(), "cannot import {image}: {text}");
                }
                File::create(marker)?;
            }
        }
        Ok(())
    }

    /// One with an empty store of its own, in `state`.
    #[must_use]
    pub fn at(state: &Path) -> Husk {
        Husk { state: state.to_owned() }
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A command of husk's.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(place::program("husk"));
        command.arg("--state-dir").arg(&self.state).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.command(args).output().context("cannot start husk")
    }

    /// Starts `husk run --output json` of a manifest.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, manifest: &str) -> Result<Child> {
        let mut child = self
            .command(&["run", "--output", "json", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start husk")?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(manifest.as_bytes())?;
        Ok(child)
    }

    /// Runs a pod to its end.
    ///
    /// # Errors
    /// husk cannot be started, or prints something else than a pod's report.
    pub fn run(&self, manifest: &str) -> Result<Finished> {
        finish(self.start(manifest)?)
    }
}

/// Waits for a pod that was started.
///
/// # Errors
/// It printed something else than a pod's report.
pub fn finish(child: Child) -> Result<Finished> {
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = output.stdout.split(|b| *b == b'\n').next().unwrap_or_default();
    let report = if line.is_empty() { Value::Null } else { serde_json::from_slice(line)? };
    Ok(Finished { report, text, code: output.status.code() })
}

/// A pod that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What `--output json` printed; null if the pod never was one.
    pub report: Value,
    /// Logs and messages.
    pub text: String,
    /// husk's exit code.
    pub code: Option<i32>,
}

impl Finished {
    /// The pod's phase, empty if there is none.
    #[must_use]
    pub fn phase(&self) -> &str {
        self.report["phase"].as_str().unwrap_or_default()
    }

    /// What the report says of a container; null if nothing.
    #[must_use]
    pub fn container(&self, name: &str) -> &Value {
        let all = self.report["containers"].as_array();
        all.and_then(|all| all.iter().find(|c| c["name"] == name)).unwrap_or(&Value::Null)
    }

    /// A container's exit code.
    #[must_use]
    pub fn exit_code(&self, name: &str) -> Option<u64> {
        self.container(name)["exitCode"].as_u64()
    }

    /// The lines that a container wrote.
    #[must_use]
    pub fn log(&self, container: &str) -> Vec<&str> {
        let of =
            |line: &'_ str| line.split_once('|').is_some_and(|(name, _)| name.trim() == container);
        self.text
            .lines()
            .filter(|line| of(line))
            .filter_map(|line| line.split_once("| "))
            .map(|(_, text)| text)
            .collect()
    }

    /// Fails unless the pod Succeeded; tells everything if not.
    ///
    /// # Errors
    /// It did not.
    pub fn succeeded(self) -> Result<Self> {
        ensure!(self.phase() == "Succeeded", "{}\n{:#}", self.text, self.report);
        ensure!(self.code == Some(0), "exit code {:?}\n{}", self.code, self.text);
        Ok(self)
    }
}

/// A pod of one busybox container that runs a shell script, and is not restarted.
#[must_use]
pub fn shell(script: &str) -> String {
    one("busybox", script, "")
}

/// A pod of one container of `image` that runs a shell script; `more` is added to the container, in
/// YAML indented by four spaces.
#[must_use]
pub fn one(image: &str, script: &str, more: &str) -> String {
    let script = script.replace('\n', "\n      ");
    format!(
        "\
apiVersion: v1
kind: Pod
metadata:
  name: case
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: localhost/husk/{image}:test
    command:
    - sh
    - -c
    - |
      {script}
{more}
"
    )
}

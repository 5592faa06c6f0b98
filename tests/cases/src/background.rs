//! Pods in the background.

use std::io::Write;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use serde_json::Value;

use crate::pods::Husk;

/// husk and a pod of a name that no other test uses; the pod is removed when this is dropped.
#[derive(Debug)]
pub struct Pod {
    /// By which it is held.
    pub husk: &'static Husk,
    /// Its name, in the namespace `default`.
    pub name: &'static str,
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.husk.output(&["rm", "-f", self.name]) {
            eprintln!("{} stays: {error:#}", self.name);
        }
    }
}

impl Pod {
    /// Starts a pod of these containers, in YAML.
    ///
    /// # Errors
    /// It does not run.
    pub fn up(name: &'static str, containers: &str, options: &[&str]) -> Result<Pod> {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  \
             restartPolicy: Never\n  terminationGracePeriodSeconds: 20\n  containers:\n{containers}"
        );
        Pod::of(name, &manifest, options)
    }

    /// Starts the pod of this name of a manifest, and all others of it.
    ///
    /// # Errors
    /// It does not run.
    pub fn of(name: &'static str, manifest: &str, options: &[&str]) -> Result<Pod> {
        let pod = Pod { husk: Husk::shared()?, name };
        let mut args = vec!["run", "-d"];
        args.extend(options);
        args.push("-");
        let mut child = pod
            .husk
            .command(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no input")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        ensure!(text(&output.stdout) == format!("{name}\n"), "{}", text(&output.stdout));
        Ok(pod)
    }

    /// Runs a command on it that must succeed; its standard output.
    ///
    /// # Errors
    /// It does not.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.husk.output(args)?;
        ensure!(output.status.success(), "{args:?}: {} {}", output.status, text(&output.stderr));
        Ok(text(&output.stdout))
    }

    /// Runs a command in its first container.
    ///
    /// # Errors
    /// husk cannot be started.
    pub fn exec(&self, args: &[&str]) -> Result<Output> {
        self.husk.output(&[&["exec", self.name], args].concat())
    }

    /// What `husk inspect` says of it.
    ///
    /// # Errors
    /// It says nothing.
    pub fn inspect(&self) -> Result<Value> {
        let all: Value = serde_json::from_str(&self.ok(&["inspect", self.name])?)?;
        Ok(all[0].clone())
    }

    /// The process that holds it.
    ///
    /// # Errors
    /// There is none.
    pub fn holder(&self) -> Result<Pid> {
        let pid = self.inspect()?["pod"]["pid"].as_i64().context("no process")?;
        Pid::from_raw(pid.try_into()?).context("PID 0")
    }

    /// The VMM that the holder started.
    ///
    /// # Errors
    /// There is none.
    pub fn vmm(&self) -> Result<Pid> {
        self.child("husk-vmm")?.context("the holder has no VMM")
    }

    /// The process of this program that the holder started, if there is one.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn child(&self, program: &str) -> Result<Option<Pid>> {
        let holder = self.holder()?.as_raw_nonzero();
        for thread in std::fs::read_dir(format!("/proc/{holder}/task"))? {
            let children = std::fs::read_to_string(thread?.path().join("children"))?;
            for child in children.split_whitespace() {
                // One that is gone meanwhile is none.
                let name = std::fs::read_to_string(format!("/proc/{child}/comm"));
                if name.is_ok_and(|name| name.trim() == program) {
                    return Ok(Pid::from_raw(child.parse()?));
                }
            }
        }
        Ok(None)
    }

    /// Waits for something that takes a moment.
    ///
    /// # Errors
    /// It does not come.
    pub fn until(&self, what: &str, mut done: impl FnMut(&Pod) -> Result<bool>) -> Result<()> {
        for _ in 0..600 {
            if done(self)? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("never: {what}")
    }

    /// Removes it; nothing of it is left then.
    ///
    /// # Errors
    /// Something is.
    pub fn gone(self) -> Result<()> {
        let pod = self.inspect()?;
        let uid = pod["pod"]["uid"].as_str().context("no uid")?.to_owned();
        self.ok(&["rm", self.name])?;
        for dir in [self.husk.state().join("pods"), "/run/husk/pods".into()] {
            for entry in std::fs::read_dir(&dir)? {
                let name = entry?.file_name();
                ensure!(!name.to_string_lossy().contains(&uid), "{name:?} is left in {dir:?}");
            }
        }
        ensure!(!std::fs::read_to_string("/proc/net/unix")?.contains(&uid), "a socket is left");
        ensure!(!std::fs::read_to_string("/proc/mounts")?.contains(&uid), "a mount is left");
        for process in std::fs::read_dir("/proc")? {
            let command = std::fs::read_to_string(process?.path().join("cmdline"));
            let of_pod = format!("default/{}", self.name);
            ensure!(!command.is_ok_and(|c| c.contains(&of_pod)), "a process is left");
        }
        Ok(())
    }
}

/// Output as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

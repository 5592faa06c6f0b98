//! Inside a pod that runs: one more container, one more process, output, and what the agent weighs
//! with many containers. Against crun, which does the same on the host.
//!
//! husk's half is driven as a pod's process drives it: by the engine's handle of the guest.

use std::cell::RefCell;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_engine::guest::{Guest, ProcessEnd, Streams, Wanted};
use husk_engine::manifest;
use husk_engine::paths::Config;
use husk_engine::storage::{self, Layer, Layout};
use husk_engine::vm::{FileServer, Vm, VmSpec};
use husk_image::Store;
use husk_proto::agent as proto;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;

use crate::pairs::{self, Contender, median};
use crate::{Setup, run_true};

/// Nothing takes longer than this, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(600);
const MEMORY_MIB: u32 = 512;
const IMAGE: &str = "localhost/husk/busybox:bench";
const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: bench}
spec:
  containers:
  - {name: main, image: localhost/husk/busybox:bench}
";
/// How much a container writes to be measured, in MiB.
const OUTPUT_MIB: usize = 32;
const MANY: u32 = 20;

/// What a container runs until it is killed.
const SLEEP: [&str; 2] = ["sleep", "1000000"];

/// All comparisons of this module.
pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("in a pod: a second container, a process, output, twenty containers");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = tempfile::tempdir()?;
    let bundle = dir.path().join("bundle");
    run_true::make_bundle(&setup.busybox, &bundle)?;
    let config = read_json(&bundle.join("config.json"))?;
    let pod = runtime.block_on(RunningPod::start(setup, dir.path(), config))?;
    let peer = Peer { bundle: &bundle };
    let mut results = containers(setup, &runtime, &pod, &peer)?;
    results.extend(processes(setup, &runtime, &pod, &peer)?);
    results.extend(output(setup, &runtime, &pod, &peer)?);
    results.extend(runtime.block_on(weight(&pod))?);
    runtime.block_on(pod.end())?;
    Ok(results)
}

/// A container that does `true`, from its making to its exit, and to its removal, against `crun run`,
/// which removes it too.
fn containers(
    setup: &Setup,
    runtime: &Runtime,
    pod: &RunningPod,
    peer: &Peer<'_>,
) -> Result<Vec<String>> {
    let removed = RefCell::new(Vec::new());
    let mut round = 0;
    let husk = || {
        round += 1;
        let id = format!("true-{round}");
        let started = Instant::now();
        runtime.block_on(async {
            let mut steps = Steps::start();
            let streams = pod.create_container(&id, &["true"]).await?;
            steps.done("create");
            let end = pod.begin(&id).await?;
            steps.done("start");
            finish(&id, end, streams).await?;
            steps.done("exit");
            let took = started.elapsed();
            pod.guest.delete_container(&id).await?;
            steps.done("delete");
            println!("   {}", steps.text);
            removed.borrow_mut().push(started.elapsed());
            anyhow::Ok(took)
        })
    };
    let mut theirs = 0;
    let crun = || {
        theirs += 1;
        peer.set_args(&["true"])?;
        let mut command = peer.crun(&["run"], &format!("bench-true-{theirs}"));
        time(command.stdout(Stdio::null()))
    };
    let mut contenders = [
        Contender { name: "husk container", once: Box::new(husk) },
        Contender { name: "crun run", once: Box::new(crun) },
    ];
    let samples = pairs::interleave(setup.rounds, || Ok(()), &mut contenders)?;
    let ratio = pairs::ratio(&samples[0], &samples[1]).context("no samples")?;
    drop(contenders);
    // The first is of the warm-up.
    let removed = removed.borrow();
    let removed = removed.get(1..).and_then(|removed| pairs::ratio(removed, &samples[1]));
    let removed = removed.context("no samples")?;
    Ok(vec![
        format!("ratio container_true {ratio:.2} vs crun"),
        format!("ratio container_true_and_delete {removed:.2} vs crun"),
    ])
}

/// One more process that does `true`, against `crun exec`.
fn processes(
    setup: &Setup,
    runtime: &Runtime,
    pod: &RunningPod,
    peer: &Peer<'_>,
) -> Result<Vec<String>> {
    const HOST: &str = "bench-host-of-exec";
    let kept = runtime.block_on(pod.start_container("sleeper", &SLEEP))?;
    peer.set_args(&SLEEP)?;
    let mut crun = peer.crun(&["run", "--detach"], HOST);
    time(crun.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;

    let mut process = pod.config["process"].clone();
    process["args"] = json!(["true"]);
    let process = serde_json::to_vec(&process)?;
    let mut round = 0;
    let husk = || {
        round += 1;
        let id = format!("exec-{round}");
        let started = Instant::now();
        runtime.block_on(async {
            let (stdio, streams) = pod.guest.expect_streams(Wanted { stdin: false, tty: false });
            let started = pod.guest.exec_process("sleeper", &id, process.clone(), stdio).await?;
            let end = started.map_err(|failure| anyhow::anyhow!("exec: {}", failure.message))?;
            finish(&id, end, streams).await
        })?;
        Ok(started.elapsed())
    };
    let crun = || {
        let mut command = Command::new("crun");
        time(command.args(["exec", HOST, "true"]).stdin(Stdio::null()).stdout(Stdio::null()))
    };
    let mut contenders = [
        Contender { name: "husk exec", once: Box::new(husk) },
        Contender { name: "crun exec", once: Box::new(crun) },
    ];
    let samples = pairs::interleave(setup.rounds, || Ok(()), &mut contenders)?;
    let ratio = pairs::ratio(&samples[0], &samples[1]).context("no samples")?;

    let mut delete = Command::new("crun");
    time(delete.args(["delete", "--force", HOST]))?;
    runtime.block_on(pod.kill("sleeper", kept))?;
    Ok(vec![format!("ratio exec_true {ratio:.2} vs crun")])
}

/// From the first byte of a container's output to the last.
fn output(
    setup: &Setup,
    runtime: &Runtime,
    pod: &RunningPod,
    peer: &Peer<'_>,
) -> Result<Vec<String>> {
    let count = (OUTPUT_MIB << 20).to_string();
    let args = ["head", "-c", &count, "/dev/zero"];
    let mut round = 0;
    let husk = || {
        round += 1;
        let id = format!("output-{round}");
        runtime.block_on(async {
            let (streams, mut end) = pod.start_container(&id, &args).await?;
            let Streams { stdin: _, mut stdout, stderr } = streams;
            let mut clock = Clock::default();
            let mut buffer = vec![0; 64 << 10];
            while clock.read(stdout.read(&mut buffer).await?) {}
            let took = clock.took()?;
            let exit = end.wait().await?;
            ensure!(exit.exit_code == 0, "{exit:?}");
            drop(stderr);
            pod.guest.delete_container(&id).await?;
            Ok(took)
        })
    };
    let mut theirs = 0;
    let crun = || {
        theirs += 1;
        peer.set_args(&args)?;
        let mut command = peer.crun(&["run"], &format!("bench-output-{theirs}"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut stdout = child.stdout.take().context("no pipe")?;
        let mut clock = Clock::default();
        let mut buffer = vec![0; 64 << 10];
        while clock.read(stdout.read(&mut buffer)?) {}
        let took = clock.took()?;
        ensure!(child.wait()?.success(), "crun run failed");
        Ok(took)
    };
    let mut contenders = [
        Contender { name: "husk output", once: Box::new(husk) },
        Contender { name: "crun output", once: Box::new(crun) },
    ];
    let samples = pairs::interleave(setup.rounds.min(5), || Ok(()), &mut contenders)?;
    // Of throughputs, so the other way round.
    let ratio = pairs::ratio(&samples[1], &samples[0]).context("no samples")?;
    Ok(vec![format!("ratio stdout_throughput {ratio:.2} vs crun")])
}

/// What each container costs the agent.
async fn weight(pod: &RunningPod) -> Result<Vec<String>> {
    let before = pod.guest.stats().await?.agent_rss;
    let mut running = Vec::new();
    let mut steps = Vec::new();
    let mut last = before;
    for number in 0..MANY {
        let id = format!("many-{number}");
        running.push((id.clone(), pod.start_container(&id, &SLEEP).await?));
        let now = pod.guest.stats().await?.agent_rss;
        steps.push(now.saturating_sub(last));
        last = now;
    }
    for (id, streams) in running {
        pod.kill(&id, streams).await?;
    }
    let grown = last.saturating_sub(before) / u64::from(MANY);
    println!(
        "  agent: {} KiB without, {} KiB with {MANY} containers; median step {} KiB",
        before / 1024,
        last / 1024,
        median(&steps).unwrap_or(0) / 1024
    );
    Ok(vec![
        format!("figure agent_rss_{MANY}_containers {} KiB", last / 1024),
        format!("figure agent_rss_per_container {} KiB", grown / 1024),
    ])
}

/// How long the steps of something took, for people.
struct Steps {
    last: Instant,
    text: String,
}

impl Steps {
    fn start() -> Steps {
        Steps { last: Instant::now(), text: String::new() }
    }

    fn done(&mut self, step: &str) {
        let took = std::mem::replace(&mut self.last, Instant::now()).elapsed();
        self.text.push_str(&format!(" {step} {:.1} ms", pairs::millis(took)));
    }
}

/// From the first byte to the last.
#[derive(Default)]
struct Clock {
    first: Option<Instant>,
    last: Option<Instant>,
    bytes: usize,
}

impl Clock {
    /// So many bytes were read; whether there may be more.
    fn read(&mut self, bytes: usize) -> bool {
        let now = Instant::now();
        if bytes > 0 {
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.bytes += bytes;
        }
        bytes > 0
    }

    fn took(&self) -> Result<Duration> {
        ensure!(self.bytes == OUTPUT_MIB << 20, "{} bytes came", self.bytes);
        let (Some(first), Some(last)) = (self.first, self.last) else { bail!("no output") };
        Ok(last - first)
    }
}

/// The peer's bundle.
struct Peer<'a> {
    bundle: &'a Path,
}

impl Peer<'_> {
    fn set_args(&self, args: &[&str]) -> Result<()> {
        let path = self.bundle.join("config.json");
        let mut config = read_json(&path)?;
        config["process"]["args"] = json!(args);
        fs::write(path, config.to_string())?;
        Ok(())
    }

    fn crun(&self, verb: &[&str], id: &str) -> Command {
        let mut command = Command::new("crun");
        command.args(verb).arg("--bundle").arg(self.bundle).arg(id);
        command
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Waits for a process that says nothing and succeeds.
async fn finish(id: &str, mut end: ProcessEnd, streams: Streams) -> Result<()> {
    let exit = end.wait().await?;
    drop(streams);
    ensure!(exit.exit_code == 0, "{id}: {exit:?}");
    Ok(())
}

/// Runs a command to its end without holding its output; it must succeed.
fn time(command: &mut Command) -> Result<Duration> {
    let started = Instant::now();
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    let took = started.elapsed();
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(took)
}

/// A pod whose guest is ready, with no container yet.
struct RunningPod {
    guest: Guest,
    root: proto::Rootfs,
    /// The peer's config.json.
    config: Value,
}

impl RunningPod {
    async fn start(setup: &Setup, dir: &Path, config: Value) -> Result<RunningPod> {
        let state = dir.join("state");
        let mut import = Command::new(&setup.husk);
        import.arg("--state-dir").arg(&state).args(["image", "import"]);
        time(import.arg(&setup.busybox).arg(IMAGE).stdout(Stdio::null()).stderr(Stdio::null()))?;
        let paths = Config {
            run_dir: dir.join("run"),
            kernel: setup.kernel.clone(),
            initramfs: setup.initramfs.clone(),
            kvm: husk_engine::vm::kvm::DEVICE.into(),
            vmm: husk_cases::place::program("husk-vmm"),
            file_server: husk_cases::place::program("husk-fs"),
            scratch_bytes: storage::DEFAULT_SCRATCH_BYTES,
            state_dir: state,
        };
        let layout = plan(&paths)?;
        let root = layout.root("main").context("the container has no root")?.clone();
        let vm = Vm::spawn(&paths.vmm).await?;
        let agent = Guest::expect(&vm);
        vm.boot(VmSpec {
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            kvm: husk_engine::vm::kvm::open(&paths.kvm)?,
            kernel: fs::File::open(&paths.kernel)?.into(),
            initramfs: fs::File::open(&paths.initramfs)?.into(),
            console: tempfile::tempfile()?.into(),
            disks: layout.open(&paths)?,
            nics: Vec::new(),
            shares: Vec::new(),
            file_server: FileServer {
                program: paths.file_server.clone(),
                dir: paths.run_dir.clone(),
            },
        })
        .await?;
        let guest = Guest::connect(vm, agent, PATIENCE).await?;
        let request = proto::SetupPodRequest {
            hostname: "bench".into(),
            filesystems: layout.filesystems.clone(),
            volumes: layout.volumes.clone(),
            ..proto::SetupPodRequest::default()
        };
        guest.setup_pod(request).await?;
        Ok(RunningPod { guest, root, config })
    }

    async fn start_container(&self, id: &str, args: &[&str]) -> Result<(Streams, ProcessEnd)> {
        let streams = self.create_container(id, args).await?;
        Ok((streams, self.begin(id).await?))
    }

    async fn begin(&self, id: &str) -> Result<ProcessEnd> {
        let started = self.guest.start_container(id).await?;
        started.map_err(|failure| anyhow::anyhow!("{id}: {}", failure.message))
    }

    /// Makes a container of the peer's own configuration.
    async fn create_container(&self, id: &str, args: &[&str]) -> Result<Streams> {
        let mut config = self.config.clone();
        config["root"]["path"] = json!(format!("{}/{id}/rootfs", husk_proto::guest::CONTAINERS));
        config["process"]["args"] = json!(args);
        let (stdio, streams) = self.guest.expect_streams(Wanted { stdin: false, tty: false });
        let spec = serde_json::to_vec(&config)?;
        let (root, disks) = (self.root.clone(), Vec::new());
        let created = self.guest.create_container(id, spec, root, disks, stdio).await?;
        created.map_err(|failure| anyhow::anyhow!("{id}: {}", failure.message))?;
        Ok(streams)
    }

    async fn kill(&self, id: &str, (streams, mut end): (Streams, ProcessEnd)) -> Result<()> {
        self.guest.signal(id, rustix::process::Signal::KILL.as_raw().cast_unsigned(), true).await?;
        end.wait().await?;
        drop(streams);
        Ok(self.guest.delete_container(id).await?)
    }

    async fn end(self) -> Result<()> {
        self.guest.shutdown().await?;
        self.guest.vm().exited().await;
        self.guest.vm().gone().await;
        Ok(())
    }
}

/// The disks of a pod with one container of busybox.
fn plan(paths: &Config) -> Result<Layout> {
    let spec = manifest::parse(POD, "the benchmark's manifest")?;
    let image = Store::open(paths.images_dir())?.resolve(IMAGE)?;
    let layers = image.layers.into_iter();
    let layers = layers
        .map(|layer| Layer { diff_id: layer.diff_id.to_string(), file: layer.file })
        .collect();
    let spec = spec.first().context("the manifest has no pod")?;
    let layers = [("main".to_owned(), layers)].into();
    Ok(storage::layout(spec, "bench", &layers, paths.scratch_bytes)?)
}

//! Guests that do something to a disk or a network, in husk's VMM and in QEMU: the same kernel, and
//! an initramfs with a script and `husk-load`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_cases::files::FileServer;
use husk_cases::vmm::{Running, Vm};
use husk_cases::{initramfs, place};
use husk_vmm_api::{Counters, FsConfig, NicConfig, RateLimit};

use crate::pairs::median;
use crate::{Setup, qemu};

const MEMORY_MIB: u32 = 256;

/// How long a guest may take, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a script says at its end, and when it fails.
const END: &str = "husk-bench-end";
const FAILED: &str = "husk-bench-failed";

/// The guest's address on its NIC.
const MAC: [u8; 6] = [2, 0x68, 0x75, 0x73, 0x6b, 0];

/// The name and memory of a result: how long each load took.
pub(crate) type Times = BTreeMap<String, Duration>;

/// What a guest is given beside its script.
#[derive(Debug, Default)]
pub(crate) struct Devices<'a> {
    /// An image, which is its `/dev/vda`.
    pub(crate) disk: Option<&'a Path>,
    /// A tap, which is its `eth0`.
    pub(crate) tap: Option<OwnedFd>,
    /// A directory, which is its virtio-fs [`TAG`]: what is shared is the directory `0` in it.
    pub(crate) shared: Option<&'a Path>,
}

/// The tag of what is shared.
pub(crate) const TAG: &str = "shared";

/// The program that makes the loads.
pub(crate) fn load_program() -> PathBuf {
    place::tree().join("tests/husk-load")
}

/// Runs a script in husk's VMM. Returns what its loads took, and what the VM counted.
pub(crate) fn in_husk(script: &str, devices: Devices<'_>) -> Result<(Times, Counters)> {
    let kernel = File::open(place::kernel()).context("the guest kernel")?;
    let mut vm = Vm::new(kernel, MEMORY_MIB)?;
    vm.config.initramfs = Some(vm.add(initramfs(script)?));
    let console = tempfile::NamedTempFile::new()?;
    vm.config.console = Some(vm.add(console.reopen()?));
    if let Some(disk) = devices.disk {
        let image = File::options().read(true).write(true).open(disk)?;
        vm = vm.with_disk("bench", image, false);
    }
    if let Some(tap) = devices.tap {
        let taps = vec![vm.add(tap)];
        let (rx_limit, tx_limit) = (RateLimit::default(), RateLimit::default());
        vm.config.nics.push(NicConfig { mac: MAC, mtu: 1500, taps, rx_limit, tx_limit });
    }
    let server = match devices.shared {
        Some(shared) => {
            let (server, socket) = FileServer::start(&[(&shared.join("0"), false)])?;
            let socket = vm.add(socket);
            vm.config.fs = Some(FsConfig { tag: TAG.to_owned(), socket });
            Some(server)
        }
        None => None,
    };
    let mut vm: Running = vm.start()?;
    let times = times(console.path())?;
    let counters = vm.counters()?;
    vm.kill()?;
    drop(server);
    Ok((times, counters))
}

/// The same in QEMU.
pub(crate) fn in_qemu(setup: &Setup, script: &str, devices: Devices<'_>) -> Result<Times> {
    let initramfs = initramfs(script)?;
    let console = tempfile::NamedTempFile::new()?;
    let inherited = |fd: i32| format!("/proc/self/fd/{fd}");
    rustix::io::fcntl_setfd(&initramfs, rustix::io::FdFlags::empty())?;
    let image = inherited(initramfs.as_raw_fd());
    let mut command = qemu::machine(setup, Path::new(&image), MEMORY_MIB);
    command.args(["-chardev", &format!("file,id=con,path={}", console.path().display())]);
    if let Some(disk) = devices.disk {
        // As it is by default: through the host's page cache, by a pool of threads.
        let drive = format!("id=disk,if=none,format=raw,file={}", disk.display());
        command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
    }
    if let Some(tap) = &devices.tap {
        rustix::io::fcntl_setfd(tap, rustix::io::FdFlags::empty())?;
        let [a, b, c, d, e, f] = MAC;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        command.args(["-netdev", &format!("tap,id=net,fd={}", tap.as_raw_fd())]);
        command.args(["-device", &format!("virtio-net-device,netdev=net,mac={mac}")]);
    }
    let _server =
        devices.shared.map(|shared| Virtiofsd::start(shared, &mut command)).transpose()?;
    let mut qemu = Killed(command.spawn().context(qemu::START)?);
    let times = times(console.path());
    if let Some(status) = qemu.0.try_wait()? {
        bail!("QEMU ended: {status}");
    }
    times
}

/// The file server of QEMU's guests.
struct Virtiofsd {
    _process: Killed,
    _socket: tempfile::TempDir,
}

impl Virtiofsd {
    /// Starts it, as it is by default, and tells QEMU of it.
    fn start(shared: &Path, qemu: &mut Command) -> Result<Virtiofsd> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("fs");
        let process = Command::new("/usr/libexec/virtiofsd")
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--shared-dir={}", shared.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start virtiofsd; install virtiofsd")?;
        let process = Killed(process);
        let begun = Instant::now();
        while !socket.exists() {
            ensure!(begun.elapsed() < PATIENCE, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        qemu.args(["-object", &format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on")])
            .args(["-machine", "memory-backend=mem"])
            .args(["-chardev", &format!("socket,id=fs,path={}", socket.display())])
            .args(["-device", &format!("vhost-user-fs-device,chardev=fs,tag={TAG}")]);
        Ok(Virtiofsd { _process: process, _socket: directory })
    }
}

/// A process that does not outlive who started it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        if self.0.kill().is_err() || self.0.wait().is_err() {
            eprintln!("process {} is left", self.0.id());
        }
    }
}

fn initramfs(script: &str) -> Result<File> {
    let script =
        format!("trap 'echo {FAILED}' EXIT\n{script}\ntrap - EXIT\necho {END}\nsleep 1000000\n");
    initramfs::with_programs(&script, &[&load_program()])
}

/// Waits for a script's end, and reads the results out of what it wrote.
fn times(console: &Path) -> Result<Times> {
    let begun = Instant::now();
    loop {
        let mut bytes = Vec::new();
        File::open(console)?.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        if text.contains(END) {
            return parse(&text);
        }
        ensure!(!text.contains(FAILED), "the guest's script failed:\n{text}");
        ensure!(begun.elapsed() < PATIENCE, "the guest does not come to an end:\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The results that `husk-load` printed.
pub(crate) fn parse(text: &str) -> Result<Times> {
    let mut times = Times::new();
    for line in text.lines() {
        if let Some((name, nanos)) =
            line.trim().strip_prefix("husk-load ").and_then(|result| result.split_once(' '))
        {
            times.insert(name.to_owned(), Duration::from_nanos(nanos.parse()?));
        }
    }
    ensure!(!times.is_empty(), "no result in {text:?}");
    Ok(times)
}

/// How much more than each peer husk does in the same time: the medians of the rounds' ratios.
pub(crate) fn throughput(
    prefix: &str,
    husk: &[Times],
    peers: &[(&str, &str, &[Times])],
) -> Result<Vec<String>> {
    let names = husk.first().context("no rounds")?.keys();
    let mut lines = Vec::new();
    for name in names {
        for (suffix, peer, samples) in peers {
            let ratios: Vec<f64> = husk
                .iter()
                .zip(*samples)
                .filter_map(|(husk, peer)| Some((husk.get(name)?, peer.get(name)?)))
                .filter(|(husk, _)| !husk.is_zero())
                .map(|(husk, peer)| peer.as_secs_f64() / husk.as_secs_f64())
                .collect();
            let ratio = median(&ratios).with_context(|| format!("{peer} has no {name}"))?;
            lines.push(format!("ratio {prefix}_{name}{suffix} {ratio:.2} vs {peer}"));
        }
    }
    Ok(lines)
}

/// A line for people.
pub(crate) fn print(round: usize, who: &str, times: &Times) {
    let shown = |(name, time): (&String, &Duration)| format!("  {name} {:.0} ms", millis(*time));
    let shown: String = times.iter().map(shown).collect();
    println!("  round {round}: {who}:{shown}");
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_between_other_lines() {
        let times =
            parse("[0.1] kernel\r\nhusk-load read-1 1500000\r\nx\nhusk-load b 7\n").unwrap();
        assert_eq!(times["read-1"], Duration::from_micros(1500));
        assert_eq!(times["b"], Duration::from_nanos(7));
        assert!(parse("nothing").is_err() && parse("husk-load a b").is_err());
    }

    #[test]
    fn who_needs_half_the_time_does_twice_as_much() {
        let times = |ms| Times::from([("read".to_owned(), Duration::from_millis(ms))]);
        let (husk, qemu) = ([times(10), times(10), times(10)], [times(20), times(19), times(30)]);
        let lines = throughput("disk", &husk, &[("", "qemu", &qemu)]).unwrap();
        assert_eq!(lines, ["ratio disk_read 2.00 vs qemu"]);
    }
}

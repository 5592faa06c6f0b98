//! Bytes from a guest to its host over TCP, in husk's VMM and in QEMU with its virtio-net on a tap, and
//! over a veth pair, as of a container without a VM.

use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use husk_cases::tap;

use crate::Setup;
use crate::guest::{self, Devices, Times, in_husk, in_qemu, load_program};
use crate::pairs::median;

const MIB: u64 = 1 << 20;

/// Name, number of connections and MiB of each load.
const LOADS: [(&str, u32, u64); 2] = [("send_1", 1, 64), ("send_8", 8, 64)];

const PORT: u16 = 5201;
const QEMU: &str = "qemu-microvm";

/// Addresses of the host and of who sends, by tap and by veth.
const TAP: (&str, &str) = ("10.98.0.1", "10.98.0.2");
const VETH: (&str, &str) = ("10.98.1.1", "10.98.1.2");

/// Compares them, in a network of their own.
pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("net: TCP to the host, over 1 and 8 connections");
    std::thread::scope(|scope| {
        let compared = scope.spawn(|| compare_here(setup)).join();
        compared.map_err(|_| anyhow!("the comparison panicked"))?
    })
}

fn compare_here(setup: &Setup) -> Result<Vec<String>> {
    tap::own_network()?;
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    std::thread::spawn(move || receive(&listener));
    let namespace = Namespace::new()?;
    let script = format!(
        "ip addr add {}/24 dev eth0\nip link set eth0 up\n{}",
        TAP.1,
        LOADS.map(|load| format!("husk-load {}\n", arguments(load, TAP.0).join(" "))).concat()
    );
    let (mut husk, mut qemu, mut veth, mut per_mib) = (vec![], vec![], vec![], vec![]);
    for round in 0..=setup.rounds {
        let (times, counters) = in_husk(&script, devices()?)?;
        guest::print(round, "husk-vmm", &times);
        let in_qemu = in_qemu(setup, &script, devices()?)?;
        guest::print(round, QEMU, &in_qemu);
        let over_veth = namespace.send()?;
        guest::print(round, "veth", &over_veth);
        // The first round is a warm-up.
        if round > 0 {
            husk.push(times);
            qemu.push(in_qemu);
            veth.push(over_veth);
            let nic = counters.devices.get("net:0").context("the NIC is not counted")?;
            let sent = nic.bytes_from_guest as f64 / MIB as f64;
            per_mib.push((nic.kicks as f64 / sent, nic.interrupts as f64 / sent));
        }
    }
    let peers: [(&str, &str, &[Times]); 2] = [("", QEMU, &qemu), ("_of_veth", "veth", &veth)];
    let mut lines = guest::throughput("net", &husk, &peers)?;
    let middle = |of: fn(&(f64, f64)) -> f64| {
        median(&per_mib.iter().map(of).collect::<Vec<f64>>()).context("no rounds")
    };
    lines.push(format!("figure net_kicks_per_mib {:.2} per MiB", middle(|one| one.0)?));
    lines.push(format!("figure net_interrupts_per_mib {:.2} per MiB", middle(|one| one.1)?));
    Ok(lines)
}

/// The arguments of `husk-load` for a load.
fn arguments((name, streams, mib): (&str, u32, u64), to: &str) -> Vec<String> {
    let (to, streams, bytes) =
        (format!("{to}:{PORT}"), streams.to_string(), (mib * MIB).to_string());
    vec![name.to_owned(), "send".to_owned(), to, streams, bytes]
}

/// A tap, new for each guest: what it was told to offload stays with it.
fn devices() -> Result<Devices<'static>> {
    let tap = tap::queues("tap0", 1)?.pop();
    tap::ip("link set tap0 up")?;
    tap::ip(&format!("addr add {}/24 dev tap0", TAP.0))?;
    Ok(Devices { tap, ..Devices::default() })
}

/// Takes what is sent, and closes when it has all.
fn receive(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        std::thread::spawn(move || {
            let mut buffer = vec![0; 256 * 1024];
            while stream.read(&mut buffer).is_ok_and(|len| len > 0) {}
        });
    }
}

/// A network namespace at the other end of a veth pair, as long as its process lives.
struct Namespace(Child);

impl Namespace {
    fn new() -> Result<Namespace> {
        let mut holder = Command::new("unshare");
        let mut holder = holder
            .args(["--net", "sh", "-c", "echo; exec sleep 1000000"])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run unshare")?;
        // It has said so once it is there.
        holder.stdout.take().context("no output")?.read_exact(&mut [0])?;
        let namespace = Namespace(holder);
        let pid = namespace.0.id();
        tap::ip(&format!("link add veth0 type veth peer name veth1 netns {pid}"))?;
        tap::ip(&format!("addr add {}/24 dev veth0", VETH.0))?;
        tap::ip("link set veth0 up")?;
        namespace.run("ip", &["addr", "add", &format!("{}/24", VETH.1), "dev", "veth1"])?;
        namespace.run("ip", &["link", "set", "veth1", "up"])?;
        Ok(namespace)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", self.0.id()))
            .arg(program)
            .args(args)
            .output()
            .context("cannot run nsenter")?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {text}", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn send(&self) -> Result<Times> {
        let program = load_program();
        let mut times = Times::new();
        for load in LOADS {
            let arguments = arguments(load, VETH.0);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            times.extend(guest::parse(&self.run(&program.to_string_lossy(), &arguments)?)?);
        }
        Ok(times)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It sleeps, and nobody else ends it.
        if self.0.kill().is_err() || self.0.wait().is_err() {
            eprintln!("a network namespace is left");
        }
    }
}

//! NICs of a bare `husk-vmm` on real taps, each test in a network namespace of its own. The guest half
//! is a shell script that is PID 1 of husk's kernel, and ends with a reboot if all went well.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cases::tap::{TAP, ip, own_network, queue, queues as tap};
use husk_cases::vmm::Vm;
use husk_cases::{initramfs, kernel, place};
use husk_vmm_api::{Counters, Exit, NicConfig, Phase, RateLimit, TokenBucketConfig};

const MIB: usize = 1 << 20;

fn nic(number: u8) -> NicConfig {
    NicConfig {
        mac: [2, 0x68, 0x75, 0x73, 0x6b, number],
        mtu: 1500,
        taps: Vec::new(),
        rx_limit: RateLimit::default(),
        tx_limit: RateLimit::default(),
    }
}

/// A guest with husk's kernel and a script, and its console.
struct Guest {
    vm: Vm,
    console: File,
}

impl Guest {
    fn new(script: &str) -> Result<Guest> {
        let kernel = File::open(place::kernel()).context("the guest kernel")?;
        let mut vm = Vm::new(kernel, 256)?;
        vm.config.initramfs = Some(vm.add(initramfs::of(script)?));
        let console = tempfile::tempfile()?;
        vm.config.console = Some(vm.add(console.try_clone()?));
        Ok(Guest { vm, console })
    }

    /// Adds the NIC `number` on the tap `tapNUMBER`, with `10.99.NUMBER.1` and `fd00:99:NUMBER::1` on
    /// the host's side.
    fn with_nic(mut self, number: u8, queues: usize, nic: NicConfig) -> Result<Guest> {
        let name = format!("tap{number}");
        let taps = tap(&name, queues)?;
        ip(&format!("link set {name} mtu {} up", nic.mtu))?;
        ip(&format!("addr add 10.99.{number}.1/24 dev {name}"))?;
        ip(&format!("addr add fd00:99:{number}::1/64 dev {name} nodad"))?;
        let taps = taps.into_iter().map(|tap| self.vm.add(tap)).collect();
        self.vm.config.nics.push(NicConfig { taps, ..nic });
        Ok(self)
    }

    /// Runs it to its end, which must be a reboot; returns what it wrote.
    fn run(self) -> Result<String> {
        let Guest { vm, mut console } = self;
        let (exit, _) = vm.run()?;
        let mut text = String::new();
        std::io::Seek::rewind(&mut console)?;
        console.read_to_string(&mut text)?;
        ensure!(exit == Exit::Reboot, "{exit}\n{text}");
        // As a terminal gets it.
        Ok(text.replace("\r\n", "\n"))
    }
}

/// How a guest configures its NIC `number`, whose addresses are good at once.
fn up(number: u8) -> String {
    format!(
        "echo 0 > /proc/sys/net/ipv6/conf/eth{number}/accept_dad\n\
         ip addr add 10.99.{number}.2/24 dev eth{number}\n\
         ip addr add fd00:99:{number}::2/64 dev eth{number}\n\
         ip link set eth{number} up\n"
    )
}

/// A ping that is answered, however slow the machine. One packet: after the first answer busybox waits
/// for the next ones no longer than a second, and tells the end twice if that is over meanwhile.
fn ping(args: &str) -> String {
    format!("ping -c 1 -W 100 {args}\n")
}

/// Bytes that no offload can mistake for others.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A server that sends `bytes` on its first connection and expects them back on its second.
fn echo(port: u16, bytes: Vec<u8>) -> Result<JoinHandle<Result<()>>> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    Ok(std::thread::spawn(move || {
        let (mut to_guest, _) = listener.accept()?;
        to_guest.write_all(&bytes)?;
        close(to_guest)?;
        let (mut from_guest, _) = listener.accept()?;
        let mut got = Vec::new();
        from_guest.read_to_end(&mut got)?;
        ensure!(got.len() == bytes.len(), "{} bytes instead of {}", got.len(), bytes.len());
        ensure!(got == bytes, "other bytes");
        Ok(())
    }))
}

/// Ends the host's direction, and waits for the guest's end.
fn close(mut stream: TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The guest's side of [`echo`].
fn fetch_and_return(host: &str, port: u16) -> String {
    format!(
        "nc {host} {port} > /tmp/{port} < /dev/null\n\
         nc {host} {port} < /tmp/{port}\n"
    )
}

fn joined(server: JoinHandle<Result<()>>) -> Result<()> {
    server.join().map_err(|_| anyhow::anyhow!("a server panicked"))?
}

#[test]
fn a_guest_exchanges_megabytes_with_the_host() -> Result<()> {
    own_network()?;
    let script = [
        &up(0),
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /sys/class/net/eth0/operstate\n",
        &ping("10.99.0.1"),
        &ping("-s 20000 10.99.0.1"),
        &ping("fd00:99:0::1"),
        &fetch_and_return("10.99.0.1", 7000),
    ]
    .concat();
    let guest = Guest::new(&script)?.with_nic(0, 1, nic(7))?;
    let server = echo(7000, noise(16 * MIB, 1))?;
    let text = guest.run()?;
    joined(server)?;
    let told: Vec<&str> = text.lines().filter(|line| !line.contains("seq=")).collect();
    ensure!(told.join("\n").contains("02:68:75:73:6b:07\n1500\nup"), "{text}");
    ensure!(text.matches(" 0% packet loss").count() == 3, "{text}");
    Ok(())
}

#[test]
fn several_queues_carry_several_streams_with_jumbo_frames() -> Result<()> {
    own_network()?;
    let streams = 4_u16;
    let mut script = up(0);
    script += "ls -d /sys/class/net/eth0/queues/rx-* | wc -l\n\
               cat /sys/class/net/eth0/mtu\n\
               ping -c 1 -W 100 -s 8972 10.99.0.1\n\
               grep ^Ip: /proc/net/snmp | tail -n 1 | cut -d ' ' -f 20\n\
               pids=\n";
    for port in (7000..).take(streams.into()) {
        script += &format!("(\n{}) & pids=\"$pids $!\"\n", fetch_and_return("10.99.0.1", port));
    }
    // `wait` without arguments would forget how they ended.
    script += "for pid in $pids; do wait $pid; done\n";
    let mut guest = Guest::new(&script)?.with_nic(0, 4, NicConfig { mtu: 9000, ..nic(8) })?;
    guest.vm.config.vcpus = 4;
    let servers = (7000..)
        .take(streams.into())
        .map(|port| echo(port, noise(4 * MIB, port.into())))
        .collect::<Result<Vec<_>>>()?;
    let text = guest.run()?;
    servers.into_iter().try_for_each(joined)?;
    ensure!(text.starts_with("4\n9000\n") || text.contains("\n4\n9000\n"), "{text}");
    ensure!(text.contains(" 0% packet loss"), "{text}");
    // FragCreates: a ping of the whole MTU was not cut.
    ensure!(text.lines().any(|line| line == "0"), "{text}");
    Ok(())
}

#[test]
fn segmentation_is_left_to_the_host_and_everything_is_counted() -> Result<()> {
    own_network()?;
    let script = [
        &up(0),
        &fetch_and_return("10.99.0.1", 7000),
        // The counters are asked for while the guest waits here.
        "nc 10.99.0.1 7001 < /dev/null\n",
    ]
    .concat();
    let guest = Guest::new(&script)?.with_nic(0, 1, nic(1))?;
    let server = echo(7000, noise(16 * MIB, 3))?;
    let listener = TcpListener::bind(("0.0.0.0", 7001))?;
    let mut running = guest.vm.start()?;
    running.wait_for(Phase::FirstInstruction)?;
    joined(server)?;
    let (waiting, _) = listener.accept()?;
    let counters = running.counters()?;
    drop(waiting);
    let (exit, _) = running.wait()?;
    ensure!(exit == Exit::Reboot, "{exit}");
    check_counters(&counters)
}

fn check_counters(counters: &Counters) -> Result<()> {
    let counts = counters.devices.get("net:0").context("no counters of net:0")?;
    let moved = 16 * MIB as u64;
    ensure!(counts.bytes_to_guest > moved && counts.bytes_from_guest > moved, "{counts:?}");
    // Without offloads there would be as many, and their acknowledgements.
    let full_frames = 2 * moved / 1448;
    ensure!(
        counts.packets_to_guest + counts.packets_from_guest < full_frames / 2,
        "no segmentation offload: {counts:?}"
    );
    ensure!(counts.kicks > 0 && counts.interrupts > 0, "{counts:?}");
    ensure!((counts.drops_to_guest, counts.drops_from_guest) == (0, 0), "{counts:?}");
    Ok(())
}

#[test]
fn a_guest_has_several_nics_in_their_order() -> Result<()> {
    own_network()?;
    let mut script = String::new();
    for number in 0..3 {
        script += &up(number);
        script += &format!("cat /sys/class/net/eth{number}/address\n");
        script += &ping(&format!("10.99.{number}.1"));
        script += &ping(&format!("fd00:99:{number}::1"));
    }
    let mut guest = Guest::new(&script)?;
    for number in 0..3 {
        guest = guest.with_nic(number, 1, nic(0x10 + number))?;
    }
    let text = guest.run()?;
    for number in 0..3 {
        ensure!(text.contains(&format!("02:68:75:73:6b:1{number}")), "{text}");
    }
    ensure!(text.matches(" 0% packet loss").count() == 6, "{text}");
    Ok(())
}

#[test]
fn a_limited_nic_is_not_faster_than_its_limit() -> Result<()> {
    own_network()?;
    let bucket = TokenBucketConfig { burst: MIB as u64, refill_per_second: MIB as u64 };
    let limit = RateLimit { bytes: Some(bucket), operations: None };
    let script = [&up(0), &fetch_and_return("10.99.0.1", 7000)[..]].concat();
    let limited = NicConfig { rx_limit: limit.clone(), tx_limit: limit, ..nic(1) };
    let guest = Guest::new(&script)?.with_nic(0, 1, limited)?;
    let server = echo(7000, noise(3 * MIB, 4))?;
    let start = Instant::now();
    guest.run()?;
    joined(server)?;
    // Each way a burst of 1 MiB at once, and 2 MiB in two seconds; the clock of the buckets is this
    // one, so that this holds on any machine.
    ensure!(start.elapsed() >= Duration::from_secs(4), "{:?}", start.elapsed());
    Ok(())
}

#[test]
fn a_guest_whose_tap_is_deleted_lives_on() -> Result<()> {
    own_network()?;
    let script = [
        &up(0),
        &ping("10.99.0.1"),
        "nc 10.99.0.1 7000 > /dev/null < /dev/null &\n",
        // Fails when none of them is answered.
        "while ping -c 5 -W 2 10.99.0.1; do :; done\n",
        "echo alive\n",
    ]
    .concat();
    let guest = Guest::new(&script)?.with_nic(0, 2, nic(1))?;
    let listener = TcpListener::bind(("0.0.0.0", 7000))?;
    let deleter = std::thread::spawn(move || {
        // The guest is up. It hears nothing of the end of this connection.
        let _connection = listener.accept()?;
        ip("link del tap0")
    });
    let text = guest.run()?;
    joined(deleter)?;
    ensure!(text.contains("alive"), "{text}");
    Ok(())
}

#[test]
fn descriptors_that_are_no_fitting_taps_are_refused_by_name() -> Result<()> {
    own_network()?;
    let plain = libc::IFF_TAP | libc::IFF_NO_PI;
    let tun = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let several = TAP | libc::IFF_MULTI_QUEUE;
    let cases: [(Vec<OwnedFd>, &str); 5] = [
        (vec![tempfile::tempfile()?.into()], "NIC 0: tap descriptor 0 is not a tap's"),
        (vec![queue("plain0", plain)?], "NIC 0: tap descriptor 0 has flags"),
        (vec![queue("tun0", tun)?], "NIC 0: tap descriptor 0 has flags"),
        (vec![queue("one0", TAP)?, queue("two0", TAP)?], "descriptor 0 has flags"),
        (
            vec![queue("many0", several)?, queue("many1", several)?],
            "tap descriptor 1 is of \"many1\", the first one of \"many0\"",
        ),
    ];
    for (taps, expected) in cases {
        let mut vm = Vm::new(kernel::of(&kernel::HALT)?, 48)?;
        let taps = taps.into_iter().map(|tap| vm.add(tap)).collect();
        vm.config.nics.push(NicConfig { taps, ..nic(1) });
        let (exit, _) = vm.run()?;
        let Exit::Error { message, .. } = exit else { panic!("{exit:?}") };
        ensure!(message.contains(expected), "{message}");
    }
    Ok(())
}

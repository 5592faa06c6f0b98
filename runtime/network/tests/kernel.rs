//! Against this machine's kernel: namespaces, interfaces, taps. Run as root:
//! `cargo test -p husk-network --features kernel-tests --test kernel`.
//!
//! What they make has names with the process's ID in them, and is taken away again. `ip` (iproute2)
//! plays the part of CNI's plugins.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use husk_netlink::{Socket, address, link, neighbour, route};
use husk_network::cni::{Cni, Limits, Stop};
use husk_network::follow::Follower;
use husk_network::join::{self, JoinError, Snapshot};
use husk_network::localhost::Localhost;
use husk_network::netns::{self, Netns};
use husk_network::pod::{Checked, Host, NetworkError, Request, Source};

/// Length of the header before each frame, as a tap begins.
const HEADER: usize = 10;

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A namespace with an interface `eth0`, whose other end is here.
struct Pod {
    netns: Netns,
    outer: String,
}

impl Pod {
    fn new(name: &str) -> Self {
        let id = std::process::id();
        let unique = format!("husk-test-{id}-{name}");
        let netns = Netns::create(Path::new(netns::DIRECTORY), &unique).unwrap();
        let outer = format!("hk{id}{name}");
        ip(&format!("link add {outer} mtu 1400 type veth peer name eth0 netns {unique}"));
        ip(&format!("link set {outer} up"));
        let pod = Pod { netns, outer };
        pod.inside("link set eth0 mtu 1400 up");
        pod
    }

    fn inside(&self, arguments: &str) {
        let name = self.netns.path().file_name().unwrap().to_str().unwrap();
        ip(&format!("-n {name} {arguments}"));
    }

    fn look<T: Send>(&self, read: impl FnOnce(&mut Socket) -> T + Send) -> T {
        self.netns.enter(|| read(&mut Socket::open().unwrap())).unwrap()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let gone = Command::new("ip").args(["link", "del", &self.outer]).status();
        assert!(gone.is_ok());
        netns::delete(self.netns.path()).unwrap();
    }
}

#[test]
fn a_namespace_is_made_entered_and_removed_any_number_of_times() {
    let name = format!("husk-test-{}-plain", std::process::id());
    let directory = Path::new(netns::DIRECTORY);
    let path = directory.join(&name);
    for _ in 0..2 {
        // The second one is made in the first one's place.
        let netns = Netns::create(directory, &name).unwrap();
        let links = netns.enter(|| link::list(&mut Socket::open().unwrap())).unwrap().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!(lo.flags & (link::UP | link::LOOPBACK), link::UP | link::LOOPBACK);
        assert_eq!(Netns::open(&path).unwrap().enter(|| 7).unwrap(), 7);
    }
    netns::delete(&path).unwrap();
    netns::delete(&path).unwrap();
    assert!(!path.exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&name), "{mounts}");
}

#[test]
fn what_is_no_network_namespace_is_told() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path(), Path::new("/proc/self/ns/mnt")] {
        let error = Netns::open(path).unwrap_err().to_string();
        assert_eq!(error, format!("{} is no network namespace", path.display()));
    }
}

/// Frames that come out of a tap, with a limit so that a test that fails ends.
struct Guest(File);

impl Guest {
    fn new(tap: OwnedFd) -> Self {
        Guest(tap.into())
    }

    /// The next frame for which `wanted` has a use.
    fn next<T>(&mut self, wanted: impl Fn(&[u8]) -> Option<T>) -> T {
        let mut buffer = [0; 2048];
        for _ in 0..3000 {
            match self.0.read(&mut buffer) {
                Ok(length) => {
                    if let Some(found) = wanted(&buffer[HEADER..length]) {
                        return found;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the frame did not come");
    }

    fn send(&mut self, frame: &[u8]) {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        assert_eq!(self.0.write(&bytes).unwrap(), bytes.len());
    }
}

/// The sender of a question for an IPv4 address.
fn arp_question(frame: &[u8], target: [u8; 4]) -> Option<([u8; 6], [u8; 4])> {
    let is_one = frame.get(12..14)? == [8, 6] && frame.get(20..22)? == [0, 1];
    (is_one && frame.get(38..42)? == target)
        .then(|| Some((frame.get(22..28)?.try_into().ok()?, frame.get(28..32)?.try_into().ok()?)))?
}

#[test]
fn frames_go_both_ways_and_the_namespace_does_not_answer_for_the_guest() {
    let pod = Pod::new("f");
    let third = u8::try_from(std::process::id() % 250).unwrap();
    pod.inside(&format!("addr add 198.18.{third}.2/24 dev eth0"));
    ip(&format!("addr add 198.18.{third}.1/24 dev {}", pod.outer));
    let mut joined = join::join(&pod.netns, 1).unwrap();
    let nic = joined.nics.pop().unwrap();
    assert_eq!((nic.name.as_str(), nic.mtu, nic.taps.len()), ("eth0", 1400, 1));
    let mut guest = Guest::new(nic.taps.into_iter().next().unwrap());

    let own = [198, 18, third, 2];
    let socket = UdpSocket::bind((IpAddr::from([198, 18, third, 1]), 0)).unwrap();
    socket.send_to(b"to the guest", (IpAddr::from(own), 4000)).unwrap();
    let (mac, address) = guest.next(|frame| arp_question(frame, own));
    let mut answer = mac.to_vec();
    answer.extend(nic.mac);
    answer.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    answer.extend(nic.mac);
    answer.extend(own);
    answer.extend(mac);
    answer.extend(address);
    guest.send(&answer);
    // If the namespace had answered, too, the datagram would have gone to it.
    let payload = guest.next(|frame| {
        let is_udp = frame.get(12..14)? == [8, 0] && frame.get(23)? == &17;
        (is_udp && frame.get(36..38)? == 4000u16.to_be_bytes()).then(|| frame[42..].to_vec())
    });
    assert_eq!(payload, b"to the guest");
}

#[test]
fn everything_that_the_guest_has_to_be_told_is_read() {
    let pod = Pod::new("s");
    for line in [
        "addr add 10.9.8.7/24 brd + dev eth0",
        "addr add fd00:9::7/64 dev eth0 nodad",
        "addr add 10.9.9.9/32 dev lo",
        "route add default via 10.9.8.1 src 10.9.8.7 metric 50 mtu 1300",
        "route add 10.20.0.0/16 via 10.30.0.1 dev eth0 onlink",
        "route add 10.40.0.0/16 dev eth0 scope link",
        "route add blackhole 10.50.0.0/16",
        "-6 route add default via fd00:9::1 metric 60",
        "route add 10.60.0.0/16 dev eth0 table 77",
        "neigh add 10.9.8.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    ] {
        pod.inside(line);
    }
    let snapshot = join::join(&pod.netns, 2).unwrap().snapshot;
    let names: Vec<_> = snapshot.interfaces.iter().map(|i| i.link.name.as_str()).collect();
    assert_eq!(names, ["lo", "eth0"]);
    let addresses = |at: usize| -> Vec<String> {
        let all = snapshot.interfaces[at].addresses.iter();
        all.map(|a| format!("{}/{}", a.ip, a.prefix_len)).collect()
    };
    assert_eq!(addresses(0), ["10.9.9.9/32"]);
    assert_eq!(addresses(1), ["10.9.8.7/24", "fd00:9::7/64"]);
    assert_eq!(
        snapshot.pod_addresses(),
        ["10.9.8.7", "fd00:9::7"].map(|a| a.parse::<IpAddr>().unwrap())
    );
    let broadcast = snapshot.interfaces[1].addresses[0].broadcast;
    assert_eq!(broadcast, Some("10.9.8.255".parse().unwrap()));

    let find = |text: &str| {
        let (destination, len) = text.split_once('/').unwrap();
        let found = snapshot.routes.iter().find(|route| {
            route.destination.to_string() == destination && route.prefix_len.to_string() == len
        });
        found.unwrap_or_else(|| panic!("{text} is missing: {:?}", snapshot.routes))
    };
    let default = find("0.0.0.0/0");
    assert_eq!((default.priority, default.source), (50, Some("10.9.8.7".parse().unwrap())));
    assert_eq!(default.metrics, [(2, 1300)]);
    assert_eq!(default.hops[0].gateway, Some("10.9.8.1".parse().unwrap()));
    assert!(!default.hops[0].onlink && find("10.20.0.0/16").hops[0].onlink);
    assert_eq!(find("10.40.0.0/16").scope, 253);
    assert_eq!((find("10.50.0.0/16").kind, find("10.50.0.0/16").hops.len()), (6, 0));
    assert_eq!(find("::/0").priority, 60);
    // The network of the address itself, which the guest's kernel is kept from making.
    assert_eq!(find("10.9.8.0/24").protocol, route::BY_KERNEL);
    assert_eq!(find("fd00:9::/64").protocol, route::BY_KERNEL);
    assert!(!snapshot.routes.iter().any(|route| route.table != route::TABLE_MAIN));
    assert!(!snapshot.routes.iter().any(|route| route.destination.to_string() == "fe80::"));
    assert_eq!(snapshot.neighbours.len(), 1);
    assert_eq!(snapshot.neighbours[0].mac, [2, 0, 0, 0, 0, 1]);
}

#[test]
fn a_snapshot_can_be_set_again_as_it_was() {
    let pod = Pod::new("a");
    for line in [
        "addr add 10.9.8.7/24 dev eth0",
        "route add default via 10.9.8.1 metric 50",
        "route add 10.20.0.0/16 nexthop via 10.9.8.2 weight 2 nexthop via 10.9.8.3",
        "neigh add 10.9.8.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    ] {
        pod.inside(line);
    }
    let all = |socket: &mut Socket| {
        let own = |route: &route::Route| route.table == route::TABLE_MAIN;
        let routes: Vec<_> = route::list(socket).unwrap().into_iter().filter(own).collect();
        (address::list(socket).unwrap(), routes, neighbour::list(socket).unwrap())
    };
    let before = pod.look(all);
    let of_v4 = |route: &&route::Route| route.destination.is_ipv4();
    pod.look(|socket| {
        let (addresses, routes, neighbours) = all(socket);
        for route in routes.iter().filter(of_v4).rev() {
            route::remove(socket, route).unwrap();
        }
        neighbour::remove(socket, &neighbours[0]).unwrap();
        let own = addresses.iter().find(|a| a.ip.to_string() == "10.9.8.7").unwrap();
        address::remove(socket, own).unwrap();
        let mut own = own.clone();
        own.flags |= address::NO_PREFIX_ROUTE;
        for _ in 0..2 {
            address::set(socket, &own).unwrap();
            let (direct, by_gateway): (Vec<_>, Vec<_>) = routes
                .iter()
                .filter(of_v4)
                .partition(|route| route.hops.iter().all(|hop| hop.gateway.is_none()));
            for route in direct.into_iter().chain(by_gateway) {
                route::set(socket, route).unwrap();
            }
            neighbour::set(socket, &neighbours[0]).unwrap();
        }
    });
    let after = pod.look(all);
    let v4 = |routes: &[route::Route]| {
        let mut routes: Vec<_> = routes.iter().filter(of_v4).map(|r| format!("{r:?}")).collect();
        routes.sort();
        routes
    };
    assert_eq!(v4(&after.1), v4(&before.1));
    assert_eq!(after.2, before.2);
}

#[test]
fn a_join_can_be_repeated_and_ended() {
    let pod = Pod::new("r");
    let first = join::join(&pod.netns, 1).unwrap();
    drop(first);
    // Whoever had it before is gone, and its redirections lead nowhere.
    let mut again = join::join(&pod.netns, 3);
    for _ in 0..1000 {
        // A process that another test is starting can still have the first one's taps.
        if matches!(again, Err(JoinError::Tap { .. })) {
            std::thread::sleep(Duration::from_millis(10));
            again = join::join(&pod.netns, 3);
        }
    }
    let again = again.unwrap();
    assert_eq!(again.nics[0].taps.len(), 3);
    join::part(&pod.netns).unwrap();
    join::part(&pod.netns).unwrap();
    drop(again);
    let links = pod.look(|socket| link::list(socket).unwrap());
    assert!(!links.iter().any(|link| link.name.starts_with("husk-tap")), "{links:?}");
}

#[test]
fn interfaces_that_a_virtual_machine_cannot_have_are_refused_by_name() {
    let pod = Pod::new("t");
    pod.inside("tuntap add mode tun name wg0");
    pod.inside("link set wg0 up");
    match join::join(&pod.netns, 1).unwrap_err() {
        JoinError::NotEthernet { interface, .. } => assert_eq!(interface, "wg0"),
        other => panic!("{other}"),
    }
}

/// A host whose only plugin is a script.
fn host(root: &Path, script: &str) -> Host {
    use std::os::unix::fs::PermissionsExt;
    let (config_directory, bin) = (root.join("net.d"), root.join("bin"));
    std::fs::create_dir_all(&config_directory).unwrap();
    std::fs::create_dir_all(&bin).unwrap();
    let network = r#"{"cniVersion": "1.0.0", "name": "test", "type": "plugin"}"#;
    std::fs::write(config_directory.join("10-test.conf"), network).unwrap();
    let plugin = bin.join("plugin");
    let log = root.join("log");
    let text = format!("#!/bin/sh\necho $CNI_COMMAND >> {}\n{script}\n", log.display());
    std::fs::write(&plugin, text).unwrap();
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    Host {
        cni: Cni {
            config_directory,
            plugin_directories: vec![bin],
            limits: Limits { time: Duration::from_secs(60), ..Limits::default() },
        },
        records: root.join("records"),
        netns_directory: netns::DIRECTORY.into(),
    }
}

fn request() -> Request {
    Request {
        namespace: "default".into(),
        name: "pod".into(),
        source: Source::Network(None),
        capabilities: husk_network::cni::Capabilities::default(),
        queue_pairs: 1,
    }
}

fn uid(name: &str) -> String {
    format!("test-{}-{name}", std::process::id())
}

fn netns_of(uid: &str) -> PathBuf {
    Path::new(netns::DIRECTORY).join(format!("husk-{uid}"))
}

const PLUGIN: &str = r#"
case $CNI_COMMAND in
ADD)
    ip -n ${CNI_NETNS##*/} link add $CNI_IFNAME type veth peer name other >&2
    ip -n ${CNI_NETNS##*/} link set $CNI_IFNAME up >&2
    ip -n ${CNI_NETNS##*/} addr add 10.1.2.3/24 dev $CNI_IFNAME >&2
    echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]}';;
esac"#;

#[test]
fn a_pods_network_is_made_recorded_and_taken_back_by_another_process() {
    let root = tempfile::tempdir().unwrap();
    let host = host(root.path(), PLUGIN);
    let uid = uid("whole");
    let pod = host.pod(&uid).unwrap();
    let attached = pod.attach(&request(), &Stop::new().unwrap()).unwrap();
    assert_eq!(attached.addresses, ["10.1.2.3".parse::<IpAddr>().unwrap()]);
    assert_eq!(attached.netns.path(), netns_of(&uid));
    assert_eq!(attached.joined.nics.len(), 1);
    assert_eq!(host.attached().unwrap(), std::slice::from_ref(&uid));
    // As long as it is held, nobody else touches it.
    assert!(matches!(host.pod(&uid), Err(NetworkError::Held(_))));
    assert!(host.sweep().unwrap().is_empty() && netns_of(&uid).exists());
    // The one that made it is gone without a word.
    drop((attached, pod));
    let swept = host.sweep().unwrap();
    assert!(matches!(swept.as_slice(), [(one, Ok(()))] if *one == uid), "{swept:?}");
    host.pod(&uid).unwrap().detach().unwrap();
    assert_eq!(host.attached().unwrap(), Vec::<String>::new());
    assert!(!netns_of(&uid).exists());
    assert_eq!(std::fs::read_to_string(root.path().join("log")).unwrap(), "ADD\nDEL\n");
    let left: Vec<_> = std::fs::read_dir(root.path().join("records")).unwrap().collect();
    assert_eq!(left.len(), 2, "more than the two locks is left: {left:?}");
}

#[test]
fn what_a_failed_plugin_made_is_taken_back() {
    let root = tempfile::tempdir().unwrap();
    let fails = r#"[ $CNI_COMMAND = DEL ] || { echo '{"code": 50, "msg": "no luck"}'; exit 1; }"#;
    let host = host(root.path(), fails);
    let uid = uid("failed");
    let pod = host.pod(&uid).unwrap();
    let error = pod.attach(&request(), &Stop::new().unwrap()).unwrap_err().to_string();
    assert!(error.contains("\"plugin\" failed at ADD: no luck (code 50)"), "{error}");
    assert_eq!(std::fs::read_to_string(root.path().join("log")).unwrap(), "ADD\nDEL\n");
    assert_eq!(host.attached().unwrap(), Vec::<String>::new());
    assert!(!netns_of(&uid).exists());
}

#[test]
fn what_could_not_be_taken_back_stays_recorded() {
    let root = tempfile::tempdir().unwrap();
    let fixed = root.path().join("fixed");
    let script = format!("{PLUGIN}\n[ $CNI_COMMAND = ADD ] || [ -e {} ]", fixed.display());
    let host = host(root.path(), &script);
    let uid = uid("again");
    let pod = host.pod(&uid).unwrap();
    drop(pod.attach(&request(), &Stop::new().unwrap()).unwrap());
    pod.detach().unwrap_err();
    assert_eq!(host.attached().unwrap(), std::slice::from_ref(&uid));
    assert!(!netns_of(&uid).exists());
    std::fs::write(fixed, "").unwrap();
    pod.detach().unwrap();
    assert_eq!(host.attached().unwrap(), Vec::<String>::new());
}

#[test]
fn a_namespace_of_somebody_else_is_joined_and_left_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let host = host(root.path(), "exit 1");
    let outer = Pod::new("o");
    outer.inside("addr add 10.7.7.7/24 dev eth0");
    let source = Source::Netns(outer.netns.path().to_owned());
    let request = Request { source, ..request() };
    let pod = host.pod(&uid("other")).unwrap();
    let attached = pod.attach(&request, &Stop::new().unwrap()).unwrap();
    assert_eq!(attached.addresses, ["10.7.7.7".parse::<IpAddr>().unwrap()]);
    drop(attached);
    pod.detach().unwrap();
    assert!(outer.netns.path().exists() && host.attached().unwrap().is_empty());
}

#[test]
fn connections_to_localhost_of_the_namespace_are_taken_whatever_their_port() {
    let pod = Pod::new("l");
    pod.inside("addr add 198.18.0.2/24 dev eth0");
    let connect = |to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        pod.netns.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(10))).unwrap()
    };
    // One that listens there by itself, on all addresses.
    let own = pod.netns.enter(|| TcpListener::bind("0.0.0.0:4000")).unwrap().unwrap();
    own.set_nonblocking(true).unwrap();
    assert!(connect("127.0.0.1:80").is_err());
    let taken = Localhost::take(&pod.netns).unwrap();
    assert_eq!(taken.listeners.len(), 2);
    let accept = |at: usize| {
        taken.listeners[at].set_nonblocking(false).unwrap();
        taken.listeners[at].accept().unwrap().0
    };
    for (at, to) in [
        (0, "127.0.0.1:80"),
        (0, "127.0.0.1:4000"),
        (0, "127.1.2.3:65535"),
        (0, "[::ffff:127.0.0.1]:1"),
        (1, "[::1]:80"),
    ] {
        let mut theirs = connect(to).unwrap();
        let mut ours = accept(at);
        let meant = to.parse::<SocketAddr>().unwrap();
        assert_eq!(ours.local_addr().unwrap().port(), meant.port());
        assert_eq!(ours.local_addr().unwrap().ip(), meant.ip().to_canonical());
        theirs.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
    }
    // What is not to localhost goes where it went.
    assert!(own.accept().is_err());
    let _theirs = connect("198.18.0.2:4000").unwrap();
    own.set_nonblocking(false).unwrap();
    own.accept().unwrap();
    assert!(connect("198.18.0.2:80").is_err());
    drop(taken);
    assert!(connect("127.0.0.1:80").is_err());
    let _theirs = connect("127.0.0.1:4000").unwrap();
    own.accept().unwrap();
}

#[test]
fn localhost_elsewhere_is_left_alone() {
    let (one, other) = (Pod::new("m"), Pod::new("n"));
    let _taken = Localhost::take(&one.netns).unwrap();
    let connect = |pod: &Pod| pod.netns.enter(|| TcpStream::connect("127.0.0.1:80")).unwrap();
    connect(&one).unwrap();
    assert!(connect(&other).is_err());
    // Nor are datagrams of any concern.
    let at = one.netns.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    let from = one.netns.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    from.send_to(b"x", at.local_addr().unwrap()).unwrap();
    assert_eq!(at.recv(&mut [0; 8]).unwrap(), 1);
}

/// Waits until what is told is as it shall be.
fn until(told: &std::sync::mpsc::Receiver<Snapshot>, shall: impl Fn(&Snapshot) -> bool) {
    let mut last = None;
    for _ in 0..1000 {
        let next = told.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| {
            panic!("{error} after {last:?}");
        });
        if shall(&next) {
            return;
        }
        last = Some(next);
    }
    panic!("it is not told: {last:?}");
}

#[test]
fn later_changes_are_told() {
    let pod = Pod::new("w");
    pod.inside("addr add 10.9.8.7/24 dev eth0");
    let joined = join::join(&pod.netns, 1).unwrap();
    // Between the two nobody watches.
    pod.inside("addr add 10.9.8.8/24 dev eth0");
    let (tell, told) = std::sync::mpsc::channel();
    let follower =
        Follower::start(&pod.netns, &joined.snapshot, move |now| drop(tell.send(now))).unwrap();
    let has = |now: &Snapshot, ip: &str| {
        let mut all = now.interfaces.iter().flat_map(|interface| &interface.addresses);
        all.any(|address| address.ip.to_string() == ip)
    };
    let eth0 = |now: &Snapshot| now.interfaces.iter().find(|i| i.link.name == "eth0").cloned();
    until(&told, |now| has(now, "10.9.8.8"));
    pod.inside("addr del 10.9.8.7/24 dev eth0");
    until(&told, |now| !has(now, "10.9.8.7"));
    pod.inside("addr add 10.9.8.9/24 dev eth0");
    pod.inside("route add 10.20.0.0/16 via 10.9.8.1 dev eth0");
    until(&told, |now| now.routes.iter().any(|r| r.destination.to_string() == "10.20.0.0"));
    pod.inside("neigh add 10.9.8.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    until(&told, |now| now.neighbours.len() == 1);

    pod.inside("link set eth0 mtu 1300");
    until(&told, |now| eth0(now).is_some_and(|eth0| eth0.link.mtu == 1300));
    let links = pod.look(|socket| link::list(socket).unwrap());
    assert!(links.iter().any(|link| link.name.starts_with("husk-tap") && link.mtu == 1300));

    // Neither a new interface nor more changes than fit a socket stop it.
    pod.inside("link add new type veth peer name newer");
    pod.inside("link set new up");
    pod.look(|socket| {
        let mut first = address::list(socket).unwrap();
        first.retain(|address| address.ip.to_string() == "10.9.8.9");
        for low in 1..2000u16 {
            let [high, low] = low.to_be_bytes();
            let ip = IpAddr::from([10, 77, high, low]);
            address::set(socket, &address::Address { ip, ..first[0].clone() }).unwrap();
        }
    });
    until(&told, |now| has(now, "10.77.7.207") && now.interfaces.len() == 2);
    pod.inside("link set eth0 down");
    until(&told, |now| eth0(now).is_none());
    drop(follower);
    assert!(told.iter().count() < 100, "it goes on");
}

#[test]
fn garbage_is_collected_where_that_is_allowed_and_what_lives_is_named() {
    let root = tempfile::tempdir().unwrap();
    let log = root.path().join("stdin");
    let script = format!("[ $CNI_COMMAND = GC ] && cat > {}\n{PLUGIN}", log.display());
    let host = host(root.path(), &script.replace("1.0.0", "1.1.0"));
    let configure = |more: &str| {
        let text = format!(
            r#"{{"cniVersion": "1.1.0", "name": "test", {more} "plugins": [{{"type": "plugin"}}]}}"#
        );
        let path = host.cni.config_directory.join("10-test");
        std::fs::remove_file(path.with_extension("conf")).ok();
        std::fs::write(path.with_extension("conflist"), text).unwrap();
    };
    let (dies, lives) = (uid("dies"), uid("lives"));
    let living = host.pod(&lives).unwrap();
    configure("");
    drop(living.attach(&request(), &Stop::new().unwrap()).unwrap());
    for (more, collected) in
        [("", false), (r#""disableGC": true,"#, false), (r#""disableGC": false,"#, true)]
    {
        configure(more);
        let pod = host.pod(&dies).unwrap();
        drop(pod.attach(&request(), &Stop::new().unwrap()).unwrap());
        drop(pod);
        let swept = host.sweep().unwrap();
        assert!(matches!(swept.as_slice(), [(one, Ok(()))] if *one == dies), "{swept:?}");
        assert_eq!(log.exists(), collected, "{more}");
    }
    let told = std::fs::read_to_string(log).unwrap();
    let valid = format!(
        r#""cni.dev/valid-attachments":[{{"containerID":"husk-{lives}","ifname":"eth0"}}]"#
    );
    assert!(told.contains(&valid), "{told}");
    living.detach().unwrap();
}

#[test]
fn a_network_is_checked_by_its_plugins_whoever_holds_it() {
    let root = tempfile::tempdir().unwrap();
    let broken = root.path().join("broken");
    let script = format!(
        r#"[ $CNI_COMMAND = CHECK ] && [ -e {} ] && {{ echo '{{"code": 50, "msg": "no address"}}'; exit 1; }}
{PLUGIN}"#,
        broken.display()
    );
    let host = host(root.path(), &script);
    let (uid, other) = (uid("checked"), uid("foreign"));
    assert_eq!(host.check(&uid).unwrap(), Checked::NoNetwork);
    let pod = host.pod(&uid).unwrap();
    drop(pod.attach(&request(), &Stop::new().unwrap()).unwrap());
    assert_eq!(host.check(&uid).unwrap(), Checked::AsMade("test".into()));
    std::fs::write(broken, "").unwrap();
    let error = host.check(&uid).unwrap_err().to_string();
    assert!(error.contains("failed at CHECK: no address (code 50)"), "{error}");
    netns::delete(&netns_of(&uid)).unwrap();
    assert!(matches!(host.check(&uid), Err(NetworkError::Netns(_))));
    pod.detach().unwrap();

    let outer = Pod::new("k");
    let path = outer.netns.path().to_owned();
    let pod = host.pod(&other).unwrap();
    let request = Request { source: Source::Netns(path.clone()), ..request() };
    drop(pod.attach(&request, &Stop::new().unwrap()).unwrap());
    assert_eq!(host.check(&other).unwrap(), Checked::Namespace(path));
    pod.detach().unwrap();
}

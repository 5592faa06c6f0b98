//! The pod's network as the agent is told it. The ends of a veth pair in the agent's network
//! namespace stand for the virtual machine's interfaces.

use std::process::Command;

use husk_proto::agent as wire;
use tonic::Code;

use crate::guest::{Guest, setup_request};

/// The interfaces' addresses.
const FIRST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SECOND: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs `ip` in the agent's network namespace, and returns what it says.
fn ip(guest: &Guest, arguments: &str) -> String {
    let namespace = format!("--net={}", guest.agent().join("ns/net").display());
    let done = Command::new("nsenter")
        .args([&namespace, "ip"])
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// A guest with two interfaces, whose names are not those that are told.
async fn boot() -> Guest {
    let guest = Guest::boot().await;
    ip(
        &guest,
        "link add eth1 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02",
    );
    guest
}

fn address(ip: &str, prefix_len: u32) -> wire::InterfaceAddress {
    wire::InterfaceAddress { ip: ip.into(), prefix_len, ..Default::default() }
}

fn interface(name: &str, mac: &[u8], addresses: Vec<wire::InterfaceAddress>) -> wire::Interface {
    let mtu = if mac.is_empty() { 0 } else { 1400 };
    wire::Interface { name: name.into(), mac: mac.to_vec(), mtu, no_arp: false, addresses }
}

fn route(destination: &str, prefix_len: u32, interface: &str, gateway: &str) -> wire::Route {
    let (interface, gateway) = (interface.to_owned(), gateway.to_owned());
    wire::Route {
        destination: destination.into(),
        prefix_len,
        kind: 1,
        scope: if gateway.is_empty() && !destination.contains(':') { 253 } else { 0 },
        protocol: 3,
        hops: vec![wire::NextHop { interface, gateway, ..Default::default() }],
        ..Default::default()
    }
}

fn request() -> wire::UpdateNetworkRequest {
    wire::UpdateNetworkRequest {
        interfaces: vec![
            interface("lo", &[], vec![address("10.9.9.9", 32)]),
            interface("eth0", &FIRST, vec![address("10.0.0.2", 24), address("fd00::2", 64)]),
            interface("net1", &SECOND, vec![address("10.1.0.2", 16)]),
        ],
        // The gateway's network comes after the route that needs it.
        routes: vec![
            wire::Route { metrics: [(2, 1300)].into(), ..route("0.0.0.0", 0, "eth0", "10.0.0.1") },
            route("::", 0, "eth0", "fd00::1"),
            route("10.0.0.0", 24, "eth0", ""),
            route("fd00::", 64, "eth0", ""),
            wire::Route {
                kind: 6,
                ..wire::Route {
                    destination: "10.66.0.0".into(),
                    prefix_len: 16,
                    ..Default::default()
                }
            },
        ],
        neighbours: vec![wire::Neighbour {
            interface: "eth0".into(),
            ip: "10.0.0.1".into(),
            mac: vec![2, 0, 0, 0, 0, 9],
        }],
    }
}

#[tokio::test]
async fn interfaces_become_what_they_are_told_to_be() {
    let guest = boot().await;
    for _ in 0..2 {
        guest.client().update_network(request()).await.unwrap();
        let links = ip(&guest, "-o link");
        let of =
            |name: &str| links.lines().find(|line| line.contains(&format!(" {name}"))).unwrap();
        assert!(of("eth0").contains("02:00:00:00:00:01") && of("eth0").contains("mtu 1400"));
        assert!(of("net1").contains("02:00:00:00:00:02") && of("net1").contains("UP"));
        let addresses = ip(&guest, "-o addr");
        for text in
            ["lo    inet 10.9.9.9/32", "eth0    inet 10.0.0.2/24", "eth0    inet6 fd00::2/64"]
        {
            assert!(addresses.contains(text), "{text}: {addresses}");
        }
        let (v4, v6) = (ip(&guest, "route"), ip(&guest, "-6 route"));
        assert!(v4.contains("default via 10.0.0.1 dev eth0 mtu 1300"), "{v4}");
        assert!(v4.contains("10.0.0.0/24 dev eth0 scope link"), "{v4}");
        assert!(v4.contains("blackhole 10.66.0.0/16"), "{v4}");
        // Only what was told: the kernel makes none of net1's address.
        assert_eq!(v4.lines().count(), 3, "{v4}");
        assert!(v6.contains("default via fd00::1 dev eth0"), "{v6}");
        let neighbours = ip(&guest, "neigh");
        assert!(neighbours.contains("10.0.0.1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT"));
    }
}

#[tokio::test]
async fn what_is_not_told_any_more_goes_and_what_others_made_stays() {
    let guest = boot().await;
    guest.client().update_network(request()).await.unwrap();
    ip(&guest, "route add 10.77.0.0/16 via 10.0.0.7");
    ip(&guest, "addr add 192.0.2.7/32 dev eth0");
    let mut changed = request();
    changed.interfaces[1].addresses = vec![address("10.0.0.3", 24)];
    changed.routes =
        vec![route("10.0.0.0", 24, "eth0", ""), route("0.0.0.0", 0, "eth0", "10.0.0.254")];
    changed.neighbours.clear();
    guest.client().update_network(changed).await.unwrap();
    let addresses = ip(&guest, "-o addr show dev eth0");
    assert!(addresses.contains("10.0.0.3/24") && addresses.contains("192.0.2.7/32"), "{addresses}");
    assert!(!addresses.contains("10.0.0.2/24") && !addresses.contains("fd00::2"), "{addresses}");
    let routes = ip(&guest, "route");
    assert!(
        routes.contains("default via 10.0.0.254") && routes.contains("10.77.0.0/16"),
        "{routes}"
    );
    assert!(!routes.contains("10.0.0.1 ") && !routes.contains("blackhole"), "{routes}");
    assert_eq!(ip(&guest, "neigh show nud permanent"), "");

    let mut fewer = request();
    fewer.interfaces.pop();
    guest.client().update_network(fewer).await.unwrap();
    assert!(!ip(&guest, "-o link show dev net1").contains("UP"));
    assert!(!ip(&guest, "-o addr show dev net1").contains("10.1.0.2"));
    guest.client().update_network(request()).await.unwrap();
    assert!(ip(&guest, "-o link show dev net1").contains("UP"));
    assert!(ip(&guest, "-o addr show dev net1").contains("10.1.0.2"));
}

#[tokio::test]
async fn what_cannot_be_done_is_told_by_interface_and_operand() {
    let guest = boot().await;
    let refused = async |request: wire::UpdateNetworkRequest| {
        let error = guest.client().update_network(request).await.unwrap_err();
        (error.code(), error.message().to_owned())
    };
    let mut absent = request();
    absent.interfaces[1].mac = vec![2; 6];
    let (code, message) = refused(absent).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(
        message.contains("\"eth0\": there is no interface with the MAC address 02:02:02"),
        "{message}"
    );

    let mut unreachable = request();
    unreachable.routes[0].hops[0].gateway = "198.51.100.1".into();
    let (code, message) = refused(unreachable).await;
    assert_eq!(code, Code::Internal);
    let words = "interface \"eth0\": cannot set the route to 0.0.0.0/0 via 198.51.100.1: ";
    assert!(message.starts_with(words), "{message}");

    let mut malformed = request();
    malformed.interfaces[1].addresses[0].ip = "10.0.0.256".into();
    let (code, message) = refused(malformed).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("interfaces[1].addresses.ip: \"10.0.0.256\""), "{message}");

    ip(&guest, "link add taken type veth peer name other");
    let mut taken = request();
    taken.interfaces[2].name = "taken".into();
    let (code, message) = refused(taken).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(message.contains("\"taken\": another interface"), "{message}");

    // None of that is in the way of what can be done.
    guest.client().update_network(request()).await.unwrap();
}

#[tokio::test]
async fn containers_see_the_files_that_are_told() {
    let guest = Guest::boot_without_pod().await;
    let mut request = setup_request(None);
    request.hosts = Some("10.0.0.2\tpod\n".into());
    request.resolv_conf = "nameserver 10.0.0.53\n".into();
    guest.client().setup_pod(request).await.unwrap();
    let etc = guest.root().join("run/husk/etc");
    let read = |name: &str| std::fs::read_to_string(etc.join(name)).unwrap();
    assert_eq!(read("hosts"), "10.0.0.2\tpod\n");
    assert_eq!(read("resolv.conf"), "nameserver 10.0.0.53\n");
    assert_eq!(read("hostname"), "pod\n");
}

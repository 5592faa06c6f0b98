//! What the agent is told of the pod's network.

use std::collections::HashMap;

use husk_network::join::{Interface, Snapshot};
use husk_network::netlink::address::Address;
use husk_network::netlink::link::{LOOPBACK, Link, NO_ARP};
use husk_network::netlink::neighbour::Neighbour;
use husk_network::netlink::route::{Hop, Route};
use husk_proto::agent as proto;

/// The request that makes a guest's network look as this one.
pub(crate) fn update(snapshot: &Snapshot) -> proto::UpdateNetworkRequest {
    let Snapshot { interfaces, routes, neighbours } = snapshot;
    let names: HashMap<u32, &str> =
        interfaces.iter().map(|i| (i.link.index, i.link.name.as_str())).collect();
    let name = |link: u32| names.get(&link).copied().unwrap_or_default().to_owned();
    proto::UpdateNetworkRequest {
        interfaces: interfaces.iter().map(interface).collect(),
        routes: routes.iter().map(|one| route(one, &name)).collect(),
        neighbours: neighbours
            .iter()
            .map(|Neighbour { link, ip, mac }| proto::Neighbour {
                interface: name(*link),
                ip: ip.to_string(),
                mac: mac.to_vec(),
            })
            .collect(),
    }
}

fn interface(Interface { link, addresses }: &Interface) -> proto::Interface {
    let Link { index: _, name, mac, mtu, flags, hardware: _, kind: _ } = link;
    let loopback = flags & LOOPBACK != 0;
    proto::Interface {
        name: name.clone(),
        mac: mac.filter(|_| !loopback).map(|mac| mac.to_vec()).unwrap_or_default(),
        mtu: *mtu,
        no_arp: !loopback && flags & NO_ARP != 0,
        addresses: addresses.iter().map(address).collect(),
    }
}

fn address(address: &Address) -> proto::InterfaceAddress {
    let Address { link: _, ip, prefix_len, peer, broadcast, scope, flags: _ } = address;
    proto::InterfaceAddress {
        ip: ip.to_string(),
        prefix_len: (*prefix_len).into(),
        peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
        broadcast: broadcast.map(|broadcast| broadcast.to_string()).unwrap_or_default(),
        scope: (*scope).into(),
    }
}

fn route(route: &Route, name: &impl Fn(u32) -> String) -> proto::Route {
    let Route {
        destination,
        prefix_len,
        kind,
        scope,
        protocol,
        table: _,
        priority,
        source,
        metrics,
        hops,
    } = route;
    let hop = |Hop { link, gateway, onlink, weight }: &Hop| proto::NextHop {
        interface: name(*link),
        gateway: gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        onlink: *onlink,
        weight: (*weight).into(),
    };
    proto::Route {
        destination: destination.to_string(),
        prefix_len: (*prefix_len).into(),
        kind: (*kind).into(),
        scope: (*scope).into(),
        protocol: (*protocol).into(),
        priority: *priority,
        source: source.map(|source| source.to_string()).unwrap_or_default(),
        metrics: metrics.iter().map(|(metric, value)| ((*metric).into(), *value)).collect(),
        hops: hops.iter().map(hop).collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_interfaces_become_their_names() {
        let link = |index, name: &str, flags| Link {
            index,
            name: name.into(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            flags,
            hardware: 1,
            kind: "veth".into(),
        };
        let snapshot = Snapshot {
            interfaces: vec![
                Interface { link: link(1, "lo", LOOPBACK), addresses: Vec::new() },
                Interface { link: link(7, "eth0", NO_ARP), addresses: Vec::new() },
            ],
            routes: vec![Route {
                destination: "fd00::".parse().unwrap(),
                prefix_len: 64,
                kind: 1,
                scope: 0,
                protocol: 2,
                table: 254,
                priority: 256,
                source: None,
                metrics: vec![(2, 1400)],
                hops: vec![Hop { link: 7, gateway: None, onlink: false, weight: 0 }],
            }],
            neighbours: vec![Neighbour { link: 7, ip: "fd00::1".parse().unwrap(), mac: [2; 6] }],
        };
        let request = update(&snapshot);
        assert_eq!((request.interfaces[0].mac.len(), request.interfaces[0].no_arp), (0, false));
        assert_eq!((request.interfaces[1].mac.len(), request.interfaces[1].no_arp), (6, true));
        assert_eq!(request.routes[0].hops[0].interface, "eth0");
        assert_eq!(request.routes[0].metrics[&2], 1400);
        assert_eq!(request.neighbours[0].interface, "eth0");
    }
}

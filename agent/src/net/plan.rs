//! What the host tells of the network, checked: nothing here has an effect.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use husk_netlink::address::{self, Address};
use husk_netlink::link::Mac;
use husk_netlink::neighbour::Neighbour;
use husk_netlink::route::{self, Hop, Route};
use husk_proto::agent as wire;

/// Most of each that a request may have.
const MAX_INTERFACES: usize = 64;
const MAX_ADDRESSES: usize = 1024;
const MAX_ROUTES: usize = 16 * 1024;
const MAX_NEIGHBOURS: usize = 16 * 1024;
const MAX_HOPS: usize = 256;

/// Longest name of an interface (IFNAMSIZ of Linux, less the NUL).
const MAX_NAME: usize = 15;

/// Name of the loopback interface, which the kernel gives it.
const LOOPBACK: &str = "lo";

/// `RTN_*` that a route may have.
const UNICAST: u8 = 1;
const NO_WAY: [u8; 4] = [6, 7, 8, 9];

/// Greatest number of a metric, and the one that is a text.
const MAX_METRIC: u32 = 64;
const CONGESTION_CONTROL: u32 = 16;

/// A field that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {value}: {rule}")]
pub(crate) struct FieldError {
    field: String,
    value: String,
    rule: &'static str,
}

/// What is wrong with a value, before it is known of which object it is.
type Wrong = (&'static str, String, &'static str);

fn wrong<T>(field: &'static str, value: impl ToString, rule: &'static str) -> Result<T, Wrong> {
    Err((field, value.to_string(), rule))
}

/// An interface, as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) name: String,
    /// `None` for the loopback interface.
    pub(super) mac: Option<Mac>,
    /// 0 leaves it.
    pub(super) mtu: u32,
    pub(super) no_arp: bool,
    /// Of this interface: `link` is its place in the plan.
    pub(super) addresses: Vec<Address>,
}

/// A whole request. Numbers of links are places in `interfaces`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) interfaces: Vec<Planned>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

impl Plan {
    /// Reads a request.
    pub(super) fn of(request: &wire::UpdateNetworkRequest) -> Result<Self, FieldError> {
        let wire::UpdateNetworkRequest { interfaces, routes, neighbours } = request;
        let mut plan = Plan {
            interfaces: each("interfaces", interfaces, MAX_INTERFACES, read_interface)?,
            ..Plan::default()
        };
        plan.check_unique()?;
        plan.routes = each("routes", routes, MAX_ROUTES, |_, route| plan.read_route(route))?;
        plan.neighbours = each("neighbours", neighbours, MAX_NEIGHBOURS, |_, neighbour| {
            let wire::Neighbour { interface, ip, mac } = neighbour;
            Ok(Neighbour {
                link: plan.link("interface", interface)?,
                ip: read_ip("ip", ip)?,
                mac: read_mac(mac)?,
            })
        })?;
        Ok(plan)
    }

    fn check_unique(&self) -> Result<(), FieldError> {
        let (mut names, mut macs) = (BTreeSet::new(), BTreeSet::new());
        for Planned { name, mac, .. } in &self.interfaces {
            if !names.insert(name) || !macs.insert(mac) {
                return Err(FieldError {
                    field: "interfaces".to_owned(),
                    value: format!("{name:?}"),
                    rule: "another one has the same name or MAC address",
                });
            }
        }
        Ok(())
    }

    /// The place of an interface.
    fn link(&self, field: &'static str, name: &str) -> Result<u32, Wrong> {
        let place = self.interfaces.iter().position(|planned| planned.name == name);
        let place = place.and_then(|place| u32::try_from(place).ok());
        place.map_or_else(|| wrong(field, format!("{name:?}"), "no interface has this name"), Ok)
    }

    fn read_route(&self, route: &wire::Route) -> Result<Route, Wrong> {
        let wire::Route {
            destination,
            prefix_len,
            kind,
            scope,
            protocol,
            priority,
            source,
            metrics,
            hops,
        } = route;
        let destination = read_ip("destination", destination)?;
        let kind = read_u8("kind", *kind)?;
        if kind != UNICAST && !NO_WAY.contains(&kind) {
            return wrong("kind", kind, "must be 1, 6, 7, 8 or 9");
        }
        if kind == UNICAST && hops.is_empty() {
            return wrong("hops", "none", "a way has at least one");
        }
        if hops.len() > MAX_HOPS {
            return wrong("hops", hops.len(), "there are too many");
        }
        let mut numbers = Vec::new();
        for (metric, value) in metrics {
            match u16::try_from(*metric) {
                Ok(number)
                    if (1..=MAX_METRIC).contains(metric) && *metric != CONGESTION_CONTROL =>
                {
                    numbers.push((number, *value));
                }
                _ => return wrong("metrics", metric, "must be 1 to 64, but not 16"),
            }
        }
        // A map has no order.
        numbers.sort_unstable();
        Ok(Route {
            destination,
            prefix_len: read_prefix(destination, *prefix_len)?,
            kind,
            scope: read_u8("scope", *scope)?,
            protocol: read_u8("protocol", *protocol)?,
            table: route::TABLE_MAIN,
            priority: *priority,
            source: read_optional_ip("source", source)?,
            metrics: numbers,
            hops: hops.iter().map(|hop| self.read_hop(hop)).collect::<Result<_, _>>()?,
        })
    }

    fn read_hop(&self, hop: &wire::NextHop) -> Result<Hop, Wrong> {
        let wire::NextHop { interface, gateway, onlink, weight } = hop;
        Ok(Hop {
            link: self.link("hops.interface", interface)?,
            gateway: read_optional_ip("hops.gateway", gateway)?,
            onlink: *onlink,
            weight: read_u8("hops.weight", *weight)?,
        })
    }
}

/// Reads each of a list, and names the one that is wrong.
fn each<T, U>(
    list: &'static str,
    items: &[T],
    most: usize,
    read: impl Fn(u32, &T) -> Result<U, Wrong>,
) -> Result<Vec<U>, FieldError> {
    if items.len() > most {
        let (field, value) = (list.to_owned(), items.len().to_string());
        return Err(FieldError { field, value, rule: "there are too many" });
    }
    let read_one = |(place, item): (u32, &T)| {
        read(place, item).map_err(|(field, value, rule)| FieldError {
            field: format!("{list}[{place}].{field}"),
            value,
            rule,
        })
    };
    (0..).zip(items).map(read_one).collect()
}

fn read_interface(place: u32, interface: &wire::Interface) -> Result<Planned, Wrong> {
    let wire::Interface { name, mac, mtu, no_arp, addresses } = interface;
    let harmless = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | ':' | '%');
    let is_name = !name.is_empty() && name.len() <= MAX_NAME && name != "." && name != "..";
    if !is_name || !name.chars().all(harmless) {
        return wrong("name", format!("{name:?}"), "cannot name an interface");
    }
    if mac.is_empty() != (name == LOOPBACK) {
        return wrong("name", format!("{name:?}"), "the loopback interface, and no other, is lo");
    }
    if addresses.len() > MAX_ADDRESSES {
        return wrong("addresses", addresses.len(), "there are too many");
    }
    Ok(Planned {
        name: name.clone(),
        mac: if mac.is_empty() { None } else { Some(read_mac(mac)?) },
        mtu: *mtu,
        no_arp: *no_arp,
        addresses: addresses
            .iter()
            .map(|address| read_address(place, address))
            .collect::<Result<_, _>>()?,
    })
}

fn read_address(link: u32, address: &wire::InterfaceAddress) -> Result<Address, Wrong> {
    let wire::InterfaceAddress { ip, prefix_len, peer, broadcast, scope } = address;
    let ip = read_ip("addresses.ip", ip)?;
    let broadcast: Option<Ipv4Addr> = match broadcast.as_str() {
        "" => None,
        text => match text.parse() {
            Ok(broadcast) => Some(broadcast),
            Err(_) => {
                return wrong("addresses.broadcast", format!("{text:?}"), "is no IPv4 address");
            }
        },
    };
    // Others than the pod were asked when the host's side got it.
    let asked = if ip.is_ipv6() { address::NO_DAD } else { 0 };
    Ok(Address {
        link,
        ip,
        prefix_len: read_prefix(ip, *prefix_len)?,
        peer: read_optional_ip("addresses.peer", peer)?,
        broadcast,
        scope: read_u8("addresses.scope", *scope)?,
        flags: address::PERMANENT | address::NO_PREFIX_ROUTE | asked,
    })
}

fn read_ip(field: &'static str, text: &str) -> Result<IpAddr, Wrong> {
    text.parse().or_else(|_| wrong(field, format!("{text:?}"), "is no IP address"))
}

fn read_optional_ip(field: &'static str, text: &str) -> Result<Option<IpAddr>, Wrong> {
    if text.is_empty() { Ok(None) } else { read_ip(field, text).map(Some) }
}

fn read_u8(field: &'static str, value: u32) -> Result<u8, Wrong> {
    u8::try_from(value).or_else(|_| wrong(field, value, "must be 0 to 255"))
}

fn read_prefix(ip: IpAddr, len: u32) -> Result<u8, Wrong> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match u8::try_from(len) {
        Ok(len) if len <= most => Ok(len),
        _ => wrong("prefix_len", len, "is longer than the address"),
    }
}

fn read_mac(bytes: &[u8]) -> Result<Mac, Wrong> {
    bytes.try_into().or_else(|_| wrong("mac", format!("{} bytes", bytes.len()), "must be 6 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, mac: u8) -> wire::Interface {
        wire::Interface {
            name: name.into(),
            mac: vec![2, 0, 0, 0, 0, mac],
            mtu: 1500,
            no_arp: false,
            addresses: vec![wire::InterfaceAddress {
                ip: "10.0.0.2".into(),
                prefix_len: 24,
                ..Default::default()
            }],
        }
    }

    fn request() -> wire::UpdateNetworkRequest {
        wire::UpdateNetworkRequest {
            interfaces: vec![
                wire::Interface { name: "lo".into(), ..Default::default() },
                interface("eth0", 1),
            ],
            routes: vec![wire::Route {
                destination: "0.0.0.0".into(),
                kind: 1,
                metrics: [(2, 1400)].into(),
                hops: vec![wire::NextHop {
                    interface: "eth0".into(),
                    gateway: "10.0.0.1".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            neighbours: vec![wire::Neighbour {
                interface: "eth0".into(),
                ip: "10.0.0.1".into(),
                mac: vec![2; 6],
            }],
        }
    }

    #[test]
    fn what_is_told_becomes_a_plan() {
        let plan = Plan::of(&request()).unwrap();
        assert_eq!(
            (plan.interfaces[0].mac, plan.interfaces[1].mac),
            (None, Some([2, 0, 0, 0, 0, 1]))
        );
        let address = &plan.interfaces[1].addresses[0];
        assert_eq!((address.link, address.prefix_len), (1, 24));
        assert_eq!(plan.routes[0].metrics, [(2, 1400)]);
        assert_eq!((plan.routes[0].hops[0].link, plan.neighbours[0].link), (1, 1));
    }

    #[test]
    fn what_cannot_be_is_named() {
        type Change = fn(&mut wire::UpdateNetworkRequest);
        let cases: [(Change, &str); 14] = [
            (|r| r.interfaces[1].name = "a/b".into(), "interfaces[1].name: \"a/b\": cannot name"),
            (|r| r.interfaces[1].name = "x".repeat(16), "interfaces[1].name"),
            (|r| r.interfaces[1].name = "lo".into(), "interfaces[1].name: \"lo\": the loopback"),
            (|r| r.interfaces[0].name = "eth1".into(), "interfaces[0].name: \"eth1\""),
            (|r| r.interfaces[1].mac.push(0), "interfaces[1].mac: 7 bytes"),
            (|r| r.interfaces.push(interface("eth1", 1)), "interfaces: \"eth1\": another one"),
            (|r| r.interfaces[1].addresses[0].ip = "10.0.0".into(), "addresses.ip: \"10.0.0\""),
            (|r| r.interfaces[1].addresses[0].prefix_len = 33, "prefix_len: 33: is longer"),
            (|r| r.interfaces[1].addresses[0].broadcast = "::".into(), "broadcast: \"::\""),
            (|r| r.routes[0].kind = 2, "routes[0].kind: 2"),
            (|r| r.routes[0].hops.clear(), "routes[0].hops: none"),
            (|r| r.routes[0].hops[0].interface = "x".into(), "hops.interface: \"x\": no interface"),
            (|r| r.routes[0].metrics.extend([(16, 1)]), "routes[0].metrics: 16"),
            (|r| r.neighbours[0].mac.clear(), "neighbours[0].mac: 0 bytes"),
        ];
        for (change, words) in cases {
            let mut request = request();
            change(&mut request);
            let error = Plan::of(&request).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    }

    #[test]
    fn a_request_is_bounded() {
        let mut request = request();
        request.routes = vec![request.routes[0].clone(); MAX_ROUTES + 1];
        assert!(Plan::of(&request).unwrap_err().to_string().contains("too many"));
    }
}

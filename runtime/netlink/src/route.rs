//! Routes (`RTM_*ROUTE`).

use std::net::IpAddr;

use crate::family::{self, INET, INET6, family, octets};
use crate::wire::{self, Message, attributes, flags};
use crate::{NetlinkError, Socket};

const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;

/// Length of `struct rtmsg` and of `struct rtnexthop`.
const INFO: usize = 12;
const HOP: usize = 8;

/// `RTA_*` of linux/rtnetlink.h.
const DESTINATION: u16 = 1;
const OUT_LINK: u16 = 4;
const GATEWAY: u16 = 5;
const PRIORITY: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;
const METRICS: u16 = 8;
const MULTIPATH: u16 = 9;
const TABLE: u16 = 15;
const VIA: u16 = 18;

/// `RTNH_F_ONLINK`, `RTM_F_CLONED`.
const ONLINK: u32 = 4;
const CLONED: u32 = 0x200;

/// `RTAX_CC_ALGO`, the one metric that is a text.
const CONGESTION_CONTROL: u16 = 16;

/// The table of routes that everything is looked up in.
pub const TABLE_MAIN: u32 = 254;

/// Who made a route (`RTPROT_*`): the kernel, of an address.
pub const BY_KERNEL: u8 = 2;
/// The kernel, of a router's word.
pub const BY_ROUTER: u8 = 9;

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads: this network.
    pub destination: IpAddr,
    /// Bits of it that name the network; 0 is everywhere.
    pub prefix_len: u8,
    /// `RTN_*`: a way (1), or that there is none.
    pub kind: u8,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// In which table it is.
    pub table: u32,
    /// Of several to the same network, that with the least is taken.
    pub priority: u32,
    /// The address that is used by who goes there, and has none yet.
    pub source: Option<IpAddr>,
    /// `RTAX_*` and their values, e.g. the MTU (2).
    pub metrics: Vec<(u16, u32)>,
    /// The next steps: one; more, to share the load; none, if there is no way.
    pub hops: Vec<Hop>,
}

/// A next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The interface's number.
    pub link: u32,
    /// Who carries it on; `None` if the destination is on the interface's own network.
    pub gateway: Option<IpAddr>,
    /// Whether the gateway is on that network although no address says so.
    pub onlink: bool,
    /// Its share among several, less one.
    pub weight: u8,
}

impl Hop {
    /// The attribute of its gateway, which may be of another family than the destination.
    fn gateway_attribute(&self, destination: IpAddr, message: &mut Message) {
        let Some(gateway) = self.gateway else { return };
        if family(gateway) == family(destination) {
            message.attribute(GATEWAY, &octets(gateway));
        } else {
            let mut via = u16::from(family(gateway)).to_ne_bytes().to_vec();
            via.extend(octets(gateway));
            message.attribute(VIA, &via);
        }
    }

    fn flags(&self) -> u32 {
        if self.onlink { ONLINK } else { 0 }
    }

    /// As one of several: `struct rtnexthop` and attributes.
    fn bytes(&self, destination: IpAddr) -> Vec<u8> {
        let mut gateway = Message::new(0, 0, &[]);
        self.gateway_attribute(destination, &mut gateway);
        let length = u16::try_from(HOP.saturating_add(gateway.body().len())).unwrap_or(u16::MAX);
        let [flags, ..] = self.flags().to_le_bytes();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([flags, self.weight]);
        bytes.extend(self.link.to_ne_bytes());
        bytes.extend_from_slice(gateway.body());
        bytes
    }
}

impl Route {
    fn message(&self, kind: u16, flags: u16) -> Message {
        let Route { destination, prefix_len, source, table, .. } = self;
        let single = (self.hops.len() == 1).then(|| self.hops.first()).flatten();
        // One with a greater number is in the attribute, and 0 (RT_TABLE_UNSPEC) here.
        let small_table = u8::try_from(*table).unwrap_or_default();
        let mut fixed = vec![family(*destination), *prefix_len, 0, 0];
        fixed.extend([small_table, self.protocol, self.scope, self.kind]);
        fixed.extend(single.map_or(0, Hop::flags).to_ne_bytes());
        let mut message = Message::new(kind, flags, &fixed);
        message.u32(TABLE, *table);
        if *prefix_len > 0 {
            message.attribute(DESTINATION, &octets(*destination));
        }
        if self.priority > 0 {
            message.u32(PRIORITY, self.priority);
        }
        if let Some(source) = source {
            message.attribute(PREFERRED_SOURCE, &octets(*source));
        }
        if !self.metrics.is_empty() {
            message.nested(METRICS, |metrics| {
                for (kind, value) in &self.metrics {
                    metrics.u32(*kind, *value);
                }
            });
        }
        match single {
            Some(hop) => {
                message.u32(OUT_LINK, hop.link);
                hop.gateway_attribute(*destination, &mut message);
            }
            None if !self.hops.is_empty() => {
                let all: Vec<u8> =
                    self.hops.iter().flat_map(|hop| hop.bytes(*destination)).collect();
                message.attribute(MULTIPATH, &all);
            }
            None => {}
        }
        message
    }
}

fn gateway_in(kind: u16, value: &[u8]) -> Option<IpAddr> {
    match kind {
        GATEWAY => family::address(value),
        VIA => family::address(value.get(2..)?),
        _ => None,
    }
}

/// The steps of a route that has several.
fn read_hops(mut bytes: &[u8]) -> Option<Vec<Hop>> {
    let mut hops = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(wire::u16_at(bytes, 0)?);
        let [flags, weight] = *bytes.get(2..4)?.first_chunk()?;
        let inner = bytes.get(HOP..length)?;
        hops.push(Hop {
            link: wire::u32_at(bytes, 4)?,
            gateway: attributes(inner).find_map(|(kind, value)| gateway_in(kind, value)),
            onlink: u32::from(flags) & ONLINK != 0,
            weight,
        });
        // The last one need not be padded.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(hops)
}

fn read(body: &[u8]) -> Option<Route> {
    let [family, prefix_len, _, _, small_table, protocol, scope, kind] = *body.first_chunk()?;
    let flags = wire::u32_at(body, 8)?;
    if !matches!(family, INET | INET6) || flags & CLONED != 0 {
        return None;
    }
    let mut route = Route {
        destination: family::unspecified(family)?,
        prefix_len,
        kind,
        scope,
        protocol,
        table: small_table.into(),
        priority: 0,
        source: None,
        metrics: Vec::new(),
        hops: Vec::new(),
    };
    let (mut link, mut gateway) = (None, None);
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            DESTINATION => route.destination = family::address(value)?,
            OUT_LINK => link = wire::u32_at(value, 0),
            GATEWAY | VIA => gateway = gateway_in(kind, value),
            PRIORITY => route.priority = wire::u32_at(value, 0)?,
            PREFERRED_SOURCE => route.source = family::address(value),
            METRICS => {
                let known = |(kind, value): (u16, &[u8])| {
                    (kind != CONGESTION_CONTROL).then(|| Some((kind, wire::u32_at(value, 0)?)))?
                };
                route.metrics = attributes(value).filter_map(known).collect();
            }
            MULTIPATH => route.hops = read_hops(value)?,
            TABLE => route.table = wire::u32_at(value, 0)?,
            _ => {}
        }
    }
    if let Some(link) = link {
        route.hops.push(Hop { link, gateway, onlink: flags & ONLINK != 0, weight: 0 });
    }
    Some(route)
}

/// All routes of all tables.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(socket: &mut Socket) -> Result<Vec<Route>, NetlinkError> {
    socket.dump(&Message::new(GET_ROUTE, flags::DUMP, &[0; INFO]), read)
}

/// Adds a route, in place of one to the same network with the same priority.
///
/// # Errors
/// [`NetlinkError`].
pub fn set(socket: &mut Socket, route: &Route) -> Result<(), NetlinkError> {
    socket.request(&route.message(NEW_ROUTE, flags::CREATE | flags::REPLACE))
}

/// Removes a route.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove(socket: &mut Socket, route: &Route) -> Result<(), NetlinkError> {
    socket.request(&route.message(DEL_ROUTE, 0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(v6: bool) -> impl Strategy<Value = IpAddr> {
        if v6 {
            any::<[u8; 16]>().prop_map(IpAddr::from).boxed()
        } else {
            any::<[u8; 4]>().prop_map(IpAddr::from).boxed()
        }
    }

    fn hop() -> impl Strategy<Value = Hop> {
        let gateway = proptest::option::of(any::<bool>().prop_flat_map(address));
        (1u32.., gateway, any::<bool>()).prop_map(|(link, gateway, onlink)| Hop {
            link,
            gateway,
            onlink,
            weight: 0,
        })
    }

    fn route() -> impl Strategy<Value = Route> {
        let hops = proptest::collection::vec(hop(), 0..4);
        let metrics = proptest::collection::vec((1u16..CONGESTION_CONTROL, any::<u32>()), 0..3);
        (any::<bool>(), 1u8..33, hops, metrics, any::<u32>(), any::<[u8; 3]>()).prop_flat_map(
            |(v6, prefix_len, hops, metrics, number, [kind, scope, protocol])| {
                (address(v6), proptest::option::of(address(v6))).prop_map(
                    move |(destination, source)| Route {
                        destination,
                        prefix_len,
                        kind,
                        scope,
                        protocol,
                        table: number,
                        priority: number,
                        source,
                        metrics: metrics.clone(),
                        hops: hops.clone(),
                    },
                )
            },
        )
    }

    proptest! {
        #[test]
        fn a_route_is_read_as_it_was_written(route in route()) {
            let message = route.message(NEW_ROUTE, 0);
            prop_assert_eq!(read(message.body()), Some(route));
        }

        #[test]
        fn whatever_comes_is_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let hops = read_hops(&bytes).unwrap_or_default();
            prop_assert!(hops.len() <= bytes.len());
            drop(read(&bytes));
        }
    }
}

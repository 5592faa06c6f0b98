//! The way of a namespace's interfaces into the virtual machine.
//!
//! Every interface that carries Ethernet and is up gets a tap of its own, and traffic control sends
//! what arrives on one out by the other:
//!
//! ```text
//!   network ── veth ══ eth0 ──ingress──▶ redirect ──▶ tap ── descriptor ── husk-vmm ── guest
//!                      eth0 ◀── redirect ◀──ingress── tap
//! ```
//!
//! The interface keeps its addresses (docs/adr/0020): what arrives is redirected before the
//! namespace's own IP sees it, which therefore never answers for them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use husk_netlink::address::Address;
use husk_netlink::link::{self, Link, Mac};
use husk_netlink::neighbour::Neighbour;
use husk_netlink::route::{self, Route};
use husk_netlink::{NetlinkError, Socket, address, neighbour, redirect};

use crate::netns::{Netns, NetnsError};
use crate::sys;

/// Names of our taps begin so; a number follows.
const TAP: &str = "husk-tap";

/// Most interfaces of a pod. Each is a device of the virtual machine.
pub const MAX_INTERFACES: usize = 8;

/// Most things that are said once of one pod's network.
const MAX_SAID: usize = 256;

/// `RTN_UNICAST`, and those that say that there is no way: blackhole, unreachable, prohibit, throw.
const CARRIED_KINDS: [u8; 5] = [1, 6, 7, 8, 9];

/// Why a namespace could not be joined to a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Something about an interface failed.
    #[error("cannot {step} the interface {interface:?} of the pod's network namespace")]
    Interface {
        /// What was done.
        step: &'static str,
        /// To which.
        interface: String,
        /// Why it failed.
        #[source]
        source: NetlinkError,
    },
    /// The namespace could not be looked at.
    #[error("cannot read the {0} of the pod's network namespace")]
    Read(&'static str, #[source] NetlinkError),
    /// A tap cannot be made.
    #[error("cannot make the tap {name:?}; it needs /dev/net/tun")]
    Tap {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An interface cannot be that of a virtual machine.
    #[error(
        "the interface {interface:?} of the pod's network namespace carries no Ethernet (hardware \
         type {hardware}, kind {kind:?}): a virtual machine cannot have it"
    )]
    NotEthernet {
        /// Which.
        interface: String,
        /// `ARPHRD_*`
        hardware: u16,
        /// E.g. `tun`.
        kind: String,
    },
    /// Two interfaces cannot be told apart in the guest.
    #[error(
        "the interfaces {0:?} and {1:?} of the pod's network namespace have the same MAC address"
    )]
    SameMac(String, String),
    /// There are too many.
    #[error("the pod's network namespace has {0} interfaces; a pod has at most {MAX_INTERFACES}")]
    TooMany(usize),
}

/// A network interface of the virtual machine.
#[derive(Debug)]
pub struct Nic {
    /// Name of the interface in the namespace, which is that in the guest, too.
    pub name: String,
    /// Its address, the same on both sides.
    pub mac: Mac,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// The tap, once for each pair of queues. It is gone when all are closed.
    pub taps: Vec<OwnedFd>,
}

/// An interface as it is in the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// What it is.
    pub link: Link,
    /// The addresses that it was given.
    pub addresses: Vec<Address>,
}

/// What of a namespace has to be the same in the guest. Numbers of links are those of `interfaces`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The loopback interface, and those that are joined.
    pub interfaces: Vec<Interface>,
    /// The routes of the main table.
    pub routes: Vec<Route>,
    /// The neighbours that somebody told.
    pub neighbours: Vec<Neighbour>,
}

impl Snapshot {
    /// The addresses by which the pod is reached, in the order of its interfaces.
    #[must_use]
    pub fn pod_addresses(&self) -> Vec<IpAddr> {
        let outer = |interface: &&Interface| interface.link.flags & link::LOOPBACK == 0;
        let own = self.interfaces.iter().filter(outer).flat_map(|interface| &interface.addresses);
        own.filter(|address| address.scope < address::SCOPE_LINK)
            .map(|address| address.ip)
            .collect()
    }
}

/// A namespace that is joined to a virtual machine to come.
#[derive(Debug)]
pub struct Joined {
    /// Its network interfaces.
    pub nics: Vec<Nic>,
    /// What the guest is to be told.
    pub snapshot: Snapshot,
}

/// Joins every interface of a namespace to a tap with this many pairs of queues. Can be repeated:
/// the last one wins. Blocks for moments.
///
/// # Errors
/// [`JoinError`].
pub fn join(netns: &Netns, queue_pairs: usize) -> Result<Joined, JoinError> {
    netns.enter(|| {
        let mut socket = open()?;
        let links = links_to_join(&mut socket)?;
        let snapshot = collect(&mut socket, links, &mut Once::default())?;
        let mut nics = Vec::new();
        for interface in &snapshot.interfaces {
            let Link { name, mac, mtu, .. } = &interface.link;
            // The loopback interface has none that counts.
            if interface.link.flags & link::LOOPBACK == 0
                && let Some(mac) = mac
            {
                let taps = join_one(&mut socket, &interface.link, queue_pairs)?;
                nics.push(Nic { name: name.clone(), mac: *mac, mtu: *mtu, taps });
            }
        }
        Ok(Joined { nics, snapshot })
    })?
}

/// Ends what [`join`] has set up in a namespace that lives on. Blocks for moments.
///
/// # Errors
/// [`JoinError`].
pub fn part(netns: &Netns) -> Result<(), JoinError> {
    netns.enter(|| {
        let mut socket = open()?;
        let links = link::list(&mut socket).map_err(|e| JoinError::Read("interfaces", e))?;
        for link in links.iter().filter(|link| is_joined(link)) {
            redirect::remove(&mut socket, link.index).map_err(on("release", link))?;
        }
        Ok(())
    })?
}

fn open() -> Result<Socket, JoinError> {
    Socket::open().map_err(|source| JoinError::Read("interfaces", source))
}

pub(crate) fn on(step: &'static str, link: &Link) -> impl FnOnce(NetlinkError) -> JoinError {
    let interface = link.name.clone();
    move |source| JoinError::Interface { step, interface, source }
}

/// Whether an interface is one of the pod's: of those that lie in every namespace (tunnels that the
/// kernel makes) none is up.
pub(crate) fn is_joined(link: &Link) -> bool {
    link.flags & link::UP != 0 && link.flags & link::LOOPBACK == 0 && !link.name.starts_with(TAP)
}

/// Whether the guest is told of an interface: of the pod's, and of its own loopback interface.
pub(crate) fn is_told(link: &Link) -> bool {
    link.flags & link::LOOPBACK != 0 || is_joined(link)
}

/// Name of an interface's tap.
pub(crate) fn tap_name(link: &Link) -> String {
    format!("{TAP}{}", link.index)
}

/// Remembers what was said, so that it is said once.
#[derive(Debug, Default)]
pub(crate) struct Once(BTreeSet<String>);

impl Once {
    /// Whether this is to be said. Nothing is any more when much has been.
    pub(crate) fn is_new(&mut self, what: String) -> bool {
        self.0.len() < MAX_SAID && self.0.insert(what)
    }
}

fn join_one(
    socket: &mut Socket,
    link: &Link,
    queue_pairs: usize,
) -> Result<Vec<OwnedFd>, JoinError> {
    let name = tap_name(link);
    let pairs = queue_pairs.max(1);
    let taps: Vec<OwnedFd> = (0..pairs)
        .map(|_| sys::open_tap(&name, pairs > 1))
        .collect::<Result<_, _>>()
        .map_err(|source| JoinError::Tap { name: name.clone(), source })?;
    let links = link::list(socket).map_err(|e| JoinError::Read("interfaces", e))?;
    let tap = links.into_iter().find(|other| other.name == name).ok_or_else(|| JoinError::Tap {
        name: name.clone(),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    // It has no business of its own with the guest. (Without IPv6 there is nothing to forbid.)
    if let Err(error) = link::without_own_address(socket, tap.index) {
        tracing::debug!(%error, "the tap may have an IPv6 address of its own");
    }
    link::set_mtu(socket, tap.index, link.mtu).map_err(on("set the MTU of", &tap))?;
    link::set_flags(socket, tap.index, link::UP, link::UP).map_err(on("bring up", &tap))?;
    redirect::set(socket, link.index, tap.index).map_err(on("redirect", link))?;
    redirect::set(socket, tap.index, link.index).map_err(on("redirect", &tap))?;
    Ok(taps)
}

/// The interfaces that the guest is to have.
fn links_to_join(socket: &mut Socket) -> Result<Vec<Link>, JoinError> {
    let all = link::list(socket).map_err(|e| JoinError::Read("interfaces", e))?;
    let mut links: Vec<Link> = Vec::new();
    for link in all.into_iter().filter(is_told) {
        if is_joined(&link) {
            check(&link, &links)?;
        }
        links.push(link);
    }
    let joined = links.iter().filter(|link| is_joined(link)).count();
    if joined > MAX_INTERFACES {
        return Err(JoinError::TooMany(joined));
    }
    Ok(links)
}

/// Reads what has to be carried into a guest that has these interfaces.
pub(crate) fn collect(
    socket: &mut Socket,
    links: Vec<Link>,
    once: &mut Once,
) -> Result<Snapshot, JoinError> {
    let addresses = address::list(socket).map_err(|e| JoinError::Read("addresses", e))?;
    let routes = route::list(socket).map_err(|e| JoinError::Read("routes", e))?;
    let neighbours = neighbour::list(socket).map_err(|e| JoinError::Read("neighbours", e))?;
    let known = |index: u32| links.iter().any(|link| link.index == index && is_joined(link));
    let routes = routes.into_iter().filter(|route| is_carried(route, &links, once)).collect();
    let neighbours = neighbours.into_iter().filter(|n| known(n.link)).collect();
    let mut interfaces = Vec::new();
    for link in &links {
        let own = addresses.iter().filter(|address| address.link == link.index);
        let given = own.filter(|address| is_given(address, link, once)).cloned().collect();
        interfaces.push(Interface { link: link.clone(), addresses: given });
    }
    Ok(Snapshot { interfaces, routes, neighbours })
}

/// Whether an interface can be one of a virtual machine, beside those before it.
fn check(link: &Link, before: &[Link]) -> Result<(), JoinError> {
    if link.hardware != link::ETHERNET || link.mac.is_none() {
        let (interface, kind) = (link.name.clone(), link.kind.clone());
        return Err(JoinError::NotEthernet { interface, hardware: link.hardware, kind });
    }
    match before.iter().find(|other| is_joined(other) && other.mac == link.mac) {
        Some(other) => Err(JoinError::SameMac(other.name.clone(), link.name.clone())),
        None => Ok(()),
    }
}

/// Whether somebody gave the interface this address: the guest's kernel makes the others itself.
fn is_given(address: &Address, link: &Link, once: &mut Once) -> bool {
    if address.ip.is_loopback() && link.flags & link::LOOPBACK != 0 {
        return false;
    }
    if address.flags & address::PERMANENT == 0 {
        // Of a router's word, which reaches the guest, too.
        return false;
    }
    if address.flags & address::DAD_FAILED != 0 {
        if once.is_new(format!("address {}", address.ip)) {
            tracing::warn!(address = %address.ip, interface = link.name, "another host has it");
        }
        return false;
    }
    link.mac.is_none_or(|mac| address.ip != link_local(mac))
}

/// The address that the kernel makes of an Ethernet address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: Mac) -> IpAddr {
    IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Whether a route is to be the same in the guest.
fn is_carried(route: &Route, links: &[Link], once: &mut Once) -> bool {
    let of_kernel = route.protocol == route::BY_KERNEL && is_link_local(route.destination);
    if route.table != route::TABLE_MAIN
        || !CARRIED_KINDS.contains(&route.kind)
        || route.protocol == route::BY_ROUTER
        || of_kernel
    {
        return false;
    }
    let known = |index: u32| links.iter().any(|link| link.index == index);
    let carried = route.hops.iter().all(|hop| known(hop.link));
    let destination = format!("{}/{}", route.destination, route.prefix_len);
    if !carried && once.is_new(format!("route {destination}")) {
        tracing::warn!(
            destination,
            "a route by an interface that the pod does not have is left out"
        );
    }
    carried
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, mac: Mac) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: Some(mac),
            mtu: 1500,
            flags: link::UP,
            hardware: link::ETHERNET,
            kind: "veth".into(),
        }
    }

    fn address(ip: &str, flags: u32) -> Address {
        Address {
            link: 1,
            ip: ip.parse().unwrap(),
            prefix_len: 24,
            peer: None,
            broadcast: None,
            scope: 0,
            flags,
        }
    }

    #[test]
    fn interfaces_that_a_guest_cannot_have_are_named() {
        let one = link(1, [2, 0, 0, 0, 0, 1]);
        check(&one, &[]).unwrap();
        let twin = link(2, [2, 0, 0, 0, 0, 1]);
        let error = check(&twin, std::slice::from_ref(&one)).unwrap_err().to_string();
        assert!(error.contains("\"eth1\" and \"eth2\""), "{error}");
        let tunnel = Link { hardware: 65534, mac: None, kind: "tun".into(), ..one };
        let error = check(&tunnel, &[]).unwrap_err().to_string();
        assert!(error.contains("\"eth1\"") && error.contains("\"tun\""), "{error}");
    }

    #[test]
    fn addresses_that_the_guest_makes_itself_are_not_carried() {
        let link = link(1, [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
        for (ip, flags, carried) in [
            ("10.0.0.2", address::PERMANENT, true),
            ("fd00::2", address::PERMANENT, true),
            ("fd00::3", 0, false),
            ("fd00::4", address::PERMANENT | address::DAD_FAILED, false),
            ("fe80::11:22ff:fe33:4455", address::PERMANENT, false),
            ("fe80::1", address::PERMANENT, true),
        ] {
            assert_eq!(is_given(&address(ip, flags), &link, &mut Once::default()), carried, "{ip}");
        }
    }
}

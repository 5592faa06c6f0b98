//! The pod's network interfaces: made to look as those in the pod's network namespace on the host.
//!
//! [`plan`] reads what is told, [`Network`] applies it by netlink ([`husk_netlink`]), in this order:
//! interfaces with their addresses come up, then what is directly reached, then what is reached by
//! way of that. What was told before, and is not told any more, is taken back, and an interface goes
//! down; what containers have made is never touched.

mod plan;

use std::sync::{Arc, Mutex};

use husk_netlink::address::{self, Address};
use husk_netlink::link::{self, Link};
use husk_netlink::neighbour::{self, Neighbour};
use husk_netlink::route::{self, Route};
use husk_netlink::{NetlinkError, Socket};
use husk_proto::agent::UpdateNetworkRequest;
use rustix::io::Errno;

use self::plan::{FieldError, Plan, Planned};
use crate::lock;

/// What is not there can be taken back: addresses, routes and neighbours go with others, and with
/// their interface.
const GONE: [Errno; 4] = [Errno::ADDRNOTAVAIL, Errno::SRCH, Errno::NOENT, Errno::NODEV];

/// A network that is not as it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("interfaces: {name:?}: there is no interface with the MAC address {mac}")]
    NoInterface { name: String, mac: String },
    #[error("interfaces: {name:?}: another interface, {mac}, has this name")]
    NameTaken { name: String, mac: String },
    #[error("interface {interface:?}: cannot {what}")]
    Kernel {
        interface: String,
        what: String,
        #[source]
        source: NetlinkError,
    },
    #[error("cannot read the guest's interfaces")]
    Read(#[source] NetlinkError),
}

/// What has been told and applied, with the guest's own numbers of interfaces.
#[derive(Debug, Default)]
struct Applied {
    /// All but the loopback interface.
    links: Vec<u32>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// The pod's network. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Network(Arc<Mutex<Applied>>);

impl Network {
    /// Applies what is told. Takes moments.
    ///
    /// # Errors
    /// [`NetError`]; what was applied so far stays, and the same call can be tried again.
    pub(crate) fn update(&self, request: &UpdateNetworkRequest) -> Result<(), NetError> {
        let plan = Plan::of(request)?;
        let mut socket = Socket::open().map_err(NetError::Read)?;
        let links = set_links(&mut socket, &plan.interfaces)?;
        let wanted = Applied::of(&plan, &links);
        let mut applied = lock(&self.0);
        applied.take_back(&mut socket, &wanted, &plan)?;
        // Whatever fails from here on, it may be there.
        *applied = wanted;
        applied.set(&mut socket, &plan, &links)
    }
}

/// Checks a request without applying it.
#[cfg(feature = "fuzzing")]
pub(crate) fn check(request: &UpdateNetworkRequest) -> Result<(), NetError> {
    Ok(Plan::of(request).map(drop)?)
}

fn failed(interface: &str, what: impl Into<String>) -> impl FnOnce(NetlinkError) -> NetError {
    let (interface, what) = (interface.to_owned(), what.into());
    move |source| NetError::Kernel { interface, what, source }
}

/// Finds the interfaces, and gives them their names and MTUs. Their numbers, in the plan's order.
fn set_links(socket: &mut Socket, planned: &[Planned]) -> Result<Vec<u32>, NetError> {
    let links = link::list(socket).map_err(NetError::Read)?;
    let mut found = Vec::new();
    for Planned { name, mac, .. } in planned {
        let is_it = |link: &&Link| match mac {
            Some(_) => link.mac == *mac && link.flags & link::LOOPBACK == 0,
            None => link.flags & link::LOOPBACK != 0,
        };
        let missing = || NetError::NoInterface { name: name.clone(), mac: show(*mac) };
        found.push(links.iter().find(is_it).ok_or_else(missing)?);
    }
    let is_ours = |link: &Link| found.iter().any(|ours| ours.index == link.index);
    for Planned { name, .. } in planned {
        if let Some(other) = links.iter().find(|link| link.name == *name && !is_ours(link)) {
            return Err(NetError::NameTaken { name: name.clone(), mac: show(other.mac) });
        }
    }
    // In two steps, because they may have each other's names. Only one that is down can be renamed.
    let renamed = || planned.iter().zip(&found).filter(|(new, link)| new.name != link.name);
    for (new, link) in renamed() {
        link::set_flags(socket, link.index, 0, link::UP)
            .map_err(failed(&new.name, "bring it down"))?;
        let between = format!("husk-new{}", link.index);
        link::rename(socket, link.index, &between).map_err(failed(&new.name, "rename it"))?;
    }
    for (new, link) in renamed() {
        link::rename(socket, link.index, &new.name).map_err(failed(&new.name, "rename it"))?;
    }
    for (Planned { name, mtu, .. }, link) in planned.iter().zip(&found) {
        if *mtu != 0 && *mtu != link.mtu {
            let what = format!("set its MTU to {mtu}");
            link::set_mtu(socket, link.index, *mtu).map_err(failed(name, what))?;
        }
    }
    Ok(found.iter().map(|link| link.index).collect())
}

fn show(mac: Option<link::Mac>) -> String {
    let Some(mac) = mac else { return "of the loopback interface".to_owned() };
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn show_address(Address { ip, prefix_len, .. }: &Address) -> String {
    format!("the address {ip}/{prefix_len}")
}

fn show_route(Route { destination, prefix_len, hops, .. }: &Route) -> String {
    let by: Vec<_> = hops.iter().filter_map(|hop| Some(format!(" via {}", hop.gateway?))).collect();
    format!("the route to {destination}/{prefix_len}{}", by.concat())
}

impl Applied {
    /// A plan with the numbers of these interfaces.
    fn of(plan: &Plan, links: &[u32]) -> Self {
        // The plan's numbers are places in its own list.
        let number = |at: u32| {
            usize::try_from(at).ok().and_then(|at| links.get(at).copied()).unwrap_or_default()
        };
        let Plan { interfaces, routes, neighbours } = plan;
        let addresses = interfaces.iter().flat_map(|planned| &planned.addresses);
        let outer = interfaces.iter().zip(links).filter(|(planned, _)| planned.mac.is_some());
        Applied {
            links: outer.map(|(_, link)| *link).collect(),
            addresses: addresses
                .map(|address| Address { link: number(address.link), ..address.clone() })
                .collect(),
            routes: routes
                .iter()
                .map(|route| {
                    let mut route = route.clone();
                    route.hops.iter_mut().for_each(|hop| hop.link = number(hop.link));
                    route
                })
                .collect(),
            neighbours: neighbours
                .iter()
                .map(|neighbour| Neighbour { link: number(neighbour.link), ..neighbour.clone() })
                .collect(),
        }
    }

    /// Takes back what is not wanted any more.
    fn take_back(
        &self,
        socket: &mut Socket,
        wanted: &Applied,
        plan: &Plan,
    ) -> Result<(), NetError> {
        let gone = |result| NetlinkError::tolerate(result, &GONE);
        let everywhere = plan.interfaces.first().map_or("", |planned| &planned.name);
        for route in self.routes.iter().filter(|route| !wanted.routes.contains(route)) {
            let what = format!("remove {}", show_route(route));
            gone(route::remove(socket, route)).map_err(failed(everywhere, what))?;
        }
        for old in self.neighbours.iter().filter(|old| !wanted.neighbours.contains(old)) {
            let what = format!("remove the neighbour {}", old.ip);
            gone(neighbour::remove(socket, old)).map_err(failed(everywhere, what))?;
        }
        for old in self.addresses.iter().filter(|old| !wanted.addresses.contains(old)) {
            let what = format!("remove {}", show_address(old));
            gone(address::remove(socket, old)).map_err(failed(everywhere, what))?;
        }
        for old in self.links.iter().filter(|old| !wanted.links.contains(old)) {
            let what = format!("bring the interface {old} down");
            let down = link::set_flags(socket, *old, 0, link::UP);
            gone(down).map_err(failed(everywhere, what))?;
        }
        Ok(())
    }

    /// Makes everything be there.
    fn set(&self, socket: &mut Socket, plan: &Plan, links: &[u32]) -> Result<(), NetError> {
        let name = |index: u32| {
            let mut named = plan.interfaces.iter().zip(links);
            let found = named.find(|(_, link)| **link == index);
            found.map_or("", |(planned, _)| planned.name.as_str())
        };
        for address in &self.addresses {
            let what = format!("set {}", show_address(address));
            address::set(socket, address).map_err(failed(name(address.link), what))?;
        }
        for (planned, index) in plan.interfaces.iter().zip(links) {
            let no_arp = if planned.no_arp { link::NO_ARP } else { 0 };
            // What the loopback interface has of this is not to be changed.
            let mask = if planned.mac.is_some() { link::NO_ARP } else { 0 };
            link::set_flags(socket, *index, link::UP | no_arp & mask, link::UP | mask)
                .map_err(failed(&planned.name, "bring it up"))?;
        }
        for neighbour in &self.neighbours {
            let what = format!("set the neighbour {}", neighbour.ip);
            neighbour::set(socket, neighbour).map_err(failed(name(neighbour.link), what))?;
        }
        // A gateway has to be reached before there can be a route by way of it.
        let is_direct = |route: &&Route| route.hops.iter().all(|hop| hop.gateway.is_none());
        let (direct, others): (Vec<_>, Vec<_>) = self.routes.iter().partition(is_direct);
        for route in direct.into_iter().chain(others) {
            let interface = route.hops.first().map_or("", |hop| name(hop.link));
            let what = format!("set {}", show_route(route));
            route::set(socket, route).map_err(failed(interface, what))?;
        }
        Ok(())
    }
}

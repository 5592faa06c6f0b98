//! Addresses of interfaces (`RTM_*ADDR`).

use std::net::{IpAddr, Ipv4Addr};

use crate::family::{self, family, octets};
use crate::wire::{self, Message, attributes, flags};
use crate::{NetlinkError, Socket};

const NEW_ADDRESS: u16 = 20;
const DEL_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;

/// Length of `struct ifaddrmsg`.
const INFO: usize = 8;

/// `IFA_*` of linux/if_addr.h.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const FLAGS: u16 = 8;

/// Flags of an address (`IFA_F_*`): it is used without asking whether another has it.
pub const NO_DAD: u32 = 0x02;
/// Another has it already.
pub const DAD_FAILED: u32 = 0x08;
/// It stays until it is removed.
pub const PERMANENT: u32 = 0x80;
/// The kernel makes no route for its network.
pub const NO_PREFIX_ROUTE: u32 = 0x200;

/// `RT_SCOPE_LINK`: it means something on its own network only.
pub const SCOPE_LINK: u8 = 253;

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// Bits of it that name the network.
    pub prefix_len: u8,
    /// The other end, of an interface that has just one.
    pub peer: Option<IpAddr>,
    /// The address of all on its network; IPv4 only.
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// `IFA_F_*`
    pub flags: u32,
}

impl Address {
    fn message(&self, kind: u16, flags: u16) -> Message {
        let Address { link, ip, prefix_len, peer, broadcast, scope, flags: own } = self;
        // All of them are in the attribute; the field of old has room for the lowest eight.
        let [low, ..] = own.to_le_bytes();
        let mut fixed = vec![family(*ip), *prefix_len, low, *scope];
        fixed.extend_from_slice(&link.to_ne_bytes());
        let mut message = Message::new(kind, flags, &fixed);
        message.attribute(LOCAL, &octets(*ip));
        message.attribute(ADDRESS, &octets(peer.unwrap_or(*ip)));
        if let Some(broadcast) = broadcast {
            message.attribute(BROADCAST, &broadcast.octets());
        }
        message.u32(FLAGS, *own);
        message
    }
}

fn read(body: &[u8]) -> Option<Address> {
    let [_family, prefix_len, low_flags, scope] = *body.first_chunk()?;
    let (mut local, mut other) = (None, None);
    let mut broadcast = None;
    let mut flags = u32::from(low_flags);
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            ADDRESS => other = family::address(value),
            LOCAL => local = family::address(value),
            BROADCAST => broadcast = <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from),
            FLAGS => flags = wire::u32_at(value, 0)?,
            _ => {}
        }
    }
    let ip = local.or(other)?;
    let peer = other.filter(|other| *other != ip);
    Some(Address { link: wire::u32_at(body, 4)?, ip, prefix_len, peer, broadcast, scope, flags })
}

/// All addresses of all interfaces.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(socket: &mut Socket) -> Result<Vec<Address>, NetlinkError> {
    socket.dump(&Message::new(GET_ADDRESS, flags::DUMP, &[0; INFO]), read)
}

/// Gives an interface an address, or changes what is said of one that it has.
///
/// # Errors
/// [`NetlinkError`].
pub fn set(socket: &mut Socket, address: &Address) -> Result<(), NetlinkError> {
    socket.request(&address.message(NEW_ADDRESS, flags::CREATE | flags::REPLACE))
}

/// Takes an address away.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove(socket: &mut Socket, address: &Address) -> Result<(), NetlinkError> {
    socket.request(&address.message(DEL_ADDRESS, 0))
}

//! Interfaces (`RTM_*LINK`).

use crate::wire::{self, Message, attributes, flags};
use crate::{NetlinkError, Socket};

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const GET_LINK: u16 = 18;

/// Length of `struct ifinfomsg`.
const INFO: usize = 16;

/// `IFLA_*` of linux/if_link.h.
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const LINK_INFO: u16 = 18;
const AF_SPEC: u16 = 26;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INET6_ADDRESS_MODE: u16 = 8;
/// `VETH_INFO_PEER`
const VETH_PEER: u16 = 1;

/// `IN6_ADDR_GEN_MODE_NONE`
const MODE_NONE: u8 = 1;

/// Flags of an interface (`IFF_*`).
pub const UP: u32 = 0x1;
/// It is the loopback interface.
pub const LOOPBACK: u32 = 0x8;
/// It has no neighbours to ask for: no ARP, no neighbour discovery.
pub const NO_ARP: u32 = 0x80;

/// `ARPHRD_ETHER`: an interface that carries Ethernet frames.
pub const ETHERNET: u16 = 1;

/// Address of an Ethernet interface.
pub type Mac = [u8; 6];

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// By which the kernel knows it.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its address, if that is an Ethernet one.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// `IFF_*`
    pub flags: u32,
    /// `ARPHRD_*`
    pub hardware: u16,
    /// Of which kind it is, e.g. `veth`; empty for a device.
    pub kind: String,
}

fn info(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&index.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&change.to_ne_bytes());
    bytes
}

fn read(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: wire::u32_at(body, 4)?,
        name: String::new(),
        mac: None,
        mtu: 0,
        flags: wire::u32_at(body, 8)?,
        hardware: wire::u16_at(body, 2)?,
        kind: String::new(),
    };
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            ADDRESS => link.mac = value.try_into().ok(),
            NAME => link.name = wire::text(value),
            MTU => link.mtu = wire::u32_at(value, 0)?,
            LINK_INFO => {
                let inner = attributes(value).find(|(kind, _)| *kind == INFO_KIND);
                link.kind = inner.map(|(_, value)| wire::text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

/// All interfaces, in the order of their numbers.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(socket: &mut Socket) -> Result<Vec<Link>, NetlinkError> {
    let mut links = socket.dump(&Message::new(GET_LINK, flags::DUMP, &info(0, 0, 0)), read)?;
    links.sort_by_key(|link| link.index);
    Ok(links)
}

/// Sets and clears flags (`IFF_*`) of an interface: those of `mask`, to what `flags` has of them.
///
/// # Errors
/// [`NetlinkError`].
pub fn set_flags(
    socket: &mut Socket,
    index: u32,
    flags: u32,
    mask: u32,
) -> Result<(), NetlinkError> {
    socket.request(&Message::new(NEW_LINK, 0, &info(index, flags, mask)))
}

/// Renames an interface, which must be down on older kernels.
///
/// # Errors
/// [`NetlinkError`].
pub fn rename(socket: &mut Socket, index: u32, name: &str) -> Result<(), NetlinkError> {
    let mut message = Message::new(NEW_LINK, 0, &info(index, 0, 0));
    socket.request(message.text(NAME, name))
}

/// Sets the size of the largest packet, in bytes.
///
/// # Errors
/// [`NetlinkError`].
pub fn set_mtu(socket: &mut Socket, index: u32, mtu: u32) -> Result<(), NetlinkError> {
    let mut message = Message::new(NEW_LINK, 0, &info(index, 0, 0));
    socket.request(message.u32(MTU, mtu))
}

/// Keeps the kernel from giving an interface an IPv6 address by itself.
///
/// # Errors
/// [`NetlinkError`]; `EAFNOSUPPORT` and the like if the kernel has no IPv6.
pub fn without_own_address(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    let mut message = Message::new(NEW_LINK, 0, &info(index, 0, 0));
    message.nested(AF_SPEC, |families| {
        families.nested(crate::family::INET6.into(), |inet6| {
            inet6.attribute(INET6_ADDRESS_MODE, &[MODE_NONE]);
        });
    });
    socket.request(&message)
}

/// Makes a pair of interfaces, each of which gets what is sent on the other.
///
/// # Errors
/// [`NetlinkError`].
pub fn add_veth(socket: &mut Socket, name: &str, peer: &str) -> Result<(), NetlinkError> {
    let mut message = Message::new(NEW_LINK, flags::CREATE | flags::EXCL, &info(0, 0, 0));
    message.text(NAME, name).nested(LINK_INFO, |link| {
        link.text(INFO_KIND, "veth").nested(INFO_DATA, |data| {
            // The peer is told as a whole message of its own.
            let mut other = info(0, 0, 0);
            let mut name = Message::new(0, 0, &[]);
            name.text(NAME, peer);
            other.extend_from_slice(name.body());
            data.attribute(VETH_PEER, &other);
        });
    });
    socket.request(&message)
}

/// Removes an interface.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    socket.request(&Message::new(DEL_LINK, 0, &info(index, 0, 0)))
}

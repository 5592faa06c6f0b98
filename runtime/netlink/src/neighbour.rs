//! Neighbours of interfaces (`RTM_*NEIGH`): which address is where on the network.

use std::net::IpAddr;

use crate::family::{self, family, octets};
use crate::link::Mac;
use crate::wire::{self, Message, attributes, flags};
use crate::{NetlinkError, Socket};

const NEW_NEIGHBOUR: u16 = 28;
const DEL_NEIGHBOUR: u16 = 29;
const GET_NEIGHBOUR: u16 = 30;

/// Length of `struct ndmsg`.
const INFO: usize = 12;

/// `NDA_*` and `NUD_*` of linux/neighbour.h.
const DESTINATION: u16 = 1;
const LINK_ADDRESS: u16 = 2;
const PERMANENT: u16 = 0x80;

/// A neighbour that was told, not found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub link: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Where it is.
    pub mac: Mac,
}

impl Neighbour {
    fn message(&self, kind: u16, flags: u16) -> Message {
        let Neighbour { link, ip, mac } = self;
        let mut fixed = vec![family(*ip), 0, 0, 0];
        fixed.extend_from_slice(&link.to_ne_bytes());
        fixed.extend_from_slice(&PERMANENT.to_ne_bytes());
        fixed.extend_from_slice(&[0, 0]);
        let mut message = Message::new(kind, flags, &fixed);
        message.attribute(DESTINATION, &octets(*ip)).attribute(LINK_ADDRESS, mac);
        message
    }
}

fn read(body: &[u8]) -> Option<Neighbour> {
    if wire::u16_at(body, 8)? != PERMANENT {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            DESTINATION => ip = family::address(value),
            LINK_ADDRESS => mac = value.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { link: wire::u32_at(body, 4)?, ip: ip?, mac: mac? })
}

/// All neighbours that were told.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(socket: &mut Socket) -> Result<Vec<Neighbour>, NetlinkError> {
    socket.dump(&Message::new(GET_NEIGHBOUR, flags::DUMP, &[0; INFO]), read)
}

/// Tells where a neighbour is.
///
/// # Errors
/// [`NetlinkError`].
pub fn set(socket: &mut Socket, neighbour: &Neighbour) -> Result<(), NetlinkError> {
    socket.request(&neighbour.message(NEW_NEIGHBOUR, flags::CREATE | flags::REPLACE))
}

/// Forgets a neighbour.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove(socket: &mut Socket, neighbour: &Neighbour) -> Result<(), NetlinkError> {
    socket.request(&neighbour.message(DEL_NEIGHBOUR, 0))
}

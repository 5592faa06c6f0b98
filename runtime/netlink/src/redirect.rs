//! Redirection (`RTM_*QDISC`, `RTM_*TFILTER`): everything that arrives on one interface leaves by
//! another, before the rest of the kernel sees it.
//!
//! It is what `tc qdisc add dev A ingress` and `tc filter add dev A ingress prio 1 u32 match u8 0 0
//! action mirred egress redirect dev B` do. u32 and not matchall, because every kernel that can
//! redirect has it.

use rustix::io::Errno;

use crate::wire::{Message, flags};
use crate::{NetlinkError, Socket};

const NEW_QDISC: u16 = 36;
const DEL_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;
const DEL_FILTER: u16 = 45;

/// The queueing discipline `ingress`, and the place of filters for what arrives: the same in it and
/// in `clsact`, which another program may have put there.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const ARRIVING: u32 = 0xffff_fff2;

/// Of all filters, the first that is asked.
const PRIORITY: u32 = 1;

/// `ETH_P_ALL`. The kernel wants it in the network's byte order: in the other one the filter is
/// taken, and matches nothing.
const ALL_PROTOCOLS: u16 = 0x0003u16.to_be();

/// `TCA_*` of linux/rtnetlink.h, linux/pkt_cls.h and linux/tc_act/tc_mirred.h.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const U32_SELECTOR: u16 = 5;
const U32_ACTION: u16 = 7;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;

/// `TC_U32_TERMINAL`, `TC_ACT_STOLEN`, `TCA_EGRESS_REDIR`.
const TERMINAL: u8 = 1;
const STOLEN: u32 = 4;
const EGRESS_REDIRECT: u32 = 1;

/// `struct tcmsg`
fn info(link: u32, handle: u32, parent: u32, rest: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    for number in [link, handle, parent, rest] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

/// `struct tc_u32_sel` with one `struct tc_u32_key` that looks at nothing.
fn match_everything() -> Vec<u8> {
    let mut bytes = vec![0; 32];
    for (at, value) in [(0, TERMINAL), (2, 1)] {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
    }
    bytes
}

/// `struct tc_mirred`
fn redirect_to(link: u32) -> Vec<u8> {
    [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, link].iter().flat_map(|n: &u32| n.to_ne_bytes()).collect()
}

fn filter_info(link: u32) -> Vec<u8> {
    info(link, 0, ARRIVING, PRIORITY << 16 | u32::from(ALL_PROTOCOLS))
}

/// Sends everything that arrives on `from` out by `to`, in place of an earlier redirection.
///
/// # Errors
/// [`NetlinkError`]; `ENOENT` if the kernel lacks a part of it.
pub fn set(socket: &mut Socket, from: u32, to: u32) -> Result<(), NetlinkError> {
    let fixed = info(from, INGRESS_HANDLE, INGRESS, 0);
    let mut qdisc = Message::new(NEW_QDISC, flags::CREATE | flags::EXCL, &fixed);
    qdisc.text(KIND, "ingress");
    NetlinkError::tolerate(socket.request(&qdisc), &[Errno::EXIST])?;
    remove(socket, from)?;
    let mut filter = Message::new(NEW_FILTER, flags::CREATE | flags::EXCL, &filter_info(from));
    filter.text(KIND, "u32").nested(OPTIONS, |options| {
        options.attribute(U32_SELECTOR, &match_everything());
        options.nested(U32_ACTION, |actions| {
            actions.nested(1, |action| {
                action.text(ACTION_KIND, "mirred").nested(ACTION_OPTIONS, |mirred| {
                    mirred.attribute(MIRRED_PARAMETERS, &redirect_to(to));
                });
            });
        });
    });
    socket.request(&filter)
}

/// Ends the redirection of what arrives on `from`, if there is one.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove(socket: &mut Socket, from: u32) -> Result<(), NetlinkError> {
    let message = Message::new(DEL_FILTER, 0, &filter_info(from));
    // No such filter; no such place for one; no such interface.
    let fine = [Errno::NOENT, Errno::INVAL, Errno::NODEV];
    NetlinkError::tolerate(socket.request(&message), &fine)
}

/// Removes the place for filters that [`set`] has made, with all filters in it.
///
/// # Errors
/// [`NetlinkError`].
pub fn remove_all(socket: &mut Socket, from: u32) -> Result<(), NetlinkError> {
    let mut message = Message::new(DEL_QDISC, 0, &info(from, INGRESS_HANDLE, INGRESS, 0));
    message.text(KIND, "ingress");
    NetlinkError::tolerate(socket.request(&message), &[Errno::NOENT, Errno::INVAL, Errno::NODEV])
}

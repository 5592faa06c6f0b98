//! The messages of vhost-user (QEMU's docs/interop/vhost-user.rst) that this front-end sends, and the
//! replies that it takes. Pure: what goes over the socket is bytes here.
//!
//! The front-end is ours, not the `vhost` crate's, because that one waits for a reply without a limit
//! and tries again when a timeout of the socket ends the wait. And there is little of it.

use std::os::fd::RawFd;

/// Bytes of a message's header: request, flags, length of the payload.
pub const HEADER_LEN: usize = 12;

/// Version of the protocol, in the header's flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The message is a reply.
const FLAG_REPLY: u32 = 1 << 2;
/// A reply is asked for, though the request would have none.
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the virtio features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`, among the protocol's: every request can be acknowledged.
pub const PROTOCOL_F_REPLY_ACK: u64 = 1 << 3;

/// Most regions of guest memory in one message (a descriptor goes with each).
pub const MAX_REGIONS: usize = 8;

/// A range of guest memory, and where it is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address. Also the "user address" by which rings are named to the back-end, so
    /// that it does not learn where memory lies in this process.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// The file.
    pub fd: RawFd,
}

/// The addresses of a queue's three areas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub available: u64,
    /// Device area (used ring).
    pub used: u64,
}

/// What the front-end asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The virtio features on offer. Answered by them.
    GetFeatures,
    /// The virtio features agreed on.
    SetFeatures(u64),
    /// This front-end is the one.
    SetOwner,
    /// Guest memory: at most [`MAX_REGIONS`].
    SetMemTable(Vec<Region>),
    /// A queue's size.
    SetVringNum(u32, u16),
    /// A queue's areas.
    SetVringAddr(u32, Rings),
    /// Where in the available ring a queue begins.
    SetVringBase(u32, u16),
    /// Stops a queue. Answered by where it stopped.
    GetVringBase(u32),
    /// The eventfd by which the guest kicks a queue. From here on it is served, if it is enabled.
    SetVringKick(u32, RawFd),
    /// The eventfd by which the back-end interrupts the guest.
    SetVringCall(u32, RawFd),
    /// The protocol's features on offer. Answered by them.
    GetProtocolFeatures,
    /// The protocol's features agreed on.
    SetProtocolFeatures(u64),
    /// Whether a queue is served.
    SetVringEnable(u32, bool),
}

/// What a reply to a request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A number that is the answer.
    Number,
    /// The state of a queue.
    State,
    /// Zero, or a number that says that it failed.
    Acknowledgement,
}

impl Expected {
    /// Length of the reply's payload. All are the same.
    pub const LEN: usize = 8;
}

/// A reply is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another request's, or no reply.
    #[error("it is no reply to request {expected}: request {request}, flags {flags:#x}")]
    NotAReply {
        /// What was asked.
        expected: u32,
        /// What the header says.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// Its length is not that of such a reply.
    #[error("a reply to request {request} has a length of {len}, not {}", Expected::LEN)]
    Length {
        /// The request.
        request: u32,
        /// The length that the header claims.
        len: u32,
    },
}

impl Request {
    /// Its number.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Request::GetFeatures => 1,
            Request::SetFeatures(_) => 2,
            Request::SetOwner => 3,
            Request::SetMemTable(_) => 5,
            Request::SetVringNum(..) => 8,
            Request::SetVringAddr(..) => 9,
            Request::SetVringBase(..) => 10,
            Request::GetVringBase(_) => 11,
            Request::SetVringKick(..) => 12,
            Request::SetVringCall(..) => 13,
            Request::GetProtocolFeatures => 15,
            Request::SetProtocolFeatures(_) => 16,
            Request::SetVringEnable(..) => 18,
        }
    }

    /// What its reply has. `None`: it has a reply only if acknowledgements were agreed on.
    #[must_use]
    pub fn answer(&self) -> Option<Expected> {
        match self {
            Request::GetFeatures | Request::GetProtocolFeatures => Some(Expected::Number),
            Request::GetVringBase(_) => Some(Expected::State),
            _ => None,
        }
    }

    /// The message, and the descriptors that go with it. With `acknowledge`, one that has no reply
    /// asks for an acknowledgement.
    #[must_use]
    pub fn encode(&self, acknowledge: bool) -> (Vec<u8>, Vec<RawFd>) {
        let mut payload = Payload::default();
        match self {
            Request::GetFeatures | Request::SetOwner | Request::GetProtocolFeatures => {}
            Request::SetFeatures(bits) | Request::SetProtocolFeatures(bits) => payload.u64(*bits),
            Request::SetMemTable(regions) => {
                let regions = regions.get(..MAX_REGIONS).unwrap_or(regions);
                payload.u32(u32::try_from(regions.len()).unwrap_or(0));
                payload.u32(0);
                for Region { address, len, offset, fd } in regions {
                    for number in [*address, *len, *address, *offset] {
                        payload.u64(number);
                    }
                    payload.fds.push(*fd);
                }
            }
            Request::SetVringNum(queue, size) => payload.state(*queue, (*size).into()),
            Request::SetVringAddr(queue, Rings { descriptors, available, used }) => {
                // No flags; and no address of a log.
                payload.state(*queue, 0);
                for address in [*descriptors, *used, *available, 0] {
                    payload.u64(address);
                }
            }
            Request::SetVringBase(queue, base) => payload.state(*queue, (*base).into()),
            Request::GetVringBase(queue) => payload.state(*queue, 0),
            Request::SetVringKick(queue, fd) | Request::SetVringCall(queue, fd) => {
                payload.u64((*queue).into());
                payload.fds.push(*fd);
            }
            Request::SetVringEnable(queue, enabled) => payload.state(*queue, (*enabled).into()),
        }
        let asks = if acknowledge && self.answer().is_none() { FLAG_NEED_REPLY } else { 0 };
        let Payload { bytes, fds } = payload;
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let header = [self.code(), VERSION | asks, len].map(u32::to_ne_bytes).concat();
        ([header, bytes].concat(), fds)
    }

    /// Checks that `header` is that of this request's reply. What follows is [`Expected::LEN`] long.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn check_reply(&self, header: [u8; HEADER_LEN]) -> Result<(), Malformed> {
        let [request, flags, len] = words(header);
        let expected = self.code();
        if request != expected || flags & (VERSION_MASK | FLAG_REPLY) != VERSION | FLAG_REPLY {
            return Err(Malformed::NotAReply { expected, request, flags });
        }
        if usize::try_from(len) != Ok(Expected::LEN) {
            return Err(Malformed::Length { request, len });
        }
        Ok(())
    }
}

fn words([a, b, c, d, e, f, g, h, i, j, k, l]: [u8; HEADER_LEN]) -> [u32; 3] {
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

#[derive(Default)]
struct Payload {
    bytes: Vec<u8>,
    fds: Vec<RawFd>,
}

impl Payload {
    fn u32(&mut self, number: u32) {
        self.bytes.extend(number.to_ne_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.bytes.extend(number.to_ne_bytes());
    }

    fn state(&mut self, queue: u32, number: u32) {
        self.u32(queue);
        self.u32(number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(request: u32, flags: u32, len: u32) -> [u8; HEADER_LEN] {
        [request, flags, len].map(u32::to_ne_bytes).concat().try_into().unwrap()
    }

    #[test]
    fn messages_are_laid_out_as_specified() {
        let (bytes, fds) = Request::GetFeatures.encode(true);
        assert_eq!((bytes, fds), (header(1, 1, 0).to_vec(), vec![]));
        let (bytes, _) = Request::SetOwner.encode(true);
        assert_eq!(bytes, header(3, 9, 0));
        let (bytes, _) = Request::SetOwner.encode(false);
        assert_eq!(bytes, header(3, 1, 0));
        let (bytes, fds) = Request::SetVringCall(1, 7).encode(false);
        assert_eq!(bytes, [header(13, 1, 8).to_vec(), 1_u64.to_ne_bytes().to_vec()].concat());
        assert_eq!(fds, [7]);

        let rings = Rings { descriptors: 0x1000, available: 0x2000, used: 0x3000 };
        let (bytes, _) = Request::SetVringAddr(1, rings).encode(true);
        let numbers = [1, 0x1000, 0x3000, 0x2000, 0_u64].map(u64::to_ne_bytes).concat();
        assert_eq!(bytes, [header(9, 9, 40).to_vec(), numbers].concat());

        let region = Region { address: 1 << 32, len: 0x1000, offset: 0x2000, fd: 9 };
        let (bytes, fds) = Request::SetMemTable(vec![region]).encode(true);
        let numbers = [1, 1 << 32, 0x1000, 1 << 32, 0x2000_u64].map(u64::to_ne_bytes).concat();
        assert_eq!(bytes, [header(5, 9, 40).to_vec(), numbers].concat());
        assert_eq!(fds, [9]);
    }

    #[test]
    fn only_the_reply_to_the_request_is_one() {
        let request = Request::GetFeatures;
        assert_eq!(request.check_reply(header(1, 5, 8)), Ok(()));
        for (code, flags) in [(2, 5), (1, 1), (1, 4), (1, 6)] {
            let refused = request.check_reply(header(code, flags, 8));
            assert_eq!(refused, Err(Malformed::NotAReply { expected: 1, request: code, flags }));
        }
        for len in [0, 7, 9, 4096, u32::MAX] {
            let refused = request.check_reply(header(1, 5, len));
            assert_eq!(refused, Err(Malformed::Length { request: 1, len }));
        }
    }

    proptest! {
        #[test]
        fn any_other_header_is_refused(bytes in any::<[u8; HEADER_LEN]>()) {
            let request = Request::GetVringBase(1);
            let [code, flags, len] = words(bytes);
            let is_reply = code == 11 && flags & 7 == 5 && len == 8;
            prop_assert_eq!(request.check_reply(bytes).is_ok(), is_reply);
        }
    }
}

//! Packets of the vsock device (virtio 1.2, section 5.10.6): pure parsing and encoding.
//!
//! [`Packet::parse`] is the only way by which a guest's bytes become a packet; whatever it returns
//! has been checked, and everything that it refuses says what is owed to the guest.

use super::connection::Key;
use super::state::Directions;

/// Length of `struct virtio_vsock_hdr` in bytes (virtio 1.2, 5.10.6).
pub(super) const HEADER_LEN: usize = 44;

/// Most bytes of payload in one packet. It is what the Linux driver sends at most
/// (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`); a longer packet is a fault of the guest's.
pub(super) const MAX_PAYLOAD: usize = 64 * 1024;

/// The host's context ID (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM` (virtio 1.2, 5.10.6).
const TYPE_STREAM: u16 = 1;

/// `enum virtio_vsock_op` (virtio 1.2, 5.10.6).
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE` (virtio 1.2, 5.10.6.5).
const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND` (virtio 1.2, 5.10.6.5).
const SHUTDOWN_SEND: u32 = 1 << 1;

/// `struct virtio_vsock_hdr`, decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload that follow.
    pub(super) len: u32,
    /// The specification's `type`.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Decodes the header at the start of `bytes`; `None` if they are fewer than [`HEADER_LEN`].
    pub(super) fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (src_cid, rest) = bytes.split_first_chunk()?;
        let (dst_cid, rest) = rest.split_first_chunk()?;
        let (src_port, rest) = rest.split_first_chunk()?;
        let (dst_port, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        let (op, rest) = rest.split_first_chunk()?;
        let (flags, rest) = rest.split_first_chunk()?;
        let (buf_alloc, rest) = rest.split_first_chunk()?;
        let (fwd_cnt, rest) = rest.split_first_chunk()?;
        let header = Header {
            src_cid: u64::from_le_bytes(*src_cid),
            dst_cid: u64::from_le_bytes(*dst_cid),
            src_port: u32::from_le_bytes(*src_port),
            dst_port: u32::from_le_bytes(*dst_port),
            len: u32::from_le_bytes(*len),
            kind: u16::from_le_bytes(*kind),
            op: u16::from_le_bytes(*op),
            flags: u32::from_le_bytes(*flags),
            buf_alloc: u32::from_le_bytes(*buf_alloc),
            fwd_cnt: u32::from_le_bytes(*fwd_cnt),
        };
        Some((header, rest))
    }

    /// The header as the guest reads it.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields = [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The `RST` that answers this packet (virtio 1.2, 5.10.6.4): the addresses exchanged, the type
    /// repeated.
    fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }

    /// A packet without payload from the host to the guest, on the connection `key`.
    pub(super) fn to_guest(guest_cid: u64, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }
}

/// The flags of a `SHUTDOWN` packet that says that its sender is done with `directions`.
pub(super) fn shutdown_flags(directions: Directions) -> u32 {
    let send = if directions.send { SHUTDOWN_SEND } else { 0 };
    let receive = if directions.receive { SHUTDOWN_RECEIVE } else { 0 };
    send | receive
}

/// How much the sender of a packet can still take, as it says in every packet (virtio 1.2,
/// 5.10.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Credit {
    /// The size of its receive buffer.
    pub(super) buf_alloc: u32,
    /// A free-running count of bytes that left that buffer.
    pub(super) fwd_cnt: u32,
}

/// What a packet of the guest's says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op<'a> {
    Request,
    Response,
    Reset,
    Shutdown(Directions),
    Data(&'a [u8]),
    CreditUpdate,
    CreditRequest,
}

/// A packet of the guest's on which everything was checked that can be without knowing the
/// connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) key: Key,
    pub(super) credit: Credit,
    pub(super) op: Op<'a>,
}

/// A packet that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketError {
    /// There is nobody who could be answered.
    #[error("a packet of {held} bytes has no whole header")]
    NoHeader { held: usize },
    /// Answering would let the guest speak for somebody else.
    #[error("the source CID {src_cid} is not the guest's")]
    ForeignSource { src_cid: u64 },
    /// To be answered by `reset`, unless the packet was itself a `RST`; the connection `key`, if
    /// there is one, is over.
    #[error("{fault}")]
    Answerable { fault: PacketFault, reset: Option<Header>, key: Option<Key> },
}

/// What is wrong with a packet whose sender is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketFault {
    #[error("the destination CID {0} is not the host's")]
    Destination(u64),
    #[error("socket type {0} is not a stream")]
    Type(u16),
    #[error("there is no operation {0}")]
    Operation(u16),
    #[error("a packet without data says it has {0} bytes")]
    UnexpectedPayload(u32),
    #[error("{len} bytes of payload, of which {held} are there, at most {MAX_PAYLOAD} allowed")]
    Length { len: u32, held: usize },
}

impl<'a> Packet<'a> {
    /// Checks a packet that the guest at `guest_cid` sent. Bytes after the payload are ignored, as a
    /// buffer may be larger than its packet.
    pub(super) fn parse(bytes: &'a [u8], guest_cid: u64) -> Result<Self, PacketError> {
        let Some((header, rest)) = Header::parse(bytes) else {
            return Err(PacketError::NoHeader { held: bytes.len() });
        };
        if header.src_cid != guest_cid {
            return Err(PacketError::ForeignSource { src_cid: header.src_cid });
        }
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        // Only a packet that is about one of our connections can end it.
        let error = |fault, key| {
            let reset = (header.op != op::RST).then(|| header.reset());
            PacketError::Answerable { fault, reset, key }
        };
        if header.dst_cid != HOST_CID {
            return Err(error(PacketFault::Destination(header.dst_cid), None));
        }
        if header.kind != TYPE_STREAM {
            return Err(error(PacketFault::Type(header.kind), None));
        }
        let payload = payload(&header, rest).map_err(|fault| error(fault, Some(key)))?;
        let op = match header.op {
            op::REQUEST => Op::Request,
            op::RESPONSE => Op::Response,
            op::RST => Op::Reset,
            op::SHUTDOWN => Op::Shutdown(Directions {
                send: header.flags & SHUTDOWN_SEND != 0,
                receive: header.flags & SHUTDOWN_RECEIVE != 0,
            }),
            op::RW => Op::Data(payload),
            op::CREDIT_UPDATE => Op::CreditUpdate,
            op::CREDIT_REQUEST => Op::CreditRequest,
            other => return Err(error(PacketFault::Operation(other), Some(key))),
        };
        let credit = Credit { buf_alloc: header.buf_alloc, fwd_cnt: header.fwd_cnt };
        Ok(Packet { key, credit, op })
    }
}

/// The `header.len` bytes of payload in `rest`.
fn payload<'a>(header: &Header, rest: &'a [u8]) -> Result<&'a [u8], PacketFault> {
    if header.op != op::RW {
        return match header.len {
            0 => Ok(&[]),
            len => Err(PacketFault::UnexpectedPayload(len)),
        };
    }
    let fault = PacketFault::Length { len: header.len, held: rest.len() };
    let len = usize::try_from(header.len).map_err(|_| fault)?;
    if len > MAX_PAYLOAD {
        return Err(fault);
    }
    rest.get(..len).ok_or(fault)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GUEST: u64 = 7;

    fn header(op: u16, len: u32) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 1000,
            dst_port: 52,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 4096,
            fwd_cnt: 17,
        }
    }

    fn packet(header: Header, payload: &[u8]) -> Vec<u8> {
        [&header.encode()[..], payload].concat()
    }

    fn fault(bytes: &[u8]) -> (PacketFault, Option<Header>, Option<Key>) {
        match Packet::parse(bytes, GUEST).unwrap_err() {
            PacketError::Answerable { fault, reset, key } => (fault, reset, key),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn header_lies_in_memory_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        let bytes = header.encode();
        assert_eq!(bytes.to_vec(), (1..=44).collect::<Vec<u8>>());
        assert_eq!(Header::parse(&bytes), Some((header, &[][..])));
    }

    #[test]
    fn data_is_exactly_what_the_header_says() {
        let bytes = packet(header(op::RW, 3), b"abcdef");
        let packet = Packet::parse(&bytes, GUEST).unwrap();
        assert_eq!(packet.op, Op::Data(b"abc"));
        assert_eq!(packet.key, Key { guest_port: 1000, host_port: 52 });
        assert_eq!(packet.credit, Credit { buf_alloc: 4096, fwd_cnt: 17 });
    }

    #[test]
    fn shutdown_flags_survive_both_ways() {
        for (send, receive) in [(false, false), (false, true), (true, false), (true, true)] {
            let directions = Directions { send, receive };
            let bytes = packet(
                Header { flags: shutdown_flags(directions) | !3, ..header(op::SHUTDOWN, 0) },
                &[],
            );
            assert_eq!(Packet::parse(&bytes, GUEST).unwrap().op, Op::Shutdown(directions));
        }
    }

    #[test]
    fn truncated_header_cannot_be_answered() {
        let bytes = packet(header(op::RW, 0), &[]);
        assert_eq!(Packet::parse(&bytes[..43], GUEST), Err(PacketError::NoHeader { held: 43 }));
    }

    #[test]
    fn foreign_source_is_not_answered() {
        let bytes = packet(Header { src_cid: 8, ..header(op::RW, 0) }, &[]);
        assert_eq!(Packet::parse(&bytes, GUEST), Err(PacketError::ForeignSource { src_cid: 8 }));
    }

    #[test]
    fn other_destinations_and_types_are_reset_without_touching_connections() {
        let (fault_, reset, key) =
            fault(&packet(Header { dst_cid: 1, ..header(op::REQUEST, 0) }, &[]));
        assert_eq!((fault_, key), (PacketFault::Destination(1), None));
        let reset = reset.unwrap();
        assert_eq!((reset.src_cid, reset.dst_cid), (1, GUEST));
        assert_eq!((reset.src_port, reset.dst_port), (52, 1000));
        assert_eq!((reset.op, reset.len), (op::RST, 0));

        let (fault_, reset, key) =
            fault(&packet(Header { kind: 2, ..header(op::REQUEST, 0) }, &[]));
        assert_eq!((fault_, key), (PacketFault::Type(2), None));
        assert_eq!(reset.unwrap().kind, 2);
    }

    #[test]
    fn impossible_lengths_end_the_connection() {
        let key = Some(Key { guest_port: 1000, host_port: 52 });
        let short = fault(&packet(header(op::RW, 4), b"abc"));
        assert_eq!((short.0, short.2), (PacketFault::Length { len: 4, held: 3 }, key));
        let huge = fault(&packet(header(op::RW, u32::MAX), b"abc"));
        assert_eq!((huge.0, huge.2), (PacketFault::Length { len: u32::MAX, held: 3 }, key));
        let long = vec![0; MAX_PAYLOAD + 1];
        let over = fault(&packet(header(op::RW, 65537), &long));
        assert_eq!((over.0, over.2), (PacketFault::Length { len: 65537, held: 65537 }, key));
        let control = fault(&packet(header(op::RESPONSE, 1), b"a"));
        assert_eq!((control.0, control.2), (PacketFault::UnexpectedPayload(1), key));
        let unknown = fault(&packet(header(8, 0), &[]));
        assert_eq!((unknown.0, unknown.2), (PacketFault::Operation(8), key));
    }

    #[test]
    fn a_faulty_reset_is_never_answered_by_a_reset() {
        assert_eq!(fault(&packet(header(op::RST, 1), &[])).1, None);
        assert_eq!(fault(&packet(Header { dst_cid: 9, ..header(op::RST, 0) }, &[])).1, None);
        assert_eq!(fault(&packet(Header { kind: 9, ..header(op::RST, 0) }, &[])).1, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            match Packet::parse(&bytes, GUEST) {
                Ok(packet) => if let Op::Data(data) = packet.op {
                    prop_assert!(data.len() <= bytes.len() - HEADER_LEN);
                },
                Err(PacketError::Answerable { reset: Some(reset), .. }) => {
                    prop_assert_eq!(reset.op, op::RST);
                    prop_assert_eq!(reset.dst_cid, GUEST);
                }
                Err(_) => {}
            }
        }

        #[test]
        fn any_header_survives_encoding(bytes in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let bytes = [&bytes[..], &tail[..]].concat();
            let (header, rest) = Header::parse(&bytes).unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(header.encode().to_vec(), bytes);
        }
    }
}

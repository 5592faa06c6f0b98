//! The format of netlink messages: a header, a fixed part, attributes (`linux/netlink.h`).
//!
//! Numbers are in the host's byte order; addresses, and the few numbers that are said to be so, in
//! that of the network.

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// Length of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;

/// `NLA_F_NESTED`, and the flags of an attribute's type together.
const NESTED: u16 = 1 << 15;
const TYPE_FLAGS: u16 = 0xc000;

/// Flags of a request (`NLM_F_*`).
pub mod flags {
    /// `NLM_F_REPLACE`: in place of the object of the same key.
    pub const REPLACE: u16 = 0x100;
    /// `NLM_F_EXCL`: only if there is none of the same key.
    pub const EXCL: u16 = 0x200;
    /// `NLM_F_CREATE`: if there is none.
    pub const CREATE: u16 = 0x400;
    /// `NLM_F_DUMP`: all of them.
    pub const DUMP: u16 = 0x300;
    /// `NLM_F_REQUEST`
    pub(crate) const REQUEST: u16 = 0x1;
    /// `NLM_F_ACK`
    pub(crate) const ACK: u16 = 0x4;
    /// `NLM_F_DUMP_INTR`: what is told changed while it was told.
    pub(crate) const DUMP_INTERRUPTED: u16 = 0x10;
}

/// Rounds up to where the next thing begins.
const fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

/// A request that is being written.
#[derive(Debug, Clone)]
pub struct Message {
    kind: u16,
    flags: u16,
    /// What follows the header.
    body: Vec<u8>,
}

impl Message {
    /// A request of this type (`RTM_*`), with these flags and this fixed part.
    #[must_use]
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut message = Message { kind, flags, body: fixed.to_vec() };
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.body.resize(aligned(self.body.len()), 0);
    }

    /// Adds an attribute. One of more than 65,531 bytes cannot be told, and is cut; nothing here is
    /// longer than an interface's name or a few dozen addresses.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let longest = usize::from(u16::MAX).saturating_sub(ATTRIBUTE_HEADER);
        let value = value.get(..longest).unwrap_or(value);
        let length = u16::try_from(value.len().saturating_add(ATTRIBUTE_HEADER));
        self.body.extend_from_slice(&length.unwrap_or(u16::MAX).to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        self.body.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds a number of 32 bits.
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a text with the NUL that ends it.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Adds an attribute that is made of attributes.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Message)) -> &mut Self {
        let mut inner = Message::new(0, 0, &[]);
        fill(&mut inner);
        self.attribute(kind | NESTED, &inner.body)
    }

    /// What follows the header.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// The bytes that are sent.
    pub(crate) fn bytes(&self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.body.len().saturating_add(HEADER)).unwrap_or(u32::MAX);
        let flags = self.flags | flags::REQUEST | flags::ACK;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        // The kernel fills the port in.
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A message of the kernel, as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) body: &'a [u8],
}

/// The messages in a datagram; an `Err` is its last item, if it is cut.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Reply<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let split = split_message(datagram);
        datagram = split.map_or(&[], |(_, rest)| rest);
        Some(split.map(|(reply, _)| reply).ok_or(Malformed))
    })
}

/// A reply that is shorter than it says, or than it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's answer is cut off or malformed")]
pub struct Malformed;

fn split_message(datagram: &[u8]) -> Option<(Reply<'_>, &[u8])> {
    let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
    let body = datagram.get(HEADER..length)?;
    let reply = Reply {
        kind: u16_at(datagram, 4)?,
        flags: u16_at(datagram, 6)?,
        sequence: u32_at(datagram, 8)?,
        body,
    };
    // The last one need not be padded.
    Some((reply, datagram.get(aligned(length)..).unwrap_or_default()))
}

/// The attributes in `bytes`, by type without its flags. It ends where they make no sense any more.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !TYPE_FLAGS;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        // The last one need not be padded.
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The number at an offset.
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let end = at.checked_add(2)?;
    Some(u16::from_ne_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// The number at an offset.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_ne_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// The text in an attribute, without the NUL that ends it.
#[must_use]
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut message = Message::new(16, flags::CREATE, &[1, 2, 3, 4]);
        message.text(3, "eth0").u32(4, 1500).nested(18, |inner| {
            inner.text(1, "veth");
        });
        let bytes = message.bytes(7);
        let replies: Vec<_> = messages(&bytes).collect::<Result<_, _>>().unwrap();
        assert_eq!(replies.len(), 1);
        assert_eq!((replies[0].kind, replies[0].sequence), (16, 7));
        let found: Vec<_> = attributes(&replies[0].body[4..]).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(text(found[0].1), "eth0");
        assert_eq!(u32_at(found[1].1, 0), Some(1500));
        let inner: Vec<_> = attributes(found[2].1).collect();
        assert_eq!((found[2].0, inner[0].0, text(inner[0].1).as_str()), (18, 1, "veth"));
    }

    #[test]
    fn two_messages_in_one_datagram_are_both_read() {
        let mut bytes = Message::new(1, 0, &[1, 0, 0, 0]).bytes(1);
        bytes.extend(Message::new(2, 0, &[2, 0, 0, 0]).bytes(2));
        let kinds: Vec<_> = messages(&bytes).map(|reply| reply.unwrap().kind).collect();
        assert_eq!(kinds, [1, 2]);
        bytes.truncate(bytes.len() - 1);
        assert_eq!(messages(&bytes).last(), Some(Err(Malformed)));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(messages(&bytes).count() <= bytes.len());
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }

        #[test]
        fn attributes_of_any_length_keep_their_place(
            values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..32), 0..8)
        ) {
            let mut message = Message::new(0, 0, &[]);
            for (kind, value) in (1u16..).zip(&values) {
                message.attribute(kind, value);
            }
            let read: Vec<_> = attributes(&message.body).map(|(_, v)| v.to_vec()).collect();
            prop_assert_eq!(read, values);
        }
    }
}

//! Headers of the transmission phase, for both ends and in every form a handshake can agree on.

use crate::protocol::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use crate::wire::{u16_at, u32_at, u64_at};

/// The form of headers a handshake agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum HeaderStyle {
    /// Compact requests and simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// Requests and replies with 64-bit lengths.
    Extended,
}

impl HeaderStyle {
    pub(crate) fn request_bytes(self) -> usize {
        match self {
            HeaderStyle::Simple | HeaderStyle::Structured => 28,
            HeaderStyle::Extended => 32,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl RequestHeader {
    pub(crate) fn encode(self, style: HeaderStyle, out: &mut Vec<u8>) {
        let extended = style == HeaderStyle::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.length.to_be_bytes());
        } else {
            let length = u32::try_from(self.length).expect("compact requests have 32-bit lengths");
            out.extend_from_slice(&length.to_be_bytes());
        }
    }

    /// Reads `style.request_bytes()` bytes; gives the magic back if it is not the right one.
    pub(crate) fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<RequestHeader, u32> {
        let magic = u32_at(bytes, 0);
        let length = match style {
            HeaderStyle::Simple | HeaderStyle::Structured if magic == REQUEST_MAGIC => {
                u64::from(u32_at(bytes, 24))
            }
            HeaderStyle::Extended if magic == EXTENDED_REQUEST_MAGIC => u64_at(bytes, 24),
            _ => return Err(magic),
        };
        Ok(RequestHeader {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length,
        })
    }
}

/// A reply's header: a simple reply, or one chunk of a longer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyHeader {
    Simple {
        error: u32,
        cookie: u64,
    },
    /// `offset` is the request's, and on the wire only in extended headers.
    Chunk {
        flags: u16,
        kind: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    },
}

/// A reply's header on the stack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EncodedReply {
    bytes: [u8; 32],
    length: usize,
}

impl std::ops::Deref for EncodedReply {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl ReplyHeader {
    /// Bytes a header takes that starts with `magic`, if replies of `style` may start with it.
    pub(crate) fn bytes_after(magic: u32, style: HeaderStyle) -> Option<usize> {
        match (magic, style) {
            (SIMPLE_REPLY_MAGIC, HeaderStyle::Simple | HeaderStyle::Structured) => Some(16),
            (STRUCTURED_REPLY_MAGIC, HeaderStyle::Structured) => Some(20),
            (EXTENDED_REPLY_MAGIC, HeaderStyle::Extended) => Some(32),
            _ => None,
        }
    }

    pub(crate) fn encode(self, style: HeaderStyle) -> EncodedReply {
        let mut bytes = [0; 32];
        let length = match self {
            ReplyHeader::Simple { error, cookie } => {
                bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                bytes[4..8].copy_from_slice(&error.to_be_bytes());
                bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
                16
            }
            ReplyHeader::Chunk { flags, kind, cookie, offset, length } => {
                bytes[4..6].copy_from_slice(&flags.to_be_bytes());
                bytes[6..8].copy_from_slice(&kind.to_be_bytes());
                bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
                if style == HeaderStyle::Extended {
                    bytes[0..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
                    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
                    bytes[24..32].copy_from_slice(&length.to_be_bytes());
                    32
                } else {
                    let length = u32::try_from(length).expect("a chunk fits 32 bits");
                    bytes[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
                    bytes[16..20].copy_from_slice(&length.to_be_bytes());
                    20
                }
            }
        };
        EncodedReply { bytes, length }
    }

    /// Reads a header whose size `bytes_after` gave.
    pub(crate) fn decode(bytes: &[u8]) -> ReplyHeader {
        let (flags, kind, cookie) = (u16_at(bytes, 4), u16_at(bytes, 6), u64_at(bytes, 8));
        match u32_at(bytes, 0) {
            SIMPLE_REPLY_MAGIC => ReplyHeader::Simple { error: u32_at(bytes, 4), cookie },
            STRUCTURED_REPLY_MAGIC => {
                let length = u64::from(u32_at(bytes, 16));
                ReplyHeader::Chunk { flags, kind, cookie, offset: 0, length }
            }
            _ => {
                let (offset, length) = (u64_at(bytes, 16), u64_at(bytes, 24));
                ReplyHeader::Chunk { flags, kind, cookie, offset, length }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let header = RequestHeader { flags, command, cookie, offset, length: u64::from(length) };
            for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
                let mut bytes = Vec::new();
                header.encode(style, &mut bytes);
                prop_assert_eq!(bytes.len(), style.request_bytes());
                prop_assert_eq!(RequestHeader::decode(style, &bytes), Ok(header));
            }
        }

        #[test]
        fn replies_survive_the_wire(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32, error: u32) {
            let chunk = ReplyHeader::Chunk { flags, kind, cookie, offset, length: u64::from(length) };
            let compact = ReplyHeader::Chunk { flags, kind, cookie, offset: 0, length: u64::from(length) };
            let simple = ReplyHeader::Simple { error, cookie };
            for (header, style) in [
                (simple, HeaderStyle::Simple), (compact, HeaderStyle::Structured), (chunk, HeaderStyle::Extended),
            ] {
                let bytes = header.encode(style);
                prop_assert_eq!(ReplyHeader::bytes_after(u32_at(&bytes, 0), style), Some(bytes.len()));
                prop_assert_eq!(ReplyHeader::decode(&bytes), header);
            }
        }
    }
}

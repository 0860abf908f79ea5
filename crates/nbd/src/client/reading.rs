//! Reading replies, from a server that may lie.

use super::ClientError;
use super::codec::{Codec, Completion, ContextExtents, Cookie, Pending};
use crate::ErrorCode;
use crate::header::{HeaderStyle, ReplyHeader};
use crate::protocol::{MAX_STRING, chunk, command};
use crate::receive_buffer::ReceiveBuffer;
use crate::server::Extent;
use crate::wire::{Fields, u32_at, u64_at};

const BUFFER_BYTES: usize = 256 * 1024;
/// Data from this size on is received where it belongs; less is cheaper with its neighbours.
const DIRECT_FROM: usize = 32 * 1024;
/// Extents a reply should not exceed, by the specification.
const MAX_EXTENTS: u64 = 1 << 20;
/// Parts of one read that arrive apart from each other.
const MAX_PARTS: usize = 64 * 1024;

/// Where in a reply the stream stands.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reading {
    Header,
    /// The offset in front of a chunk's data.
    DataOffset {
        cookie: Cookie,
        data: usize,
        last: bool,
    },
    Data {
        cookie: Cookie,
        at: usize,
        left: usize,
    },
    /// A payload that is read as a whole.
    Payload {
        cookie: Cookie,
        kind: u16,
        length: usize,
        last: bool,
    },
}

#[derive(Debug)]
pub(super) struct ReplyReader {
    buffer: ReceiveBuffer,
    reading: Reading,
    /// Whether the reply ends with the data being read.
    data_is_last: bool,
    payload: Vec<u8>,
}

impl Default for ReplyReader {
    fn default() -> ReplyReader {
        ReplyReader {
            buffer: ReceiveBuffer::new(BUFFER_BYTES),
            reading: Reading::Header,
            data_is_last: false,
            payload: Vec::new(),
        }
    }
}

impl ReplyReader {
    /// `Data` if the next bytes are to be received into a read's buffer.
    pub(super) fn direct(&self) -> Reading {
        match self.reading {
            Reading::Data { left, .. } if left >= DIRECT_FROM && self.buffer.len() == 0 => self.reading,
            _ => Reading::Header,
        }
    }

    pub(super) fn space(&mut self) -> &mut [u8] {
        self.buffer.space(usize::MAX)
    }

    pub(super) fn received(&mut self, count: usize) {
        match self.direct() {
            Reading::Data { cookie, at, left } => {
                assert!(count <= left, "more was received than there was space for");
                self.reading = Reading::Data { cookie, at: at + count, left: left - count };
            }
            _ => self.buffer.filled(count),
        }
    }
}

const fn violation(what: &'static str) -> ClientError {
    ClientError::Violation(what)
}

impl Codec {
    pub(super) fn read_reply(&mut self) -> Result<Option<Completion>, ClientError> {
        loop {
            let available = self.reader.buffer.len();
            match self.reader.reading {
                Reading::Header => {
                    if available < 4 {
                        return Ok(None);
                    }
                    let magic = u32_at(self.reader.buffer.unparsed(), 0);
                    let length = ReplyHeader::bytes_after(magic, self.style)
                        .ok_or(violation("a reply that starts with no known number"))?;
                    if available < length {
                        return Ok(None);
                    }
                    let range = self.reader.buffer.consume(length);
                    let header = ReplyHeader::decode(self.reader.buffer.at(range));
                    if let Some(completion) = self.read_header(header)? {
                        return Ok(Some(completion));
                    }
                }
                Reading::DataOffset { cookie, data, last } => {
                    if available < 8 {
                        return Ok(None);
                    }
                    let range = self.reader.buffer.consume(8);
                    let offset = u64_at(self.reader.buffer.at(range), 0);
                    let pending = self.pending(cookie).expect("its request waits");
                    let at = pending.cover(offset, data as u64)?;
                    self.reader.reading = Reading::Data { cookie, at, left: data };
                    self.reader.data_is_last = last;
                }
                Reading::Data { cookie, at, left } => {
                    let now = left.min(available);
                    let range = self.reader.buffer.consume(now);
                    let slot = self.pending(cookie).expect("its request waits");
                    // The buffer and the request are apart; move the data out to please the borrow checker.
                    let mut data = std::mem::take(&mut slot.data);
                    data[at..at + now].copy_from_slice(self.reader.buffer.at(range));
                    self.pending(cookie).expect("its request waits").data = data;
                    if now < left {
                        self.reader.reading = Reading::Data { cookie, at: at + now, left: left - now };
                        return Ok(None);
                    }
                    self.reader.reading = Reading::Header;
                    if self.reader.data_is_last {
                        return self.finish(cookie).map(Some);
                    }
                }
                Reading::Payload { cookie, kind, length, last } => {
                    let now = (length - self.reader.payload.len()).min(available);
                    let range = self.reader.buffer.consume(now);
                    self.reader.payload.extend_from_slice(self.reader.buffer.at(range));
                    if self.reader.payload.len() < length {
                        return Ok(None);
                    }
                    self.reader.reading = Reading::Header;
                    let payload = std::mem::take(&mut self.reader.payload);
                    self.read_payload(cookie, kind, &payload)?;
                    if last {
                        return self.finish(cookie).map(Some);
                    }
                }
            }
        }
    }

    fn read_header(&mut self, header: ReplyHeader) -> Result<Option<Completion>, ClientError> {
        let style = self.style;
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let cookie = Cookie(cookie);
        let pending = self.pending(cookie).ok_or(violation("a reply to no request"))?;
        match header {
            ReplyHeader::Simple { error: 0, .. } if pending.command == command::READ => {
                if style != HeaderStyle::Simple {
                    return Err(violation("a simple reply to a read"));
                }
                let left = pending.data.len();
                pending.cover(pending.offset, left as u64)?;
                self.reader.reading = Reading::Data { cookie, at: 0, left };
                self.reader.data_is_last = true;
                Ok(None)
            }
            ReplyHeader::Simple { error: 0, .. } => self.finish(cookie).map(Some),
            ReplyHeader::Simple { error, .. } => {
                pending.fail(ErrorCode::from_wire(error), String::new());
                Ok(Some(self.complete(cookie)))
            }
            ReplyHeader::Chunk { flags, kind, offset, length, .. } => {
                if style == HeaderStyle::Extended && offset != pending.offset {
                    return Err(violation("a reply with another request's offset"));
                }
                let last = flags & chunk::FLAG_DONE != 0;
                match kind {
                    chunk::NONE if length == 0 && last => return self.finish(cookie).map(Some),
                    chunk::OFFSET_DATA if length > 8 && length - 8 <= pending.data.len() as u64 => {
                        self.reader.reading = Reading::DataOffset { cookie, data: length as usize - 8, last };
                    }
                    _ if length > longest_payload(kind) => return Err(violation("a reply that is too long")),
                    _ => {
                        self.reader.reading =
                            Reading::Payload { cookie, kind, length: length as usize, last };
                    }
                }
                Ok(None)
            }
        }
    }

    fn read_payload(&mut self, cookie: Cookie, kind: u16, payload: &[u8]) -> Result<(), ClientError> {
        let contexts = self.contexts.clone();
        let extended = self.style == HeaderStyle::Extended;
        let pending = self.pending(cookie).expect("its request waits");
        let mut fields = Fields(payload);
        match kind {
            chunk::OFFSET_HOLE if payload.len() == 12 => {
                let (offset, length) = (u64_at(payload, 0), u32_at(payload, 8) as usize);
                let at = pending.cover(offset, length as u64)?;
                pending.data[at..at + length].fill(0);
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                if pending.command != command::BLOCK_STATUS || extended != (kind == chunk::BLOCK_STATUS_EXT) {
                    return Err(violation("extents nobody asked for"));
                }
                let (id, extents) =
                    read_extents(&mut fields, extended).ok_or(violation("a malformed list of extents"))?;
                let name = contexts.iter().find(|(known, _)| *known == id).map(|(_, name)| name);
                let name = name.ok_or(violation("extents of a context that was not agreed on"))?;
                if pending.statuses.iter().any(|status| status.context == *name) {
                    return Err(violation("extents of one context twice"));
                }
                pending.statuses.push(ContextExtents { context: name.clone(), extents });
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let (code, message) = read_error(&mut fields).ok_or(violation("a malformed error"))?;
                let at_offset = kind == chunk::ERROR_OFFSET;
                if code == 0 || (at_offset && fields.u64().is_none()) {
                    return Err(violation("a malformed error"));
                }
                pending.fail(ErrorCode::from_wire(code), message);
            }
            _ => return Err(violation("a reply of an unexpected kind")),
        }
        Ok(())
    }

    /// The reply is complete: if it claims success, it must have brought all that was asked for.
    fn finish(&mut self, cookie: Cookie) -> Result<Completion, ClientError> {
        let contexts = self.contexts.len();
        let pending = self.pending(cookie).expect("its request waits");
        if pending.error.is_none() {
            let missing = match pending.command {
                command::READ => pending.length > 0 && pending.covered != [(0, pending.data.len())],
                command::BLOCK_STATUS => pending.statuses.len() != contexts,
                _ => false,
            };
            if missing {
                return Err(violation("a reply that ends before it is complete"));
            }
        }
        Ok(self.complete(cookie))
    }
}

fn longest_payload(kind: u16) -> u64 {
    match kind {
        chunk::OFFSET_HOLE => 12,
        chunk::BLOCK_STATUS => 4 + 8 * MAX_EXTENTS,
        chunk::BLOCK_STATUS_EXT => 8 + 16 * MAX_EXTENTS,
        kind if kind & chunk::ERROR_BIT != 0 => 2 * MAX_STRING as u64,
        _ => 0,
    }
}

fn read_error(fields: &mut Fields<'_>) -> Option<(u32, String)> {
    let code = fields.u32()?;
    let length = usize::from(fields.u16()?);
    let message = fields.bytes(length).filter(|_| length <= MAX_STRING)?;
    Some((code, String::from_utf8_lossy(message).into_owned()))
}

fn read_extents(fields: &mut Fields<'_>, extended: bool) -> Option<(u32, Vec<Extent>)> {
    let id = fields.u32()?;
    let each = if extended { 16 } else { 8 };
    let count = if extended { Some(fields.u32()? as usize) } else { None };
    if fields.0.is_empty() || !fields.0.len().is_multiple_of(each) {
        return None;
    }
    if count.is_some_and(|count| count != fields.0.len() / each) {
        return None;
    }
    let mut extents = Vec::with_capacity(fields.0.len() / each);
    while !fields.0.is_empty() {
        let (length, flags) = if extended {
            (fields.u64()?, fields.u64()?)
        } else {
            (u64::from(fields.u32()?), u64::from(fields.u32()?))
        };
        if length == 0 {
            return None;
        }
        extents.push(Extent { length, flags });
    }
    Some((id, extents))
}

impl Pending {
    /// Notes that `length` bytes of the read from `offset` on arrive; gives their place in its data.
    fn cover(&mut self, offset: u64, length: u64) -> Result<usize, ClientError> {
        let start = offset.checked_sub(self.offset).filter(|_| self.command == command::READ);
        let end = start.and_then(|start| start.checked_add(length));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(violation("data nobody asked for"));
        };
        if end > self.data.len() as u64 || (length == 0 && !self.data.is_empty()) {
            return Err(violation("data outside of what was asked for"));
        }
        let (start, end) = (start as usize, end as usize);
        if start == end {
            return Ok(start);
        }
        let place = self.covered.partition_point(|&(_, before)| before <= start);
        if self.covered.get(place).is_some_and(|&(next, _)| next < end) {
            return Err(violation("data that overlaps other data"));
        }
        let joins_before = place > 0 && self.covered[place - 1].1 == start;
        let joins_after = self.covered.get(place).is_some_and(|&(next, _)| next == end);
        match (joins_before, joins_after) {
            (true, true) => self.covered[place - 1].1 = self.covered.remove(place).1,
            (true, false) => self.covered[place - 1].1 = end,
            (false, true) => self.covered[place].0 = start,
            (false, false) => self.covered.insert(place, (start, end)),
        }
        if self.covered.len() > MAX_PARTS {
            return Err(violation("a read in too many parts"));
        }
        Ok(start)
    }

    fn fail(&mut self, code: ErrorCode, message: String) {
        self.error.get_or_insert((code, message));
    }
}

//! Replies, in the form the handshake agreed on.

use super::in_flight::{Kind, Waiting, context_bit};
use super::request::Rejection;
use super::{ContextIndex, RequestId, Session};
use crate::ErrorCode;
use crate::header::{HeaderStyle, ReplyHeader};
use crate::output::OutputQueue;
use crate::protocol::{MAX_STRING, chunk, command};
use bytes::Bytes;

/// Extents in one reply about one context; a client asks again for the rest.
const MAX_EXTENTS: usize = 64 * 1024;

/// Part of what a read returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Data(Bytes),
    /// So many zero bytes, which are told rather than sent where the client understands it.
    Zeroes(u64),
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Piece::Data(bytes) => bytes.len() as u64,
            Piece::Zeroes(length) => *length,
        }
    }
}

/// A run of bytes with one status in one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    pub length: u64,
    /// The context defines the bits; for `base:allocation` they are [`STATE_HOLE`](crate::STATE_HOLE)
    /// and [`STATE_ZERO`](crate::STATE_ZERO). At most 32 bits.
    pub flags: u64,
}

/// The extents from a request's offset on, in one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextStatus<'a> {
    pub context: ContextIndex,
    /// At least one, none empty. They may end early or go past the request's end.
    pub extents: &'a [Extent],
}

impl Session {
    /// Answers a write, flush, trim, zeroing or cache: done.
    pub fn reply_ok(&mut self, id: RequestId) {
        let waiting = self.in_flight.remove(id);
        let has_content = matches!(waiting.kind, Kind::Read { .. } | Kind::BlockStatus { .. });
        assert!(!has_content, "a read or block status is answered with its content");
        self.push_ok(waiting.cookie, waiting.offset);
    }

    /// Answers any request: failed. The message reaches people where the client understands it.
    pub fn reply_error(&mut self, id: RequestId, code: ErrorCode, message: &str) {
        let waiting = self.in_flight.remove(id);
        let must_chunk = matches!(waiting.kind, Kind::Read { .. } | Kind::BlockStatus { .. });
        self.push_error(waiting.cookie, waiting.offset, must_chunk, code, message);
    }

    /// Answers a read with `pieces`, which together are exactly as long as the request.
    pub fn reply_read(&mut self, id: RequestId, pieces: impl IntoIterator<Item = Piece>) {
        let (waiting, fragment) = self.take_read(id);
        let mut left = waiting.length;
        let mut pieces = pieces.into_iter().filter(|piece| piece.len() > 0).inspect(|piece| {
            left = left.checked_sub(piece.len()).expect("a read's pieces fit the request");
        });
        if self.negotiated.style == HeaderStyle::Simple {
            let header = ReplyHeader::Simple { error: 0, cookie: waiting.cookie };
            self.output.push(&header.encode(self.negotiated.style));
            pieces.for_each(|piece| push_piece(&mut self.output, piece));
        } else if fragment {
            let mut gathered = Vec::new();
            let mut offset = waiting.offset;
            let mut next = pieces.next();
            while let Some(piece) = next.take() {
                next = pieces.next();
                let length = piece.len();
                match piece {
                    Piece::Zeroes(_) => {
                        let last = next.is_none();
                        push_hole(&mut self.output, self.negotiated.style, &waiting, offset, length, last);
                        offset += length;
                    }
                    Piece::Data(bytes) => {
                        gathered.push(bytes);
                        // A chunk ends where a hole starts.
                        if !matches!(next, Some(Piece::Data(_))) {
                            let length = gathered.iter().map(|bytes| bytes.len() as u64).sum();
                            let style = self.negotiated.style;
                            let last = next.is_none();
                            push_data_header(&mut self.output, style, &waiting, offset, length, last);
                            gathered.drain(..).for_each(|bytes| self.output.push_shared(bytes));
                            offset += length;
                        }
                    }
                }
            }
        } else {
            let (style, offset) = (self.negotiated.style, waiting.offset);
            push_data_header(&mut self.output, style, &waiting, offset, waiting.length, true);
            pieces.for_each(|piece| push_piece(&mut self.output, piece));
        }
        assert_eq!(left, 0, "a read's pieces are as long as the request");
    }

    /// Answers a read by having `fill` write the data where it is sent from: the way for small reads,
    /// up to some 64 KiB. If `fill` fails, the request still waits for its reply.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn reply_read_with<E>(
        &mut self,
        id: RequestId,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let waiting = self.in_flight.get(id);
        assert!(matches!(waiting.kind, Kind::Read { .. }), "only a read is answered with data");
        let style = self.negotiated.style;
        let before = self.output.queued();
        if style == HeaderStyle::Simple {
            let header = ReplyHeader::Simple { error: 0, cookie: waiting.cookie };
            self.output.push(&header.encode(style));
        } else {
            push_data_header(&mut self.output, style, &waiting, waiting.offset, waiting.length, true);
        }
        let filled = fill(self.output.push_space(waiting.length as usize));
        match filled {
            Ok(()) => {
                self.in_flight.remove(id);
            }
            Err(_) => self.output.take_back((self.output.queued() - before) as usize),
        }
        filled
    }

    fn take_read(&mut self, id: RequestId) -> (Waiting, bool) {
        let waiting = self.in_flight.remove(id);
        match waiting.kind {
            Kind::Read { dont_fragment } => (waiting, !dont_fragment),
            _ => panic!("only a read is answered with data"),
        }
    }

    /// Answers a block status request with the extents of every context it asked for.
    pub fn reply_block_status(&mut self, id: RequestId, statuses: &[ContextStatus<'_>]) {
        let waiting = self.in_flight.remove(id);
        let Kind::BlockStatus { contexts, one } = waiting.kind else {
            panic!("only a block status request is answered with extents");
        };
        let given = statuses.iter().fold(0, |bits, status| bits | context_bit(status.context));
        assert!(
            given == contexts && statuses.len() == contexts.count_ones() as usize,
            "a block status covers each context asked for, once"
        );
        for (index, status) in statuses.iter().enumerate() {
            let extents = trim_extents(status.extents, waiting.length, one);
            self.push_extents(&waiting, status.context, &extents, index + 1 == statuses.len());
        }
    }

    fn push_extents(&mut self, waiting: &Waiting, context: ContextIndex, extents: &[Extent], last: bool) {
        let extended = self.negotiated.style == HeaderStyle::Extended;
        let (kind, fixed, each) =
            if extended { (chunk::BLOCK_STATUS_EXT, 8, 16) } else { (chunk::BLOCK_STATUS, 4, 8) };
        let length = fixed + each * extents.len();
        self.push_chunk(waiting.cookie, waiting.offset, kind, length as u64, last);
        let mut payload = Vec::with_capacity(length);
        payload.extend_from_slice(&(context as u32).to_be_bytes());
        if extended {
            payload.extend_from_slice(&(extents.len() as u32).to_be_bytes());
        }
        for extent in extents {
            if extended {
                payload.extend_from_slice(&extent.length.to_be_bytes());
                payload.extend_from_slice(&extent.flags.to_be_bytes());
            } else {
                payload.extend_from_slice(&(extent.length as u32).to_be_bytes());
                let flags = u32::try_from(extent.flags).expect("contexts have 32 bits of status");
                payload.extend_from_slice(&flags.to_be_bytes());
            }
        }
        self.output.push(&payload);
    }

    fn push_chunk(&mut self, cookie: u64, offset: u64, kind: u16, length: u64, last: bool) {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        let header = ReplyHeader::Chunk { flags, kind, cookie, offset, length };
        self.output.push(&header.encode(self.negotiated.style));
    }

    fn push_ok(&mut self, cookie: u64, offset: u64) {
        if self.negotiated.style == HeaderStyle::Extended {
            self.push_chunk(cookie, offset, chunk::NONE, 0, true);
        } else {
            self.output.push(&ReplyHeader::Simple { error: 0, cookie }.encode(self.negotiated.style));
        }
    }

    fn push_error(&mut self, cookie: u64, offset: u64, must_chunk: bool, code: ErrorCode, message: &str) {
        let style = self.negotiated.style;
        if style == HeaderStyle::Simple
            || (style == HeaderStyle::Structured && message.is_empty() && !must_chunk)
        {
            let header = ReplyHeader::Simple { error: code.to_wire(), cookie };
            self.output.push(&header.encode(style));
            return;
        }
        let message = message.as_bytes();
        let message = &message[..message.len().min(MAX_STRING)];
        self.push_chunk(cookie, offset, chunk::ERROR, 6 + message.len() as u64, true);
        self.output.push(&code.to_wire().to_be_bytes());
        self.output.push(&(message.len() as u16).to_be_bytes());
        self.output.push(message);
    }

    pub(super) fn reject(&mut self, rejection: Rejection) {
        let Rejection { header, problem } = rejection;
        let has_content = matches!(header.command, command::READ | command::BLOCK_STATUS);
        match problem {
            Some(problem) => {
                self.push_error(header.cookie, header.offset, has_content, problem.code, problem.message);
            }
            None if has_content && self.negotiated.style > HeaderStyle::Simple => {
                self.push_chunk(header.cookie, header.offset, chunk::NONE, 0, true);
            }
            None => self.push_ok(header.cookie, header.offset),
        }
    }
}

fn push_piece(output: &mut OutputQueue, piece: Piece) {
    match piece {
        Piece::Data(bytes) => output.push_shared(bytes),
        Piece::Zeroes(length) => output.push_zeroes(length),
    }
}

fn push_data_header(
    output: &mut OutputQueue,
    style: HeaderStyle,
    waiting: &Waiting,
    offset: u64,
    length: u64,
    last: bool,
) {
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    let (kind, cookie) = (chunk::OFFSET_DATA, waiting.cookie);
    let header = ReplyHeader::Chunk { flags, kind, cookie, offset: waiting.offset, length: length + 8 };
    output.push(&header.encode(style));
    output.push(&offset.to_be_bytes());
}

fn push_hole(
    output: &mut OutputQueue,
    style: HeaderStyle,
    waiting: &Waiting,
    offset: u64,
    length: u64,
    last: bool,
) {
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    let (kind, cookie) = (chunk::OFFSET_HOLE, waiting.cookie);
    let header = ReplyHeader::Chunk { flags, kind, cookie, offset: waiting.offset, length: 12 };
    output.push(&header.encode(style));
    output.push(&offset.to_be_bytes());
    output.push(&(length as u32).to_be_bytes());
}

/// What the protocol lets a reply say: merged runs, one if only one is wanted, none beyond the request.
fn trim_extents(extents: &[Extent], length: u64, one: bool) -> Vec<Extent> {
    let mut trimmed: Vec<Extent> = Vec::new();
    let mut left = length;
    for &extent in extents {
        assert!(extent.length > 0, "an extent is not empty");
        if left == 0 {
            break;
        }
        let taken = extent.length.min(left);
        let full = trimmed.len() == if one { 1 } else { MAX_EXTENTS };
        match trimmed.last_mut() {
            Some(last) if last.flags == extent.flags => last.length += taken,
            _ if full => break,
            _ => trimmed.push(Extent { length: taken, flags: extent.flags }),
        }
        left -= taken;
    }
    assert!(!trimmed.is_empty(), "a context's status has at least one extent");
    trimmed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_merged_and_stay_within_the_request() {
        let extent = |length, flags| Extent { length, flags };
        let all = [extent(4096, 0), extent(4096, 0), extent(4096, 3), extent(1 << 40, 0)];
        assert_eq!(trim_extents(&all, 16384, false), [extent(8192, 0), extent(4096, 3), extent(4096, 0)]);
        assert_eq!(trim_extents(&all, 16384, true), [extent(8192, 0)]);
        assert_eq!(trim_extents(&all, 512, true), [extent(512, 0)]);
    }
}

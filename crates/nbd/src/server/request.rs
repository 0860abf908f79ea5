//! From bytes to checked requests.
//!
//! | a request that | is answered |
//! |---|---|
//! | writes past the end | `NoSpace` |
//! | reads, trims, caches or asks the status past the end | `Invalid` |
//! | changes a read-only export | `NotPermitted` |
//! | is unaligned, has a flag that does not apply, or an unknown command | `Invalid` |
//! | reads more than the maximum payload | `TooLarge` |
//! | has no length | success, having done nothing (`Invalid` for a block status) |
//! | brings a payload it should not, or one over the maximum payload | `Invalid`, once that is received |
//! | brings a payload that is longer than any server has to tolerate | by dropping the connection |

use super::in_flight::{Kind, Waiting, context_bit};
use super::{ByteRange, Phase, Progress, RequestId, STREAM_FROM, Session, SessionError, Step};
use crate::ErrorCode;
use crate::export::{Export, MAX_CONTEXTS};
use crate::header::{HeaderStyle, RequestHeader};
use crate::protocol::{TOLERATED_PAYLOAD, command, command_flag as flag};
use crate::wire::{u32_at, u64_at};

#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) id: RequestId,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) fua: bool,
    pub(super) command: ParsedCommand,
}

#[derive(Debug)]
pub(super) enum ParsedCommand {
    Read,
    Write { payload: ByteRange },
    WriteStreaming { already: ByteRange },
    Flush,
    Trim,
    WriteZeroes { no_hole: bool, fast: bool },
    BlockStatus { one: bool },
    Cache,
}

/// A request this session answers itself.
#[derive(Debug)]
pub(super) struct Rejection {
    pub(super) header: RequestHeader,
    /// `None`: it succeeded, there was nothing to do.
    pub(super) problem: Option<Problem>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) code: ErrorCode,
    pub(super) message: &'static str,
}

const fn problem(code: ErrorCode, message: &'static str) -> Option<Problem> {
    Some(Problem { code, message })
}

/// What checking a request came to.
enum Verdict {
    Accept,
    /// There is nothing to do.
    Empty,
    Reject(Option<Problem>),
}

/// What requests are checked against, from the attached export.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rules {
    size: u64,
    /// A power of two.
    minimum_block: u64,
    maximum_payload: u64,
    read_only: bool,
    trim: bool,
    fast_zero: bool,
    cache: bool,
}

impl Rules {
    pub(super) fn of(export: &Export) -> Rules {
        Rules {
            size: export.size,
            minimum_block: u64::from(export.block_sizes.minimum),
            maximum_payload: u64::from(export.block_sizes.maximum_payload),
            read_only: export.read_only,
            trim: export.trim,
            fast_zero: export.fast_zero,
            cache: export.cache,
        }
    }
}

const FUA_ONLY: u16 = flag::FUA;

impl Session {
    pub(super) fn parse_request(&mut self) -> Result<Progress, SessionError> {
        let style = self.negotiated.style;
        let header_bytes = style.request_bytes();
        if self.receive.len() < header_bytes {
            return Ok(Progress::Incomplete);
        }
        let mut header = RequestHeader::decode(style, self.receive.unparsed())
            .map_err(|found| SessionError::BadRequestMagic { found })?;
        // QEMU's client (10.0) leaves the flag out of writes with extended headers, though they always have
        // a payload and must have the flag.
        let brings_payload = header.command == command::WRITE
            || (style == HeaderStyle::Extended && header.flags & flag::PAYLOAD_LEN != 0);
        let payload = if brings_payload { header.length } else { 0 };
        if payload > self.rules.maximum_payload.max(u64::from(TOLERATED_PAYLOAD)) {
            return Err(SessionError::PayloadTooLong { length: payload });
        }
        let payload = payload as usize;

        if header.command == command::DISC && payload == 0 {
            self.receive.consume(header_bytes);
            self.phase = Phase::Closed;
            return Ok(Progress::Step(Step::Disconnected));
        }
        let is_filtered_status = header.command == command::BLOCK_STATUS && payload > 0;
        let verdict = if is_filtered_status {
            if payload < 8 || !(payload - 8).is_multiple_of(4) || payload > 8 + 4 * MAX_CONTEXTS {
                Verdict::Reject(problem(ErrorCode::Invalid, "malformed list of contexts"))
            } else if self.receive.len() < header_bytes + payload {
                return Ok(Progress::Incomplete);
            } else {
                let bytes = &self.receive.unparsed()[header_bytes..header_bytes + payload];
                header.length = u64_at(bytes, 0);
                let ids: Vec<u32> = (8..payload).step_by(4).map(|at| u32_at(bytes, at)).collect();
                if self.choose_contexts(&ids) {
                    self.check(&header, style)
                } else {
                    Verdict::Reject(problem(ErrorCode::Invalid, "a context that was not negotiated"))
                }
            }
        } else {
            self.check(&header, style)
        };

        let rejection = match verdict {
            Verdict::Reject(problem) => Some(Rejection { header, problem }),
            Verdict::Empty => Some(Rejection { header, problem: None }),
            Verdict::Accept => None,
        };
        if let Some(rejection) = rejection {
            self.receive.consume(header_bytes);
            // The reply waits until the payload is in: a client may not look for it before.
            self.discard = payload as u64;
            self.after_discard = Some(rejection);
            return Ok(Progress::Handled);
        }
        let whole = self.receive.len() >= header_bytes + payload;
        if payload > 0 && !whole && payload < STREAM_FROM {
            self.after_large_write = false;
            return Ok(Progress::Incomplete);
        }
        self.receive.consume(header_bytes);
        let already = self.receive.consume(payload.min(self.receive.len()));
        self.direct = payload - already.len();
        self.after_large_write = self.direct > 0;
        Ok(Progress::Step(Step::Request(self.accept(&header, already))))
    }

    fn accept(&mut self, header: &RequestHeader, payload: ByteRange) -> Parsed {
        let has = |bit: u16| header.flags & bit != 0;
        let (kind, command) = match header.command {
            command::READ => (Kind::Read { dont_fragment: has(flag::DF) }, ParsedCommand::Read),
            command::WRITE if self.direct > 0 => {
                (Kind::Write, ParsedCommand::WriteStreaming { already: payload })
            }
            command::WRITE => (Kind::Write, ParsedCommand::Write { payload }),
            command::FLUSH => (Kind::Other, ParsedCommand::Flush),
            command::TRIM => (Kind::Other, ParsedCommand::Trim),
            command::CACHE => (Kind::Other, ParsedCommand::Cache),
            command::WRITE_ZEROES => {
                let (no_hole, fast) = (has(flag::NO_HOLE), has(flag::FAST_ZERO));
                (Kind::Other, ParsedCommand::WriteZeroes { no_hole, fast })
            }
            command::BLOCK_STATUS => {
                if !has(flag::PAYLOAD_LEN) {
                    let (_, selected) = self.negotiated.contexts.as_ref().expect("checked");
                    self.asked_contexts.clone_from(selected);
                }
                let contexts = self.asked_contexts.iter().fold(0, |bits, &index| bits | context_bit(index));
                let one = has(flag::REQ_ONE);
                (Kind::BlockStatus { contexts, one }, ParsedCommand::BlockStatus { one })
            }
            unknown => unreachable!("command {unknown} was checked"),
        };
        let (cookie, offset, length) = (header.cookie, header.offset, header.length);
        let id = self.in_flight.insert(Waiting { cookie, offset, length, kind });
        Parsed { id, offset, length, fua: has(flag::FUA), command }
    }

    /// Takes the contexts a client asks for by number; false if one was not negotiated or comes twice.
    fn choose_contexts(&mut self, ids: &[u32]) -> bool {
        let Some((_, selected)) = &self.negotiated.contexts else { return false };
        self.asked_contexts.clear();
        for &id in ids {
            let index = id as usize;
            if !selected.contains(&index) || self.asked_contexts.contains(&index) {
                return false;
            }
            self.asked_contexts.push(index);
        }
        !ids.is_empty()
    }

    fn check(&self, header: &RequestHeader, style: HeaderStyle) -> Verdict {
        let (export, reject) = (&self.rules, |code, message| Verdict::Reject(problem(code, message)));
        if let Some(code) = self.refusal {
            return reject(code, "the server takes no more requests");
        }
        let (allowed_flags, changes, past_end) = match header.command {
            command::READ => {
                let df = if style > HeaderStyle::Simple { flag::DF } else { 0 };
                (FUA_ONLY | df, false, ErrorCode::Invalid)
            }
            command::WRITE if style == HeaderStyle::Extended => {
                (FUA_ONLY | flag::PAYLOAD_LEN, true, ErrorCode::NoSpace)
            }
            command::WRITE => (FUA_ONLY, true, ErrorCode::NoSpace),
            command::FLUSH => (FUA_ONLY, false, ErrorCode::Invalid),
            command::TRIM if export.trim => (FUA_ONLY, true, ErrorCode::Invalid),
            command::CACHE if export.cache => (FUA_ONLY, false, ErrorCode::Invalid),
            command::WRITE_ZEROES => {
                let fast = if export.fast_zero { flag::FAST_ZERO } else { 0 };
                (FUA_ONLY | flag::NO_HOLE | fast, true, ErrorCode::NoSpace)
            }
            command::BLOCK_STATUS => {
                let payload = if style == HeaderStyle::Extended { flag::PAYLOAD_LEN } else { 0 };
                (FUA_ONLY | flag::REQ_ONE | payload, false, ErrorCode::Invalid)
            }
            _ => return reject(ErrorCode::Invalid, "unknown command"),
        };
        if header.flags & !allowed_flags != 0 {
            return reject(ErrorCode::Invalid, "a flag that does not apply to this command");
        }
        if changes && export.read_only {
            return reject(ErrorCode::NotPermitted, "the export is read-only");
        }
        if header.command == command::FLUSH {
            return match (header.offset, header.length) {
                (0, 0) => Verdict::Accept,
                _ => reject(ErrorCode::Invalid, "a flush has no offset and no length"),
            };
        }
        if header.command == command::WRITE && header.length > export.maximum_payload {
            return reject(ErrorCode::Invalid, "a write longer than the maximum payload");
        }
        let end = header.offset.checked_add(header.length);
        if end.is_none_or(|end| end > export.size) {
            return reject(past_end, "past the end of the export");
        }
        if (header.offset | header.length) & (export.minimum_block - 1) != 0 {
            return reject(ErrorCode::Invalid, "not aligned to the minimum block size");
        }
        if header.command == command::READ && header.length > export.maximum_payload {
            return reject(ErrorCode::TooLarge, "a read longer than the maximum payload");
        }
        if header.command == command::BLOCK_STATUS {
            let selected = self.negotiated.contexts.as_ref().map_or(0, |(_, selected)| selected.len());
            if selected == 0 {
                return reject(ErrorCode::Invalid, "no context was negotiated");
            }
            if header.length == 0 {
                return reject(ErrorCode::Invalid, "a block status of nothing");
            }
        }
        if header.length == 0 { Verdict::Empty } else { Verdict::Accept }
    }
}

//! Requests out, replies in, many in flight.

use super::handshake::{ExportInfo, Outcome};
use super::reading::{Reading, ReplyReader};
use super::{ClientError, shown};
use crate::ErrorCode;
use crate::header::{HeaderStyle, RequestHeader};
use crate::output::OutputQueue;
use crate::protocol::{command, command_flag as flag};
use crate::server::Extent;
use bytes::Bytes;
use std::io::IoSlice;

/// One request, until its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cookie(pub(super) u64);

/// What to ask for. Offsets and lengths are in bytes; whether they fit the export is the server's to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Read { offset: u64, length: u32 },
    Write { offset: u64, payload: Bytes, fua: bool },
    Flush,
    Trim { offset: u64, length: u64, fua: bool },
    WriteZeroes { offset: u64, length: u64, fua: bool, no_hole: bool, fast: bool },
    Cache { offset: u64, length: u64 },
    BlockStatus { offset: u64, length: u64, one: bool },
}

/// A request that the server failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{command} at byte {offset}: {code}{}", shown(.message))]
pub struct CommandError {
    /// `read`, `write` and so on.
    pub command: &'static str,
    pub offset: u64,
    pub code: ErrorCode,
    /// What the server said about it, if anything.
    pub message: String,
}

/// What a successful request brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Done,
    Data(Vec<u8>),
    Status(Vec<ContextExtents>),
}

/// The extents from a request's offset on, in one context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    pub context: String,
    pub extents: Vec<Extent>,
}

/// The end of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    pub cookie: Cookie,
    pub result: Result<Answer, CommandError>,
}

/// A request that waits for its reply.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) command: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// A read's data.
    pub(super) data: Vec<u8>,
    /// Parts of `data` that arrived: apart, sorted.
    pub(super) covered: Vec<(usize, usize)>,
    pub(super) statuses: Vec<ContextExtents>,
    pub(super) error: Option<(ErrorCode, String)>,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    pending: Option<Pending>,
}

/// The transmission phase of one connection.
#[derive(Debug)]
pub struct Codec {
    pub(super) style: HeaderStyle,
    pub(super) export: ExportInfo,
    pub(super) contexts: Vec<(u32, String)>,
    pub(super) reader: ReplyReader,
    output: OutputQueue,
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
    spare: Vec<Vec<u8>>,
}

/// Read buffers kept for the next reads.
const MAX_SPARE: usize = 64;

impl Codec {
    /// A connection whose handshake ended `Attached`.
    ///
    /// # Panics
    /// If it ended otherwise.
    pub fn new(outcome: Outcome) -> Codec {
        let Outcome::Attached { export, style, contexts } = outcome else {
            panic!("requests follow once an export is attached");
        };
        Codec {
            style,
            export,
            contexts,
            reader: ReplyReader::default(),
            output: OutputQueue::default(),
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            spare: Vec::new(),
        }
    }

    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    pub fn header_style(&self) -> HeaderStyle {
        self.style
    }

    /// Names of the contexts that were agreed on.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.contexts.iter().map(|(_, name)| name.as_str())
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `NotOffered`, if the server did not offer what this needs.
    pub fn submit(&mut self, request: Command) -> Result<Cookie, ClientError> {
        let export = &self.export;
        let need = |offered: bool, what| if offered { Ok(()) } else { Err(ClientError::NotOffered(what)) };
        let set = |condition: bool, bit: u16| if condition { bit } else { 0 };
        let (number, offset, length, flags, payload) = match request {
            Command::Read { offset, length } => (command::READ, offset, u64::from(length), 0, None),
            Command::Write { offset, payload, fua } => {
                need(!fua || export.can_fua(), "forced unit access")?;
                need(u32::try_from(payload.len()).is_ok(), "writes this long")?;
                let marked = set(self.style == HeaderStyle::Extended, flag::PAYLOAD_LEN);
                let flags = set(fua, flag::FUA) | marked;
                (command::WRITE, offset, payload.len() as u64, flags, Some(payload))
            }
            Command::Flush => {
                need(export.can_flush(), "flush")?;
                (command::FLUSH, 0, 0, 0, None)
            }
            Command::Trim { offset, length, fua } => {
                need(export.can_trim(), "trim")?;
                need(!fua || export.can_fua(), "forced unit access")?;
                (command::TRIM, offset, length, set(fua, flag::FUA), None)
            }
            Command::WriteZeroes { offset, length, fua, no_hole, fast } => {
                need(export.can_write_zeroes(), "write zeroes")?;
                need(!fua || export.can_fua(), "forced unit access")?;
                need(!fast || export.can_fast_zero(), "fast zeroes")?;
                let zeroing = set(no_hole, flag::NO_HOLE) | set(fast, flag::FAST_ZERO);
                (command::WRITE_ZEROES, offset, length, set(fua, flag::FUA) | zeroing, None)
            }
            Command::Cache { offset, length } => {
                need(export.can_cache(), "cache")?;
                (command::CACHE, offset, length, 0, None)
            }
            Command::BlockStatus { offset, length, one } => {
                need(!self.contexts.is_empty(), "a context that was asked for")?;
                (command::BLOCK_STATUS, offset, length, set(one, flag::REQ_ONE), None)
            }
        };
        let long = self.style == HeaderStyle::Extended || u32::try_from(length).is_ok();
        need(long, "requests this long")?;

        let mut data = Vec::new();
        if number == command::READ {
            data = self.spare.pop().unwrap_or_default();
            // What a recycled buffer holds does not matter: a read succeeds only if all of it was written.
            data.resize(length as usize, 0);
        }
        let pending = Pending {
            command: number,
            offset,
            length,
            data,
            covered: Vec::new(),
            statuses: Vec::new(),
            error: None,
        };
        let cookie = self.insert(pending);
        let mut header = Vec::with_capacity(32);
        RequestHeader { flags, command: number, cookie: cookie.0, offset, length }
            .encode(self.style, &mut header);
        self.output.push(&header);
        if let Some(payload) = payload {
            self.output.push_shared(payload);
        }
        Ok(cookie)
    }

    /// Queues the goodbye. The server answers what is in flight and closes.
    pub fn disconnect(&mut self) {
        let mut header = Vec::with_capacity(32);
        RequestHeader { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 }
            .encode(self.style, &mut header);
        self.output.push(&header);
    }

    /// Gives a read's buffer back for the next read.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(buffer);
        }
    }

    /// Bytes waiting to be sent.
    pub fn queued_output(&self) -> u64 {
        self.output.queued()
    }

    /// Fills `slices` with what waits to be sent, in order, and says how many it filled.
    pub fn output_slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        self.output.slices(slices)
    }

    /// The first `count` bytes of the output are sent.
    pub fn sent(&mut self, count: usize) {
        self.output.sent(count);
    }

    /// Where to receive the next bytes; call [`Codec::next_completion`] until `None` before.
    pub fn recv_space(&mut self) -> &mut [u8] {
        if let Reading::Data { cookie, at, left } = self.reader.direct() {
            let pending = slot_of(&mut self.slots, cookie).expect("its request waits");
            return &mut pending.data[at..at + left];
        }
        self.reader.space()
    }

    /// The first `count` bytes of the last `recv_space` were filled.
    pub fn received(&mut self, count: usize) {
        self.reader.received(count);
    }

    /// The next request that ended.
    ///
    /// # Errors
    /// If the server broke the protocol.
    pub fn next_completion(&mut self) -> Result<Option<Completion>, ClientError> {
        self.read_reply()
    }

    fn insert(&mut self, pending: Pending) -> Cookie {
        self.in_flight += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("fewer requests than 2^32")
        });
        let slot = &mut self.slots[index as usize];
        slot.pending = Some(pending);
        Cookie(u64::from(slot.generation) << 32 | u64::from(index))
    }

    pub(super) fn pending(&mut self, cookie: Cookie) -> Option<&mut Pending> {
        slot_of(&mut self.slots, cookie)
    }

    pub(super) fn complete(&mut self, cookie: Cookie) -> Completion {
        let index = cookie.0 as u32;
        let slot = &mut self.slots[index as usize];
        let pending = slot.pending.take().expect("a waiting request completes");
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        self.in_flight -= 1;
        let result = match pending.error {
            Some((code, message)) => {
                let command = command_name(pending.command);
                Err(CommandError { command, offset: pending.offset, code, message })
            }
            None => Ok(match pending.command {
                command::READ => Answer::Data(pending.data),
                command::BLOCK_STATUS => Answer::Status(pending.statuses),
                _ => Answer::Done,
            }),
        };
        Completion { cookie, result }
    }
}

fn slot_of(slots: &mut [Slot], cookie: Cookie) -> Option<&mut Pending> {
    let slot = slots.get_mut((cookie.0 as u32) as usize)?;
    if slot.generation == (cookie.0 >> 32) as u32 { slot.pending.as_mut() } else { None }
}

fn command_name(number: u16) -> &'static str {
    match number {
        command::READ => "read",
        command::WRITE => "write",
        command::FLUSH => "flush",
        command::TRIM => "trim",
        command::CACHE => "cache",
        command::WRITE_ZEROES => "write zeroes",
        command::BLOCK_STATUS => "block status",
        _ => "request",
    }
}

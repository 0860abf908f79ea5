//! The server's end of one connection, without the connection.
//!
//! The caller owns a non-blocking socket and moves bytes; a [`Session`] says what they mean:
//!
//! ```text
//!   socket ──recv──► recv_space / received ──► next_event ──► Event (TLS, attached, request, disconnected)
//!   socket ◄─writev─ output_slices / sent  ◄── reply_ok, reply_error, reply_read, reply_block_status
//! ```
//!
//! A session checks what the protocol lets a server check: a request it hands out lies within the export,
//! is aligned, is allowed on a read-only export and carries only flags that apply. Everything else it
//! answers itself, or gives a [`SessionError`], upon which the caller drops the connection.
//!
//! What a client can make a session hold is bounded by [`Limits`]: past them [`Session::next_event`] gives
//! nothing until replies are queued and sent, so a client that does not read its replies stops being read.

mod handshake;
mod in_flight;
mod readers;
mod reply;
mod request;

pub use in_flight::RequestId;
pub use readers::{Asked, Listener, Readers, Wanted};
pub use reply::{ContextStatus, Extent, Piece};

use crate::ErrorCode;
use crate::export::{Export, ExportList};
use crate::header::HeaderStyle;
use crate::output::OutputQueue;
use crate::protocol::{IHAVEOPT, INIT_PASSWD, handshake_flag};
use crate::receive_buffer::ReceiveBuffer;
use in_flight::InFlight;
use request::{Parsed, ParsedCommand, Rejection, Rules};
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// Writes from this size on are handed out before their payload is received.
pub const STREAM_FROM: usize = 64 * 1024;

/// Space offered after a large write: the next header, and little of a payload that is better received
/// where it belongs.
const HEADER_WINDOW: usize = 4096;

/// A context's place in [`Export::contexts`].
pub type ContextIndex = usize;

/// Whether connections are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TlsPolicy {
    /// Not offered, as on a unix socket.
    #[default]
    Refused,
    /// At the client's choice.
    Optional,
    /// Nothing is told and nothing served before the connection is encrypted.
    Required,
}

/// What one client can make a session hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests handed out and not yet answered.
    pub requests: usize,
    /// Bytes of the reads and writes among them, and of replies not yet sent. One request may exceed it.
    pub bytes: u64,
    /// The receive buffer, allocated once. At least 192 KiB.
    pub receive_buffer_bytes: usize,
    /// Options in one handshake.
    pub options: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { requests: 256, bytes: 64 << 20, receive_buffer_bytes: 256 * 1024, options: 4096 }
    }
}

/// Why a connection has to be dropped: its client broke the protocol where no error reply is possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    #[error("client sent handshake flags {flags:#x} that were not offered")]
    UnknownHandshakeFlags { flags: u32 },
    #[error("client sent {found:#x} where an option starts")]
    BadOptionMagic { found: u64 },
    #[error("client sent an option of {length} bytes")]
    OptionTooLong { length: u32 },
    #[error("client sent more than {limit} options")]
    TooManyOptions { limit: u32 },
    #[error("client asked for export `{name}`, which it cannot have, in a way that allows no error reply")]
    ExportRefused { name: String },
    #[error("client needs an encrypted connection and asked for an export without one")]
    NotEncrypted,
    #[error("client sent data in the clear after it asked for encryption")]
    DataBeforeEncryption,
    #[error("client sent {found:#x} where a request starts")]
    BadRequestMagic { found: u32 },
    #[error("client announced a payload of {length} bytes")]
    PayloadTooLong { length: u64 },
    #[error("client closed the connection in the middle of a message")]
    ClosedMidMessage,
}

/// What happened on a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The client wants encryption. Send what is queued, do the TLS handshake, call
    /// [`Session::tls_established`], and move decrypted bytes from then on.
    StartTls,
    /// The handshake ended: requests for this export follow.
    Attached {
        export: usize,
    },
    Request(Request<'a>),
    /// The client said goodbye. Answer what is in flight, send it, then close: see [`Session::is_finished`].
    Disconnected,
}

/// One request, checked against its export. It wants exactly one reply, in any order among others.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    pub id: RequestId,
    /// In bytes; 0 for a flush.
    pub offset: u64,
    /// In bytes, never 0 except for a flush. Within the export.
    pub length: u64,
    /// The reply to a write, trim or zeroing waits until it is durable.
    pub fua: bool,
    pub command: Command<'a>,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    Read,
    Write {
        payload: &'a [u8],
    },
    /// A write of at least [`STREAM_FROM`] bytes whose payload is still arriving: `already` is its start,
    /// and the caller receives the `remaining` bytes where it wants them, telling
    /// [`Session::received_direct`], or calls [`Session::discard_payload`]. Until then `next_event` gives nothing.
    /// If the connection ends before, the write never happened.
    WriteStreaming {
        already: &'a [u8],
        remaining: usize,
    },
    Flush,
    Trim,
    /// `fast`: refuse with [`ErrorCode::NotSupported`] unless it is faster than writing zeroes.
    WriteZeroes {
        no_hole: bool,
        fast: bool,
    },
    /// `one`: only the first extent of each context is of use.
    BlockStatus {
        contexts: &'a [ContextIndex],
        one: bool,
    },
    Cache,
}

/// ```text
///              flags            GO or EXPORT_NAME             DISC, ABORT, error
/// ClientFlags ───────► Options ──────────────────► Transmission ───────► Closed
///                       │   ▲
///              STARTTLS ▼   │ tls_established
///                     AwaitTls
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    ClientFlags,
    Options,
    AwaitTls,
    Transmission { export: usize },
    Closed,
}

/// What the handshake agreed on so far.
#[derive(Debug, Default)]
struct Negotiated {
    fixed_newstyle: bool,
    no_zeroes: bool,
    encrypted: bool,
    style: HeaderStyle,
    /// The export that contexts were selected for, and its selected contexts.
    contexts: Option<(usize, Vec<ContextIndex>)>,
}

/// The server's end of one connection.
#[derive(Debug)]
pub struct Session {
    exports: Arc<ExportList>,
    tls: TlsPolicy,
    limits: Limits,
    receive: ReceiveBuffer,
    output: OutputQueue,
    phase: Phase,
    negotiated: Negotiated,
    options_seen: u32,
    rules: Rules,
    in_flight: InFlight,
    /// Contexts of the last block status request.
    asked_contexts: Vec<ContextIndex>,
    /// Payload bytes the caller still receives itself.
    direct: usize,
    /// Bytes to throw away before the next message.
    discard: u64,
    /// The answer to the request whose payload is thrown away.
    after_discard: Option<Rejection>,
    after_large_write: bool,
    refusal: Option<ErrorCode>,
}

impl Session {
    /// A new connection; its greeting is queued.
    pub fn new(exports: Arc<ExportList>, tls: TlsPolicy, limits: Limits) -> Session {
        assert!(limits.receive_buffer_bytes >= 3 * STREAM_FROM, "a receive buffer holds at least 192 KiB");
        assert!(limits.requests > 0 && limits.bytes > 0, "a session may hold at least one request");
        let mut output = OutputQueue::default();
        output.push(&INIT_PASSWD.to_be_bytes());
        output.push(&IHAVEOPT.to_be_bytes());
        output.push(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        Session {
            exports,
            tls,
            limits,
            receive: ReceiveBuffer::new(limits.receive_buffer_bytes),
            output,
            phase: Phase::ClientFlags,
            negotiated: Negotiated::default(),
            options_seen: 0,
            rules: Rules::default(),
            in_flight: InFlight::default(),
            asked_contexts: Vec::new(),
            direct: 0,
            discard: 0,
            after_discard: None,
            after_large_write: false,
            refusal: None,
        }
    }

    /// Whether there is a use for received bytes. While not, do not receive: `recv_space` may be empty.
    /// It becomes true again by replies, by sending them, and by calling [`Session::next_event`].
    pub fn wants_input(&self) -> bool {
        match self.phase {
            Phase::Closed | Phase::AwaitTls => false,
            _ => self.direct > 0 || (!self.is_saturated() && self.receive.len() < self.receive.capacity()),
        }
    }

    /// Where to receive the next bytes. While payload is received directly, use it only behind the
    /// destination of that payload, in one vectored receive.
    pub fn recv_space(&mut self) -> &mut [u8] {
        let limit = if self.after_large_write { HEADER_WINDOW } else { usize::MAX };
        self.receive.space(limit)
    }

    /// The first `count` bytes of the last `recv_space` were filled.
    pub fn received(&mut self, count: usize) {
        assert!(count == 0 || self.direct == 0, "payload that is received directly comes first");
        self.receive.filled(count);
    }

    /// Bytes of a [`Command::WriteStreaming`] that the caller still receives itself.
    pub fn direct_remaining(&self) -> usize {
        self.direct
    }

    /// `count` bytes of that payload were received.
    pub fn received_direct(&mut self, count: usize) {
        assert!(count <= self.direct, "more payload was received than the write has");
        self.direct -= count;
    }

    /// Has the session receive the rest of that payload and throw it away. The write still wants a reply.
    pub fn discard_payload(&mut self) {
        self.discard += self.direct as u64;
        self.direct = 0;
    }

    /// What the received bytes mean; call until `None`. Borrowed payload is valid until the next call.
    ///
    /// # Errors
    /// When the client broke the protocol. Nothing follows; drop the connection.
    pub fn next_event(&mut self) -> Result<Option<Event<'_>>, SessionError> {
        let step = match self.step() {
            Ok(step) => step,
            Err(error) => {
                self.close();
                return Err(error);
            }
        };
        Ok(step.map(|step| match step {
            Step::StartTls => Event::StartTls,
            Step::Attached { export } => Event::Attached { export },
            Step::Disconnected => Event::Disconnected,
            Step::Request(parsed) => Event::Request(self.present(parsed)),
        }))
    }

    fn step(&mut self) -> Result<Option<Step>, SessionError> {
        loop {
            if self.direct > 0 || !self.discard_received() || self.is_saturated() {
                return Ok(None);
            }
            let progress = match self.phase {
                Phase::Closed | Phase::AwaitTls => return Ok(None),
                Phase::ClientFlags => self.parse_client_flags()?,
                Phase::Options => self.parse_option()?,
                Phase::Transmission { .. } => self.parse_request()?,
            };
            match progress {
                Progress::Incomplete => return Ok(None),
                Progress::Handled => {}
                Progress::Step(step) => return Ok(Some(step)),
            }
        }
    }

    fn present(&self, parsed: Parsed) -> Request<'_> {
        let command = match parsed.command {
            ParsedCommand::Read => Command::Read,
            ParsedCommand::Write { payload } => Command::Write { payload: self.receive.at(payload) },
            ParsedCommand::WriteStreaming { already } => {
                Command::WriteStreaming { already: self.receive.at(already), remaining: self.direct }
            }
            ParsedCommand::Flush => Command::Flush,
            ParsedCommand::Trim => Command::Trim,
            ParsedCommand::WriteZeroes { no_hole, fast } => Command::WriteZeroes { no_hole, fast },
            ParsedCommand::BlockStatus { one } => {
                Command::BlockStatus { contexts: &self.asked_contexts, one }
            }
            ParsedCommand::Cache => Command::Cache,
        };
        Request { id: parsed.id, offset: parsed.offset, length: parsed.length, fua: parsed.fua, command }
    }

    /// Throws away received bytes that nobody wants; says whether none are left to come.
    fn discard_received(&mut self) -> bool {
        if self.discard > 0 {
            let now = self.discard.min(self.receive.len() as u64);
            self.receive.consume(now as usize);
            self.discard -= now;
        }
        if self.discard == 0
            && let Some(rejection) = self.after_discard.take()
        {
            self.reject(rejection);
        }
        self.discard == 0
    }

    fn is_saturated(&self) -> bool {
        self.in_flight.count() >= self.limits.requests
            || self.in_flight.bytes() + self.output.queued() >= self.limits.bytes
    }

    /// The TLS handshake that [`Event::StartTls`] asked for is done. What was agreed before is forgotten.
    pub fn tls_established(&mut self) {
        assert_eq!(self.phase, Phase::AwaitTls, "encryption starts when the client asks for it");
        self.negotiated = Negotiated {
            fixed_newstyle: self.negotiated.fixed_newstyle,
            no_zeroes: self.negotiated.no_zeroes,
            encrypted: true,
            ..Negotiated::default()
        };
        self.phase = Phase::Options;
    }

    /// The client closed its end.
    ///
    /// # Errors
    /// If that was in the middle of a message.
    pub fn end_of_input(&mut self) -> Result<(), SessionError> {
        let between_messages = self.receive.len() == 0 && self.direct == 0 && self.discard == 0;
        let was_closed = self.phase == Phase::Closed;
        self.close();
        if between_messages || was_closed { Ok(()) } else { Err(SessionError::ClosedMidMessage) }
    }

    fn close(&mut self) {
        self.phase = Phase::Closed;
        self.direct = 0;
        self.discard = 0;
        self.after_discard = None;
    }

    /// From now on every new request gets this error; those handed out are unaffected. `None` ends that.
    pub fn refuse_requests(&mut self, code: Option<ErrorCode>) {
        self.refusal = code;
    }

    /// The export this connection serves, once the handshake ended.
    pub fn attached(&self) -> Option<&Export> {
        match self.phase {
            Phase::Transmission { export } => self.exports.get(export),
            _ => None,
        }
    }

    /// The form of headers the client asked for.
    pub fn header_style(&self) -> HeaderStyle {
        self.negotiated.style
    }

    pub fn is_encrypted(&self) -> bool {
        self.negotiated.encrypted
    }

    /// Requests handed out and not answered.
    pub fn requests_in_flight(&self) -> usize {
        self.in_flight.count()
    }

    /// Nothing more will come, all is answered and sent: close the socket.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Closed && self.in_flight.count() == 0 && self.output.queued() == 0
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

    /// Sends what waits until all is gone or the socket takes no more: `WouldBlock` is no error here, and neither are 0 bytes,
    /// which is what encryption says whose own buffer is full.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send_to(&mut self, socket: &mut impl Write) -> io::Result<()> {
        while self.output.queued() > 0 {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = self.output.slices(&mut slices);
            match socket.write_vectored(&slices[..filled]) {
                Ok(0) => return Ok(()),
                Ok(count) => self.output.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives once into the session's own buffer. 0 means the client closed its end.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn receive_from(&mut self, socket: &mut impl Read) -> io::Result<usize> {
        let count = socket.read(self.recv_space())?;
        self.received(count);
        Ok(count)
    }
}

/// What a parser found.
#[derive(Debug)]
enum Progress {
    /// More bytes are needed.
    Incomplete,
    /// A message was dealt with here.
    Handled,
    Step(Step),
}

#[derive(Debug)]
enum Step {
    StartTls,
    Attached { export: usize },
    Request(Parsed),
    Disconnected,
}

type ByteRange = Range<usize>;

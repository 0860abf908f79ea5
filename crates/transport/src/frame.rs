//! Frames: the unit of everything two replicas say to each other.
//!
//! ```text
//!  0  u32  bytes of meta              <= MAX_META
//!  4  u32  bytes of payload sent      <= MAX_PAYLOAD
//!  8  u16  kind                       < FIRST_APPLICATION: the transport's own
//! 10  u16  flags                      bit 0: the payload is compressed (LZ4 block)
//! 12  u32  bytes of payload           <= MAX_PAYLOAD, once it is expanded
//! 16  meta, then payload
//! ```
//!
//! Little-endian. TLS protects the bytes, so a frame carries no checksum of its own. Meta is small and
//! decoded by the application; the payload is guest data and is never looked at.

use crate::{Error, ErrorKind};
use bytes::Bytes;
use rempart_buffer::{BufferMut, PAGE_SIZE};
use std::collections::VecDeque;

/// Bytes of a frame's header.
pub const HEADER_SIZE: usize = 16;
/// Bytes of meta at most: a lineage, a list of extents.
pub const MAX_META: usize = 1024 * 1024;
/// Bytes of payload at most. A log batch is smaller; this bounds what a wrong peer can make us allocate.
pub const MAX_PAYLOAD: usize = 64 * 1024 * 1024;

const FLAG_COMPRESSED: u16 = 1;
const KNOWN_FLAGS: u16 = FLAG_COMPRESSED;

/// Frame kinds. The application's start at [`kind::FIRST_APPLICATION`].
pub mod kind {
    pub(crate) const HELLO: u16 = 1;
    pub(crate) const REFUSE: u16 = 2;
    /// Kinds below belong to the transport.
    pub const FIRST_APPLICATION: u16 = 16;
}

/// One message: a kind, a small encoded part, and bytes of guest data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u16,
    pub meta: Bytes,
    pub payload: Bytes,
}

impl Frame {
    pub fn new(kind: u16, meta: impl Into<Bytes>, payload: impl Into<Bytes>) -> Frame {
        Frame { kind, meta: meta.into(), payload: payload.into() }
    }
}

/// Largest meta and payload accepted from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub meta: usize,
    pub payload: usize,
}

impl Limits {
    /// Before the peer has said who it is.
    pub const GREETING: Limits = Limits { meta: crate::hello::MAX_GREETING, payload: 0 };
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { meta: MAX_META, payload: MAX_PAYLOAD }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub meta: usize,
    pub payload_sent: usize,
    pub payload: usize,
    pub kind: u16,
    pub compressed: bool,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_SIZE] {
        let length = |bytes: usize| u32::try_from(bytes).expect("checked against the limits").to_le_bytes();
        let flags = if self.compressed { FLAG_COMPRESSED } else { 0 };
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..4].copy_from_slice(&length(self.meta));
        bytes[4..8].copy_from_slice(&length(self.payload_sent));
        bytes[8..10].copy_from_slice(&self.kind.to_le_bytes());
        bytes[10..12].copy_from_slice(&flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&length(self.payload));
        bytes
    }

    fn decode(bytes: &[u8; HEADER_SIZE], limits: Limits) -> Result<Header, Error> {
        let long = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let flags = short(10);
        let header = Header {
            meta: long(0),
            payload_sent: long(4),
            payload: long(12),
            kind: short(8),
            compressed: flags & FLAG_COMPRESSED != 0,
        };
        if header.meta > limits.meta || header.payload > limits.payload {
            return Err(Error::new(ErrorKind::Oversize, "read a frame").because(format!(
                "{} bytes of meta and {} of payload, at most {} and {}",
                header.meta, header.payload, limits.meta, limits.payload
            )));
        }
        // A compressed payload is sent only when that makes it smaller.
        let lengths_agree = if header.compressed {
            header.payload_sent < header.payload
        } else {
            header.payload_sent == header.payload
        };
        if flags & !KNOWN_FLAGS != 0 || header.kind == 0 || !lengths_agree {
            return Err(Error::new(ErrorKind::BadFrame, "read a frame").because("its header is nonsense"));
        }
        Ok(header)
    }
}

/// Turns the stream of bytes back into frames. Give it bytes as they come, in pieces of any size.
///
/// After an error the stream has no meaning any more: every later call fails too.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    state: State,
}

#[derive(Debug)]
enum State {
    Header { bytes: [u8; HEADER_SIZE], filled: usize },
    Body { header: Header, meta: Vec<u8>, payload: Payload },
    Broken,
}

impl State {
    const START: State = State::Header { bytes: [0; HEADER_SIZE], filled: 0 };
}

impl Decoder {
    pub fn new(limits: Limits) -> Decoder {
        Decoder { limits, state: State::START }
    }

    /// Applies from the next frame on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Takes all of `input`; appends every frame that is now complete to `frames`.
    pub fn feed(&mut self, mut input: &[u8], frames: &mut VecDeque<Frame>) -> Result<(), Error> {
        let result = loop {
            match self.step(&mut input, frames) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            self.state = State::Broken;
        }
        result
    }

    /// Says whether the stream may end here: not in the middle of a frame.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// False when nothing more can be done with `input`.
    fn step(&mut self, input: &mut &[u8], frames: &mut VecDeque<Frame>) -> Result<bool, Error> {
        match &mut self.state {
            State::Header { bytes, filled } => {
                if input.is_empty() {
                    return Ok(false);
                }
                let taken = take(input, HEADER_SIZE - *filled);
                bytes[*filled..*filled + taken.len()].copy_from_slice(taken);
                *filled += taken.len();
                if *filled == HEADER_SIZE {
                    let header = Header::decode(bytes, self.limits)?;
                    let meta = Vec::with_capacity(header.meta);
                    let payload = Payload::with_capacity(header.payload_sent);
                    self.state = State::Body { header, meta, payload };
                }
                Ok(true)
            }
            State::Body { header, meta, payload } => {
                meta.extend_from_slice(take(input, header.meta - meta.len()));
                payload.extend_from_slice(take(input, header.payload_sent - payload.filled().len()));
                if meta.len() < header.meta || payload.filled().len() < header.payload_sent {
                    return Ok(false);
                }
                let header = *header;
                let State::Body { meta, payload, .. } = std::mem::replace(&mut self.state, State::START)
                else {
                    unreachable!("the state was just matched");
                };
                let payload = if header.compressed {
                    expand(payload.filled(), header.payload)?
                } else {
                    payload.into()
                };
                frames.push_back(Frame { kind: header.kind, meta: meta.into(), payload });
                Ok(true)
            }
            State::Broken => Err(Error::new(ErrorKind::BadFrame, "read a frame").because("the stream broke")),
        }
    }
}

/// Bytes of a payload as they come. A page or more begins a page in memory, so that it can be written to disk from there;
/// less takes no more than it needs.
#[derive(Debug)]
enum Payload {
    Small(Vec<u8>),
    Pages(BufferMut),
}

impl Payload {
    fn with_capacity(length: usize) -> Payload {
        if length < PAGE_SIZE {
            return Payload::Small(Vec::with_capacity(length));
        }
        Payload::Pages(BufferMut::with_capacity(0, length))
    }

    fn extend_from_slice(&mut self, more: &[u8]) {
        match self {
            Payload::Small(bytes) => bytes.extend_from_slice(more),
            Payload::Pages(bytes) => bytes.extend_from_slice(more),
        }
    }

    fn filled(&self) -> &[u8] {
        match self {
            Payload::Small(bytes) => bytes,
            Payload::Pages(bytes) => bytes,
        }
    }
}

impl From<Payload> for Bytes {
    fn from(payload: Payload) -> Bytes {
        match payload {
            Payload::Small(bytes) => bytes.into(),
            Payload::Pages(bytes) => bytes.into(),
        }
    }
}

fn take<'a>(input: &mut &'a [u8], at_most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(at_most.min(input.len()));
    *input = rest;
    taken
}

fn expand(sent: &[u8], length: usize) -> Result<Bytes, Error> {
    let mut whole = BufferMut::for_overwrite(length);
    match lz4_flex::block::decompress_into(sent, &mut whole) {
        Ok(written) if written == length => Ok(whole.into()),
        Ok(_) => Err(Error::new(ErrorKind::BadFrame, "expand a payload").because("it is too short")),
        Err(error) => Err(Error::new(ErrorKind::BadFrame, "expand a payload").because(error)),
    }
}

//! TLS and frames over any byte stream, without a socket: bytes in, frames out, and the other way round.
//!
//! rustls's unbuffered interface: received bytes are decrypted where they were read, and records are
//! encrypted into one buffer that is written with few calls. Frames wait unencrypted, as reference-counted
//! slices, so that a full queue costs no copies.

use crate::compress::Compressor;
use crate::frame::{Decoder, Frame, HEADER_SIZE, Header, Limits, MAX_META, MAX_PAYLOAD};
use crate::{Compression, Error, ErrorKind};
use bytes::Bytes;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls_pki_types::CertificateDer;
use std::collections::VecDeque;
use std::io::{self, Read, Write};

/// Plaintext of a TLS record.
const RECORD: usize = 16 * 1024;
/// What a record adds at most, and room for a key update before it.
const RECORD_OVERHEAD: usize = 512;
/// Encrypted bytes made at a time: several dozen records a system call, yet within the processor's cache.
const OUTGOING: usize = 256 * 1024;
/// Encrypted bytes read at a time.
const INCOMING: usize = 256 * 1024;
/// Free room below which what is left of the buffer moves to its start. More than one record.
const INCOMING_LOW: usize = 32 * 1024;

/// Which side of the handshake we are.
pub(crate) enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// See the module.
pub(crate) struct Pipe {
    side: Side,
    incoming: Vec<u8>,
    /// `incoming[start..end]` was read and not yet decrypted.
    start: usize,
    end: usize,
    outgoing: Outgoing,
    decoder: Decoder,
    compressor: Compressor,
    queue: Queue,
    handshaking: bool,
    closing: bool,
    close_sent: bool,
    peer_closed: bool,
}

/// Encrypted bytes on their way to the socket: `bytes[sent..filled]`.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    filled: usize,
}

/// Plaintext waiting to be encrypted, in pieces.
#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Pipe {
    /// `received` holds bytes of the handshake that were read already.
    pub(crate) fn new(side: Side, received: &[u8], compression: Compression) -> Pipe {
        let mut incoming = vec![0; INCOMING.max(received.len() + INCOMING_LOW)];
        incoming[..received.len()].copy_from_slice(received);
        Pipe {
            side,
            incoming,
            start: 0,
            end: received.len(),
            outgoing: Outgoing { bytes: vec![0; OUTGOING], sent: 0, filled: 0 },
            decoder: Decoder::new(Limits::GREETING),
            compressor: Compressor::new(compression),
            queue: Queue::default(),
            handshaking: true,
            closing: false,
            close_sent: false,
            peer_closed: false,
        }
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.handshaking
    }

    pub(crate) fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// After the greeting, frames of any allowed size may come.
    pub(crate) fn greeted(&mut self, compression: Compression) {
        self.decoder.set_limits(Limits::default());
        self.compressor = Compressor::new(compression);
    }

    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match &self.side {
            Side::Client(client) => client.peer_certificates(),
            Side::Server(server) => server.peer_certificates(),
        }
    }

    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match &self.side {
            Side::Client(client) => client.alpn_protocol(),
            Side::Server(server) => server.alpn_protocol(),
        }
    }

    /// Bytes that wait to be sent, encrypted or not.
    pub(crate) fn queued(&self) -> usize {
        self.queue.bytes + self.outgoing.pending().len()
    }

    /// Whether encrypted bytes wait: the handshake's, or frames'.
    pub(crate) fn has_encrypted(&self) -> bool {
        !self.outgoing.pending().is_empty()
    }

    pub(crate) fn wants_write(&self) -> bool {
        self.queued() > 0 || (self.closing && !self.close_sent)
    }

    /// Queues a frame. Fails only if it exceeds the bounds, before anything was queued.
    pub(crate) fn send(&mut self, frame: Frame) -> Result<(), Error> {
        let Frame { kind, meta, payload } = frame;
        self.send_parts(kind, meta, std::iter::once(payload))
    }

    /// Queues a frame whose payload lies in several pieces.
    pub(crate) fn send_parts(
        &mut self,
        kind: u16,
        meta: Bytes,
        payload: impl Iterator<Item = Bytes> + Clone,
    ) -> Result<(), Error> {
        let length: usize = payload.clone().map(|piece| piece.len()).sum();
        if meta.len() > MAX_META || length > MAX_PAYLOAD {
            return Err(Error::new(ErrorKind::Oversize, "send a frame").because(format!(
                "{} bytes of meta and {length} of payload, at most {MAX_META} and {MAX_PAYLOAD}",
                meta.len()
            )));
        }
        let mut header =
            Header { meta: meta.len(), payload_sent: length, payload: length, kind, compressed: false };
        let mut pieces = payload.clone();
        // Only a payload in one piece is compressed: gathering it first would be a copy for nothing.
        let compressed = match (pieces.next(), pieces.next()) {
            (Some(piece), None) => self.compressor.compress(&piece),
            _ => None,
        };
        if let Some(bytes) = &compressed {
            header.payload_sent = bytes.len();
            header.compressed = true;
        }
        let mut head = Vec::with_capacity(HEADER_SIZE + meta.len());
        head.extend_from_slice(&header.encode());
        head.extend_from_slice(&meta);
        self.queue.push(head.into());
        match compressed {
            Some(bytes) => self.queue.push(bytes),
            None => payload.for_each(|piece| self.queue.push(piece)),
        }
        Ok(())
    }

    /// Tells the peer, once all is sent, that nothing more will come.
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// Reads once from `io`. Zero: the other side ended the stream.
    pub(crate) fn read_from(&mut self, io: &mut impl Read) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.incoming.len() - self.end < INCOMING_LOW {
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let count = io.read(&mut self.incoming[self.end..])?;
        self.end += count;
        Ok(count)
    }

    /// True if the last read left the buffer full: there is probably more.
    pub(crate) fn read_was_full(&self) -> bool {
        self.end == self.incoming.len()
    }

    /// Decrypts what was read and appends complete frames. Also does the handshake's steps.
    pub(crate) fn receive(&mut self, frames: &mut VecDeque<Frame>) -> Result<(), Error> {
        self.drive(frames, false)
    }

    /// Encrypts and writes until nothing is left or `io` would block.
    pub(crate) fn write_to(&mut self, io: &mut impl Write) -> Result<(), Error> {
        loop {
            if self.outgoing.pending().is_empty() {
                self.outgoing.reset();
                if !self.wants_write() || self.handshaking {
                    return Ok(());
                }
                // Frames that arrive are the reader's: encrypting never touches what was received.
                self.drive(&mut VecDeque::new(), true)?;
                if self.outgoing.pending().is_empty() {
                    return Ok(());
                }
            }
            match io.write(self.outgoing.pending()) {
                Ok(0) => return Err(Error::new(ErrorKind::Closed, "send to the peer")),
                Ok(count) => self.outgoing.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("send to the peer", error)),
            }
        }
    }

    fn drive(&mut self, frames: &mut VecDeque<Frame>, only_encrypt: bool) -> Result<(), Error> {
        let Pipe { side, incoming, start, end, outgoing, decoder, queue, .. } = self;
        // While encrypting, TLS is shown no received bytes.
        let limit = if only_encrypt { *start } else { *end };
        let mut turn = Turn {
            incoming: &mut incoming[..limit],
            start,
            outgoing,
            decoder,
            queue,
            frames,
            encrypt: only_encrypt,
            close: self.closing && !self.close_sent,
        };
        let outcome = match side {
            Side::Client(client) => turn.run(client),
            Side::Server(server) => turn.run(server),
        }?;
        match outcome {
            Outcome::Handshaking => {}
            Outcome::Traffic { close_sent } => {
                self.handshaking = false;
                self.close_sent |= close_sent;
            }
            Outcome::PeerClosed => self.peer_closed = true,
        }
        Ok(())
    }
}

impl Outgoing {
    fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..self.filled]
    }

    fn reset(&mut self) {
        (self.sent, self.filled) = (0, 0);
    }

    fn free(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// For the handshake's messages, whose size TLS chooses.
    fn make_room(&mut self, size: usize) {
        if self.bytes.len() - self.filled < size {
            self.bytes.resize(self.filled + size, 0);
        }
    }
}

impl Queue {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Hands out up to `room` bytes of the first piece without copying, if it fills whole records;
    /// else gathers up to one record's worth of pieces in `scratch`.
    fn next<'a>(&mut self, scratch: &'a mut [u8; RECORD], room: usize) -> Run<'a> {
        let Some(first) = self.pieces.front_mut() else { return Run::Gathered(&[]) };
        let whole = first.len().min(room) / RECORD * RECORD;
        if whole > 0 {
            self.bytes -= whole;
            let run = first.split_to(whole);
            if first.is_empty() {
                self.pieces.pop_front();
            }
            return Run::Direct(run);
        }
        let mut filled = 0;
        while filled < RECORD
            && let Some(first) = self.pieces.front_mut()
        {
            let count = first.len().min(RECORD - filled);
            scratch[filled..filled + count].copy_from_slice(&first.split_to(count));
            filled += count;
            if first.is_empty() {
                self.pieces.pop_front();
            }
        }
        self.bytes -= filled;
        Run::Gathered(&scratch[..filled])
    }
}

enum Run<'a> {
    Direct(Bytes),
    Gathered(&'a [u8]),
}

impl AsRef<[u8]> for Run<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Run::Direct(bytes) => bytes,
            Run::Gathered(bytes) => bytes,
        }
    }
}

/// The two connection types of rustls have this in common, but no trait for it.
trait Process {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Process for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Process for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

enum Outcome {
    Handshaking,
    Traffic { close_sent: bool },
    PeerClosed,
}

/// One run of TLS's state machine, until it needs something from outside.
struct Turn<'a> {
    incoming: &'a mut [u8],
    start: &'a mut usize,
    outgoing: &'a mut Outgoing,
    decoder: &'a mut Decoder,
    queue: &'a mut Queue,
    frames: &'a mut VecDeque<Frame>,
    encrypt: bool,
    close: bool,
}

impl Turn<'_> {
    fn run(&mut self, tls: &mut impl Process) -> Result<Outcome, Error> {
        loop {
            let UnbufferedStatus { mut discard, state } = tls.process(&mut self.incoming[*self.start..]);
            let state = match state {
                Ok(state) => state,
                Err(error) => {
                    *self.start += discard;
                    self.collect_alert(tls);
                    return Err(Error::tls("talk to the peer", error));
                }
            };
            let outcome = match state {
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(self.outgoing, |free| data.encode(free))?;
                    None
                }
                // What was encoded waits in `outgoing`, and goes out before anything else.
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    None
                }
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(|error| Error::tls("read from the peer", error))?;
                        discard += record.discard;
                        self.decoder.feed(record.payload, self.frames)?;
                    }
                    None
                }
                ConnectionState::WriteTraffic(traffic) => {
                    let close_sent = self.encrypt && fill(self.outgoing, self.queue, self.close, traffic)?;
                    Some(Outcome::Traffic { close_sent })
                }
                ConnectionState::BlockedHandshake => Some(Outcome::Handshaking),
                ConnectionState::PeerClosed | ConnectionState::Closed => Some(Outcome::PeerClosed),
                // Early data is never offered, and the enum may grow.
                _ => return Err(Error::new(ErrorKind::NotOurProtocol, "talk to the peer")),
            };
            *self.start += discard;
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    }

    /// Puts the alert that explains a failure where it will be sent.
    fn collect_alert(&mut self, tls: &mut impl Process) {
        let UnbufferedStatus { state, .. } = tls.process(&mut []);
        if let Ok(ConnectionState::EncodeTlsData(mut data)) = state {
            // The connection is lost anyway; an alert that cannot be written is only a worse message.
            let _ = encode(self.outgoing, |free| data.encode(free));
        }
    }
}

fn encode(
    outgoing: &mut Outgoing,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), Error> {
    loop {
        match write(outgoing.free()) {
            Ok(count) => {
                outgoing.filled += count;
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) => outgoing.make_room(needed.required_size),
            Err(error) => {
                return Err(Error::new(ErrorKind::NotOurProtocol, "talk to the peer").because(error));
            }
        }
    }
}

/// Encrypts queued bytes while a full record fits; then, if wanted and all is out, the closing alert.
fn fill<Data>(
    outgoing: &mut Outgoing,
    queue: &mut Queue,
    close: bool,
    mut traffic: WriteTraffic<'_, Data>,
) -> Result<bool, Error> {
    let failed = |error: EncryptError| Error::new(ErrorKind::NotOurProtocol, "encrypt").because(error);
    let mut scratch = [0; RECORD];
    while queue.bytes > 0 && outgoing.free().len() >= RECORD + RECORD_OVERHEAD {
        let records = outgoing.free().len() / (RECORD + RECORD_OVERHEAD);
        let run = queue.next(&mut scratch, records * RECORD);
        outgoing.filled += traffic.encrypt(run.as_ref(), outgoing.free()).map_err(failed)?;
    }
    if close && queue.bytes == 0 && outgoing.free().len() >= RECORD_OVERHEAD {
        outgoing.filled += traffic.queue_close_notify(outgoing.free()).map_err(failed)?;
        return Ok(true);
    }
    Ok(false)
}

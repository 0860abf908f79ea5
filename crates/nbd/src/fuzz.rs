//! Entry points for fuzzers and property tests: any bytes, no panic, bounded memory.

use crate::client::{Codec, Command as Ask, ConnectOptions, ExportInfo, Handshake, Outcome};
use crate::protocol::{IHAVEOPT, option};
use crate::server::{Command, ContextStatus, Event, Extent, Limits, Piece, RequestId, Session, TlsPolicy};
use crate::{BASE_ALLOCATION, ErrorCode, Export, ExportList, HeaderStyle};
use bytes::Bytes;
use std::collections::VecDeque;
use std::io::{IoSlice, Write};
use std::sync::Arc;

const LIMITS: Limits = Limits { requests: 8, bytes: 1 << 20, receive_buffer_bytes: 192 * 1024, options: 64 };
const EXPORT_SIZE: u64 = 64 << 20;
/// What one request may add beyond the limit: a longest read, an answer about every context.
const SLACK: u64 = (32 << 20) + (2 << 20);

/// Feeds `data` to a server's session as a client's bytes. The first two bytes choose how far the handshake
/// already is, the TLS policy, how the bytes are cut, and how the caller answers.
///
/// # Panics
/// If the session breaks a promise.
pub fn server_session(data: &[u8]) {
    let [how, cut, bytes @ ..] = data else { return };
    let mut disk = Export::new("disk", EXPORT_SIZE);
    disk.contexts = vec![BASE_ALLOCATION.into(), "test:dirty".into()];
    disk.cache = how & 0x80 != 0;
    let mut frozen = Export::new("frozen", EXPORT_SIZE);
    frozen.read_only = true;
    let exports = Arc::new(ExportList::new(vec![disk, frozen]).expect("these exports are fine"));
    let tls = match how >> 2 & 3 {
        1 => TlsPolicy::Optional,
        2 => TlsPolicy::Required,
        _ => TlsPolicy::Refused,
    };
    let mut session = Session::new(exports, tls, LIMITS);
    let mut input = Vec::new();
    if tls != TlsPolicy::Required {
        input = match how & 3 {
            0 => Vec::new(),
            1 => handshake(HeaderStyle::Simple),
            2 => handshake(HeaderStyle::Structured),
            _ => handshake(HeaderStyle::Extended),
        };
    }
    input.extend_from_slice(bytes);

    let step = usize::from(*cut) * 37 + 1;
    let mut caller = Caller { lazy: how & 0x10 != 0, fails: how & 0x20 != 0, waiting: VecDeque::new() };
    let mut rest = &input[..];
    loop {
        if caller.turn(&mut session).is_err() {
            break;
        }
        if rest.is_empty() || !session.wants_input() {
            break;
        }
        let direct = session.direct_remaining();
        let space = if direct > 0 { direct } else { session.recv_space().len() };
        assert!(space > 0, "a session that wants input has space for it");
        let (now, later) = rest.split_at(step.min(space).min(rest.len()));
        if direct > 0 {
            session.received_direct(now.len());
        } else {
            session.recv_space()[..now.len()].copy_from_slice(now);
            session.received(now.len());
        }
        rest = later;
    }
    let _ = session.end_of_input();
    caller.answer_all(&mut session);
    drain(&mut session, usize::MAX);
    assert!(session.is_finished(), "a closed session that answered all is finished");
}

/// Bytes of a handshake that ends attached to `disk`, with its contexts.
pub fn handshake(style: HeaderStyle) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    let mut ask = |option: u32, data: &[u8]| {
        bytes.extend_from_slice(&IHAVEOPT.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
    };
    let string = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    match style {
        HeaderStyle::Simple => {}
        HeaderStyle::Structured => ask(option::STRUCTURED_REPLY, &[]),
        HeaderStyle::Extended => ask(option::EXTENDED_HEADERS, &[]),
    }
    if style > HeaderStyle::Simple {
        let count = 2u32.to_be_bytes().to_vec();
        let contexts = [string("disk"), count, string(BASE_ALLOCATION), string("test:dirty")].concat();
        ask(option::SET_META_CONTEXT, &contexts);
    }
    ask(option::GO, &[string("disk"), vec![0, 0]].concat());
    bytes
}

enum Reply {
    Ok,
    Read(u64),
    Status { contexts: Vec<usize>, length: u64 },
}

struct Caller {
    /// Answers and sends only when the session takes nothing more.
    lazy: bool,
    fails: bool,
    waiting: VecDeque<(RequestId, Reply)>,
}

impl Caller {
    /// Takes events until there are none, then answers.
    fn turn(&mut self, session: &mut Session) -> Result<(), ()> {
        loop {
            let mut discard = false;
            match session.next_event().map_err(|_| ())? {
                None => {
                    check_bounds(session);
                    if !session.wants_input()
                        && (session.requests_in_flight() > 0 || session.queued_output() > 0)
                    {
                        self.answer_all(session);
                        drain(session, usize::MAX);
                        continue;
                    }
                    return Ok(());
                }
                Some(Event::StartTls) => {
                    drain(session, usize::MAX);
                    session.tls_established();
                }
                Some(Event::Attached { export }) => assert!(export < 2),
                Some(Event::Disconnected) => {}
                Some(Event::Request(request)) => {
                    let end = request.offset.checked_add(request.length);
                    assert!(end.is_some_and(|end| end <= EXPORT_SIZE), "requests lie within the export");
                    assert_eq!((request.offset | request.length) % 512, 0, "requests are aligned");
                    let reply = match request.command {
                        Command::Read => Reply::Read(request.length),
                        Command::BlockStatus { contexts, .. } => {
                            Reply::Status { contexts: contexts.to_vec(), length: request.length }
                        }
                        Command::Write { payload } => {
                            assert_eq!(payload.len() as u64, request.length);
                            Reply::Ok
                        }
                        Command::WriteStreaming { already, remaining } => {
                            assert_eq!((already.len() + remaining) as u64, request.length);
                            discard = self.fails;
                            Reply::Ok
                        }
                        _ => Reply::Ok,
                    };
                    self.waiting.push_back((request.id, reply));
                }
            }
            if discard {
                session.discard_payload();
            }
            if !self.lazy {
                self.answer_all(session);
                drain(session, usize::MAX);
            }
        }
    }

    fn answer_all(&mut self, session: &mut Session) {
        for (id, reply) in self.waiting.drain(..) {
            match reply {
                _ if self.fails => session.reply_error(id, ErrorCode::Io, "the disk is gone"),
                Reply::Ok => session.reply_ok(id),
                Reply::Read(length) if length <= 4096 => {
                    let filled: Result<(), ()> = session.reply_read_with(id, |_| Err(()));
                    assert!(filled.is_err());
                    let fill = |data: &mut [u8]| {
                        data.fill(1);
                        Ok::<(), ()>(())
                    };
                    session.reply_read_with(id, fill).expect("it is filled");
                }
                Reply::Read(length) => {
                    let data = Bytes::from_static(&[1; 1024]);
                    session.reply_read(
                        id,
                        [Piece::Data(data.clone()), Piece::Zeroes(length - 2048), Piece::Data(data)],
                    );
                }
                Reply::Status { contexts, length } => {
                    let extents = [Extent { length: 512, flags: 0 }, Extent { length, flags: 3 }];
                    let status = |&context: &usize| ContextStatus { context, extents: &extents };
                    session.reply_block_status(id, &contexts.iter().map(status).collect::<Vec<_>>());
                }
            }
            check_bounds(session);
        }
    }
}

fn check_bounds(session: &Session) {
    assert!(session.requests_in_flight() <= LIMITS.requests, "requests in flight are bounded");
    assert!(session.queued_output() <= LIMITS.bytes + SLACK, "queued replies are bounded");
}

/// Throws the output away as a socket would take it, up to `limit` bytes.
fn drain(session: &mut Session, limit: usize) {
    let mut left = limit;
    while session.queued_output() > 0 && left > 0 {
        let mut slices = [IoSlice::new(&[]); 5];
        let filled = session.output_slices(&mut slices);
        assert!(filled > 0, "queued bytes can be sent");
        let taken = std::io::sink().write_vectored(&slices[..filled]).expect("a sink takes all");
        session.sent(taken.min(left));
        left -= taken.min(left);
    }
}

/// Feeds `data` to a client as a server's bytes: to a handshake, or to a connection with requests in flight.
/// The first two bytes choose which, and how the bytes are cut.
///
/// # Panics
/// If the client breaks a promise.
pub fn client(data: &[u8]) {
    let [how, cut, bytes @ ..] = data else { return };
    let step = usize::from(*cut) * 37 + 1;
    let style = match how & 3 {
        0 => HeaderStyle::Simple,
        1 => HeaderStyle::Structured,
        _ => HeaderStyle::Extended,
    };
    if how & 4 != 0 {
        let mut options = ConnectOptions::new("disk");
        options.contexts = vec![BASE_ALLOCATION.into()];
        options.header_style = style;
        let mut handshake = match how >> 3 & 3 {
            0 => Handshake::list(),
            1 => Handshake::start_tls(),
            _ => Handshake::attach(&options),
        };
        for part in bytes.chunks(step) {
            if !matches!(handshake.received(part), Ok(None)) {
                return;
            }
            handshake.take_output();
        }
        return;
    }
    let contexts = vec![(0, BASE_ALLOCATION.to_owned()), (1, "test:dirty".to_owned())];
    let export = ExportInfo { size: EXPORT_SIZE, flags: u16::MAX, ..ExportInfo::default() };
    let mut codec = Codec::new(Outcome::Attached { export, style, contexts });
    let mut in_flight = 0;
    for ask in [
        Ask::Read { offset: 0, length: 4096 },
        Ask::Read { offset: 1 << 20, length: 64 << 10 },
        Ask::Write { offset: 0, payload: Bytes::from_static(&[1; 512]), fua: true },
        Ask::Flush,
        Ask::BlockStatus { offset: 0, length: 1 << 20, one: false },
        Ask::Read { offset: 0, length: 0 },
    ] {
        codec.submit(ask).expect("everything is offered");
        in_flight += 1;
    }
    let mut rest = bytes;
    loop {
        match codec.next_completion() {
            Ok(Some(_)) => in_flight -= 1,
            Ok(None) if rest.is_empty() => break,
            Ok(None) => {
                let space = codec.recv_space();
                assert!(!space.is_empty(), "there is space for the next bytes");
                let (now, later) = rest.split_at(step.min(space.len()).min(rest.len()));
                space[..now.len()].copy_from_slice(now);
                codec.received(now.len());
                rest = later;
            }
            Err(_) => return,
        }
        assert_eq!(codec.in_flight(), in_flight);
    }
}

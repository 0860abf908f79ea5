//! The session by the byte: what it answers, what it refuses, when it hangs up.

use bytes::Bytes;
use rempart_nbd::server::{
    Command, ContextStatus, Event, Extent, Limits, Piece, Session, SessionError, TlsPolicy,
};
use rempart_nbd::{BASE_ALLOCATION, ErrorCode, Export, ExportList, HeaderStyle, fuzz};
use std::sync::Arc;

fn session_with(tls: TlsPolicy, limits: Limits) -> Session {
    let mut disk = Export::new("disk", 64 << 20);
    disk.contexts = vec![BASE_ALLOCATION.into(), "test:dirty".into()];
    Session::new(Arc::new(ExportList::new(vec![disk]).unwrap()), tls, limits)
}

fn session(tls: TlsPolicy) -> Session {
    session_with(tls, Limits::default())
}

fn feed(session: &mut Session, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let space = session.recv_space();
        assert!(!space.is_empty(), "the session has space");
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        session.received(count);
        bytes = &bytes[count..];
    }
}

fn output(session: &mut Session) -> Vec<u8> {
    let mut all = Vec::new();
    session.send_to(&mut all).unwrap();
    all
}

/// Encryption over a socket that takes no more says so: nothing is lost, and the connection stays.
#[test]
fn a_stream_without_room_is_written_to_later() {
    struct Full(&'static [usize], Vec<u8>);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let (room, later) = self.0.split_first().unwrap_or((&usize::MAX, &[]));
            let taken = bytes.len().min(*room);
            self.1.extend_from_slice(&bytes[..taken]);
            self.0 = later;
            Ok(taken)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut stream = Full(&[0, 3, 0], Vec::new());
    let mut waiting = session(TlsPolicy::Refused);
    let all = output(&mut session(TlsPolicy::Refused));
    for left in [all.len() as u64, all.len() as u64 - 3, 0] {
        waiting.send_to(&mut stream).expect("it has no room, and is no worse");
        assert_eq!(waiting.queued_output(), left);
    }
    assert_eq!(stream.1, all);
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn option_reply(number: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    let length = (data.len() as u32).to_be_bytes();
    [&magic[..], &number.to_be_bytes(), &kind.to_be_bytes(), &length, data].concat()
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let magic = 0x2560_9513_u32.to_be_bytes();
    let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
    let (cookie, offset) = (cookie.to_be_bytes(), offset.to_be_bytes());
    [&magic[..], &flags, &command, &cookie, &offset, &length.to_be_bytes()].concat()
}

fn extended(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let magic = 0x21e4_1c71_u32.to_be_bytes();
    let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
    let (cookie, offset) = (cookie.to_be_bytes(), offset.to_be_bytes());
    [&magic[..], &flags, &command, &cookie, &offset, &length.to_be_bytes()].concat()
}

fn attached_with(style: HeaderStyle, limits: Limits) -> Session {
    let mut session = session_with(TlsPolicy::Refused, limits);
    feed(&mut session, &fuzz::handshake(style));
    assert_eq!(session.next_event(), Ok(Some(Event::Attached { export: 0 })));
    output(&mut session);
    session
}

fn attached(style: HeaderStyle) -> Session {
    attached_with(style, Limits::default())
}

fn error_of(session: &mut Session) -> SessionError {
    let error = loop {
        match session.next_event() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the session went on"),
            Err(error) => break error,
        }
    };
    assert_eq!(session.next_event(), Ok(None), "nothing follows an error");
    assert!(!session.wants_input());
    error
}

#[test]
fn a_handshake_is_what_the_specification_shows() {
    let mut session = session(TlsPolicy::Refused);
    assert_eq!(output(&mut session), b"NBDMAGICIHAVEOPT\0\x03");
    feed(&mut session, &3u32.to_be_bytes());
    feed(&mut session, &option(8, b""));
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(output(&mut session), option_reply(8, 1, b""));
    feed(&mut session, &option(7, b"\0\0\0\x04disk\0\x01\0\x03"));
    assert_eq!(session.next_event(), Ok(Some(Event::Attached { export: 0 })));
    let sizes = b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0";
    // Flags: has flags, flush, FUA, trim, zeroes, DF, several connections, fast zero.
    let export = b"\0\0\0\0\0\0\x04\0\0\0\x09\xed";
    let expected = [option_reply(7, 3, sizes), option_reply(7, 3, export), option_reply(7, 1, b"")].concat();
    assert_eq!(output(&mut session), expected);
    assert_eq!(session.attached().unwrap().name, "disk");
}

#[test]
fn export_name_ends_the_handshake_with_or_without_padding() {
    for (flags, length) in [(3u32, 10), (1, 134), (0, 134)] {
        let mut session = session(TlsPolicy::Refused);
        output(&mut session);
        feed(&mut session, &flags.to_be_bytes());
        feed(&mut session, &option(1, b"disk"));
        assert_eq!(session.next_event(), Ok(Some(Event::Attached { export: 0 })));
        assert_eq!(output(&mut session).len(), length);
    }
}

#[test]
fn options_that_cannot_be_granted_are_refused_and_the_handshake_goes_on() {
    let mut session = session(TlsPolicy::Refused);
    output(&mut session);
    feed(&mut session, &3u32.to_be_bytes());
    let kind_of = |session: &mut Session, sent: Vec<u8>| {
        feed(session, &sent);
        assert_eq!(session.next_event(), Ok(None));
        let replied = output(session);
        u32::from_be_bytes(replied[12..16].try_into().unwrap()) & 0xffff
    };
    assert_eq!(kind_of(&mut session, option(99, b"what")), 1, "unknown");
    assert_eq!(kind_of(&mut session, option(5, b"")), 2, "TLS by policy");
    assert_eq!(kind_of(&mut session, option(3, b"x")), 3, "a list takes no data");
    assert_eq!(kind_of(&mut session, option(8, b"x")), 3, "structured replies take no data");
    assert_eq!(kind_of(&mut session, option(10, b"\0\0\0\0\0\0\0\0")), 3, "contexts need structured replies");
    assert_eq!(kind_of(&mut session, option(7, b"\0\0\0\x04nope\0\0")), 6, "no such export");
    assert_eq!(kind_of(&mut session, option(7, b"\0\0\0\xffdisk\0\0")), 3, "a name longer than the option");
    assert_eq!(
        kind_of(&mut session, option(7, b"\0\0\0\x04disk\0\x02\0\x00")),
        3,
        "fewer requests than told"
    );
    assert_eq!(kind_of(&mut session, option(6, &vec![0; 70_000])), 9, "too long");
    assert_eq!(kind_of(&mut session, option(11, b"")), 1, "extended headers");
    assert_eq!(kind_of(&mut session, option(11, b"")), 3, "extended headers twice");
    assert_eq!(kind_of(&mut session, option(8, b"")), 10, "structured replies after that");
    feed(&mut session, &option(7, b"\0\0\0\x04disk\0\0"));
    assert_eq!(session.next_event(), Ok(Some(Event::Attached { export: 0 })));
}

#[test]
fn an_abort_is_acknowledged_and_ends_the_session() {
    let mut session = session(TlsPolicy::Refused);
    output(&mut session);
    feed(&mut session, &3u32.to_be_bytes());
    feed(&mut session, &option(2, b"bye"));
    assert_eq!(session.next_event(), Ok(Some(Event::Disconnected)));
    assert_eq!(output(&mut session), option_reply(2, 1, b""));
    assert!(session.is_finished());
}

#[test]
fn breaches_that_allow_no_answer_end_the_connection() {
    let after = |bytes: &[u8]| {
        let mut session = session(TlsPolicy::Refused);
        feed(&mut session, bytes);
        error_of(&mut session)
    };
    let flags = 3u32.to_be_bytes();
    assert_eq!(after(&7u32.to_be_bytes()), SessionError::UnknownHandshakeFlags { flags: 7 });
    assert_eq!(
        after(&[&flags[..], b"GET / HTTP/1.1"].concat()),
        SessionError::BadOptionMagic { found: u64::from_be_bytes(*b"GET / HT") }
    );
    let huge = [&flags[..], b"IHAVEOPT", &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(after(&huge), SessionError::OptionTooLong { length: u32::MAX });
    assert_eq!(
        after(&[&flags[..], &option(1, b"nope")].concat()),
        SessionError::ExportRefused { name: "nope".into() }
    );
    let options = [&flags[..], &option(3, b"").repeat(5000)].concat();
    assert_eq!(after(&options), SessionError::TooManyOptions { limit: 4096 });

    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &[0; 28]);
    assert_eq!(error_of(&mut session), SessionError::BadRequestMagic { found: 0 });
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &request(0, 1, 1, 0, u32::MAX));
    assert_eq!(error_of(&mut session), SessionError::PayloadTooLong { length: u64::from(u32::MAX) });
    let mut session = attached(HeaderStyle::Extended);
    feed(&mut session, &extended(32, 0, 1, 0, u64::MAX));
    assert_eq!(error_of(&mut session), SessionError::PayloadTooLong { length: u64::MAX });
    let mut session = attached(HeaderStyle::Extended);
    feed(&mut session, &[request(0, 0, 1, 0, 512), vec![0; 4]].concat());
    assert_eq!(error_of(&mut session), SessionError::BadRequestMagic { found: 0x2560_9513 });
}

#[test]
fn a_client_that_closes_in_the_middle_of_a_message_is_told_apart() {
    let mut session = attached(HeaderStyle::Structured);
    assert_eq!(session.end_of_input(), Ok(()));
    for sent in [request(0, 0, 1, 0, 512)[..20].to_vec(), request(0, 1, 1, 0, 4096)] {
        let mut session = attached(HeaderStyle::Structured);
        feed(&mut session, &sent);
        assert_eq!(session.next_event(), Ok(None));
        assert_eq!(session.end_of_input(), Err(SessionError::ClosedMidMessage));
    }
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &request(0, 1, 1, 0, 1 << 20));
    assert!(matches!(session.next_event(), Ok(Some(Event::Request(_)))));
    assert_eq!(session.end_of_input(), Err(SessionError::ClosedMidMessage));
}

#[test]
fn a_large_write_is_received_where_the_caller_wants_it() {
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &[request(1, 1, 9, 1 << 20, 1 << 20), vec![7; 1000]].concat());
    let Ok(Some(Event::Request(request_seen))) = session.next_event() else { panic!() };
    assert_eq!((request_seen.offset, request_seen.length, request_seen.fua), (1 << 20, 1 << 20, true));
    let id = request_seen.id;
    let Command::WriteStreaming { already, remaining } = request_seen.command else { panic!() };
    assert_eq!((already, remaining), (&[7; 1000][..], (1 << 20) - 1000));
    assert_eq!(session.next_event(), Ok(None));
    session.received_direct(remaining - 1);
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(session.direct_remaining(), 1);
    assert!(session.wants_input());
    session.received_direct(1);
    // The next request comes in behind it; the window is small so that its payload is not received twice.
    assert_eq!(session.recv_space().len(), 4096);
    feed(&mut session, &request(0, 3, 10, 0, 0));
    assert!(matches!(session.next_event(), Ok(Some(Event::Request(r))) if r.command == Command::Flush));
    assert!(session.recv_space().len() > 4096);
    session.reply_ok(id);
    assert_eq!(output(&mut session), b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x09");
}

#[test]
fn the_payload_of_a_write_that_will_fail_can_be_thrown_away() {
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &request(0, 1, 9, 0, 128 << 10));
    let Ok(Some(Event::Request(seen))) = session.next_event() else { panic!() };
    let id = seen.id;
    session.discard_payload();
    session.reply_error(id, ErrorCode::Io, "gone");
    feed(&mut session, &vec![0xee; 64 << 10]);
    assert_eq!(session.next_event(), Ok(None));
    feed(&mut session, &vec![0xee; 64 << 10]);
    feed(&mut session, &request(0, 3, 10, 0, 0));
    assert!(matches!(session.next_event(), Ok(Some(Event::Request(r))) if r.command == Command::Flush));
}

#[test]
fn a_refused_write_is_answered_once_its_payload_is_in() {
    let mut session = attached(HeaderStyle::Simple);
    feed(&mut session, &request(0, 1, 9, 64 << 20, 128 << 10));
    feed(&mut session, &vec![1; 100_000]);
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(session.queued_output(), 0);
    feed(&mut session, &vec![1; (128 << 10) - 100_000]);
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(output(&mut session), b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x09");
}

#[test]
fn reads_come_in_chunks_of_data_and_holes() {
    let data = |byte: u8, length: usize| Piece::Data(Bytes::from(vec![byte; length]));
    let pieces = || [data(1, 512), data(2, 1024), Piece::Zeroes(2048), data(3, 512)];
    let chunk = |flags: u8, kind: u8, length: u32| {
        let header = [0x66, 0x8e, 0x33, 0xef, 0, flags, 0, kind, 0, 0, 0, 0, 0, 0, 0, 5];
        [&header[..], &length.to_be_bytes()].concat()
    };
    let mut session = attached(HeaderStyle::Structured);
    let mut ask = |flags: u16| {
        feed(&mut session, &request(flags, 0, 5, 4096, 4096));
        let Ok(Some(Event::Request(seen))) = session.next_event() else { panic!() };
        let id = seen.id;
        session.reply_read(id, pieces());
        output(&mut session)
    };
    let flat = [vec![1; 512], vec![2; 1024], vec![0; 2048], vec![3; 512]].concat();
    let expected = [
        chunk(0, 1, 8 + 1536),
        4096u64.to_be_bytes().to_vec(),
        flat[..1536].to_vec(),
        chunk(0, 2, 12),
        (4096u64 + 1536).to_be_bytes().to_vec(),
        2048u32.to_be_bytes().to_vec(),
        chunk(1, 1, 8 + 512),
        (4096u64 + 3584).to_be_bytes().to_vec(),
        vec![3; 512],
    ];
    assert_eq!(ask(0), expected.concat());
    assert_eq!(ask(4), [chunk(1, 1, 8 + 4096), 4096u64.to_be_bytes().to_vec(), flat].concat());
}

#[test]
fn a_status_request_may_name_its_contexts() {
    let mut session = attached(HeaderStyle::Extended);
    let ask = |session: &mut Session, ids: &[u32]| {
        let mut payload = (1u64 << 20).to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
        feed(session, &extended(32, 7, 5, 0, payload.len() as u64));
        feed(session, &payload);
        match session.next_event().unwrap() {
            Some(Event::Request(seen)) => {
                assert_eq!(seen.length, 1 << 20);
                let Command::BlockStatus { contexts, .. } = seen.command else { panic!() };
                Some((seen.id, contexts.to_vec()))
            }
            _ => None,
        }
    };
    let (id, contexts) = ask(&mut session, &[1]).unwrap();
    assert_eq!(contexts, [1]);
    let extents = [Extent { length: 512, flags: 1 }];
    session.reply_block_status(id, &[ContextStatus { context: 1, extents: &extents }]);
    let replied = output(&mut session);
    assert_eq!(replied[6..8], [0, 6]);
    assert_eq!(
        replied[32..],
        [&[0, 0, 0, 1, 0, 0, 0, 1][..], &512u64.to_be_bytes(), &1u64.to_be_bytes()].concat()
    );
    for wrong in [&[2][..], &[1, 1], &[], &[7]] {
        assert_eq!(ask(&mut session, wrong), None);
        assert_eq!(output(&mut session)[6..8], [0x80, 1], "{wrong:?} is an error");
    }
    let (id, contexts) = ask(&mut session, &[1, 0]).unwrap();
    assert_eq!(contexts, [1, 0]);
    session.reply_error(id, ErrorCode::Io, "");
}

#[test]
fn a_client_that_reads_no_replies_is_not_read_from() {
    let limits = Limits { requests: 4, bytes: 1 << 20, ..Limits::default() };
    let mut session = attached_with(HeaderStyle::Structured, limits);
    feed(&mut session, &request(0, 3, 1, 0, 0).repeat(100));
    let mut ids = Vec::new();
    while let Some(Event::Request(seen)) = session.next_event().unwrap() {
        ids.push(seen.id);
    }
    assert_eq!((ids.len(), session.wants_input()), (4, false));
    session.reply_ok(ids[0]);
    assert!(session.wants_input());
    assert!(matches!(session.next_event(), Ok(Some(Event::Request(_)))));

    // Rejected requests count by the replies they leave.
    let mut session = attached_with(HeaderStyle::Structured, limits);
    let bad = request(0, 99, 1, 0, 0).repeat(1000);
    let mut fed = 0;
    while session.wants_input() {
        assert!(fed < 100 << 20, "a flood of bad requests is stopped");
        feed(&mut session, &bad);
        fed += bad.len();
        assert_eq!(session.next_event(), Ok(None));
    }
    assert!(session.queued_output() < 2 << 20);
    output(&mut session);
    assert_eq!(session.next_event(), Ok(None));
    assert!(session.wants_input());
}

#[test]
fn data_in_the_clear_behind_starttls_ends_the_connection() {
    let mut session = session(TlsPolicy::Required);
    output(&mut session);
    feed(&mut session, &3u32.to_be_bytes());
    feed(&mut session, &option(3, b""));
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(output(&mut session)[12..16], [0x80, 0, 0, 5]);
    feed(&mut session, &option(5, b""));
    assert_eq!(session.next_event(), Ok(Some(Event::StartTls)));
    assert!(!session.wants_input());
    assert_eq!(output(&mut session), option_reply(5, 1, b""));
    session.tls_established();
    feed(&mut session, &option(5, b""));
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(output(&mut session)[12..16], [0x80, 0, 0, 3], "TLS in TLS");

    let mut session = self::session(TlsPolicy::Required);
    feed(
        &mut session,
        &[&3u32.to_be_bytes()[..], &option(5, b""), &option(7, b"\0\0\0\x04disk\0\0")].concat(),
    );
    assert_eq!(error_of(&mut session), SessionError::DataBeforeEncryption);
    let mut session = self::session(TlsPolicy::Required);
    feed(&mut session, &[&3u32.to_be_bytes()[..], &option(1, b"disk")].concat());
    assert_eq!(error_of(&mut session), SessionError::NotEncrypted);
}

#[test]
fn what_was_agreed_before_encryption_is_forgotten() {
    let mut session = session(TlsPolicy::Optional);
    feed(&mut session, &3u32.to_be_bytes());
    feed(&mut session, &option(11, b""));
    assert_eq!(session.next_event(), Ok(None));
    feed(&mut session, &option(5, b""));
    assert_eq!(session.next_event(), Ok(Some(Event::StartTls)));
    session.tls_established();
    assert_eq!(session.header_style(), HeaderStyle::Simple);
}

#[test]
fn goodbye_waits_for_what_is_in_flight() {
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &[request(0, 3, 1, 0, 0), request(0, 2, 2, 0, 0), b"more".to_vec()].concat());
    let Ok(Some(Event::Request(seen))) = session.next_event() else { panic!() };
    let id = seen.id;
    assert_eq!(session.next_event(), Ok(Some(Event::Disconnected)));
    assert_eq!(session.next_event(), Ok(None));
    assert!(!session.is_finished());
    session.reply_ok(id);
    assert!(!session.is_finished());
    output(&mut session);
    assert!(session.is_finished());
}

#[test]
fn a_server_that_shuts_down_says_so() {
    let mut session = attached(HeaderStyle::Simple);
    session.refuse_requests(Some(ErrorCode::ShuttingDown));
    feed(&mut session, &[request(0, 1, 4, 0, 512), vec![1; 512]].concat());
    assert_eq!(session.next_event(), Ok(None));
    assert_eq!(output(&mut session), b"\x67\x44\x66\x98\0\0\0\x6c\0\0\0\0\0\0\0\x04");
}

#[test]
fn equal_cookies_are_two_requests() {
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &request(0, 3, 1, 0, 0).repeat(2));
    let mut ids = Vec::new();
    while let Some(Event::Request(seen)) = session.next_event().unwrap() {
        ids.push(seen.id);
    }
    assert_ne!(ids[0], ids[1]);
    ids.into_iter().for_each(|id| session.reply_ok(id));
    assert_eq!(output(&mut session).len(), 32);
}

#[test]
#[should_panic(expected = "a request is answered once")]
fn a_second_answer_is_a_bug_of_the_caller() {
    let mut session = attached(HeaderStyle::Structured);
    feed(&mut session, &request(0, 3, 1, 0, 0));
    let Ok(Some(Event::Request(seen))) = session.next_event() else { panic!() };
    let id = seen.id;
    session.reply_ok(id);
    session.reply_ok(id);
}

#[test]
#[should_panic(expected = "a request is answered once")]
fn an_old_answer_is_none_to_the_request_in_its_place() {
    let mut session = attached(HeaderStyle::Structured);
    let mut flush = |cookie: u64| {
        feed(&mut session, &request(0, 3, cookie, 0, 0));
        let Ok(Some(Event::Request(seen))) = session.next_event() else { panic!() };
        let id = seen.id;
        session.reply_ok(id);
        id
    };
    let old = flush(1);
    flush(2);
    feed(&mut session, &request(0, 3, 3, 0, 0));
    assert!(matches!(session.next_event(), Ok(Some(Event::Request(_)))));
    session.reply_ok(old);
}

#[test]
fn contexts_of_another_export_do_not_count() {
    let exports = ["one", "two"].map(|name| {
        let mut export = Export::new(name, 1 << 20);
        export.contexts = vec![BASE_ALLOCATION.into()];
        export
    });
    let exports = Arc::new(ExportList::new(exports.to_vec()).unwrap());
    for (name, granted) in [("one", true), ("two", false)] {
        let mut session = Session::new(exports.clone(), TlsPolicy::Refused, Limits::default());
        feed(&mut session, &3u32.to_be_bytes());
        feed(&mut session, &option(8, b""));
        feed(&mut session, &option(10, b"\0\0\0\x03one\0\0\0\x01\0\0\0\x0fbase:allocation"));
        feed(&mut session, &option(7, &[b"\0\0\0\x03", name.as_bytes(), b"\0\0"].concat()));
        assert!(matches!(session.next_event(), Ok(Some(Event::Attached { .. }))));
        feed(&mut session, &request(0, 7, 1, 0, 512));
        let handed_out = matches!(session.next_event(), Ok(Some(Event::Request(_))));
        assert_eq!(handed_out, granted, "{name}");
    }
}

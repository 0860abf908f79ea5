//! A server that lies is found out before its data is believed.

use bytes::Bytes;
use rempart_nbd::client::{
    Answer, ClientError, Codec, Command, ConnectOptions, ExportInfo, Handshake, Outcome,
};
use rempart_nbd::{BASE_ALLOCATION, ErrorCode, HeaderStyle};

fn codec(style: HeaderStyle) -> Codec {
    let contexts = vec![(3, BASE_ALLOCATION.to_owned())];
    Codec::new(Outcome::Attached { export: ExportInfo::default(), style, contexts })
}

fn feed(codec: &mut Codec, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let space = codec.recv_space();
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        codec.received(count);
        bytes = &bytes[count..];
    }
}

/// A chunk of a reply to the request with this cookie; 1 in `flags` ends the reply.
fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let header = [&flags.to_be_bytes()[..], &kind.to_be_bytes(), &cookie.to_be_bytes()].concat();
    let length = (payload.len() as u32).to_be_bytes();
    [&0x668e_33ef_u32.to_be_bytes()[..], &header, &length, payload].concat()
}

fn data(offset: u64, length: usize) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &vec![0xaa; length]].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

/// What comes of a read of 1024 bytes at 4096 that is answered so.
fn read_answered(reply: &[u8]) -> Result<Option<Result<Answer, ErrorCode>>, ClientError> {
    let mut codec = codec(HeaderStyle::Structured);
    codec.submit(Command::Read { offset: 4096, length: 1024 }).unwrap();
    feed(&mut codec, reply);
    let completion = codec.next_completion()?;
    Ok(completion.map(|completion| completion.result.map_err(|error| error.code)))
}

fn status_answered(reply: &[u8]) -> Result<Option<Result<Answer, ErrorCode>>, ClientError> {
    let mut codec = codec(HeaderStyle::Structured);
    codec.submit(Command::BlockStatus { offset: 0, length: 4096, one: false }).unwrap();
    feed(&mut codec, reply);
    let completion = codec.next_completion()?;
    Ok(completion.map(|completion| completion.result.map_err(|error| error.code)))
}

fn violation<T: std::fmt::Debug>(result: Result<T, ClientError>) -> &'static str {
    match result {
        Err(ClientError::Violation(what)) => what,
        other => panic!("the lie was believed: {other:?}"),
    }
}

#[test]
fn honest_replies_in_any_order_are_put_together() {
    let parts = [
        chunk(0, 1, 0, &data(4096 + 768, 256)),
        chunk(0, 2, 0, &hole(4096 + 512, 256)),
        chunk(0, 1, 0, &data(4096, 512)),
        chunk(1, 0, 0, &[]),
    ];
    let Ok(Some(Ok(Answer::Data(read)))) = read_answered(&parts.concat()) else { panic!() };
    assert_eq!(read, [vec![0xaa; 512], vec![0; 256], vec![0xaa; 256]].concat());
}

#[test]
fn reads_that_lie_are_violations() {
    let lie = |parts: &[Vec<u8>]| violation(read_answered(&parts.concat()));
    let done = || chunk(1, 0, 0, &[]);
    assert_eq!(lie(&[chunk(1, 1, 0, &data(4096, 512))]), "a reply that ends before it is complete");
    assert_eq!(lie(&[done()]), "a reply that ends before it is complete");
    assert_eq!(
        lie(&[chunk(0, 1, 0, &data(4096, 512)), chunk(0, 1, 0, &data(4096 + 256, 512)), done()]),
        "data that overlaps other data"
    );
    assert_eq!(
        lie(&[chunk(0, 1, 0, &data(4096, 512)), chunk(0, 2, 0, &hole(4096, 512)), done()]),
        "data that overlaps other data"
    );
    assert_eq!(lie(&[chunk(1, 1, 0, &data(4096 + 512, 1024))]), "data outside of what was asked for");
    assert_eq!(lie(&[chunk(1, 1, 0, &data(0, 1024))]), "data nobody asked for");
    assert_eq!(lie(&[chunk(1, 1, 0, &data(u64::MAX, 1024))]), "data outside of what was asked for");
    assert_eq!(lie(&[chunk(1, 1, 0, &data(4096, 2048))]), "a reply that is too long");
    assert_eq!(lie(&[chunk(1, 2, 0, &hole(4096, u32::MAX))]), "data outside of what was asked for");
    assert_eq!(lie(&[chunk(1, 2, 0, &hole(4096, 0))]), "data outside of what was asked for");
    assert_eq!(lie(&[chunk(1, 5, 0, &[0; 12])]), "extents nobody asked for");
    assert_eq!(lie(&[chunk(1, 77, 0, &[])]), "a reply of an unexpected kind");
    assert_eq!(lie(&[chunk(0, 0, 0, &[])]), "a reply of an unexpected kind");
    assert_eq!(lie(&[chunk(1, 1, 9, &data(4096, 1024))]), "a reply to no request");
    assert_eq!(lie(&[b"SSH-2.0-OpenSSH".to_vec()]), "a reply that starts with no known number");
    let simple = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 12], &[0; 1024]].concat();
    assert_eq!(lie(&[simple]), "a simple reply to a read");
    assert_eq!(lie(&[chunk(1, 0x8001, 0, &[0, 0, 0, 5, 0xff, 0xff])]), "a malformed error");
    assert_eq!(lie(&[chunk(1, 0x8001, 0, &[0; 6])]), "a malformed error");
    assert_eq!(lie(&[chunk(1, 0x8001, 0, &[0; 9000])]), "a reply that is too long");
}

#[test]
fn a_reply_comes_once() {
    let mut codec = codec(HeaderStyle::Structured);
    let first = codec.submit(Command::Read { offset: 0, length: 512 }).unwrap();
    let reply = chunk(1, 1, 0, &data(0, 512));
    feed(&mut codec, &reply);
    assert_eq!(codec.next_completion().unwrap().unwrap().cookie, first);
    // The same place in the table, another request: the old reply is none to it.
    let second = codec.submit(Command::Read { offset: 0, length: 512 }).unwrap();
    assert_ne!(first, second);
    feed(&mut codec, &reply);
    assert_eq!(violation(codec.next_completion()), "a reply to no request");
}

#[test]
fn errors_are_told_with_their_message() {
    let text = b"no such luck";
    let payload = [&28u32.to_be_bytes()[..], &(text.len() as u16).to_be_bytes(), text].concat();
    let mut codec = codec(HeaderStyle::Structured);
    codec.submit(Command::Read { offset: 4096, length: 1024 }).unwrap();
    feed(&mut codec, &[chunk(0, 1, 0, &data(4096, 512)), chunk(1, 0x8001, 0, &payload)].concat());
    let error = codec.next_completion().unwrap().unwrap().result.unwrap_err();
    assert_eq!(error.to_string(), "read at byte 4096: no space left on device: no such luck");
    assert_eq!(read_answered(&chunk(1, 0x8777, 0, &payload)).unwrap(), Some(Err(ErrorCode::NoSpace)));
}

#[test]
fn statuses_that_lie_are_violations() {
    let extents = |id: u32, rest: &[u32]| {
        let mut payload = id.to_be_bytes().to_vec();
        rest.iter().for_each(|number| payload.extend(number.to_be_bytes()));
        payload
    };
    let honest = extents(3, &[4096, 0]);
    assert!(matches!(status_answered(&chunk(1, 5, 0, &honest)), Ok(Some(Ok(Answer::Status(_))))));
    let lie = |parts: &[Vec<u8>]| violation(status_answered(&parts.concat()));
    assert_eq!(lie(&[chunk(1, 0, 0, &[])]), "a reply that ends before it is complete");
    assert_eq!(
        lie(&[chunk(1, 5, 0, &extents(4, &[4096, 0]))]),
        "extents of a context that was not agreed on"
    );
    assert_eq!(lie(&[chunk(1, 5, 0, &extents(3, &[]))]), "a malformed list of extents");
    assert_eq!(lie(&[chunk(1, 5, 0, &extents(3, &[0, 0]))]), "a malformed list of extents");
    assert_eq!(lie(&[chunk(1, 5, 0, &extents(3, &[4096]))]), "a malformed list of extents");
    assert_eq!(lie(&[chunk(0, 5, 0, &honest), chunk(1, 5, 0, &honest)]), "extents of one context twice");
    assert_eq!(lie(&[chunk(1, 6, 0, &[0; 24])]), "extents nobody asked for");
    assert_eq!(lie(&[chunk(1, 1, 0, &data(0, 512))]), "a reply that is too long");
}

#[test]
fn an_extended_reply_names_its_requests_offset() {
    let mut codec = codec(HeaderStyle::Extended);
    codec.submit(Command::Read { offset: 4096, length: 512 }).unwrap();
    let header = [&0x6e8a_278c_u32.to_be_bytes()[..], &[0, 1, 0, 1], &[0; 8]].concat();
    feed(&mut codec, &[&header[..], &0u64.to_be_bytes(), &520u64.to_be_bytes()].concat());
    assert_eq!(violation(codec.next_completion()), "a reply with another request's offset");
}

#[test]
fn what_was_not_offered_is_not_asked_for() {
    let mut codec = codec(HeaderStyle::Structured);
    let payload = Bytes::from_static(&[1; 512]);
    for (command, what) in [
        (Command::Flush, "flush"),
        (Command::Trim { offset: 0, length: 512, fua: false }, "trim"),
        (Command::Write { offset: 0, payload, fua: true }, "forced unit access"),
        (Command::Cache { offset: 0, length: 512 }, "cache"),
        (Command::BlockStatus { offset: 0, length: 1 << 40, one: false }, "requests this long"),
    ] {
        let Err(ClientError::NotOffered(missing)) = codec.submit(command) else { panic!("{what}") };
        assert_eq!(missing, what);
    }
    assert_eq!(codec.queued_output(), 0);
}

#[test]
fn a_handshake_that_is_none_is_told_apart() {
    let after = |bytes: &[u8]| violation(Handshake::attach(&ConnectOptions::new("")).received(bytes));
    assert_eq!(after(b"HTTP/1.1 400 Bad Request"), "this is no NBD server");
    assert_eq!(after(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"), "only the old handshake is spoken");
    assert_eq!(after(b"NBDMAGICIHAVEOPT\0\0"), "the fixed newstyle handshake is not spoken");
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    let reply = |option: u32, kind: u32, length: u32| {
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes()].concat()
    };
    let with = |bytes: Vec<u8>| after(&[&greeting[..], &bytes].concat());
    assert_eq!(with(vec![0; 20]), "a reply that is not to the option sent");
    assert_eq!(with(reply(7, 1, 0)), "a reply that is not to the option sent");
    assert_eq!(with(reply(11, 1, u32::MAX)), "a reply to an option that is too long");
    assert_eq!(with(reply(11, 3, 0)), "an unexpected reply to an option");
    assert_eq!(with([reply(11, 1, 0), reply(7, 1, 0)].concat()), "an export without its size");
}

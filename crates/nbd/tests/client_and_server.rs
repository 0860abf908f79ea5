//! Our client against our server, over a real socket.

mod common;

use bytes::Bytes;
use common::disk::BLOCK;
use common::pattern;
use common::server::{CHANGED, Server, Setup};
use rempart_nbd::client::{Answer, Client, ClientError, Command, ConnectOptions, list_exports};
use rempart_nbd::server::{Extent, Limits};
use rempart_nbd::{BASE_ALLOCATION, ErrorCode, HeaderStyle, STATE_HOLE, STATE_ZERO};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

fn options(style: HeaderStyle) -> ConnectOptions {
    let mut options = ConnectOptions::new("disk0");
    options.header_style = style;
    options.contexts = vec![BASE_ALLOCATION.into(), CHANGED.into()];
    options
}

fn connect(server: &Server, style: HeaderStyle) -> Client<UnixStream> {
    Client::connect_unix(&server.socket(), &options(style)).unwrap()
}

#[test]
fn what_is_written_is_read_in_every_header_style() {
    for style in STYLES {
        let server = Setup::one(8 << 20).serve();
        let mut client = connect(&server, style);
        assert_eq!((client.header_style(), client.size()), (style, 8 << 20));
        for (offset, length) in
            [(0, 512), (512, 4096), (BLOCK * 3, 60_928), (1 << 20, 1 << 20), (4 << 20, 3 << 20)]
        {
            let data = pattern(offset, length, 1);
            client.write(offset, &data, false).unwrap();
            let mut back = vec![0xff; length];
            client.read(offset, &mut back).unwrap();
            assert!(back == data, "{length} bytes at {offset} differ with {style:?}");
        }
        let mut whole = vec![0xff; 8 << 20];
        client.read(0, &mut whole).unwrap();
        assert!(whole == server.disks[0].bytes(), "the whole disk differs with {style:?}");
        assert!(server.disks[0].streamed_writes.load(Ordering::SeqCst) > 0);
        client.write_zeroes(0, 1 << 20).unwrap();
        client.trim(1 << 20, 1 << 20).unwrap();
        client.flush().unwrap();
        client.read(0, &mut whole).unwrap();
        assert!(whole[..2 << 20].iter().all(|&byte| byte == 0));
        client.write(0, &[1; 512], true).unwrap();
        assert_eq!(server.disks[0].flushes.load(Ordering::SeqCst), 1);
        assert_eq!(server.disks[0].durable_writes.load(Ordering::SeqCst), 1);
        client.disconnect().unwrap();
        server.assert_no_problems();
    }
}

#[test]
fn many_requests_in_flight_end_each_with_its_own_answer() {
    for style in STYLES {
        let server = Setup::one(16 << 20).serve();
        let mut client = connect(&server, style);
        let mut expected = HashMap::new();
        for index in 0..64u64 {
            let length = 512usize << (index % 12);
            let offset = index * (128 << 10) % (8 << 20);
            let payload = Bytes::from(pattern(offset, length, index));
            let cookie = client.submit(Command::Write { offset, payload, fua: false }).unwrap();
            expected.insert(cookie, ());
        }
        for _ in 0..64 {
            let end = client.wait().unwrap();
            expected.remove(&end.cookie).expect("each ends once");
            assert_eq!(end.result, Ok(Answer::Done));
        }
        let disk = server.disks[0].bytes();
        let mut reads = HashMap::new();
        for index in 0..200u64 {
            let (offset, length) = (index * 36_864 % (15 << 20), 512u32 << (index % 11));
            reads.insert(client.submit(Command::Read { offset, length }).unwrap(), (offset, length));
        }
        while client.in_flight() > 0 {
            let end = client.wait().unwrap();
            let (offset, length) = reads.remove(&end.cookie).unwrap();
            let Ok(Answer::Data(data)) = end.result else { panic!("{end:?}") };
            assert!(data == disk[offset as usize..][..length as usize], "read at {offset} with {style:?}");
            client.recycle(data);
        }
        assert!(reads.is_empty());
    }
}

/// More replies than the server may queue and more requests than it may hold: neither side waits for the other.
#[test]
fn a_client_that_asks_for_more_than_the_limits_is_served_in_turns() {
    let mut setup = Setup::one(64 << 20);
    setup.limits = Limits { requests: 4, bytes: 2 << 20, ..Limits::default() };
    let server = setup.serve();
    server.disks[0].write(0, &pattern(0, 64 << 20, 5));
    let mut client = connect(&server, HeaderStyle::Extended);
    for index in 0..100u64 {
        client.submit(Command::Read { offset: (index % 60) << 20, length: 1 << 20 }).unwrap();
        let payload = Bytes::from(pattern((index % 60) << 20, 256 << 10, 5));
        client.submit(Command::Write { offset: (index % 60) << 20, payload, fua: false }).unwrap();
    }
    while client.in_flight() > 0 {
        assert!(client.wait().unwrap().result.is_ok());
    }
    assert!(server.disks[0].bytes() == pattern(0, 64 << 20, 5));
}

#[test]
fn a_map_tells_holes_and_changes() {
    for style in [HeaderStyle::Structured, HeaderStyle::Extended] {
        let server = Setup::one(1 << 20).serve();
        let mut client = connect(&server, style);
        client.write(BLOCK * 2, &[7; BLOCK as usize], false).unwrap();
        client.trim(BLOCK * 10, BLOCK * 2).unwrap();
        let hole = STATE_HOLE | STATE_ZERO;
        let extent = |blocks: u64, flags: u64| Extent { length: blocks * BLOCK, flags };
        assert_eq!(
            client.map(BASE_ALLOCATION, 0, 1 << 20).unwrap(),
            [extent(2, hole), extent(1, 0), extent(253, hole)]
        );
        assert_eq!(
            client.map(CHANGED, 0, 1 << 20).unwrap(),
            [extent(2, 0), extent(1, 1), extent(7, 0), extent(2, 1), extent(244, 0)]
        );
        client.submit(Command::BlockStatus { offset: 0, length: 1 << 20, one: true }).unwrap();
        let Ok(Answer::Status(statuses)) = client.wait().unwrap().result else { panic!() };
        assert_eq!(statuses.len(), 2);
        assert!(statuses.iter().all(|status| status.extents.len() == 1));
        server.assert_no_problems();
    }
}

#[test]
fn requests_that_break_a_rule_fail_and_the_connection_lives() {
    for style in STYLES {
        let server = Setup::one(1 << 20).serve();
        let mut client = connect(&server, style);
        let mut code = |command: Command| {
            client.submit(command).unwrap();
            client.wait().unwrap().result.map_err(|error| error.code)
        };
        let write = |offset: u64, length: usize| Command::Write {
            offset,
            payload: Bytes::from(vec![1; length]),
            fua: false,
        };
        let zero = |offset, length, fast, no_hole| Command::WriteZeroes {
            offset,
            length,
            fua: false,
            no_hole,
            fast,
        };
        assert_eq!(code(Command::Read { offset: 1 << 20, length: 512 }), Err(ErrorCode::Invalid));
        assert_eq!(code(Command::Read { offset: u64::MAX - 511, length: 512 }), Err(ErrorCode::Invalid));
        assert_eq!(code(Command::Read { offset: 1, length: 512 }), Err(ErrorCode::Invalid));
        assert_eq!(code(Command::Read { offset: 0, length: 100 }), Err(ErrorCode::Invalid));
        assert_eq!(code(write(1 << 20, 512)), Err(ErrorCode::NoSpace));
        assert_eq!(code(write((1 << 20) - 512, 1024)), Err(ErrorCode::NoSpace));
        assert_eq!(code(write(0, 2 << 20)), Err(ErrorCode::NoSpace));
        assert_eq!(code(write(7, 512)), Err(ErrorCode::Invalid));
        assert_eq!(code(write(0, 1000)), Err(ErrorCode::Invalid));
        assert_eq!(code(zero(1 << 20, 512, false, false)), Err(ErrorCode::NoSpace));
        assert_eq!(code(zero(0, 512, true, true)), Err(ErrorCode::NotSupported));
        assert_eq!(code(zero(0, 512, true, false)), Ok(Answer::Done));
        assert_eq!(code(Command::Trim { offset: 1 << 20, length: 512, fua: false }), Err(ErrorCode::Invalid));
        assert_eq!(code(write(0, 0)), Ok(Answer::Done));
        assert_eq!(code(Command::Read { offset: 0, length: 0 }), Ok(Answer::Data(Vec::new())));
        if style > HeaderStyle::Simple {
            assert_eq!(
                code(Command::BlockStatus { offset: 1 << 20, length: 512, one: false }),
                Err(ErrorCode::Invalid)
            );
            assert_eq!(
                code(Command::BlockStatus { offset: 0, length: 0, one: false }),
                Err(ErrorCode::Invalid)
            );
        }
        assert_eq!(code(write(0, 512)), Ok(Answer::Done), "the connection still works");
        server.assert_no_problems();
    }
}

#[test]
fn a_broken_disk_fails_requests_with_its_reason() {
    for style in STYLES {
        let server = Setup::one(4 << 20).serve();
        let mut client = connect(&server, style);
        server.disks[0].broken.store(1, Ordering::SeqCst);
        for command in [
            Command::Read { offset: 0, length: 4096 },
            Command::Write { offset: 0, payload: Bytes::from(vec![1; 4096]), fua: false },
            Command::Write { offset: 0, payload: Bytes::from(vec![1; 3 << 20]), fua: false },
            Command::Flush,
        ] {
            client.submit(command).unwrap();
            let error = client.wait().unwrap().result.unwrap_err();
            assert_eq!(error.code, ErrorCode::Io);
            assert_eq!(error.message, if style == HeaderStyle::Simple { "" } else { "the disk is broken" });
        }
        server.disks[0].broken.store(0, Ordering::SeqCst);
        client.flush().unwrap();
    }
}

#[test]
fn a_read_only_export_refuses_changes() {
    let mut setup = Setup::one(1 << 20);
    setup.exports[0].read_only = true;
    let server = setup.serve();
    let mut client = connect(&server, HeaderStyle::Extended);
    assert!(client.export().is_read_only() && !client.export().can_trim());
    let error = client.write(0, &[1; 512], false).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotPermitted));
    assert!(matches!(client.write_zeroes(0, 512), Err(ClientError::NotOffered("write zeroes"))));
    client.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn exports_are_listed_and_found_by_name() {
    let server = Setup::several(&[1 << 20, 2 << 20, 4 << 20]).serve();
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.set_nonblocking(true).unwrap();
    let exports = list_exports(&mut stream, Duration::from_secs(10)).unwrap();
    let told: Vec<_> = exports.iter().map(|e| (e.name.as_str(), e.description.as_str(), e.size)).collect();
    assert_eq!(
        told,
        [
            ("disk0", "disk 0 of a test", 1 << 20),
            ("disk1", "disk 1 of a test", 2 << 20),
            ("disk2", "disk 2 of a test", 4 << 20)
        ]
    );
    let size = |name: &str| {
        Client::connect_unix(&server.socket(), &ConnectOptions::new(name)).map(|client| client.size())
    };
    assert_eq!(size("disk2").unwrap(), 4 << 20);
    let error = size("disk3").unwrap_err();
    assert_eq!(error.to_string(), "no export `disk3` on this server: no such export");
    assert!(matches!(size(""), Err(ClientError::NoSuchExport { .. })), "none of several is the default");
}

#[test]
fn several_connections_see_one_disk() {
    let server = Setup::one(1 << 20).serve();
    let mut clients: Vec<_> = (0..4).map(|_| connect(&server, HeaderStyle::Extended)).collect();
    assert!(clients[0].export().can_multi_connection());
    for (index, client) in clients.iter_mut().enumerate() {
        client.write(index as u64 * 4096, &pattern(0, 4096, index as u64), false).unwrap();
    }
    for (index, client) in clients.iter_mut().rev().enumerate() {
        let mut data = [0; 4096];
        client.read(index as u64 * 4096, &mut data).unwrap();
        assert_eq!(data[..], pattern(0, 4096, index as u64));
    }
}

#[test]
fn a_server_that_does_not_answer_is_given_up_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut options = ConnectOptions::new("");
    options.timeout = Duration::from_millis(50);
    let error = Client::connect_unix(&path, &options).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { doing: "negotiate with the server" }), "{error}");
    let error = Client::connect_unix(&directory.path().join("nobody"), &options).unwrap_err();
    assert!(matches!(error, ClientError::Io { doing: "connect", .. }), "{error}");
}

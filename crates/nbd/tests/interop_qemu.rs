//! QEMU's programs against our server, and our client against QEMU's servers: with extended headers.

mod common;

use bytes::Bytes;
use common::disk::{BLOCK, Disk};
use common::pattern;
use common::server::{Server, Setup};
use common::tools::{Serving, qemu_img, qemu_io_commands, run, run_any, text, tool};
use rempart_nbd::client::{Answer, Client, ClientError, Command, ConnectOptions, list_exports};
use rempart_nbd::server::Extent;
use rempart_nbd::{BASE_ALLOCATION, ErrorCode, HeaderStyle};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn write_some(disk: &Disk) {
    disk.write(0, &pattern(0, 1 << 20, 1));
    disk.write(5 << 20, &pattern(5 << 20, 3 << 20, 2));
    disk.write((16 << 20) - BLOCK, &pattern(0, BLOCK as usize, 3));
    disk.zero(6 << 20, 1 << 20, true);
}

#[test]
fn qemu_img_converts_both_ways_and_finds_no_difference() {
    let server = Setup::several(&[16 << 20, 16 << 20]).serve();
    write_some(&server.disks[0]);
    let file = text(&server.file("image.qcow2"));
    run(qemu_img().args(["convert", "-f", "raw", "-O", "qcow2", &server.uri(0), &file]));
    run(qemu_img().args(["convert", "-n", "-f", "qcow2", "-O", "raw", &file, &server.uri(1)]));
    assert!(server.disks[1].bytes() == server.disks[0].bytes());
    let same = run(qemu_img().args(["compare", "-f", "raw", "-F", "qcow2", &server.uri(1), &file]));
    assert!(same.contains("Images are identical."), "{same}");
    run(qemu_img().args(["compare", "-f", "raw", "-F", "raw", &server.uri(0), &server.uri(1)]));
    server.disks[1].write(9 << 20, &[1; 512]);
    let output =
        run_any(qemu_img().args(["compare", "-f", "raw", "-F", "raw", &server.uri(0), &server.uri(1)]));
    assert_eq!(output.status.code(), Some(1), "a difference is seen");
    assert!(server.styles().iter().all(|&style| style == HeaderStyle::Extended), "{:?}", server.styles());
    server.assert_no_problems();
}

#[test]
fn qemu_io_reads_writes_zeroes_and_discards() {
    let server = Setup::one(16 << 20).serve();
    write_some(&server.disks[0]);
    let said = qemu_io_commands(
        &server.uri(0),
        &[
            "write -P 0xab 0 4k",
            "read -P 0xab 0 4k",
            "write -f -P 0xcd 1M 2M",
            "read -P 0xcd 1M 2M",
            "write -z 1M 64k",
            "read -P 0 1M 64k",
            "write -z -u 2M 64k",
            "read -P 0 2M 64k",
            "discard 5M 3M",
            "read -P 0 5M 3M",
            "write -P 0x11 12345 777",
            "read -P 0x11 12345 777",
            "aio_write -P 0x22 8M 1M",
            "aio_write -P 0x33 9M 512",
            "aio_flush",
            "read -P 0x22 8M 1M",
            "read -P 0x33 9M 512",
            "flush",
        ],
    );
    assert!(!said.contains("failed"), "{said}");
    assert!(server.disks[0].flushes.load(Ordering::SeqCst) > 0);
    assert!(server.disks[0].durable_writes.load(Ordering::SeqCst) > 0);
    let bytes = server.disks[0].bytes();
    assert!(bytes[(8 << 20)..(9 << 20)].iter().all(|&byte| byte == 0x22));
    assert!(server.styles().iter().all(|&style| style == HeaderStyle::Extended));
    server.assert_no_problems();
}

#[test]
fn qemu_img_maps_holes() {
    let server = Setup::one(1 << 20).serve();
    server.disks[0].write(BLOCK * 16, &pattern(0, BLOCK as usize * 16, 1));
    let map = run(qemu_img().args(["map", "--output=json", "-f", "raw", &server.uri(0)]));
    let rows: Vec<&str> = map.lines().collect();
    assert_eq!(rows.len(), 3, "{map}");
    assert!(rows[0].contains(r#""length": 65536"#) && rows[0].contains(r#""data": false"#), "{map}");
    assert!(rows[1].contains(r#""length": 65536"#) && rows[1].contains(r#""data": true"#), "{map}");
    assert!(rows[2].contains(r#""start": 131072"#) && rows[2].contains(r#""zero": true"#), "{map}");
    server.assert_no_problems();
}

#[test]
fn qemu_reads_a_changed_blocks_context() {
    let server = Setup::one(1 << 20).serve();
    server.disks[0].write(BLOCK * 16, &pattern(0, BLOCK as usize * 16, 1));
    // QEMU shows a context of its choice as allocation: changed is data.
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk0,x-dirty-bitmap={}",
        server.socket().display(),
        common::server::CHANGED
    );
    let map = run(qemu_img().args(["map", "--output=json", "--image-opts", &image]));
    let rows: Vec<&str> = map.lines().collect();
    assert_eq!(rows.len(), 3, "{map}");
    assert!(rows[1].contains(r#""start": 65536, "length": 65536"#), "{map}");
    server.assert_no_problems();
}

#[test]
fn qemu_shows_our_errors() {
    let mut setup = Setup::one(1 << 20);
    setup.exports[0].read_only = true;
    let server = setup.serve();
    let output = run_any(common::tools::qemu_io().args(["-f", "raw", "-c", "write 0 4k", &server.uri(0)]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && (said.contains("read-only") || said.contains("Permission denied")),
        "{said}"
    );
    let output = run_any(qemu_img().args(["info", &server.uri(4)]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no such export"), "{said}");
    server.disks[0].broken.store(1, Ordering::SeqCst);
    let output =
        run_any(common::tools::qemu_io().args(["-r", "-f", "raw", "-c", "read 0 4k", &server.uri(0)]));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Input/output error"), "{said}");
}

/// Lengths over 4 GiB exist only in extended headers.
#[test]
fn one_request_covers_more_than_four_gigabytes() {
    let mut setup = Setup::one(1 << 20);
    setup.exports[0].size = 8 << 30;
    let server = setup.serve();
    // The test's disk holds 1 MiB; the server says so with an error, which is enough to see the length arrive.
    let mut client = Client::connect_unix(&server.socket(), &ConnectOptions::new("disk0")).unwrap();
    assert_eq!(client.size(), 8 << 30);
    server.disks[0].broken.store(1, Ordering::SeqCst);
    assert_eq!(client.write_zeroes(0, 6 << 30).unwrap_err().code(), Some(ErrorCode::Io));
    assert_eq!(client.write_zeroes(4 << 30, 6 << 30).unwrap_err().code(), Some(ErrorCode::NoSpace));
    server.assert_no_problems();
}

/// `qemu-storage-daemon` serving a sparse file as `disk`.
fn storage_daemon(directory: &Path, size: u64) -> Serving {
    let file = directory.join("disk.raw");
    fs::File::create(&file).unwrap().set_len(size).unwrap();
    let socket = directory.join("qsd.socket");
    let pid = directory.join("qsd.pid");
    Serving::start(
        tool("qemu-storage-daemon", "qemu-system-common")
            .args([
                "--blockdev",
                &format!("driver=file,node-name=file0,filename={},discard=unmap", text(&file)),
            ])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=8", text(&socket))])
            .args(["--export", "type=nbd,id=e0,node-name=file0,name=disk,writable=on,allocation-depth=on"])
            .args(["--daemonize", "--pidfile", &text(&pid)]),
        &pid,
    )
}

fn exercise(client: &mut Client<UnixStream>) {
    let size = client.size();
    for (offset, length) in [(0, 512), (4096, 65536), (1 << 20, 3 << 20)] {
        client.write(offset, &pattern(offset, length, 4), offset == 0).unwrap();
    }
    client.flush().unwrap();
    for (offset, length) in [(0, 512), (4096, 65536), (1 << 20, 3 << 20)] {
        let mut data = vec![0; length];
        client.read(offset, &mut data).unwrap();
        assert!(data == pattern(offset, length, 4), "{length} bytes at {offset}");
    }
    client.write_zeroes(1 << 20, 1 << 20).unwrap();
    client.trim(2 << 20, 1 << 20).unwrap();
    let mut data = vec![0xff; 1 << 20];
    client.read(1 << 20, &mut data).unwrap();
    assert!(data.iter().all(|&byte| byte == 0));
    let mut far = vec![0xff; 4 << 20];
    client.read(size - (4 << 20), &mut far).unwrap();
    assert!(far.iter().all(|&byte| byte == 0), "a hole reads as zeroes");
    for index in 0..64u64 {
        let payload = Bytes::from(pattern(index * 8192, 8192, 6));
        client.submit(Command::Write { offset: index * 8192, payload, fua: false }).unwrap();
    }
    while client.in_flight() > 0 {
        assert_eq!(client.wait().unwrap().result, Ok(Answer::Done));
    }
    let mut data = vec![0; 64 * 8192];
    client.read(0, &mut data).unwrap();
    let expected: Vec<u8> = (0..64u64).flat_map(|index| pattern(index * 8192, 8192, 6)).collect();
    assert!(data == expected);
}

#[test]
fn our_client_uses_qemu_storage_daemon_in_every_header_style() {
    let directory = tempfile::tempdir().unwrap();
    let _serving = storage_daemon(directory.path(), 8 << 30);
    let socket = directory.path().join("qsd.socket");
    for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
        let mut options = ConnectOptions::new("disk");
        options.header_style = style;
        options.contexts = vec![BASE_ALLOCATION.into(), "qemu:allocation-depth".into()];
        let mut client = Client::connect_unix(&socket, &options).unwrap();
        assert_eq!((client.header_style(), client.size()), (style, 8 << 30));
        assert!(client.export().can_flush() && client.export().can_fua());
        exercise(&mut client);
        if style > HeaderStyle::Simple {
            let contexts: Vec<_> = client.contexts().collect();
            assert_eq!(contexts, [BASE_ALLOCATION, "qemu:allocation-depth"]);
            let map = client.map(BASE_ALLOCATION, 0, 8 << 30).unwrap();
            assert_eq!(map.iter().map(|extent| extent.length).sum::<u64>(), 8 << 30);
            assert_eq!(map[0], Extent { length: map[0].length, flags: 0 });
            assert_eq!(map.last().unwrap().flags, 3);
            let depth = client.map("qemu:allocation-depth", 0, 8 << 30).unwrap();
            assert!(!depth.is_empty());
        }
        if style == HeaderStyle::Extended {
            client.write_zeroes(1 << 30, 5 << 30).unwrap();
            assert!(client.export().can_filter_block_status());
        }
        client.submit(Command::Read { offset: 8 << 30, length: 512 }).unwrap();
        let error = client.wait().unwrap().result.unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid);
        client.disconnect().unwrap();
    }
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    let exports = list_exports(&mut stream, Duration::from_secs(10)).unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!((exports[0].name.as_str(), exports[0].size), ("disk", 8 << 30));
    let error = Client::connect_unix(&socket, &ConnectOptions::new("other")).unwrap_err();
    assert!(matches!(error, ClientError::NoSuchExport { .. }), "{error}");
}

#[test]
fn our_client_uses_qemu_nbd() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    run(qemu_img().args(["create", "-q", "-f", "qcow2", &text(&image), "64M"]));
    let (socket, pid) = (directory.path().join("socket"), directory.path().join("pid"));
    let _serving = Serving::start(
        tool("qemu-nbd", "qemu-utils")
            .args(["-f", "qcow2", "-x", "disk", "-e", "4", "-t", "--fork", "--discard=unmap"])
            .args(["-k", &text(&socket), "--pid-file", &text(&pid), &text(&image)]),
        &pid,
    );
    let mut options = ConnectOptions::new("disk");
    options.contexts = vec![BASE_ALLOCATION.into()];
    let mut client = Client::connect_unix(&socket, &options).unwrap();
    exercise(&mut client);
    client.disconnect().unwrap();
}

#[test]
fn a_qemu_mirror_into_our_server_is_complete() {
    let server: Server = Setup::one(16 << 20).serve();
    let file = server.file("source.raw");
    fs::write(&file, pattern(0, 16 << 20, 11)).unwrap();
    // A copy through the block layer with many requests in flight, out of order.
    run(qemu_img()
        .args(["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"])
        .args([text(&file), server.uri(0)]));
    assert!(server.disks[0].bytes() == fs::read(&file).unwrap());
    server.assert_no_problems();
}

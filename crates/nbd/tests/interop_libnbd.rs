//! The libnbd programs and fio against our server. This libnbd speaks structured replies at best.

mod common;

use common::disk::BLOCK;
use common::pattern;
use common::server::{CHANGED, Setup};
use common::tools::{fio, nbdcopy, nbdinfo, run, run_any, text};
use rempart_nbd::HeaderStyle;
use std::fs;
use std::sync::atomic::Ordering;

/// A disk of 16 MiB with data, zeroes and holes.
fn write_some(disk: &common::disk::Disk) {
    disk.write(0, &pattern(0, 1 << 20, 1));
    disk.write(5 << 20, &pattern(5 << 20, 3 << 20, 2));
    disk.write((16 << 20) - BLOCK, &pattern(0, BLOCK as usize, 3));
    disk.zero(6 << 20, 1 << 20, true);
}

#[test]
fn nbdinfo_reads_what_an_export_is() {
    let server = Setup::several(&[16 << 20, 32 << 20]).serve();
    let told = run(nbdinfo().args(["--json", &server.uri(1)]));
    for line in [
        r#""protocol": "newstyle-fixed""#,
        r#""structured": true"#,
        r#""export-name": "disk1""#,
        r#""description": "disk 1 of a test""#,
        r#""export-size": 33554432"#,
        r#""is_read_only": false"#,
        r#""is_rotational": false"#,
        r#""can_df": true"#,
        r#""can_fast_zero": true"#,
        r#""can_flush": true"#,
        r#""can_fua": true"#,
        r#""can_multi_conn": true"#,
        r#""can_trim": true"#,
        r#""can_zero": true"#,
        r#""can_cache": false"#,
        r#""block_size_minimum": 512"#,
        r#""block_size_preferred": 4096"#,
        r#""block_size_maximum": 33554432"#,
        r#""base:allocation""#,
        CHANGED,
    ] {
        assert!(told.contains(line), "nbdinfo did not tell {line}:\n{told}");
    }
    assert_eq!(run(nbdinfo().args(["--size", &server.uri(0)])), "16777216\n");
    assert!(run_any(nbdinfo().args(["--is", "tls", &server.uri(0)])).status.code() == Some(2));
    let listed = run(nbdinfo().args([
        "--list",
        "--json",
        &format!("nbd+unix:///?socket={}", server.socket().display()),
    ]));
    assert!(listed.contains(r#""export-name": "disk0""#) && listed.contains(r#""export-name": "disk1""#));
    server.assert_no_problems();
}

#[test]
fn nbdinfo_is_told_that_an_export_is_unknown() {
    let server = Setup::one(1 << 20).serve();
    let output = run_any(nbdinfo().arg(server.uri(7)));
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("No such file or directory for export: disk7"), "{said}");
    server.assert_no_problems();
}

#[test]
fn nbdinfo_maps_both_contexts() {
    let server = Setup::one(1 << 20).serve();
    server.disks[0].write(BLOCK * 2, &pattern(0, BLOCK as usize * 2, 1));
    server.disks[0].zero(BLOCK * 8, BLOCK, false);
    let rows = |context: &str| -> Vec<String> {
        let map = run(nbdinfo().args([&format!("--map={context}"), &server.uri(0)]));
        map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    assert_eq!(
        rows("base:allocation"),
        ["0 8192 3 hole,zero", "8192 8192 0 data", "16384 1032192 3 hole,zero"]
    );
    assert_eq!(
        rows(CHANGED),
        ["0 8192 0", "8192 8192 1", "16384 16384 0", "32768 4096 1", "36864 1011712 0"]
    );
    server.assert_no_problems();
}

#[test]
fn nbdcopy_copies_a_disk_out_and_in() {
    let server = Setup::several(&[16 << 20, 16 << 20]).serve();
    write_some(&server.disks[0]);
    let file = server.file("copy");
    run(nbdcopy().args([&server.uri(0), &text(&file)]));
    assert!(fs::read(&file).unwrap() == server.disks[0].bytes(), "the copy differs");
    run(nbdcopy().args(["--flush", &text(&file), &server.uri(1)]));
    assert!(server.disks[1].bytes() == server.disks[0].bytes(), "the copy back differs");
    assert!(server.disks[1].flushes.load(Ordering::SeqCst) > 0);
    server.assert_no_problems();
}

#[test]
fn nbdcopy_copies_over_several_connections_between_exports() {
    let server = Setup::several(&[64 << 20, 64 << 20]).serve();
    server.disks[0].write(0, &pattern(0, 40 << 20, 9));
    run(nbdcopy().args([
        "--connections=4",
        "--threads=4",
        "--request-size=1048576",
        &server.uri(0),
        &server.uri(1),
    ]));
    assert!(server.disks[1].bytes() == server.disks[0].bytes(), "the copy differs");
    assert_eq!(server.seen.attached.load(Ordering::SeqCst), 8);
    assert!(server.disks[1].streamed_writes.load(Ordering::SeqCst) > 0);
    assert!(server.styles().iter().all(|&style| style == HeaderStyle::Structured));
    server.assert_no_problems();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Setup::one(32 << 20).serve();
    let uri = server.uri(0);
    for (pattern, size, depth) in [("randwrite", "4k", "32"), ("write", "1m", "4"), ("randwrite", "64k", "8")]
    {
        run(fio().current_dir(server.socket().parent().unwrap()).args([
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            &format!("--rw={pattern}"),
            &format!("--bs={size}"),
            &format!("--iodepth={depth}"),
            "--size=16m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_backlog=64",
        ]));
    }
    server.assert_no_problems();
}
